"""Hub data sets from a local stand-in of the hub: downloaded, found again without a network, and streamed."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import pantheraml

COMMIT = "a" * 40
FILES = {
    "train.jsonl": b"".join(json.dumps({"question": f"q {n}", "answer": "a"}).encode() + b"\n" for n in range(2500)),
    "test.jsonl": b'{"question": "t", "answer": "b"}\n',
}
PLACE = "/datasets/org/data"
SCRIPT = """
import json, sys
from pantheraml.data import formats, sources, streams
from pantheraml.errors import DataError
found = []
for call in json.loads(sys.argv[1]):
    name, options = call.pop("name", "org/data"), call
    try:
        if options.pop("stream", False):
            stream = streams.open_stream(name, **options)
            rows = [row for _, row in stream.rows(formats.detect(stream.head()))]
            found.append([len(rows), rows[0]["prompt"], stream.description])
        else:
            loaded = sources.load(name, **options)
            found.append([len(loaded.dataset), loaded.dataset[0]["question"], loaded.description])
    except DataError as error:
        found.append([error.exit_code, error.what, error.hint])
print(json.dumps(found))
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """What the hub answers about one data set, and to nothing else."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, headers = self.path.partition("?")[0], []
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in FILES.items()
        ]
        status, body = 404, b'{"error": "not found"}'
        revision, _, name = path.removeprefix(f"{PLACE}/resolve/").partition("/")
        if path in (f"/api{PLACE}", *(f"/api{PLACE}/revision/{name}" for name in ("main", COMMIT))):
            siblings = [{"rfilename": name} for name in FILES]
            about = {
                "id": "org/data",
                "sha": COMMIT,
                "private": False,
                "gated": False,
                "tags": [],
                "siblings": siblings,
            }
            status, body = 200, json.dumps(about).encode()
        elif path in (f"/api{PLACE}/tree/main", f"/api{PLACE}/tree/{COMMIT}"):
            status, body = 200, json.dumps(entries).encode()
        elif path.startswith(PLACE) and revision in ("main", COMMIT) and name in FILES:
            status, body = 200, FILES[name]
            headers = [("ETag", f'"{hashlib.sha1(body).hexdigest()}"'), ("X-Repo-Commit", COMMIT)]
            if self.headers.get("Range") and self.command == "GET":
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                part = slice(int(first), int(last) + 1 if last else len(body))
                headers.append(("Content-Range", f"bytes {part.start}-{part.stop - 1}/{len(body)}"))
                status, body = 206, body[part]
        else:
            headers = [("X-Error-Code", "EntryNotFound" if PLACE in path else "RepoNotFound")]
        self.send_response(status)
        for key, value in (*headers, ("Content-Length", str(len(body))), ("Content-Type", "application/json")):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def ask(tmp_path):
    """A function that makes calls in a process of its own, with a cache that all of them share."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def run(*calls, offline=False):
            home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
            quiet = {"HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
            root = str(Path(pantheraml.__file__).parent.parent)
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, json.dumps(calls)],
                env=os.environ | home | quiet | {"PYTHONPATH": root},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            return json.loads(done.stdout.splitlines()[-1])

        yield run
        server.shutdown()


def test_data_sets_of_the_hub(ask):
    described = "2500 rows of the hub data set org/data (train)"
    assert ask({}, {"split": "test"}, {"split": "train[10:20]"}) == [
        [2500, "q 0", described],
        [1, "t", "1 rows of the hub data set org/data (test)"],
        [10, "q 10", "10 rows of the hub data set org/data (train[10:20])"],
    ]
    # The same without a network, and what was never there.
    [again, missing] = ask({}, {"name": "org/other"}, offline=True)
    assert again == [2500, "q 0", described]
    assert missing[0] == 3
    assert "'org/other' could not be loaded" in missing[1]
    assert "the network" in missing[2]


def test_streams_of_the_hub(ask):
    assert ask({"stream": True}, {"stream": True, "split": "train[2:7]"}) == [
        [2500, "q 0\n", "a stream of the hub data set org/data (train)"],
        [5, "q 2\n", "a stream of the hub data set org/data (train[2:7])"],
    ]
