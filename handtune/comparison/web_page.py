"""Comparisons in a browser: one page on 127.0.0.1, keyboard first, that loads nothing from outside.

Other pages in the same browser, and other machines, must not be able to answer. So the server listens on the loopback
alone. It accepts only requests that name it as host (those by a foreign name that resolves to 127.0.0.1 would not),
that come from its own page (Origin) and that carry the token of the printed link, and it reads at most MAX_BYTES of a
request.
"""

import hmac
import json
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .._outside import visible
from .._shapes import parse_json
from .session import Session

PAGE = Path(__file__).with_name("compare.html")
MAX_BYTES = 65_536  # of a request
MAX_SECONDS = 1e9  # of an answer: more would be a mistake
FORBIDDEN = "open the link that handtune compare printed\n"
POLICY = "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; base-uri 'none'"


class ComparisonServer(ThreadingHTTPServer):
    """Serves one session: `server.url` is the link to open, `serve_forever()` answers until `shutdown()`."""

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.session = session
        self.token = secrets.token_urlsafe(24)
        self.fault: BaseException | None = None  # what a request raised that nobody foresaw
        self.origins = {f"http://{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    def state(self) -> dict[str, Any]:
        """What the page shows: the next item, and how far the session is."""
        fields: dict[str, Any] | None = None
        item = self.session.next()
        if item is not None:
            fields = {
                "id": item.id, "prompt": visible(item.prompt), "left": visible(item.left), "right": visible(item.right)
            }  # fmt: skip
        return {"item": fields, "progress": self.session.progress()}

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Answer requests until `shutdown()`. An unforeseen exception in a request is raised here, too."""
        super().serve_forever(poll_interval)
        if self.fault is not None:
            raise self.fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """End the server."""
        error = sys.exception()
        # A browser may hang up in the middle of a request.
        if not isinstance(error, OSError):
            self.fault = error
            self.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: ComparisonServer
    timeout = 30

    def do_GET(self) -> None:
        if not self._is_own_request():
            return
        try:
            address = urlsplit(self.path)
        except ValueError as error:
            self._send(HTTPStatus.BAD_REQUEST, f"{error}\n")
            return

        if address.path == "/" and self._has_token(parse_qs(address.query).get("token", [""])[0]):
            nonce = secrets.token_urlsafe(12)  # only the page's own script and style have it
            page = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
            self._send(
                HTTPStatus.OK, page, "text/html; charset=utf-8", {"Content-Security-Policy": POLICY.format(nonce)}
            )
        elif address.path == "/next" and self._has_token(self.headers.get("X-Token", "")):
            self._json(self.server.state())
        else:
            self._send(HTTPStatus.FORBIDDEN, FORBIDDEN)

    def do_POST(self) -> None:
        if not self._is_own_request():
            return
        if not self._has_token(self.headers.get("X-Token", "")):
            self._send(HTTPStatus.FORBIDDEN, FORBIDDEN)
            return

        # Without a length, reading would wait for the browser to hang up.
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MAX_BYTES:
            # What follows is the rest of this request, and must not be taken for the next one.
            self.close_connection = True
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected a length of at most {MAX_BYTES} bytes\n")
            return

        content = self.rfile.read(length)
        try:
            body = parse_json(content, "the answer", "send it again")
            if not isinstance(body, dict):
                raise ValueError("the answer: expected an object")
            if self.path == "/answer":
                item: Any = body.get("item")
                self.server.session.answer(item, str(body.get("answer")), _seconds(body.get("seconds")))
            elif self.path == "/undo":
                self.server.session.undo()
            else:
                raise ValueError(f"there is no {self.path}")
        except ValueError as error:
            self._send(HTTPStatus.BAD_REQUEST, f"{error}\n")
            return
        except OSError as error:  # a full disk
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, f"the answer could not be written: {error}\n")
            return
        self._json(self.server.state())

    def _is_own_request(self) -> bool:
        """Whether host and origin are this server's; sends 403 where they aren't."""
        # A browser leaves the origin out where the page asks its own server for something.
        host = f"http://{self.headers.get('Host')}"
        if {host, self.headers.get("Origin", host)} <= self.server.origins:
            return True
        self.close_connection = True
        self._send(HTTPStatus.FORBIDDEN, "this page answers to itself alone\n")
        return False

    def _has_token(self, token: str) -> bool:
        # In constant time, so that the time tells nobody how much of a guess is right.
        return hmac.compare_digest(token.encode(), self.server.token.encode())

    def _json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(value), "application/json")

    def _send(
        self, status: HTTPStatus, text: str, content_type: str = "text/plain", headers: dict[str, str] | None = None
    ) -> None:
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        # Nobody else may cache, frame or interpret it, or learn its link.
        all_headers = {
            "Content-Type": content_type, "Content-Length": str(len(body)), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
            **(headers or {}),
        }  # fmt: skip
        for name, value in all_headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal belongs to the person."""


def _seconds(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and abs(value) <= MAX_SECONDS):
        return value
    raise ValueError(f"seconds {value!r:.60}: expected a number")
