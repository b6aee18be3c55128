"""The endpoint strangers can talk to: what it answers, what it bounds, what it never says."""

import http.client
import json
import logging
import socket
import ssl
import time
from contextlib import contextmanager

import pytest

from fleetprune.errors import ConfigError, RegistryError
from fleetprune.messages import Join, Joined
from fleetprune_coordinator import join_server
from fleetprune_coordinator.join_server import (
    FAILURES,
    MAX_BODY,
    WINDOW_S,
    Failures,
    JoinServer,
    newest_root,
    welcome,
)
from tests.access_fleet import Key, make_fleet, opened


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return make_fleet(tmp_path_factory.mktemp("fleet"))


@contextmanager
def serving(fleet, **options):
    access = opened(fleet)
    server = JoinServer(access, welcome(fleet, fleet.join), fleet.join, **options)
    server.start()
    try:
        yield access, server
    finally:
        server.stop()
        access.close()


@pytest.fixture
def running(fleet):
    with serving(fleet) as both:
        yield both


def ask(fleet, port, method, path, body=None, headers=None):
    context = ssl.create_default_context(cafile=fleet.state / "access" / "ca.crt")
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def reason(data):
    return json.loads(data)["reason"]


def test_a_device_joins(fleet, running, caplog):
    access, server = running
    key = Key.new()
    caplog.set_level(logging.DEBUG)
    token = access.make_token("d1", "phone", 60.0)
    asked = Join(token=token, request=key.request("d1"))
    status, data = ask(fleet, server.port, "POST", "/join", asked.to_bytes())
    assert status == 200
    told = Joined.from_bytes(data)
    assert (told.fleet, told.device, told.device_class) == ("f1", "d1", "phone")
    assert (told.broker_host, told.broker_port) == ("127.0.0.1", 8883)
    assert told.ca.encode() == access.authority.pem
    assert told.root == newest_root(fleet.state / "releases")
    assert "device d1 of class phone joined from 127.0.0.1" in caplog.messages
    assert token.split(".")[1] not in caplog.text
    assert repr(asked).count(token) == 0


def test_refusals_say_no_secret(fleet, running, caplog):
    access, server = running
    caplog.set_level(logging.DEBUG)
    token = access.make_token("d2", "phone", 60.0)
    secret = token.split(".")[1]
    bodies = {
        Join(token=token, request=Key.new().request("d3")).to_bytes(): (
            400,
            "certificate request for 'CN=d3', expected 'CN=d2'",
        ),
        Join(token=token.replace(".d2", ".d3"), request=Key.new().request("d3")).to_bytes(): (
            403,
            "the token is not valid (any more): `fleetprune access token` makes a new one",
        ),
        json.dumps({"token": token}).encode(): (400, "Join: request: Field required"),
        f'{{"token": "{token}", '.encode(): None,
    }
    for body, expected in bodies.items():
        status, data = ask(fleet, server.port, "POST", "/join", body)
        if expected is not None:
            assert (status, reason(data)) == expected
        assert status in {400, 403}
        assert secret.encode() not in data
    assert secret not in caplog.text


def test_what_else_is_asked_for(fleet, running):
    access, server = running
    port = server.port
    assert ask(fleet, port, "GET", "/ca") == (200, access.authority.pem)
    assert ask(fleet, port, "GET", "/../ca.key")[0] == 404
    assert ask(fleet, port, "POST", "/ca", b"{}")[0] == 404
    assert ask(fleet, port, "PUT", "/join", b"{}")[0] == 501
    too_long = {"Content-Length": str(MAX_BODY + 1)}
    assert ask(fleet, port, "POST", "/join", headers=too_long)[0] == 413
    assert ask(fleet, port, "POST", "/join", headers={"Content-Length": "-1"})[0] == 411
    assert ask(fleet, port, "POST", "/join", headers={"Content-Length": "9" * 40})[0] == 413
    chunked = {"Transfer-Encoding": "chunked"}
    assert ask(fleet, port, "POST", "/join", headers=chunked)[0] == 411


