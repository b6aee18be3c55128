"""One MQTT connection that keeps itself up; the only module that imports paho.

What it promises is little, because a broker's promises are worth little: a message may be lost,
doubled or late. Nothing is kept for a peer that is away. Whoever needs an answer asks again, and
what must not be lost lies in an outbox or in the registry.

Three threads: paho's own (sockets; its callbacks only enqueue), a keeper that connects and
reconnects, and a dispatcher that calls `on_up` and `on_message`, where publishing is safe.
"""

import logging
import queue
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from pydantic import Field, model_validator

from fleetprune.config_file import LocalPath, Section
from fleetprune.errors import ConfigError, TransportError
from fleetprune.retry import Backoff
from fleetprune.tls import check_private, client_context, explain, load_certificate

log = logging.getLogger(__name__)

RECONNECT = Backoff(first_s=0.5, most_s=60.0)  # a fleet of 10,000 then knocks 330 times a second
STEADY_S = 10.0  # a connection that held so long starts the back-off anew
CONNECT_S = 5.0  # for TCP and TLS, and again for the broker's CONNACK
INBOX = 512  # messages waiting for the dispatcher: at most 48 MiB of blocks
OUTBOX = 512  # messages handed to paho and not acknowledged by the broker
MAX_PACKET = 256 * 1024  # bytes; blocks take half of it, and paho would buffer 256 MB
IN_FLIGHT = 64  # of these, sent at once: a window for each of several devices
QOS = 1

_REFUSALS = {
    "Bad user name or password": "bad user name or password",
    "Not authorized": "not authorised; check user name, password or certificate",
    "Client identifier not valid": "the client id is not valid",
    "Server unavailable": "the server is unavailable",
    "Unsupported protocol version": "it does not speak this version of MQTT; set protocol",
}


class BrokerSettings(Section):
    """Where the broker is and how to prove who we are."""

    host: str = "127.0.0.1"
    port: int = Field(default=1883, ge=1, le=65535)
    username: str | None = None
    password: str | None = Field(default=None, repr=False)
    password_file: LocalPath | None = None
    """Holds the password instead, so that a configuration can be shown around."""
    ca_file: LocalPath | None = None
    """Certificates to verify the broker with; given: TLS is used."""
    cert_file: LocalPath | None = None
    """The client's certificate, for brokers that require one."""
    key_file: LocalPath | None = None
    protocol: Literal["3.1.1", 5] = "3.1.1"
    """Version of MQTT; nothing here needs 5, but some brokers share subscriptions only there."""
    keepalive_s: int = Field(default=30, ge=5, le=3600)
    """Silence after which a peer counts as gone; some brokers close clients that say 0."""

    @model_validator(mode="after")
    def _complete(self) -> "BrokerSettings":
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together")
        if self.cert_file is not None and self.ca_file is None:
            raise ValueError("cert_file needs ca_file: without it the broker is not verified")
        if self.password is not None and self.password_file is not None:
            raise ValueError("give either password or password_file")
        return self

    def secret(self) -> str | None:
        """The password, from wherever it is.

        Raises:
            ConfigError: Its file cannot be read, or everybody on this machine can read it.
        """
        if self.password_file is None:
            return self.password
        check_private(self.password_file)
        try:
            return self.password_file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"password_file {self.password_file} cannot be read: {e}") from e

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"{self.host}:{self.port}"


class Phase(Enum):
    """What a connection is doing."""

    STOPPED = "stopped"
    CONNECTING = "connecting"
    SUBSCRIBING = "subscribing"
    UP = "up"
    WAITING = "waiting"
    """Lost or refused; the keeper sleeps until the next attempt."""


def packet_size(topic: str, payload: bytes, qos: int = QOS) -> int:
    """Bytes of an MQTT 3.1.1 PUBLISH packet, without TCP and TLS; of MQTT 5 it is one more."""
    return packet_length(topic, len(payload), qos)


