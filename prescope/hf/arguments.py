"""What `load` passes on to transformers' `from_pretrained`, and what it does not, with the way round.

Knows names and values only; nothing is opened here. Nobody's code runs unless it is asked for: `trust_remote_code` is
False, weights are safetensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UnsupportedOption

#: Where a checkpoint comes from: passed on to whatever reads of it.
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
#: How its weights are read: passed on to the model's `from_pretrained`.
WEIGHTS = ("attn_implementation", "quantization_config", "use_safetensors", "variant")
#: Foreign code: passed on to whatever could run some.
CODE = ("trust_remote_code", "code_revision")
PASSED_ON = (*HUB, *WEIGHTS, *CODE)

_PLACES = "prescope places the weights itself, experts in host memory and the rest on the device: say device=, slots="
_KERNELS = "prescope computes the experts: say kernels='torch' or 'triton'"
_PACKED = "say quantization_config=..., as from_pretrained takes it"
_IN_MEMORY = "build the model with from_pretrained and pass it to prescope.attach(model, ...)"
#: Argument of `from_pretrained` that `load` does not take -> what to do instead.
REFUSED = {
    **dict.fromkeys(
        (
            "device_map", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict", "tp_plan", "tp_size",
            "device_mesh", "distributed_config",
        ),
        _PLACES,
    ),
    **dict.fromkeys(("experts_implementation", "use_kernels", "kernel_config", "allow_all_kernels"), _KERNELS),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), _PACKED),
    **dict.fromkeys(
        (
            "config", "state_dict", "gguf_file", "key_mapping", "fusion_config", "adapter_kwargs", "adapter_name",
            "from_tf", "from_flax", "output_loading_info", "weights_only", "disable_mmap",
        ),
        _IN_MEMORY,
    ),
    "ignore_mismatched_sizes": "weights of another shape would be random; fetch the whole checkpoint again",
    "low_cpu_mem_usage": "leave it out: it is always so",
    "generation_config": "pass it to engine.generate(..., generation_config=...)",
    "use_auth_token": "say token=...",
}  # fmt: skip

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float64": torch.float64,
    "double": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Source:
    """How a checkpoint is fetched and read.

    Attributes:
        hub: keywords of every `from_pretrained`: revision, token, cache_dir, subfolder, ...
        weights: keywords of the model's own: attn_implementation, quantization_config, variant.
        use_safetensors: False lets a pickle be loaded, which only a file of a known origin should be.
        trust_remote_code: code that comes with the checkpoint may run.
    """

    hub: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    use_safetensors: bool = True
    trust_remote_code: bool = False
    code_revision: str | None = None

    @property
    def subfolder(self) -> str:
        return str(self.hub.get("subfolder") or "")

    @property
    def attention(self) -> dict[str, Any]:
        """Of `weights` what a model that is made without reading any takes too."""
        return {name: value for name, value in self.weights.items() if name == "attn_implementation"}

    @property
    def code(self) -> dict[str, Any]:
        """Keywords that say whether foreign code may run."""
        revision = {} if self.code_revision is None else {"code_revision": self.code_revision}
        return {"trust_remote_code": self.trust_remote_code, **revision}


def take_source(keywords: dict[str, Any]) -> Source:
    """Take what is for `from_pretrained` out of the keywords of `load`; the rest, left there, is for the engine.

    Raises:
        UnsupportedOption: an argument of `from_pretrained` that has another place in prescope, with that place.
    """
    for name in keywords.keys() & REFUSED.keys():
        raise UnsupportedOption(f"{name} is not taken by prescope.load; {REFUSED[name]}")
    given = {name: keywords.pop(name) for name in PASSED_ON if name in keywords}
    for name in ("trust_remote_code", "use_safetensors"):
        if not isinstance(given.get(name), bool | None):
            raise UnsupportedOption(f"{name} is {given[name]!r}; it is True or False")
    return Source(
        hub={name: given[name] for name in HUB if given.get(name) is not None},
        weights={
            name: given[name] for name in WEIGHTS if given.get(name) is not None and name != "use_safetensors"
        },
        use_safetensors=given.get("use_safetensors") is not False,
        trust_remote_code=given.get("trust_remote_code") is True,
        code_revision=given.get("code_revision"),
    )


def dtype_of(given: torch.dtype | str) -> torch.dtype | str:
    """The dtype of a name such as "bf16", "bfloat16" or "torch.bfloat16"; "auto" stays.

    Raises:
        UnsupportedOption: no dtype that a model computes in.
    """
    if given == "auto":
        return "auto"
    found = _DTYPES.get(given.removeprefix("torch.")) if isinstance(given, str) else given
    if found not in _DTYPES.values():
        raise UnsupportedOption(
            f"dtype is {given!r}; choose 'auto' (as the checkpoint has it), 'bfloat16', 'float16' or 'float32'"
        )
    return found  # type: ignore[return-value]  # it is one of them
