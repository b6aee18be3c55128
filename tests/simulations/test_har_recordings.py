import zipfile

import numpy as np
import pytest

from fleetprune.errors import DataError
from fleetprune_sim.data import har_recordings as har
from fleetprune_sim.data.sources import VARIABLE
from tests.simulations.recordings import HEADER, make_archive


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("har"))


def test_windows_of_the_made_archive(made):
    windows = har.read_windows(har.find({VARIABLE: str(made)}))
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
    for folder in (har.find({VARIABLE: str(tmp_path)}), tmp_path):
        unpacked = har.read_windows(folder)
        assert (unpacked.x == zipped.x).all()
        assert (unpacked.y == zipped.y).all()
        assert (unpacked.subject == zipped.subject).all()


def test_cache_is_used_and_a_broken_one_is_not(made, tmp_path, monkeypatch):
    first = har.read_windows(made / har.ARCHIVE, tmp_path)
    (kept,) = tmp_path.iterdir()

    def refuse(source, window, step):
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


def test_missing_data_says_where_to_get_it(tmp_path):
    for environment, start in (
        (
            {},
            "the activity recordings are looked for in the folder that FLEETPRUNE_DATA names, "
            "which is not set: ",
        ),
        (
            {VARIABLE: str(tmp_path)},
            f"{tmp_path} has neither {har.ARCHIVE} nor its unpacked",
        ),
        (
            {VARIABLE: str(tmp_path / "no")},
            f"{tmp_path / 'no'}, which FLEETPRUNE_DATA names, does not exist: download ",
        ),
    ):
        with pytest.raises(DataError) as caught:
            har.find(environment)
        message = str(caught.value)
        assert message.startswith(start)
        assert "\n" not in message
        for hint in ("GeoTecINIT/sp-sw-har-dataset", "10.1016/j.dib.2023.109809", "CC BY 4.0"):
            assert hint in message
        assert VARIABLE in message


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
    with pytest.raises(
        DataError, match=r"is damaged \(File is not a zip file\): download it again$"
    ):
        har.read_windows(archive)


def test_window_and_step_can_be_chosen():
    times = np.arange(700) * 10.0
    values = np.repeat(np.arange(700.0)[:, None], 6, axis=1)
    x, _ = har.cut_windows(values, times, np.zeros(700, np.int64), window=192, step=96)
    assert x.shape == (6, 6, 192)
    assert x[1, 0].tolist() == list(range(96, 288))


def test_other_windows_are_not_taken_from_the_cache(made, tmp_path):
    archive = made / har.ARCHIVE
    assert har.read_windows(archive, tmp_path).x.shape[2] == 128
    assert har.read_windows(archive, tmp_path, window=192).x.shape[2] == 192
    coarse = har.read_windows(archive, tmp_path, window=192, step=192)
    assert coarse.x.shape == (9 * 2 * 2 * 3, 6, 192)
    assert len(list(tmp_path.iterdir())) == 3
