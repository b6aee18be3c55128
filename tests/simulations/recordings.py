"""A few made recordings in the layout of the activity data set, and where its own are."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fleetprune_sim.data.har_recordings import ARCHIVE, LABELS
from fleetprune_sim.data.sources import VARIABLE

REPOSITORY = Path(__file__).parents[2]
HEADER = "x_acc,y_acc,z_acc,x_gyro,y_gyro,z_gyro,timestamp,label"


def recording(samples: int, rng: np.random.Generator, start: int = 1657534171308) -> str:
    values = rng.normal(size=(samples, 6))
    labels = [LABELS[i * len(LABELS) // samples] for i in range(samples)]
    rows = [
        f"{','.join(f'{v:.7f}' for v in values[i])},{start + 10 * i},{labels[i]}"
        for i in range(samples)
    ]
    return "\n".join([HEADER, *rows]) + "\n"


def make_archive(folder: Path) -> Path:
    """Nine people, two recordings of 7 s on two devices each; returns `folder`."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / ARCHIVE, "w") as archive:
        archive.writestr("DATA/subjects_info.csv", "subject_id,age\ns01,54\n")
        for person in range(1, 10):
            for run in (1, 2):
                for kind in ("sp", "sw"):
                    name = f"DATA/s{person:02d}/s{person:02d}_{run:02d}_{kind}.csv"
                    archive.writestr(name, recording(700, rng))
    return folder


def real_folder() -> Path:
    """Where the publisher's archive is; skips the test where it is not."""
    for folder in (os.environ.get(VARIABLE, ""), REPOSITORY / "../shared/data"):
        if folder and (Path(folder) / ARCHIVE).is_file():
            return Path(folder)
    pytest.skip(f"{ARCHIVE} is not in {VARIABLE}; made recordings are tested instead")
