"""How often a rollout stops, and should it: `python benchmarks/rollout_gates.py [--runs 2000]`.

Devices hold out 50 samples each; the release before is right on 85 % of them, more or less.
The new one differs on one sample in ten, so that accuracy falls by so many points on average, and
by more or less on single devices; or some of its installations fail. Per case the share of runs in
which the gates abort, at three canaries, at 100 devices, and on the way through all stages (3, 8,
28, 53 and 100 devices). Seeded.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from fleetprune.messages import Telemetry
from fleetprune_coordinator.rollout_config import RolloutConfig
from fleetprune_coordinator.rollout_fates import Verdict, gather, judge
from fleetprune_coordinator.rollout_state import Device, RolloutRecord

SAMPLES, BEFORE, DISAGREE = 50, 0.85, 0.10
SPREAD = 0.05  # standard deviation of accuracy between devices
STAGES = (3, 8, 28, 53, 100)
ROLLOUT = RolloutRecord(
    id=1,
    device_class="phone",
    candidate=2,
    stable=1,
    stages=(0, 500, 2500, 5000, 10000),
    salt="0" * 16,
    canaries=("d0",),
    started_at=0.0,
    began_at=0.0,
)


@dataclass(frozen=True)
class Case:
    """What is true of a release."""

    points: float = 0.0
    """By which accuracy falls."""
    uneven: float = 0.0
    """Standard deviation of that between devices, in points."""
    odd: int = 0
    """Devices on which the new release is right on half of the samples only."""
    failures: float = 0.002
    """Probability that an installation fails."""


CASES = {
    "as good": Case(),
    "as good, ± 3 points by device": Case(uneven=3),
    "as good, but for one odd device": Case(odd=1),
    "1 point worse": Case(points=1),
    "2 points worse (the limit)": Case(points=2),
    "4 points worse": Case(points=4),
    "10 points worse": Case(points=10),
    "2 % of installations fail (the limit)": Case(failures=0.02),
    "10 % of installations fail": Case(failures=0.10),
    "half of the installations fail": Case(failures=0.5),
}


def fleet(case: Case, devices: int, rng: np.random.Generator) -> list[Device]:
    """Devices that have all reported."""
    found = []
    for i in range(devices):
        before = float(np.clip(rng.normal(BEFORE, SPREAD), 0.5, 0.98))
        fall = (case.points + rng.normal(0, case.uneven) if case.uneven else case.points) / 100
        if i < case.odd:
            fall = 0.35
        lost = min(before, max(0.0, (DISAGREE + fall) / 2, fall))
        won = min(1 - before, max(0.0, lost - fall))
        right = rng.binomial(SAMPLES, before)
        worse = rng.binomial(right, lost / before)
        better = rng.binomial(SAMPLES - right, won / (1 - before))
        failed = rng.random() < case.failures
        telemetry = Telemetry(
            device=f"d{i}",
            device_class="phone",
            release=1 if failed else 2,
            failed=2 if failed else 0,
            state="rolled_back" if failed else "committed",
            accuracy=(right - worse + better) / SAMPLES,
            accuracy_before=right / SAMPLES,
            samples=SAMPLES,
            agreement=rng.binomial(200, 1 - lost - won) / 200,
        )
        found.append(Device(f"d{i}", True, 0.0, telemetry, told_at=0.0, committed_at=0.0))
    return found


def aborts(devices: list[Device], rules: RolloutConfig) -> bool:
    """Whether the gates abort once the devices have soaked."""
    now = rules.soak_s
    return judge(ROLLOUT, gather(ROLLOUT, devices, rules, now), rules, now)[0] is Verdict.ABORT


def abort_rate(
    case: Case, stages: Sequence[int], runs: int, rules: RolloutConfig, seed: int = 0
) -> float:
    """Share of runs that abort in one of the stages, each with so many devices."""
    rng = np.random.default_rng(seed)
    stopped = 0
    for _ in range(runs):
        devices = fleet(case, max(stages), rng)
        rng.shuffle(devices)  # type: ignore[arg-type]
        stopped += any(aborts(devices[:n], rules) for n in stages)
    return stopped / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    runs = parser.parse_args().runs
    rules = RolloutConfig()
    table = Table("the new release is", "3 canaries", "100 devices", "all stages")
    for name, case in CASES.items():
        rates = [abort_rate(case, stages, runs, rules) for stages in ((3,), (100,), STAGES)]
        table.add_row(name, *(f"{100 * rate:.1f} %" for rate in rates))
    Console().print(table)


if __name__ == "__main__":
    main()
