"""A hub on 127.0.0.1: the routes that huggingface_hub asks for, served from a folder, with faults on demand."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Answers to anything about a repository, as the hub words them: status, X-Error-Code, X-Error-Message.
REFUSALS = {
    "acme/gated": (403, "GatedRepo", "Access to model acme/gated is restricted"),
    "acme/private": (401, None, "Invalid username or password."),
    "acme/bad-token": (401, None, "Invalid credentials in Authorization header"),
    "acme/unknown": (404, "RepoNotFound", "Repository not found"),
    "acme/broken": (500, None, "Internal error"),
}


@dataclass
class Hub:
    """`files` are served for every repository that is not refused; `faults` maps a path to what goes wrong with it.

    "cut once": the connection breaks half-way, and the next request is served. "cut": half of the file as if it were
    all. "corrupt": the right size, other bytes. "error": a 500.
    """

    files: dict[str, bytes]
    faults: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def downloaded(self) -> set[str]:
        """Paths of the files whose content was asked for."""
        return {
            path.split(f"/resolve/{COMMIT}/")[1]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        }

    def start(self) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        return server


def read_folder(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, dict(self.headers)))
        api = re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/(\w+/[\w-]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if not match:
            return self.answer(404)
        repo, revision = match[1], match[3] if api else match[2]
        if repo in REFUSALS:
            status, code, message = REFUSALS[repo]
            return self.answer(status, headers={"X-Error-Code": code, "X-Error-Message": message})
        if revision not in (None, "main", "v1", COMMIT):
            return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        if file:
            return self.send_file(match[3])
        tree = [self.describe(name, content) for name, content in self.hub.files.items()]
        info = {
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "siblings": [{"rfilename": name} for name in self.hub.files],
        }
        self.answer(200, json.dumps(tree if match[2] == "tree" else info).encode())

    def describe(self, name: str, content: bytes) -> dict:
        entry: dict = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith((".safetensors", ".bin")):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def send_file(self, name: str) -> None:
        content = self.hub.files.get(name)
        if content is None:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        fault = self.hub.faults.get(name) if self.command == "GET" else None
        if fault == "cut":
            return self.answer(200, content[: len(content) // 2], headers)
        if fault == "corrupt":
            return self.answer(200, content[:-9] + bytes(9), headers)
        if fault == "error":
            return self.answer(500)
        if fault == "cut once":
            del self.hub.faults[name]
            return self.answer(200, content[: len(content) // 2], headers, claimed=len(content))
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[start:], headers)
        self.answer(200, content, headers)

    def answer(
        self, status: int, body: bytes = b"", headers: dict[str, str | None] | None = None, claimed: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            if value is not None:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if claimed is None else claimed))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
