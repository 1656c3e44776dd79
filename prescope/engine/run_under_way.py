"""A run that others may have to wait for."""

import threading

from ..core.worker import SLICE_S, Latch
from ..errors import WaitTimedOut

#: Until its next token: a long prompt on a slow link takes minutes.
MOST_TOKEN_S = 600.0


class RunUnderWay:
    """A run of this thread, from its first forward to its result.

    Attributes:
        over: set when it has ended, in whatever way.
    """

    def __init__(self) -> None:
        self.over = Latch()
        self._thread = threading.get_ident()

    def wait_from_elsewhere(self) -> None:
        """Return when it is over; at once in its own thread, which cannot wait for itself.

        Raises:
            WaitTimedOut: it does not end.
        """
        if threading.get_ident() == self._thread:
            return
        slices_left = int(MOST_TOKEN_S / SLICE_S)
        while not self.over.wait(SLICE_S):
            slices_left -= 1
            if slices_left <= 0:
                raise WaitTimedOut(
                    f"the run in another thread did not come to its next token within {MOST_TOKEN_S:.0f} s; it gives "
                    f"the model back when it ends"
                )
