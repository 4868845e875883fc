"""A stand-in for the W&B server on the loopback interface: as much of it as the real client asks for.

GraphQL by the names of operations, `file_stream`, and uploads. What arrives is kept by run, so that a test can say what
a server would show; faults (no answer, errors, hanging) are set from outside while a client is at work.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ENTITY = "us"


@dataclass
class Run:
    """What the server knows of a run. history, events: JSON lines by their place; rewound: the steps it was taken back
    to; used, logged: artifacts by "NAME:vN"."""

    name: str
    project: str
    fields: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    rewound: list[int] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    complete: bool = False
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows, in order. A row that comes again under the same number (`wandb sync` of what was partly uploaded)
        counts once."""
        lines = self.lines.get("wandb-history.jsonl", {})
        rows = (json.loads(lines[place]) for place in sorted(lines))
        return list({row["_step"]: row for row in rows}.values())

    @property
    def summary(self) -> dict[str, Any]:
        """The newest."""
        lines = self.lines.get("wandb-summary.json", {})
        return dict(json.loads(lines[max(lines)])) if lines else {}

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as the client wrote it, without W&B's own part."""
        config = json.loads(self.fields.get("config") or "{}")
        return {key: entry["value"] for key, entry in config.items() if key != "_wandb"}


@dataclass
class Artifact:
    """A version of an artifact: `manifest` lists its files and references."""

    id: str
    name: str
    type: str
    version: int
    fields: dict[str, Any]
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)
    committed: bool = False
    deleted: bool = False


