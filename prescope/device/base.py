"""What the loader and the engine ask of a device: two lanes, marks between them, and a clock.

The *compute lane* runs the model; the *H2D lane* copies experts from host memory into slots. A mark is a point on a
lane: the other lane can wait for it without the host waiting (on CUDA), and it knows its time. One protocol with
three devices: CUDA; the CPU with an emulated link (a real, paced copy in a thread); and a null device with a virtual
clock that completes copies in any order the protocol allows, for tests.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UnsupportedOption

#: A point in time on one lane; opaque to everyone but its device.
Mark = Any


class LinkFunctions(NamedTuple):
    """Addresses of C functions that hand copies to the H2D lane, for compiled code (see `native.call`)."""

    memcpy: int  # (target, source, bytes, stream): 0, or an error
    create_event: int  # (where its handle is written, flags)
    record_event: int  # (event, stream)
    query_event: int  # (event): 0 when it has passed, 600 before
    stream: int
    repeats: int  # how often each expert is copied: more than once stands for a slower link


class Events(Protocol):
    """Events that compiled code makes and records; all are given back with this object."""

    handles: NDArray[np.int64]  # 0 where there is none yet

    def reserve(self, count: int) -> None:
        """Make room for so many handles; those there stay."""
        ...

    def mark(self, place: int) -> Mark:
        """A mark for `Device.elapsed_us`, if the events know their time."""
        ...

    def elapsed_us(self, begin: int, end: int) -> float | None:
        """Time between two of them, if they know it; None while the second has not passed."""
        ...


class Device(Protocol):
    """Two lanes and a clock."""

    kind: str  # its name in `DEVICES`
    captures_steps: bool  # decode steps can run from a graph, and kernels in Triton
    small_copies_are_slow: bool  # copies below some MiB do not reach the link's rate
    torch_device: torch.device  # where slots and the rest of the model live

    def as_current(self) -> AbstractContextManager[object]:
        """Everything that a thread does with the device happens inside: streams, events and Triton's launches are of
        the thread's current GPU, which is the first one until it says otherwise.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for `RunResult.hardware`: device name, link ("measured", "emulated", "virtual") and its GB/s."""
        ...

    def free_bytes(self) -> int:
        """Memory that slots may take now."""
        ...

    def allocate_slots(self, num_slots: int, row_bytes: int) -> torch.Tensor:
        """Uninitialised pool (S, row_bytes) of uint8 on the device."""
        ...

    def pin(self, row: torch.Tensor) -> bool:
        """Make host memory copyable by DMA; returns whether that was needed and done."""
        ...

    def unpin(self, row: torch.Tensor) -> None:
        """Undo `pin`; the memory must not be freed before. A second time, after an interrupt, it does nothing."""
        ...

    def copy(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        after: Sequence[Mark],
        timed: bool,
        each: bool = True,
    ) -> tuple[Mark, list[Mark]]:
        """Issue copies of (slot, host row) pairs on the H2D lane, in order, once all of `after` have passed.

        Args:
            pairs: contiguous tensors of the same shape.
            each: whether every copy needs a ready mark of its own; if not, one mark may stand for all of them.

        Returns:
            The mark before the first copy, and a ready mark for each pair.

        Raises:
            TransferFailed: an earlier or this copy failed.
        """
        ...

    def mark(self, timed: bool) -> Mark:
        """A mark at the end of what the compute lane has been given so far."""
        ...

    def graph_mark(self) -> Mark:
        """A timed mark as `mark` makes it; while launches are taken down, one that each replay passes anew."""
        ...

    def wait(self, mark: Mark) -> None:
        """The compute lane goes on only after `mark`. Raises TransferFailed if its copy failed."""
        ...

    def is_done(self, mark: Mark) -> bool:
        """Whether the mark has passed, without waiting. Raises TransferFailed if its copy failed."""
        ...

    def elapsed_us(self, start: Mark, end: Mark) -> float:
        """Time between two timed marks that have passed, in microseconds."""
        ...

    def read(self, tensor: torch.Tensor) -> NDArray[Any]:
        """Copy a small tensor to the host; the host waits for it."""
        ...

    def send(
        self,
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
        last: tuple[torch.Tensor, torch.Tensor] | None,
        begin: bool = False,
        end: bool = False,
        timed: bool = False,
    ) -> tuple[Mark | None, Mark | None]:
        """Copy (target, source) pairs on the H2D lane in order, and `last` behind all of them.

        Args:
            begin, end: leave a mark before and behind them; `timed`: that knows its time.
        """
        ...

    def link_functions(self) -> LinkFunctions:
        """How compiled code copies. Raises UnsupportedOption where steps are not captured."""
        ...

    def open_events(self, timed: bool) -> Events:
        """Room for events that compiled code leaves on the H2D lane; `timed`: they know their time."""
        ...

    def capture(
        self, run: Callable[[], torch.Tensor], shares_memory: bool = False
    ) -> tuple[Callable[[], None], torch.Tensor]:
        """Take down the launches of `run` without running them; returns how to replay them, and `run`'s result.

        Graphs that share memory overwrite each other's results, and must not run at the same time.

        Raises UnsupportedOption where there are no graphs, RuntimeError if a launch cannot be captured.
        """
        ...

    def clock(self, stamp: Callable[[], torch.Tensor]) -> tuple[Mark, int]:
        """One moment as a timed mark and as `stamp` reads it from the device's own clock, in nanoseconds."""
        ...

    def is_idle(self) -> bool:
        """Whether the compute lane has nothing left to do."""
        ...

    def synchronize(self) -> None:
        """The host waits until both lanes are idle. Raises TransferFailed if a copy failed."""
        ...

    def recover(self) -> None:
        """Make the lanes usable again after an interrupt or a failed copy; pending copies are dropped or done."""
        ...

    def close(self) -> None:
        """Stop threads; the device is not used afterwards."""
        ...


class OnCpu:
    """What a device answers that computes at once, on the CPU: nothing is pinned, nothing is captured."""

    captures_steps = small_copies_are_slow = False

    def as_current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def pin(self, row: torch.Tensor) -> bool:
        return False

    def unpin(self, row: torch.Tensor) -> None:
        pass

    def read(self, tensor: torch.Tensor) -> NDArray[Any]:
        return tensor.numpy()

    def send(
        self: Device,
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
        last: tuple[torch.Tensor, torch.Tensor] | None,
        begin: bool = False,
        end: bool = False,
        timed: bool = False,
    ) -> tuple[Mark | None, Mark | None]:
        before = self.mark(timed) if begin else None
        for target, source in chain(pairs, [] if last is None else [last]):
            target.copy_(source)
        return before, self.mark(timed) if end else None

    def link_functions(self) -> LinkFunctions:
        raise UnsupportedOption("steps are captured on CUDA only")

    def open_events(self, timed: bool) -> Events:
        raise UnsupportedOption("steps are captured on CUDA only")

    def graph_mark(self) -> Mark:
        raise UnsupportedOption("steps are captured on CUDA only")

    def capture(
        self, run: Callable[[], torch.Tensor], shares_memory: bool = False
    ) -> tuple[Callable[[], None], torch.Tensor]:
        raise UnsupportedOption("steps are captured on CUDA only")

    def clock(self, stamp: Callable[[], torch.Tensor]) -> tuple[Mark, int]:
        raise UnsupportedOption("only steps captured on CUDA read the device's clock")

    def is_idle(self) -> bool:
        return True
