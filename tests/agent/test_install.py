import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models import INPUTS, ZEROS, gemm, golden, not_finite_on_large_input, npz
from repositories import Clock, MemoryRepository

from fleetprune.errors import InstallError, TransportError, TrustError
from fleetprune_agent.install import Checks, InstallOutcome, Status, install
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slots import MAX_STARTS, Slots
from fleetprune_agent.trust import TrustedRepository


class Device:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.repository = MemoryRepository()
        self.restart()

    def restart(self) -> None:
        self.trusted = TrustedRepository(
            self.folder / "trust", self.repository.bootstrap, self.repository, self.clock
        )
        self.slots = Slots(self.folder)

    def install(self, checks: Checks | None = None) -> InstallOutcome:
        return install(self.trusted, self.slots, "phone", checks)

    def answer(self) -> float:
        return float(Predictor(self.slots).predict(ZEROS)[0, 0])


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_first_release(device):
    device.repository.release(1)
    outcome = device.install()
    assert (outcome.status, outcome.release) == (Status.INSTALLED, 1)
    assert outcome.latency_ms > 0
    assert device.answer() == 1


def test_nothing_newer(device):
    device.repository.release(1)
    device.install()
    device.repository.asked.clear()
    assert device.install() == InstallOutcome(Status.CURRENT, 1)
    assert not any("model.onnx" in name for name in device.repository.asked)


def test_update(device):
    for release in (1, 2, 3):
        device.repository.release(release)
        assert device.install().status is Status.INSTALLED
        assert device.answer() == release


def test_a_slot_holds_the_release_and_nothing_else(device):
    device.repository.release(1)
    device.install()
    files = sorted(p.name for p in device.slots.active().folder.iterdir())
    assert files == ["golden.npz", "model.onnx", "slot.json"]


def test_a_device_that_was_off_for_months_serves_and_then_updates(device):
    device.repository.release(1)
    device.install()
    device.clock.advance(days=200)
    device.restart()
    assert device.answer() == 1
    with pytest.raises(TrustError, match=r"timestamp.json is expired"):
        device.install()
    assert device.answer() == 1
    for payload in (
        *device.repository.content().values(),
        device.repository.snapshot,
        device.repository.timestamp,
    ):
        payload.expires = device.clock.now.replace(year=2027)
    device.repository.release(2)
    device.install()
    assert device.answer() == 2


