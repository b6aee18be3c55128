"""Three patterns under noise for a small CNN with BatchNorm; rounds take milliseconds."""

from pathlib import Path

import numpy as np
from torch import nn

from fleetprune_sim.data.corpus import Corpus
from fleetprune_sim.tasks import SimTask

SIZE = 6
SHARE = 0.3
"""Of the dense model's multiply-accumulates, that the small class has."""


def net() -> nn.Module:
    """4 prunable tensors: 72 weights at 36 positions, 576 at 36, 1152 at 9, 48 at 1."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )


def corpus(seed: int, cache: Path) -> Corpus:
    rng = np.random.default_rng(seed)
    rows = np.indices((SIZE, SIZE))
    patterns = np.stack([rows[0] % 2, rows[1] % 2, rows.sum(0) // 2 % 2]) * 2.0 - 1

    def draw(n: int):
        y = rng.integers(0, 3, n)
        x = patterns[y] + rng.normal(scale=1.5, size=(n, SIZE, SIZE))
        return x[:, None].astype(np.float32), y

    return Corpus(*draw(240), *draw(90), *draw(90), labels=("rows", "columns", "checks"))


def task() -> SimTask:
    return SimTask(
        "sparse",
        corpus,
        "tests.simulations.sparse_task:net",
        {},
        {
            "training": {
                "rounds": 6,
                "batch": 8,
                "devices_per_round": 4,
                "remask_every": 2,
                "calibration_passes": 2,
            },
            "pruning": {"channel_multiple": 1},
            "classes": {"large": {}, "small": {"macs_share": SHARE}},
            "simulation": {
                "devices": 8,
                "partition": {"kind": "dirichlet", "alpha": 1.0},
                "evaluate_every": 0,
            },
        },
    )
