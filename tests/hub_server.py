"""A small server that speaks what Hugging Face's and ModelScope's clients ask, with faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
MEBIBYTE = 1 << 20


def safetensors_bytes(size: int, seed: int = 0) -> bytes:
    """A safetensors file of one tensor with ``size`` bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    block = hashlib.sha256(str(seed).encode()).digest() * 1024
    return struct.pack("<Q", len(header)) + header + (block * (size // len(block) + 1))[:size]


def small_model(weights: int = 4096, seed: int = 0) -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "llama", "vocab_size": 8}',
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": safetensors_bytes(weights, seed),
    }


@dataclass
class Hub:
    """What the local hub serves, how it misbehaves, and what it was asked."""

    url: str
    models: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # name -> revision -> files
    listed_sizes: dict[str, int] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str | None = None
    corrupt: set[str] = field(default_factory=set)
    cut_at: dict[str, int] = field(default_factory=dict)  # drop the connection once, so far into the file
    stall_at: dict[str, int] = field(default_factory=dict)  # stop sending there, and say no more
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, Range, Authorization
    stalled: threading.Event = field(default_factory=threading.Event)

    def fetched(self) -> list[str]:
        return [unquote(path).rpartition("/")[2] for path, _, _ in self.requests if "/resolve/" in path]

    def ranges(self, name: str) -> list[str | None]:
        return [asked for path, asked, _ in self.requests if path.startswith("/cdn/") and path.endswith(name)]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


class HubHandler(BaseHTTPRequestHandler):
    """Hugging Face's model API, resolve redirects to a storage host, and ModelScope's two reads."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        path = unquote(parts.path)
        hub.requests.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        if path.startswith("/portal/"):
            return self.answer(200, b"<html>please log in</html>", Content_Type="text/html")
        if path.startswith("/api/v1/models/"):
            return self.modelscope(path.removeprefix("/api/v1/models/"), parse_qs(parts.query))
        if path.startswith("/cdn/"):
            _, _, name, revision, file = path.split("/", 4)
            return self.file(file, hub.models[unquote(unquote(name))][revision][file])
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            return self.info(name, revision or "main")
        if "/resolve/" in path:
            name, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            return self.resolve(name, revision, file)
        return self.answer(404)

    def revision_of(self, name: str, revision: str) -> str | None:
        known = self.hub.models[name]
        return {"main": COMMIT, "old": OLD_COMMIT}.get(revision, revision) if len(known) else None

    def info(self, name: str, revision: str) -> None:
        if name not in self.hub.models:
            return self.answer(404, b'{"error":"Repository not found"}', X_Error_Code="RepoNotFound")
        commit = self.revision_of(name, revision)
        if commit not in self.hub.models[name]:
            return self.answer(404, b'{"error":"Invalid rev id"}', X_Error_Code="RevisionNotFound")
        siblings = []
        for file, content in self.hub.models[name][commit].items():
            size = self.hub.listed_sizes.get(file, len(content))
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            large = {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}}
            siblings.append({"rfilename": file, "size": size, "blobId": git, **(large if is_large(file) else {})})
        body = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "cardData": {"license": "mit"},
            "siblings": siblings,
        }
        return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

    def resolve(self, name: str, commit: str, file: str) -> None:
        if name in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, b"Access to this model is restricted", X_Error_Code="GatedRepo")
        content = self.hub.models[name][commit][file]
        if is_large(file):  # another host, as a hub's storage is: the token must not go there
            port = self.headers["Host"].rpartition(":")[2]
            place = f"http://localhost:{port}/cdn/{name.replace('/', '%252F')}/{commit}/{file}"
            return self.answer(302, Location=place, X_Repo_Commit=commit)
        return self.file(file, content)

    def file(self, name: str, content: bytes) -> None:
        if name in self.hub.corrupt:
            content = bytes(byte ^ 1 for byte in content[:64]) + content[64:]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if (cut := self.hub.cut_at.pop(name, None)) is not None:
            self.wfile.write(body[:cut])
            self.close_connection = True
        elif (stall := self.hub.stall_at.pop(name, None)) is not None:
            self.wfile.write(body[:stall])
            self.wfile.flush()
            self.hub.stalled.set()
            time.sleep(60)
        else:
            self.wfile.write(body)

    def modelscope(self, rest: str, query: dict[str, list[str]]) -> None:
        name, _, call = rest.partition("/repo")
        call = call or ("content" if rest.endswith("/repo") else "")
        revision = query.get("Revision", ["master"])[0]
        if name not in self.hub.models or (call and revision not in self.hub.models[name]):
            return self.answer(404, b'{"Code": 10010205001, "Message": "not found", "Success": false}')
        if call == "":
            body = {"Code": 200, "Success": True, "Data": {"Name": name.split("/")[1], "Path": name.split("/")[0]}}
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        files = self.hub.models[name][revision]
        if call == "/files":
            listing = [
                {
                    "Path": path,
                    "Name": path.rpartition("/")[2],
                    "Size": len(content),
                    "Type": "blob",
                    "Sha256": hashlib.sha256(content).hexdigest(),
                }
                for path, content in files.items()
            ]
            body = {"Code": 200, "Success": True, "Data": {"Files": listing}}
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        return self.file(query["FilePath"][0], files[query["FilePath"][0]])


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """The server on a free local port; one at a time."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.daemon_threads = True
    content = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    HubHandler.hub = content
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield content
    finally:
        server.shutdown()
        server.server_close()
