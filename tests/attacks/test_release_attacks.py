"""Releases that are validly signed and still must not harm: what a stolen targets key could do."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from models import ZEROS, npz
from repositories import Clock, MemoryRepository

from fleetprune_agent.health import MAX_GOLDEN
from fleetprune_agent.install import Status, install
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slots import Slots
from fleetprune_agent.trust import TrustedRepository

TRAP: list[str] = []


def spring() -> None:
    TRAP.append("code from the network ran")


class Pickled:
    def __reduce__(self):
        return spring, ()


def object_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=np.array([Pickled()], dtype=object), y=np.zeros((1, 3), dtype=np.float32))
    return file.getvalue()


def bomb() -> bytes:
    """65 MiB of zeros in 65 kB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(65 * 2**20))
    return file.getvalue()


def cut() -> bytes:
    return npz(x=ZEROS, y=ZEROS)[:-30]


def damaged() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=np.arange(400, dtype=np.float32), y=ZEROS)
    data = bytearray(file.getvalue())
    data[100:120] = bytes(20)
    return bytes(data)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (object_npz(), "Object arrays cannot be loaded when allow_pickle=False"),
        (pickle.dumps(Pickled()), "File is not a zip file"),
        (bomb(), f"{65 * 2**20} bytes unpacked, expected at most {MAX_GOLDEN}"),
        (cut(), "File is not a zip file"),
        (npz(x=ZEROS), "'y is not a file in the archive'"),
        (npz(), "'x is not a file in the archive'"),
        (b"", "File is not a zip file"),
    ],
    ids=["object array", "pickle", "bomb", "cut", "no y", "nothing", "empty"],
)
def test_hostile_golden_samples(tmp_path, samples, message):
    assert outcome_of(tmp_path, samples).reason == f"golden samples: {message}"
    assert TRAP == []


def test_damaged_golden_samples(tmp_path):
    assert outcome_of(tmp_path, damaged()).reason.startswith("golden samples: ")


def outcome_of(folder: Path, samples: bytes):
    """Offer it to a device that runs release 1, and see that it still does."""
    repository = MemoryRepository()
    trusted = TrustedRepository(folder / "trust", repository.bootstrap, repository, Clock())
    slots = Slots(folder)
    repository.release(1)
    install(trusted, slots, "phone")
    repository.release(2, samples=samples)
    outcome = install(trusted, slots, "phone")
    assert outcome.status is Status.REJECTED
    assert Predictor(slots).predict(ZEROS)[0, 0] == 1
    return outcome


def test_the_trap_works():
    """Shows that the tests above could fail."""
    pickle.loads(pickle.dumps(Pickled()))
    assert TRAP.pop() == "code from the network ran"
