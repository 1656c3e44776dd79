"""How compiled functions hand arrays and NamedTuples to Python: by C functions alone, so that no signal comes between.

numba unpickles the class of each array and NamedTuple it returns, and calls the latter: Python code, and whatever comes
back is used unseen (numba 0.68.1: box_namedtuple in its boxing, nrt_adapt_ndarray_to_python). Python runs a
signal's handler where Python code begins. One that raises there, as Ctrl-C's does, leaves NULL where a class should be,
and the process is gone: once in some ten interrupts of such a call (tests/core/test_jit.py). Here classes come out of
the function's environment and `tuple.__new__` takes the fields; the signal is noticed when the caller goes on. It is
also 1 us faster.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import boxing
from numba.core.pythonapi import _boxers
from numba.core.types.containers import NamedTuple, NamedUniTuple
from numba.core.types.npytypes import Array


def install() -> None:
    """From now on numba boxes arrays and NamedTuples so, in all functions of this process: it knows one way a type."""
    _boxers.functions[Array] = _box_array
    for kind in (NamedTuple, NamedUniTuple):
        _boxers.functions[kind] = _box_named_tuple


def _box_array(typ: Any, value: Any, c: Any) -> Any:
    with _constants_from_environment(c):
        return boxing.box_array(typ, value, c)


def _box_named_tuple(typ: Any, value: Any, c: Any) -> Any:
    make, cls = _constant(c, tuple.__new__), _constant(c, typ.instance_class)
    fields = boxing.box_tuple(typ, value, c)
    made = c.pyapi.call_function_objargs(make, (cls, fields))
    c.pyapi.decref(fields)
    return made


def _constant(c: Any, value: Any) -> Any:
    """Generates what reads an object that the function's environment keeps; the reference is borrowed."""
    return c.env_manager.read_const(c.env_manager.add_const(value))


@contextmanager
def _constants_from_environment(c: Any) -> Iterator[None]:
    """Meanwhile the environment keeps what numba would pickle into the code. (It borrows the class it unpickles.)"""
    c.pyapi.serialize_object, c.pyapi.unserialize = lambda value: value, lambda value: _constant(c, value)
    try:
        yield
    finally:
        del c.pyapi.serialize_object, c.pyapi.unserialize
