import os
import queue
import random
import signal
import socket
import threading
import time
from contextlib import suppress

import pytest
from pydantic import ValidationError

from fleetprune.errors import ConfigError, TransportError
from fleetprune.local_port import free_port
from fleetprune.mqtt import IN_FLIGHT, BrokerSettings, Connection, Phase, packet_size
from fleetprune_sim.broker import EmbeddedBroker, find_mosquitto
from tests.brokers import BACK_S, broker, restartable  # noqa: F401

WAIT_S = 60.0


class Peer:
    """A connection that keeps what it gets."""

    def __init__(self, settings, name, filters=(), **options):
        self.got: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.ups = 0
        self.connection = Connection(
            settings,
            name,
            on_message=lambda *m: self.got.put(m),
            on_up=self._up,
            rng=random.Random(0),
            **options,
        )
        self.connection.subscribe(filters)

    def _up(self):
        self.ups += 1

    def __enter__(self):
        self.connection.start()
        self.connection.wait_connected(WAIT_S)
        return self

    def __exit__(self, *exc):
        self.connection.stop()


def until(condition, seconds=WAIT_S):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_messages_arrive_with_topic_and_payload(broker):  # noqa: F811
    with Peer(broker.settings, "a", ["t/+"]) as a, Peer(broker.settings, "b") as b:
        assert b.connection.publish("t/x", b"\x00\xff")
        assert a.got.get(timeout=WAIT_S) == ("t/x", b"\x00\xff")
        big = random.Random(0).randbytes(100 * 1024)
        assert b.connection.publish("t/big", big)
        assert a.got.get(timeout=WAIT_S) == ("t/big", big)
        a.connection.subscribe(["later"])
        until(lambda: b.connection.publish("later", b"1") and not a.got.empty())
        assert a.connection.phase is Phase.UP
        assert a.connection.status == f"connected to broker {broker.settings.address}"
    assert a.connection.phase is Phase.STOPPED
    assert a.connection.status == "stopped"
    assert a.connection.publish("t/x", b"") is False


def test_publishing_inside_the_handlers_is_safe(broker):  # noqa: F811
    echoed = threading.Event()

    def on_message(topic, payload):
        if topic == "ping":
            connection.publish("pong", payload)
        else:
            echoed.set()

    connection = Connection(
        broker.settings,
        "echo",
        on_message=on_message,
        on_up=lambda: connection.publish("ping", b"1"),
    )
    connection.subscribe(["ping", "pong"])
    connection.start()
    assert echoed.wait(WAIT_S)
    connection.stop()


def test_a_handler_that_fails_does_not_end_the_connection(broker, caplog):  # noqa: F811
    got = []

    def on_message(topic, payload):
        got.append(payload)
        raise RuntimeError(payload)

    connection = Connection(broker.settings, "fails", on_message=on_message)
    connection.subscribe(["f"])
    connection.start()
    connection.wait_connected(WAIT_S)
    for i in range(2):
        connection.publish("f", bytes([i]))
    until(lambda: len(got) == 2)
    connection.stop()
    assert "a message handler failed; the connection goes on" in caplog.text


def test_will_is_published_when_a_client_vanishes(broker):  # noqa: F811
    with Peer(broker.settings, "watcher", ["state/#"]) as watcher:
        gone = Peer(broker.settings, "gone", will=("state/gone", b"offline"))
        gone.connection.start()
        gone.connection.wait_connected(WAIT_S)
        gone.connection._client._sock.shutdown(socket.SHUT_RDWR)  # a cut cable
        assert watcher.got.get(timeout=WAIT_S) == ("state/gone", b"offline")
        gone.connection.stop()


def test_unreachable_broker_is_named_with_the_reason():
    port = free_port()
    connection = Connection(BrokerSettings(port=port), "x", on_message=lambda *m: None)
    connection._rng.uniform = lambda low, high: 60.0
    connection.start()
    until(lambda: connection.phase is Phase.WAITING)
    with pytest.raises(TransportError) as e:
        connection.wait_connected(0)
    assert str(e.value) == (
        f"broker 127.0.0.1:{port} is unreachable: connection refused; is it running?"
    )
    connection.stop()


