"""`Stop`, in processes of their own with real signals."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fleetprune.stopping import stop_on_signals

# The main thread waits as long as it is allowed to, while others keep the processor busy.
PROGRAM = """
import threading, time
from fleetprune.stopping import stop_on_signals

def busy():
    while True:
        time.sleep(0.001)

for _ in range(3):
    threading.Thread(target=busy, daemon=True).start()
with stop_on_signals() as stop:
    print("up", flush=True)
    stop.wait(60)
print(*[s.name for s in stop.signals], flush=True)
"""
SOON_S = 20.0  # far from the 60 that a wait that is not woken takes


@pytest.fixture
def process():
    running = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "up\n"
    yield running
    running.kill()
    running.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait(process, number):
    process.send_signal(number)
    assert process.communicate(timeout=SOON_S)[0].split() == [number.name]
    assert process.returncode == 0


def test_after_a_pause_too():
    """After SIGCONT some other thread is given the signal, in about every second process."""
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    try:
        assert [p.stdout.readline() for p in running] == ["up\n"] * 6
        for process in running:
            process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        for process in running:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
        assert [p.communicate(timeout=SOON_S)[0].split() for p in running] == [["SIGTERM"]] * 6
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_what_was_there_before_is_there_again():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    threads = threading.active_count()
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(SOON_S)
        assert stop.signals == [signal.SIGTERM]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() <= threads


def test_a_signal_with_a_handler_of_its_own_ends_nothing():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not stop.wait(0.2)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
