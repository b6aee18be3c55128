import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from fleetprune.errors import ConfigError, FleetpruneError, InstallError, RegistryError
from fleetprune.files import write_atomic
from fleetprune.manifest import Requirements, Training
from fleetprune.rollout import Rollout
from fleetprune_agent.trust import FolderSource, TrustedRepository
from fleetprune_coordinator.keys import Expiry, init_repository
from fleetprune_coordinator.releases import KEEP_RELEASES, ReleaseContent, ReleaseRepository

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
BASE = "a" * 64
PHONE = ReleaseContent(onnx=b"phone model", golden=b"phone golden", input_shape=(4,))
GATEWAY = ReleaseContent(onnx=b"gateway model", golden=b"gateway golden", input_shape=(4,))


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


class KilledError(Exception):
    """The process is gone."""


class DyingWriter:
    """Writes `survives` files, then dies: before the next is written, or right after it."""

    def __init__(self, survives: int, after: bool) -> None:
        self.left, self.after = survives, after

    def __call__(self, path: Path, data: bytes) -> None:
        if self.left <= 0:
            if self.after:
                write_atomic(path, data)
            raise KilledError
        self.left -= 1
        write_atomic(path, data)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_repository(tmp_path / "releases", NOW)
    return tmp_path / "releases"


@pytest.fixture
def repository(folder: Path, clock: Clock) -> ReleaseRepository:
    return ReleaseRepository(folder, clock)


@pytest.fixture
def device(tmp_path: Path, folder: Path, repository: ReleaseRepository, clock: Clock):
    source = FolderSource(folder / "public")
    return TrustedRepository(tmp_path / "trust", repository.root(), source, clock)


def test_init_makes_keys_and_metadata(folder):
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        "keys/graphs-1.pem",
        "keys/rollouts-1.pem",
        "keys/root-1.pem",
        "keys/snapshot-1.pem",
        "keys/targets-1.pem",
        "keys/timestamp-1.pem",
        "public/metadata/1.graphs.json",
        "public/metadata/1.rollouts.json",
        "public/metadata/1.root.json",
        "public/metadata/1.snapshot.json",
        "public/metadata/1.targets.json",
        "public/metadata/timestamp.json",
    ]
    assert (folder / "keys").stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in (folder / "keys").iterdir()} == {0o600}


def test_init_never_overwrites_keys(folder):
    before = (folder / "keys" / "root-1.pem").read_bytes()
    with pytest.raises(ConfigError) as e:
        init_repository(folder, NOW)
    assert str(e.value) == (
        f"{folder} already holds keys or files, expected a new or empty folder: "
        "keys are never overwritten"
    )
    assert (folder / "keys" / "root-1.pem").read_bytes() == before


def test_init_accepts_an_empty_folder(tmp_path, clock):
    (tmp_path / "empty").mkdir()
    init_repository(tmp_path / "empty", NOW)
    assert ReleaseRepository(tmp_path / "empty", clock).latest_release() == 0


@pytest.mark.parametrize("survives", range(12))
def test_init_leaves_nothing_half_made(tmp_path, monkeypatch, survives):
    dying = DyingWriter(survives, after=False)
    monkeypatch.setattr(
        "fleetprune_coordinator.keys.write_atomic", lambda path, data, mode=0: dying(path, data)
    )
    with pytest.raises(KilledError):
        init_repository(tmp_path / "releases", NOW)
    assert list(tmp_path.iterdir()) == []


def test_a_device_installs_what_was_published(repository, device, tmp_path):
    manifests = repository.publish_release(1, {"phone": PHONE, "gateway": GATEWAY}, to_all=True)
    device.refresh()
    for name, content in (("phone", PHONE), ("gateway", GATEWAY)):
        assert device.rollout(name).wanted("d1", 0) == 1
        manifest = device.manifest(name, 1)
        assert manifest == manifests[name] == repository.manifest(name)
        assert device.target(manifest.model, tmp_path / "m").read_bytes() == content.onnx
        assert device.target(manifest.golden, tmp_path / "g").read_bytes() == content.golden


