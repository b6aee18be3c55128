"""`fleetprune coordinator serve`: the coordinator as a process on a broker."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fleetprune.errors import ConfigError
from fleetprune.files import write_atomic
from fleetprune.messages import Enrol, Telemetry
from fleetprune.mqtt import Phase
from fleetprune_coordinator.access import ACCESS, Access, open_access
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.control import ControlServer
from fleetprune_coordinator.coordinator import Coordinator, Released
from fleetprune_coordinator.doorman import Doorman
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.hub import Hub, Outcome
from fleetprune_coordinator.join_server import JoinServer, welcome
from fleetprune_coordinator.mqtt_grid import MqttGrid
from fleetprune_coordinator.orders import obey
from fleetprune_coordinator.pacemaker import Pacemaker
from fleetprune_coordinator.proposals import PendingError
from fleetprune_coordinator.road_access import smaller_classes
from fleetprune_coordinator.strategy import NestedStrategy, run_app, server_app
from fleetprune_coordinator.summary import summarise

log = logging.getLogger(__name__)

REFRESH_S = 3600.0  # seconds between new timestamps; they live for a day
CONNECT_S = 30.0  # seconds for the first connection to the broker
SIGNED_S = 1.0  # seconds between looks whether a release that waits for signatures is published
POLL_S = 0.1  # seconds between looks at what devices have reported


class Server:
    """A coordinator, a hub, and what passes between them."""

    def __init__(
        self, coordinator: Coordinator, stop: threading.Event, access: Access | None = None
    ) -> None:
        """Prepare to serve.

        Args:
            coordinator: What there is to serve.
            stop: Ends it.
            access: The fleet's authority; None: whoever the broker lets in takes part.
        """
        self._coordinator = coordinator
        self._registry = coordinator.registry
        self._events = coordinator.events
        self._stop = stop
        config = coordinator.config
        self.rollouts = coordinator.rollouts
        self._registry.set_all_offline()
        self.hub = Hub(
            config.broker,
            config.fleet,
            self._registry,
            coordinator.read,
            config.state / "spool",
            on_enrol=self._enrol,
            on_status=lambda device, online: _ignore(self._registry.set_online(device, online)),
            on_telemetry=self._telemetry,
            doorman=None if access is None else Doorman(access.gate, self._smaller, access.renew),
        )
        self.hub.watch(self._outcome)
        self.rollouts.ledger.announce = self.hub.announce_release
        self.pacemaker = Pacemaker(self.rollouts, lambda: self.hub.connection.phase is Phase.UP)
        self._counted: dict[str, tuple[int, int]] = {}
        self._last = time.monotonic()
        self._installed = {
            (r.telemetry.device, r.telemetry.release)
            for r in self._registry.latest_telemetry()
            if r.telemetry.state == "committed"
        }

    # ---- what the hub tells and asks

    def _smaller(self, device_class: str) -> frozenset[str]:
        def next_smaller(name: str) -> str | None:
            manifest = self._coordinator.repository.manifest(name)
            return None if manifest is None else manifest.smaller

        return smaller_classes(device_class, next_smaller)

    def _enrol(self, enrol: Enrol) -> str | None:
        classes = self._coordinator.config.classes
        if enrol.device_class not in classes:
            return (
                f"class {enrol.device_class} is not one of this fleet's: "
                f"{', '.join(sorted(classes))}"
            )
        known = self._registry.device(enrol.device)
        self._registry.enrol(enrol)
        if known is None:
            self._events.emit("enrolled", device=enrol.device, device_class=enrol.device_class)
        return None

    def _telemetry(self, telemetry: Telemetry) -> None:
        if self._registry.device(telemetry.device) is None:
            return
        self._registry.record_telemetry(telemetry)
        self.pacemaker.wake()
        key = (telemetry.device, telemetry.release)
        if telemetry.state == "committed" and telemetry.release and key not in self._installed:
            self._installed.add(key)
            self._events.emit(
                "installed",
                device=telemetry.device,
                device_class=telemetry.device_class,
                release=telemetry.release,
                accuracy=telemetry.accuracy,
                latency_ms=telemetry.latency_ms,
                rss_mb=telemetry.rss_mb,
            )

    def _outcome(self, outcome: Outcome) -> None:
        if outcome.refused is not None and self._registry.refuse_task(
            outcome.task, outcome.device, outcome.refused
        ):  # not once more for a device that repeats itself
            self._registry.add_event("task refused", outcome.refused, outcome.device)

    # ---- what the operator asked for

    def train(self) -> None:
        """Wait for enough devices, then run what is left of the training."""
        config = self._coordinator.config
        if not self._coordinator.rounds.remaining():
            return
        self.wait_for_devices()
        start = time.monotonic()
        self._coordinator.rounds.prepare()
        self._last = time.monotonic()
        self._events.emit("prepared", seconds=round(self._last - start, 3))
        strategy = NestedStrategy(self._coordinator.rounds, self._closed, self._wait_for_anybody)
        app = server_app(strategy, self._coordinator.rounds, config.training.round_timeout_s)
        grid = MqttGrid(
            self.hub,
            self._registry,
            lambda: {d.name: d.id for d in self._registry.devices()},
            self.check_stop,
            quorum=config.training.quorum,
        )
        try:
            run_app(app, grid)
        finally:
            grid.close()

    def release(self) -> dict[str, Released]:
        """Make the release; where keys of `targets` are elsewhere, serve on until it is signed."""
        repository = self._coordinator.repository
        while True:
            try:
                return self._coordinator.release()
            except PendingError as e:
                self._events.emit("unsigned", reason=str(e))
            latest, due = repository.latest_release(), time.monotonic() + REFRESH_S
            while repository.latest_release() == latest:
                self._pause(SIGNED_S)
                if time.monotonic() > due:
                    repository.refresh_timestamp()
                    due = time.monotonic() + REFRESH_S

    def connect(self) -> None:
        """Wait for the broker; TransportError if it is not there in time."""
        deadline = time.monotonic() + CONNECT_S
        while self.hub.connection.phase is not Phase.UP and time.monotonic() < deadline:
            self._pause(POLL_S)
        self.hub.connection.wait_connected(0.0)

    def _wait_for_anybody(self) -> None:
        """Return when a device is online: a round that nobody answers teaches nothing."""
        self._wait_for_devices(1)

    def wait_for_devices(self) -> None:
        """Wait until as many devices are online as a training needs."""
        self._wait_for_devices(self._coordinator.config.training.min_devices)

    def _wait_for_devices(self, least: int) -> None:
        told = -1
        while (here := len(self._registry.devices(online=True))) < least:
            if here != told:
                self._events.emit("waiting", devices=here, expected=least)
                told = here
            self._pause(POLL_S)

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)
        self.check_stop()

    def check_stop(self) -> None:
        """KeyboardInterrupt if the operator wants an end."""
        _check(self._stop)

    def _closed(self, metrics: dict[str, Any]) -> None:
        """Tell of a round, with the bytes that its devices sent and got."""
        up, down = self.count_traffic(metrics["round"])
        now = time.monotonic()
        training = self._coordinator.config.training
        fields = {k: v for k, v in metrics.items() if k != "phase"}
        many = {"train": training.rounds, "calibrate": training.calibration_passes}
        self._events.emit(
            "round" if metrics["phase"] == "train" else metrics["phase"],
            of=many.get(metrics["phase"], 1),
            seconds=round(now - self._last, 3),
            bytes_up=up,
            bytes_down=down,
            devices=metrics["answers"],
            **fields,
        )
        self._last = now
        # A training may last longer than signed metadata live, and devices look at both.
        self._coordinator.repository.refresh_timestamp()
        self._registry.collect_garbage()  # answers of closed rounds would fill the disk
        self.check_stop()

    def count_traffic(self, round_: int) -> tuple[int, int]:
        """Book each device's packets since the last call; returns their sums (up, down)."""
        total_up = total_down = 0
        for device in self._registry.devices():
            up, down = self.hub.traffic(device.name)
            seen_up, seen_down = self._counted.get(device.name, (0, 0))
            self._counted[device.name] = (up, down)
            self._registry.add_traffic(device.name, round_, up - seen_up, down - seen_down)
            total_up += up - seen_up
            total_down += down - seen_down
        return total_up, total_down

    def summarise(self, released: Mapping[str, Released], wall_s: float) -> dict[str, Any]:
        """Write and return the summary of a run, and each class's model beside it."""
        config = self._coordinator.config
        self.count_traffic(config.training.rounds)
        summary = summarise(self._coordinator, released, engine="mqtt", wall_s=wall_s)
        write_results(config, released, summary)
        return summary

    def wait_until_released(self, release: int) -> None:
        """Wait until a release has gone through its stages; RolloutError if it was stopped."""
        while not self.rollouts.ended(release):
            self._pause(POLL_S)


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise KeyboardInterrupt


