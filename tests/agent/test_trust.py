import hashlib
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from models import gemm
from repositories import NOW, Clock, MemoryRepository
from tuf.ngclient import Updater

from fleetprune.blocks import NotFoundError
from fleetprune.errors import InstallError, TransportError, TrustError
from fleetprune.files import write_atomic
from fleetprune_agent.trust import FolderSource, SignedFile, TrustedRepository


class CountingSource(FolderSource):
    """Stops after some chunks, as a lost connection does; counts what came."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.chunks = 0
        self.stop_at = -1

    def progress(self, name: str, done: int) -> None:
        self.chunks += 1
        if self.chunks == self.stop_at:
            raise TransportError("the connection was lost")


@pytest.fixture
def repository() -> MemoryRepository:
    return MemoryRepository()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trusted(tmp_path: Path, repository: MemoryRepository, clock: Clock) -> TrustedRepository:
    return TrustedRepository(tmp_path / "trust", repository.bootstrap, repository, clock)


def test_a_manifest_is_fetched_and_verified(trusted, repository):
    published = repository.release(1)
    trusted.refresh()
    assert trusted.manifest("phone", 1) == published


def test_a_rollout_is_fetched_and_verified(trusted, repository):
    repository.release(1, to_all=False)
    told = repository.roll_out(candidate=1, share=500, salt="0123456789abcdef", canaries=("d1",))
    assert trusted.rollout("phone") == told
    assert trusted.rollout("phone", serial=told.serial) == told
    assert (told.wanted("d1", 0), told.wanted("d2", 0)) == (1, 0)


def test_a_young_fleet_has_no_rollout(trusted, repository):
    repository.release(1, to_all=False)
    assert trusted.rollout("phone") is None
    assert trusted.rollout("gateway") is None


def test_the_first_question_refreshes(trusted, repository):
    published = repository.release(1)
    assert trusted.manifest("phone", 1) == published


def test_a_role_that_was_signed_anew_since_the_last_refresh_is_looked_for_once_more(
    trusted, repository
):
    """Old versions are gone from the source; the graphs of a new round come like that."""
    repository.add("graphs/a.onnx", b"a")
    repository.bump()
    trusted.refresh()
    repository.add("graphs/b.onnx", b"b")
    repository.bump()
    assert trusted.describe("graphs/b.onnx").size == 1


def test_names_asked_for_are_plain_and_few(trusted, repository):
    published = repository.release(1)
    trusted.refresh()
    trusted.manifest("phone", 1)
    told = trusted.rollout("phone")
    trusted.refresh()
    manifest, rollout = (hashlib.sha256(m.to_bytes()).hexdigest() for m in (published, told))
    assert repository.asked == [
        "metadata/2.root.json",
        "metadata/timestamp.json",
        "metadata/2.snapshot.json",
        "metadata/2.targets.json",
        f"targets/releases/phone/1/{manifest}.manifest.json",
        "metadata/2.rollouts.json",
        f"targets/rollouts/{rollout}.phone.json",
        "metadata/2.root.json",
        "metadata/timestamp.json",
    ]


def test_a_refresh_without_news_reads_only_root_and_timestamp(trusted, repository):
    repository.release(1)
    trusted.refresh()
    repository.asked.clear()
    trusted.refresh()
    assert repository.asked == ["metadata/2.root.json", "metadata/timestamp.json"]


def test_time_is_the_callers_not_the_systems(tmp_path, repository):
    """Everything below expired long before, and long after, the machine that runs this test."""
    for years in (-50, 50):
        moment = NOW + timedelta(days=365 * years)
        old = MemoryRepository(moment)
        old.release(1)
        trusted = TrustedRepository(tmp_path / str(years), old.bootstrap, old, Clock(moment))
        trusted.refresh()
        assert trusted.manifest("phone", 1).release == 1


def test_metadata_is_stored_durably(trusted, repository, monkeypatch):
    """Pins the one private hook of python-tuf that is overridden."""
    assert "_persist_file" in vars(Updater)
    written = []

    def spy(path: Path, data: bytes) -> None:
        written.append(path.name)
        write_atomic(path, data)

    monkeypatch.setattr("fleetprune_agent.trust.write_atomic", spy)
    trusted.refresh()
    assert written == ["1.root.json", "timestamp.json", "snapshot.json", "targets.json"]


def test_a_disk_that_refuses_is_an_install_error(tmp_path, repository, clock):
    (tmp_path / "trust").write_text("not a folder")
    trusted = TrustedRepository(tmp_path / "trust", repository.bootstrap, repository, clock)
    with pytest.raises(InstallError, match=r"^cannot make .*/trust: File exists$"):
        trusted.refresh()


def test_a_missing_target_is_named(trusted, repository):
    repository.release(1)
    with pytest.raises(TrustError) as e:
        trusted.manifest("gateway", 1)
    assert str(e.value) == "the release repository has no target releases/gateway/1/manifest.json"


def test_missing_metadata_is_a_transport_error(trusted, repository):
    del repository.snapshot.meta["targets.json"]
    repository.snapshot.meta["targets.json"] = type(repository.timestamp.snapshot_meta)(7)
    with pytest.raises(TransportError) as e:
        trusted.refresh()
    assert str(e.value) == "release repository: metadata/7.targets.json not found"


def test_a_silent_source_is_a_transport_error(tmp_path, repository, clock):
    class Silent(MemoryRepository):
        def read(self, name, max_bytes):
            raise TransportError("no answer in 30 s")

    trusted = TrustedRepository(tmp_path, repository.bootstrap, Silent(), clock)
    with pytest.raises(TransportError, match=r"^no answer in 30 s$"):
        trusted.refresh()


def test_a_failed_refresh_leaves_nothing_trusted_in_memory(trusted, repository, clock):
    repository.release(1)
    trusted.refresh()
    clock.advance(days=2)
    with pytest.raises(TrustError):
        trusted.refresh()
    with pytest.raises(TrustError, match=r"timestamp.json is expired"):
        trusted.manifest("phone", 1)


def test_root_is_renewed(trusted, repository, clock):
    repository.release(1)
    trusted.refresh()
    repository.root.version = 2
    repository.root.expires = NOW + timedelta(days=700)
    trusted.refresh()
    assert "metadata/3.root.json" in repository.asked
    clock.advance(days=400)
    for payload in (repository.targets, repository.snapshot, repository.timestamp):
        payload.expires = clock.now + timedelta(days=1)
    repository.bump()
    trusted.refresh()
    assert trusted.manifest("phone", 1).release == 1


def test_a_stored_timestamp_that_is_damaged_is_fetched_again(trusted, repository, tmp_path):
    repository.release(1)
    trusted.refresh()
    (tmp_path / "trust" / "timestamp.json").write_bytes(b"")
    trusted.refresh()
    assert trusted.manifest("phone", 1).release == 1


def test_a_target_is_downloaded_and_verified(trusted, repository, tmp_path):
    manifest = repository.release(1)
    into = trusted.target(manifest.model, tmp_path / "model.onnx")
    assert into.read_bytes() == gemm(1)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.onnx"]


def test_a_target_that_is_there_is_not_pulled_again(trusted, repository, tmp_path):
    manifest = repository.release(1)
    trusted.target(manifest.model, tmp_path / "model.onnx")
    repository.asked.clear()
    trusted.target(manifest.model, tmp_path / "model.onnx")
    assert repository.asked == []


def test_another_target_replaces_a_file_in_one_step(trusted, repository, tmp_path, monkeypatch):
    first, into = repository.release(1), tmp_path / "model.onnx"
    trusted.target(first.model, into)
    second = repository.release(2)
    trusted.refresh()

    def lost(name: str, size: int, sha256: str, part: Path) -> None:
        part.write_bytes(b"some")
        raise TransportError("the connection was lost")

    with monkeypatch.context() as patch:
        patch.setattr(repository, "pull", lost)
        with pytest.raises(TransportError):
            trusted.target(second.model, into)
    assert into.read_bytes() == gemm(1)
    parts = [p.name for p in tmp_path.glob("model.onnx.*")]
    assert parts == [f"model.onnx.{second.sha256[:16]}"]
    assert trusted.target(second.model, into).read_bytes() == gemm(2)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.onnx"]


def test_describe_names_the_blob(trusted, repository):
    manifest = repository.release(1)
    signed = trusted.describe(manifest.model)
    assert signed == SignedFile(manifest.model, manifest.size, manifest.sha256)
    assert signed.blob == f"targets/releases/phone/1/{manifest.sha256}.model.onnx"
    assert SignedFile("top", 1, "00").blob == "targets/00.top"


def test_a_pull_that_is_cut_off_continues(tmp_path):
    data = bytes(range(256)) * 1024  # 4 chunks
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "x").write_bytes(data)
    source, into = CountingSource(tmp_path), tmp_path / "into"
    source.stop_at = 2
    with pytest.raises(TransportError, match="the connection was lost"):
        source.pull("targets/x", len(data), "", into)
    assert into.stat().st_size == 2 * 65536
    source.stop_at = -1
    source.pull("targets/x", len(data), "", into)
    assert (into.read_bytes(), source.chunks) == (data, 4)


def test_a_folder_source_is_bounded_and_stays_inside(tmp_path):
    public = tmp_path / "public"
    public.mkdir()
    (tmp_path / "secret").write_bytes(b"key")
    (public / "file").write_bytes(b"12345")
    source = FolderSource(public)
    assert source.read("file", 5) == b"12345"
    with pytest.raises(TrustError, match=r"^file is longer than 4 bytes$"):
        source.read("file", 4)
    with pytest.raises(TrustError, match=r"^file is longer than 4 bytes$"):
        source.pull("file", 4, "", tmp_path / "into")
    assert (tmp_path / "into").stat().st_size == 4
    for name in ("../secret", "absent", "", ".."):
        with pytest.raises(NotFoundError):
            source.read(name, 10)


WITHOUT_CRYPTOGRAPHY = """
import sys
from pathlib import Path
sys.modules["cryptography"] = None  # importing it fails, as on a device, where it is not installed
from fleetprune.errors import ConfigError
from fleetprune_agent.state import read_root
for name in sys.argv[1:]:
    try:
        read_root(Path(name))
        print("trusted")
    except ConfigError as e:
        print(e)
"""


def test_signatures_are_verified_without_cryptography(tmp_path):
    honest = json.loads(MemoryRepository().bootstrap)
    forged = json.loads(json.dumps(honest))
    forged["signed"]["expires"] = "2099-01-01T00:00:00Z"
    for name, content in (("honest", honest), ("forged", forged)):
        (tmp_path / name).write_text(json.dumps(content))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CRYPTOGRAPHY, tmp_path / "honest", tmp_path / "forged"],
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == "trusted"
    assert second == (
        f"root {tmp_path / 'forged'} is not signed root metadata: root was signed by 0/1 keys"
    )
