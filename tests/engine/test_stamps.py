"""What a step's stamps say, against the same in numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prescope.engine.graph.stamps import read_stamps


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 6), has_cpu=st.booleans())
def test_stamps_are_read_as_their_definitions_say(seed: int, layers: int, has_cpu: bool):
    rng = np.random.default_rng(seed)
    stamps = np.cumsum(rng.integers(1, 10**6, layers * 5)).reshape(layers, 5)
    stamps[:, [3, 4]] = stamps[:, [4, 3]]  # the GPU's part ends before the layer does
    if not has_cpu:
        stamps[:, 4] = 0
    needed = rng.integers(1, 9, layers)
    on_cpu = rng.integers(0, needed + 1) if has_cpu else np.zeros(layers, int)
    missing = rng.integers(0, 2, layers).astype(np.int32)
    seen = read_stamps(stamps, 0, missing, needed, on_cpu)
    routed, decided, fetched, done, computed = stamps.T
    rest = routed - np.concatenate([[0], done[:-1]])
    assert seen.rest_us == pytest.approx(np.median(rest) / 1e3)
    if missing.any():
        assert seen.decide_us == pytest.approx(np.median((decided - routed)[missing > 0]) / 1e3)
    else:
        assert np.isnan(seen.decide_us), "no layer waited for an answer"
    on_gpu = np.where(has_cpu, computed, done) - fetched
    assert seen.gpu_us == pytest.approx(on_gpu.sum() / 1e3 / max(1, (needed - on_cpu).sum()))
