"""One function of the CUDA driver, by ctypes: an asynchronous copy without torch's dispatch around it."""

import ctypes
from collections.abc import Callable

from ..errors import TransferFailed, UnsupportedOption

#: (device address, host address, bytes, stream)
Memcpy = Callable[[int, int, int, int], None]


def open_memcpy() -> Memcpy:
    """cuMemcpyHtoDAsync of the driver that is installed; torch must have made its context current in this thread.

    Raises:
        UnsupportedOption: there is no driver library to open.
    """
    try:
        function = ctypes.CDLL("libcuda.so.1").cuMemcpyHtoDAsync_v2
    except (OSError, AttributeError) as error:
        raise UnsupportedOption(
            f"copies='driver' needs the CUDA driver's libcuda.so.1 ({error}); use copies='torch'"
        ) from error
    function.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    function.restype = ctypes.c_int

    def memcpy(target: int, source: int, nbytes: int, stream: int) -> None:
        code = function(target, source, nbytes, stream)
        if code != 0:
            raise TransferFailed(
                f"cuMemcpyHtoDAsync of {nbytes} bytes failed with {code}; the slots are cold now, run again"
            )

    return memcpy
