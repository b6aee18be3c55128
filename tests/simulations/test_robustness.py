"""Which samples are corrupted, and that every model meets the same."""

import numpy as np

from fleetprune_sim.corruptions import CORRUPTIONS, corrupted
from fleetprune_sim.robustness import CLEAN, MOST, Trial


def test_all_models_meet_the_same_samples_and_these_are_spread_over_the_set():
    x = np.random.default_rng(0).normal(size=(10, 2, 5)).astype(np.float32)
    y = np.arange(10)
    trial = Trial(x, y, seed=3, most=4)
    met = []
    for _ in range(2):
        seen = []
        found = trial.of(lambda x, y, seen=seen: seen.append((x, y)) or len(seen) / 10)
        assert found == {CLEAN: 0.1, "noise": 0.2, "blur": 0.3, "bias": 0.4, "dropped": 0.5}
        met.append(seen)
    # 0, 10, 20 and 30 quarters: a set that is sorted by label is met from end to end.
    assert all((y == [0, 2, 5, 7]).all() for seen in met for _, y in seen)
    clean = x[[0, 2, 5, 7]]
    for seen in met:
        assert (seen[0][0] == clean).all()
        for name, (samples, _) in zip(CORRUPTIONS, seen[1:], strict=True):
            assert (samples == corrupted(name, clean, 3)).all()


def test_a_small_set_is_met_whole_and_flat_samples_are_not_blurred():
    x = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    found = Trial(x, np.arange(7), seed=0).of(lambda x, y: float(len(y)))
    assert found == dict.fromkeys([CLEAN, "noise", "bias", "dropped"], 7.0)
    large = np.zeros((2 * MOST + 1, 1), np.float32)
    assert Trial(large, np.zeros(len(large), int), 0).of(lambda x, y: len(x))[CLEAN] == MOST
