"""A device joins a real endpoint: over TLS, with a key of its own, killed wherever it may be."""

import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509

from fleetprune import files
from fleetprune.errors import ConfigError, MissingExtraError, TransportError, TrustError
from fleetprune.join_token import Token
from fleetprune.messages import Joined
from fleetprune_agent import device_key, identity, join, renewal
from fleetprune_agent.config import AgentConfig, load_config
from fleetprune_coordinator.authority import read_request
from tests.access_fleet import Key, join_site, make_fleet


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with join_site(tmp_path_factory.mktemp("fleet")) as site:
        yield site


def serial(pem: str | bytes) -> int:
    data = pem.encode() if isinstance(pem, str) else pem
    return x509.load_pem_x509_certificate(data).serial_number


def test_a_device_joins(site, tmp_path):
    access, url, ca = site
    token = access.make_token("d1", "phone", 60.0)
    done = join.join(url, token, tmp_path / "d", ca_file=ca, fingerprint=None)
    folder = tmp_path / "d"
    assert sorted(p.name for p in folder.iterdir()) == [
        "agent.toml",
        "ca.pem",
        "device.pem",
        "root.json",
    ]
    assert stat.S_IMODE((folder / "device.pem").stat().st_mode) == 0o600
    assert (done.identity.name, done.kept_config) == ("d1", False)
    assert done.identity.not_after - done.identity.not_before == 180 * 86400 + 3600
    with pytest.raises(ConfigError, match=r"agent.toml: data: field required$"):
        load_config(folder / "agent.toml")
    with (folder / "agent.toml").open("a") as file:
        file.write('[data]\nkind = "npz"\npath = "samples.npz"\n')
    config = load_config(folder / "agent.toml")
    assert (config.device, config.device_class, config.fleet) == ("d1", "phone", "f1")
    assert (config.broker.address, config.root) == ("127.0.0.1:8883", folder / "root.json")
    assert config.broker.cert_file == config.broker.key_file == folder / "device.pem"
    assert config.broker.ca_file == folder / "ca.pem"
    assert set(config.model_fields_set) < set(AgentConfig.model_fields)


def test_the_key_never_leaves_the_device(site, tmp_path):
    """Nothing of the key is in what the coordinator has, and the certificate is for it."""
    access, url, ca = site
    token = access.make_token("d2", "phone", 60.0)
    join.join(url, token, tmp_path, ca_file=ca, fingerprint=None)
    pem = (tmp_path / "device.pem").read_text()
    secret = pem.partition("-----BEGIN PRIVATE KEY-----")[2].split("-----")[0].split()
    assert len(secret) == 3
    state = ca.parent.parent
    stored = b"".join(p.read_bytes() for p in state.rglob("*") if p.is_file())
    assert not any(line.encode() in stored for line in secret)


def test_a_fingerprint_is_enough(site, tmp_path):
    access, url, _ = site
    fingerprint = access.authority.fingerprint
    colons = ":".join(fingerprint[i : i + 2] for i in range(0, 64, 2)).upper()
    token = access.make_token("d3", "phone", 60.0)
    done = join.join(f"{url}/", token, tmp_path, ca_file=None, fingerprint=colons)
    assert done.told.device == "d3"
    assert (tmp_path / "ca.pem").read_bytes() == access.authority.pem


def test_nothing_is_told_to_another_authority(site, tmp_path):
    access, url, _ = site
    token = access.make_token("d4", "phone", 60.0)
    other = make_fleet(tmp_path / "other")
    with pytest.raises(TrustError, match=r"^127.0.0.1:\d+ is not of the fleet's authority: "):
        join.join(
            url,
            token,
            tmp_path / "a",
            ca_file=other.state / "access" / "ca.crt",
            fingerprint=None,
        )
    wrong = "0" * 64
    with pytest.raises(TrustError) as e:
        join.join(url, token, tmp_path / "b", ca_file=None, fingerprint=wrong)
    assert str(e.value) == (
        f"the authority of {url[8:]} has fingerprint {access.authority.fingerprint}, "
        f"expected {wrong}: somebody may be in between"
    )
    assert not (tmp_path / "b").exists()
    record = access._book.token(token.split(".")[0])
    assert record is not None
    assert record.used_by is None


