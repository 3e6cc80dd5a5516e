"""A hub of models and data sets on this machine: what huggingface_hub and datasets ask of the real one, over HTTP.

It answers in the forms of the hub's API (repository info, trees, paths, files with ETag and X-Repo-Commit, ranges,
error codes) and notes every request.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".onnx", ".parquet", ".gguf")  # stored with a sha256, as the hub's LFS files are
Files = Mapping[str, bytes]


@dataclass
class Repository:
    """Commits by revision (branches, tags and the commits themselves)."""

    revisions: dict[str, Files]
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # of files that the hub says to be larger than they are
    damaged: set[str] = field(default_factory=set)  # files that arrive with other bytes


@dataclass
class Hub:
    """The repositories by (models or datasets, name), and what was asked for."""

    url: str
    repositories: dict[tuple[str, str], Repository]
    requests: list[str] = field(default_factory=list)  # method, path and range
    stall_after: int | None = None  # bytes of a large file, after which nothing more comes until `resume` is set
    resume: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)


def commit_of(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def repository(gated: bool = False, **revisions: Files) -> Repository:
    """Named revisions of a repository; each can be had by its commit too."""
    return Repository(dict(revisions) | {commit_of(files): files for files in revisions.values()}, gated)


@contextmanager
def running_hub(repositories: dict[tuple[str, str], Repository]) -> Iterator[Hub]:
    """Serve the repositories; the hub stops when the block is left."""
    hub = Hub("", repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.resume.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {path} {asked}".strip())
        name = r"([\w.-]+/[\w.-]+)"
        if found := re.fullmatch(rf"/api/(models|datasets)/{name}(?:/revision/(.+))?", path):
            self._info(found[1], found[2], found[3] or "main")
        elif found := re.fullmatch(rf"/api/(models|datasets)/{name}/tree/([^/]+)(?:/(.+))?", path):
            self._tree(found[1], found[2], found[3], found[4] or "")
        elif found := re.fullmatch(rf"/api/(models|datasets)/{name}/paths-info/([^/]+)", path):
            self._paths(found[1], found[2], found[3], body)
        elif found := re.fullmatch(rf"/(datasets/)?{name}/resolve/([^/]+)/(.+)", path):
            self._file("datasets" if found[1] else "models", found[2], found[3], found[4])
        else:
            self._refuse(404, "RepoNotFound")

    def _find(self, kind: str, name: str, revision: str) -> tuple[Repository, Files] | None:
        found = self.hub.repositories.get((kind, name))
        if found is None:
            self._refuse(404, "RepoNotFound")
            return None
        if revision not in found.revisions:
            self._refuse(404, "RevisionNotFound")
            return None
        return found, found.revisions[revision]

    def _info(self, kind: str, name: str, revision: str) -> None:
        if found := self._find(kind, name, revision):
            at, files = found
            siblings = []
            for path, data in files.items():
                size = at.sizes.get(path, len(data))
                entry = {"rfilename": path, "size": size, "blobId": _git_sha1(data)}
                if path.endswith(LARGE):
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
                siblings.append(entry)
            info = {"_id": "1", "id": name, "sha": commit_of(files), "private": False, "siblings": siblings}
            self._json(info | {"gated": "auto" if at.gated else False, "tags": [], "downloads": 0, "likes": 0})

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "oid": _git_sha1(data), "size": len(data), "path": path}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        if found := self._find(kind, name, revision):
            inside = {p: data for p, data in found[1].items() if not folder or p.startswith(folder + "/")}
            if folder and not inside:
                self._refuse(404, "EntryNotFound")
                return
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            start = len(folder) + 1 if folder else 0
            folders = {p[: start + i] for p in inside for i, c in enumerate(p[start:]) if c == "/"}
            entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in sorted(folders)]
            entries += [self._entry(p, data) for p, data in sorted(inside.items())]
            self._json([e for e in entries if recursive or "/" not in e["path"][start:]])

    def _paths(self, kind: str, name: str, revision: str, body: bytes) -> None:
        if found := self._find(kind, name, revision):
            files = found[1]
            is_json = "json" in self.headers.get("Content-Type", "")
            asked = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
            entries = [self._entry(p, files[p]) for p in asked if p in files]
            folders = [p for p in asked if p not in files and any(f.startswith(f"{p}/") for f in files)]
            self._json(entries + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in folders])

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self._find(kind, name, revision)
        if found is None:
            return
        at, files = found
        if at.gated:
            self._refuse(403, "GatedRepo")
            return
        if path not in files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit_of(files)})
            return
        data = files[path]
        tag = hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else _git_sha1(data)
        if path in at.damaged:
            data = bytes(len(data))
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["", "0"])[1])
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit_of(files), "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], headers, is_large=path.endswith(LARGE))

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: int, word: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(code, b"", {"X-Error-Code": word, "X-Error-Message": word} | dict(headers or {}))

    def _send(self, code: int, data: bytes, headers: Mapping[str, str], is_large: bool = False) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if is_large and self.hub.stall_after is not None and len(data) > self.hub.stall_after:
                self.wfile.write(data[: self.hub.stall_after])
                self.wfile.flush()
                self.hub.stalled.set()
                self.hub.resume.wait(60)
                return
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
