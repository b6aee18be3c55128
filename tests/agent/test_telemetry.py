import re
from itertools import count

import numpy as np
import pytest
from devices import Device
from models import INPUTS
from repositories import NOW, MemoryRepository

from fleetprune.errors import InstallError
from fleetprune_agent.data import Split, checked, split
from fleetprune_agent.install import Checks, install
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slots import Slots
from fleetprune_agent.telemetry import BATCH, Measured, Traffic, measure, one_line, report
from fleetprune_agent.trial import Evidence
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
    assert (got.accuracy, got.samples) == (0.8, 5)
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
    assert (got.accuracy, got.latency_ms, got.samples) == (None, 1000.0, 0)


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


def test_reports_say_what_became_of_the_release_that_is_wanted(tmp_path):
    device = Device(tmp_path)
    device.get(1)
    told = sent(device.slots)
    assert (told.plan, told.failed, told.variant, told.crashes) == (1, 0, None, 0)
    device.repository.release(2)
    device.install(Checks(may_fetch=lambda _bytes: "a metered link"))
    told = sent(device.slots)
    assert (told.plan, told.release, told.state) == (2, 1, "committed")
    assert (told.postponed, told.error) == ("a metered link", "")
    device.repository.release(3, fields={"requires": {"runtime": "tflite"}})
    device.install()
    told = sent(device.slots)
    assert (told.plan, told.failed, told.state, told.postponed) == (3, 3, "rolled_back", "")
    assert told.error.startswith("release 3: the model requires tflite, this device has onnx")
    device.repository.roll_out(stable=1)
    device.install()
    told = sent(device.slots)
    assert (told.plan, told.failed, told.state, told.error) == (4, 0, "committed", "")


def test_a_release_that_failed_is_named_until_another_is_wanted(tmp_path):
    device = Device(tmp_path)
    device.get(1)
    device.get(2)
    device.slots.rollback("it raised")
    told = sent(device.slots)
    assert (told.release, told.failed, told.state) == (1, 2, "rolled_back")
    assert told.error == "release 2: phone's model: it raised"
    device.get(3)
    told = sent(device.slots)
    assert (told.release, told.failed, told.state, told.error) == (3, 2, "committed", "")


def test_reports_name_the_smaller_class_and_why_it_runs(tmp_path):
    device = Device(tmp_path)
    device.repository.release(1, "tiny", to_all=False)
    device.repository.release(1, samples=b"no golden samples", fields={"smaller": "tiny"})
    device.install()
    told = sent(device.slots)
    assert (told.release, told.variant, told.failed, told.state) == (1, "tiny", 1, "trial")
    assert told.error.startswith("release 1: phone's model: golden samples: ")


def test_reports_compare_with_the_release_before_on_the_same_samples(tmp_path):
    device = Device(tmp_path)
    device.get(1)
    device.repository.release(2)
    held = samples([0, 1, 0, 1])  # both models say 0
    device.install(evidence=Evidence(recent=held.x, x=held.x, y=held.y))
    told = sent(device.slots, measured=Measured(0.5, 2.0, samples=4))
    assert (told.samples, told.accuracy, told.accuracy_before, told.agreement) == (4, 0.5, 0.5, 1)
    told = sent(device.slots, measured=Measured(0.6, 2.0, samples=5))
    assert (told.samples, told.accuracy_before, told.agreement) == (5, None, 1)
    device.slots.rollback("it raised")
    told = sent(device.slots, measured=Measured(0.5, 2.0, samples=4))
    assert (told.release, told.accuracy_before, told.agreement) == (1, None, None)


def test_reports_count_crashes(tmp_path):
    device = Device(tmp_path)
    device.get(1)
    for crashes in range(3):
        device.slots.start()
        assert sent(device.slots).crashes == crashes
    device.slots.stop()
    device.slots.start()
    assert sent(device.slots).crashes == 2


def test_a_model_is_measured_only_where_there_is_one(slots):
    with pytest.raises(InstallError, match=r"^no model installed yet"):
        measure(Predictor(slots).predict, parts([0], [0]))


def test_one_line():
    assert one_line("a\n  b" + "c" * 2000) == "a b" + "c" * 997
    assert re.fullmatch(r"\S+", one_line("x" * 5, limit=3)) and one_line("x" * 5, limit=3) == "xxx"
