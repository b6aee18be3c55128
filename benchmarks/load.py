"""A release to 500 devices over one mosquitto, beside what that broker can do at all.

    python -m benchmarks.load [--devices 500] [--mb 2] [--servers 1] [--repeat 3]

Four things are timed in turn, with the same subscribers, message sizes and one publisher:

    raw       every device is sent the same bytes, unasked, by paho, QoS 1; it throws them away
    raw-0     the same with QoS 0, which is what blocks are published with
    hashed    as raw, and devices hash what came, as every device must
    release   `fleetprune coordinator blocks` serves; devices ask for blocks and verify them

Real: mosquitto, the block server's process, the wire format, the windows (`Download`), CRC and
SHA-256. Not real: the devices' MQTT connections are multiplexed (`light_clients`), since 500
agents have 1,500 threads and, elsewhere, 500 processors; blocks stay in memory. The devices' work
is done on the same cores as the broker's, which is why `hashed` is there, and processor time is
told apart.
"""

import argparse
import gc
import hashlib
import multiprocessing
import os
import random
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from benchmarks.light_clients import LightClient
from fleetprune.blocks import BLOCK_OVERHEAD, BLOCK_SIZE, Block, decode
from fleetprune.mqtt import BrokerSettings, Connection
from fleetprune.topics import Topics
from fleetprune.windows import Download
from fleetprune_sim.broker import BrokerKind, EmbeddedBroker

FLEET, SERVER = "load", "bench"
TICK_S = 0.1  # between two looks for overdue blocks
READY_S = 60.0
CONFIG = """
fleet = "{fleet}"
[broker]
host = "{host}"
port = {port}
[model]
factory = "nowhere:none"
input_shape = [1]
classes = 2
[classes.phone]
"""


