"""A local server that speaks as much of the hub's HTTP interface as uploading needs, and remembers what it was sent."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    """A repository as the uploads left it."""

    private: bool | None
    branches: set[str] = field(default_factory=lambda: {"main"})
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)


class HubStandIn:
    """The server; use it as a context manager.

    Attributes:
        token: The one token that it takes; its owner is ``someone``.
        repositories: By full name.
        authorizations: The ``Authorization`` headers of all requests.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.authorizations: set[str | None] = set()
        self.blobs: dict[str, bytes] = {}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline().strip(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return body
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _answer(self, status: int, content: Any) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _serve(self) -> None:
                body = self._body()
                path = self.path.partition("?")[0]
                if not path.startswith("/blobs/"):
                    stand_in.authorizations.add(self.headers.get("Authorization"))
                    if self.headers.get("Authorization") != f"Bearer {stand_in.token}":
                        self._answer(401, {"error": f"bad token {self.headers.get('Authorization')}"})
                        return
                self._answer(*stand_in.respond(self.command, path, body))

            do_GET = do_POST = do_PUT = _serve

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the answer to a request."""
        parts = path.strip("/").split("/")
        if method == "PUT" and parts[0] == "blobs":
            self.blobs[parts[1]] = body
            return 200, {}
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "type": "user", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._slot(item) for item in json.loads(body)["objects"]]}
        name = "/".join(parts[2:4])
        repository = self.repositories.get(name)
        if parts[:2] != ["api", "models"] or repository is None:
            return 404, {"error": f"no {path}"}
        action = parts[4] if len(parts) > 4 else "info"
        if action == "branch":
            repository.branches.add(parts[5])
            return 200, {}
        if action == "preupload":
            files = json.loads(body)["files"]
            large = (".safetensors", ".gguf")
            modes = {file["path"]: "lfs" if file["path"].endswith(large) else "regular" for file in files}
            return 200, {
                "files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            }
        if action == "commit":
            return self._commit(name, repository, parts[5], body)
        return 200, {"id": name, "sha": "0" * 40, "siblings": [], "private": repository.private, "tags": []}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        exists = name in self.repositories
        # The client says it in one of two ways, by its version.
        private = asked.get("visibility") == "private" if "visibility" in asked else asked.get("private")
        self.repositories.setdefault(name, Repository(private))
        return (409 if exists else 200), {"url": f"{self.url}/{name}", "name": name, "id": name}

    def _slot(self, item: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.url}/blobs/{item['oid']}", "header": {}}
        return {"oid": item["oid"], "size": item["size"], "actions": {"upload": upload}}

    def _commit(self, name: str, repository: Repository, revision: str, body: bytes) -> tuple[int, Any]:
        if revision not in repository.branches:
            return 404, {"error": f"no branch {revision}"}
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.blobs[value["oid"]]
        repository.commits.append({"revision": revision, **header})
        oid = f"{len(repository.commits):040d}"
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}
