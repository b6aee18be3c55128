"""Orders over the control socket, and what it does about strangers, floods and slowness."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading

import pytest

from fleetprune.errors import RolloutError, TransportError, UsageError
from fleetprune_coordinator import control
from fleetprune_coordinator.control import FOLDER, MAX_ORDER, SOCKET, ControlServer, call, user_name


def obey(line, who):
    order = json.loads(line)
    if "misuse" in order:
        raise UsageError("class tv: this fleet has phone")
    if "refuse" in order:
        raise RolloutError("no rollout is under way")
    if "crash" in order:
        raise ZeroDivisionError("by zero")
    return {"order": order, "who": who}


@pytest.fixture
def state(tmp_path):
    deep = tmp_path / ("x" * 120)  # longer than the kernel's address of a socket
    deep.mkdir()
    return deep


@pytest.fixture
def server(state):
    with ControlServer(state, obey) as server:
        yield server


def connect(state):
    client = socket.socket(socket.AF_UNIX)
    descriptor = os.open(state / FOLDER, os.O_RDONLY)
    client.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")
    os.close(descriptor)
    client.settimeout(20)
    return client


def test_an_order_and_its_answer(server, state):
    assert call(state, b'{"pause": 1}') == {
        "order": {"pause": 1},
        "who": user_name(os.geteuid()),
    }


def test_errors_come_back_as_what_they_are(server, state):
    with pytest.raises(UsageError, match=r"^class tv: this fleet has phone$"):
        call(state, b'{"misuse": 1}')
    with pytest.raises(RolloutError, match=r"^no rollout is under way$"):
        call(state, b'{"refuse": 1}')
    with pytest.raises(RolloutError, match=r"^ZeroDivisionError: by zero$"):
        call(state, b'{"crash": 1}')
    assert call(state, b"{}")["order"] == {}  # it goes on


def test_only_the_owner_can_reach_the_socket(server, state):
    assert stat.S_IMODE((state / FOLDER).stat().st_mode) == 0o700
    assert stat.S_IMODE((state / FOLDER / SOCKET).stat().st_mode) == 0o600


def test_without_a_coordinator_there_is_no_answer(state):
    assert call(state, b"{}") is None
    with ControlServer(state, obey):
        pass
    assert call(state, b"{}") is None
    assert not (state / FOLDER / SOCKET).exists()


def test_the_socket_of_a_killed_coordinator_is_in_nobody_s_way(state):
    left = socket.socket(socket.AF_UNIX)
    (state / FOLDER).mkdir()
    descriptor = os.open(state / FOLDER, os.O_RDONLY)
    left.bind(f"/proc/self/fd/{descriptor}/{SOCKET}")
    os.close(descriptor)
    left.close()
    assert call(state, b"{}") is None
    with ControlServer(state, obey):
        assert call(state, b"{}")["order"] == {}


def test_a_line_that_is_too_long_is_cut_off(server, state):
    with connect(state) as client:
        client.sendall(b"x" * (MAX_ORDER + 1))
        assert json.loads(client.recv(4096)) == {
            "error": f"a line of more than {MAX_ORDER} bytes",
            "misuse": False,
        }
    assert call(state, b"{}")["order"] == {}


def test_a_slow_or_cut_off_order_holds_nobody_up_for_long(server, state, monkeypatch):
    monkeypatch.setattr(control, "ORDER_S", 0.3)
    with connect(state) as slow:
        slow.sendall(b"{")
        assert call(state, b"{}")["order"] == {}
        assert json.loads(slow.recv(4096))["error"] == "no whole line within 0.3 s"
    with connect(state) as gone:
        gone.sendall(b"{")
    assert call(state, b"{}")["order"] == {}


def test_a_coordinator_that_hangs_is_given_up(state, monkeypatch):
    monkeypatch.setattr(control, "ANSWER_S", 0.3)
    ended = threading.Event()
    with ControlServer(state, lambda line, who: ended.wait(20)):
        with pytest.raises(TransportError, match=r"does not answer: "):
            call(state, b"{}")
        ended.set()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_turned_away_even_where_the_folder_lets_him(state, tmp_path):
    code = (
        "import os, socket, sys; fd = os.open(sys.argv[1], os.O_RDONLY); os.setuid(65534);"
        "c = socket.socket(socket.AF_UNIX); c.connect(f'/proc/self/fd/{fd}/socket');"
        "c.sendall(b'{}\\n'); print(c.recv(4096).decode())"
    )
    with ControlServer(state, obey):
        for path in (state / FOLDER, state / FOLDER / SOCKET):
            path.chmod(0o777)
        done = subprocess.run(
            [sys.executable, "-c", code, str(state / FOLDER)],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    assert json.loads(done.stdout) == {"error": f"{user_name(65534)} may not give orders here"}


def test_names_of_users():
    assert user_name(0) == "root (uid 0)"
    assert user_name(4_000_000_000) == "uid 4000000000"
