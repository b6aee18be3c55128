"""One fleet's coordinator, whatever carries its messages: train, extract, check, release."""

import hashlib
import logging
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fleetprune.errors import BudgetError, ConfigError
from fleetprune.graphmeta import noise
from fleetprune.manifest import Manifest
from fleetprune.schedule import Curve
from fleetprune_coordinator.artifacts import Artifact, accuracy, build, without_zeros
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.describe import counted, describe
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.graph_library import GraphLibrary, StepOptions, fingerprint
from fleetprune_coordinator.grid_values import rounded_artifact
from fleetprune_coordinator.initial_weights import frozen_parameters, load_initial
from fleetprune_coordinator.int8 import Verdict, choose_file
from fleetprune_coordinator.keys import RELEASES
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.policy import Policy
from fleetprune_coordinator.provenance import next_smaller, requirements, training_record
from fleetprune_coordinator.records import ReleaseRecord
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.release_deltas import deltas_to
from fleetprune_coordinator.releases import ReleaseContent, ReleaseRepository
from fleetprune_coordinator.resize import read
from fleetprune_coordinator.rollout_ledger import RolloutLedger
from fleetprune_coordinator.rollouts import Rollouts
from fleetprune_coordinator.rounds import Rounds
from fleetprune_coordinator.snapshot import Snapshot, Tensors
from fleetprune_coordinator.tightening import Watch, narrowest_accuracy
from fleetprune_coordinator.time_round import TimeRound

log = logging.getLogger(__name__)

GOLDEN_SAMPLES = 8  # enough to notice a wrong graph or a wrong kernel; a few hundred bytes each


