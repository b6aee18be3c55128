"""What befalls samples, by hand where it can be."""

import numpy as np
import pytest

from fleetprune_sim.corruptions import CORRUPTIONS, applicable, corrupted


def samples(*shape):
    return np.random.default_rng(0).normal(2, 3, size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(50, 6), (50, 3, 40), (50, 1, 8, 8), (50, 3, 8, 8)])
def test_shapes_stay_and_the_same_seed_gives_the_same(shape):
    x = samples(*shape)
    before = x.copy()
    for name in applicable(shape[1:]):
        once, again, other = (corrupted(name, x, seed) for seed in (1, 1, 2))
        assert (once.shape, once.dtype) == (x.shape, np.float32)
        assert (once == again).all()
        assert (once != x).any()
        chance = name == "noise" or (name != "blur" and shape[1] > 1)
        assert not chance or (once != other).any()
    assert (x == before).all()


def test_flat_samples_cannot_be_blurred():
    assert applicable((6,)) == ["noise", "bias", "dropped"]
    assert applicable((6, 40)) == list(CORRUPTIONS)


def test_noise_is_half_a_deviation_of_its_channel():
    x = samples(400, 2, 50) * np.array([1, 10], np.float32).reshape(1, 2, 1)
    added = corrupted("noise", x, 0) - x
    assert added.std((0, 2)) == pytest.approx([1.5, 15], rel=0.02)
    assert added.mean((0, 2)) == pytest.approx([0, 0], abs=0.2)


def test_bias_moves_one_channel_of_each_sample_as_a_whole():
    x = samples(400, 3, 50)
    added = corrupted("bias", x, 0) - x
    moved = np.abs(added).max(axis=2) > 0.1
    assert (moved.sum(axis=1) == 1).all()
    assert set(moved.argmax(axis=1)) == {0, 1, 2}
    assert added[0, moved[0].argmax()] == pytest.approx(np.full(50, 1.5), rel=0.02)


def test_a_dead_sensor_says_its_mean():
    x = samples(400, 3, 50)
    got = corrupted("dropped", x, 0)
    still = got.std(axis=2) < 1e-6
    assert (still.sum(axis=1) == 1).all()
    assert got[0, still[0].argmax(), 0] == pytest.approx(2, abs=0.1)


def test_of_a_single_channel_a_quarter_is_gone():
    x = samples(30, 1, 8, 8)
    changed = (corrupted("dropped", x, 0) != x).mean(axis=(1, 2, 3))
    assert changed.tolist() == [0.25] * 30


def test_blur_keeps_what_is_flat_and_smooths_what_is_not():
    flat = np.full((1, 1, 9, 9), 3, np.float32)
    assert corrupted("blur", flat, 0) == pytest.approx(flat)
    point = np.zeros((1, 1, 9, 9), np.float32)
    point[0, 0, 4, 4] = 1
    got = corrupted("blur", point, 0)[0, 0]
    assert got.sum() == pytest.approx(1, rel=1e-3)
    assert got[4, 4] == pytest.approx(1 / (2 * np.pi), rel=0.02)  # a Gaussian's height