@pytest.mark.parametrize(
    ("url", "token", "fingerprint", "message"),
    [
        (
            "https://h",
            "x",
            "0" * 64,
            "the token does not look like one: copy it whole, in one line",
        ),
        (
            "http://h",
            None,
            "0" * 64,
            "'http://h' is not where devices join, expected https://host:port",
        ),
        (
            "https://h:x",
            None,
            "0" * 64,
            "'https://h:x' is not where devices join, expected https://host:port",
        ),
        ("https://h", None, "0", "fingerprint '0', expected a SHA-256: 64 hex digits"),
    ],
)
def test_what_is_no_input(tmp_path, url, token, fingerprint, message):
    token = token or Token("0" * 12, "x" * 32, "d1").text()
    with pytest.raises(ConfigError) as e:
        join.join(url, token, tmp_path, ca_file=None, fingerprint=fingerprint)
    assert str(e.value) == message
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_says_why(site, tmp_path):
    access, url, ca = site
    token = access.make_token("d5", "phone", 60.0)
    access.join(token, Key.new().request("d5"))
    with pytest.raises(TransportError) as e:
        join.join(url, token, tmp_path, ca_file=ca, fingerprint=None)
    assert str(e.value) == (
        f"{url[8:]} does not let us in: the token has been used by another key: "
        "if that was not d5, revoke it"
    )


def test_a_configuration_that_is_there_stays(site, tmp_path):
    access, url, ca = site
    (tmp_path / "agent.toml").write_text("# mine\n")
    token = access.make_token("d6", "phone", 60.0)
    done = join.join(url, token, tmp_path, ca_file=ca, fingerprint=None)
    assert done.kept_config
    assert (tmp_path / "agent.toml").read_text() == "# mine\n"


def test_values_of_an_answer_cannot_break_the_file():
    told = Joined(
        fleet="f1",
        device="d1",
        device_class="phone",
        certificate="",
        ca="",
        root="",
        broker_host='x"\n[evil]\n\\',
        broker_port=1,
    )
    assert 'host = "x\\" [evil] \\\\"\n' in join.configuration(told)


class Killed(BaseException):
    """SIGKILL, for code that only catches exceptions."""


def killed_at(monkeypatch, step):
    """Die at the `step`-th change of the disk (renames and removals), before it is done."""
    count = 0
    replace, unlink = os.replace, Path.unlink

    def dying(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                raise Killed
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(files.os, "replace", dying(replace))
    monkeypatch.setattr(Path, "unlink", dying(unlink))


def test_killed_anywhere_a_device_joins_in_the_end(site, tmp_path, monkeypatch):
    """At each change of the disk: the same token then still lets the same key in."""
    access, url, ca = site
    kills = 0
    for step in range(1, 40):
        name, folder = f"k{step}", tmp_path / str(step)
        token = access.make_token(name, "phone", 60.0)
        with monkeypatch.context() as patch:
            killed_at(patch, step)
            try:
                join.join(url, token, folder, ca_file=ca, fingerprint=None)
                break
            except Killed:
                kills += 1
        done = join.join(url, token, folder, ca_file=ca, fingerprint=None)
        assert done.identity.name == name
        assert len(access._book.certificates(device=name)) == 1
        assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
            "agent.toml",
            "ca.pem",
            "device.pem",
            "root.json",
        ]
    assert kills == 12  # five files are written, each in two steps; one is renamed, one removed


def test_an_answer_that_is_lost_does_not_lock_the_device_out(site, tmp_path, monkeypatch):
    """The coordinator has issued, and dies before it answers."""
    access, url, ca = site
    token = access.make_token("d8", "phone", 60.0)
    with monkeypatch.context() as patch:
        patch.setattr(Joined, "to_bytes", lambda self: 1 / 0)
        with pytest.raises(TransportError, match=r" cannot be reached: "):
            join.join(url, token, tmp_path, ca_file=ca, fingerprint=None)
    (issued,) = access._book.certificates(device="d8")
    join.join(url, token, tmp_path, ca_file=ca, fingerprint=None)
    assert serial((tmp_path / "device.pem").read_bytes()) == int(issued.serial, 16)


def test_after_a_revocation_it_joins_with_a_new_key(site, tmp_path):
    access, url, ca = site
    first = access.make_token("d9", "phone", 60.0)
    join.join(url, first, tmp_path, ca_file=ca, fingerprint=None)
    before = (tmp_path / "device.pem").read_bytes()
    access.revoke("d9", "lent out")
    with pytest.raises(TransportError, match=r" does not let us in: the token is not valid"):
        join.join(url, first, tmp_path, ca_file=ca, fingerprint=None)
    assert (tmp_path / "device.pem").read_bytes() == before
    again = access.make_token("d9", "tablet", 60.0)
    done = join.join(url, again, tmp_path, ca_file=ca, fingerprint=None)
    assert done.told.device_class == "tablet"
    assert (tmp_path / "device.pem").read_bytes() != before


def test_two_devices_with_one_token(site, tmp_path):
    access, url, ca = site
    token = access.make_token("twins", "phone", 60.0)
    ends: list[object] = []

    def run(folder):
        try:
            ends.append(join.join(url, token, folder, ca_file=ca, fingerprint=None))
        except TransportError as e:
            ends.append(str(e))

    threads = [threading.Thread(target=run, args=(tmp_path / n,)) for n in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(e).__name__ for e in ends) == ["Done", "str"]
    assert len(access._book.certificates(device="twins")) == 1