@dataclass(frozen=True)
class TestSet:
    """Labelled samples that no device trains on; only reported, never used to decide."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]


@dataclass(frozen=True)
class Released:
    """What a release brought to one class."""

    manifest: Manifest
    artifact: Artifact


class Coordinator:
    """A fleet's model, registry and release repository."""

    def __init__(
        self,
        config: FleetConfig,
        now: Callable[[], float],
        events: EventLog,
        check_stop: Callable[[], None] = lambda: None,
        *,
        policy: Policy | None = None,
        rounds: Callable[..., Rounds] = Rounds,
        exported: MutableMapping[str, bytes] | None = None,
        durable: bool = True,
        times: bool = True,
    ) -> None:
        """Open the fleet's state and trace its model.

        Args:
            config: The fleet.
            now: Seconds since 1970.
            events: Where progress is told.
            check_stop: Called between steps that take long; what it raises ends the work, which
                the next start takes up.
            policy: What is sent and trained; None: ours.
            rounds: The exchange with devices; makes one from the arguments of `Rounds`.
            exported: Graphs of this process's earlier coordinators, which this one adds to. The
                user's code must not have changed since.
            durable: False: the registry survives a kill, but not a power cut.
            times: Ask devices of classes with a limit of latency how long models take; False where
                devices are simulated, whose time is this machine's.

        Raises:
            ConfigError: The model or a file it names cannot be loaded, or there are no keys.
            TraceError: The model cannot be pruned; names the layer.
            BudgetError: A class's budget cannot be met; names the smallest achievable figure.
            RegistryError: Another coordinator runs on the same state.
        """
        self.config = config
        self.events = events
        self._check_stop = check_stop
        torch.manual_seed(config.training.seed)
        self.network = load_model(config)
        self._example = torch.zeros(1, *config.model.input_shape)
        frozen = frozen_parameters(self.network, config.model.freeze)
        self.architecture = describe(self.network, self._example, config)
        self.test = _samples(config, "test")
        self.planner = Planner.of(
            config, self.architecture, counted=counted(self.network, self.architecture, config)
        )
        self.repository = ReleaseRepository(
            config.state / RELEASES, lambda: datetime.fromtimestamp(now(), UTC)
        )
        self.registry = Registry.open(config.state, now, durable=durable)
        self.registry.set_classes({n: c.trains for n, c in config.classes.items()})
        library = GraphLibrary(
            self.network,
            self.architecture,
            self._example,
            self.repository,
            StepOptions(
                batch=config.training.batch,
                loss=_loss(config),
                momentum=config.training.momentum,
                weight_decay=config.training.weight_decay,
                distill_weight=config.training.distill_weight,
                student_task_weight=config.training.student_task_weight,
                mutual_weight=config.training.mutual_weight,
                prior=config.training.adjust_logits * (config.model.loss == "cross_entropy"),
                frozen=frozen,
            ),
            check_stop=check_stop,
            exported=exported,
            identity=fingerprint(
                self.network,
                self.architecture,
                config.model.model_dump(
                    mode="json", include={"factory", "arguments", "input_shape", "loss"}
                ),
            ),
        )
        params, stats = read(self.network)
        try:
            self.rollouts = Rollouts(
                RolloutLedger(self.registry, self.repository, config.rollout, events, now)
            )
            self.rollouts.ledger.reconcile()
            timing = None
            if times:
                of = config.pruning.precision
                timing = TimeRound(self.architecture, self.planner, library, self.registry, of)
            self.rounds = rounds(
                config.training,
                self.architecture,
                self.planner,
                library,
                registry=self.registry,
                events=events,
                run=self.registry.run,
                policy=policy,
                watch=self._watch(),
                ranges=config.pruning.int8,
                timing=timing,
            )
            check_continues(self.registry.latest_snapshot(), params, config)
            self.rounds.start(params, stats, trained=config.model.initial is not None)
        except BaseException:
            self.registry.close()
            raise

    def _watch(self) -> Watch | None:
        """What a dynamic schedule looks at, beside the loss."""
        known = _samples(self.config, "validation")
        if known is None or self.config.schedule.curve is not Curve.DYNAMIC:
            return None
        return narrowest_accuracy(self.network, self.architecture, known.x, known.y)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.registry.close()

    def read(self, name: str) -> Path | bytes | None:
        """What devices may pull: the release repository, and the models of open tasks."""
        if name.startswith("blobs/"):
            return self.registry.blob_path(name.removeprefix("blobs/"))
        return self.repository.path(name)

    def artifact(self, name: str) -> Artifact:
        """A class's model as it would be shipped now; BudgetError if it is over its budget."""
        return self._judged(name)[0]

    def _judged(self, name: str) -> tuple[Artifact, Verdict | None]:
        """A class's artifact; and how quantising it went, if that is wanted."""
        self._check_stop()
        built = build(self.network, self.architecture, self.rounds.model, name, self._golden())
        pruning, verdict = self.config.pruning, None

        def packed(made: Artifact) -> Artifact:
            rule = self.planner.weights.rule
            return without_zeros(made, rule.pattern) if rule.granularity.weights else made

        if pruning.int8:
            ranges = self.rounds.ranges.get(name)
            built, verdict = choose_file(
                built,
                ranges,
                self._golden() if self.test is None else self.test.x,
                None if self.test is None else self.test.y,
                wanted=pruning.int8,
                most_lost=pruning.int8_loss,
                fits=lambda made: self.planner.budgets[name].meets(packed(made).costs),
                unranged="" if ranges is not None else self.rounds.why_unranged(name),
            )
        if self.config.release.deltas and not built.int8:
            built = rounded_artifact(built, self._golden() if self.test is None else self.test.x)
        built = packed(built)
        try:
            self.planner.check(name, built.costs)
        except BudgetError as e:
            if verdict is None or verdict.int8:
                raise
            raise BudgetError(f"{e}; its file is not quantised: {verdict.reason}") from e
        return built, verdict

    def accuracy(self, artifact: Artifact) -> float | None:
        """On the test set; None if there is none."""
        if self.test is None:
            return None
        return accuracy(artifact.onnx, self.test.x, self.test.y)

    def release(self) -> dict[str, Released]:
        """Extract, check, sign and publish a model for every class, and begin to roll it out.

        Where every class's file is byte for byte that of the last release (a coordinator that was
        restarted after it), nothing is published and that release stands, whatever has become of
        its rollout.
        """
        judged = {name: self._judged(name) for name in self.config.classes}
        artifacts = {name: artifact for name, (artifact, _) in judged.items()}
        latest = self.repository.latest_release()
        standing = {name: self.repository.manifest(name, latest) for name in artifacts}
        manifests = {
            name: manifest
            for name, manifest in standing.items()
            if manifest is not None and manifest.sha256 == _digest(artifacts[name])
        }
        if manifests.keys() != artifacts.keys():
            manifests = self._publish(artifacts)
        self._note(manifests, {name: verdict for name, (_, verdict) in judged.items()})
        self.rollouts.ensure(max(m.release for m in manifests.values()), manifests)
        return {name: Released(m, artifacts[name]) for name, m in manifests.items()}

    def _publish(self, artifacts: Mapping[str, Artifact]) -> dict[str, Manifest]:
        config = self.config
        shapes = self.rounds.model.shapes
        smaller = next_smaller({name: shapes[name] for name in artifacts})
        contents = {
            name: ReleaseContent(
                onnx=artifact.onnx,
                golden=artifact.golden,
                deltas=self._deltas(name, artifact),
                input_shape=config.model.input_shape,
                tolerance=artifact.tolerance,
                requires=requirements(artifact.onnx),
                smaller=smaller.get(name),
                max_latency_ms=config.classes[name].latency_ms,
                max_rss_mb=config.classes[name].rss_mb,
                min_agreement=config.release.min_agreement,
                labels=config.model.labels,
                macs=artifact.costs.macs,
                peak_activation_bytes=artifact.costs.peak_activation_bytes,
                accuracy=self.accuracy(artifact),
                samples=0 if self.test is None else len(self.test.y),
                round=config.training.rounds,
                mask_version=self.rounds.model.mask_version,
                training=training_record(
                    self.registry,
                    criterion=str(config.training.criterion),
                    granularity=str(config.pruning.granularity),
                    precision="int8" if artifact.int8 else "float32",
                ),
                licence=config.release.licence,
            )
            for name, artifact in artifacts.items()
        }
        self._check_stop()
        number = self.repository.latest_release() + 1
        return self.repository.publish_release(number, contents)

    def _deltas(self, name: str, artifact: Artifact) -> tuple[tuple[str, bytes], ...]:
        self._check_stop()
        if not self.config.release.deltas:
            return ()
        return deltas_to(self.repository, name, artifact.onnx)

    def _note(
        self, manifests: Mapping[str, Manifest], verdicts: Mapping[str, Verdict | None]
    ) -> None:
        """Record a release that is out and tell of it, unless that was done before a restart."""
        known = {(r.number, r.device_class) for r in self.registry.releases()}
        new = [m for m in manifests.values() if (m.release, m.device_class) not in known]
        if not new:
            return
        self.registry.add_release(*map(_record, new))
        self.events.emit(
            "release",
            number=max(m.release for m in manifests.values()),
            classes={
                n: {"bytes": m.size, "macs": m.macs, "accuracy": m.accuracy} | _told(verdicts[n])
                for n, m in manifests.items()
            },
        )

    def _golden(self) -> NDArray[np.float32]:
        if self.test is not None:
            x: NDArray[np.float32] = self.test.x[:GOLDEN_SAMPLES]
            return x
        shape = (GOLDEN_SAMPLES, *self.config.model.input_shape)
        unit = math.sqrt(3) * noise(math.prod(shape), seed=1)  # variance 1, as after scaling
        return unit.astype(np.float32).reshape(shape)


