import os
import signal
import subprocess
import sys
import time

import pytest

from fleetprune.errors import TransportError, WireError
from fleetprune.outbox import Entry, Kind, Outbox

OVERHEAD = 11 + len("telemetry") + 2  # head, kind, a name of two letters


def names(outbox):
    return [e.name for e in outbox.pending()]


def test_entries_come_back_in_order_after_reopening(tmp_path):
    outbox = Outbox(tmp_path, 10_000)
    outbox.put(Kind.RESULT, "r1", b"one")
    outbox.put(Kind.TELEMETRY, "t1", b"")
    outbox.put(Kind.RESULT, "r2", bytes(range(256)))
    again = Outbox(tmp_path, 10_000)
    assert list(again.pending()) == [
        Entry(Kind.RESULT, "r1", b"one"),
        Entry(Kind.TELEMETRY, "t1", b""),
        Entry(Kind.RESULT, "r2", bytes(range(256))),
    ]
    assert again.size == outbox.size == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_done_removes_for_good(tmp_path):
    outbox = Outbox(tmp_path, 10_000)
    outbox.put(Kind.RESULT, "r1", b"one")
    outbox.put(Kind.RESULT, "r2", b"two")
    outbox.done("r1")
    outbox.done("r1")
    outbox.done("never")
    assert names(outbox) == names(Outbox(tmp_path, 10_000)) == ["r2"]
    outbox.done("r2")
    assert list(tmp_path.iterdir()) == []


def test_same_name_replaces_and_goes_to_the_end(tmp_path):
    outbox = Outbox(tmp_path, 10_000)
    outbox.put(Kind.RESULT, "r1", b"old")
    outbox.put(Kind.RESULT, "r2", b"two")
    outbox.put(Kind.RESULT, "r1", b"new")
    assert [(e.name, e.payload) for e in Outbox(tmp_path, 10_000).pending()] == [
        ("r2", b"two"),
        ("r1", b"new"),
    ]
    assert len(list(tmp_path.iterdir())) == 2


def test_full_outbox_drops_the_oldest_telemetry_and_no_more_than_needed(tmp_path):
    outbox = Outbox(tmp_path, 4 * (100 + OVERHEAD))
    outbox.put(Kind.TELEMETRY, "t1", bytes(100))
    outbox.put(Kind.RESULT, "r1", bytes(103))
    outbox.put(Kind.TELEMETRY, "t2", bytes(100))
    outbox.put(Kind.TELEMETRY, "t3", bytes(100))
    assert outbox.size == 4 * (100 + OVERHEAD)
    assert outbox.put(Kind.TELEMETRY, "t4", bytes(100)) is True
    assert names(outbox) == ["r1", "t2", "t3", "t4"]
    outbox.put(Kind.RESULT, "r2", bytes(103 + 100 + OVERHEAD))
    assert names(outbox) == ["r1", "t4", "r2"]
    assert names(Outbox(tmp_path, 1)) == ["r1", "t4", "r2"]


def test_results_are_never_dropped_and_never_silently_refused(tmp_path):
    outbox = Outbox(tmp_path, 250)
    outbox.put(Kind.RESULT, "r1", bytes(100))
    outbox.put(Kind.TELEMETRY, "t1", bytes(20))
    with pytest.raises(TransportError) as e:
        outbox.put(Kind.RESULT, "r2", bytes(200))
    assert str(e.value) == (
        "outbox is full: r2 has 219 bytes, 161 of 250 are taken by results that the coordinator "
        "has not confirmed"
    )
    assert outbox.put(Kind.TELEMETRY, "t2", bytes(200)) is False
    assert names(outbox) == ["r1", "t1"]


def test_damaged_entry_is_put_aside_and_the_others_survive(tmp_path, caplog):
    outbox = Outbox(tmp_path, 10_000)
    outbox.put(Kind.RESULT, "r1", b"one")
    outbox.put(Kind.RESULT, "r2", b"two")
    first = sorted(tmp_path.glob("*.entry"))[0]
    whole = first.read_bytes()
    for length in range(len(whole)):
        first.write_bytes(whole[:length])
        assert names(Outbox(tmp_path, 10_000)) == ["r2"]
        first.with_suffix(".bad").unlink()
    assert "is put aside as .bad" in caplog.text


def test_a_file_that_is_no_entry_is_left_alone(tmp_path):
    stranger = tmp_path / "1x.entry"
    stranger.write_bytes(b"")
    outbox = Outbox(tmp_path, 100)
    outbox.put(Kind.RESULT, "r1", b"one")
    assert names(Outbox(tmp_path, 100)) == ["r1"]
    assert stranger.exists()


@pytest.mark.parametrize("name", ["", "n" * 301])
def test_names_have_a_length(tmp_path, name):
    with pytest.raises(WireError, match=f"^outbox name of {len(name)} characters, expected 1..300"):
        Outbox(tmp_path, 100).put(Kind.RESULT, name, b"")


CHILD = """
import sys
from pathlib import Path
from fleetprune.outbox import Kind, Outbox
box = Outbox(Path(sys.argv[1]), 10**7)
for i in range(10**6):
    name = f"r{i}"
    box.put(Kind.RESULT, name, name.encode() * 100)
    print(name, flush=True)
    if i % 3 == 2:
        box.done(f"r{i - 1}")
"""


@pytest.mark.parametrize("after_ms", [30, 47, 71])
def test_kill_at_any_instant_keeps_every_confirmed_entry_whole(tmp_path, after_ms):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE)
    first = child.stdout.readline()
    time.sleep(after_ms / 1000)
    os.kill(child.pid, signal.SIGKILL)
    said = (first + child.stdout.read()).decode().split()
    child.stdout.close()
    child.wait()
    entries = {e.name: e.payload for e in Outbox(tmp_path, 10**7).pending()}
    assert all(payload == name.encode() * 100 for name, payload in entries.items())
    maybe_done = {f"r{i - 1}" for i in range(2, len(said) + 1, 3)}
    assert set(said) - maybe_done <= set(entries)
    assert set(entries) - set(said) <= {f"r{len(said)}"}
