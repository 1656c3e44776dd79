"""Launch a kernel of Triton; one that cannot run here says which it is."""

from typing import Any

from triton.runtime.errors import TritonError

from .base import CannotLaunch


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`.

    Raises:
        CannotLaunch: Triton cannot compile it, or it needs more of the GPU than there is.
    """
    try:
        kernel[grid](*arguments, **options)
    except TritonError as error:
        raise CannotLaunch(f"Triton's kernel {kernel.__name__} cannot run here: {error}") from error