def test_unknown_host_is_named():
    settings = BrokerSettings(host="broker.invalid")
    connection = Connection(settings, "x", on_message=lambda *m: None)
    connection.start()
    with pytest.raises(TransportError) as e:
        connection.wait_connected(3)
    assert str(e.value) in (
        "broker broker.invalid:1883 is unreachable: its name is not known; check the host",
        "connecting to broker broker.invalid:1883",  # a resolver that takes its time
    )
    connection.stop()


def test_stop_cancels_the_back_off():
    connection = Connection(BrokerSettings(port=free_port()), "x", on_message=lambda *m: None)
    connection._rng.uniform = lambda low, high: 60.0
    connection.start()
    until(lambda: connection.phase is Phase.WAITING)
    started = time.monotonic()
    connection.stop()
    assert time.monotonic() - started < 30


def test_bad_credentials_are_named(tmp_path):
    if find_mosquitto() is None:
        pytest.skip("needs mosquitto: the embedded broker has no passwords")
    running = EmbeddedBroker(tmp_path)
    command = running._command()
    config = tmp_path / "mosquitto.conf"
    config.write_text(config.read_text().replace("allow_anonymous true", "allow_anonymous false"))
    running._command = lambda: command
    running.start()
    settings = running.settings.model_copy(update={"username": "eve", "password": "guess"})
    connection = Connection(settings, "x", on_message=lambda *m: None)
    connection._rng.uniform = lambda low, high: 60.0
    connection.start()
    until(lambda: connection.phase is Phase.WAITING)
    with pytest.raises(TransportError) as e:
        connection.wait_connected(0)
    assert str(e.value) == (
        f"broker {settings.address} refused us: not authorised; "
        "check user name, password or certificate"
    )
    connection.stop()
    running.kill()


def test_reconnects_and_subscribes_again_after_the_broker_was_killed(restartable):  # noqa: F811
    with Peer(restartable.settings, "a", ["t"]) as a:
        restartable.kill()
        until(lambda: a.connection.phase is Phase.WAITING)
        assert a.connection.publish("t", b"lost") is False
        until(lambda: a.connection.status.startswith("broker 127.0.0.1:"))
        restartable.start()
        a.connection.wait_connected(BACK_S)
        until(lambda: a.ups == 2)
        assert a.connection.publish("t", b"back")
        assert a.got.get(timeout=WAIT_S) == ("t", b"back")


class Proxy:
    """Forwards one TCP connection and counts its bytes."""

    def __init__(self, port):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.target = self.listener.getsockname()[1], port
        self.up = self.down = 0
        self.threads = [threading.Thread(target=self._serve, daemon=True)]
        self.threads[0].start()

    def _serve(self):
        client, _ = self.listener.accept()
        server = socket.create_connection(("127.0.0.1", self.target))
        self.ends = (client, server)
        for source, sink, name in ((client, server, "up"), (server, client, "down")):
            t = threading.Thread(target=self._pump, args=(source, sink, name), daemon=True)
            self.threads.append(t)
            t.start()

    def _pump(self, source, sink, name):
        with suppress(OSError):
            while data := source.recv(65536):
                setattr(self, name, getattr(self, name) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self):
        for t in self.threads:
            t.join(WAIT_S)
        for s in (self.listener, *self.ends):
            s.close()


def test_counted_bytes_are_those_on_the_wire(broker):  # noqa: F811
    proxy = Proxy(broker.settings.port)
    settings = broker.settings.model_copy(update={"port": proxy.port})
    with Peer(settings, "counted", ["c/#"]) as a:
        for i in range(5):
            a.connection.publish(f"c/{i}", bytes(10_000 * i))
        for _ in range(5):
            a.got.get(timeout=WAIT_S)
        until(lambda: not a.connection._client._out_messages)  # the last acknowledgement
    until(lambda: proxy.up == a.connection.bytes_sent)
    assert a.connection.bytes_received == proxy.down
    assert proxy.up > 100_000
    proxy.close()