class WandbServer(ThreadingHTTPServer):
    """Serves until it is shut down.

    fault: what befalls each request: None, a status code, "hang" (until it goes on), "reset"; refusal: an HTTP status
    and the words with which no run is taken; rewinds: whether runs can be taken back.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.views: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.fault: int | str | None = None
        self.faults_met = 0
        self.refusal: tuple[int, str] | None = None
        self.rewinds = True
        self.lock = threading.RLock()
        self.over = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error."""

    @property
    def url(self) -> str:
        """For WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def run(self) -> Run:
        """The only one."""
        (run,) = self.runs.values()
        return run

    def wait_for(self, what: Callable[[], bool], seconds: float = 30) -> None:
        """Until it is so. Raises AssertionError where it does not come to be in time."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, "what was waited for did not come"
            time.sleep(0.02)

    def mend(self, when: Callable[[], bool]) -> None:
        """End the fault once it is so."""
        self.wait_for(when)
        self.fault = None

    def artifact(self, name: str) -> Artifact | None:
        """By NAME:ALIAS."""
        name, _, alias = name.rpartition(":")
        found = [one for one in self.artifacts.values() if one.name == name and not one.deleted]
        return next((one for one in reversed(found) if alias in (f"v{one.version}", one.id, *one.aliases)), None)

    def answer(self, asked: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL request."""
        found = re.match(r"\s*(?:#graphql)?\s*(?:query|mutation)\s+(\w+)", asked)
        name = found.group(1) if found else ""
        self.asked.append(name)
        with self.lock:
            known = getattr(self, f"_on_{name}", None)
            if known is None:
                raise Refusal(f"the stand-in does not know {asked}")
            return known(variables)

    def _bucket(self, run: Run) -> dict[str, Any]:
        return {
            "id": f"id-{run.name}",
            "name": run.name,
            "displayName": run.fields.get("displayName"),
            "config": run.fields.get("config"),
            "tags": run.tags,
            "sweepName": run.fields.get("sweep"),
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}},
            "historyLineCount": len(run.lines.get("wandb-history.jsonl", {})),
            "eventsLineCount": len(run.lines.get("wandb-events.jsonl", {})),
            "logLineCount": 0,
            "summaryMetrics": json.dumps(run.summary),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
        }

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        person = {"id": "VXNlcjox", "username": "me", "name": "me", "entity": ENTITY, "email": "me@localhost"}
        return {"viewer": {**person, "admin": False, "flags": "{}", "teams": {"edges": []}, "apiKeys": {"edges": []}}}

    _on_GetDefaultEntity = _on_Viewer

    def _on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("name") or str(given.get("id")).removeprefix("id-")
        inserted = name not in self.runs
        if self.refusal is not None:
            raise Refusal(self.refusal[1], self.refusal[0])
        run = self.runs.setdefault(name, Run(name, given.get("project") or ""))
        run.fields |= {key: value for key, value in given.items() if value is not None}
        if given.get("tags") is not None:
            run.tags = list(given["tags"])
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}

    def _on_RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        entity = {"id": "e", "name": ENTITY}
        bucket = None if run is None else self._bucket(run)
        return {"model": {"id": "p", "name": given["project"], "entity": entity, "bucket": bucket}}

    def _on_Runs(self, given: dict[str, Any]) -> dict[str, Any]:
        name = json.loads(given["filters"])["name"]
        found = [self._bucket(run) for run in self.runs.values() if run.name == name]
        page = {"endCursor": None, "hasNextPage": False}
        runs = {"edges": [{"node": node, "cursor": "c"} for node in found], "pageInfo": page}
        return {"project": {"internalId": "1", "runCount": len(found), "readOnly": False, "runs": runs}}

    def _on_NotifyScriptableRunAlert(self, given: dict[str, Any]) -> dict[str, Any]:
        self.runs[given["runName"]].alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _on_RewindRun(self, given: dict[str, Any]) -> dict[str, Any]:
        run, step = self.runs.get(given["runName"]), int(given["metricValue"])
        if not self.rewinds or run is None or step not in [row["_step"] for row in run.history]:
            raise Refusal(f"run {given['runName']} cannot be taken back to _step {step}")
        lines = run.lines["wandb-history.jsonl"]
        run.lines["wandb-history.jsonl"] = {
            place: line for place, line in lines.items() if json.loads(line)["_step"] <= step
        }
        run.rewound.append(step)
        return {"rewindRun": {"rewoundRun": self._bucket(run)}}

    def _on_ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        found = self.artifact(given["name"])
        return {"project": {"artifact": found and {"artifactType": {"name": found.type}}}}

    def _on_ArtifactMembershipByName(self, given: dict[str, Any]) -> dict[str, Any]:
        found = self.artifact(given["name"])
        if found is None:
            return {"project": {"artifactCollectionMembership": None}}
        project = {"id": "p", "internalId": "1", "name": given["project"], "entity": {"name": ENTITY}}
        sequence = {"__typename": "ArtifactSequence", "name": found.name, "project": project}
        aliases = [{"__typename": "ArtifactAlias", "id": alias, "alias": alias} for alias in found.aliases]
        version = {"versionIndex": found.version, "createdAt": "2020-01-01T00:00:00Z"}
        artifact = {
            **{"__typename": "Artifact", "id": found.id, "artifactSequence": sequence, **version},
            **{"artifactType": {"name": found.type}, "description": None, "metadata": found.fields.get("metadata")},
            **{"ttlDurationSeconds": -2, "ttlIsInherited": False, "tags": [], "historyStep": None, "size": 0},
            **{"state": "COMMITTED", "digest": found.fields["digest"], "commitHash": None, "fileCount": 1},
            **{"updatedAt": None, "aliases": [{**alias, "artifactCollection": sequence} for alias in aliases]},
        }
        member = {"__typename": "ArtifactCollectionMembership", "id": f"m-{found.id}", **version, "aliases": aliases}
        member |= {"artifactCollection": sequence, "artifact": artifact}
        return {"project": {"artifactCollectionMembership": member}}

    def _on_UseArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        given = given.get("input", given)
        found = self.artifacts[given["artifactID"]]
        self.runs[given["runName"]].used.append(f"{found.name}:v{found.version}")
        return {"useArtifact": {"artifact": {"id": found.id}}}

    def _on_DeleteArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        found = self.artifacts[given["input"]["artifactID"]]
        found.deleted, found.aliases = True, []
        return {"result": {"artifact": {"id": found.id}}}

    def _on_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _on_CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": f"id-{given['run']}", "uploadHeaders": [], "files": files}}

    def _on_CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        asked = given["input"]
        (name,) = asked.get("artifactCollectionNames") or [asked["artifactCollectionName"]]
        version = sum(one.name == name for one in self.artifacts.values())
        made = Artifact(f"artifact-{len(self.artifacts)}", name, asked["artifactTypeName"], version, asked)
        self.artifacts[made.id] = made
        aliases = [entry["alias"] for entry in asked.get("aliases") or []]
        for other in self.artifacts.values():
            if other.name == name:
                other.aliases = [alias for alias in other.aliases if alias not in aliases]
        made.aliases = aliases
        self.runs[asked["runName"]].logged.append(f"{name}:v{version}")
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": made.id, "state": "PENDING", "artifactSequence": sequence}}}

    def _on_CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/manifest/{given['artifactID']}"
        file = {"id": "f", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": given["artifactID"], "file": file}}}

    def _on_UpdateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/manifest/{given['artifactManifestID']}"
        file = {"id": "f", "uploadUrl": url, "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": given["artifactManifestID"], "file": file}}}

    def _on_CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": f"{spec['artifactID']}/{spec['name']}",
                "uploadUrl": f"{self.url}/artifact/{spec['artifactID']}/{spec['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": spec["artifactID"]},
            }
            for spec in given["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _on_CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        found = self.artifacts[given["artifactID"]]
        found.committed = True
        return {"commitArtifact": {"artifact": {"id": found.id, "digest": found.fields["digest"]}}}

    def _on_UpsertView2(self, given: dict[str, Any]) -> dict[str, Any]:
        self.views.append(given)
        return {"upsertView": {"view": {"id": "Vmlldzox", "name": given.get("name", "x")}, "inserted": True}}

    def _on_ServerInfo(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}


class Refusal(Exception):
    """What GraphQL answers with as an error."""

    def __init__(self, words: str, status: int = 200) -> None:
        super().__init__(words)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(self, status: int, value: Any) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body, path = self._body(), urlsplit(self.path).path
        if self._meets_fault():
            return
        if path == "/graphql":
            asked = json.loads(body)
            try:
                self._reply(200, {"data": self.server.answer(asked["query"], asked.get("variables") or {})})
            except Refusal as refusal:
                self._reply(refusal.status, {"data": None, "errors": [{"message": str(refusal)}]})
        elif path.endswith("/file_stream"):
            self._stream(path.split("/")[-2], json.loads(body))
        else:  # telemetry
            self._reply(404, {})

    def do_PUT(self) -> None:
        body = self._body()
        _, kind, name, rest = [*urlsplit(self.path).path.split("/", 3), ""][:4]
        if self._meets_fault():
            return
        with self.server.lock:
            if kind == "upload":
                self.server.runs[name].files[rest] = body
            elif kind == "manifest":
                self.server.artifacts[name].manifest = json.loads(body)
            else:
                self.server.artifacts[name].files[rest] = body
        self._reply(200, {})

    def _meets_fault(self) -> bool:
        fault = self.server.fault
        if fault is None:
            return False
        self.server.faults_met += 1
        if fault == "hang":
            while self.server.fault == "hang" and not self.server.over.wait(0.05):
                pass
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self._reply(int(fault), {"error": "a fault of the stand-in"})
        return True

    def _stream(self, name: str, sent: dict[str, Any]) -> None:
        with self.server.lock:
            run = self.server.runs[name]
            for file, part in (sent.get("files") or {}).items():
                lines = run.lines.setdefault(file, {})
                for place, line in enumerate(part["content"], part["offset"]):
                    lines[place] = line
            if sent.get("complete"):
                run.complete, run.exit_code = True, sent.get("exitcode")
        self._reply(200, {"limits": {}})


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server that runs, and is gone afterwards."""
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
