"""A TLS server that answers as a test tells it to, byte by byte."""

import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class HttpsServer:
    """Calls `answer(path, headers)` per request; it returns the raw pieces of the response."""

    def __init__(self, folder: Path, answer: Callable[[str, dict[str, str]], object]) -> None:
        self.answer, self.asked, self.connections = answer, [], 0
        self.received = self.sent = 0  # bytes of plain text
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.crt", folder / "server.key")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}/f"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._open: list[socket.socket] = []
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(raw,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, raw: socket.socket) -> None:
        with suppress(OSError), raw, self._context.wrap_socket(raw, server_side=True) as client:
            self._open.append(client)
            with client.makefile("rb") as lines:
                while line := lines.readline():
                    self.received += len(line)
                    path, headers = line.split()[1].decode(), {}
                    while (line := lines.readline()) not in (b"\r\n", b""):
                        self.received += len(line)
                        key, _, value = line.decode().partition(":")
                        headers[key.lower()] = value.strip()
                    self.received += len(line)
                    self.asked.append((path, headers.get("range")))
                    for piece in self.answer(path, headers):
                        if piece is None:
                            return
                        self.sent += len(piece)  # before somebody has it and looks
                        client.sendall(piece)


def response(status: str, body: bytes = b"", **headers: str) -> list[bytes]:
    """A whole response; headers with `_` for `-`."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{key.replace('_', '-')}: {value}" for key, value in headers.items()]
    return ["\r\n".join(lines).encode() + b"\r\n\r\n", body]


def files(contents: dict[str, bytes]) -> Callable[[str, dict[str, str]], list[bytes]]:
    """A static server that knows ranges."""

    def answer(path: str, headers: dict[str, str]) -> list[bytes]:
        data = contents.get(path.removeprefix("/f/"))
        if data is None:
            return response("404 Not Found")
        if "range" not in headers:
            return response("200 OK", data)
        start, end = map(int, headers["range"].removeprefix("bytes=").split("-"))
        span = f"bytes {start}-{end}/{len(data)}"
        return response("206 Partial Content", data[start : end + 1], Content_Range=span)

    return answer
