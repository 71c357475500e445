"""A hub in small: serves model folders on loopback with the routes that huggingface_hub asks for.

Routes and headers as huggingface_hub 2.4 uses them: api/models/…/revision, …/tree, and resolve with
ETag and X-Repo-Commit; errors are told apart by X-Error-Code.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Repositories by name, each {commit: folder} with a branch `main`; and what was asked."""

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def add(self, name: str, folder: Path, commit: str) -> None:
        """Publishes a folder as a commit and moves the branch main to it."""
        self.repos.setdefault(name, {})[commit] = folder
        self.branches[name] = commit


@contextmanager
def serve() -> Iterator[Hub]:
    """Runs a hub on a free port of loopback while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.asked.append(f"{self.command} {path}")
            parts = path.split("/")
            if parts[:2] == ["api", "models"]:
                name, kind, revision, rest = "/".join(parts[2:4]), parts[4], parts[5], ""
            else:
                name, kind, revision, rest = (
                    "/".join(parts[:2]),
                    parts[2],
                    parts[3],
                    "/".join(parts[4:]),
                )
            if name not in hub.repos:
                return self.refuse(404, "RepoNotFound")
            if name in hub.gated:
                return self.refuse(403, "GatedRepo")
            commit = hub.branches[name] if revision == "main" else revision
            if commit not in hub.repos[name]:
                return self.refuse(404, "RevisionNotFound")
            folder = hub.repos[name][commit]
            files = [file for file in sorted(folder.iterdir()) if file.is_file()]
            if kind == "revision":
                siblings = [{"rfilename": file.name} for file in files]
                return self.json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})
            if kind == "tree":
                return self.json([entry(file) for file in files])
            return self.file(folder / rest, commit)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def json(self, value: object) -> None:
            self.body(json.dumps(value).encode(), {"Content-Type": "application/json"})

        def file(self, path: Path, commit: str) -> None:
            if not path.is_file():
                return self.refuse(404, "EntryNotFound")
            headers = {"ETag": f'"{oid(path)}"', "X-Repo-Commit": commit}
            return self.body(path.read_bytes(), headers)

        def body(self, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Keeps the tests' output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def entry(path: Path) -> dict[str, object]:
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid(path)}
