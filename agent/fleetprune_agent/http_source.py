"""The release repository over HTTPS: static files, any web server or mirror of the public folder.

Nothing that comes is believed: bodies are counted against what was asked for, redirects are not
followed, compressed and endless bodies are refused, and a server that dribbles is left when a block
takes longer than one over MQTT may. What came stays in the part files that all roads share.
"""

import http.client
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from fleetprune.blocks import NotFoundError, check_name
from fleetprune.config_file import LocalPath, Section
from fleetprune.errors import TransportError, WireError
from fleetprune.partfile import PartFile
from fleetprune.tls import client_context, explain
from fleetprune_agent.pacing import Limit
from fleetprune_agent.parts import Parts

log = logging.getLogger(__name__)

CHUNK: Final = 16 * 1024  # bytes per read: the largest TLS record
PATIENCE_S: Final = 120.0  # for one block, or all of a small file, however steadily it drips
IDLE_S: Final = 10.0  # an idle connection is closed after it: servers close theirs soon, too
_GONE: Final = (http.client.HTTPException, OSError, ValueError)


class HttpsSettings(Section):
    """Where the release repository lies as static files."""

    url: str
    """Of the folder that holds `metadata` and `targets`, as in `https://host/fleet1`."""
    ca_file: LocalPath | None = None
    """Certificates to verify the server with; None: those that the system believes."""
    cert_file: LocalPath | None = None
    """The device's certificate, for servers that require one."""
    key_file: LocalPath | None = None
    first: bool = False
    """Whether releases come this way first, and over MQTT where this one fails."""
    timeout_s: float = Field(default=20.0, ge=0.1, le=600)
    """Seconds of silence after which the server counts as gone."""

    @field_validator("url")
    @classmethod
    def _https(cls, url: str) -> str:
        parts = urlsplit(url)
        try:
            good = parts.scheme == "https" and parts.hostname and parts.port != 0
        except ValueError:
            good = False
        if not good or parts.query or parts.fragment or parts.username is not None:
            raise ValueError("expected https://host/path, without user, query and fragment")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _complete(self) -> "HttpsSettings":
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together")
        return self


