import re

import numpy as np
import pytest

from fleetprune.errors import InstallError
from fleetprune_agent.feedback import EMPTY, KEPT_ANSWERS, InMemory, Memory, OnDisk

RESIDUAL = np.array([0.5, -0.25, 2.0], np.float32)


def memory() -> Memory:
    return EMPTY.left_out(3, "phone", RESIDUAL).answered("t1", b"one")


@pytest.mark.parametrize("on_disk", [True, False])
def test_round_trip(tmp_path, on_disk):
    store = OnDisk(tmp_path / "answers.bin") if on_disk else InMemory()
    assert store.load().answers == {}
    store.save(memory())
    got = store.load()
    assert (got.mask_version, got.shape, got.answers) == (3, "phone", {"t1": b"one"})
    assert got.residual_for(3, "phone", 3).tolist() == [0.5, -0.25, 2.0]


@pytest.mark.parametrize("key", [(4, "phone", 3), (3, "watch", 3), (3, "phone", 2)])
def test_flushed_when_mask_shape_or_size_changes(key):
    assert memory().residual_for(*key).tolist() == [0.0] * key[2]


def test_the_oldest_answer_goes_first():
    m = EMPTY
    for i in range(KEPT_ANSWERS + 2):
        m = m.answered(f"t{i}", bytes([i]))
    assert list(m.answers) == ["t2", "t3", "t4", "t5"]


def test_every_truncation_and_flip_counts_as_empty(tmp_path):
    file = tmp_path / "answers.bin"
    store = OnDisk(file)
    store.save(memory())
    data = file.read_bytes()
    for n in range(len(data)):
        file.write_bytes(data[:n])
        assert store.load().answers == {}
    for n in range(len(data)):
        file.write_bytes(data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :])
        assert store.load().answers == {}
    file.write_bytes(data)
    assert store.load().answers == {"t1": b"one"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    store = OnDisk(tmp_path / "answers.bin")
    store.save(memory())

    def no_replace(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_replace)
    with pytest.raises(InstallError, match=re.escape(f"disk full: cannot write {store.path}")):
        store.save(memory().answered("t2", b"two"))
    assert store.load().answers == {"t1": b"one"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.bin"]
