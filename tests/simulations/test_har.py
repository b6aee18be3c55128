"""On the publisher's recordings where they are, else on a few that this file makes.

The recordings are looked for in FLEETPRUNE_DATA, then in `../shared/data`.
"""

import os
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fleetprune.errors import DataError
from fleetprune_sim.data import har

REPOSITORY = Path(__file__).parents[2]
HEADER = "x_acc,y_acc,z_acc,x_gyro,y_gyro,z_gyro,timestamp,label"
FLEET = (["gateway-1", "gateway-2"], ["phone-1", "phone-2"], ["sensor-1", "sensor-2"])


def recording(samples: int, rng: np.random.Generator, start: int = 1657534171308) -> str:
    values = rng.normal(size=(samples, 6))
    labels = [har.LABELS[i * len(har.LABELS) // samples] for i in range(samples)]
    rows = [
        f"{','.join(f'{v:.7f}' for v in values[i])},{start + 10 * i},{labels[i]}"
        for i in range(samples)
    ]
    return "\n".join([HEADER, *rows]) + "\n"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive in the publisher's layout: nine people, two recordings on two devices."""
    folder = tmp_path_factory.mktemp("har")
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / har.ARCHIVE, "w") as archive:
        archive.writestr("DATA/subjects_info.csv", "subject_id,age\ns01,54\n")
        for person in range(1, 10):
            for run in (1, 2):
                for kind in ("sp", "sw"):
                    name = f"DATA/s{person:02d}/s{person:02d}_{run:02d}_{kind}.csv"
                    archive.writestr(name, recording(700, rng))
    return folder


@pytest.fixture(scope="session")
def real() -> Path:
    for folder in (os.environ.get(har.VARIABLE, ""), REPOSITORY / "../shared/data"):
        if folder and (Path(folder) / har.ARCHIVE).is_file():
            return Path(folder)
    pytest.skip(f"{har.ARCHIVE} is not here; the made recordings are tested instead")


def test_windows_of_the_made_archive(made):
    windows = har.read_windows(har.find({har.VARIABLE: str(made)}))
    per_recording = (700 - 128) // 64 + 1
    assert windows.x.shape == (9 * 2 * 2 * per_recording, 6, 128)
    assert windows.x.dtype == np.float32
    assert windows.y.dtype == np.int64
    assert sorted(set(windows.subject.tolist())) == [f"s{i:02d}" for i in range(1, 10)]
    assert (windows.kind == "phone").sum() == (windows.kind == "watch").sum()


def test_unpacked_folder_reads_the_same(made, tmp_path):
    with zipfile.ZipFile(made / har.ARCHIVE) as archive:
        archive.extractall(tmp_path)
    zipped = har.read_windows(made / har.ARCHIVE)
    for folder in (har.find({har.VARIABLE: str(tmp_path)}), tmp_path):
        unpacked = har.read_windows(folder)
        assert (unpacked.x == zipped.x).all()
        assert (unpacked.y == zipped.y).all()
        assert (unpacked.subject == zipped.subject).all()


def test_cache_is_used_and_a_broken_one_is_not(made, tmp_path, monkeypatch):
    first = har.read_windows(made / har.ARCHIVE, tmp_path)
    (kept,) = tmp_path.iterdir()

    def refuse(source):
        raise DataError("parsed again")

    with monkeypatch.context() as patched:
        patched.setattr(har, "_parse", refuse)
        assert (har.read_windows(made / har.ARCHIVE, tmp_path).x == first.x).all()
        kept.write_bytes(kept.read_bytes()[:1000])
        with pytest.raises(DataError, match="parsed again"):
            har.read_windows(made / har.ARCHIVE, tmp_path)
    assert (har.read_windows(made / har.ARCHIVE, tmp_path).x == first.x).all()


def test_window_values_order_and_majority():
    times = np.arange(192) * 10.0
    values = np.repeat(np.arange(192.0)[:, None], 6, axis=1)
    labels = np.repeat([3, 1], [100, 92])
    x, y = har.cut_windows(values, times, labels)
    assert x.shape == (2, 6, 128)
    assert x[0, 0].tolist() == list(range(128))
    assert x[1, 5].tolist() == list(range(64, 192))
    assert y.tolist() == [3, 1]  # 100 against 28, then 36 against 92
    backwards = har.cut_windows(values[::-1], times[::-1], labels[::-1])
    assert (backwards[0] == x).all()


def test_ties_go_to_the_lower_label():
    _, y = har.cut_windows(np.zeros((128, 6)), np.arange(128.0), np.repeat([4, 2], 64))
    assert y.tolist() == [2]


def test_no_window_spans_a_gap():
    times = np.arange(300) * 10.0
    times[150:] += har.MAX_GAP_MS  # 210 ms between two readings
    x, _ = har.cut_windows(np.zeros((300, 6)), times, np.zeros(300, np.int64))
    assert len(x) == 2  # 150 readings on either side
    times[150:] -= 10.0  # exactly 200 ms is no gap
    x, _ = har.cut_windows(np.zeros((300, 6)), times, np.zeros(300, np.int64))
    assert len(x) == 3


def test_of_equal_timestamps_the_first_is_kept():
    times = np.repeat(np.arange(128.0), 2)
    values = np.tile(np.array([[1.0], [2.0]]), (128, 6))
    x, _ = har.cut_windows(values, times, np.zeros(256, np.int64))
    assert x.shape == (1, 6, 128)
    assert (x == 1).all()


def test_too_short_a_recording_has_no_windows():
    x, y = har.cut_windows(np.zeros((127, 6)), np.arange(127.0), np.zeros(127, np.int64))
    assert (x.shape, y.shape) == ((0, 6, 128), (0,))


def check_split(windows: har.Windows, held_out: int) -> None:
    data = har.split(windows, *FLEET, seed=0, held_out=held_out)
    assert sorted(data.devices) == sorted([*FLEET[0], *FLEET[1], *FLEET[2]])
    assert data.input_shape == (6, 128)
    assert data.labels == har.LABELS
    own = {n: d.y_train.size + d.y_test.size for n, d in data.devices.items()}
    people = np.unique(windows.subject)
    test_people = np.random.default_rng(0).permutation(people)[:held_out]
    assert data.y_test.size == np.isin(windows.subject, test_people).sum()
    # Nobody's windows are on two devices of one kind: a phone's people have a sensor as well, a
    # gateway's only the gateway, so that all windows together are those not held out.
    assert sum(own.values()) + data.y_test.size == windows.y.size
    assert own["gateway-1"] > own["phone-1"] + own["sensor-1"]
    everyone = np.concatenate(
        [x for d in data.devices.values() for x in (d.x_train, d.x_test)]
    ).astype(np.float64)
    assert np.abs(everyone.mean(axis=(0, 2))).max() < 1e-3
    assert np.abs(everyone.std(axis=(0, 2)) - 1).max() < 1e-3


def test_split_of_the_made_archive(made):
    check_split(har.read_windows(made / har.ARCHIVE), held_out=2)


def test_split_is_seeded(made):
    windows = har.read_windows(made / har.ARCHIVE)
    first, second = (har.split(windows, *FLEET, seed=5, held_out=2) for _ in range(2))
    assert (first.devices["phone-1"].x_train == second.devices["phone-1"].x_train).all()


def test_load_reads_the_environment(made, monkeypatch, tmp_path):
    monkeypatch.setenv(har.VARIABLE, str(made))
    with pytest.raises(DataError, match=r"^3 items are too few for 4 parts$"):
        har.load(*FLEET, seed=0, cache=tmp_path)  # nine people less the six held out
    with pytest.raises(DataError, match=r"^2 phones and 1 sensors, expected as many$"):
        har.load(FLEET[0], FLEET[1], ["sensor-1"], seed=0)


def test_the_publishers_recordings(real):
    started = time.perf_counter()
    windows = har.read_windows(har.find({har.VARIABLE: str(real)}))
    took = time.perf_counter() - started
    assert len(np.unique(windows.subject)) == 23
    assert set(windows.kind.tolist()) == {"phone", "watch"}
    assert np.isfinite(windows.x).all()
    assert np.bincount(windows.y).min() > 300
    check_split(windows, har.HELD_OUT_SUBJECTS)
    if took > 20:  # two seconds on an idle machine; a loop over rows would take half a minute
        warnings.warn(f"reading took {took:.0f} s", stacklevel=1)


def test_missing_data_says_where_to_get_it(tmp_path):
    for environment, start in (
        ({}, "the activity recordings are not here: "),
        ({har.VARIABLE: str(tmp_path)}, f"{tmp_path} has neither {har.ARCHIVE} nor its unpacked"),
        ({har.VARIABLE: str(tmp_path / "no")}, f"{tmp_path / 'no'} has neither"),
    ):
        with pytest.raises(DataError) as caught:
            har.find(environment)
        message = str(caught.value)
        assert message.startswith(start)
        assert "\n" not in message
        for hint in ("GeoTecINIT/sp-sw-har-dataset", "10.1016/j.dib.2023.109809", "CC BY 4.0"):
            assert hint in message
        assert har.VARIABLE in message


GOOD_ROW = "1,2,3,4,5,6,1657534171308,WALKING"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "s01_01_sp.csv: columns are"),
        (f"{HEADER}\n{GOOD_ROW}\n1,2,3\n", "s01_01_sp.csv: "),
        (f"{HEADER}\n1,2,x,4,5,6,7,WALKING\n", "s01_01_sp.csv: could not convert string 'x'"),
        (f"{HEADER}\n1,2,nan,4,5,6,7,WALKING\n", "s01_01_sp.csv: expected 8 finite columns"),
        (f"{HEADER}\n1,2,3,4,5,6,7,DANCING\n", "s01_01_sp.csv: could not convert string 'DANC"),
        (f"{HEADER}\n1,2,3,4,5,6,7,9\n", "s01_01_sp.csv: a label is none of SEATED, "),
    ],
)
def test_malformed_recording_is_named(text, message):
    with pytest.raises(DataError) as caught:
        har.read_recording("s01_01_sp.csv", text.encode())
    assert str(caught.value).startswith(message)


def test_archive_without_recordings(tmp_path):
    archive = tmp_path / har.ARCHIVE
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("README", "")
    with pytest.raises(DataError, match="holds no recording of 128 samples"):
        har.read_windows(archive)
    archive.write_bytes(b"no zip")
    with pytest.raises(DataError, match="cannot be read: File is not a zip file"):
        har.read_windows(archive)
