"""Numbers as people read them."""

import numpy as np
import pytest

from prescope.core.units import GIB, KIB, MIB, format_bytes


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (999.4 * KIB, "999 KiB"),
        (999.6 * KIB, "1,000 KiB"),
        (1008 * KIB, "1,008 KiB"),
        (1023 * MIB, "1,023 MiB"),
        (1.5 * GIB, "1.5 GiB"),
        (5000 * GIB, "5,000 GiB"),
    ],
)
def test_a_size_is_said_in_digits(nbytes, said):
    """756 and 252 KiB made "1.01e+03 KiB" in the table of a run."""
    assert format_bytes(nbytes) == said


def test_no_size_has_an_exponent():
    for nbytes in np.geomspace(1, 2.0**50, 4_000):
        assert "e" not in format_bytes(nbytes)