def test_manifest_fields(repository, device, tmp_path):
    content = replace(
        PHONE,
        labels=("walk", "run"),
        macs=12,
        accuracy=0.5,
        samples=20,
        max_latency_ms=3.0,
        max_rss_mb=40.0,
        min_agreement=0.9,
        smaller="watch",
        licence="Apache-2.0",
        requires=Requirements(opset=17),
        training=Training(rounds=3, devices=4),
        deltas=((BASE, b"difference"),),
    )
    manifest = repository.publish_release(7, {"phone": content})["phone"]
    delta = manifest.deltas[0]
    assert device.target(delta.target, tmp_path / "d").read_bytes() == b"difference"
    assert manifest.model_dump() == {
        "schema_": 1,
        "release": 7,
        "device_class": "phone",
        "model": "releases/phone/7/model.onnx",
        "sha256": hashlib.sha256(b"phone model").hexdigest(),
        "size": 11,
        "golden": "releases/phone/7/golden.npz",
        "tolerance": 1e-3,
        "requires": {
            "schema_": 1,
            "opset": 17,
            "ir_version": 1,
            "runtime": "onnxruntime",
            "runtime_version": "0",
            "agent_version": "0",
        },
        "deltas": (
            {
                "schema_": 1,
                "base": BASE,
                "target": f"releases/phone/7/from-{BASE}.delta",
                "sha256": hashlib.sha256(b"difference").hexdigest(),
                "size": 10,
            },
        ),
        "smaller": "watch",
        "max_latency_ms": 3.0,
        "max_rss_mb": 40.0,
        "min_agreement": 0.9,
        "labels": ("walk", "run"),
        "input_shape": (4,),
        "macs": 12,
        "peak_activation_bytes": 0,
        "accuracy": 0.5,
        "samples": 20,
        "round": 0,
        "mask_version": 0,
        "training": {
            "schema_": 1,
            "rounds": 3,
            "devices": 4,
            "samples": 0,
            "criterion": "",
            "granularity": "",
            "precision": "float32",
        },
        "licence": "Apache-2.0",
    }


def test_a_class_that_is_not_released_keeps_what_it_has(repository, device):
    repository.publish_release(1, {"phone": PHONE, "gateway": GATEWAY}, to_all=True)
    repository.publish_release(2, {"phone": PHONE}, to_all=True)
    device.refresh()
    assert device.rollout("phone").stable == 2
    assert device.rollout("gateway").stable == 1


def test_a_release_is_run_by_nobody_until_a_rollout_names_it(repository, device):
    repository.publish_release(1, {"phone": PHONE})
    device.refresh()
    assert (device.rollout("phone"), repository.rollout("phone")) == (None, None)
    assert (repository.manifest("phone"), repository.manifest("phone", 2)) == (None, None)
    assert device.manifest("phone", 1) == repository.manifest("phone", 1)
    canary = Rollout(device_class="phone", serial=1, candidate=1, canaries=("d1",))
    repository.publish_rollout(canary)
    device.refresh()
    assert device.rollout("phone") == repository.rollout("phone") == canary
    assert repository.manifest("phone") == repository.manifest("phone", 1)


def test_an_authorised_return_to_an_older_release(repository, device, tmp_path):
    for release in (1, 2):
        content = replace(PHONE, onnx=b"model %d" % release)
        repository.publish_release(release, {"phone": content}, to_all=True)
    repository.roll_out_to_all(1, ["phone"])
    device.refresh()
    rollout = device.rollout("phone", serial=2)
    assert (rollout.serial, rollout.wanted("d1", 2)) == (3, 1)
    model = device.manifest("phone", 1).model
    assert device.target(model, tmp_path / "m").read_bytes() == b"model 1"
    assert repository.latest_release() == 2


def test_a_rollout_names_only_what_is_signed_for_its_class(repository):
    repository.publish_release(1, {"phone": PHONE})
    before = repository.read("metadata/timestamp.json")
    for fields in ({"stable": 2}, {"candidate": 2}, {"stable": 1, "candidate": 2}):
        with pytest.raises(RegistryError) as e:
            repository.publish_rollout(Rollout(device_class="phone", serial=1, **fields))
        assert str(e.value) == (
            "release 2 is not signed for class phone: publish it, or roll out one that is"
        )
    with pytest.raises(RegistryError, match=r"^release 1 is not signed for class gateway: "):
        repository.roll_out_to_all(1, ["phone", "gateway"])
    assert repository.read("metadata/timestamp.json") == before, "all or none"


@pytest.mark.parametrize("serial", [1, 2])
def test_serials_of_rollouts_only_rise(repository, serial):
    repository.publish_release(1, {"phone": PHONE}, to_all=True)
    repository.roll_out_to_all(1, ["phone"])
    with pytest.raises(RegistryError) as e:
        repository.publish_rollout(Rollout(device_class="phone", serial=serial, stable=1))
    assert str(e.value) == f"rollout {serial} for phone is not new, expected more than 2"


def test_release_numbers_only_rise(repository):
    repository.publish_release(3, {"phone": PHONE})
    for old in (3, 2):
        with pytest.raises(RegistryError) as e:
            repository.publish_release(old, {"gateway": GATEWAY})
        assert str(e.value) == (
            f"release {old} is not new, expected more than 3: to go back, roll an older release out"
        )
    assert repository.latest_release() == 3


def test_a_release_needs_models(repository):
    with pytest.raises(RegistryError, match=r"^release 1 has no models, expected at least one"):
        repository.publish_release(1, {})


