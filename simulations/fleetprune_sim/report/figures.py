"""Figures of one run, class by class: what is averaged over seeds later."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Self

from fleetprune_sim.history import EvaluationRow
from fleetprune_sim.report.runs import Run

TRAIN = "train"
"""Phase of the rounds whose answers are client rounds."""


@dataclass(frozen=True)
class Spread:
    """A figure over several seeds."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for a single seed."""
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Of the values that there are; None where there are none."""
        known = [float(v) for v in values if v is not None]
        if not known:
            return None
        return cls(fmean(known), stdev(known) if len(known) > 1 else None, len(known))


def mean_of(spread: Spread | None) -> float | None:
    """Its mean; None where nothing is known."""
    return None if spread is None else spread.mean


@dataclass(frozen=True)
class Moment:
    """Where a training stood when a model was evaluated."""

    round: int
    accuracy: float
    """on the validation set"""
    bytes: int
    """of the whole fleet up to here, both ways"""
    seconds: float
    """by the fleet's clock"""


@dataclass(frozen=True)
class ClassResult:
    """What one class got out of one run; None: it was left out, or nobody measured it."""

    seed: int
    devices: int
    accuracy: float | None
    own_accuracy: float | None
    validation: float | None
    """the last evaluation in training"""
    macs: int | None
    macs_share: float | None
    """of the dense model's"""
    bytes: int | None
    bytes_share: float | None
    sparse_macs: int | None
    sparse_bytes: int | None
    within_budget: bool
    client_rounds: int
    up_bytes: int
    down_bytes: int
    up_factor: float | None
    """How many times the upload of float32 updates of the dense model would have been."""
    energy_j: float
    curve: tuple[Moment, ...]
    robustness: Mapping[str, float] = field(default_factory=dict)
    """Accuracy by corruption; nothing where nobody looked."""

    @property
    def served(self) -> bool:
        """Whether the class was given a model."""
        return self.macs is not None

    def seconds_to(self, target: float) -> float | None:
        """Virtual seconds until the validation accuracy first reached a target; None: never."""
        return next((m.seconds for m in self.curve if m.accuracy >= target), None)


def class_result(run: Run, name: str) -> ClassResult:
    """The figures of a class of a run."""
    summary = run.summary
    group, dense = summary.classes[name], summary.dense
    artifact = group.artifact if group.model is not None else None
    answers = sum(r.answers for r in run.rounds if r.device_class == name and r.phase == TRAIN)
    curve = moments(run, run.curve(name))
    up = group.traffic.up_bytes
    dense_up = summary.traffic.dense_up_bytes_per_client_round * answers
    last = curve[-1].accuracy if curve else group.validation_accuracy
    return ClassResult(
        seed=summary.seed,
        devices=group.devices,
        accuracy=group.accuracy if artifact else None,
        own_accuracy=group.own_accuracy if artifact else None,
        validation=last if artifact else None,
        macs=artifact.macs if artifact else None,
        macs_share=_share(artifact.macs, dense.macs) if artifact else None,
        bytes=artifact.bytes if artifact else None,
        bytes_share=_share(artifact.bytes, dense.bytes) if artifact else None,
        sparse_macs=artifact.sparse_macs if artifact else None,
        sparse_bytes=artifact.sparse_bytes if artifact else None,
        within_budget=bool(artifact) and group.within_budget,
        client_rounds=answers,
        up_bytes=up,
        down_bytes=group.traffic.down_bytes,
        up_factor=_share(dense_up, up) if answers else None,
        energy_j=sum(r.energy_j for r in run.rounds if r.device_class == name),
        curve=curve,
        robustness=(group.robustness or {}) if artifact else {},
    )


def moments(run: Run, evaluations: Iterable[EvaluationRow]) -> tuple[Moment, ...]:
    """Evaluations with what the fleet had spent by then.

    A model is judged right after its training round: repeated tries of the round are behind it,
    calibration, which bears the same number, is not.
    """
    found = []
    order = sorted(run.rounds, key=lambda r: (r.number, r.phase != TRAIN), reverse=True)
    total = 0
    # Every class's row says how long the whole round took.
    seconds: dict[tuple[int, str, int], float] = {}
    for e in evaluations:
        while order and (order[-1].number, order[-1].phase != TRAIN) <= (e.round, False):
            r = order.pop()
            total += r.up_bytes + r.down_bytes
            seconds[r.number, r.phase, r.step] = r.virtual_s
        found.append(Moment(e.round, e.accuracy, total, sum(seconds.values())))
    return tuple(found)


def fleet_up_factor(run: Run) -> float | None:
    """How many times the fleet's upload float32 updates of the dense model would have been."""
    traffic = run.summary.traffic
    return _share(traffic.dense_up_bytes_per_client_round, traffic.up_bytes_per_client_round)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
