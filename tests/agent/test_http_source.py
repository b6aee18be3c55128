import hashlib
import random
import re
import shutil
import socket
import subprocess
import threading
import time

import pytest
from https_server import HttpsServer, files, response
from pydantic import ValidationError

from fleetprune.blocks import NotFoundError
from fleetprune.errors import ConfigError, TransportError, TrustError, WireError
from fleetprune.local_port import free_port
from fleetprune.partfile import PartFile
from fleetprune_agent.http_source import HttpSource, HttpsSettings
from fleetprune_agent.pacing import Limit
from fleetprune_agent.parts import Parts
from tests.certificates import certify

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
BS = 1000
DATA = random.Random(6).randbytes(10 * BS + 17)
SHA = hashlib.sha256(DATA).hexdigest()
NAME = f"targets/releases/{SHA}.model.onnx"
TARGET = (len(DATA), SHA)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    certify(folder, "ca")
    certify(folder, "server", san="IP:127.0.0.1")
    certify(folder, "d1")
    return folder


def part_file(folder):
    return PartFile(folder / "parts" / f"{SHA}.part", len(DATA), bytes.fromhex(SHA), BS)


class Fixture:
    def __init__(self, certificates, folder):
        self.certificates, self.folder, self.servers, self.sources = certificates, folder, [], []
        self.parts = Parts(folder / "parts", BS)
        self.answer = files({NAME: DATA, "metadata/timestamp.json": b"{}", "targets/none": b""})

    def serve(self, answer=None, **options):
        server = HttpsServer(self.certificates, answer or self.answer)
        self.servers.append(server)
        return server, self.source(server.url, **options)

    def source(self, url, *, timeout_s=5.0, ca="ca", **options):
        settings = HttpsSettings(
            url=url, ca_file=self.certificates / f"{ca}.crt", timeout_s=timeout_s
        )
        self.sources.append(HttpSource(settings, self.parts, **options))
        return self.sources[-1]

    def part(self):
        return part_file(self.folder)

    def pull(self, source):
        source.pull(NAME, *TARGET, self.folder / "out")
        assert (self.folder / "out").read_bytes() == DATA


@pytest.fixture
def fixture(certificates, tmp_path):
    made = Fixture(certificates, tmp_path)
    yield made
    for end in (*made.sources, *made.servers):
        end.close()


def test_small_and_large_files_come_over_one_connection(fixture):
    server, source = fixture.serve()
    assert source.read("metadata/timestamp.json", 2) == b"{}"
    assert source.read("targets/none", 0) == b""
    source.pull(NAME, *TARGET, fixture.folder / "out")
    with pytest.raises(NotFoundError, match=r"^release server 127.0.0.1:\d+ has no metadata/2.r"):
        source.read("metadata/2.root.json", 100)
    assert (fixture.folder / "out").read_bytes() == DATA
    assert [path for path, _ in server.asked[:3]] == [
        "/f/metadata/timestamp.json", "/f/targets/none", f"/f/{NAME}"
    ]  # fmt: skip
    assert server.connections == 1
    assert source.bytes_received == 2 + len(DATA)
    assert (source.traffic_up, source.traffic_down) == (server.received, server.sent)
    assert source.traffic_down > source.bytes_received


def test_only_what_is_missing_is_asked_for(fixture):
    with PartFile(
        fixture.folder / "parts" / f"{SHA}.part", *TARGET[:1], bytes.fromhex(SHA), BS
    ) as p:
        for i in (0, 1, 5, 10):
            p.write(i, DATA[i * BS : (i + 1) * BS])
    server, source = fixture.serve()
    fixture.pull(source)
    assert [span for _, span in server.asked] == ["bytes=2000-4999", "bytes=6000-9999"]
    assert source.bytes_received == 7 * BS


def test_a_server_without_ranges_sends_all_once(fixture):
    with PartFile(
        fixture.folder / "parts" / f"{SHA}.part", *TARGET[:1], bytes.fromhex(SHA), BS
    ) as p:
        p.write(3, DATA[3 * BS : 4 * BS])
    server, source = fixture.serve(lambda path, headers: response("200 OK", DATA))
    fixture.pull(source)
    assert len(server.asked) == 1


def test_a_connection_that_breaks_is_resumed_where_it_broke(fixture):
    def broken(path, headers):
        head, body = fixture.answer(path, headers)
        return [head, body[:4500], None]

    server, source = fixture.serve(broken)
    with pytest.raises(TransportError, match=r": \S+ ended after 4500 of 10017 bytes$"):
        fixture.pull(source)
    server.answer = fixture.answer
    fixture.pull(source)
    assert [span for _, span in server.asked] == [None, "bytes=4000-10016"]


def test_a_connection_that_the_server_closed_is_opened_again(fixture):
    server, source = fixture.serve(lambda p, h: [*fixture.answer(p, h), None])
    for _ in range(2):
        assert source.read("metadata/timestamp.json", 2) == b"{}"
    assert server.connections == 2


