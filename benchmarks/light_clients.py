"""Many MQTT 3.1.1 connections in one process: one thread, one selector, no queues.

A real agent has three threads for its connection and a machine of its own; five hundred of them on
one machine would measure the machine's scheduler. These speak just enough MQTT to be counted as
subscribers by a broker: CONNECT, SUBSCRIBE, PUBLISH in both directions, PUBACK, and PINGREQ.
"""

import selectors
import socket
import struct
from collections.abc import Callable, Sequence

KEEPALIVE_S = 3600
RECEIVE = 256 * 1024  # bytes per read


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("!H", len(data)) + data


def _packet(first: int, body: bytes) -> bytes:
    length, digits = len(body), bytearray()
    while True:
        length, digit = divmod(length, 128)
        digits.append(digit | (128 if length else 0))
        if not length:
            return bytes([first]) + bytes(digits) + body


class LightClient:
    """One connection; `on_message` gets the payload of whatever is published to it."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        address: tuple[str, int],
        name: str,
        topics: Sequence[str],
        on_message: Callable[[bytes], None],
        *,
        qos: int = 1,
    ) -> None:
        self.name, self.on_message, self.ready = name, on_message, False
        self.received = self.sent = 0  # bytes
        self._selector, self._topics, self._qos = selector, topics, qos
        self._in, self._out = bytearray(), bytearray()
        self._socket = socket.create_connection(address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        selector.register(self._socket, selectors.EVENT_READ, self)
        self._send(_packet(0x10, _string("MQTT") + struct.pack("!BBH", 4, 2, KEEPALIVE_S)
                           + _string(name)))  # fmt: skip

    def publish(self, topic: str, payload: bytes) -> None:
        """QoS 0: what is lost is asked for again."""
        self._send(_packet(0x30, _string(topic) + payload))

    def close(self) -> None:
        """Vanish without a word."""
        self._selector.unregister(self._socket)
        self._socket.close()

    def act(self, mask: int) -> None:
        """What the selector has reported."""
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if mask & selectors.EVENT_READ:
            self._read()

    def _send(self, data: bytes) -> None:
        self.sent += len(data)
        self._out += data
        self._flush()

    def _flush(self) -> None:
        try:
            done = self._socket.send(self._out)
        except BlockingIOError:
            done = 0
        del self._out[:done]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
        if self._selector.get_key(self._socket).events != wanted:
            self._selector.modify(self._socket, wanted, self)

    def _read(self) -> None:
        try:
            data = self._socket.recv(RECEIVE)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionError(f"the broker closed the connection of {self.name}")
        self.received += len(data)
        self._in += data
        at = 0
        while (end := self._packet_end(at)) is not None:
            start, stop = end
            self._take(self._in[at], start, stop)
            at = stop
        del self._in[:at]

    def _packet_end(self, at: int) -> tuple[int, int] | None:
        """Where the body of the packet at `at` begins and ends; None: it has not all come."""
        length = shift = 0
        place = at + 1
        while place < len(self._in):
            digit = self._in[place]
            length |= (digit & 127) << shift
            place, shift = place + 1, shift + 7
            if digit < 128:
                return (place, place + length) if place + length <= len(self._in) else None
        return None

    def _take(self, first: int, start: int, stop: int) -> None:
        kind = first >> 4
        if kind == 2:  # CONNACK
            if self._in[start + 1]:
                raise ConnectionError(f"the broker refused {self.name}: {self._in[start + 1]}")
            filters = b"".join(_string(topic) + bytes([self._qos]) for topic in self._topics)
            self._send(_packet(0x82, b"\0\1" + filters))
        elif kind == 9:  # SUBACK
            self.ready = True
        elif kind == 3:  # PUBLISH
            (length,) = struct.unpack_from("!H", self._in, start)
            start += 2 + length
            if first & 0x06:
                self._send(b"\x40\x02" + self._in[start : start + 2])
                start += 2
            with memoryview(self._in) as view:
                payload = bytes(view[start:stop])
            self.on_message(payload)
