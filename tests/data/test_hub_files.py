"""`hf://` paths are read through a server that speaks the hub's protocol, in byte ranges as any remote file."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

COMMIT = "0" * 40
RECORDS = [{"text": f"record {number} " + "x" * (number % 50)} for number in range(12_000)]
FILES = {"data/train-0.jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS).encode()}

READ = """
import json, sys
from trainer.data.stream import StreamData
(dataset,) = StreamData("hf://datasets/acme/texts").datasets.values()
source = dataset.source("train")
records = [record for index in range(len(source.shards)) for record in source.open(index, 0)]
later = [record for record in source.open(len(source.shards) - 1, 5)]
json.dump({"shards": len(source.shards), "records": records, "later": later}, sys.stdout)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The endpoints that huggingface_hub's file system asks: the repository, its tree, paths' facts, and files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if re.fullmatch(r"/api/datasets/acme/texts(/revision/\w+)?", path):
            self._json({"id": "acme/texts", "sha": COMMIT, "siblings": []})
        elif re.fullmatch(r"/api/datasets/acme/texts/tree/\w+(/.*)?", path):
            self._json(facts())
        elif (match := re.fullmatch(r"/datasets/acme/texts/resolve/\w+/(.*)", path)) and match[1] in FILES:
            self._file(FILES[match[1]])
        else:
            self._answer(404, b'{"error": "not here"}')

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._json([fact for fact in facts() if fact["path"] in asked.replace("%2F", "/")])

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, body: bytes) -> None:
        headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            self._answer(200, body, headers)
            return
        begin, end = int(match[1]), min(int(match[2] or len(body) - 1), len(body) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(body)}"
        self._answer(206, body[begin : end + 1], headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def facts() -> list[dict[str, Any]]:
    """What the hub's tree says of folders and files."""
    files = [{"type": "file", "path": path, "oid": COMMIT, "size": len(body)} for path, body in FILES.items()]
    return [{"type": "directory", "path": "data", "oid": COMMIT, "size": 0}, *files]


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_record_once_in_byte_ranges(hub: str, trainer_env: dict[str, str], tmp_path: Path) -> None:
    env = {name: value for name, value in trainer_env.items() if name != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read = json.loads(done.stdout)
    assert read["shards"] > 1
    assert read["records"] == RECORDS
    assert read["later"] == RECORDS[-len(read["later"]) :] and 0 < len(read["later"]) < len(RECORDS)