def test_other_bytes_leave_nothing(fixture):
    _, source = fixture.serve(files({NAME: DATA[::-1]}))
    with pytest.raises(TrustError, match=f"^{NAME}: out has SHA-256 [0-9a-f]*, expected {SHA}$"):
        fixture.pull(source)
    assert list((fixture.folder / "parts").iterdir()) == []


def test_what_an_earlier_road_spoilt_is_fetched_again(fixture):
    with PartFile(
        fixture.folder / "parts" / f"{SHA}.part", *TARGET[:1], bytes.fromhex(SHA), BS
    ) as p:
        p.write(0, bytes(BS))
    server, source = fixture.serve()
    fixture.pull(source)
    assert [span for _, span in server.asked] == ["bytes=1000-10016", None]


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (response("503 Service Unavailable"), TransportError, r"answers 503 Service Unavailable"),
        (response("403 Forbidden"), TransportError, r"answers 403 Forbidden to targets"),
        (
            response("302 Found", Location="https://evil.example/"),
            TransportError,
            r"redirects \S+ to 'https://evil.example/', which is not followed; check https.url$",
        ),
        (response("200 OK", DATA[1:]), WireError, r": 10016 bytes come, expected 10017$"),
        (response("200 OK", DATA + b"x"), WireError, r": 10018 bytes come, expected 10017$"),
        (
            response("206 Partial Content", DATA, Content_Range="bytes 0-1/2"),
            WireError,
            r": status 206, expected 200|got range",
        ),
        (response("204 No Content"), TransportError, r"answers 204"),
        (response("200 OK", DATA, Content_Encoding="br"), WireError, r"comes compressed \('br'\)"),
        ([b"HTTP/1.1 200 OK\r\n\r\n", DATA, None], WireError, r"comes without its length$"),
        (
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"ffffffff\r\n"],
            WireError,
            r"comes without its length$",
        ),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", None], WireError, r"without its len"),
        ([b"SSH-2.0-OpenSSH\r\n", None], TransportError, r"^release server \S+ failed: "),
        ([b"HTTP/1.1 200 OK\r\nX: " + bytes(70_000), None], TransportError, r"^release server"),
        ([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200, None], TransportError, r"^release server"),
        ([None], TransportError, r"^release server \S+ failed: "),
    ],
)  # fmt: skip
def test_answers_that_are_not_used(fixture, answer, error, says):
    _, source = fixture.serve(lambda path, headers: answer)
    with pytest.raises(error, match=says):
        fixture.pull(source)
    assert not (fixture.folder / "out").exists()


def test_a_wrong_range_is_refused(fixture):
    with PartFile(
        fixture.folder / "parts" / f"{SHA}.part", *TARGET[:1], bytes.fromhex(SHA), BS
    ) as p:
        p.write(0, DATA[:BS])

    def shifted(path, headers):
        return response("206 Partial Content", DATA[BS:], Content_Range="bytes 0-9016/10017")

    _, source = fixture.serve(shifted)
    with pytest.raises(
        WireError, match=r"got range 'bytes 0-9016/10017', expected 'bytes 1000-10016/10017'$"
    ):
        fixture.pull(source)


def test_a_small_file_that_is_too_long_is_not_read(fixture):
    _, source = fixture.serve()
    with pytest.raises(WireError, match=r"has 10017 bytes, expected at most 10016$"):
        source.read(NAME, len(DATA) - 1)
    with pytest.raises(WireError, match=r"^name '../keys' is not a plain relative path$"):
        source.read("../keys", 10)


def drip(pieces):
    for piece in pieces:
        time.sleep(0.05)
        yield piece


@pytest.mark.parametrize(
    "answer",
    [
        lambda path, headers: drip(b"HTTP/1.1 200 OK\r\n%c" % c for c in b"a" * 1000),
        lambda path, headers: drip(
            [b"HTTP/1.1 200 OK\r\nContent-Length: 10017\r\n\r\n", *[b"x"] * 1000]
        ),
    ],
)
def test_a_server_that_drips_is_left(fixture, answer):
    _, source = fixture.serve(answer, patience_s=0.4)
    with pytest.raises(TransportError, match=r"(answers|comes) too slowly: "):
        fixture.pull(source)


def test_a_handshake_that_drips_is_left(fixture):
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = fixture.source(
            f"https://127.0.0.1:{server.getsockname()[1]}/f", timeout_s=60.0, patience_s=0.3
        )
        with pytest.raises(TransportError, match=r"answers too slowly: nothing whole in 0.3 s$"):
            source.read(NAME, 10)


def test_a_silent_server_times_out(fixture):
    _, source = fixture.serve(lambda path, headers: drip([b""] * 10), timeout_s=0.2)
    with pytest.raises(TransportError, match=r"failed: no answer within 0.2 s; is a firewall"):
        source.read(NAME, 10)


