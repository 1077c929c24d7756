"""Comparisons in a browser: one page on 127.0.0.1, keyboard first, that loads nothing from outside.

What a page on the network could do wrong, this server refuses: it listens on the loopback alone, answers only requests
that name it as host (a foreign name that resolves to 127.0.0.1 would not), that come from its own page (Origin) and
that carry the token of the printed link, and reads no more than MOST bytes of a request.
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

from .._files import parse_json
from .._outside import visible
from .session import Session

PAGE = Path(__file__).with_name("compare.html")
MOST, MOST_SECONDS = 65_536, 1e9  # of a request's bytes, of an answer's seconds
POLICY = "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; base-uri 'none'"


class ComparisonServer(ThreadingHTTPServer):
    """Serves one session: `server.url` is the link to open, `serve_forever()` answers until `shutdown()`."""

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.session, self.token = session, secrets.token_urlsafe(24)
        self.fault: BaseException | None = None
        self.origins = {f"http://{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.hosts = {origin.removeprefix("http://") for origin in self.origins}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    def state(self) -> dict[str, Any]:
        """What the page shows: the next item, and how far the session is."""
        item, shown = self.session.next(), None
        if item is not None:
            texts = {"prompt": item.prompt, "left": item.left, "right": item.right}
            shown = {"id": item.id, **{name: visible(text) for name, text in texts.items()}}
        return {"item": shown, "progress": self.session.progress()}

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Answer until `shutdown()`. What a request raised that nobody foresaw is raised here, too."""
        super().serve_forever(poll_interval)
        if self.fault is not None:
            raise self.fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up in the middle is none; anything else ends the server."""
        error = sys.exception()
        if not isinstance(error, OSError):
            self.fault = error
            self.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: ComparisonServer
    timeout = 30

    def do_GET(self) -> None:
        if not self._from_here():
            return
        try:
            address = urlsplit(self.path)
        except ValueError as error:
            self._send(HTTPStatus.BAD_REQUEST, f"{error}\n")
            return
        if address.path == "/" and self._knows(parse_qs(address.query).get("token", [""])[0]):
            nonce = secrets.token_urlsafe(12)
            page = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
            self._send(
                HTTPStatus.OK, page, "text/html; charset=utf-8", {"Content-Security-Policy": POLICY.format(nonce)}
            )
        elif address.path == "/next" and self._knows(self.headers.get("X-Token", "")):
            self._json(self.server.state())
        else:
            self._send(HTTPStatus.FORBIDDEN, "open the link that handtune compare printed\n")

    def do_POST(self) -> None:
        if not self._from_here():
            return
        if not self._knows(self.headers.get("X-Token", "")):
            self._send(HTTPStatus.FORBIDDEN, "open the link that handtune compare printed\n")
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MOST:
            self.close_connection = True
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected a length of at most {MOST} bytes\n")
            return
        sent = self.rfile.read(length)
        try:
            body = parse_json(sent, "the answer", "send it again")
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

    def _from_here(self) -> bool:
        """Whether host and origin are this server's; answers 403 where not."""
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in self.server.hosts and (origin is None or origin in self.server.origins):
            return True
        self.close_connection = True
        self._send(HTTPStatus.FORBIDDEN, "this page answers to itself alone\n")
        return False

    def _knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.server.token.encode())

    def _json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(value), "application/json")

    def _send(
        self, status: HTTPStatus, text: str, kind: str = "text/plain", headers: dict[str, str] | None = None
    ) -> None:
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        fixed = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        fixed |= {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
        for name, value in (fixed | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the person's."""


def _seconds(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and abs(value) <= MOST_SECONDS):
        return value
    raise ValueError(f"seconds {value!r:.60}: expected a number")
