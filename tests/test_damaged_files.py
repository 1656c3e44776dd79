"""Damaged files are refused with an error of prescope, or hold what was written: no crash, no hang, no other content.

`benchmarks/fuzz_files.py` tries 10,000 inputs in the same way; docs/robustness.md has its figures.
"""

import os

import pytest

from tests.support.damaged_files import FOREIGN, KINDS, Outcome, Whole

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="pipes"),
    # What transformers says on the way to refusing is no error of ours.
    pytest.mark.filterwarnings("ignore"),
]
INPUTS = {"model": 60, **dict.fromkeys((f"{kind} trace" for kind in FOREIGN), 60)}


@pytest.fixture(scope="module", params=list(KINDS))
def whole(request, tmp_path_factory):
    return request.param, Whole(KINDS[request.param], tmp_path_factory.mktemp("whole") / "files")


def test_damage_is_refused_or_does_no_harm(whole, tmp_path):
    name, files = whole
    outcomes = [files.try_damaged(tmp_path / "damaged", seed) for seed in range(INPUTS.get(name, 150))]
    foreign = [what for outcome, what in outcomes if outcome is Outcome.FOREIGN]
    assert not foreign, "\n".join(foreign)
    other = [what for outcome, what in outcomes if outcome is Outcome.OTHER]
    assert KINDS[name].may_differ or not other, "\n".join(other)
    assert sum(outcome is Outcome.REFUSED for outcome, _ in outcomes) > len(outcomes) / 3
