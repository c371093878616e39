"""A Hub on 127.0.0.1 for the real `huggingface_hub` client, with the faults that networks have.

Files whose name ends in one of `lfs_suffixes` are stored by Git LFS, in parts of `part_size` bytes if that is set; the
others travel inside the commit. Xet is not offered.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

from hub.routes import Router
from hub.store import HubError, Repo

DRIP = 64  # bytes
PATIENCE = 120.0  # seconds that a test may be stuck before it fails
TOKENS = {"hf_owner": "user", "hf_stranger": "stranger"}


@dataclass
class Fault:
    """What happens to the next `times` requests (`None`: to all) whose "METHOD /path" holds a match of `pattern`.

    kind: "status" answers `status`; "cut" closes the connection after half of the body; "short" sends half of the
    body as if it were all; "wrong" flips every bit of it; "gone" takes the whole server down without an answer;
    "drip" sends the body in many small pieces; "stall" stops in the middle of it, and "silent" before the answer, until
    the client gives up; "lost" does what was asked and closes the connection instead of answering; "meet" lets requests
    pass in pairs, so that two clients are at the same point.
    """

    kind: str
    pattern: str
    status: int = 503
    times: int | None = 1
    hits: int = 0
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))

    def strikes(self, request: str) -> bool:
        if (self.times is not None and self.hits >= self.times) or not re.search(self.pattern, request):
            return False
        self.hits += 1
        return True


class LoopbackHub:
    """`repos`, `requests` ("METHOD /path" of each) and `faults` are the tests' to look at and to change."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._connections: set[socket.socket] = set()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.reset()

    def reset(self) -> None:
        """Empty, without faults, and up."""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lfs_suffixes: tuple[str, ...] = ()
        self.part_size: int | None = None
        if self._server is None:
            self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        hub = self

        class BoundHandler(Handler):
            pass

        BoundHandler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), BoundHandler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Gone at once, connections that are kept alive included; what was stored stays."""
        with self.lock:
            server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fault(self, kind: str, pattern: str, **options: Any) -> Fault:
        self.faults.append(Fault(kind, pattern, **options))
        return self.faults[-1]

    def repo(self, name: str, user: str | None, write: bool = False) -> Repo:
        """The repo, if it is there and `user` may see it, or write to it."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and repo.owner != user):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and repo.owner != user:
            raise HubError(403 if user else 401, "You have no write access to this repo")
        return repo

    def is_lfs(self, path: str) -> bool:
        return path.endswith(self.lfs_suffixes)


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub._connections.add(self.connection)

    def finish(self) -> None:
        self.hub._connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client may go whenever it likes
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        request = f"{self.command} {unquote(path)}"
        body = self._body()
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((fault for fault in self.hub.faults if fault.strikes(request)), None)
        if fault is not None and fault.kind == "gone":
            self.close_connection = True
            self.hub.stop()
            return
        if fault is not None and fault.kind == "silent":
            self._wait_for_hangup()
            return
        if fault is not None and fault.kind == "meet":
            fault.barrier.wait(PATIENCE)
        try:
            if fault is not None and fault.kind == "status":
                raise HubError(fault.status, "injected fault")
            user = self._user()
            parts = [unquote(part) for part in path.strip("/").split("/")]
            with self.hub.lock:
                router = Router(self.hub, self.command, self.path)
                status, headers, content = router.answer(parts, parse_qs(query), body, user)
        except HubError as error:
            status, content = error.status, json.dumps({"error": str(error)}).encode()
            headers = {"X-Error-Message": str(error)}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            headers |= {"X-Repo-Commit": error.commit} if error.commit else {}
        if fault is not None and fault.kind == "lost":
            self._hang_up()
            return
        self._send(status, headers, content, None if fault is None else fault.kind)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _send(self, status: int, headers: dict[str, str], content: bytes, fault: str | None) -> None:
        if fault == "wrong":
            content = bytes(255 - byte for byte in content)
        if fault == "short":
            content = content[: len(content) // 2]
        if status in (200, 206) and "Range" in self.headers:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"]).groups()
            total = len(content)
            content = content[int(first) : int(last) + 1 if last else total]
            status = 206 if content else 416
            headers = headers | {"Content-Range": f"bytes {first}-{int(first) + len(content) - 1}/{total}"}
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers | {"Content-Length": len(content)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "drip":
            for start in range(0, len(content), DRIP):
                self.wfile.write(content[start : start + DRIP])
            return
        self.wfile.write(content[: len(content) // 2] if fault in ("cut", "stall") else content)
        if fault == "stall":
            self._wait_for_hangup()
        if fault == "cut":
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _wait_for_hangup(self) -> None:
        self.close_connection = True
        self.connection.settimeout(PATIENCE)
        with contextlib.suppress(OSError):
            self.connection.recv(1)