def test_a_packet_of_absurd_length_ends_the_connection(caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = BrokerSettings(port=server.getsockname()[1])
        connection = Connection(settings, "x", on_message=lambda *m: None)
        connection._rng.uniform = lambda low, high: 60.0
        connection.start()
        client, _ = server.accept()
        with client:
            client.recv(1000)
            client.sendall(bytes.fromhex("20020000") + b"\x30\xff\xff\xff\x7f" + bytes(1000))
            until(lambda: connection.phase is Phase.WAITING)
        assert connection.status.endswith("dropped the connection")
        assert connection.bytes_received < 100
        connection.stop()


@pytest.mark.parametrize(
    ("topic", "payload", "qos", "size"),
    [("t", b"", 0, 5), ("t", b"", 1, 7), ("t", bytes(122), 1, 129), ("t", bytes(123), 1, 131)],
)
def test_packet_size(topic, payload, qos, size):
    assert packet_size(topic, payload, qos) == size


def test_settings_refuse_what_cannot_work(tmp_path):
    with pytest.raises(ValidationError, match=r"cert_file and key_file belong together"):
        BrokerSettings(cert_file=tmp_path / "c", ca_file=tmp_path / "a")
    with pytest.raises(ValidationError, match=r"cert_file needs ca_file"):
        BrokerSettings(cert_file=tmp_path / "c", key_file=tmp_path / "k")
    with pytest.raises(ValidationError, match=r"keepalive_s"):
        BrokerSettings(keepalive_s=0)
    with pytest.raises(ValidationError, match=r"hots"):
        BrokerSettings(hots="x")
    with pytest.raises(ConfigError, match=r"cannot be loaded: No such file or directory"):
        Connection(BrokerSettings(ca_file=tmp_path / "none"), "x", on_message=lambda *m: None)
    assert "secret" not in repr(BrokerSettings(username="u", password="secret"))


def test_either_protocol_meets_the_other(tmp_path):
    if find_mosquitto() is None:
        pytest.skip("needs mosquitto: the embedded broker has one protocol per port")
    running = EmbeddedBroker(tmp_path)
    running.start()
    newer = running.settings.model_copy(update={"protocol": 5})
    with Peer(newer, "a", ["t/+"]) as a, Peer(running.settings, "b", ["u"]) as b:
        assert b.connection.publish("t/x", bytes(100_000))
        assert a.got.get(timeout=WAIT_S) == ("t/x", bytes(100_000))
        assert a.connection.publish("u", b"1", qos=0)
        assert b.got.get(timeout=WAIT_S) == ("u", b"1")
    running.kill()


@pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
def test_reconnects_with_protocol_5(restartable):  # noqa: F811
    settings = restartable.settings.model_copy(update={"protocol": 5})
    with Peer(settings, "a", ["t"]) as a:
        restartable.kill()
        until(lambda: a.connection.phase is Phase.WAITING)
        restartable.start()
        a.connection.wait_connected(BACK_S)
        assert a.connection.publish("t", b"back")
        assert a.got.get(timeout=WAIT_S) == ("t", b"back")


def test_room_ends_where_the_broker_takes_no_more(restartable):  # noqa: F811
    with Peer(restartable.settings, "a") as a:
        assert a.connection.wait_for_room(WAIT_S)
        os.kill(restartable._process.pid, signal.SIGSTOP)
        for qos in (1, 0):
            for _ in range(IN_FLIGHT // 2):
                assert a.connection.wait_for_room(0.1)
                a.connection.publish("t", bytes(250_000), qos=qos)
        assert not a.connection.wait_for_room(0.1)
        os.kill(restartable._process.pid, signal.SIGCONT)
        until(lambda: a.connection._outstanding == 0)
        assert a.connection.wait_for_room(0.0)


def test_what_a_lost_connection_took_along_leaves_room(restartable):  # noqa: F811
    with Peer(restartable.settings, "a") as a:
        os.kill(restartable._process.pid, signal.SIGSTOP)
        for _ in range(IN_FLIGHT + 30):
            a.connection.publish("t", bytes(250_000), qos=0)
        assert not a.connection.wait_for_room(0.1)
        restartable.kill()
        until(lambda: a.connection.phase is Phase.WAITING)
        assert not a.connection.wait_for_room(0.0)
        restartable.start()
        a.connection.wait_connected(BACK_S)
        assert a.connection.wait_for_room(0.0)
