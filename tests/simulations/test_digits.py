from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fleetprune.errors import DataError
from fleetprune_sim.data import digits

DEVICES = [f"d{i}" for i in range(6)]


def test_every_image_is_somewhere_once():
    data = digits.load(DEVICES, seed=0)
    parts = [data.x_test, *(x for d in data.devices.values() for x in (d.x_train, d.x_test))]
    everything = np.concatenate(parts).reshape(-1, 64)
    assert everything.shape == (1797, 64)
    ours = np.sort(np.unique(everything, axis=0), axis=0)
    theirs = np.sort(np.unique(load_digits().data / 16, axis=0), axis=0)
    assert (ours == theirs).all()


def test_shapes_and_ranges():
    data = digits.load(DEVICES, seed=0)
    assert data.input_shape == (1, 8, 8)
    assert data.labels == tuple("0123456789")
    assert data.x_test.dtype == np.float32
    assert data.y_test.dtype == np.int64
    assert (float(data.x_test.min()), float(data.x_test.max())) == (0.0, 1.0)
    assert list(data.devices) == DEVICES
    for device in data.devices.values():
        assert device.x_train.shape[0] == device.y_train.size
        assert device.x_test.shape[0] == device.y_test.size > 0
        assert device.y_train.size + device.y_test.size >= digits.LEAST_SAMPLES


def test_test_set_is_a_fifth_of_every_digit():
    counts = np.bincount(digits.load(DEVICES, seed=3).y_test)
    assert counts.min() >= 34  # of 174 to 183 each
    assert counts.max() <= 36


def test_devices_differ_and_the_seed_decides():
    one, same, other = (digits.load(DEVICES, seed=s) for s in (1, 1, 2))
    assert all((one.devices[d].y_train == same.devices[d].y_train).all() for d in DEVICES)
    assert one.devices["d0"].y_train.size != other.devices["d0"].y_train.size
    shares = np.array([np.bincount(d.y_train, minlength=10) for d in one.devices.values()])
    assert (shares.max(axis=0) > 2 * shares.mean(axis=0)).any()


def test_too_many_devices():
    with pytest.raises(DataError, match="too few for 100 devices with at least 64 each"):
        digits.load([f"d{i}" for i in range(100)], seed=0)


def test_corpus_has_every_image_once():
    corpus = digits.corpus(4, Path("unused"))
    ours = np.concatenate([corpus.x, corpus.x_validation, corpus.x_test]).reshape(1797, 64)
    labels = np.concatenate([corpus.y, corpus.y_validation, corpus.y_test])
    raw = load_digits()
    got = sorted((*image, label) for image, label in zip(ours * 16, labels, strict=True))
    assert got == sorted((*image, label) for image, label in zip(raw.data, raw.target, strict=True))
    assert (corpus.input_shape, corpus.x.dtype) == ((1, 8, 8), np.float32)


def test_corpus_holds_out_a_share_of_every_digit():
    corpus, same, other = (digits.corpus(seed, Path("unused")) for seed in (0, 0, 1))
    of = np.bincount(load_digits().target)
    assert (np.bincount(corpus.y_test) == (of * 0.2).astype(int)).all()
    assert (np.abs(np.bincount(corpus.y_validation) - of * 0.15) <= 1).all()
    assert (corpus.x_test == same.x_test).all()
    assert (corpus.x_validation == same.x_validation).all()
    assert (corpus.x_test != other.x_test).any()
