import stat

import numpy as np
from models import INPUTS, ZEROS, gemm
from repositories import Clock, MemoryRepository

from fleetprune_agent.install import install
from fleetprune_agent.recent import RECENT, Recent, read_recent
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slots import Slots
from fleetprune_agent.trust import TrustedRepository


def numbered(*numbers: int) -> np.ndarray:
    return np.repeat(np.array(numbers, np.float32)[:, None], INPUTS, axis=1)


def kept(folder) -> list[float]:
    x = read_recent(folder, (INPUTS,))
    return [] if x is None else x[:, 0].tolist()


def test_a_file_is_written_once_per_turn(tmp_path):
    recent = Recent(tmp_path, keep=4)
    recent.add(numbered(1, 2, 3))
    assert kept(tmp_path) == []
    recent.add(numbered(4, 5))
    assert kept(tmp_path) == [1, 2, 3, 4]
    recent.add(numbered(6, 7))
    assert kept(tmp_path) == [1, 2, 3, 4]
    recent.add(numbered(8))
    assert kept(tmp_path) == [5, 6, 7, 8]
    recent.add(numbered(*range(10, 20)))
    assert kept(tmp_path) == [16, 17, 18, 19]


def test_the_file_is_for_its_user_only(tmp_path):
    Recent(tmp_path, keep=1).add(numbered(1))
    assert stat.S_IMODE((tmp_path / RECENT).stat().st_mode) == 0o600


def test_the_ring_is_bounded_in_bytes(tmp_path):
    Recent(tmp_path, keep=100, max_bytes=2 * 4 * INPUTS).add(numbered(1, 2))
    assert kept(tmp_path) == [1, 2]
    Recent(tmp_path, keep=100, max_bytes=4).add(numbered(3))
    assert kept(tmp_path) == [1, 2], "not even one fits"


def test_samples_of_another_shape_begin_anew(tmp_path):
    recent = Recent(tmp_path, keep=2)
    recent.add(numbered(1))
    recent.add(np.ones((2, 3), np.float32))
    assert read_recent(tmp_path, (3,)).shape == (2, 3)
    assert read_recent(tmp_path, (INPUTS,)) is None


def test_a_damaged_file_is_no_samples(tmp_path):
    assert read_recent(tmp_path, (INPUTS,)) is None
    for content in (b"", b"not an array", b"\x93NUMPY"):
        (tmp_path / RECENT).write_bytes(content)
        assert read_recent(tmp_path, (INPUTS,)) is None
    np.save(tmp_path / RECENT, numbered(1) * np.nan)
    assert read_recent(tmp_path, (INPUTS,)) is None


def test_a_full_disk_costs_no_prediction(tmp_path):
    recent = Recent(tmp_path / "missing", keep=1)
    recent.add(numbered(1))


def test_predictions_are_remembered_where_that_is_wanted(tmp_path):
    repository = MemoryRepository()
    trusted = TrustedRepository(tmp_path / "trust", repository.bootstrap, repository, Clock())
    slots = Slots(tmp_path)
    repository.release(1, model=gemm(1))
    install(trusted, slots, "phone")
    Predictor(slots).predict(ZEROS)
    assert not (tmp_path / RECENT).exists()
    Predictor(slots, recent=Recent(tmp_path, keep=2)).predict(numbered(1, 2))
    assert kept(tmp_path) == [1, 2]