def test_whom_we_do_not_believe(fixture, certificates):
    certify(certificates, "other", ca="other")
    server, _ = fixture.serve()
    for url, ca, says in (
        (server.url, "other", r"its certificate does not verify: .*; check ca_file and host$"),
        (server.url.replace("127.0.0.1", "localhost"), "ca", r"does not verify: Hostname mismatch"),
    ):
        with pytest.raises(TransportError, match=says):
            fixture.source(url, ca=ca).read(NAME, 10)
    assert server.asked == []


def test_a_transfer_can_be_stopped(fixture):
    abort = threading.Event()

    def slow(path, headers):
        head, body = fixture.answer(path, headers)
        yield head
        yield body[:2500]
        abort.set()
        yield body[2500:2600]
        time.sleep(0.3)

    _, source = fixture.serve(slow, abort=abort)
    with pytest.raises(TransportError, match=rf"^transfer of {NAME} was stopped$"):
        fixture.pull(source)


def test_a_limit_is_kept(fixture):
    now, spent = [0.0], []
    limit = Limit(1024, lambda: now[0])
    spend = limit.spend
    limit.spend = lambda size: (spent.append(size), spend(size))
    _, source = fixture.serve(limit=limit)
    source._abort.wait = lambda seconds: now.__setitem__(0, now[0] + seconds)
    fixture.pull(source)
    assert sum(spent) == len(DATA)
    assert now[0] == pytest.approx(len(DATA) / 1024)


@pytest.mark.parametrize(
    "url",
    ["http://h/f", "https:///f", "https://u@h/f", "https://h?x", "https://h:99999", "ftp://h", ""],
)  # fmt: skip
def test_settings_refuse_what_cannot_be_meant(url):
    with pytest.raises(ValidationError, match=r"expected https://host/path"):
        HttpsSettings(url=url)


def test_settings_refuse_half_a_certificate(tmp_path):
    with pytest.raises(ValidationError, match=r"cert_file and key_file belong together"):
        HttpsSettings(url="https://h", cert_file=tmp_path / "c")
    with pytest.raises(ConfigError, match=r"cannot be loaded: No such file or directory$"):
        HttpSource(HttpsSettings(url="https://h", ca_file=tmp_path / "c"), Parts(tmp_path / "p"))


NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@pytest.mark.skipif(NGINX is None, reason="needs nginx")
@pytest.mark.parametrize("mutual", [False, True], ids=["open", "client certificates"])
def test_the_configuration_in_deploy_serves_releases_and_nothing_else(
    certificates, tmp_path, request, mutual
):
    public = tmp_path / "releases" / "public"
    (public / "metadata").mkdir(parents=True)
    (public / NAME).parent.mkdir(parents=True)
    (public / NAME).write_bytes(DATA)
    (public / "metadata" / "timestamp.json").write_bytes(b"{}")
    (tmp_path / "releases" / "keys.pem").write_bytes(b"secret")
    tmp_path.chmod(0o755)
    port = free_port()
    text = (request.config.rootpath / "deploy" / "nginx" / "fleetprune.conf").read_text()
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/nginx/certs/releases", str(certificates / "server")),
        ("/etc/nginx/certs/ca.crt", str(certificates / "ca.crt")),
        ("/var/lib/fleetprune/state/releases/public", str(public)),
    ):
        assert old in text
        text = text.replace(old, new)
    if mutual:
        text = re.sub(r"# (ssl_client_certificate|ssl_verify_client)", r"\1", text)
    places = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off;\nuser root;\npid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log {tmp_path}/access.log;\n{places}{text}}}\n"
    )
    process = subprocess.Popen([NGINX, "-c", str(config), "-e", str(tmp_path / "error.log")])
    try:
        until_listening(port)
        url = f"https://127.0.0.1:{port}/fleet1"
        own = {"cert_file": certificates / "d1.crt", "key_file": certificates / "d1.key"}
        known = HttpsSettings(url=url, ca_file=certificates / "ca.crt", **own)
        source = HttpSource(known, Parts(tmp_path / "parts", BS))
        assert source.read("metadata/timestamp.json", 2) == b"{}"
        with part_file(tmp_path) as part:
            part.write(4, DATA[4 * BS : 5 * BS])
        source.pull(NAME, *TARGET, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == DATA
        assert source.bytes_received == 2 + len(DATA) - BS
        for name in ("keys.pem", "metadata/none.json", "metadata"):
            with pytest.raises(TransportError, match=r"has no|redirects|answers 403"):
                source.read(name, 100)
        source.close()
        if mutual:
            unknown = HttpsSettings(url=url, ca_file=certificates / "ca.crt")
            with pytest.raises(TransportError, match=r"answers 400|TLS failed"):
                HttpSource(unknown, Parts(tmp_path / "p")).read("metadata/timestamp.json", 2)
    finally:
        process.terminate()
        process.wait()


def until_listening(port):
    end = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < end, "nginx does not start"
            time.sleep(0.02)
        else:
            return
