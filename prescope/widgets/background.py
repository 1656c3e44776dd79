"""Work of a panel beside the kernel's own: whatever becomes of it is told."""

import threading
from collections.abc import Callable


def in_background(name: str, work: Callable[[], object], failed: Callable[[Exception], object]) -> None:
    """Do it in a thread of its own.

    Args:
        name: of the thread. failed: told an error of any kind.
    """

    def run() -> None:
        try:
            work()
        # A graphics card's memory, a folder that is not ours: lost in a thread, "recording" would stand for ever.
        except Exception as error:  # noqa: BLE001
            failed(error)

    threading.Thread(target=run, name=f"prescope-{name}", daemon=True).start()
