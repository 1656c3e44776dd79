"""The CUDA driver by ctypes: copies and events without torch's dispatch around them."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from ..core.native import address_of
from ..core.worker import process_id
from ..errors import TransferFailed, UnsupportedOption
from .base import LinkFunctions

#: (device address, host address, bytes, stream)
Memcpy = Callable[[int, int, int, int], None]


def library_name(platform: str) -> str:
    """Of the driver's library, by the name that Python has for the system."""
    return "nvcuda.dll" if platform == "win32" else "libcuda.so.1"


@cache
def open_driver() -> ctypes.CDLL:
    """The installed driver; torch must have made its context current in this thread.

    Raises:
        UnsupportedOption: there is no driver library to open.
    """
    name = library_name(sys.platform)
    try:
        library = ctypes.CDLL(name)
        library.cuMemcpyHtoDAsync_v2.argtypes = [
            ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
        ]  # fmt: skip
        library.cuEventElapsedTime.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        library.cuEventQuery.argtypes = [ctypes.c_void_p]
        library.cuEventDestroy_v2.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise UnsupportedOption(
            f"copies go by the CUDA driver's {name}, which cannot be opened ({error}); install NVIDIA's driver, or "
            f"use device='cpu' for an emulated link"
        ) from error
    return library


def open_memcpy() -> Memcpy:
    """cuMemcpyHtoDAsync. Raises as `open_driver`."""
    function = open_driver().cuMemcpyHtoDAsync_v2

    def memcpy(target: int, source: int, nbytes: int, stream: int) -> None:
        code = function(target, source, nbytes, stream)
        if code != 0:
            raise TransferFailed(
                f"cuMemcpyHtoDAsync of {nbytes} bytes failed with {code}; the slots are cold now, run again"
            )

    return memcpy


def link_functions(stream: int, repeats: int) -> LinkFunctions:
    """The driver's functions for compiled code. Raises as `open_driver`."""
    cuda = open_driver()
    return LinkFunctions(
        address_of(cuda.cuMemcpyHtoDAsync_v2),
        address_of(cuda.cuEventCreate),
        address_of(cuda.cuEventRecord),
        address_of(cuda.cuEventQuery),
        stream,
        repeats,
    )


class DriverMark(NamedTuple):
    """An event among others."""

    events: "DriverEvents"
    place: int

    @property
    def cuda_event(self) -> int:
        """Its handle, as `torch.cuda.Event` names it."""
        return int(self.events.handles[self.place])


class DriverEvents:
    """Room for CUDA events that compiled code creates; destroyed with this object."""

    def __init__(self) -> None:
        self._driver, self._owner = open_driver(), process_id()
        self.handles = np.zeros(0, dtype=np.int64)

    def reserve(self, count: int) -> None:
        if count > len(self.handles):
            more = np.zeros(max(count, 2 * len(self.handles)), dtype=np.int64)
            more[: len(self.handles)] = self.handles
            self.handles = more

    def mark(self, place: int) -> DriverMark:
        return DriverMark(self, place)

    def elapsed_us(self, begin: int, end: int) -> float | None:
        if self._driver.cuEventQuery(int(self.handles[end])) != 0:
            return None
        return elapsed_us(int(self.handles[begin]), int(self.handles[end]))

    def __del__(self) -> None:
        for handle in getattr(self, "handles", ()):
            if handle and self._owner == process_id():  # a forked process has no context
                self._driver.cuEventDestroy_v2(int(handle))


def elapsed_us(start: int, end: int) -> float:
    """Time between two recorded events, by their handles."""
    milliseconds = ctypes.c_float()
    code = open_driver().cuEventElapsedTime(ctypes.addressof(milliseconds), start, end)
    if code != 0:
        raise TransferFailed(f"cuEventElapsedTime failed with {code}; the slots are cold now, run again")
    return 1e3 * milliseconds.value
