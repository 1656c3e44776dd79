"""Work of a panel beside the kernel's own: whatever becomes of it is told."""

import threading
from collections.abc import Callable

import ipywidgets as ipw


def in_background(
    name: str,
    work: Callable[[], object],
    failed: Callable[[Exception], object],
    button: ipw.Button | None = None,
) -> None:
    """Do it in a thread of its own.

    Args:
        name: of the thread. failed: told an error of any kind.
        button: that was clicked; it is grey until the work is over.
    """
    if button is not None:
        if button.disabled:  # a double click: the page sends both before the button is greyed
            return
        button.disabled = True

    def run() -> None:
        try:
            work()
        # A graphics card's memory, a folder that is not ours: lost in a thread, "recording" would stand for ever.
        except Exception as error:  # noqa: BLE001
            failed(error)
        finally:
            if button is not None:
                button.disabled = False

    threading.Thread(target=run, name=f"prescope-{name}", daemon=True).start()
