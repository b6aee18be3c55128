"""From an announcement to 99 % of 500 devices having the release, verified and in its place.

    python -m benchmarks.install_time [--devices 500] [--mb 2] [--servers 1]

Real: mosquitto, the block server's process, and per device the agent's own code: the wait of up to
two seconds after an announcement, TUF metadata with their signatures, `BlobClient`, part files,
fsync, the move into place. Not real: MQTT connections are multiplexed (`light_clients`), and the
model is not run. All devices share this machine's cores, which 500 machines would not: seconds of
processor time per device are printed beside.
"""

import argparse
import functools
import hashlib
import multiprocessing
import random
import selectors
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from benchmarks.light_clients import LightClient
from benchmarks.load import FLEET, block_servers
from fleetprune.messages import Announcement
from fleetprune.mqtt import BrokerSettings, Connection
from fleetprune.topics import Topics
from fleetprune_agent.agent import SPREAD_S
from fleetprune_agent.transfer import BlobClient
from fleetprune_agent.trust import TrustedRepository
from fleetprune_sim.broker import BrokerKind, EmbeddedBroker

TARGET = "releases/phone/1/model.onnx"
PROCESSES = 2


def publish(folder: Path, size: int) -> bytes:
    """A signed repository with one target in `folder`/public; its root."""
    data = random.Random(0).randbytes(size)
    until = datetime.now(UTC) + timedelta(days=1)
    roles = ("root", "targets", "snapshot", "timestamp")
    keys = {role: CryptoSigner.generate_ed25519() for role in roles}
    root = Root(expires=until, consistent_snapshot=True)
    for role, key in keys.items():
        root.add_key(key.public_key, role)
    targets = Targets(expires=until)
    targets.targets[TARGET] = TargetFile.from_data(TARGET, data, ["sha256"])
    public = folder / "public"
    place = public / "targets" / TARGET
    place.parent.mkdir(parents=True)
    place.with_name(f"{hashlib.sha256(data).hexdigest()}.{place.name}").write_bytes(data)
    (public / "metadata").mkdir()

    def signed(name: str, payload: Signed) -> bytes:
        metadata = Metadata(payload)
        metadata.sign(keys[payload.type])
        (public / "metadata" / name).write_bytes(metadata.to_bytes())
        return metadata.to_bytes()

    signed("1.targets.json", targets)
    signed("1.snapshot.json", Snapshot(expires=until, meta={"targets.json": MetaFile(1)}))
    signed("timestamp.json", Timestamp(expires=until, snapshot_meta=MetaFile(1)))
    return signed("1.root.json", root)


class Loop:
    """Multiplexes the connections of a process; `call` is for other threads."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self.selector.register(self._woken, selectors.EVENT_READ, self)

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` in the loop's thread, soon."""
        self._calls.append(function)
        self._wake.send(b"x")

    def act(self, mask: int) -> None:
        """Run what other threads want run."""
        self._woken.recv(4096)
        while self._calls:
            self._calls.popleft()()

    def turn(self) -> None:
        """Wait for something, and do it."""
        for key, mask in self.selector.select(0.1):
            key.data.act(mask)


class Device:
    """One device: waits for the announcement, then does as the agent does."""

    def __init__(
        self, loop: Loop, settings: BrokerSettings, name: str, folder: Path, root: bytes
    ) -> None:
        topics = Topics(FLEET)
        self._loop, self.done_at, self._rng = loop, 0.0, random.Random(name)
        self._announced, self._into = threading.Event(), folder / "model.onnx"
        folder.mkdir()
        self.client = LightClient(
            loop.selector,
            (settings.host, settings.port),
            name,
            [topics.down(name, "block"), topics.release],
            self._take,
        )
        self._blobs = BlobClient(
            lambda kind, data: loop.call(
                functools.partial(self.client.publish, topics.up(name, kind), data)
            ),
            name,
            folder / "parts",
        )
        self._repository = TrustedRepository(
            folder / "trust", root, self._blobs, lambda: datetime.now(UTC)
        )
        threading.Thread(target=self._work, daemon=True).start()

    def _take(self, payload: bytes) -> None:
        if payload.startswith(b"{"):
            self._announced.set()
        else:
            self._blobs.feed("block", payload)

    def _work(self) -> None:
        self._announced.wait()
        time.sleep(self._rng.uniform(0, SPREAD_S))
        self._repository.refresh()
        self._repository.target(TARGET, self._into)
        self.done_at = time.monotonic()


def devices(
    settings: BrokerSettings, names: Sequence[str], folder: Path, root: bytes, pipe: Pipe
) -> None:
    """A process of devices; says when each was done, and its processor time."""
    loop = Loop()
    fleet = [Device(loop, settings, name, folder / name, root) for name in names]
    while not all(d.client.ready for d in fleet):
        loop.turn()
    cpu = time.process_time()
    pipe.send("ready")
    while not all(d.done_at for d in fleet):
        loop.turn()
    pipe.send(([d.done_at for d in fleet], time.process_time() - cpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--devices", type=int, default=500)
    parser.add_argument("--mb", type=float, default=2.0)
    parser.add_argument("--servers", type=int, default=1)
    options = parser.parse_args()
    size, names = int(options.mb * 1e6), [f"d{i}" for i in range(options.devices)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = publish(folder, size)
        broker = EmbeddedBroker(folder / "broker", kind=BrokerKind.MOSQUITTO)
        broker.start()
        try:
            spawn, pipes = multiprocessing.get_context("spawn"), []
            for i in range(PROCESSES):
                ours, theirs = spawn.Pipe()
                arguments = (broker.settings, names[i::PROCESSES], folder, root, theirs)
                spawn.Process(target=devices, args=arguments, daemon=True).start()
                pipes.append(ours)
            for pipe in pipes:
                pipe.recv()
            publisher = Connection(broker.settings, "publisher", on_message=lambda *m: None)
            publisher.start()
            publisher.wait_connected(10)
            with block_servers(broker.settings, folder, options.servers):
                began = time.monotonic()
                hint = Announcement(release=1).to_bytes()
                publisher.publish(Topics(FLEET).release, hint, retain=True)
                said = [pipe.recv() for pipe in pipes]
            publisher.stop()
        finally:
            broker.stop()
    done = sorted(at - began for ats, _ in said for at in ats)
    cpu = sum(seconds for _, seconds in said)
    print(f"{len(done)} devices, {options.mb:g} MB, {options.servers} block server(s)")
    for share in (0.5, 0.9, 0.99, 1.0):
        print(f"{share:.0%} after {done[max(0, round(share * len(done)) - 1)]:.2f} s")
    print(f"processor time of all devices {cpu:.1f} s, {cpu / len(done) * 1000:.0f} ms each")


if __name__ == "__main__":
    main()
