import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.errors import DataError
from fleetprune_sim.data.partition import deal, dirichlet, hold_out


def rng(seed=0):
    return np.random.default_rng(seed)


def test_hold_out_takes_the_share_of_each_label():
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    held = hold_out(labels, 0.1, rng())
    assert np.bincount(labels[held]).tolist() == [1, 2, 3]
    assert (np.diff(held) > 0).all()


def test_hold_out_leaves_a_single_sample_where_it_is():
    assert hold_out(np.array([0, 1, 1]), 0.2, rng()).size == 1
    assert hold_out(np.array([0, 1, 2]), 0.2, rng()).size == 0
    assert hold_out(np.array([0, 1, 1]), 0.0, rng()).size == 0
    assert hold_out(np.array([], dtype=np.int64), 0.5, rng()).size == 0


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_hold_out_refuses_a_share_out_of_range(share):
    with pytest.raises(DataError, match=f"is {share}, expected 0 <= share < 1"):
        hold_out(np.array([0]), share, rng())


@settings(max_examples=60, deadline=None)
@given(
    devices=st.integers(1, 9),
    least=st.integers(0, 12),
    alpha=st.sampled_from([0.05, 0.5, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_dirichlet_is_a_partition_with_a_minimum(devices, least, alpha, seed):
    labels = rng(seed).integers(0, 4, 120)
    parts = dirichlet(labels, devices, alpha, least, rng(seed))
    assert len(parts) == devices
    assert sorted(np.concatenate(parts).tolist()) == list(range(120))
    assert min(part.size for part in parts) >= least


def test_dirichlet_is_seeded():
    labels = np.arange(300) % 5
    first, second, other = (dirichlet(labels, 4, 0.5, 10, rng(s)) for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert any(a.size != b.size or (a != b).any() for a, b in zip(first, other, strict=True))


def test_small_alpha_gives_labels_to_few_devices():
    labels = np.arange(2000) % 10

    def largest_share(alpha):
        parts = dirichlet(labels, 5, alpha, 10, rng())
        counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
        return (counts.max(axis=0) / counts.sum(axis=0)).mean()

    assert largest_share(0.05) > 0.75
    assert largest_share(1000.0) < 0.3


def test_dirichlet_refuses_too_few_samples():
    with pytest.raises(DataError, match=r"^7 samples are too few for 2 devices with at least 4 "):
        dirichlet(np.zeros(7, np.int64), 2, 0.5, 4, rng())
    with pytest.raises(DataError, match="expected devices >= 1, alpha > 0"):
        dirichlet(np.zeros(7, np.int64), 2, 0.0, 1, rng())


def test_deal_goes_round_in_turn():
    assert deal(list("abcdefg"), [2, 1]) == [["a", "b", "d", "e", "g"], ["c", "f"]]


def test_deal_refuses_an_empty_part():
    with pytest.raises(DataError, match=r"^1 items are too few for 2 parts$"):
        deal(["a"], [1, 1])
    with pytest.raises(DataError, match=r"^no part takes any item$"):
        deal(["a"], [])