def test_a_graph_is_published_once(repository, device, tmp_path):
    graph = repository.publish_graph(b"graph")
    before = repository.read("metadata/timestamp.json")
    assert repository.publish_graph(b"graph") == graph
    assert repository.read("metadata/timestamp.json") == before
    digest = hashlib.sha256(b"graph").hexdigest()
    assert (graph.target, graph.sha256) == (f"graphs/{digest}.onnx", digest)
    assert device.target(graph.target, tmp_path / "graph").read_bytes() == b"graph"


def test_old_releases_are_dropped_from_the_list_and_the_disk(repository, folder, device):
    repository.publish_release(1, {"gateway": GATEWAY})
    repository.publish_graph(b"graph")
    for release in range(2, KEEP_RELEASES + 4):
        repository.publish_release(release, {"phone": PHONE}, to_all=release == 2)
    kept = sorted(int(p.name) for p in (folder / "public/targets/releases/phone").iterdir())
    assert kept == [2, *range(4, KEEP_RELEASES + 4)], "the second is the one that devices run"
    device.refresh()
    assert device.manifest("phone", KEEP_RELEASES + 3) == repository.manifest("phone", 11)
    assert device.manifest("gateway", 1).release == 1
    metadata = sorted(p.name for p in (folder / "public/metadata").glob("*.targets.json"))
    assert len(metadata) == 8


def test_a_smaller_variant_stays_as_long_as_the_release_that_falls_back_to_it(repository):
    phone = replace(PHONE, smaller="watch")
    repository.publish_release(1, {"phone": phone, "watch": PHONE}, to_all=True)
    for release in range(2, 2 + KEEP_RELEASES):
        repository.publish_release(release, {"watch": PHONE}, to_all=True)
    assert repository.manifest("watch", 1) is not None
    repository.publish_release(10, {"phone": phone}, to_all=True)
    repository.publish_release(11, {"watch": PHONE})
    assert repository.manifest("watch", 1) is None
    assert repository.manifest("watch", 2) is None


def publications(repository: ReleaseRepository) -> None:
    models = {"phone": replace(PHONE, onnx=b"new"), "gateway": GATEWAY}
    repository.publish_release(2, models, to_all=True)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("survives", range(12))
def test_killed_at_every_write(folder, clock, device, tmp_path, survives, after):
    """8 target files, then targets, rollouts, snapshot and timestamp: only the last publishes."""
    ReleaseRepository(folder, clock).publish_release(1, {"phone": PHONE}, to_all=True)
    device.refresh()
    with pytest.raises(KilledError):
        publications(ReleaseRepository(folder, clock, write=DyingWriter(survives, after)))
    published = after and survives == 11

    device.refresh()
    release = device.rollout("phone").stable
    assert release == (2 if published else 1)
    manifest = device.manifest("phone", release)
    device.target(manifest.model, tmp_path / "model")

    reopened = ReleaseRepository(folder, clock)
    assert reopened.latest_release() == (2 if published else 1)
    if not published:
        publications(reopened)
    device.refresh()
    manifest = device.manifest("phone", device.rollout("phone").stable)
    assert device.target(manifest.model, tmp_path / "m").read_bytes() == b"new"


def test_nothing_is_left_to_write_after_the_twelfth(folder, clock):
    """Shows that the test above covers all writes."""
    ReleaseRepository(folder, clock).publish_release(1, {"phone": PHONE})
    publications(ReleaseRepository(folder, clock, write=DyingWriter(12, after=False)))


def test_a_failed_publication_is_forgotten_by_the_same_object(folder, clock, device):
    writer = DyingWriter(7, after=True)
    repository = ReleaseRepository(folder, clock, write=writer)
    with pytest.raises(KilledError):
        publications(repository)
    writer.left = 100
    publications(repository)
    device.refresh()
    assert device.rollout("phone").stable == 2


def test_a_full_disk_publishes_nothing(folder, clock, device):
    def full(path: Path, data: bytes) -> None:
        raise InstallError(f"disk full: cannot write {path}, 0 bytes free")

    with pytest.raises(InstallError, match=r"^disk full: cannot write "):
        ReleaseRepository(folder, clock, write=full).publish_graph(b"graph")
    device.refresh()


def test_refresh_renews_only_what_is_half_expired(repository, folder, clock, device):
    repository.publish_release(1, {"phone": PHONE})
    assert repository.refresh_timestamp() is False
    clock.now = NOW + timedelta(hours=13)
    assert repository.refresh_timestamp() is True
    assert repository.refresh_timestamp() is False
    device.refresh()
    versions = sorted(p.name for p in (folder / "public/metadata").iterdir())
    assert "3.targets.json" not in versions


