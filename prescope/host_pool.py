"""The experts' home in host memory: one contiguous, pinned row per expert, filled layer by layer."""

import hashlib
import mmap

import torch

from .device import Device
from .layout import RowLayout

#: Leading bytes of each expert that enter the fingerprint. The whole of a large model would take minutes to hash.
FINGERPRINT_BYTES_PER_EXPERT = 4096


class HostLayer:
    """Rows (E, row_bytes) of one MoE layer.

    The memory is mapped page by page for itself: `cudaHostRegister` works on whole pages, and two tensors from the
    ordinary allocator may share one.
    """

    def __init__(self, layout: RowLayout, num_experts: int, device: Device) -> None:
        self.layout = layout
        self._device = device
        self._memory: mmap.mmap | None = mmap.mmap(-1, num_experts * layout.row_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.rows = torch.frombuffer(self._memory, dtype=torch.uint8).view(num_experts, layout.row_bytes)
        self._pinned = False

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Pin the rows and copy stacked expert tensors (E, ...) into them."""
        # Pinned first: a GPU writes into pinned memory at the link's rate, into pageable memory at a seventh of it.
        self._pinned = self._device.pin(self.rows)
        for name, tensor in tensors.items():
            target, source = self.layout.view(self.rows, name), tensor.detach()
            if source.device.type == "cpu":
                target.copy_(source)
                continue
            # Expert by expert: one copy into the strided view would go through a temporary of the whole layer.
            for expert in range(source.shape[0]):
                target[expert].copy_(source[expert], non_blocking=True)
        self._device.synchronize()

    def tensor(self, name: str) -> torch.Tensor:
        """A field of all experts (E, ...), as a view of the rows."""
        return self.layout.view(self.rows, name)

    def fingerprint_bytes(self) -> bytes:
        """The first bytes of each expert."""
        return self.rows[:, :FINGERPRINT_BYTES_PER_EXPERT].contiguous().numpy().tobytes()

    def close(self) -> None:
        """Unpin and give the memory back; views of it must not be used afterwards."""
        # Registered memory must be unregistered before it is freed: a later allocation at the same address fails
        # with "resource already mapped" otherwise.
        if self._pinned:
            self._device.unpin(self.rows)
            self._pinned = False
        self.rows = torch.empty(0, dtype=torch.uint8)
        self._memory = None


class HostPool:
    """Host rows of all MoE layers."""

    def __init__(self, layers: list[HostLayer]) -> None:
        self.layers = layers

    @property
    def nbytes(self) -> int:
        return sum(layer.rows.nbytes for layer in self.layers)

    def row(self, moe_layer: int, expert: int) -> torch.Tensor:
        """One expert's row (row_bytes,) of uint8."""
        return self.layers[moe_layer].rows[expert]

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
