"""The simulated disk itself: what a power cut may leave of a few operations."""

import os
from pathlib import Path

import pytest
from lossy_disk import PAGE, Tree, power_cuts, read_tree, recording, write_tree

from fleetprune.files import make_folder, sync_folder, write_atomic


def states(root: Path, work) -> list[tuple[tuple[str, ...], Tree]]:
    with recording(root) as record:
        work(record)
    return [(cut.promises, cut.tree) for cut in power_cuts(record, most=1000)]


def trees(root: Path, work) -> list[Tree]:
    return [tree for _, tree in states(root, work)]


def test_nothing_that_is_not_synced_is_certain(tmp_path):
    found = trees(tmp_path, lambda _: (tmp_path / "a").write_bytes(b"1234"))
    assert found == [{}, {"a": b""}, {"a": b"1234"}, {"a": bytes(4)}, {"a": b"12"}]


def test_content_is_synced_and_its_name_is_not(tmp_path):
    def work(record):
        with (tmp_path / "a").open("wb") as f:
            f.write(b"1234")
            f.flush()
            os.fsync(f.fileno())
        record.mark("synced")

    found = states(tmp_path, work)
    assert [tree for promises, tree in found if promises] == [{"a": b"1234"}, {}]


def test_a_folder_s_names_are_synced_and_the_content_is_not(tmp_path):
    def work(record):
        (tmp_path / "a").write_bytes(b"12")
        sync_folder(tmp_path)
        record.mark("synced")

    found = [tree for promises, tree in states(tmp_path, work) if promises]
    assert found == [{"a": b"12"}, {"a": b""}, {"a": b"\0\0"}, {"a": b"1"}]


def test_an_atomic_write_leaves_the_old_or_the_new(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def work(record):
        write_atomic(tmp_path / "a", b"new")
        record.mark("written")

    found = states(tmp_path, work)
    assert {tree["a"] for _, tree in found} == {b"old", b"new"}
    assert [tree for promises, tree in found if promises] == [{"a": b"new"}]


@pytest.mark.parametrize(
    ("left_out", "worst"),
    [("fsync", {b"old", b"new", b"", b"\0\0\0", b"n"}), ("sync_folder", {b"old"})],
)
def test_an_atomic_write_without_one_of_its_syncs(tmp_path, monkeypatch, left_out, worst):
    """This is how a test of power cuts fails."""
    (tmp_path / "a").write_bytes(b"old")

    target = "os.fsync" if left_out == "fsync" else "fleetprune.files.sync_folder"

    def work(record):
        with monkeypatch.context() as patch:
            patch.setattr(target, lambda _: None)
            write_atomic(tmp_path / "a", b"new")
        record.mark("written")

    assert worst <= {tree["a"] for promises, tree in states(tmp_path, work) if promises}


def test_changes_of_two_folders_are_lost_on_their_own(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"")

    def work(record):
        (tmp_path / "x" / "a").unlink()
        (tmp_path / "b").unlink()
        record.mark("removed")

    found = [sorted(tree) for promises, tree in states(tmp_path, work) if promises]
    assert sorted(found) == [["b", "x"], ["b", "x", "x/a"], ["x"], ["x", "x/a"]]


def test_a_rename_between_folders_is_atomic(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "a").write_bytes(b"1")
    found = trees(tmp_path, lambda _: (tmp_path / "a").replace(tmp_path / "x" / "b"))
    assert [sorted(tree) for tree in found] == [["a", "x"], ["x", "x/b"]]


def test_a_folder_that_was_made_durably_is_there(tmp_path):
    def work(record):
        make_folder(tmp_path / "x" / "y")
        record.mark("made")

    found = [tree for promises, tree in states(tmp_path, work) if promises]
    assert found == [{"x": None, "x/y": None}]


def test_pages_of_a_file_are_kept_on_their_own(tmp_path):
    new = b"n" * PAGE * 4
    found = trees(tmp_path, lambda _: (tmp_path / "a").write_bytes(new))
    contents = {tree["a"] for tree in found if "a" in tree}
    whole = [[c[at : at + 1] for at in range(0, len(c), PAGE)] for c in contents]
    assert any(b"n" in pages and b"\0" in pages for pages in whole)


def test_a_record_can_be_read_without_one_of_its_syncs(tmp_path):
    with recording(tmp_path) as record:
        write_atomic(tmp_path / "a", b"new")
        record.mark("written")
    file, folder = record.syncs()
    assert file == "write_atomic: .a.tmp"
    assert folder == "sync_folder < write_atomic: ."
    without = [cut.tree for cut in power_cuts(record.without(folder)) if cut.promises]
    assert {} in without
    assert {} not in [cut.tree for cut in power_cuts(record) if cut.promises]


def test_prefixes_that_have_too_many_states_are_sampled(tmp_path):
    def work(_):
        for i in range(12):
            (tmp_path / str(i)).write_bytes(b"x")

    with recording(tmp_path) as record:
        work(record)
    cuts = list(power_cuts(record, most=50))
    assert len(cuts) < 25 * 60
    assert {} in [cut.tree for cut in cuts]
    assert dict.fromkeys(map(str, range(12)), b"x") in [cut.tree for cut in cuts]
    assert cuts == list(power_cuts(record, most=50)), "seeded"


def test_trees_are_written_and_read(tmp_path):
    tree = {"a": None, "a/b": b"1", "c": b"", "d": "a/b"}
    write_tree({"old": None, "old/x": b""}, tmp_path / "d")
    write_tree(tree, tmp_path / "d")
    assert read_tree(tmp_path / "d") == tree


def test_a_link_is_whole_or_not_there(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    found = trees(tmp_path, lambda _: (tmp_path / "b").symlink_to("a"))
    assert found == [{"a": b"1"}, {"a": b"1", "b": "a"}]
