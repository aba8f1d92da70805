"""A read-only data set hub on this machine: only the answers that a snapshot download needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@contextlib.contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the hub's address and the growing list of files it has sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "datasets"]:
                self.answer_listing("/".join(parts[2:4]), parts[4], parts[5])
            else:  # datasets/ORG/NAME/resolve/REVISION/PATH
                self.answer_file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))

        def answer_listing(self, repository: str, kind: str, revision: str) -> None:
            folder = root / repository
            if not folder.is_dir():
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            names = [str(p.relative_to(folder)) for p in files]
            if kind == "tree":
                rows = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": _hash(path)}
                    for name, path in zip(names, files, strict=True)
                ]
                return self.send(200, json.dumps(rows).encode(), {})
            siblings = [{"rfilename": name} for name in names]
            info = {"id": repository, "sha": revision, "siblings": siblings, "tags": []}
            return self.send(200, json.dumps(info).encode(), {})

        def answer_file(self, repository: str, revision: str, name: str) -> None:
            path = root / repository / name
            if not path.is_file():
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                sent.append(f"{repository}/{name}")
            headers = {"ETag": f'"{_hash(path)}"', "X-Repo-Commit": revision}
            return self.send(200, path.read_bytes(), headers)

        def send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
