"""A Hugging Face hub of repositories in memory, on loopback: what huggingface_hub needs to commit and to download."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """repos: name → {file: content}; asked: (method, path, Authorization) of every request."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.address = ""

    def commit(self, repo: str) -> str:
        """What identifies the present content."""
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            given = json.loads(body)
            name = f"{given.get('organization') or 'someone'}/{given['name']}"
            self.repos.setdefault(name, {})
            return self.json({"url": f"{self.address}/{name}", "name": name, "id": name})
        if parts[:2] == ["api", "models"] and len(parts) > 4:
            repo, what = "/".join(parts[2:4]), parts[4]
            if repo in self.repos:
                return self.api(repo, what, body)
        if parts[:2] == ["api", "validate-yaml"]:
            return self.json({"errors": [], "warnings": []})
        if len(parts) > 4 and parts[2] == "resolve":
            return self.file("/".join(parts[:2]), "/".join(parts[4:]), method)
        return self.json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def api(self, repo: str, what: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        files = self.repos[repo]
        if what == "preupload":
            wanted = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in wanted]
            return self.json({"files": modes})
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            commit = self.commit(repo)
            return self.json({"commitUrl": f"{self.address}/{repo}/commit/{commit}", "commitOid": commit})
        if what == "tree":
            rows = [
                {"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                for k, v in files.items()
            ]
            return self.json(rows)
        siblings = [{"rfilename": k} for k in files]
        return self.json({"id": repo, "modelId": repo, "sha": self.commit(repo), "siblings": siblings, "tags": []})

    def file(self, repo: str, name: str, method: str) -> tuple[int, dict[str, str], bytes]:
        found = self.repos.get(repo, {}).get(name)
        if found is None:
            return self.json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        tag = {"ETag": f'"{hashlib.sha1(found).hexdigest()}"', "X-Repo-Commit": self.commit(repo)}
        return 200, tag, found

    def json(
        self, data: Any, code: int = 200, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        return code, {"Content-Type": "application/json", **(headers or {})}, json.dumps(data).encode()


@contextmanager
def served() -> Iterator[Hub]:
    """A hub that listens on loopback at `address`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers.get("Authorization")))
            code, headers, content = hub.answer(self.command, path, body)
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = respond

        def log_message(self, *_: Any) -> None:
            """Nothing: a test's output is its own."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