REJECTED = {
    "wrong answers": (
        {"model": gemm(2.5)},
        "golden samples: outputs differ by up to 0.5, allowed are 0.001",
    ),
    "other number of classes": (
        {"samples": npz(x=ZEROS, y=np.zeros((1, 2), dtype=np.float32))},
        "golden samples: the model's output has shape (1, 3), not (1, 2)",
    ),
    "not finite": (
        {
            "model": not_finite_on_large_input(2),
            "samples": npz(
                x=np.full((1, INPUTS), 100, dtype=np.float32),
                y=np.zeros((1, 3), dtype=np.float32),
            ),
        },
        "the model's output has 3 of 3 values that are not finite",
    ),
    "other input shape": (
        {"fields": {"input_shape": (5,)}},
        "golden samples: x is (2, 4), expected (n, *(5,))",
    ),
    "no samples": (
        {"samples": npz(x=ZEROS[:0], y=np.zeros((0, 3), dtype=np.float32))},
        "golden samples: x is (0, 4), expected (n, *(4,))",
    ),
    "samples of another type": (
        {"samples": npz(x=np.zeros((1, 4)), y=np.zeros((1, 3)))},
        "golden samples: x is float64 and y is float64, expected float32",
    ),
    "outputs for other samples": (
        {"samples": npz(x=ZEROS, y=np.zeros((2, 3), dtype=np.float32))},
        "golden samples: y is (2, 3), expected (1, classes)",
    ),
    "samples that are not finite": (
        {"samples": npz(x=ZEROS * np.nan, y=np.zeros((1, 3), dtype=np.float32))},
        "golden samples: values that are not finite",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_release_that_fails_its_checks_never_becomes_active(device, case):
    device.repository.release(1)
    device.install()
    arguments, reason = REJECTED[case]
    device.repository.release(2, **arguments)
    assert device.install() == InstallOutcome(Status.REJECTED, 2, reason)
    assert device.slots.rejected() == {2: reason}
    assert device.answer() == 1
    device.restart()
    device.repository.asked.clear()
    assert device.install() == InstallOutcome(Status.REJECTED, 2, reason)
    assert not any("model.onnx" in name for name in device.repository.asked)
    device.repository.release(3)
    assert device.install().status is Status.INSTALLED
    assert device.answer() == 3


def test_a_model_that_does_not_load_is_rejected(device):
    device.repository.release(1, model=b"not a model")
    outcome = device.install()
    assert outcome.status is Status.REJECTED
    assert outcome.reason.startswith("the model does not load: ")


def ticking(*seconds: float) -> Checks:
    """A clock that says so at each call."""
    times: Iterator[float] = iter(seconds)
    return Checks(runs=len(seconds) // 2, clock=lambda: next(times))


def test_latency_is_a_median(device):
    device.repository.release(1, fields={"max_latency_ms": 3.5})
    outcome = device.install(ticking(0, 0.5, 1, 1.002, 2, 2.003))  # 500, 2 and 3 ms
    assert outcome.status is Status.INSTALLED
    assert outcome.latency_ms == pytest.approx(3)


def test_too_slow(device):
    device.repository.release(1, fields={"max_latency_ms": 3.0})
    outcome = device.install(ticking(0, 0.004, 1, 1.004, 2, 2.001))
    assert outcome == InstallOutcome(
        Status.REJECTED, 1, "one sample takes 4 ms (median of 3), allowed are 3 ms"
    )


def test_another_model_under_the_installed_number(device):
    device.repository.release(1)
    device.install()
    device.repository.release(1, model=gemm(7))
    with pytest.raises(TrustError, match=r"^release 1 has model [0-9a-f]{64}, but the installed "):
        device.install()
    assert device.answer() == 1


def test_an_authorised_return_to_an_older_release(device):
    for release in (1, 2):
        device.repository.release(release)
        device.install()
    device.repository.roll_out(stable=1)
    outcome = device.install()
    assert (outcome.status, outcome.release) == (Status.INSTALLED, 1)
    assert device.answer() == 1


def test_only_the_cohort_gets_a_candidate(device):
    device.repository.release(1)
    device.install()
    device.repository.release(2, to_all=False)
    device.repository.roll_out(stable=1, candidate=2, canaries=("d7",))
    assert device.install() == InstallOutcome(Status.CURRENT, 1)
    outcome = install(device.trusted, device.slots, "phone", device="d7")
    assert (outcome.status, outcome.release) == (Status.INSTALLED, 2)


def test_a_young_fleet_has_nothing_to_install(device):
    device.repository.release(1, to_all=False)
    assert device.install() == InstallOutcome(Status.CURRENT, 0)
    device.repository.roll_out(candidate=1)
    assert device.install() == InstallOutcome(Status.CURRENT, 0)


def test_a_lost_connection_keeps_the_old_model_and_what_came(device, monkeypatch):
    device.repository.release(1)
    device.install()
    device.repository.release(2)

    def lost(name: str, size: int, sha256: str, into: Path) -> None:
        into.write_bytes(b"some")
        raise TransportError("no answer in 30 s")

    with monkeypatch.context() as patch:
        patch.setattr(device.repository, "pull", lost)
        with pytest.raises(TransportError):
            device.install()
    assert device.answer() == 1
    assert len(list((device.slots.folder / "b").glob("model.onnx.*"))) == 1
    device.restart()
    assert device.install().status is Status.INSTALLED
    assert device.answer() == 2


def test_a_model_that_takes_the_process_down_is_given_up(device, monkeypatch):
    """The check is noted before it is made, or the agent would crash at every start for ever."""
    device.repository.release(1)
    device.install()
    device.slots.commit()
    device.repository.release(2)

    class CrashedError(BaseException):
        """Stands for a segmentation fault or the out-of-memory killer."""

    def crash(*args: object) -> None:
        raise CrashedError

    monkeypatch.setattr("fleetprune_agent.install.check_health", crash)
    for _ in range(MAX_STARTS):
        with pytest.raises(CrashedError):
            device.install()
        device.restart()
    assert device.install() == InstallOutcome(
        Status.REJECTED, 2, "the health check did not finish in 3 attempts"
    )
    assert device.answer() == 1


def test_no_room_is_noticed_before_anything_is_overwritten(device, monkeypatch):
    for release in (1, 2):
        device.repository.release(release)
        device.install()
        device.slots.commit()
    manifest = device.repository.release(3)
    size = manifest.size + len(golden(3))
    room = size + 1000 - device.slots.reclaimable()
    device.repository.asked.clear()
    monkeypatch.setattr("fleetprune_agent.install.free_bytes", lambda folder: room - 1)
    with pytest.raises(InstallError) as e:
        device.install(Checks(reserve_bytes=1000))
    assert str(e.value) == (
        f"disk full: release 3 needs {size} bytes and 1000 in reserve, "
        f"{size + 999} bytes free in {device.slots.folder}"
    )
    assert not any("model.onnx" in name for name in device.repository.asked)
    assert device.slots.rollback("still possible").release == 1
    monkeypatch.setattr("fleetprune_agent.install.free_bytes", lambda folder: room)
    device.install(Checks(reserve_bytes=1000))
    assert device.answer() == 3


def test_a_disk_that_fills_up_during_the_download(device, monkeypatch):
    device.repository.release(1)
    device.install()
    device.repository.release(2)

    def full(name: str, size: int, sha256: str, into: Path) -> None:
        into.write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(device.repository, "pull", full)
        with pytest.raises(InstallError) as e:
            device.install()
    model = device.slots.folder / "b" / "model.onnx"
    assert str(e.value).startswith(f"disk full: cannot download {model}, ")
    assert str(e.value).endswith(" bytes free")
    assert device.answer() == 1
    assert device.install().status is Status.INSTALLED, "a full disk is not the release's fault"


@pytest.fixture
def small_device(tmp_path: Path) -> Iterator[Device]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield Device(folder)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_device):
    """1 MiB: two models of 300 kB fit, 800 kB more do not, announced or not."""
    device, checks = small_device, Checks(reserve_bytes=0)
    for release in (1, 2):
        device.repository.release(release, model=gemm(release, padding=300_000))
        device.install(checks)
        device.slots.commit()
    device.repository.release(3, model=gemm(3, padding=800_000))
    with pytest.raises(InstallError, match=r"^disk full: release 3 needs \d+ bytes and 0 in"):
        device.install(checks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fleetprune_agent.install.free_bytes", lambda folder: 10**9)
        with pytest.raises(InstallError, match=r"^disk full: cannot download .*/model.onnx, \d+ "):
            device.install(checks)
    device.restart()
    assert device.slots.start().release == 2
    assert device.answer() == 2
    device.repository.release(4, model=gemm(4, padding=300_000))
    assert device.install(checks).status is Status.INSTALLED
    assert device.answer() == 4
