"""Human activity from smartphones and smartwatches: 23 people, each with one of both.

Matey-Sanz, Casteleyn and Granell, "Dataset for human activity recognition from smartphones and
smartwatches", Data in Brief 2023, doi 10.1016/j.dib.2023.109809, CC BY 4.0. Each recording is a
CSV file `DATA/s01/s01_01_sp.csv` (`_sp` smartphone, `_sw` smartwatch) of accelerometer and
gyroscope at about 100 Hz. The data set is not part of this project: see `WHERE`.
"""

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError
from fleetprune_sim.data.fleet_data import DeviceData, FleetData
from fleetprune_sim.data.partition import deal, hold_out

LABELS = ("SEATED", "STANDING_UP", "WALKING", "TURNING", "SITTING_DOWN")
WINDOW = 128  # samples: about 1.3 s
STEP = 64  # samples
CHANNELS = 6  # accelerometer x, y, z in m/s², gyroscope x, y, z in rad/s
MAX_GAP_MS = 200.0  # a window never spans a longer silence
HELD_OUT_SUBJECTS = 6
DEVICE_TEST_SHARE = 0.15  # of a device's own windows; it judges installed models by them
MAX_RECORDING = 16 * 1024 * 1024  # bytes; the longest of the publisher's is under 1 MB

VARIABLE = "FLEETPRUNE_DATA"
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
    """(n, 6, 128), not standardised"""
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
    folder = (os.environ if environment is None else environment).get(VARIABLE, "")
    if not folder:
        raise DataError(f"the activity recordings are not here: {WHERE}")
    for path in (Path(folder) / ARCHIVE, Path(folder) / "DATA", Path(folder)):
        if path.is_file() or (path.is_dir() and any(path.glob("**/s*_*_s[pw].csv"))):
            return path
    raise DataError(f"{folder} has neither {ARCHIVE} nor its unpacked recordings: {WHERE}")


def read_windows(source: Path, cache: Path | None = None) -> Windows:
    """Read every recording and cut it into windows.

    Args:
        source: The publisher's zip or unpacked folder.
        cache: Folder for the parsed windows, so that a second call need not parse again.

    Returns:
        The windows in the order of subject, recording and device.

    Raises:
        DataError: There is no recording, or one of them is malformed.
    """
    kept = cache / f"har-{_fingerprint(source)}.npz" if cache is not None else None
    if kept is not None and kept.is_file():
        try:
            with kept.open("rb") as file, np.load(file, allow_pickle=False) as parsed:
                return Windows(*(parsed[name] for name in ("x", "y", "subject", "kind")))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            kept.unlink()  # cut short by a crash: parse again
    windows = _parse(source)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(kept.name + ".part.npz")
        np.savez(part, x=windows.x, y=windows.y, subject=windows.subject, kind=windows.kind)
        part.replace(kept)
    return windows


def load(
    gateways: Sequence[str],
    phones: Sequence[str],
    sensors: Sequence[str],
    seed: int,
    cache: Path | None = None,
) -> FleetData:
    """Split the recordings by subject and device over a fleet.

    Six subjects are held out whole: the test set is people whom no device knows. The others are
    dealt out: a gateway stands for a household's hub, with what the phones and watches of its
    people recorded; a phone has its people's smartphone recordings; a sensor has the smartwatch
    recordings of the phone's people. Two thirds of the people belong to gateways. Values are
    standardised per channel with the training windows' mean and deviation.

    Args:
        gateways: Names of the gateways.
        phones: Names of the phones.
        sensors: Names of the sensors, as many as phones.
        seed: Decides who is held out and who belongs to which device.
        cache: Folder for the parsed windows.

    Raises:
        DataError: The data set is missing, malformed or too small.
    """
    if len(phones) != len(sensors):
        raise DataError(f"{len(phones)} phones and {len(sensors)} sensors, expected as many")
    return split(read_windows(find(), cache), gateways, phones, sensors, seed)


