"""How the window of a pull pays off: 20 MB over a broker on loopback, windows 1, 4, 8 and 16.

    python benchmarks/transfer.py [--delay-ms 10] [--mb 20] [--repeat 3]

`--delay-ms` lets every message wait so long before the device sees it, as on a real link; on
loopback alone there is hardly a round trip to hide. Speeds are given relative to window 1, since
absolute ones say more about the machine.
"""

import argparse
import hashlib
import random
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from fleetprune.mqtt import BrokerSettings, Connection
from fleetprune.topics import Topics
from fleetprune_agent.transfer import BlobClient
from fleetprune_coordinator.block_server import BlockServer
from fleetprune_sim.broker import embedded_broker

WINDOWS = (1, 4, 8, 16)


class Delay:
    """Calls `then` a fixed time after each message came."""

    def __init__(self, seconds: float, then: Callable[[str, bytes], None]) -> None:
        self.seconds, self.then = seconds, then
        self.queue: deque[tuple[float, str, bytes]] = deque()
        self.more, self.ended = threading.Condition(), False
        threading.Thread(target=self._run, daemon=True).start()

    def __call__(self, kind: str, payload: bytes) -> None:
        """Take a message in."""
        with self.more:
            self.queue.append((time.monotonic() + self.seconds, kind, payload))
            self.more.notify()

    def _run(self) -> None:
        while not self.ended:
            with self.more:
                self.more.wait_for(lambda: self.queue or self.ended, 1.0)
                if not self.queue:
                    continue
                at, kind, payload = self.queue[0]
                left = at - time.monotonic()
                if left > 0:
                    self.more.wait(left)
                    continue
                self.queue.popleft()
            self.then(kind, payload)


def measure(
    settings: BrokerSettings, folder: Path, data: bytes, window: int, delay_s: float
) -> tuple[float, int]:
    topics = Topics("bench")
    server = BlockServer(lambda name: folder / "blob", lambda *a: None, folder / "spool")

    def serve(topic: str, payload: bytes) -> None:
        for answer in server.get(payload):
            coordinator.publish(topics.down("d", "block"), answer)

    coordinator = Connection(settings, "bench-c", on_message=serve)
    coordinator.subscribe([topics.up("+", "#")])
    delay = Delay(delay_s, lambda kind, payload: client.feed(kind, payload))  # noqa: PLW0108
    device = Connection(settings, "bench-d", on_message=lambda topic, p: delay("block", p))
    device.subscribe([topics.down("d", "+")])
    client = BlobClient(
        lambda kind, payload: device.publish(topics.up("d", kind), payload),
        "d",
        folder / "parts",
        window=window,
    )
    for connection in (coordinator, device):
        connection.start()
        connection.wait_connected(10)
    began = time.perf_counter()
    client.pull("blob", len(data), hashlib.sha256(data).hexdigest(), folder / "out")
    seconds = time.perf_counter() - began
    wire = device.bytes_received + device.bytes_sent
    for connection in (device, coordinator):
        connection.stop()
    delay.ended = True
    server.close()
    return seconds, wire


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mb", type=float, default=20.0)
    parser.add_argument("--delay-ms", type=float, nargs="*", default=[0.0, 20.0])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    data = random.Random(0).randbytes(int(options.mb * 1e6))
    print("| delay ms | window | MB/s | of window 1 | bytes on the wire / payload |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "blob").write_bytes(data)
        with embedded_broker(folder / "broker") as settings:
            for delay_ms in options.delay_ms:
                base = None
                for window in WINDOWS:
                    runs = [
                        measure(settings, folder, data, window, delay_ms / 1000)
                        for _ in range(options.repeat)
                    ]
                    speed = len(data) / 1e6 / statistics.median(s for s, _ in runs)
                    base = base or speed
                    print(
                        f"| {delay_ms:g} | {window} | {speed:.0f} | {speed / base:.1f} "
                        f"| {runs[-1][1] / len(data):.4f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
