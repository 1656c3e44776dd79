"""For compiled code: call C functions by their address, and read and write words of memory in a fixed order.

For loops that wait for another processor's messages: an ordinary load may be taken out of such a loop by the compiler.
Without numba (`jit`) the same names are ordinary Python over ctypes.
"""

import ctypes
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .jit import IS_COMPILED, jit

_INT64, _INT32 = ctypes.c_int64, ctypes.c_int32
#: The clock of `time.perf_counter`, as the C library numbers it.
_CLOCK = int(getattr(time, "CLOCK_MONOTONIC", 0))


def address_of(function: Any) -> int:
    """Address of a function of a library that ctypes has opened, or of a callback of ctypes."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def clock_address() -> int:
    """Address of a function (clock, two words) that writes a clock's seconds and nanoseconds, for `now_us`."""
    try:
        return address_of(ctypes.CDLL(None).clock_gettime)
    except (AttributeError, OSError, TypeError):  # not POSIX: by way of the interpreter
        return address_of(_python_clock)


@ctypes.CFUNCTYPE(ctypes.c_int, _INT64, _INT64)
def _python_clock(kind: int, address: int) -> int:
    words = (_INT64 * 2).from_address(address)
    words[0], words[1] = divmod(time.perf_counter_ns(), 1_000_000_000)
    return 0


@cache
def _prototype(count: int) -> Callable[[int], Any]:
    return ctypes.CFUNCTYPE(_INT64, *[_INT64] * count)


if IS_COMPILED:
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    _I64, _I32 = ir.IntType(64), ir.IntType(32)

    @intrinsic
    def call(typing, address, arguments):  # type: ignore[no-untyped-def]
        """Call a C function of integers and pointers; returns its word, of which an `int` is the lower half."""
        signature = types.int64(types.int64, arguments)
        count = len(arguments)

        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            at, packed = values
            kind = ir.FunctionType(_I64, [_I64] * count)
            function = builder.inttoptr(at, kind.as_pointer())
            return builder.call(function, [builder.extract_value(packed, i) for i in range(count)])

        return signature, generate

    def _loading(kind: Any, bits: ir.IntType, align: int) -> Any:
        def load(typing, address):  # type: ignore[no-untyped-def]
            def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
                pointer = builder.inttoptr(values[0], bits.as_pointer())
                return builder.load_atomic(pointer, "acquire", align)

            return kind(types.int64), generate

        return load

    def _storing(kind: Any, bits: ir.IntType, align: int) -> Any:
        def store(typing, address, value):  # type: ignore[no-untyped-def]
            def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
                pointer = builder.inttoptr(values[0], bits.as_pointer())
                builder.store_atomic(values[1], pointer, "release", align)
                return context.get_dummy_value()

            return types.none(types.int64, kind), generate

        return store

    @intrinsic
    def swap_int32(typing, address, value):  # type: ignore[no-untyped-def]
        """Write a word; loads that follow wait until others may see it. Returns what was there."""

        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            pointer = builder.inttoptr(values[0], _I32.as_pointer())
            return builder.atomic_rmw("xchg", pointer, values[1], "seq_cst")

        return types.int32(types.int64, types.int32), generate

    load_int64 = intrinsic(_loading(types.int64, _I64, 8))
    store_int32 = intrinsic(_storing(types.int32, _I32, 4))
    store_int64 = intrinsic(_storing(types.int64, _I64, 8))
else:

    def call(address: int, arguments: tuple[int, ...]) -> int:
        """Call a C function of integers and pointers; returns its word, of which an `int` is the lower half."""
        return int(_prototype(len(arguments))(address)(*map(int, arguments)))

    def load_int64(address: int) -> int:
        """The word at an address; what is read afterwards is as new as it."""
        return _INT64.from_address(int(address)).value

    def swap_int32(address: int, value: int) -> int:
        """Write a word; loads that follow wait until others may see it. Returns what was there."""
        word = _INT32.from_address(int(address))
        former, word.value = word.value, int(value)
        return former

    def store_int32(address: int, value: int) -> None:
        """Write a word; what was written before is seen before it."""
        _INT32.from_address(int(address)).value = int(value)

    def store_int64(address: int, value: int) -> None:
        """Write a word; what was written before is seen before it."""
        _INT64.from_address(int(address)).value = int(value)


@jit
def now_us(clock: int, words: NDArray[np.int64]) -> float:
    """The clock of `time.perf_counter` in microseconds; `clock` is `clock_address()`, (2,) `words` are overwritten."""
    call(clock, (_CLOCK, words.ctypes.data))
    return words[0] * 1e6 + words[1] * 1e-3
