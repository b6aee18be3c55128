"""A fleet of three devices in processes of their own over a broker, to be killed in pieces.

Everything is watched from outside, as an operator could: the events that the coordinator writes,
its registry, opened read-only, and the files of the devices.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

from fleetprune_agent.feedback import OnDisk
from fleetprune_agent.slots import Slots
from fleetprune_coordinator.keys import RELEASES, init_repository
from fleetprune_coordinator.records import RoundState, TaskState
from fleetprune_coordinator.registry import Registry
from fleetprune_sim.broker import EmbeddedBroker
from fleetprune_sim.demo_config import to_toml

CLASSES = {"large": 1.0, "small": 0.5}  # name to share of the dense model's MACs
DEVICES = {"d1": "large", "d2": "large", "d3": "small"}
COORDINATOR = "coordinator"
INPUTS = 16
SAMPLES = 100
WAIT_S = 40.0  # seconds for anything that is waited for; a machine under load takes a tenth
LOOK_S = 0.02  # seconds between two looks
NOW_S = 0.0005  # where what is awaited lasts for milliseconds
TAIL = 3000  # characters of each log in a failure
_COMMAND = (sys.executable, "-P", "-m", "fleetprune")
_WAITING = (
    sys.executable,
    "-P",
    "-c",
    "import sys, fleetprune_coordinator.serve; from fleetprune.cli import main; input(); main()",
)
"""The same command, which has loaded torch (seconds) and waits for a line before it begins."""
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Process:
    """A child in a process group of its own."""

    def __init__(self, command, cwd, log, *, waiting=False, on=()):
        """Start; `on` is what the command begins with, where it is to run on another host."""
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                [*on, *(_WAITING if waiting else _COMMAND), *command],
                cwd=cwd,
                stdin=subprocess.PIPE if waiting else subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_ONE_THREAD},
                start_new_session=True,
            )

    @property
    def code(self):
        return self.popen.poll()

    def begin(self):
        self.popen.stdin.write(b"\n")
        self.popen.stdin.close()

    def signal(self, number):
        if self.code is None:
            os.killpg(self.popen.pid, number)

    def freeze(self):
        """SIGSTOP; returns when it stands still."""
        self.signal(signal.SIGSTOP)
        process = psutil.Process(self.popen.pid)
        deadline = time.monotonic() + WAIT_S
        while any(_state(process, t.id) not in "TtZX" for t in process.threads()):
            assert time.monotonic() < deadline, f"{self.log.stem} does not stop"
            time.sleep(NOW_S)

    def thaw(self):
        self.signal(signal.SIGCONT)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.popen.wait()
        if self.popen.stdin is not None:
            self.popen.stdin.close()

    def end(self, within):
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.popen.wait(within)

    def cpu_s(self):
        times = psutil.Process(self.popen.pid).cpu_times()
        return times.user + times.system


def _state(process, thread):
    """The kernel's letter for a thread."""
    try:
        text = Path(f"/proc/{process.pid}/task/{thread}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return text.rpartition(")")[2].split()[0]