def packet_length(topic: str, payload: int, qos: int = QOS) -> int:
    """The same for a payload of so many bytes."""
    rest = 2 + len(topic.encode()) + (2 if qos else 0) + payload
    digits = 1 + (rest >= 1 << 7) + (rest >= 1 << 14) + (rest >= 1 << 21)
    return 1 + digits + rest


class _CountingClient(paho.Client):
    """Counts what goes through the socket, and refuses to read packets of absurd length.

    paho moves every byte, of every packet type, through these two methods, so acknowledgements,
    pings and connects are counted too; a test compares the counts with those of a TCP proxy. Under
    TLS they see the plain text: records add some 25 bytes per write, and handshakes are not seen.
    """

    received = 0
    sent = 0

    def _sock_recv(self, bufsize: int) -> bytes:
        if bufsize > MAX_PACKET:
            raise ConnectionError(f"the broker announced a packet of {bufsize} bytes")
        data = super()._sock_recv(bufsize)
        self.received += len(data)
        return data

    def _sock_send(self, buf: bytes | bytearray) -> int:
        length = super()._sock_send(buf)
        self.sent += length
        return length

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        """Shake hands, and close the socket if that fails, which paho's own method forgets."""
        context = self._ssl_context
        if context is None:
            raise ConnectionError("TLS without a context")
        wrapped = context.wrap_socket(
            tcp_sock, server_hostname=self._host, do_handshake_on_connect=False
        )
        try:
            wrapped.settimeout(self._connect_timeout)
            wrapped.do_handshake()
        except (OSError, ValueError):
            wrapped.close()
            raise
        return wrapped

    @property
    def unacknowledged(self) -> int:
        """Messages of QoS 1 that the broker has not acknowledged."""
        return len(self._out_messages)

    def close_wake_up(self) -> None:
        """Close the pair of sockets that wakes paho's loop: each `loop_start` makes a new one."""
        self._reset_sockets(sockpair_only=True)