def _ignore(result: object) -> None:
    """For callbacks whose answer nobody needs."""


@contextmanager
def serving(server: Server, state: Path) -> Iterator[None]:
    """A started hub, rollouts that go on, and the control socket; stopped at the end."""
    server.hub.start()
    try:
        with ControlServer(state, partial(obey, server.rollouts)):
            server.pacemaker.start()
            try:
                yield
            finally:
                server.pacemaker.stop()
    finally:
        server.hub.stop()


@contextmanager
def opened(config: FleetConfig) -> Iterator[Access | None]:
    """The fleet's authority, if it has one, and the endpoint where devices join, if wanted."""
    access = open_access(config, time.time)
    if access is None:
        if config.join is not None:
            raise ConfigError(
                f"join: no authority in {config.state / ACCESS}: `fleetprune access init` makes one"
            )
        yield None
        return
    join = None
    try:
        if config.join is not None:
            join = JoinServer(access, welcome(config, config.join), config.join)
            join.start()
            log.info("devices join on port %d", join.port)
        yield access
    finally:
        if join is not None:
            join.stop()
        access.close()


def serve(
    config: FleetConfig,
    *,
    stop: threading.Event,
    events: Path | None = None,
    until_released: bool = False,
) -> dict[str, Any]:
    """Train, release and go on serving.

    Args:
        config: The fleet.
        stop: Ends it within seconds; the next start goes on from there.
        events: File that events are appended to.
        until_released: End when the rollout of the release is complete.

    Returns:
        The summary, which also lies in `summary.json` beside the state folder.

    Raises:
        FleetpruneError: Something that the operator must see to; one line.
        KeyboardInterrupt: `stop` was set before the release.
    """
    start = time.monotonic()
    with (
        EventLog(events, time.time) as log_,
        Coordinator(config, time.time, log_, lambda: _check(stop)) as coordinator,
        opened(config) as access,
    ):
        server = Server(coordinator, stop, access)
        with serving(server, config.state):
            server.connect()
            coordinator.events.emit("serving", fleet=config.fleet, pid=os.getpid())
            server.train()
            released = server.release()
            number = next(iter(released.values())).manifest.release
            server.hub.announce_release(number)  # again: a predecessor may not have got to it
            if until_released:
                server.wait_for_devices()  # after a restart nobody may have come back yet
                try:
                    server.wait_until_released(number)
                finally:
                    summary = server.summarise(released, time.monotonic() - start)
            else:
                summary = server.summarise(released, time.monotonic() - start)
            coordinator.events.emit("done", summary=str(config.state.parent / "summary.json"))
            if not until_released:
                _keep_fresh(coordinator, stop)
            return summary


def _keep_fresh(coordinator: Coordinator, stop: threading.Event) -> None:
    """Serve blocks and telemetry until stopped; sign new timestamps before the old expire."""
    while not stop.wait(REFRESH_S):
        coordinator.repository.refresh_timestamp()
        for line in coordinator.repository.expiring():
            log.warning(line)
        coordinator.registry.collect_garbage()


def write_results(
    config: FleetConfig, released: Mapping[str, Released], summary: dict[str, Any]
) -> None:
    """Leave the summary and each class's model beside the state folder."""
    folder = config.state.parent
    for name, r in released.items():
        place = folder / "releases" / name
        place.mkdir(parents=True, exist_ok=True)
        write_atomic(place / "model.onnx", r.artifact.onnx)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")
