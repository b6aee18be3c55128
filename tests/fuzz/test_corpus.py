"""The kept corpus is read again, without atheris: what was found once stays found."""

import logging
import tracemalloc
import warnings

import pytest

from fleetprune.errors import WireError
from tests.fuzz.corpus import FOLDER, MOST, load, save
from tests.fuzz.targets import Target, targets

MOST_MEMORY = 32 * 2**20  # bytes that one input of a few kB may take


@pytest.mark.parametrize("name", targets())
def test_nothing_but_errors_of_the_family(name, caplog):
    target = targets()[name]
    assert all(map(target, target.seeds)) or name.startswith("graph_meta")
    caplog.set_level(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile: duplicate names
        tracemalloc.start()
        try:
            read = sum(map(target, load(name)))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < MOST_MEMORY
    assert load(name), "every target has a corpus"
    assert read >= 0


def test_a_target_can_fail():
    def careless(data: bytes) -> None:
        if data == b"bad":
            raise WireError("refused")
        data[10]

    target = Target(careless, (b"long enough",))
    assert target(b"long enough") and not target(b"bad")
    with pytest.raises(IndexError):
        target(b"short")


def test_the_corpus_is_small_and_all_of_it_is_used():
    kept = {path.stem: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(kept) == set(targets())
    assert sum(kept.values()) < 500_000


def test_what_is_saved_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzz.corpus.FOLDER", tmp_path)
    assert save("x", [b"b", b"a\n", b"", b"a\n", bytes(MOST)]) == 3
    assert load("x") == [b"", b"a\n", b"b"]
