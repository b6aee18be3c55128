import json
import logging

import pytest

from fleetprune.errors import InstallError
from fleetprune_agent.slot_files import Pointer, State
from fleetprune_agent.statefile import read_message, replace_message, tidy, tidy_folder

POINTER = Pointer(slot="a", release=1, state=State.TRIAL)
NEWER = b'{"schema":2,"slots":["a","b","c"]}'


@pytest.fixture
def path(tmp_path):
    return tmp_path / "active.json"


def test_what_is_written_is_read(path):
    assert read_message(path, Pointer) is None
    replace_message(path, POINTER)
    assert read_message(path, Pointer) == POINTER
    tidy(path, Pointer)
    assert [p.name for p in path.parent.iterdir()] == ["active.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\0" * 100, b"[]", b'{"slot":"c"}', b" " * 70_000, b"[" * 60_000]
)
def test_damage_is_set_aside_with_a_line_in_the_log(path, content, caplog):
    path.write_bytes(content)
    assert read_message(path, Pointer) is None
    assert path.exists(), "whoever only reads changes nothing"
    with caplog.at_level(logging.WARNING):
        tidy(path, Pointer)
    assert not path.exists()
    assert path.with_name("active.json.bad").read_bytes() == content
    assert f"{path} is damaged and set aside as active.json.bad: Pointer" in caplog.text


def test_one_damaged_file_is_kept(path):
    for content in (b"first", b"second"):
        path.write_bytes(content)
        tidy(path, Pointer)
    assert [p.name for p in path.parent.iterdir()] == ["active.json.bad"]
    assert path.with_name("active.json.bad").read_bytes() == b"second"


def test_a_folder_in_the_place_of_a_file(path):
    for _ in range(2):
        path.mkdir()
        (path / "lost").write_bytes(b"")
        assert read_message(path, Pointer) is None
        tidy(path, Pointer)
        assert not path.exists()
    replace_message(path, POINTER)
    assert read_message(path, Pointer) == POINTER


def test_a_damaged_file_is_set_aside_before_it_is_replaced(path):
    path.write_bytes(b"{")
    replace_message(path, POINTER)
    assert read_message(path, Pointer) == POINTER
    assert path.with_name("active.json.bad").read_bytes() == b"{"


def test_what_a_newer_version_wrote_is_not_destroyed(path):
    path.write_bytes(NEWER)
    assert read_message(path, Pointer) is None
    tidy(path, Pointer)
    with pytest.raises(InstallError) as e:
        replace_message(path, POINTER)
    assert str(e.value) == (
        f"{path} was written by a newer version (schema 2, this one knows 1): "
        "update the agent; nothing is changed"
    )
    assert path.read_bytes() == NEWER
    assert [p.name for p in path.parent.iterdir()] == ["active.json"]


def test_a_folder_is_set_aside_as_a_whole(tmp_path, caplog):
    folder = tmp_path / "trust"
    tidy_folder(folder)
    (folder / "root_history").mkdir(parents=True)
    (folder / "timestamp.json").write_bytes(json.dumps({"signed": {}}).encode())
    (folder / "root_history" / "1.root.json").write_bytes(b"{}")
    tidy_folder(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["trust"]
    (folder / "root_history" / "1.root.json").write_bytes(b"{")
    tidy_folder(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["trust.bad"]
    assert f"{folder} is damaged and set aside as trust.bad: 1.root.json: " in caplog.text


@pytest.mark.parametrize("damage", ["[]", "\0", "[" * 100_000])
def test_a_second_damaged_folder_replaces_the_first(tmp_path, damage):
    folder = tmp_path / "trust"
    for name in ("first.json", "second.json"):
        folder.mkdir()
        (folder / name).write_text(damage)
        tidy_folder(folder)
    assert [p.name for p in (tmp_path / "trust.bad").iterdir()] == ["second.json"]
    folder.write_text("a file")
    tidy_folder(folder)
    assert (tmp_path / "trust.bad").read_text() == "a file"
