"""On the publisher's recordings where they are, else on a few made ones.

The recordings are looked for in FLEETPRUNE_DATA, then in `../shared/data`.
"""

import numpy as np
import pytest

from fleetprune.errors import DataError
from fleetprune_sim.data import har
from fleetprune_sim.data.har_recordings import ARCHIVE, Windows, find, read_windows
from fleetprune_sim.data.sources import VARIABLE
from tests.simulations.recordings import make_archive, real_folder

FLEET = (["gateway-1", "gateway-2"], ["phone-1", "phone-2"], ["sensor-1", "sensor-2"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("har"))


@pytest.fixture
def real():
    return real_folder()


def check_split(windows: Windows, held_out: int) -> None:
    data = har.split(windows, *FLEET, seed=0, held_out=held_out)
    assert sorted(data.devices) == sorted([*FLEET[0], *FLEET[1], *FLEET[2]])
    assert data.input_shape == (6, 128)
    assert data.labels == har.LABELS
    own = {n: d.y_train.size + d.y_test.size for n, d in data.devices.items()}
    people = np.unique(windows.subject)
    test_people = np.random.default_rng(0).permutation(people)[:held_out]
    assert data.y_test.size == np.isin(windows.subject, test_people).sum()
    # Nobody's windows are on two devices of one kind: a phone's people have a sensor as well, a
    # gateway's only the gateway, so that all windows together are those not held out.
    assert sum(own.values()) + data.y_test.size == windows.y.size
    assert own["gateway-1"] > own["phone-1"] + own["sensor-1"]
    everyone = np.concatenate(
        [x for d in data.devices.values() for x in (d.x_train, d.x_test)]
    ).astype(np.float64)
    assert np.abs(everyone.mean(axis=(0, 2))).max() < 1e-3
    assert np.abs(everyone.std(axis=(0, 2)) - 1).max() < 1e-3


def test_split_of_the_made_archive(made):
    check_split(read_windows(made / ARCHIVE), held_out=2)


def test_split_is_seeded(made):
    windows = read_windows(made / ARCHIVE)
    first, second = (har.split(windows, *FLEET, seed=5, held_out=2) for _ in range(2))
    assert (first.devices["phone-1"].x_train == second.devices["phone-1"].x_train).all()


def test_load_reads_the_environment(made, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(made))
    with pytest.raises(DataError, match=r"^3 items are too few for 4 parts$"):
        har.load(*FLEET, seed=0, cache=tmp_path)  # nine people less the six held out
    with pytest.raises(DataError, match=r"^2 phones and 1 sensors, expected as many$"):
        har.load(FLEET[0], FLEET[1], ["sensor-1"], seed=0)


def test_the_publishers_recordings(real):
    windows = read_windows(find({VARIABLE: str(real)}))
    assert len(np.unique(windows.subject)) == 23
    assert set(windows.kind.tolist()) == {"phone", "watch"}
    assert np.isfinite(windows.x).all()
    assert np.bincount(windows.y).min() > 300
    check_split(windows, har.HELD_OUT_SUBJECTS)


def check_corpus(windows, corpus, test, validation):
    """Whole people are held out, and nothing else is."""
    people = {f"{s}-{k}": s for s, k in zip(windows.subject, windows.kind, strict=True)}
    known, tested = (
        {people[o] for o in set(a.tolist())} for a in (corpus.owner, corpus.test_owner)
    )
    assert not known & tested
    assert (len(tested), len(known)) == (test, len(set(people.values())) - test - validation)
    sizes = [y.size for y in (corpus.y, corpus.y_validation, corpus.y_test)]
    assert sum(sizes) == windows.y.size
    unseen = ~np.isin(windows.subject, sorted(known | tested))
    assert sizes[1] == unseen.sum()
    assert np.bincount(corpus.y_validation, minlength=5).tolist() == (
        np.bincount(windows.y[unseen], minlength=5).tolist()
    )
    for owner, kind in ((corpus.owner, corpus.kind), (corpus.test_owner, corpus.test_kind)):
        assert all(o.endswith(f"-{k}") for o, k in zip(owner, kind, strict=True))
    x = corpus.x.astype(np.float64)
    assert np.abs(x.mean(axis=(0, 2))).max() < 1e-3
    assert np.abs(x.std(axis=(0, 2)) - 1).max() < 1e-3


def test_corpus_of_the_made_archive(made):
    windows = read_windows(made / ARCHIVE, window=192, step=96)
    corpus = har.hold_out_people(windows, 3, test=2, validation=1)
    assert corpus.input_shape == (6, 192)
    check_corpus(windows, corpus, 2, 1)
    same, other = (har.hold_out_people(windows, s, test=2, validation=1) for s in (3, 4))
    assert (same.x == corpus.x).all()
    assert set(other.test_owner) != set(corpus.test_owner)


def test_corpus_reads_the_environment(made, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(made))
    with pytest.raises(DataError, match=r"^9 subjects, expected more than the 9 held out$"):
        har.corpus(0, tmp_path)


def test_corpus_of_the_publishers_recordings(real, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(real))
    corpus = har.corpus(0, tmp_path)
    assert corpus.input_shape == (6, 192)
    assert len(np.unique(corpus.owner)) == 28
    assert len(np.unique(corpus.test_owner)) == 12
    assert set(corpus.kind) == set(corpus.test_kind) == {"phone", "watch"}
    assert set(corpus.y_validation) == set(range(5))
    check_corpus(read_windows(real / ARCHIVE, tmp_path, window=192, step=96), corpus, 6, 3)
