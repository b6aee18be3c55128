import re
from itertools import count

import numpy as np
import pytest
from models import INPUTS
from repositories import NOW, MemoryRepository

from fleetprune.errors import InstallError
from fleetprune_agent.data import Split, checked, split
from fleetprune_agent.install import install
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slots import Slots
from fleetprune_agent.telemetry import BATCH, Measured, Traffic, measure, one_line, report
from fleetprune_agent.trust import TrustedRepository


def samples(labels, n=None):
    n = len(labels) if n is None else n
    x = np.arange(n, dtype=np.float32)[:, None] * np.ones((1, INPUTS), np.float32)
    return checked(x, labels, str, "memory")


def parts(labels, held_labels) -> Split:
    return Split(train=samples(labels), held_out=samples(held_labels))


def class_of_sample(x):
    """Sample i is of class i % 3."""
    return np.eye(3, dtype=np.float32)[(x[:, 0] % 3).astype(int)]


def test_accuracy_and_median_latency():
    ticks = iter([0.0, 0.001, 1.0, 1.003, 2.0, 2.005])
    got = measure(class_of_sample, parts([0], [0, 1, 2, 1, 1]), lambda: next(ticks), runs=3)
    assert got.accuracy == 0.8
    assert got.latency_ms == pytest.approx(3.0)


def test_many_samples_are_measured_in_batches():
    sizes = []

    def predict(x):
        sizes.append(len(x))
        return class_of_sample(x)

    labels = [i % 3 for i in range(2 * BATCH + 1)]
    got = measure(predict, parts([0], labels), lambda: 0.0, runs=2)
    assert got.accuracy == 1.0
    assert sizes == [1, 1, 1, BATCH, BATCH, 1]


def test_no_labels_or_nothing_held_out():
    unlabelled = split(samples(None, 10), 0.5)
    assert measure(class_of_sample, unlabelled, count().__next__).accuracy is None
    nothing = split(samples([0, 1]), 0)
    got = measure(class_of_sample, nothing, count().__next__)
    assert (got.accuracy, got.latency_ms) == (None, 1000.0)


@pytest.fixture
def slots(tmp_path):
    return Slots(tmp_path)


def installed(repository, slots, tmp_path):
    trusted = TrustedRepository(tmp_path / "trust", repository.bootstrap, repository, lambda: NOW)
    return install(trusted, slots, "phone")


def sent(slots, **changes):
    settings = {"measured": Measured(0.5, 2.0), "traffic": Traffic(10, 20), **changes}
    return report("d1", "phone", slots, **settings)


def test_reports_follow_the_slots(slots, tmp_path):
    empty = sent(slots, measured=Measured())
    assert (empty.release, empty.sha256, empty.state, empty.error) == (0, None, "empty", "")
    assert (empty.bytes_up, empty.bytes_down, empty.accuracy) == (10, 20, None)
    assert empty.rss_mb > 10
    repository = MemoryRepository()
    manifest = repository.release(1)
    installed(repository, slots, tmp_path)
    trial = sent(slots)
    assert (trial.release, trial.sha256, trial.state) == (1, manifest.sha256, "trial")
    assert (trial.accuracy, trial.latency_ms) == (0.5, 2.0)
    measure(Predictor(slots).predict, parts([0], [0, 0]))  # good predictions commit
    assert sent(slots).state == "committed"
    repository.release(2, samples=b"no golden samples")
    installed(repository, slots, tmp_path)
    refused = sent(slots)
    assert (refused.release, refused.state) == (1, "rolled_back")
    assert refused.error.startswith("release 2: ")
    assert sent(slots, error="two\nlines").error == "two lines"


def test_a_model_is_measured_only_where_there_is_one(slots):
    with pytest.raises(InstallError, match=r"^no model installed yet"):
        measure(Predictor(slots).predict, parts([0], [0]))


def test_one_line():
    assert one_line("a\n  b" + "c" * 2000) == "a b" + "c" * 997
    assert re.fullmatch(r"\S+", one_line("x" * 5, limit=3)) and one_line("x" * 5, limit=3) == "xxx"