def test_a_fleet_without_releases_lives_on_for_years(repository, clock, device):
    """Refreshed every 12 h; snapshot, targets and root are renewed on the way."""
    repository.publish_release(1, {"phone": PHONE}, to_all=True)
    for half_days in range(1, 2 * 800, 7):
        clock.now = NOW + timedelta(hours=12 * half_days)
        repository.refresh_timestamp()
        device.refresh()
    assert device.rollout("phone").stable == 1
    assert device.manifest("phone", 1).release == 1
    assert repository.read("metadata/4.root.json") is not None


def test_a_root_key_may_be_moved_away(folder, clock):
    (folder / "keys" / "root-1.pem").unlink()
    repository = ReleaseRepository(folder, clock)
    repository.publish_release(1, {"phone": PHONE})
    clock.now = NOW + timedelta(days=200)
    assert repository.refresh_timestamp() is True
    assert repository.read("metadata/2.root.json") is None


def test_expiry_is_configurable(tmp_path, clock):
    expiry = Expiry(timestamp=timedelta(hours=2))
    init_repository(tmp_path / "r", NOW, expiry)
    repository = ReleaseRepository(tmp_path / "r", clock, expiry)
    clock.now = NOW + timedelta(minutes=61)
    assert repository.refresh_timestamp() is True


def test_opening_what_is_no_repository(tmp_path, clock):
    with pytest.raises(ConfigError) as e:
        ReleaseRepository(tmp_path, clock)
    assert str(e.value) == (
        f"no release repository in {tmp_path}: {tmp_path}/keys is missing; "
        "`fleetprune coordinator init` makes one"
    )


def test_a_foreign_key_is_refused(folder, tmp_path, clock):
    init_repository(tmp_path / "other", NOW)
    key = json.loads((folder / "public/metadata/1.root.json").read_bytes())
    (named,) = key["signed"]["roles"]["snapshot"]["keyids"]
    (tmp_path / "other/keys/snapshot-1.pem").replace(folder / "keys/snapshot-1.pem")
    with pytest.raises(ConfigError) as e:
        ReleaseRepository(folder, clock)
    assert str(e.value) == (
        f"no private key of role snapshot in keys/, expected one of: {named[:8]}"
    )


@pytest.mark.parametrize("role", ["rollouts", "graphs"])
def test_a_repository_of_an_older_form_is_refused(folder, clock, role):
    path = folder / "public/metadata/1.snapshot.json"
    snapshot = json.loads(path.read_bytes())
    del snapshot["signed"]["meta"][f"{role}.json"]
    path.write_text(json.dumps(snapshot))
    with pytest.raises(ConfigError) as e:
        ReleaseRepository(folder, clock)
    assert str(e.value) == (
        f"{folder}/public is a release repository of an older form, without the roles rollouts "
        "and graphs: make a new one with `fleetprune coordinator init` in another `state`, and "
        "give devices its root"
    )


def test_an_unreadable_key_is_refused(folder, clock):
    (folder / "keys/targets-1.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"^cannot read the private key .*/keys/targets-1.pem: "):
        ReleaseRepository(folder, clock)


def test_damaged_metadata_is_named(folder, clock):
    (folder / "public/metadata/timestamp.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^cannot read the release metadata .*/timestamp.json: "):
        ReleaseRepository(folder, clock)


def test_public_names_are_served(repository, folder):
    path = repository.path("metadata/timestamp.json")
    assert path == folder / "public/metadata/timestamp.json"
    assert repository.read("metadata/1.root.json") == repository.root()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "metadata",
        "metadata/",
        "metadata/absent.json",
        "../keys/root-1.pem",
        "metadata/../../keys/root-1.pem",
        "metadata/..",
        "targets/../metadata/timestamp.json",
        "/metadata/timestamp.json",
        "metadata//timestamp.json",
        "metadata\\timestamp.json",
        "metadata/timestamp.json\n",
        "metadata/timestamp.json\0",
        "metadata/.timestamp.json.tmp",
        "keys/root-1.pem",
        "targets/link",
    ],
)
def test_no_other_name_is_served(repository, folder, name):
    (folder / "public/targets/link").symlink_to(folder / "keys/root-1.pem")
    (folder / "public/metadata/.timestamp.json.tmp").write_bytes(b"half")
    assert repository.path(name) is None
    assert repository.read(name) is None


@pytest.mark.parametrize("name", ["../x", "/x", "", "a/b", ".b", "a" * 65])
def test_a_class_that_is_no_name_is_refused(repository, name):
    with pytest.raises(ValidationError, match="device_class"):
        repository.publish_release(1, {name: PHONE})
    assert repository.latest_release() == 0


def test_all_errors_are_ours(tmp_path, clock):
    for make in (
        lambda: init_repository(Path("/proc/none/x"), NOW),
        lambda: ReleaseRepository(tmp_path, clock),
    ):
        with pytest.raises(FleetpruneError):
            make()
