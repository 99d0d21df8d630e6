"""HTTP on loopback: pages, downloads, uploads, the scheduler."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import os
import re
import shutil
import threading
import urllib.parse
from http import HTTPStatus
from typing import Protocol

from vmjob.project.devserver import reply as replies
from vmjob.project.devserver import request as requests
from vmjob.project.devserver import uploads
from vmjob.project.devserver.state import State
from vmjob.project.tags import block, tag

__all__ = ["Handler", "Owner", "WebServer"]

#: Seconds that a client may be silent in the middle of a request.
PATIENCE = 60.0
#: Requests at one time; a client has 8 transfers at most.
MAX_REQUESTS = 32
_RANGE = re.compile(r"bytes=([0-9]{1,15})-")


class Owner(Protocol):
    """The project that is served."""

    url: str
    name: str
    email: str
    password: str
    state: State

    @property
    def platforms(self) -> list[str]: ...

    def schedule(self, body: bytes) -> str:
        """The scheduler's reply to a request of a client's."""
        ...


class WebServer(http.server.ThreadingHTTPServer):
    """Listens on 127.0.0.1 only, whoever asks for what."""

    daemon_threads = True
    # Who closes the server does not wait for a client that is silent.
    block_on_close = False

    def __init__(self, port: int, owner: Owner) -> None:
        self.owner = owner
        self.room = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that a client cuts off is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = PATIENCE
    server: WebServer

    def do_GET(self) -> None:
        with self.server.room:
            self._get()

    def do_POST(self) -> None:
        with self.server.room:
            self._post()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Events tell what happened."""

    # -- GET ---------------------------------------------------------------------------------

    def _get(self) -> None:
        owner = self.server.owner
        path, _, query = self.path.partition("?")
        if path == "/":
            self._answer(replies.master_page(owner.url), "text/html")
        elif path == "/get_project_config.php":
            self._answer(replies.project_config(owner.url, owner.name, owner.platforms))
        elif path in {"/lookup_account.php", "/create_account.php"}:
            self._answer(self._account(path, urllib.parse.parse_qs(query)))
        elif path.startswith("/download/"):
            self._download(path.removeprefix("/download/"))
        else:
            self._nothing()

    def _account(self, path: str, query: dict[str, list[str]]) -> str:
        """There is one account; making it again gives the same."""
        owner = self.server.owner
        email = query.get("email_addr", [""])[0].lower()
        given = query.get("passwd_hash", [""])[0]
        wanted = hashlib.md5((owner.password + owner.email).encode(),
                             usedforsecurity=False).hexdigest()
        right = email == owner.email and hmac.compare_digest(given.encode(), wanted.encode())
        owner.state.event("account", page=path, right=right)
        if not right:
            # ERR_BAD_PASSWD and ERR_DB_NOT_FOUND of lib/error_numbers.h.
            return block("error", [tag("error_num", -206 if email == owner.email else -136),
                                   tag("error_msg", "no such account")])
        return block("account_out", [tag("authenticator", owner.state.authenticator)])

    def _download(self, name: str) -> None:
        state = self.server.owner.state
        with state.changed:
            served = state.files.get(name)
        if served is None:
            state.event("download", name=name[:200], found=False)
            self._nothing()
            return
        try:
            fd = os.open(served.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            self._nothing()
            return
        with os.fdopen(fd, "rb") as file:
            match = _RANGE.fullmatch(self.headers.get("Range") or "")
            start = int(match[1]) if match else 0
            state.event("download", name=name, found=True, offset=start)
            if start >= served.nbytes and match:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{served.nbytes}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(HTTPStatus.PARTIAL_CONTENT if match else HTTPStatus.OK)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(served.nbytes - start))
            if match:
                self.send_header("Content-Range",
                                 f"bytes {start}-{served.nbytes - 1}/{served.nbytes}")
            self.end_headers()
            file.seek(start)
            shutil.copyfileobj(file, self.wfile, 1 << 20)

    # -- POST --------------------------------------------------------------------------------

    def _post(self) -> None:
        length = self._length()
        if length is None:
            return
        if self.path == "/cgi":
            self._scheduler(length)
        elif self.path == "/file_upload_handler":
            self._upload(length)
        else:
            self.close_connection = True
            self._nothing()

    def _length(self) -> int | None:
        given = self.headers.get("Content-Length") or ""
        if not given.isascii() or not given.isdigit() or len(given) > 15:
            self.close_connection = True
            self._answer("say how long it is", "text/plain", HTTPStatus.LENGTH_REQUIRED)
            return None
        return int(given)

    def _scheduler(self, length: int) -> None:
        if length > requests.MAX_BYTES:
            self.close_connection = True
            self._answer("too long", "text/plain", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        body = self.rfile.read(length)
        if len(body) == length:
            self._answer(self.server.owner.schedule(body))

    def _upload(self, length: int) -> None:
        # What is not read of a body would be taken for the next request.
        self.close_connection = True
        state = self.server.owner.state
        read = uploads.read_header(self.rfile, length)
        place = state.upload_path(read[0].name) if read else None
        if read is None or place is None:
            state.event("upload", status=uploads.GIVE_UP, name=read[0].name[:200] if read else "")
            self._answer(uploads.answer(uploads.GIVE_UP, "no such file is expected"))
            return
        header, rest = read
        path, max_nbytes = place
        if header.asks:
            size = path.stat().st_size if path.is_file() else 0
            self._answer(uploads.size_answer(size))
            return
        if state.upload_fails():
            status = uploads.LATER
        else:
            with state.changed:
                state.uploaded.discard(header.name)
            try:
                status = uploads.store(header, self.rfile, rest, path, max_nbytes)
            except OSError:  # a full disk, a link in the way, a client that went silent
                status = uploads.LATER
        with state.changed:
            if status == uploads.DONE:
                state.uploaded.add(header.name)
            state.event("upload", name=header.name, status=status, nbytes=header.nbytes,
                        offset=header.offset, md5=header.md5)
        self._answer(uploads.answer(status, "" if status == uploads.DONE else "not taken"))

    # -- answers -----------------------------------------------------------------------------

    def _nothing(self) -> None:
        self._answer("not here", "text/plain", HTTPStatus.NOT_FOUND)

    def _answer(self, body: str, kind: str = "text/xml",
                status: HTTPStatus = HTTPStatus.OK) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
