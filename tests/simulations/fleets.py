"""A tiny fleet whose rounds take milliseconds."""

import numpy as np

from fleetprune_coordinator.config import FleetConfig
from fleetprune_sim.loop import LoopDevice

INPUTS, CLASSES = 6, 3


def tiny_config(folder, **training):
    """Two classes over `models.mlp`; state below `folder`."""
    return FleetConfig.model_validate(
        {
            "fleet": "tiny",
            "state": folder / "state",
            "model": {
                "factory": "fleetprune_sim.models:mlp",
                "arguments": {"inputs": INPUTS, "hidden": 16, "classes": CLASSES},
                "input_shape": [INPUTS],
                "classes": CLASSES,
            },
            "training": {
                "rounds": 4,
                "batch": 8,
                "devices_per_round": 4,
                "remask_every": 2,
                "calibration_passes": 1,
                **training,
            },
            "pruning": {"channel_multiple": 4},
            "classes": {"large": {}, "small": {"macs_share": 0.5}},
        }
    )


def tiny_devices(seed=0):
    """Four devices, two of each class; the label is the largest of the first inputs."""
    rng = np.random.default_rng(seed)
    devices = {}
    for i in range(4):
        x = rng.normal(size=(20 + 3 * i, INPUTS)).astype(np.float32)
        y = x[:, :CLASSES].argmax(axis=1).astype(np.int64)
        devices[f"d{i}"] = LoopDevice("large" if i < 2 else "small", True, x, y)
    return devices