class Connection:
    """Keeps a client connected and its subscriptions in place until it is stopped."""

    def __init__(
        self,
        settings: BrokerSettings,
        client_id: str,
        *,
        on_message: Callable[[str, bytes], None],
        on_up: Callable[[], None] = lambda: None,
        will: tuple[str, bytes] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Prepare; nothing is opened before `start`.

        Args:
            settings: The broker.
            client_id: Unique on that broker: a second client of the same id ends this one.
            on_message: Gets topic and unverified payload, in the dispatcher's thread.
            on_up: Called there after each (re)connect, when the subscriptions are in place.
            will: Topic and payload that the broker publishes, retained, when we vanish.
            rng: Jitter of the back-off.

        Raises:
            ConfigError: A certificate or key cannot be loaded.
        """
        self._settings, self._on_message, self._on_up = settings, on_message, on_up
        self._rng = rng or random.Random()  # noqa: S311  (jitter)
        self._filters: list[str] = []
        self._status = "not started"
        self._trouble: str | None = None  # why the last attempt failed; stays while we try again
        self._refusal: str | None = None
        self._phase = Phase.STOPPED
        self._changed = threading.Condition()
        self._outstanding = 0  # messages handed to paho that it has not settled
        self._stopping = threading.Event()
        self._down = threading.Event()
        self._answered = threading.Event()
        self._events: queue.SimpleQueue[Callable[[], None] | tuple[str, bytes]] = (
            queue.SimpleQueue()
        )
        self._threads: list[threading.Thread] = []
        self._tls: ssl.SSLContext | None = None
        self._client = self._make_client(client_id, will)

    def _make_client(self, client_id: str, will: tuple[str, bytes] | None) -> _CountingClient:
        client = _CountingClient(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            # A broker's session is no store; the state is published anew (5: see `_connect_once`).
            clean_session=None if self._settings.protocol == 5 else True,
            protocol=paho.MQTTv5 if self._settings.protocol == 5 else paho.MQTTv311,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_S
        client.max_queued_messages_set(OUTBOX)
        client.max_inflight_messages_set(IN_FLIGHT)
        if self._settings.username is not None:
            client.username_pw_set(self._settings.username, self._settings.secret())
        if self._settings.ca_file is not None:
            self._tls = client_context(
                self._settings.ca_file, self._settings.cert_file, self._settings.key_file
            )
            client.tls_set_context(self._tls)
        if will is not None:
            client.will_set(*will, qos=QOS, retain=True)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        client.on_publish = self._published
        client.on_socket_open = _without_delay
        return client

    @property
    def phase(self) -> Phase:
        """What the connection is doing."""
        return self._phase

    @property
    def status(self) -> str:
        """The same for people, in one line, with the reason if it is not up."""
        return self._status

    @property
    def bytes_sent(self) -> int:
        """Bytes written to the socket since the start, all packets of all connections."""
        return self._client.sent

    @property
    def bytes_received(self) -> int:
        """Bytes read from the socket since the start, all packets of all connections."""
        return self._client.received

    def start(self) -> None:
        """Begin to connect, in the background."""
        if self._threads:
            return
        self._stopping.clear()
        for work in (self._keep, self._dispatch):
            thread = threading.Thread(target=work, name=f"mqtt{work.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Disconnect; returns when no callback runs any more. Not to be called from a callback."""
        self._stopping.set()
        self._down.set()
        self._answered.set()
        self._events.put(lambda: None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._trouble = None
        self._enter(Phase.STOPPED, "stopped")

    def wait_connected(self, timeout: float) -> None:
        """Block until the connection is up and subscribed.

        Raises:
            TransportError: It is not, after `timeout` seconds; says why.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._phase is Phase.UP, timeout):
                raise TransportError(self._status)

    def subscribe(self, filters: Iterable[str]) -> None:
        """Subscribe now, if up, and at each reconnect."""
        new = [f for f in filters if f not in self._filters]
        self._filters.extend(new)
        if new and self._phase is Phase.UP:
            self._client.subscribe([(f, QOS) for f in new])

    def publish(self, topic: str, payload: bytes, *, qos: int = QOS, retain: bool = False) -> bool:
        """Hand a message to the broker.

        Returns:
            Whether it was handed over: False if the connection is not up or the queue is full.
            True does not say that anybody got it.
        """
        if self._phase is not Phase.UP:
            return False
        with self._changed:
            self._outstanding += 1
        code = self._client.publish(topic, payload, qos=qos, retain=retain).rc
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._settle()
        return code == MQTTErrorCode.MQTT_ERR_SUCCESS

    def wait_for_room(self, timeout: float) -> bool:
        """Wait until one more message goes out at once instead of into a queue.

        Returns:
            False: after `timeout` seconds the connection was not up, or `IN_FLIGHT` messages
            were still not written to the socket (QoS 0) or acknowledged by the broker (QoS 1).
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: self._phase is Phase.UP and self._outstanding < IN_FLIGHT, timeout
            )

    def use_certificate(self, file: Path) -> None:
        """Show another certificate from now on: connect anew, if connected.

        Args:
            file: Certificate and key (PEM).

        Raises:
            ConfigError: It cannot be loaded, or there is no TLS; the old one stays.
        """
        if self._tls is None:
            raise ConfigError("a certificate needs ca_file: without it there is no TLS")
        load_certificate(self._tls, file, file)
        self._refusal = f"connecting to broker {self._settings.address} with a new certificate"
        self._down.set()

    # The keeper's thread.

    def _keep(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            self._enter(Phase.CONNECTING, f"connecting to broker {self._settings.address}")
            self._down.clear()
            self._answered.clear()
            reason = self._connect_once()
            if self._stopping.is_set():
                break
            attempt = 0 if time.monotonic() - started > STEADY_S + CONNECT_S else attempt + 1
            self._trouble = reason
            self._enter(Phase.WAITING, reason)
            log.warning("%s", reason)
            self._stopping.wait(RECONNECT.full_jitter(attempt, self._rng))

    def _connect_once(self) -> str:
        """Connect and stay until the connection ends; why it ended."""
        broker = f"broker {self._settings.address}"
        with self._changed:  # of QoS 0 nothing outlives a connection, and paho does not say so
            self._outstanding = self._client.unacknowledged
        try:
            self._client.connect(
                self._settings.host,
                self._settings.port,
                self._settings.keepalive_s,
                **(_version_5() if self._settings.protocol == 5 else {}),
            )
        except (OSError, ValueError) as e:
            return f"{broker} is unreachable: {explain(e, CONNECT_S)}"
        self._client.loop_start()
        try:
            if not self._answered.wait(CONNECT_S):
                return f"{broker} accepts connections but does not answer as MQTT; check the port"
            self._down.wait()
            reason, self._refusal = self._refusal, None
            return reason or f"{broker} dropped the connection"
        finally:
            self._client.disconnect()
            self._client.loop_stop()
            self._client.close_wake_up()

    # Callbacks, in paho's thread: they only note and enqueue.

    def _connected(
        self, _client: paho.Client, _data: Any, _flags: Any, code: ReasonCode, _properties: Any
    ) -> None:
        if code.is_failure:
            reason = _REFUSALS.get(code.getName(), code.getName())
            self._refusal = f"broker {self._settings.address} refused us: {reason}"
            self._down.set()
        else:
            self._events.put(self._subscribe_all)
        self._answered.set()

    def _subscribed(
        self, _client: paho.Client, _data: Any, _mid: int, codes: list[ReasonCode], _props: Any
    ) -> None:
        refused = sum(code.is_failure for code in codes)
        if refused:
            log.error(
                "broker %s refused %d of %d subscriptions; check its access list",
                self._settings.address,
                refused,
                len(codes),
            )
        if self._phase is Phase.SUBSCRIBING:
            self._events.put(self._up)

    def _published(self, *_args: Any) -> None:
        self._settle()

    def _settle(self) -> None:
        with self._changed:
            self._outstanding = max(0, self._outstanding - 1)
            self._changed.notify_all()

    def _disconnected(self, *_args: Any) -> None:
        self._down.set()
        self._answered.set()

    def _received(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        if self._events.qsize() >= INBOX:
            log.warning("%d messages are waiting: one on %s is dropped", INBOX, message.topic)
            return
        self._events.put((message.topic, bytes(message.payload)))

    # The dispatcher's thread.

    def _dispatch(self) -> None:
        while not self._stopping.is_set():
            event = self._events.get()
            try:
                if callable(event):
                    event()
                else:
                    self._on_message(*event)
            except Exception:
                log.exception("a message handler failed; the connection goes on")

    def _subscribe_all(self) -> None:
        if self._down.is_set():
            return
        if not self._filters:
            self._up()
            return
        self._enter(Phase.SUBSCRIBING, f"subscribing at broker {self._settings.address}")
        self._client.subscribe([(f, QOS) for f in self._filters])

    def _up(self) -> None:
        if self._down.is_set():
            return
        self._trouble = None
        self._enter(Phase.UP, f"connected to broker {self._settings.address}")
        log.info("%s", self._status)
        self._on_up()

    def _enter(self, phase: Phase, status: str) -> None:
        with self._changed:
            self._phase, self._status = phase, self._trouble or status
            self._changed.notify_all()


def _without_delay(_client: paho.Client, _data: Any, sock: Any) -> None:
    """Send small packets at once: requests and acknowledgements would wait 40 ms for company."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _version_5() -> dict[str, Any]:
    """What MQTT 5 wants to be told at each connect."""
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = MAX_PACKET
    return {"clean_start": True, "properties": properties}
