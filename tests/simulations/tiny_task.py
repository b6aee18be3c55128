"""A user's own task: three labels told by the largest of the first inputs; runs in seconds."""

from pathlib import Path

import numpy as np

from fleetprune_sim.data.corpus import Corpus
from fleetprune_sim.tasks import SimTask

INPUTS, LABELS = 6, 3


def corpus(seed: int, cache: Path) -> Corpus:
    rng = np.random.default_rng(seed)

    def draw(n: int):
        x = rng.normal(size=(n, INPUTS)).astype(np.float32)
        return x, x[:, :LABELS].argmax(axis=1).astype(np.int64)

    return Corpus(*draw(400), *draw(60), *draw(60), labels=("a", "b", "c"))


def task() -> SimTask:
    return SimTask(
        "tiny",
        corpus,
        "fleetprune_sim.models:mlp",
        {"inputs": INPUTS, "hidden": 16, "classes": LABELS},
        {
            "training": {
                "rounds": 6,
                "batch": 8,
                "devices_per_round": 4,
                "remask_every": 2,
                "calibration_passes": 1,
            },
            "pruning": {"channel_multiple": 4},
            "classes": {"large": {}, "small": {"macs_share": 0.5}},
            "simulation": {
                "devices": 8,
                "partition": {"kind": "dirichlet", "alpha": 1.0},
                "evaluate_every": 2,
                "classes": {
                    "large": {"drop_out": 0.1, "macs_per_s": 1e6},
                    "small": {"available": 0.7, "macs_per_s": 1e5},
                },
            },
        },
    )
