"""What a calibration does not believe, and what it says of a busy machine."""

import pytest

from prescope.calibration.doubts import BUSY_SPREAD, busy_note, impossible
from prescope.profile import Circumstances, HardwareProfile, Point

TWO_MIXTRAL = Circumstances("gpu", nbytes=352321536, width=4096, expert_width=14336, experts=2, tokens=1)
H200_GB_PER_S = 4917.0


def point(of: Circumstances, us: float, spread: float = 0.1) -> Point:
    return Point(of, us, spread, 16)


def test_704_mb_in_105_us_are_not_believed_of_an_h200():
    refused = impossible([point(TWO_MIXTRAL, 105.3)], H200_GB_PER_S)
    assert list(refused) == [TWO_MIXTRAL]
    assert "6,692 GB/s" in refused[TWO_MIXTRAL]
    assert not impossible([point(TWO_MIXTRAL, 163.0)], H200_GB_PER_S)


@pytest.mark.parametrize("kind", ["h2d", "cpu", "gpu", "dram"])
def test_no_memory_gives_a_gigabyte_in_a_microsecond_whatever_is_known_of_the_device(kind):
    of = Circumstances(kind, nbytes=1 << 30)
    assert list(impossible([point(of, 1.0)])) == [of]
    assert not impossible([point(of, 100_000.0)])


def test_what_fits_into_a_cache_or_is_not_read_is_not_judged():
    assert not impossible([point(Circumstances("cpu", nbytes=1 << 20, experts=2), 0.01)])
    assert not impossible([point(Circumstances("rest", nbytes=1 << 30), 1.0)])


def test_profiles_that_come_with_prescope_hold_what_memory_gives():
    assert not impossible(HardwareProfile.load("test_machine").points)
    h200 = HardwareProfile.load("h200")
    assert not impossible(h200.points, H200_GB_PER_S)
    assert TWO_MIXTRAL not in [point.of for point in h200.points]  # and the file says why
    assert any("more than its memory gives" in note for note in h200.notes)


def test_a_busy_machine_is_said_with_its_spread_and_load():
    quiet = [
        point(Circumstances("read"), 5.0, 0.2),
        point(Circumstances("h2d"), 5.0, 9.0),
        point(TWO_MIXTRAL, 1.0),
    ]
    assert busy_note(quiet, 0.1, 4) == ""
    busy = [point(Circumstances("read"), 5.0, 2 * BUSY_SPREAD)] * 3
    assert "100%" in busy_note(busy, 3.25, 2) and "3.2 processes ran on 2 cores" in busy_note(busy, 3.25, 2)
    assert "processes" not in busy_note(busy, None, 2)
    assert busy_note([], 1.0, 2) == ""
