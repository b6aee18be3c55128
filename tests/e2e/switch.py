"""A switch with bad weather: carries IP packets between network namespaces, as far as it is told.

    python switch.py SEED NAMESPACE=ADDRESS ...

Each namespace gets a tun device "lan0". Real kernels speak real TCP over it; only the line between
them is ours, so no kernel needs `netem`, and the same seed draws the same losses. A JSON object per
line of stdin, `{"address": ..., "delay": s, "jitter": s, "loss": p, "double": p, "early": p}`, sets
the weather of a host's packets in both directions and is answered by an empty line.
"""

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import selectors
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
TUN_WITHOUT_HEADER = 0x0001 | 0x1000
DEVICE = "lan0"
NAMESPACES = Path("/run/netns")
QUEUE = 1000  # packets under way; more are lost, as in any switch


@dataclass(frozen=True)
class Weather:
    """What happens to the packets from and to a host."""

    delay: float = 0.0  # seconds
    jitter: float = 0.0  # seconds; uniform, to both sides
    loss: float = 0.0  # shares of packets from here on
    double: float = 0.0
    early: float = 0.0
    """Sent without delay: they overtake."""


class Switch:
    """Reads packets, decides, and sends them on when they are due."""

    def __init__(self, seed, hosts):
        self._rng = random.Random(seed)
        self._selector = selectors.DefaultSelector()
        self._ports = {}
        self._weather = {}
        self._under_way = []
        self._number = itertools.count()
        for namespace, address in hosts.items():
            port = _plug_in(namespace, address)
            key = socket.inet_aton(address)
            self._ports[key], self._weather[key] = port, Weather()
            self._selector.register(port, selectors.EVENT_READ, key)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)

    def run(self):
        """Until stdin ends."""
        while True:
            wait = max(0.0, self._under_way[0][0] - time.monotonic()) if self._under_way else None
            for ready, _ in self._selector.select(wait):
                if ready.data is None:
                    if not self._obey():
                        return
                else:
                    self._take(ready.data, os.read(ready.fd, 65536))
            now = time.monotonic()
            while self._under_way and self._under_way[0][0] <= now:
                _, _, port, packet = heapq.heappop(self._under_way)
                os.write(port, packet)

    def _obey(self):
        line = sys.stdin.readline()
        if not line:
            return False
        fields = json.loads(line)
        host = socket.inet_aton(fields.pop("address"))
        self._weather[host] = Weather(**fields)
        print(flush=True)
        return True

    def _take(self, source, packet):
        target = packet[16:20]
        if packet[0] >> 4 != 4 or target not in self._ports:
            return
        here, there = self._weather[source], self._weather[target]
        for weather in (here, there):
            if self._rng.random() < weather.loss:
                return
        copies = 1 + sum(self._rng.random() < weather.double for weather in (here, there))
        for _ in range(copies):
            if len(self._under_way) < QUEUE:
                due = time.monotonic() + self._delay(here) + self._delay(there)
                entry = (due, next(self._number), self._ports[target], packet)
                heapq.heappush(self._under_way, entry)

    def _delay(self, weather):
        if self._rng.random() < weather.early:
            return 0.0
        return max(0.0, weather.delay + self._rng.uniform(-weather.jitter, weather.jitter))


def _plug_in(namespace, address):
    """A device in a namespace; what its kernel sends is read from the descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (NAMESPACES / namespace).open() as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    port = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(port, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), TUN_WITHOUT_HEADER))
    for words in (
        ("address", "add", f"{address}/24", "dev", DEVICE),
        ("link", "set", DEVICE, "up"),
        ("link", "set", "lo", "up"),
    ):
        subprocess.run(["ip", *words], check=True)
    return port


if __name__ == "__main__":
    hosts = dict(word.split("=") for word in sys.argv[2:])
    switch = Switch(int(sys.argv[1]), hosts)
    print(flush=True)
    switch.run()
