"""What a kill and a power cut leave of a part file, and what it costs to go on."""

import hashlib
import os
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetprune.errors import WireError
from fleetprune.partfile import PartFile

BS = 1000
DATA = random.Random(8).randbytes(10 * BS + 5)
SHA = hashlib.sha256(DATA).digest()
HEAD = 48  # bytes of the map before its entries


def block(index):
    return DATA[index * BS : (index + 1) * BS]


def part(folder):
    return PartFile(folder / "x.part", len(DATA), SHA, BS)


def begin(folder, indices):
    with part(folder) as p:
        for index in indices:
            p.write(index, block(index))


def finish(folder):
    """Fetch what is missing, as a pull does; which blocks that were."""
    with part(folder) as p:
        fetched = p.missing()
        for index in fetched:
            p.write(index, block(index))
        p.finish(folder / "out")
    assert (folder / "out").read_bytes() == DATA
    assert [f.name for f in folder.iterdir()] == ["out"]
    return fetched


def test_a_kill_costs_what_had_not_come(tmp_path):
    begin(tmp_path, [0, 1, 2, 7, 10])
    assert finish(tmp_path) == [3, 4, 5, 6, 8, 9]


def test_blocks_that_the_map_has_and_the_disk_has_not_are_fetched_again(tmp_path):
    begin(tmp_path, range(8))
    with (tmp_path / "x.part").open("r+b") as f:  # pages that were never written read as zeros
        f.seek(2 * BS)
        f.write(bytes(BS))
        f.truncate(6 * BS + 10)
    assert finish(tmp_path) == [2, 6, 7, 8, 9, 10]


def test_blocks_that_the_disk_has_and_the_map_has_not_are_fetched_again(tmp_path):
    begin(tmp_path, range(8))
    with (tmp_path / "x.part.map").open("r+b") as f:
        f.seek(HEAD + 5 * 4)
        f.write(bytes(3 * 4))
    assert finish(tmp_path) == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("length", [0, 10, HEAD, HEAD + 4])
def test_a_map_that_was_not_written_at_all_costs_everything(tmp_path, length):
    begin(tmp_path, range(8))
    os.truncate(tmp_path / "x.part.map", length)
    assert finish(tmp_path) == list(range(11))


def test_a_lost_part_file_costs_everything(tmp_path):
    begin(tmp_path, range(8))
    (tmp_path / "x.part").unlink()
    assert finish(tmp_path) == list(range(11))


def test_what_only_the_hash_can_tell_leaves_nothing(tmp_path):
    """A block with a right checksum and wrong content: as a hostile peer would send it."""
    begin(tmp_path, range(11))
    forged = bytes(BS)
    with (tmp_path / "x.part").open("r+b") as f:
        f.write(forged)
    with (tmp_path / "x.part.map").open("r+b") as f:
        f.seek(HEAD)
        f.write(struct.pack("<I", __import__("zlib").crc32(forged)))
    with part(tmp_path) as p:
        assert p.complete
        with pytest.raises(WireError, match=r"^out has SHA-256 [0-9a-f]{64}, expected "):
            p.finish(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@given(st.data())
def test_whatever_a_power_cut_leaves_the_end_is_right(tmp_path_factory, data):
    """Any page of either file may be the old one (zeros), and either may be shorter."""
    folder = tmp_path_factory.mktemp("p")
    begin(folder, data.draw(st.lists(st.integers(0, 10), unique=True)))
    for name in ("x.part", "x.part.map"):
        path = folder / name
        content = bytearray(path.read_bytes())
        for page in range(0, len(content), 128):
            if data.draw(st.integers(0, 5)) == 0:
                content[page : page + 128] = bytes(len(content[page : page + 128]))
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content))) :]
        path.write_bytes(content)
    finish(folder)