def test_an_address_that_fails_all_the_time_waits(fleet):
    now = [0.0]
    with serving(fleet, clock=lambda: now[0]) as (access, server):
        for _ in range(FAILURES):
            assert ask(fleet, server.port, "POST", "/join", b"{}")[0] == 400
        key = Key.new()
        token = access.make_token("d4", "phone", 600.0)
        good = Join(token=token, request=key.request("d4")).to_bytes()
        status, data = ask(fleet, server.port, "POST", "/join", good)
        assert (status, reason(data)) == (
            429,
            "too many failures from your address: try again in 60 s",
        )
        now[0] = WINDOW_S
        assert ask(fleet, server.port, "POST", "/join", good)[0] == 200


def test_addresses_are_counted_apart_and_forgotten(monkeypatch):
    monkeypatch.setattr(join_server, "MAX_ADDRESSES", 3)
    failures = Failures()
    for _ in range(FAILURES):
        failures.add("2001:db8::1", 5.0)
        failures.add("192.0.2.1", 5.0)
    assert failures.wait_s("2001:db8::2", 10.0) == 55.0  # another address of the same customer
    assert failures.wait_s("2001:db8:0:1::1", 10.0) == 0.0
    assert failures.wait_s("192.0.2.2", 10.0) == 0.0
    for i in range(3):
        failures.add(f"198.51.100.{i}", 6.0)
    assert failures.wait_s("192.0.2.1", 10.0) == 0.0
    assert len(failures._by_address) == 3


def test_a_silent_peer_holds_up_nobody_and_is_cut(fleet, monkeypatch):
    monkeypatch.setattr(join_server, "WHOLE_S", 0.5)
    with (
        serving(fleet) as (access, server),
        socket.create_connection(("127.0.0.1", server.port)) as silent,
    ):
        assert ask(fleet, server.port, "GET", "/ca") == (200, access.authority.pem)
        silent.settimeout(10)
        assert silent.recv(1) == b""


def test_too_many_at_once_are_turned_away(fleet, monkeypatch):
    monkeypatch.setattr(join_server, "AT_ONCE", 2)
    with serving(fleet) as (_, server):
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        end = time.monotonic() + 10
        while len(server._http._open) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", server.port)) as third:
            third.settimeout(10)
            assert third.recv(1) == b""
        for one in held:
            one.close()


def test_old_tls_is_refused(fleet, running):
    _, server = running
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", server.port)) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw)


def test_a_root_is_there_before_a_token_is_used_up(tmp_path):
    fleet = make_fleet(tmp_path)
    (fleet.state / "releases" / "public" / "metadata" / "1.root.json").unlink()
    with pytest.raises(RegistryError, match=r"^no root.json in .*: `fleetprune coordinator init` "):
        newest_root(fleet.state / "releases")
    with serving(fleet) as (access, server):
        token = access.make_token("d1", "phone", 60.0)
        asked = Join(token=token, request=Key.new().request("d1")).to_bytes()
        status, data = ask(fleet, server.port, "POST", "/join", asked)
        assert (status, reason(data)) == (503, "not now; the coordinator's log says why")
        assert access.devices() == []


def test_the_coordinator_has_the_endpoint_if_told_so(fleet, tmp_path, caplog):
    from fleetprune_coordinator.serve import opened as serve_access  # noqa: PLC0415

    caplog.set_level(logging.INFO)
    with serve_access(fleet) as access:
        port = int(caplog.messages[-1].removeprefix("devices join on port "))
        assert ask(fleet, port, "GET", "/ca") == (200, access.authority.pem)
    with pytest.raises(OSError):
        ask(fleet, port, "GET", "/ca")
    with serve_access(fleet.model_copy(update={"join": None})) as access:
        assert access is not None
        assert len(caplog.messages) == 1
    nowhere = fleet.model_copy(update={"state": tmp_path})
    with (
        pytest.raises(ConfigError, match=r"^join: no authority in .*: `fleetprune access init` "),
        serve_access(nowhere),
    ):
        pass
    with serve_access(nowhere.model_copy(update={"join": None})) as access:
        assert access is None  # whoever the broker lets in takes part


def test_a_port_that_is_taken(fleet, running):
    access, server = running
    taken = fleet.join.model_copy(update={"port": server.port})
    with pytest.raises(ConfigError) as e:
        JoinServer(access, welcome(fleet, taken), taken)
    assert str(e.value) == (
        f"devices cannot join on 127.0.0.1:{server.port}: Address already in use"
    )
