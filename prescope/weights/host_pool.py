"""The experts in host memory: one contiguous, pinned row per expert, filled layer by layer."""

import hashlib
import time
import weakref

import torch

from ..core.machine import available_memory_bytes
from ..core.units import format_bytes
from ..device import Device
from ..errors import NotEnoughMemory
from .layout import Field, RowLayout
from .pages import HostPages, copy_rows

#: Leading bytes of each expert that enter the fingerprint. The whole of a large model would take minutes to hash.
FINGERPRINT_BYTES_PER_EXPERT = 4096


def host_bytes(rows_bytes: int, read_bytes: int) -> str:
    """What experts take of host memory, in words; arguments as of `require_host_memory`."""
    return format_bytes(rows_bytes) + (
        f" ({format_bytes(read_bytes)} as they are read)" if read_bytes else ""
    )


def require_host_memory(rows_bytes: int, taken_bytes: int, ahead_bytes: int, read_bytes: int = 0) -> None:
    """Raise NotEnoughMemory if the rows of all experts do not fit, before anything is moved.

    Args:
        rows_bytes: of all layers. `taken_bytes`: of experts in host memory, given up layer by layer as the rows fill.
        ahead_bytes: of the rows that are there before what they replace is gone.
        read_bytes: of experts that will be read whole, and then packed and given up layer by layer.
    """
    wanted, free = max(0, rows_bytes - taken_bytes, read_bytes) + ahead_bytes, available_memory_bytes()
    if wanted > free:
        raise NotEnoughMemory(
            f"the experts take {host_bytes(rows_bytes, read_bytes)} of host memory, {format_bytes(wanted)} of it still "
            f"to be had, and {format_bytes(free)} are free; close other programs, or take a smaller model or dtype"
        )


class HostLayer:
    """Rows (E, row_bytes) of one MoE layer.

    Attributes:
        rows: (E, row_bytes) of uint8.
        seconds: what `copy` (page faults included, where the source is on the CPU), `touch` and `pin` took.
    """

    def __init__(self, layout: RowLayout, num_experts: int, device: Device) -> None:
        self.layout = layout
        self.seconds = {"touch": 0.0, "pin": 0.0, "copy": 0.0}
        self._device = device
        self._pages = HostPages(num_experts * layout.row_bytes)
        self.rows = self._pages.data.view(num_experts, layout.row_bytes)
        self._pinned = False
        self._unpin: weakref.finalize | None = None
        self._views: list[torch.Tensor] = []

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy stacked expert tensors (E, ...) into the rows, and pin them."""
        if is_on_host(tensors):
            self.copy(tensors)  # which faults the pages in: pinning existing pages is several times faster
            self.pin()
        else:
            self.prepare()
            self.copy(tensors)

    def prepare(self) -> None:
        """Fault the pages in and pin them, for a fill from the GPU.

        A GPU writes into pinned memory at the link's rate, into pageable memory at a seventh of it.
        """
        started = time.perf_counter()
        self._pages.touch()
        self.seconds["touch"] += time.perf_counter() - started
        self.pin()

    def pin(self) -> None:
        """Make the rows copyable by DMA, if the device needs that; does nothing the second time."""
        if self._pinned:
            return
        started = time.perf_counter()
        self._pinned = self._device.pin(self.rows)
        if self._pinned:
            # Registered memory must be unregistered before it is freed: a later allocation at the same address fails
            # with "resource already mapped" otherwise. Also when an engine is dropped without `detach`: the finalizer
            # keeps the memory until it has run. At the process's end the driver does it faster.
            self._unpin = weakref.finalize(self, self._device.unpin, self.rows)
            self._unpin.atexit = False
            self._pages.keep_from_children()
        self.seconds["pin"] += time.perf_counter() - started

    def copy(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy stacked expert tensors (E, ...) into the rows; those of a GPU need the rows pinned."""
        started = time.perf_counter()
        for name, tensor in tensors.items():
            self._copy_field(self.layout.field(name), tensor.detach())
        if not is_on_host(tensors):
            self._device.synchronize()
        self.seconds["copy"] += time.perf_counter() - started

    def _copy_field(self, field: Field, source: torch.Tensor) -> None:
        target = self.layout.view(self.rows, field.name)
        if source.device.type != "cpu":
            # Expert by expert: one copy into the strided view would go through a temporary of the whole layer.
            for expert in range(source.shape[0]):
                target[expert].copy_(source[expert], non_blocking=True)
        elif source.is_contiguous() and source.dtype == field.dtype:
            source_bytes = source.view(source.shape[0], -1).view(torch.uint8)
            copy_rows(self.rows[:, field.offset : field.offset + field.nbytes], source_bytes)
        else:
            target.copy_(source)

    def restore(self, name: str, device: torch.device) -> torch.Tensor:
        """A field of all experts (E, ...) as a tensor of its own on `device`."""
        source = self.tensor(name)
        result = torch.empty(source.shape, dtype=source.dtype, device=device)
        if device.type == "cpu":
            field = self.layout.field(name)
            target = result.view(result.shape[0], -1).view(torch.uint8)
            copy_rows(target, self.rows[:, field.offset : field.offset + field.nbytes])
            return result
        for expert in range(source.shape[0]):
            result[expert].copy_(source[expert], non_blocking=True)
        self._device.synchronize()
        return result

    def tensor(self, name: str) -> torch.Tensor:
        """A field of all experts (E, ...), as a view of the rows."""
        return self.layout.view(self.rows, name)

    def row(self, expert: int) -> torch.Tensor:
        """One expert's row (row_bytes,)."""
        if not self._views:  # kept: making a view takes 1.5 us of the 10 that issuing a copy costs the host
            self._views = list(self.rows.unbind(0))
        return self._views[expert]

    def fingerprint_bytes(self) -> bytes:
        """The first bytes of each expert."""
        return self.rows[:, :FINGERPRINT_BYTES_PER_EXPERT].contiguous().numpy().tobytes()

    def close(self) -> None:
        """Unpin and give the memory back; views of it must not be used afterwards."""
        if self._unpin is not None:
            # By hand: a finalizer that an interrupt has ended does not run again, and the memory would be given back
            # while it is registered. Done twice it does no harm.
            self._device.unpin(self.rows)
            self._unpin.detach()
        self._pinned, self._unpin = False, None
        self._views = []
        self.rows = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._pages.close()


def is_on_host(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether all of a layer's expert tensors are in CPU memory."""
    return all(tensor.device.type == "cpu" for tensor in tensors.values())


class HostPool:
    """Host rows of all MoE layers."""

    def __init__(self, layers: list[HostLayer]) -> None:
        self.layers = layers

    @property
    def nbytes(self) -> int:
        return sum(layer.rows.nbytes for layer in self.layers)

    @property
    def seconds(self) -> dict[str, float]:
        """What filling the rows took, by part, summed over the layers; parts of two layers may overlap."""
        return {part: sum(layer.seconds[part] for layer in self.layers) for part in ("touch", "pin", "copy")}

    def row(self, moe_layer: int, expert: int) -> torch.Tensor:
        """One expert's row (row_bytes,) of uint8."""
        return self.layers[moe_layer].row(expert)

    def fingerprint(self, description: str) -> str:
        """Identity of the model: its shape in words and the first bytes of each expert's weights."""
        digest = hashlib.blake2b(description.encode(), digest_size=16)
        for layer in self.layers:
            digest.update(layer.fingerprint_bytes())
        return digest.hexdigest()

    def close(self) -> None:
        for layer in self.layers:
            layer.close()
        self.layers = []
