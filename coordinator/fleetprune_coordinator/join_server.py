"""The endpoint where devices join: a small HTTPS server, of the standard library's parts.

    GET  /ca     the authority's certificate; a device that knows its fingerprint starts here
    POST /join   `Join` -> `Joined`

It is the one thing here that strangers can talk to, so everything is bounded: bytes, seconds,
requests at once, failures per address. Nothing of a body is ever logged.
"""

import json
import logging
import socket
import ssl
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, Final

from fleetprune.errors import ConfigError, FleetpruneError, HostileInputError, RegistryError
from fleetprune.messages import Join, Joined
from fleetprune_coordinator.access import Access, DeniedError
from fleetprune_coordinator.config import FleetConfig, JoinConfig

log = logging.getLogger(__name__)

MAX_BODY: Final = 16 * 1024  # bytes
QUIET_S: Final = 5.0  # without a byte
WHOLE_S: Final = 20.0  # for a request, however it dribbles
AT_ONCE: Final = 32  # requests; more are turned away
FAILURES: Final = (
    10  # per address and `WINDOW_S`; successes do not count: fleets sit behind one NAT
)
WINDOW_S: Final = 60.0
MAX_ADDRESSES: Final = 10_000  # remembered
MAX_ROOT: Final = 48 * 1024  # bytes; a `Joined` must fit a message


class Failures:
    """How often an address has failed lately. Reads no clock; for any number of threads."""

    def __init__(self) -> None:
        self._by_address: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait_s(self, address: str, now: float) -> float:
        """Seconds until the address may try again; 0: now."""
        with self._lock:
            times = self._by_address.get(_network(address), deque())
            while times and times[0] <= now - WINDOW_S:
                times.popleft()
            return times[0] + WINDOW_S - now if len(times) >= FAILURES else 0.0

    def add(self, address: str, now: float) -> None:
        """It has failed."""
        with self._lock:
            key = _network(address)
            self._by_address.setdefault(key, deque(maxlen=FAILURES)).append(now)
            self._by_address.move_to_end(key)
            if len(self._by_address) > MAX_ADDRESSES:
                self._by_address.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a device that joins is told beside its certificate."""

    fleet: str
    broker_host: str
    broker_port: int
    root: Callable[[], str]
    """The newest TUF root; RegistryError: there is none."""


class JoinServer:
    """Listens from the start; serves in threads of its own."""

    def __init__(
        self,
        access: Access,
        welcome: Welcome,
        settings: JoinConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listen.

        Args:
            access: Decides.
            welcome: What devices are told.
            settings: Where to listen.
            clock: Seconds, for limits.

        Raises:
            ConfigError: The port cannot be had, or the certificate not be loaded.
        """
        folder = access.authority.folder
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(folder / "join.crt", folder / "join.key")
            self._http = _Server((settings.host, settings.port), context)
        except (OSError, OverflowError) as e:
            raise ConfigError(
                f"devices cannot join on {settings.host}:{settings.port}: {e.strerror or e}"
                if isinstance(e, OSError)
                else str(e)
            ) from e
        self._http.answer = _Answers(access, welcome, clock)
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._http.server_address[1])

    def start(self) -> None:
        """Serve, in the background."""
        self._thread = threading.Thread(
            target=self._http.serve_forever, name="join", daemon=True, kwargs={"poll_interval": 0.2}
        )
        self._thread.start()

    def stop(self) -> None:
        """End; requests under way are cut."""
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
        self._http.cut(time.monotonic())
        self._http.server_close()


