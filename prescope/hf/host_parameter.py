"""What stands in a model for an expert weight whose values are in host rows: it can be neither read nor written.

torch hands every operation on a tensor subclass to the class first. So whatever would read or change the values is
refused there, by whichever name, alias or library it comes; nothing is computed from a stand-in, and no write is lost.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import UnsupportedExperts

_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "names", "is_leaf", "requires_grad", "grad",
    "grad_fn", "grad_dtype", "_grad", "_version", "_backward_hooks", "output_nr", "retains_grad", "is_cpu", "is_cuda",
    "is_meta", "is_mkldnn", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "is_mps", "is_xla", "is_xpu",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "is_inference", "is_pinned", "is_shared", "get_device", "data_ptr",
    "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "__len__",
)  # fmt: skip
_FUNCTIONS = ("numel", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_tensor")


def _facts() -> frozenset[Callable[..., Any]]:
    """What torch may be asked of a stand-in: everything but its values."""
    tensor: Any = torch.Tensor
    properties = [getattr(tensor, name) for name in _PROPERTIES if hasattr(tensor, name)]
    setters = [tensor.requires_grad.__set__, tensor.grad.__set__, tensor.grad.__delete__]
    methods = [getattr(tensor, name) for name in _METHODS if hasattr(tensor, name)]
    functions = [getattr(torch, name) for name in _FUNCTIONS]
    return frozenset([*(found.__get__ for found in properties), *setters, *methods, *functions])


_FACTS = _facts()
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]  # a descriptor at run time


class HostParameter(nn.Parameter):
    """A parameter without values of its own. Shape, dtype, device and `requires_grad` can be asked for and set.

    Attributes:
        has_values: whether there are any, elsewhere.
    """

    has_values = True

    @staticmethod
    def standing_for(parameter: nn.Parameter, device: torch.device) -> "HostParameter":
        """Of a weight's shape and dtype, on the device where its layer computes; takes one element of memory."""
        one = torch.full((1,), float("nan"), dtype=parameter.dtype, device=device)
        made = nn.Parameter(one.expand(parameter.shape), parameter.requires_grad)
        made.__class__ = HostParameter
        assert isinstance(made, HostParameter)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Where libraries look for the dtype, and what a wrapper's state_dict holds: writing to it is refused as writing
        # to this is, and so is reading.
        if func == _DATA or (func is torch.Tensor.detach and cls.has_values):
            return args[0]
        if func not in _FACTS:
            name = getattr(func, "__name__", str(func))
            cls.refuse(
                "assigning to an expert's weight" if name == "__set__" else f"{name}() on an expert's weight"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def refuse(cls, what: str) -> NoReturn:
        """Raises UnsupportedExperts: `what` cannot be done, and what can."""
        refuse(what)

    def set_(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Of all methods the one that torch does not hand to `__torch_function__`."""
        self.refuse("set_() on an expert's weight")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped in torch
        return f"HostParameter(shape={tuple(self.shape)}, dtype={self.dtype}, its values are in prescope's host rows)"

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.refuse("copying an attached model")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.refuse("copying or pickling an attached model")


class LostParameter(HostParameter):
    """The same after its engine was closed, of experts that the model never held: they were packed in host rows."""

    has_values = False

    @classmethod
    def refuse(cls, what: str) -> NoReturn:
        raise UnsupportedExperts(
            f"{what}: the experts of this model were packed and went with its engine; load it again with prescope.load"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as above
        return f"LostParameter(shape={tuple(self.shape)}, dtype={self.dtype})"


def refuse(what: str) -> NoReturn:
    """Raises UnsupportedExperts with the way round."""
    raise UnsupportedExperts(
        f"{what}: the experts of this model are in prescope's host rows while it is attached, so their weights cannot "
        f"be read or changed; call detach() on the engine, do it, and attach() again"
    )
