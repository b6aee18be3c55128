from pathlib import Path

import numpy as np
import pytest
from models import INPUTS, ZEROS, gemm, not_finite_on_large_input, npz, raises_on_large_input
from repositories import Clock, MemoryRepository

from fleetprune.errors import DataError, GraphError, InstallError
from fleetprune_agent.install import install
from fleetprune_agent.serving import COMMIT_AFTER, Predictor, load_model
from fleetprune_agent.slot_files import State
from fleetprune_agent.slots import Slots
from fleetprune_agent.trust import TrustedRepository

LARGE = np.full((1, INPUTS), 100, dtype=np.float32)


class Device:
    """Slots and a repository in memory."""

    def __init__(self, folder: Path) -> None:
        self.repository = MemoryRepository()
        self.trusted = TrustedRepository(
            folder / "trust", self.repository.bootstrap, self.repository, Clock()
        )
        self.slots = Slots(folder)
        self.predictor = Predictor(self.slots)

    def install(self, release: int, model: bytes | None = None, samples: bytes | None = None):
        self.repository.release(release, model=model, samples=samples)
        return install(self.trusted, self.slots, "phone")

    def answer(self) -> float:
        return float(self.predictor.predict(ZEROS)[0, 0])


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_no_model_yet(device):
    with pytest.raises(InstallError) as e:
        device.predictor.predict(ZEROS)
    assert str(e.value) == (
        "no model installed yet: the first release has not arrived, or was refused"
    )
    with pytest.raises(InstallError, match=r"^no model installed yet: "):
        device.predictor.manifest  # noqa: B018


def test_predictions_that_can_be_checked_in_the_head(device):
    device.install(1)
    x = np.array([[0, 0, 0, 0], [1, 2, 3, 4]], dtype=np.float32)
    y = device.predictor.predict(x)
    assert y.dtype == np.float32
    assert y.tolist() == [[1, 1, 1], [11, 11, 11]]
    assert device.predictor.manifest.release == 1


def test_other_dtypes_and_strides_are_cast(device):
    device.install(1)
    assert device.predictor.predict(np.zeros((2, 8))[:, ::2]).tolist() == [[1, 1, 1]] * 2


def test_a_graph_with_a_fixed_batch_is_run_row_by_row(device):
    device.install(1, model=gemm(1, batch=1))
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert device.predictor.predict(x)[:, 0].tolist() == [7, 23, 39]


def test_the_first_good_runs_commit(device):
    device.install(1)
    for _ in range(COMMIT_AFTER - 1):
        device.answer()
    assert device.slots.active().state is State.TRIAL
    device.answer()
    assert device.slots.active().state is State.COMMITTED


def test_a_switch_is_followed(device):
    device.install(1)
    assert device.answer() == 1
    device.install(2)
    assert device.answer() == 2
    assert device.predictor.manifest.release == 2


def test_a_session_survives_a_mere_commit(device):
    device.install(1)
    device.answer()
    before = device.predictor._serving.model
    device.slots.commit()
    device.answer()
    assert device.predictor._serving.model is before


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 5)), "input has shape (1, 5), expected (n, 4), n >= 1"),
        (np.zeros((0, 4)), "input has shape (0, 4), expected (n, 4), n >= 1"),
        (np.zeros(4), "input has shape (4,), expected (n, 4), n >= 1"),
        (np.array(0.0), "input has shape (1,), expected (n, 4), n >= 1"),
        (np.array([[0, np.nan, np.inf, 0]]), "input has 2 of 4 values that are not finite"),
    ],
)
def test_wrong_input_is_not_the_models_fault(device, x, message):
    device.install(1)
    with pytest.raises(DataError) as e:
        device.predictor.predict(x)
    assert str(e.value) == message
    assert device.slots.rejected() == {}


BAD = {
    "raises": (raises_on_large_input, "the model raised InvalidArgument: "),
    "not finite": (
        not_finite_on_large_input,
        "the model's output has 3 of 3 values that are not finite",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("runs_before", [0, 5], ids=["trial", "committed"])
def test_a_failing_model_is_rolled_back_and_the_caller_gets_an_answer(device, kind, runs_before):
    device.install(1)
    device.slots.commit()
    make, message = BAD[kind]
    device.install(2, model=make(2), samples=_golden_for(make, 2))
    for _ in range(runs_before):
        assert device.answer() == pytest.approx(2)
    assert device.predictor.predict(LARGE).tolist() == [[401, 401, 401]]
    assert device.slots.active().release == 1
    assert list(device.slots.rejected()) == [2]
    assert device.slots.rejected()[2].startswith(message)
    assert device.answer() == 1
    assert install(device.trusted, device.slots, "phone").status == "rejected"


def _golden_for(make, bias):
    y = np.full((1, 3), bias, dtype=np.float32)
    return npz(x=ZEROS, y=y)


def test_the_only_model_fails(device):
    device.install(1, model=raises_on_large_input(1), samples=_golden_for(None, 1))
    with pytest.raises(InstallError) as e:
        device.predictor.predict(LARGE)
    assert str(e.value).startswith(
        "release 1 fails and there is no other model to fall back to: "
        "the model raised InvalidArgument: "
    )
    assert device.answer() == 1, "what it can answer, it still answers"


def test_both_models_fail(device):
    for release in (1, 2):
        device.install(
            release, model=raises_on_large_input(release), samples=_golden_for(None, release)
        )
        device.slots.commit()
    with pytest.raises(InstallError, match=r"^both installed models fail: the model raised "):
        device.predictor.predict(LARGE)
    assert device.answer() == 1


def test_a_model_that_no_longer_loads_is_rolled_back(device, monkeypatch):
    """As after an update of onnxruntime that dropped an operator."""
    device.install(1)
    device.slots.commit()
    device.install(2)
    bad = str(device.slots.active().model)
    real = load_model

    def picky(path: Path, threads: int = 1):
        if str(path) == bad:
            raise GraphError("the model does not load: no such operator")
        return real(path, threads)

    monkeypatch.setattr("fleetprune_agent.serving.load_model", picky)
    assert device.answer() == 1
    assert device.slots.rejected() == {2: "the model does not load: no such operator"}


def test_a_full_disk_costs_no_answer(device, monkeypatch):
    device.install(1)
    device.slots.commit()
    device.install(2, model=raises_on_large_input(2), samples=_golden_for(None, 2))

    def full(path: Path, data: bytes) -> None:
        raise InstallError(f"disk full: cannot write {path}, 0 bytes free")

    with monkeypatch.context() as patch:
        patch.setattr("fleetprune_agent.statefile.write_atomic", full)
        for _ in range(COMMIT_AFTER + 1):
            assert device.answer() == 2
        assert device.predictor.predict(LARGE).tolist() == [[401, 401, 401]]
        assert device.answer() == 1
    assert device.slots.active().release == 2, "the switch back is still to be made"


def test_damage_of_the_active_slot_is_served_from_the_other(device, tmp_path):
    device.install(1)
    device.slots.commit()
    device.install(2)
    device.slots.active().model.write_bytes(b"")
    assert Predictor(Slots(tmp_path)).predict(ZEROS)[0, 0] == 1


@pytest.mark.parametrize("data", [b"", b"not a model", gemm(1)[:-20]], ids=["empty", "text", "cut"])
def test_what_does_not_load(tmp_path, data):
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(GraphError, match=r"^the model does not load: [^\n]+$"):
        load_model(tmp_path / "m")
