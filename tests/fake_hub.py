"""A Hugging Face hub on loopback: what its clients ask for to download a repository, and to push to
one.

Repositories are folders: ROOT/models/OWNER/NAME, ROOT/datasets/OWNER/NAME. Every request is
recorded.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.root, self.requests = root, list[tuple[str, str, str | None]]()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, cache: Path) -> dict[str, str]:
        """For a process that uses this hub, with a cache and a token of its own."""
        home = {
            "HF_HOME": str(cache),
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_fake",
            "HF_HUB_OFFLINE": "0",
        }
        return {
            **home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def fake_hub(root: Path) -> Iterator[FakeHub]:
    hub = FakeHub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path, self.headers.get("Authorization")))
        if found := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.file(self.folder(found[1], found[2]) / found[4])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name'].rpartition('/')[2]}"
            (self.server.root / "models" / name).mkdir(parents=True, exist_ok=True)
            return self.json(
                {"url": f"{self.server.url}/{name}", "private": asked.get("private", False)}
            )
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if found := re.fullmatch(
            r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/([^/]+))?(?:/(.*))?)?", path
        ):
            return self.repository(
                self.folder(found[1], found[2]), found[2], found[3] or "", found[5] or "", body
            )
        return self.json({"error": "not found"}, 404)

    def folder(self, kind: str | None, name: str) -> Path:
        return (
            self.server.root
            / ("datasets" if kind and kind.startswith("datasets") else "models")
            / name
        )

    def repository(self, folder: Path, name: str, what: str, inside: str, body: bytes) -> None:
        if not folder.is_dir():
            self.json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif what in ("", "revision"):
            files = [
                {"rfilename": str(f.relative_to(folder)), "size": f.stat().st_size}
                for f in files_of(folder)
            ]
            self.json(
                {
                    "id": name,
                    "sha": COMMIT,
                    "siblings": files,
                    "tags": [],
                    "private": False,
                    "downloads": 0,
                }
            )
        elif what == "tree":
            self.json(
                [
                    entry(f, folder)
                    for f in sorted(folder.rglob("*"))
                    if inside in ("", str(f.parent.relative_to(folder)))
                ]
            )
        elif what == "paths-info":
            wanted = json.loads(body)["paths"]
            self.json([entry(folder / path, folder) for path in wanted if (folder / path).exists()])
        elif what == "preupload":
            wanted = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in wanted
            ]
            self.json({"files": modes})
        elif what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "deletedFile":
                    (folder / line["value"]["path"]).unlink()
                if line["key"] == "file":
                    file = folder / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            self.json(
                {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:
            self.json({"error": "not found"}, 404)

    def file(self, file: Path) -> None:
        if not file.is_file():
            return self.json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        tags = {
            "ETag": f'"{sha1(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        return self.reply(200, content, tags)

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def entry(file: Path, folder: Path) -> dict[str, Any]:
    kind = "file" if file.is_file() else "directory"
    size = file.stat().st_size if file.is_file() else 0
    return {
        "type": kind,
        "path": str(file.relative_to(folder)),
        "size": size,
        "oid": sha1(str(file).encode()).hexdigest(),
    }
