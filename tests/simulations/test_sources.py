import gzip
import os
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from fleetprune.errors import DataError
from fleetprune_sim.data.sources import (
    VARIABLE,
    data_folder,
    fingerprint,
    kept,
    read_errors,
    required_folder,
)


def test_the_folder_is_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert data_folder() == tmp_path
    assert data_folder({}) is None
    assert data_folder({VARIABLE: ""}) is None


def test_a_folder_that_cannot_hold_data_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for environment, told in (
        (
            {},
            f"the set is looked for in the folder that {VARIABLE} names, which is not set: get it",
        ),
        ({VARIABLE: "/no/such"}, f"/no/such, which {VARIABLE} names, does not exist: get it"),
        ({VARIABLE: str(file)}, f"{file}, which {VARIABLE} names, is no folder: get it"),
    ):
        with pytest.raises(DataError) as caught:
            required_folder("the set is", "get it", environment)
        assert str(caught.value) == told
    assert required_folder("the set is", "get it", {VARIABLE: str(tmp_path)}) == tmp_path


def test_arrays_are_parsed_once(tmp_path):
    calls = []

    def parse():
        calls.append(1)
        return {"x": np.arange(3), "who": np.array(["a", "bc"])}

    folder = tmp_path / "made" / "when needed"
    for _ in range(2):
        found = kept(folder, "set-1", parse)
        assert found["x"].tolist() == [0, 1, 2]
        assert found["who"].tolist() == ["a", "bc"]
    assert len(calls) == 1
    assert [p.name for p in folder.iterdir()] == ["set-1.npz"]
    kept(folder, "set-2", parse)
    kept(None, "set-1", parse)
    assert len(calls) == 3


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_cache_is_parsed_again(tmp_path, cut):
    kept(tmp_path, "set", lambda: {"x": np.arange(3)})
    file = tmp_path / "set.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    assert kept(tmp_path, "set", lambda: {"x": np.arange(4)})["x"].tolist() == [0, 1, 2, 3]
    assert kept(tmp_path, "set", lambda: {})["x"].tolist() == [0, 1, 2, 3]


def test_a_cache_holds_no_pickles(tmp_path):
    np.savez(tmp_path / "set.npz", x=np.array([{}], dtype=object))
    assert kept(tmp_path, "set", lambda: {"x": np.arange(2)})["x"].tolist() == [0, 1]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        kept(tmp_path / "file" / "cache", "set", lambda: {"x": np.arange(2)})
    assert str(caught.value) == f"{tmp_path / 'file' / 'cache'} cannot be written: Not a directory"


def test_a_fingerprint_changes_with_the_source_and_how_it_is_read(tmp_path):
    file = tmp_path / "folder" / "below" / "file"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1")
    seen = [fingerprint(tmp_path / "folder"), fingerprint(tmp_path / "folder", 128)]
    seen.append(fingerprint(tmp_path / "folder", 192))
    assert seen[0] == fingerprint(tmp_path / "folder")
    os.utime(file, ns=(0, 0))
    seen.append(fingerprint(tmp_path / "folder"))
    file.write_bytes(b"12")
    os.utime(file, ns=(0, 0))
    seen.append(fingerprint(tmp_path / "folder"))
    seen.append(fingerprint(file))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EOFError("end"), "F ends too early: the download was interrupted, download it again"),
        (gzip.BadGzipFile("no gzip"), "F is damaged (no gzip): download it again"),
        (zlib.error("Error -3"), "F is damaged (Error -3): download it again"),
        (zipfile.BadZipFile("no zip"), "F is damaged (no zip): download it again"),
        (tarfile.ReadError("no tar"), "F is damaged (no tar): download it again"),
        (PermissionError(13, "Permission denied", "other"), "other cannot be read: Permission den"),
        (OSError("loose"), "F cannot be read: loose"),
    ],
)
def test_errors_of_reading_are_one_line(tmp_path, error, message):
    with pytest.raises(DataError) as caught, read_errors(tmp_path):
        raise error
    assert str(caught.value).startswith(message.replace("F ", f"{tmp_path} "))
    assert "\n" not in str(caught.value)
