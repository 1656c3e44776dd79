"""A bell that compiled code rings and one thread waits for; neither asks again and again whether it rang."""

import ctypes
from typing import Any

from ..errors import UnsupportedOption
from .native import address_of

#: Enough for a semaphore of any C library.
_SEMAPHORE_BYTES = 64


class Bell:
    """A semaphore of the C library. Ringing takes less than a microsecond, some more where it wakes the thread.

    Attributes:
        ring_address, address: of the function that rings, and what it is called with, for `native.call`.

    Raises:
        UnsupportedOption: the system has no such semaphores.
    """

    def __init__(self) -> None:
        self._library: Any = ctypes.CDLL(None)
        self._semaphore = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
        self.address = ctypes.addressof(self._semaphore)
        self.ring_address = address_of(self._library.sem_post)
        if self._library.sem_init(self._semaphore, 0, 0) != 0:
            raise UnsupportedOption(
                "this system has no unnamed semaphores, by which compiled code wakes a thread"
            )

    def ring(self) -> None:
        """Wake whoever waits, or who will."""
        self._library.sem_post(self._semaphore)

    def wait(self) -> None:
        """Return when it was rung since the last wait, once for however many times. A signal may end it too early."""
        if self._library.sem_wait(self._semaphore) == 0:
            while self._library.sem_trywait(self._semaphore) == 0:
                pass