class HttpSource:
    """A `trust.BlobSource` over HTTPS; one request at a time, over one connection kept open."""

    def __init__(
        self,
        settings: HttpsSettings,
        parts: Parts,
        clock: Callable[[], float] = time.monotonic,
        *,
        patience_s: float = PATIENCE_S,
        abort: threading.Event | None = None,
        limit: Limit | None = None,
    ) -> None:
        """Prepare; nothing is opened.

        Args:
            settings: The server.
            parts: Interrupted pulls.
            clock: Monotonic seconds.
            patience_s: For one block, or all of a small file.
            abort: When set, the transfer that runs and later ones raise TransportError.
            limit: How fast it may go.

        Raises:
            ConfigError: A certificate or key cannot be loaded.
        """
        url = urlsplit(settings.url)
        self._host, self._port, self._base = url.hostname or "", url.port or 443, url.path
        self._where = f"release server {self._host}:{self._port}"
        self._parts, self._clock, self._timeout = parts, clock, settings.timeout_s
        self._patience, self._abort = patience_s, abort or threading.Event()
        self._limit = limit or Limit(None, clock)
        self._context = client_context(settings.ca_file, settings.cert_file, settings.key_file)
        self._context.sslsocket_class = _CountedSocket
        self._connection: http.client.HTTPSConnection | None = None
        self._used_at = 0.0
        self._lock = threading.Lock()
        self.bytes_received = 0
        """Bytes of bodies since the start, without headers and TLS."""
        self.traffic_up, self.traffic_down = 0, 0
        """Bytes since the start with headers, without TLS: as the MQTT connection counts."""

    def close(self) -> None:
        """Close the connection; the next request opens one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def read(self, name: str, max_bytes: int) -> bytes:
        """See `BlobSource`."""
        with self._asked(name, None) as answer:
            length = _length(name, answer)
            if length > max_bytes:
                raise WireError(f"{name} has {length} bytes, expected at most {max_bytes}")
            content = b"".join(self._body(name, answer, length, length))
        self._used_at = self._clock()
        return content

    def pull(self, name: str, size: int, sha256: str, into: Path) -> None:
        """See `BlobSource`; what has come, over this road or another, is not fetched again."""

        def fetch(part: PartFile) -> None:
            for first, last in _runs(part.missing()):
                self._fetch(name, part, first, last)

        self._parts.fill(name, size, sha256, into, fetch)

    def _fetch(self, name: str, part: PartFile, first: int, last: int) -> None:
        """Blocks `first` to `last`, all missing, in one request."""
        start = first * part.block_size
        end = min((last + 1) * part.block_size, part.size)
        if part.complete:  # by a server that sent more than was asked for
            return
        whole = end - start == part.size
        with self._asked(name, None if whole else (start, end)) as answer:
            if answer.status == http.client.PARTIAL_CONTENT and not whole:
                expected = f"bytes {start}-{end - 1}/{part.size}"
                if answer.getheader("Content-Range", "") != expected:
                    raise WireError(
                        f"{name}: got range {answer.getheader('Content-Range')!r:.80}, "
                        f"expected {expected!r}"
                    )
            elif answer.status == http.client.OK:
                start, end = 0, part.size  # it knows no ranges
            else:
                raise WireError(f"{name}: status {answer.status}, expected 200 or 206")
            length = _length(name, answer)
            if length != end - start:
                raise WireError(f"{name}: {length} bytes come, expected {end - start}")
            index = start // part.block_size
            for block in self._body(name, answer, length, part.block_size):
                part.write(index, block)
                index += 1
            if not length:  # an empty file is one empty block
                part.write(0, b"")
        self._used_at = self._clock()

    def _body(
        self, name: str, answer: http.client.HTTPResponse, length: int, block: int
    ) -> Iterator[bytes]:
        """The body in blocks; TransportError if one takes longer than the patience."""
        left = length
        while left:
            data, due = bytearray(), self._clock() + self._patience
            while len(data) < min(block, left):
                self._check_abort(name)
                chunk = answer.read1(min(CHUNK, min(block, left) - len(data)))
                if not chunk:
                    raise TransportError(
                        f"{self._where}: {name} ended after {length - left + len(data)} "
                        f"of {length} bytes"
                    )
                data += chunk
                self.bytes_received += len(chunk)
                self._limit.spend(len(chunk))
                held = self._limit.wait_s()
                due += held
                self._abort.wait(held) if held else None
                if self._clock() > due:
                    raise TransportError(
                        f"{self._where}: {name} comes too slowly: "
                        f"{len(data)} bytes in {self._patience:g} s"
                    )
            left -= len(data)
            yield bytes(data)
        answer.read()  # nothing is left, and the connection can be used again

    @contextmanager
    def _asked(self, name: str, span: tuple[int, int] | None) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request whose body is to be read; errors become ours.

        A connection of which not all was read is closed.
        """
        path = f"{self._base}/{check_name(name)}"
        headers = {"Accept-Encoding": "identity", "User-Agent": "fleetprune"}
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        with self._lock:
            try:
                answer = self._send(name, path, headers)
                self._judge(name, answer)
                yield answer
            except _GONE as e:
                self.close()
                self._check_abort(name)
                raise TransportError(f"{self._where} failed: {explain(e, self._timeout)}") from e
            except BaseException:
                self.close()
                raise
            if not answer.isclosed() or answer.will_close:
                self.close()

    def _send(self, name: str, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """Ask, over a new connection if the old one is idle for long or was closed."""
        if self._clock() - self._used_at > IDLE_S:
            self.close()
        if self._connection is not None:
            try:
                return self._exchange(self._connection, name, path, headers)
            except _GONE:
                self.close()
        self._connection = http.client.HTTPSConnection(
            self._host, self._port, timeout=self._timeout, context=self._context
        )
        return self._exchange(self._connection, name, path, headers)

    def _exchange(
        self,
        connection: http.client.HTTPSConnection,
        name: str,
        path: str,
        headers: dict[str, str],
    ) -> http.client.HTTPResponse:
        """Handshake, status and headers; what drips for longer than the patience is cut off."""
        self._check_abort(name)
        new = connection.sock is None
        sock = self._open() if new else connection.sock
        connection.sock = sock
        slow = f"{self._where} answers too slowly: nothing whole in {self._patience:g} s"
        with _cut_after(self._patience, sock, slow):
            if new:
                sock.do_handshake()
            connection.request("GET", path, headers=headers)
            return connection.getresponse()

    def _open(self) -> ssl.SSLSocket:
        """A TCP connection that is to become a TLS one."""
        raw = socket.create_connection((self._host, self._port), timeout=self._timeout)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wrapped = self._context.wrap_socket(
                raw, server_hostname=self._host, do_handshake_on_connect=False
            )
        except (OSError, ValueError):
            raw.close()
            raise
        cast("_CountedSocket", wrapped).count = self._count
        return wrapped

    def _count(self, up: int, down: int) -> None:
        self.traffic_up += up
        self.traffic_down += down

    def _judge(self, name: str, answer: http.client.HTTPResponse) -> None:
        status = answer.status
        if status in (http.client.NOT_FOUND, http.client.GONE):
            raise NotFoundError(f"{self._where} has no {name}")
        if 300 <= status < 400:
            place = (answer.getheader("Location") or "nowhere")[:80]
            raise TransportError(
                f"{self._where} redirects {name} to {place!r}, which is not followed; "
                "check https.url"
            )
        if status not in (http.client.OK, http.client.PARTIAL_CONTENT):
            raise TransportError(f"{self._where} answers {status} {answer.reason[:40]} to {name}")
        coding = answer.getheader("Content-Encoding", "identity")
        if coding != "identity":
            raise WireError(f"{name} comes compressed ({coding[:20]!r}), which was not asked for")

    def _check_abort(self, name: str) -> None:
        if self._abort.is_set():
            raise TransportError(f"transfer of {name} was stopped")


class _CountedSocket(ssl.SSLSocket):
    """Tells how many bytes of plain text go through these two, which all others use."""

    count: Callable[[int, int], None]

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """The base class's: bytes, or with a buffer their number."""
        got = super().read(len, buffer)
        self.count(0, got if isinstance(got, int) else memoryview(got).nbytes)
        return got

    def send(self, data: Any, flags: int = 0) -> int:
        """The base class's."""
        sent = super().send(data, flags)
        self.count(sent, 0)
        return sent


@contextmanager
def _cut_after(seconds: float, sock: ssl.SSLSocket, slow: str) -> Iterator[None]:
    """Shut `sock` down if this lasts longer: a socket's own timeout is one of each byte.

    Raises:
        TransportError: It did; says `slow`.
    """
    late = threading.Event()

    def cut() -> None:
        late.set()
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    watch = threading.Timer(seconds, cut)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
        if late.is_set():
            raise TransportError(slow)


def _length(name: str, answer: http.client.HTTPResponse) -> int:
    if answer.length is None:  # chunked, or until the connection ends
        raise WireError(f"{name} comes without its length")
    return answer.length


def _runs(indices: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours in rising indices."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs
