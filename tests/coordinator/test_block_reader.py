import random

import pytest

from fleetprune.blocks import Block, NotFound, Request, decode
from fleetprune.errors import WireError
from fleetprune_coordinator import block_reader
from fleetprune_coordinator.block_reader import FRESH_S, BlockReader

BS = 1000
DATA = random.Random(4).randbytes(3 * BS + 1)


class Fixture:
    def __init__(self, folder):
        self.folder, self.now, self.looked = folder, 0.0, []
        (folder / "targets").mkdir()
        (folder / "targets" / "x").write_bytes(DATA)
        self.reader = BlockReader(self.read, lambda: self.now)

    def read(self, name):
        self.looked.append(name)
        return self.folder / name

    def ask(self, name, index, transfer=9):
        return decode(self.reader.answer(Request(name, transfer, (index,), BS), index))


@pytest.fixture
def fixture(tmp_path):
    made = Fixture(tmp_path)
    yield made
    made.reader.close()


def test_many_devices_cost_one_look_and_one_reading(fixture):
    first = fixture.ask("targets/x", 3)
    assert first == Block(9, 3, first.edition, BS, len(DATA), DATA[3 * BS :])
    for transfer in range(100):
        assert fixture.ask("targets/x", 3, transfer).transfer == transfer
    assert fixture.looked == ["targets/x"]
    assert len(fixture.reader._blocks) == 1
    fixture.now = FRESH_S
    fixture.ask("targets/x", 0)
    assert fixture.looked == ["targets/x"] * 2


def test_a_file_that_is_gone_is_missed_after_a_while(fixture):
    fixture.ask("targets/x", 0)
    (fixture.folder / "targets" / "x").unlink()
    assert fixture.ask("targets/x", 1).data == DATA[BS : 2 * BS]
    fixture.now = FRESH_S
    assert fixture.ask("targets/x", 1) == NotFound(9)


def test_a_timestamp_is_never_an_old_one(fixture):
    (fixture.folder / "metadata").mkdir()
    place = fixture.folder / "metadata" / "timestamp.json"
    for content in (b"1", b"2", b"33"):
        place.with_name("new").write_bytes(content)
        place.with_name("new").replace(place)
        assert fixture.ask("metadata/timestamp.json", 0).data == content


def test_what_is_kept_is_bounded(fixture, monkeypatch):
    monkeypatch.setattr(block_reader, "CACHE", 2 * BS + 200)
    for index in (0, 1, 2, 0, 1, 2, 3):
        assert fixture.ask("targets/x", index).data == DATA[index * BS : (index + 1) * BS]
        assert len(fixture.reader._blocks) <= 3
        assert fixture.reader._cached == sum(map(len, fixture.reader._blocks.values()))


def test_more_files_than_may_be_open(fixture):
    for i in [*range(block_reader.OPEN_FILES + 5), 0, 1]:
        (fixture.folder / "targets" / f"f{i}").write_bytes(bytes([i]))
        assert fixture.ask(f"targets/f{i}", 0).data == bytes([i])
        assert fixture.ask("targets/x", 3).data == DATA[3 * BS :]


def test_lengths_are_those_of_the_answers(fixture):
    for name, indices in (("targets/x", (0, 3)), ("targets/none", (0, 1))):
        request = Request(name, 9, indices, BS)
        answers = [len(fixture.reader.answer(request, i)) for i in indices]
        assert fixture.reader.lengths(request) == answers
    with pytest.raises(WireError, match=r"^block 4 of 4$"):
        fixture.reader.lengths(Request("targets/x", 9, (4,), BS))
    with pytest.raises(WireError, match=r"^block 4 of 4$"):
        fixture.ask("targets/x", 4)