def split(
    windows: Windows,
    gateways: Sequence[str],
    phones: Sequence[str],
    sensors: Sequence[str],
    seed: int,
    *,
    held_out: int = HELD_OUT_SUBJECTS,
) -> FleetData:
    """As `load`, from windows that were read already; `held_out` subjects go to the test set."""
    rng = np.random.default_rng(seed)
    people: list[str] = rng.permutation(np.unique(windows.subject)).tolist()
    if held_out >= len(people):
        raise DataError(f"{len(people)} subjects, expected more than the {held_out} held out")
    test = np.isin(windows.subject, people[:held_out])
    shares = [2] * len(gateways) + [1] * len(phones)
    homes = deal(people[held_out:], shares)
    owned: dict[str, NDArray[np.bool_]] = {}
    for name, home in zip(gateways, homes[: len(gateways)], strict=True):
        owned[name] = np.isin(windows.subject, home)
    for phone, sensor, home in zip(phones, sensors, homes[len(gateways) :], strict=True):
        theirs = np.isin(windows.subject, home)
        owned[phone] = theirs & (windows.kind == "phone")
        owned[sensor] = theirs & (windows.kind == "watch")
    known = windows.x[~test]
    mean = known.mean(axis=(0, 2), keepdims=True, dtype=np.float64)
    deviation = known.std(axis=(0, 2), keepdims=True, dtype=np.float64)
    x = ((windows.x - mean) / np.maximum(deviation, 1e-6)).astype(np.float32)
    devices = {}
    for name in sorted(owned):
        own = np.flatnonzero(owned[name])
        if own.size == 0:
            raise DataError(f"{name} gets no windows: its people have no such recordings")
        judged = hold_out(windows.y[own], DEVICE_TEST_SHARE, rng)
        held, train = own[judged], np.delete(own, judged)
        devices[name] = DeviceData(x[train], windows.y[train], x[held], windows.y[held])
    return FleetData(devices, x[test], windows.y[test], LABELS)


def cut_windows(
    values: NDArray[np.float64], times: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cut one recording into windows that span no gap.

    Args:
        values: (n, 6) readings.
        times: (n,) milliseconds, in any order; of equal ones the first is kept.
        labels: (n,) activity of each reading.

    Returns:
        Windows (w, 6, 128) and their majority labels (w,); ties go to the lower label.
    """
    _, order = np.unique(times, return_index=True)  # sorts, and keeps the first of equals
    values, times, labels = values[order], times[order], labels[order]
    edges = np.flatnonzero(np.diff(times) > MAX_GAP_MS) + 1
    starts: list[int] = []
    for first, last in zip([0, *edges.tolist()], [*edges.tolist(), times.size], strict=True):
        starts.extend(range(first, last - WINDOW + 1, STEP))
    index = np.array(starts, dtype=np.intp)[:, None] + np.arange(WINDOW)
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


def _parse(source: Path) -> Windows:
    xs: list[NDArray[np.float32]] = []
    ys: list[NDArray[np.int64]] = []
    subjects: list[str] = []
    kinds: list[str] = []
    for subject, kind, name, data in _recordings(source):
        x, y = cut_windows(*read_recording(name, data))
        xs.append(x)
        ys.append(y)
        subjects.extend([subject] * y.size)
        kinds.extend([kind] * y.size)
    if not subjects:
        raise DataError(f"{source} holds no recording of {WINDOW} samples or more: {WHERE}")
    return Windows(np.concatenate(xs), np.concatenate(ys), np.array(subjects), np.array(kinds))


def _recordings(source: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Subject, kind, name and contents of every recording."""
    if source.is_dir():
        for path in sorted(source.rglob("*.csv")):
            if match := _RECORDING.search(path.as_posix()):
                yield match[1], _KINDS[match[3]], path.name, path.read_bytes()
        return
    try:
        with zipfile.ZipFile(source) as archive:
            for info in sorted(archive.infolist(), key=lambda i: i.filename):
                if match := _RECORDING.search(info.filename):
                    if info.file_size > MAX_RECORDING:
                        raise DataError(
                            f"{info.filename} has {info.file_size} bytes, "
                            f"expected at most {MAX_RECORDING}"
                        )
                    yield match[1], _KINDS[match[3]], info.filename, archive.read(info)
    except (zipfile.BadZipFile, OSError) as e:
        raise DataError(f"{source} cannot be read: {e}") from e


def _fingerprint(source: Path) -> str:
    """Names this state of the source: its place, size and time of change, and how we cut it."""
    state = source.stat()
    text = f"{source.resolve()} {state.st_size} {state.st_mtime_ns} {WINDOW} {STEP} {MAX_GAP_MS}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