@dataclass(frozen=True, slots=True)
class _Answers:
    """What is answered, apart from sockets."""

    access: Access
    welcome: Welcome
    clock: Callable[[], float]
    failures: Failures = field(default_factory=Failures)

    def ca(self) -> tuple[HTTPStatus, bytes]:
        return HTTPStatus.OK, self.access.authority.pem

    def join(self, address: str, body: bytes) -> tuple[HTTPStatus, bytes]:
        if (wait := self.failures.wait_s(address, self.clock())) > 0:
            return HTTPStatus.TOO_MANY_REQUESTS, _reason(
                f"too many failures from your address: try again in {wait:.0f} s"
            )
        try:
            asked = Join.from_bytes(body)
            root = self.welcome.root()  # before the token is used up
            admitted = self.access.join(asked.token, asked.request)
        except (DeniedError, HostileInputError) as e:
            self.failures.add(address, self.clock())
            log.warning("join from %s refused: %s", address, e)
            denied = isinstance(e, DeniedError)
            return HTTPStatus.FORBIDDEN if denied else HTTPStatus.BAD_REQUEST, _reason(str(e))
        except FleetpruneError as e:
            log.error("join from %s failed: %s", address, e)  # noqa: TRY400  (one line)
            return HTTPStatus.SERVICE_UNAVAILABLE, _reason(
                "not now; the coordinator's log says why"
            )
        log.info(
            "device %s of class %s joined from %s",
            admitted.device,
            admitted.device_class,
            address,
        )
        answer = Joined(
            fleet=self.welcome.fleet,
            device=admitted.device,
            device_class=admitted.device_class,
            certificate=admitted.certificate,
            ca=self.access.authority.pem.decode(),
            root=root,
            broker_host=self.welcome.broker_host,
            broker_port=self.welcome.broker_port,
        )
        return HTTPStatus.OK, answer.to_bytes()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    answer: _Answers

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext) -> None:
        self._context = context
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without the base class's look-up of our own host name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "", self.server_address[1]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Turn away what would be too much at once."""
        with self._lock:
            if len(self._open) >= AT_ONCE:
                return False
            self._open[request] = time.monotonic()
            return True

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands in the request's own thread: a silent peer holds up nobody else."""
        request.settimeout(QUIET_S)
        # Not detached from `request`, which `cut` knows: TLS works on a copy of the socket.
        with self._context.wrap_socket(request.dup(), server_side=True) as tls:
            _Handler(tls, client_address, self)

    def shutdown_request(self, request: Any) -> None:
        """The base class's, and forget the socket."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called between requests."""
        self.cut(time.monotonic() - WHOLE_S)

    def cut(self, before: float) -> None:
        """End requests that began before a moment."""
        with self._lock:
            for request, began in self._open.items():
                if began <= before:
                    try:
                        request.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        continue  # its peer was faster

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Strangers' broken connections are no errors of ours."""
        log.debug("a connection of %s broke off", client_address[0], exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "Fleetprune", ""
    timeout = QUIET_S

    def do_GET(self) -> None:
        if self.path == "/ca":
            self._send(*self.server.answer.ca(), kind="application/x-pem-file")
        else:
            self._send(HTTPStatus.NOT_FOUND, _reason("expected GET /ca or POST /join"))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/join":
            self._send(HTTPStatus.NOT_FOUND, _reason("expected GET /ca or POST /join"))
        elif not length.isdecimal():
            self._send(HTTPStatus.LENGTH_REQUIRED, _reason("Content-Length is missing"))
        elif len(length) > 9 or int(length) > MAX_BODY:
            self._send(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _reason(f"expected at most {MAX_BODY} bytes")
            )
        else:
            body = self.rfile.read(int(length))
            self._send(*self.server.answer.join(str(self.client_address[0]), body))

    def _send(self, status: HTTPStatus, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """For what is no request; the base class's would repeat it, with what may be a token."""
        self.close_connection = True
        self._send(HTTPStatus(code), _reason(HTTPStatus(code).phrase))

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """The answer, for who looks closely; the request's line may hold a token by mistake."""
        log.debug("%s for %s", code, self.client_address[0])

    def log_message(self, format: str, *args: Any) -> None:
        """What else the base class has to say: time-outs."""
        log.debug("%s: %s", self.client_address[0], format % args)


def newest_root(releases: Path) -> str:
    """The newest root metadata of a release repository; RegistryError: there is none."""
    found = sorted(
        (p for p in (releases / "public" / "metadata").glob("*.root.json")),
        key=lambda p: int(number) if (number := p.name.partition(".")[0]).isdecimal() else -1,
    )
    if not found:
        raise RegistryError(
            f"no root.json in {releases}: `fleetprune coordinator init` makes a release repository"
        )
    data = found[-1].read_bytes()
    if len(data) > MAX_ROOT:
        raise RegistryError(f"{found[-1]} has {len(data)} bytes, expected at most {MAX_ROOT}")
    return data.decode()


def welcome(fleet: FleetConfig, settings: JoinConfig) -> Welcome:
    """What devices of a fleet are told."""
    return Welcome(
        fleet=fleet.fleet,
        broker_host=settings.broker_host or fleet.broker_names[0],
        broker_port=settings.broker_port or fleet.broker.port,
        root=lambda: newest_root(fleet.state / "releases"),
    )


def _reason(text: str) -> bytes:
    return json.dumps({"reason": text}).encode()


def _network(address: str) -> str:
    """An IPv4 address; of IPv6, the network that one customer has."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(ip_network((parsed, 64), strict=False))
    return str(parsed)
