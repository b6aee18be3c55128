"""Human activity from smartphones and smartwatches: 23 people, each with one of both.

Matey-Sanz, Casteleyn and Granell, "Dataset for human activity recognition from smartphones and
smartwatches", Data in Brief 2023, doi 10.1016/j.dib.2023.109809, CC BY 4.0. Each recording is a
CSV file `DATA/s01/s01_01_sp.csv` (`_sp` smartphone, `_sw` smartwatch) of accelerometer and
gyroscope at about 100 Hz. The data set is not part of this project: see `WHERE`.
"""

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError
from fleetprune_sim.data.sources import (
    VARIABLE,
    Arrays,
    fingerprint,
    kept,
    read_errors,
    required_folder,
)

LABELS = ("SEATED", "STANDING_UP", "WALKING", "TURNING", "SITTING_DOWN")
WINDOW = 128  # samples: about 1.3 s
STEP = 64  # samples
CHANNELS = 6  # accelerometer x, y, z in m/s², gyroscope x, y, z in rad/s
MAX_GAP_MS = 200.0  # a window never spans a longer silence
MAX_RECORDING = 16 * 1024 * 1024  # bytes; the longest of the publisher's is under 1 MB

ARCHIVE = "sp-sw-har-dataset.zip"
WHERE = (
    f"download the repository GeoTecINIT/sp-sw-har-dataset from GitHub as {ARCHIVE} "
    "(Data in Brief 2023, doi 10.1016/j.dib.2023.109809, CC BY 4.0) "
    f"and set {VARIABLE} to the folder that holds it"
)

_RECORDING = re.compile(r"(?:^|/)(s\d+)_(\d+)_(sp|sw)\.csv$")
_HEADER = b"x_acc,y_acc,z_acc,x_gyro,y_gyro,z_gyro,timestamp,label"
_KINDS = {"sp": "phone", "sw": "watch"}


@dataclass(frozen=True)
class Windows:
    """All windows of the data set, with whose they are."""

    x: NDArray[np.float32]
    """(n, 6, window), not standardised"""
    y: NDArray[np.int64]
    """(n,) indices into `LABELS`"""
    subject: NDArray[np.str_]
    """(n,) such as "s01" """
    kind: NDArray[np.str_]
    """(n,) "phone" or "watch" """


def find(environment: Mapping[str, str] | None = None) -> Path:
    """The publisher's zip, or its unpacked folder.

    Args:
        environment: Variables to look in; the process's own by default.

    Raises:
        DataError: It is not there; the message says where to download it.
    """
    folder = required_folder("the activity recordings are", WHERE, environment)
    for path in (folder / ARCHIVE, folder / "DATA", folder):
        if path.is_file() or (path.is_dir() and any(path.glob("**/s*_*_s[pw].csv"))):
            return path
    raise DataError(f"{folder} has neither {ARCHIVE} nor its unpacked recordings: {WHERE}")


def read_windows(
    source: Path, cache: Path | None = None, *, window: int = WINDOW, step: int = STEP
) -> Windows:
    """Read every recording and cut it into windows.

    Args:
        source: The publisher's zip or unpacked folder.
        cache: Folder for the parsed windows, so that a second call need not parse again.
        window: Readings in a window.
        step: Readings from the beginning of one window to that of the next.

    Returns:
        The windows in the order of subject, recording and device.

    Raises:
        DataError: There is no recording, or one of them is malformed.
    """
    name = f"har-{fingerprint(source, window, step, MAX_GAP_MS)}"
    found = kept(cache, name, lambda: _parse(source, window, step))
    return Windows(found["x"], found["y"], found["subject"], found["kind"])


def cut_windows(
    values: NDArray[np.float64],
    times: NDArray[np.float64],
    labels: NDArray[np.int64],
    *,
    window: int = WINDOW,
    step: int = STEP,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cut one recording into windows that span no gap.

    Args:
        values: (n, 6) readings.
        times: (n,) milliseconds, in any order; of equal ones the first is kept.
        labels: (n,) activity of each reading.
        window: Readings in a window.
        step: Readings from the beginning of one window to that of the next.

    Returns:
        Windows (w, 6, window) and their majority labels (w,); ties go to the lower label.
    """
    _, order = np.unique(times, return_index=True)  # sorts, and keeps the first of equals
    values, times, labels = values[order], times[order], labels[order]
    edges = np.flatnonzero(np.diff(times) > MAX_GAP_MS) + 1
    starts: list[int] = []
    for first, last in zip([0, *edges.tolist()], [*edges.tolist(), times.size], strict=True):
        starts.extend(range(first, last - window + 1, step))
    index = np.array(starts, dtype=np.intp)[:, None] + np.arange(window)
    votes = (labels[index][:, :, None] == np.arange(len(LABELS))).sum(axis=1)
    x = values[index].transpose(0, 2, 1).astype(np.float32)
    return np.ascontiguousarray(x), votes.argmax(axis=1).astype(np.int64)


def read_recording(
    name: str, data: bytes
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Parse one CSV file to readings (n, 6), milliseconds (n,) and label indices (n,).

    Raises:
        DataError: It is malformed; the message names the file.
    """
    header, _, body = data.partition(b"\n")
    if header.strip() != _HEADER:
        raise DataError(f"{name}: columns are {header[:80]!r}, expected {_HEADER.decode()}")
    for index, label in enumerate(LABELS):  # then numpy's C reader takes the whole file
        body = body.replace(label.encode(), b"%d" % index)
    try:
        table = np.loadtxt(io.BytesIO(body), delimiter=",", ndmin=2)
    except ValueError as e:
        raise DataError(f"{name}: {e}") from e
    if table.shape[1] != CHANNELS + 2 or not np.isfinite(table).all():
        raise DataError(f"{name}: expected {CHANNELS + 2} finite columns in every row")
    labels = table[:, -1].astype(np.int64)
    if not ((table[:, -1] == labels) & (labels >= 0) & (labels < len(LABELS))).all():
        raise DataError(f"{name}: a label is none of {', '.join(LABELS)}")
    return table[:, :CHANNELS], table[:, CHANNELS], labels


def _parse(source: Path, window: int, step: int) -> Arrays:
    xs: list[NDArray[np.float32]] = []
    ys: list[NDArray[np.int64]] = []
    subjects: list[str] = []
    kinds: list[str] = []
    for subject, kind, name, data in _recordings(source):
        x, y = cut_windows(*read_recording(name, data), window=window, step=step)
        xs.append(x)
        ys.append(y)
        subjects.extend([subject] * y.size)
        kinds.extend([kind] * y.size)
    if not subjects:
        raise DataError(f"{source} holds no recording of {window} samples or more: {WHERE}")
    return {
        "x": np.concatenate(xs),
        "y": np.concatenate(ys),
        "subject": np.array(subjects),
        "kind": np.array(kinds),
    }


def _recordings(source: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Subject, kind, name and contents of every recording."""
    with read_errors(source):
        if source.is_dir():
            for path in sorted(source.rglob("*.csv")):
                if match := _RECORDING.search(path.as_posix()):
                    yield match[1], _KINDS[match[3]], path.name, path.read_bytes()
            return
        with zipfile.ZipFile(source) as archive:
            for info in sorted(archive.infolist(), key=lambda i: i.filename):
                if match := _RECORDING.search(info.filename):
                    if info.file_size > MAX_RECORDING:
                        raise DataError(
                            f"{info.filename} has {info.file_size} bytes, "
                            f"expected at most {MAX_RECORDING}"
                        )
                    yield match[1], _KINDS[match[3]], info.filename, archive.read(info)