def test_the_command_and_what_it_says(site, tmp_path):
    """In a process of its own, at its most talkative: neither token nor key is ever shown."""
    access, url, _ = site
    token = access.make_token("d10", "phone", 60.0)
    command = [sys.executable, "-c", "from fleetprune.cli import main; main()", "--debug"]
    command += ["agent", "join", url, "--fingerprint", access.authority.fingerprint]
    command += ["--out", str(tmp_path / "d"), "--json"]
    done = subprocess.run(
        command, input=token + "\n", capture_output=True, text=True, check=True, timeout=60
    )
    said = json.loads(done.stdout)
    assert (said["device"], said["config"]) == ("d10", str(tmp_path / "d" / "agent.toml"))
    assert token.split(".")[1] not in " ".join(command) + done.stdout + done.stderr
    assert "PRIVATE" not in done.stdout + done.stderr
    (tmp_path / "token").write_text("not one")
    command[-2:] = [str(tmp_path / "e"), "--token-file", str(tmp_path / "token")]
    command.remove("--debug")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (
        2,
        "fleetprune: the token does not look like one: copy it whole, in one line\n",
    )


# ---- keys


def both_ways(monkeypatch, tool):
    if tool == "openssl":
        if shutil.which("openssl") is None:
            pytest.skip("no openssl here")
    else:
        monkeypatch.setattr(device_key.shutil, "which", lambda name: None)


@pytest.mark.parametrize("tool", ["openssl", "cryptography"])
def test_keys_and_requests_of_either_tool(monkeypatch, tool):
    both_ways(monkeypatch, tool)
    key = device_key.make_key()
    assert key.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert key != device_key.make_key()
    asked = read_request(device_key.make_request(key, "a.b_c-1").decode(), "a.b_c-1")
    again = read_request(device_key.make_request(key, "a.b_c-1").decode(), "a.b_c-1")
    assert asked.digest == again.digest


def test_without_either_tool(monkeypatch, tmp_path):
    monkeypatch.setattr(device_key.shutil, "which", lambda name: None)
    (tmp_path / "cryptography.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'cryptography'\")"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(MissingExtraError) as e:
        device_key.make_key()
    assert str(e.value) == (
        "the device's key needs openssl, which is not installed here: install it, or "
        "pip install 'fleetprune[agent-join]'"
    )


# ---- certificates


def test_reading_a_certificate_by_using_it(site, tmp_path):
    access, url, ca = site
    token = access.make_token("d11", "phone", 60.0)
    join.join(url, token, tmp_path, ca_file=ca, fingerprint=None)
    file = tmp_path / "device.pem"
    read = identity.examine(file, file, ca)
    assert read.name == "d11"
    life = read.not_after - read.not_before
    assert not read.due(read.not_after - life / 3 - 1)
    assert read.due(read.not_after - life / 3 + 1)
    other = make_fleet(tmp_path / "other").state / "access" / "ca.crt"
    with pytest.raises(TrustError, match=r"device.pem: "):
        identity.examine(file, file, other)
    server = ca.parent / "join.crt"
    with pytest.raises(TrustError, match=r"join.crt: .*purpose"):
        identity.examine(server, ca.parent / "join.key", ca)
    with pytest.raises(TrustError, match=r"KEY_VALUES_MISMATCH"):
        identity.examine(file, ca.parent / "join.key", ca)
    with pytest.raises(TrustError):
        identity.examine(ca.parent / "access.db", file, ca)


def test_a_certificate_for_another_key_or_name_is_not_put_in_place(site, tmp_path):
    access, _, ca = site
    mine, other = Key.new(), Key.new()
    token = access.make_token("d12", "phone", 60.0)
    pem = access.join(token, other.request("d12")).certificate
    pending, into = tmp_path / "pending.key", tmp_path / "device.pem"
    pending.write_text(mine.pem())
    with pytest.raises(TrustError):
        renewal.install(pem, pending, into, ca, "d12")
    pending.write_text(other.pem())
    with pytest.raises(TrustError, match=r"^certificate for 'd12', expected 'd13'$"):
        renewal.install(pem, pending, into, ca, "d13")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pending.key"]
    assert renewal.install(pem, pending, into, ca, "d12").name == "d12"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["device.pem"]


def test_a_socket_s_context_knows_the_flag_that_ignores_time():
    """Python has no name for it: OpenSSL's X509_V_FLAG_NO_CHECK_TIME."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_flags |= ssl.VerifyFlags(identity._ANY_TIME)
    assert context.verify_flags & identity._ANY_TIME
