import hashlib
import os
import random

import pytest

from fleetprune.blocks import (
    MAX_REQUESTED,
    Block,
    NotFound,
    Put,
    RefusedError,
    Request,
    Stored,
    StoreState,
    decode,
)
from fleetprune.errors import WireError
from fleetprune.windows import Upload
from fleetprune_coordinator.block_reader import OPEN_FILES
from fleetprune_coordinator.block_server import DEVICE_SPOOLS, OPEN_SPOOLS, Admission, BlockServer

BS = 1000
DATA = random.Random(3).randbytes(4 * BS + 1)


class Fixture:
    def __init__(self, folder, **options):
        self.folder = folder
        self.files = folder / "files"
        self.files.mkdir(exist_ok=True)
        self.stored = []
        self.options = options
        self.open()

    def open(self):
        self.server = BlockServer(
            lambda name: self.files / name,
            lambda *result: self.stored.append(result),
            self.folder / "spool",
            **self.options,
        )

    def ask(self, name, *indices, block_size=BS):
        return [decode(m) for m in self.server.get(Request(name, 9, indices, block_size).encode())]

    def put(self, put, device="d1"):
        answer = self.server.put(device, put.encode())
        return None if answer is None else decode(answer)

    def spooled(self):
        return sorted(p.name for p in (self.folder / "spool").iterdir())


@pytest.fixture
def fixture(tmp_path):
    made = Fixture(tmp_path)
    yield made
    made.server.close()


def puts(data=DATA, name="results/t1"):
    return Upload(name, 5, data, block_size=BS, window=64).poll(0.0)


def test_blocks_of_files_and_of_bytes(fixture):
    (fixture.files / "a").write_bytes(DATA)
    (fixture.files / "b").mkdir()
    (fixture.files / "empty").write_bytes(b"")
    blocks = fixture.ask("a", 0, 2, 4)
    assert [b.data for b in blocks] == [DATA[:BS], DATA[2 * BS : 3 * BS], DATA[4 * BS :]]
    assert {(b.transfer, b.size, b.block_size) for b in blocks} == {(9, len(DATA), BS)}
    assert fixture.ask("empty", 0)[0].data == b""
    assert fixture.ask("none", 0) == [NotFound(9)]
    assert fixture.ask("a/none", 0) == [NotFound(9)]
    server = BlockServer(lambda name: DATA, lambda *a: None, fixture.folder / "s2")
    (block,) = server.get(Request("x", 1, (1,), BS).encode())
    assert decode(block).data == DATA[BS : 2 * BS]


def test_a_replaced_file_has_another_edition(fixture):
    (fixture.files / "a").write_bytes(b"old")
    old = fixture.ask("a", 0)[0]
    assert fixture.ask("a", 0)[0] == old
    (fixture.files / "new").write_bytes(b"new")
    (fixture.files / "new").replace(fixture.files / "a")
    new = fixture.ask("a", 0)[0]
    assert (old.data, new.data) == (b"old", b"new")
    assert old.edition != new.edition


def test_requests_for_blocks_that_do_not_exist_or_for_other_messages_are_refused(fixture):
    (fixture.files / "a").write_bytes(DATA)
    with pytest.raises(WireError, match=r"^block 5 of 5$"):
        fixture.ask("a", 5)
    with pytest.raises(WireError, match=r"^NotFound where a request was expected$"):
        list(fixture.server.get(NotFound(1).encode()))
    with pytest.raises(WireError, match=r"^NotFound where a put was expected$"):
        fixture.server.put("d1", NotFound(1).encode())


def test_open_files_and_spools_are_bounded(fixture):
    for i in range(OPEN_FILES + 10):
        (fixture.files / f"f{i}").write_bytes(bytes([i]))
        assert fixture.ask(f"f{i}", 0)[0].data == bytes([i])
    assert len(fixture.server._files) == OPEN_FILES
    for i in range(OPEN_SPOOLS + 10):
        fixture.put(puts()[0], device=f"d{i}")
    assert len(fixture.server._spools) == OPEN_SPOOLS
    for put in puts()[1:]:
        fixture.put(put, device="d0")
    assert fixture.stored == [("d0", "results/t1", DATA)]


def test_what_one_device_leaves_in_the_spool_is_bounded(fixture):
    fixture.put(puts(name="results/t0")[0], device="d2")
    for i in range(DEVICE_SPOOLS + 3):
        fixture.put(puts(name=f"results/t{i}")[0])
    assert len(fixture.spooled()) == 2 * (DEVICE_SPOOLS + 1)  # parts and maps, one of d2
    assert len(fixture.server._spools) == DEVICE_SPOOLS + 1
    for i in (0, DEVICE_SPOOLS + 2):  # one that went is begun again, one that stayed goes on
        for put in puts(name=f"results/t{i}"):
            fixture.put(put)
    for put in puts(name="results/t0")[1:]:
        fixture.put(put, device="d2")
    stored = [("d1", "results/t0"), ("d1", f"results/t{DEVICE_SPOOLS + 2}"), ("d2", "results/t0")]
    assert fixture.stored == [(device, name, DATA) for device, name in stored]


