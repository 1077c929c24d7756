"""A hub on this machine: data sets with revisions, served as the hub's interface serves them."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

Files = dict[str, bytes]
COMMIT = re.compile("[0-9a-f]{40}")


class FakeHub:
    """Data sets by name and revision. `put` makes a commit; a `gated` one lists its files and gives none of them."""

    def __init__(self) -> None:
        self.revisions: dict[tuple[str, str], str] = {}  # (data set, branch) -> commit
        self.commits: dict[tuple[str, str], Files] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []  # the paths of all requests

    def put(self, name: str, files: Files, revision: str = "main") -> str:
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        self.revisions[name, revision] = commit
        self.commits[name, commit] = files
        return commit

    def commit_of(self, name: str, revision: str) -> str | None:
        return revision if (name, revision) in self.commits else self.revisions.get((name, revision))

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.asked.append(path)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, kind, revision = match[1], match[2], unquote(match[3] or "main")
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path):
            name, kind, revision = match[1], match[2], unquote(match[3])
        else:
            return 404, {}, b""
        if not any(known == name for known, _ in self.revisions):
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        commit = self.commit_of(name, revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""

        files = self.commits[name, commit]
        if kind == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            return 200, {}, json.dumps(entries).encode()
        if kind != "resolve":
            siblings = [{"rfilename": file} for file in files]
            return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        data = files.get(unquote(match[4]))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data


@contextmanager
def serving(hub: FakeHub) -> Iterator[str]:
    """The address under which a hub answers inside the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(urlsplit(self.path).path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def online(hub: FakeHub, patch: pytest.MonkeyPatch, cache: Any) -> Iterator[FakeHub]:
    """Inside, this process takes `hub` for the hub, with a cache of its own."""
    with serving(hub) as address, patch.context() as inside:
        inside.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        inside.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + template)
        inside.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        inside.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        yield hub