def _told(verdict: Verdict | None) -> dict[str, Any]:
    """What an event says of quantising."""
    return {} if verdict is None else {"int8": asdict(verdict)}


def _digest(artifact: Artifact) -> str:
    return hashlib.sha256(artifact.onnx).hexdigest()


def load_model(config: FleetConfig) -> nn.Module:
    """The user's model, with its initial weights if there are any.

    Raises:
        ConfigError: The factory fails, or the weights do not fit.
    """
    factory = config.import_object(config.model.factory, "model.factory")
    try:
        model = factory(**config.model.arguments)
    except Exception as e:
        raise ConfigError(f"model.factory {config.model.factory}: {type(e).__name__}: {e}") from e
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.factory {config.model.factory} gave a {type(model).__name__}, "
            f"expected a torch.nn.Module"
        )
    if config.model.initial is not None:
        load_initial(
            model, config.model.initial, factory=config.model.factory, head=config.model.head
        )
    return model


def check_continues(snapshot: Snapshot | None, params: Tensors, config: FleetConfig) -> None:
    """ConfigError if the fleet's state is another model's, or that of other device classes."""
    if snapshot is None:
        return
    before = {name: value.shape for name, value in snapshot.params.items()}
    if before != {name: value.shape for name, value in params.items()}:
        raise ConfigError(
            f"{config.state} holds the training of another model than {config.model.factory} with "
            "these arguments: give this one another `state`"
        )
    if set(snapshot.stats) != set(config.classes):
        raise ConfigError(
            f"{config.state} holds the training of classes {', '.join(sorted(snapshot.stats))}, "
            f"but fleet.toml has {', '.join(sorted(config.classes))}: go back, or give these "
            "another `state`"
        )


def _loss(config: FleetConfig) -> Any:
    loss = config.model.loss
    return loss if loss == "cross_entropy" else config.import_object(loss, "model.loss")


def _samples(config: FleetConfig, key: Literal["test", "validation"]) -> TestSet | None:
    """What the coordinator itself has; ConfigError if it is damaged or of another model."""
    path: Path | None = getattr(config.data, key)
    if path is None:
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            x, y = file["x"].astype(np.float32), file["y"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise ConfigError(f"data.{key} {path}: expected an .npz with x and y: {e}") from e
    if x.shape[1:] != config.model.input_shape or y.shape != x.shape[:1] or not x.size:
        raise ConfigError(
            f"data.{key} {path}: x of shape {x.shape} and y of {y.shape}, "
            f"expected (n, {', '.join(map(str, config.model.input_shape))}) and (n,)"
        )
    if not np.isfinite(x).all():
        raise ConfigError(f"data.{key} {path}: x has values that are not finite")
    if y.min() < 0 or y.max() >= config.model.outputs:
        raise ConfigError(
            f"data.{key} {path}: labels {y.min()}..{y.max()}, "
            f"expected 0..{config.model.outputs - 1}"
        )
    return TestSet(x, y)


def _record(manifest: Manifest) -> ReleaseRecord:
    return ReleaseRecord(
        number=manifest.release,
        device_class=manifest.device_class,
        sha256=manifest.sha256,
        bytes=manifest.size,
        macs=manifest.macs,
        peak_activation_bytes=manifest.peak_activation_bytes,
        accuracy=manifest.accuracy,
        path=manifest.model,
        round=manifest.round,
        mask_version=manifest.mask_version,
    )
