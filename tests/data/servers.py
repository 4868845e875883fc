"""Servers on the loopback interface that fail as told: files of a folder over HTTP, and S3 (moto behind a proxy)."""

from __future__ import annotations

import http.client
import http.server
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What happens to one request. `kind`: an HTTP status, or reset, truncate or stall in the middle of the body."""

    kind: int | str
    retry_after: str | None = None
    method: str = "GET"


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder, with ranges unless told otherwise, or passes everything on to another server.

    `faults` befall the next requests of their method for a file, one each; `always` befalls every one.
    """

    daemon_threads = True

    def __init__(self, folder: Path | None = None, upstream: tuple[str, int] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.upstream = folder, upstream
        self.ranges = True
        self.sizes = True
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.requests: list[tuple[str, str, str | None]] = []
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, method: str) -> Fault | None:
        if self.always is not None:
            return self.always
        if self.faults and self.faults[0].method == method:
            return self.faults.pop(0)
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is none of our business."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        fault = None if "list-type" in self.path else self.server.next_fault(self.command)
        if fault is not None and isinstance(fault.kind, int):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(fault.kind)
            self.send_header("Content-Length", "0")
            if fault.retry_after is not None:
                self.send_header("Retry-After", fault.retry_after)
            self.end_headers()
            return
        status, headers, body = self._forwarded() if self.server.upstream else self._from_folder()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None:
            self.wfile.write(body)
        else:
            self._break(fault, body)
        if fault is not None or "Content-Length" not in headers:
            self.close_connection = True

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _break(self, fault: Fault, body: bytes) -> None:
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault.kind == "stall":
            self.server.stopped.wait(20)

    def _from_folder(self) -> tuple[int, dict[str, str], bytes]:
        assert self.server.folder is not None
        path = self.server.folder / self.path.lstrip("/").split("?")[0]
        if path.is_dir():
            body = "".join(f'<a href="{entry.name}">{entry.name}</a>\n' for entry in sorted(path.iterdir())).encode()
            return 200, {"Content-Length": str(len(body)), "Content-Type": "text/html"}, body
        if not path.is_file():
            return 404, {"Content-Length": "0"}, b""
        body, headers, status = path.read_bytes(), {}, 200
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges:
            begin, end = wanted.removeprefix("bytes=").split("-")
            headers["Content-Range"] = f"bytes {begin}-{min(int(end), len(body) - 1)}/{len(body)}"
            status, body = 206, body[int(begin) : int(end) + 1]
        if self.server.sizes:
            headers["Content-Length"] = str(len(body))
        else:
            headers["Connection"] = "close"
        return status, headers, body

    def _forwarded(self) -> tuple[int, dict[str, str], bytes]:
        assert self.server.upstream is not None
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection(*self.server.upstream)
        try:
            connection.request(self.command, self.path, content, dict(self.headers))
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        hop = ("connection", "transfer-encoding", "server", "date")
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in hop}
        headers.setdefault("Content-Length", str(len(body)))
        return answer.status, headers, body


@contextmanager
def serving(server: FaultyServer) -> Iterator[FaultyServer]:
    """The server, running."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