@dataclass(frozen=True)
class Blob:
    """What every device is to have."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Arrived:
    """What a group of devices says of one run."""

    at: tuple[float, ...]
    """When each was done, by the monotonic clock."""
    bytes_received: int
    bytes_sent: int
    requests: int
    cpu_s: float


class Device:
    """One device: counts, hashes or pulls what comes to it."""

    def __init__(self, client: LightClient, blob: Blob, number: int) -> None:
        self.client, self.blob, self.number = client, blob, number
        client.on_message = self.take
        self.content = bytearray(blob.size)  # kept: a gigabyte of fresh pages costs half a second

    def begin(self, mode: str) -> None:
        """Start anew; `mode` is `raw`, `raw-0`, `hashed` or `release`."""
        self.mode, self.done_at, self.bytes, self.requests = mode, 0.0, 0, 0
        self.machine = Download(
            self.blob.name, self.number, max_size=self.blob.size, size=self.blob.size
        )
        if mode == "release":
            self.ask()

    def ask(self) -> None:
        """Send the request that is due."""
        request = self.machine.poll(time.monotonic())
        if request is not None:
            self.requests += 1
            self.client.publish(Topics(FLEET).up(self.client.name, "get"), request.encode())

    def take(self, payload: bytes) -> None:
        """A message."""
        if self.done_at:
            return
        if self.mode == "release":
            message = decode(payload)
            assert isinstance(message, Block)
            block = self.machine.receive(message, time.monotonic())
            if block is not None:
                start = block.index * BLOCK_SIZE
                self.content[start : start + len(block.data)] = block.data
            self.ask()
            if not self.machine.done:
                return
        else:
            data = payload[BLOCK_OVERHEAD:]
            if self.mode == "hashed":
                start = int.from_bytes(payload[:4]) * BLOCK_SIZE  # they may come in any order
                self.content[start : start + len(data)] = data
            self.bytes += len(data)
            if self.bytes < self.blob.size:
                return
        if (
            not self.mode.startswith("raw")
            and hashlib.sha256(self.content).hexdigest() != self.blob.sha256
        ):
            raise RuntimeError(f"{self.client.name} got other bytes")
        self.done_at = time.monotonic()


def devices(settings: BrokerSettings, names: Sequence[str], blob: Blob, pipe: Pipe) -> None:
    """A process of devices; gets modes through `pipe` and answers each with `Arrived`."""
    selector = selectors.DefaultSelector()
    fleet = [
        Device(
            LightClient(
                selector,
                (settings.host, settings.port),
                name,
                [Topics(FLEET).down(name, "block")],
                lambda payload: None,
            ),
            blob,
            number,
        )
        for number, name in enumerate(names)
    ]

    def turn() -> None:
        for key, mask in selector.select(TICK_S):
            key.data.act(mask)

    while not all(device.client.ready for device in fleet):
        turn()
    pipe.send("ready")
    gc.disable()
    while (mode := pipe.recv()) != "end":
        cpu, before = time.process_time(), [(d.client.received, d.client.sent) for d in fleet]
        for device in fleet:
            device.begin(mode)
        if mode != "release":
            pipe.send("waiting")
        look_at = 0.0
        while any(not device.done_at for device in fleet):
            turn()
            if mode == "release" and time.monotonic() > look_at:
                look_at = time.monotonic() + TICK_S
                for device in fleet:
                    if not device.done_at:
                        device.ask()
        pipe.send(
            Arrived(
                tuple(d.done_at for d in fleet),
                sum(d.client.received for d in fleet) - sum(r for r, _ in before),
                sum(d.client.sent for d in fleet) - sum(s for _, s in before),
                sum(d.requests for d in fleet),
                time.process_time() - cpu,
            )
        )
    for device in fleet:
        device.client.close()


class Fleet:
    """Processes of devices."""

    def __init__(
        self, settings: BrokerSettings, count: int, blob: Blob, processes: int = 2
    ) -> None:
        self.names = [f"d{i}" for i in range(count)]
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for i in range(processes):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=devices, args=(settings, self.names[i::processes], blob, theirs)
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            _expect(pipe, "ready")

    def run(self, mode: str, publish: Connection | None, blob: Blob) -> tuple[float, list[Arrived]]:
        """Seconds until the last device was done, and what each process says."""
        for pipe in self.pipes:
            pipe.send(mode)
        if mode != "release":
            for pipe in self.pipes:
                _expect(pipe, "waiting")
        began = time.monotonic()
        if publish is not None:
            self._send_all(publish, blob, 0 if mode == "raw-0" else 1)
        arrived = [pipe.recv() for pipe in self.pipes]
        return max(max(a.at) for a in arrived) - began, arrived

    def _send_all(self, publish: Connection, blob: Blob, qos: int) -> None:
        data = random.Random(0).randbytes(blob.size)
        for start in range(0, blob.size, BLOCK_SIZE):
            head = (start // BLOCK_SIZE).to_bytes(4) + bytes(BLOCK_OVERHEAD - 4)
            message = head + data[start : start + BLOCK_SIZE]
            for name in self.names:
                while not publish.wait_for_room(READY_S):
                    raise RuntimeError("the broker takes nothing")
                publish.publish(Topics(FLEET).down(name, "block"), message, qos=qos)

    def end(self) -> None:
        """Stop all processes."""
        for pipe in self.pipes:
            pipe.send("end")
        for process in self.processes:
            process.join()


def _expect(pipe: Pipe, word: str) -> None:
    if not pipe.poll(READY_S) or pipe.recv() != word:
        raise RuntimeError(f"a process of devices did not say {word!r}")


@contextmanager
def block_servers(settings: BrokerSettings, folder: Path, count: int) -> Iterator[list[int]]:
    """`fleetprune coordinator blocks`, `count` times, over `folder`/public; their process ids."""
    config = folder / "fleet.toml"
    config.write_text(CONFIG.format(fleet=FLEET, host=settings.host, port=settings.port))
    seen: set[str] = set()
    watch = Connection(settings, "watch", on_message=lambda topic, payload: seen.add(topic))
    watch.subscribe([Topics(FLEET).blocks("+")])
    watch.start()
    command = [sys.executable, "-m", "fleetprune", "coordinator", "blocks", "--config", str(config)]
    command += ["--folder", str(folder / "public"), "--name"]
    started = [
        subprocess.Popen([*command, f"{SERVER}{i}"], stderr=subprocess.DEVNULL)
        for i in range(count)
    ]
    end = time.monotonic() + READY_S
    while len(seen) < count and time.monotonic() < end:
        time.sleep(0.02)
    watch.stop()
    try:
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.terminate()
            process.wait()


def publish_blob(folder: Path, size: int) -> Blob:
    """A file of random bytes in a public folder."""
    data = random.Random(0).randbytes(size)
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"targets/releases/phone/1/{sha256}.model.onnx"
    (folder / "public" / "metadata").mkdir(parents=True)
    (folder / "public" / name).parent.mkdir(parents=True)
    (folder / "public" / name).write_bytes(data)
    return Blob(name, size, sha256)


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has had (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(count: int, size: int, servers: int, repeat: int, processes: int) -> None:
    """Print the ways beside each other: medians of `repeat` rounds, taken in turn."""
    seconds: dict[str, list[float]] = {"raw": [], "raw-0": [], "hashed": [], "release": []}
    cpu: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in seconds}
    last: dict[str, list[Arrived]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blob = publish_blob(folder, size)
        broker = EmbeddedBroker(folder / "broker", kind=BrokerKind.MOSQUITTO)
        broker.start()
        try:
            fleet = Fleet(broker.settings, count, blob, processes)
            publisher = Connection(broker.settings, "raw", on_message=lambda *m: None)
            publisher.start()
            publisher.wait_connected(READY_S)
            assert broker._process is not None
            with block_servers(broker.settings, folder, servers) as serving:
                for mode in tuple(seconds) * repeat:
                    by, pids = (None, serving) if mode == "release" else (publisher, [os.getpid()])
                    before = [cpu_s(broker._process.pid), sum(map(cpu_s, pids))]
                    took, last[mode] = fleet.run(mode, by, blob)
                    after = [cpu_s(broker._process.pid), sum(map(cpu_s, pids))]
                    seconds[mode].append(took)
                    cpu[mode].append(
                        (
                            after[0] - before[0],
                            after[1] - before[1],
                            sum(a.cpu_s for a in last[mode]),
                        )
                    )
            publisher.stop()
            fleet.end()
        finally:
            broker.stop()
    total = count * size
    raw = statistics.median(seconds["raw"])
    print(f"{count} devices, {size / 1e6:g} MB each, {servers} block server(s)")
    print(
        "| way | s (median) | all runs | MB/s | of raw | CPU s: broker, sender, devices "
        "| bytes to devices / payload | requests |"
    )
    print("| --- | ---: | --- | ---: | ---: | --- | ---: | ---: |")
    for mode, runs in seconds.items():
        median = statistics.median(runs)
        received = sum(a.bytes_received for a in last[mode])
        print(
            f"| {mode} | {median:.2f} | {' '.join(f'{s:.2f}' for s in runs)} "
            f"| {total / 1e6 / median:.0f} | {raw / median:.0%} "
            f"| {' '.join(f'{statistics.median(c):.2f}' for c in zip(*cpu[mode], strict=True))} "
            f"| {received / total:.4f} "
            f"| {sum(a.requests for a in last[mode])} |"
        )
    hashed = statistics.median(seconds["hashed"])
    print(f"release against hashed: {hashed / statistics.median(seconds['release']):.0%}")
    received = sum(a.bytes_received for a in last["release"]) / count
    for link in (10, 100, 1000):
        print(
            f"a device's own {link} Mbit/s: {received * 8 / link / 1e6:.2f} s; "
            f"the broker's {link} Mbit/s: {received * count * 8 / link / 1e6:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--devices", type=int, default=500)
    parser.add_argument("--mb", type=float, default=2.0)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    size = int(options.mb * 1e6)
    compare(options.devices, size, options.servers, options.repeat, options.processes)


if __name__ == "__main__":
    main()