class Fleet:
    """Broker, coordinator and devices; leaving the context kills them all."""

    def __init__(self, root, *, starts=1, hidden=32, samples=None, deltas=True, **training):
        """Write everybody's configuration and data.

        Args:
            root: Folder for all of it.
            starts: How often the coordinator will be started.
            hidden: Width of the model.
            samples: Of single devices, where not `SAMPLES`.
            deltas: Whether releases come with deltas.
            training: Keys of the table `training`.
        """
        self.root, self._hidden = root, hidden
        self.patience_s = WAIT_S
        self.broker = self._make_broker()
        self.rollout = {"stages": [1.0], "soak_s": 0.0}  # to everybody at once
        self._deltas = deltas
        self.training = {
            "rounds": 3,
            "devices_per_round": 3,
            "min_devices": 2,
            "round_timeout_s": WAIT_S,
            "remask_every": 2,
            "learning_rate": 0.05,
            **training,
        }
        self.processes = {}
        self._starts, self._next = starts, None
        self._registry = None
        self._write(samples or {})

    def _make_broker(self):
        return EmbeddedBroker(self.root / "broker")

    def _on(self, name):
        """What a process's command begins with."""
        return ()

    def _write(self, samples):
        rng = np.random.default_rng(0)
        np.savez(self.root / "test.npz", **separable(rng, 64))
        self.configure()
        init_repository(self.state / RELEASES, datetime.now(UTC))
        trust = (self.state / RELEASES / "public" / "metadata" / "1.root.json").read_bytes()
        for device, device_class in DEVICES.items():
            home = self.root / device
            home.mkdir()
            (home / "root.json").write_bytes(trust)
            np.savez(home / "data.npz", **separable(rng, samples.get(device, SAMPLES)))
            config = {
                "device": device,
                "device_class": device_class,
                "fleet": "e2e",
                "root": "root.json",
                "state": "state",
                "broker": self._address(),
                "data": {"kind": "npz", "path": "data.npz"},
            }
            (home / "agent.toml").write_text(to_toml(config))
        np.save(self.root / "samples.npy", separable(rng, 4)["x"])

    def configure(self, **training):
        """Write fleet.toml, with some keys of the table `training` changed."""
        self.training |= training
        config = {
            "fleet": "e2e",
            "state": "coordinator",
            "broker": self._address(),
            "model": {
                "factory": "fleetprune_sim.models:mlp",
                "arguments": {"inputs": INPUTS, "hidden": self._hidden, "classes": 2},
                "input_shape": [INPUTS],
                "labels": ["low", "high"],
            },
            "data": {"test": "test.npz"},
            "training": self.training,
            "rollout": self.rollout,
            "release": {"deltas": self._deltas},
            "classes": {name: {"macs_share": share} for name, share in CLASSES.items()},
        }
        (self.root / "fleet.toml").write_text(to_toml(config))

    def _address(self):
        return {"host": self.broker.settings.host, "port": self.broker.settings.port}

    @property
    def state(self):
        """The coordinator's folder."""
        return self.root / "coordinator"

    def __enter__(self):
        self.broker.start()
        self._make_next()
        return self

    def __exit__(self, kind, error, trace):
        for process in (*self.processes.values(), self._next):
            if process is not None:
                process.kill()
        self.broker.kill()
        if self._registry is not None:
            self._registry.close()
        if error is not None:
            error.add_note(self.story())

    def story(self):
        """What happened: the end of every log, and the rounds."""
        logs = sorted([*self.root.glob("*.log"), self.root / "events.jsonl"])
        tails = [f"== {p.name}\n{p.read_text()[-TAIL:]}" for p in logs if p.is_file()]
        return "\n".join(tails)

    # ---- processes

    def start_coordinator(self):
        """The same command at every start; it ends when all devices online have the release."""
        coordinator = self.processes[COORDINATOR] = self._next
        coordinator.begin()
        self._make_next()
        return coordinator

    def _make_next(self):
        """The next coordinator loads its libraries while this one works."""
        self._next = None
        if self._starts:
            self._starts -= 1
            options = ("--config", "fleet.toml", "--until-released", "--events", "events.jsonl")
            command = ("coordinator", "serve", *options)
            on = self._on(COORDINATOR)
            self._next = Process(command, self.root, self._log(COORDINATOR), waiting=True, on=on)

    def start_agents(self, *names):
        for name in names or DEVICES:
            command = ("agent", "run", "--config", "agent.toml")
            on = self._on(name)
            self.processes[name] = Process(command, self.root / name, self._log(name), on=on)

    def _log(self, name):
        return self.root / f"{name}.log"

    def __getitem__(self, name):
        return self.processes[name]

    def finish(self):
        """Wait until the coordinator has ended well."""
        coordinator = self[COORDINATOR]
        self.wait("the coordinator's end", lambda: coordinator.code is not None)
        assert coordinator.code == 0

    # ---- what can be seen

    def wait(self, what, look, *, every=LOOK_S, within=None):
        """Look until there is something; AssertionError if it takes too long."""
        within = within or self.patience_s
        deadline = time.monotonic() + within
        while not (found := look()):
            for name, process in self.processes.items():
                code = process.code
                assert code in (None, 0, -signal.SIGKILL), f"{name} ended with exit code {code}"
            assert time.monotonic() < deadline, f"waited {within:g} s for {what}"
            time.sleep(every)
        return found

    def events(self, kind):
        path = self.root / "events.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [e for e in map(json.loads, lines) if e["event"] == kind]

    @property
    def registry(self):
        """Read-only; to be asked for once the coordinator runs."""
        if self._registry is None:
            self.wait("the registry", lambda: self.events("serving"))
            self._registry = Registry.open(self.state, time.time, read_only=True)
        return self._registry

    def open_tasks(self):
        """The open round's number and its tasks' states by task id; None: no round is open."""
        opened = self.registry.open_round()
        if opened is None:
            return None
        tasks = self.registry.tasks(opened.number, opened.phase, step=opened.step)
        return opened.number, {t.task.task: t.state for t in tasks}

    def open_counts(self):
        """The open round's number and how many of its tasks are in which state."""
        number, states = self.open_tasks() or (0, {})
        return number, Counter(states.values())

    def task_of(self, device):
        """The device's task in the open round that has no answer; None: there is none."""
        tasks = self.registry.open_tasks(device)
        return tasks[0] if tasks else None

    def rounds_of(self, device, state):
        """(phase, number, step) of rounds in which the device's task came to this state."""
        return [
            (r.phase.value, r.number, r.step)
            for r in self.registry.rounds()
            for t in self.registry.tasks(r.number, r.phase, step=r.step)
            if (t.task.device, t.state) == (device, state)
        ]

    def device_state(self, device):
        return self.root / device / "state"

    def slots(self, device):
        return Slots(self.device_state(device))

    def answered(self, device):
        """Ids of tasks whose answer the device has on its disk."""
        return set(OnDisk(self.device_state(device) / "answers.bin").load().answers)

    def times_done(self, device, task):
        """How often the device's log says that it has answered a task."""
        return self._log(device).read_text().count(f"task {task} is answered")

    def connections(self, device):
        """How often the device's log says that it is connected."""
        return self._log(device).read_text().count("connected to broker")

    def dropped(self, name):
        """How often a log says that the connection was lost."""
        return self._log(name).read_text().count("dropped the connection")

    def predict(self, device):
        """What `fleetprune agent predict` says: the release it used, and the predictions."""
        samples = ("--input", str(self.root / "samples.npy"))
        done = subprocess.run(
            [*_COMMAND, "agent", "predict", "--config", "agent.toml", "--json", *samples],
            cwd=self.root / device,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert len(said["predictions"]) == 4
        return said["release"]

    # ---- what must be true at the end of every test

    def check_rounds(self, *, silent=()):
        """Every round closed once, with each task's answer counted once.

        Args:
            silent: (phase, round, step, device) that had a task and gave no answer.
        """
        registry = self.registry
        rounds = registry.rounds()
        assert [r.number for r in rounds if r.phase.value == "train"] == list(
            range(1, self.training["rounds"] + 1)
        )
        missing = set()
        for r in rounds:
            assert r.state is RoundState.CLOSED
            tasks = registry.tasks(r.number, r.phase, step=r.step)
            answers = [t for t in tasks if t.state is TaskState.ANSWERED]
            assert r.metrics["answers"] == len(answers)
            assert r.metrics["refused"] == 0
            missing |= {
                (r.phase.value, r.number, r.step, t.task.device)
                for t in tasks
                if t.state is not TaskState.ANSWERED
            }
        assert missing == set(silent)
        (results,) = registry.query("SELECT count(*) AS n FROM results")
        assert results["n"] == sum(r.metrics["answers"] for r in rounds)
        (snapshots,) = registry.query("SELECT count(*) AS n FROM snapshots")
        assert 1 <= snapshots["n"] <= 3  # older ones are collected; a kill may come before that
        told = Counter((e["event"], e["round"], e["step"]) for e in self.events("round"))
        assert max(told.values()) == 1

    def check_installed(self, release):
        """Every device runs the release's artifact of its class and has said so."""
        wanted = {r.device_class: r.sha256 for r in self.registry.releases() if r.number == release}
        said = {
            t.telemetry.device: (t.telemetry.release, t.telemetry.sha256)
            for t in self.registry.latest_telemetry()
        }
        for device, device_class in DEVICES.items():
            active = self.slots(device).active()
            assert (active.release, active.manifest.sha256) == (release, wanted[device_class])
            assert said[device] == (release, wanted[device_class])


def separable(rng, n):
    """`n` samples of two classes that a line tells apart; `x` and `y` for an .npz."""
    y = rng.integers(0, 2, n)
    x = rng.normal(size=(n, INPUTS)) + np.where(y, 1.5, -1.5)[:, None]
    return {"x": x.astype(np.float32), "y": y}
