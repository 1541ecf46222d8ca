"""A hub on the loopback address, for tests: repositories of files in memory, with what can go wrong on the way."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What the server holds, and what it was asked.

    Attributes:
      files: by repository and name.
      gated: repositories that want the token "good".
      cut: how many bytes of a file are sent before the connection is closed, once.
      lies: files whose checksum is another than the one that is stated.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    lies: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    address: str = ""

    def fetched(self) -> list[str]:
        """Names of files whose content was asked for, in order."""
        return [
            path.split("/resolve/")[1].partition("/")[2]
            for kind, path, _ in self.requests
            if kind == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass

    def answer(
        self, code: int, body: bytes = b"", headers: Mapping[str, str] | None = None, *, head: bool = False
    ) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def refused(self, repository: str, head: bool) -> bool:
        if repository not in self.hub.files:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"}, head=head)
        elif repository in self.hub.gated and self.headers.get("Authorization") != "Bearer good":
            self.answer(401, headers={"X-Error-Code": "GatedRepo"}, head=head)
        else:
            return False
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        head, path = self.command == "HEAD", unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if not self.refused(found[1], head):
                if found[2] not in (None, "main", COMMIT):
                    return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"}, head=head)
                names = [{"rfilename": name} for name in self.hub.files[found[1]]]
                self.answer(200, json.dumps({"id": found[1], "sha": COMMIT, "siblings": names}).encode(), head=head)
            return None
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if not self.refused(found[1], head):
                names = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.hub.files[found[1]].items()
                ]
                self.answer(200, json.dumps(names).encode(), head=head)
            return None
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found is None:
            return self.answer(404, head=head)
        if self.refused(found[1], head):
            return None
        if found[2] not in ("main", COMMIT):
            return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"}, head=head)
        if found[3] not in self.hub.files[found[1]]:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound"}, head=head)
        return self.send_file(found[3], self.hub.files[found[1]][found[3]], head)

    def send_file(self, name: str, data: bytes, head: bool) -> None:
        stated = hashlib.sha256(data).hexdigest()
        if name in self.hub.lies:
            stated = hashlib.sha256(data + b"!").hexdigest()
        headers = {"ETag": f'"{stated}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(start[1]) if start else 0
        if start:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if not head and name in self.hub.cut:
            kept = self.hub.cut.pop(name)
            self.send_response(206 if start else 200)
            for key, value in {"Content-Length": str(len(data) - begin), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[begin : begin + kept])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.answer(206 if start else 200, data[begin:], headers, head=head)

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(("POST", path, ""))
        if self.headers.get("Authorization") != "Bearer good":
            return self.answer(401)
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            self.hub.files.setdefault(name, {})
            return self.answer(200, json.dumps({"url": f"{self.hub.address}/{name}"}).encode())
        if path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, json.dumps({"files": files}).encode())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.hub.files[found[1]][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            where = {"commitUrl": f"{self.hub.address}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT}
            return self.answer(200, json.dumps(where | {"success": True}).encode())
        return self.answer(200, b"{}")


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub at `hub.address` while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub  # type: ignore[attr-defined]
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