@pytest.mark.parametrize("seed", range(3))
def test_result_in_any_order_is_stored_before_it_is_confirmed(fixture, seed):
    blocks = puts()
    random.Random(seed).shuffle(blocks)
    for done, put in enumerate(blocks[:-1], 1):
        answer = fixture.put(put)
        assert answer.state is StoreState.RECEIVING
        assert answer.blocks == {p.index for p in blocks[:done]}
    assert fixture.stored == []
    assert fixture.put(blocks[-1]) == Stored(5, StoreState.COMPLETE, blocks[0].sha256)
    assert fixture.stored == [("d1", "results/t1", DATA)]
    assert fixture.spooled() == []


def test_upload_goes_on_after_a_restart_of_the_coordinator(fixture):
    blocks = puts()
    fixture.put(blocks[0])
    fixture.put(blocks[3])
    fixture.server.close()
    fixture.open()
    assert fixture.put(blocks[1]).blocks == {0, 1, 3}


def test_blocks_that_the_disk_lost_in_a_power_cut_are_fetched_again(fixture):
    blocks = puts()
    for put in blocks[:3]:
        fixture.put(put)
    fixture.server.close()
    (part,) = (fixture.folder / "spool").glob("*.part")
    torn = bytearray(part.read_bytes())
    torn[BS : BS + 10] = bytes(10)
    part.write_bytes(torn)
    fixture.open()
    assert fixture.put(blocks[0]).blocks == {0, 2}


def test_content_with_another_hash_is_thrown_away_and_fetched_again(fixture):
    blocks = puts()
    lie = Put("results/t1", 5, 4, BS, len(DATA), blocks[0].sha256, b"!")
    for put in blocks[:4]:
        fixture.put(put)
    answer = fixture.put(lie)
    assert (answer.state, answer.blocks) == (StoreState.RECEIVING, frozenset())
    assert fixture.stored == []
    for put in blocks:
        fixture.put(put)
    assert fixture.stored == [("d1", "results/t1", DATA)]


def test_devices_do_not_share_a_spool(fixture):
    blocks = puts()
    fixture.put(blocks[0], "d1")
    assert fixture.put(blocks[1], "d2").blocks == {1}


def test_other_content_under_the_same_name_replaces_the_first(fixture):
    fixture.put(puts()[0])
    for put in puts(DATA[::-1]):
        fixture.put(put)
    assert fixture.stored == [("d1", "results/t1", DATA[::-1])]
    assert fixture.spooled() == []


def test_failed_store_confirms_nothing_and_keeps_the_spool(tmp_path):
    tries = []

    def store(device, name, data):
        tries.append(data)
        if len(tries) == 1:
            raise OSError("disk full")

    server = BlockServer(lambda name: None, store, tmp_path)
    blocks = puts()
    answers = [server.put("d1", p.encode()) for p in blocks]
    assert answers[-1] is None
    assert decode(server.put("d1", blocks[-1].encode())).state is StoreState.COMPLETE
    assert tries == [DATA, DATA]
    server.close()


@pytest.mark.parametrize("error", [RefusedError("late"), WireError("late")])
def test_unwanted_result_is_refused_for_good(tmp_path, error):
    def store(device, name, data):
        raise error

    server = BlockServer(lambda name: None, store, tmp_path)
    answers = [decode(server.put("d1", p.encode())) for p in puts()]
    assert (answers[-1].state, answers[-1].reason) == (StoreState.REFUSED, "late")
    assert list(tmp_path.iterdir()) == []
    server.close()


def test_admission_comes_before_anything_is_kept(tmp_path):
    fixture = Fixture(
        tmp_path,
        admit=lambda device, name: Admission.DONE if device == "d2" else Admission.REFUSE,
    )
    answer = fixture.put(puts()[0])
    assert (answer.state, answer.reason) == (StoreState.REFUSED, "results/t1 is not asked of d1")
    assert fixture.put(puts()[0], "d2").state is StoreState.COMPLETE
    assert fixture.spooled() == []
    assert fixture.stored == []


def test_too_large_results_are_refused(tmp_path):
    fixture = Fixture(tmp_path, max_put=len(DATA) - 1)
    assert fixture.put(puts()[0]).reason == "4001 bytes, expected at most 4000"
    assert fixture.spooled() == []


def test_old_spool_files_are_removed_at_the_start(fixture):
    fixture.put(puts()[0])
    fixture.server.close()
    for path in (fixture.folder / "spool").iterdir():
        os.utime(path, (0, 0))
    fixture.open()
    assert fixture.spooled() == []


def test_one_request_cannot_ask_for_more_than_its_share():
    assert len(Request("a", 1, tuple(range(MAX_REQUESTED)), BS).indices) == MAX_REQUESTED
    with pytest.raises(WireError):
        decode(Request("a", 1, tuple(range(MAX_REQUESTED + 1)), BS).encode())
    assert hashlib.sha256(DATA).digest() == puts()[0].sha256
    assert isinstance(decode(Block(1, 0, 0, BS, 0, b"").encode()), Block)
