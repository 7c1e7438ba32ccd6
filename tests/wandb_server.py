"""A W&B server for the tests: what the real client (0.31) needs to be online, kept in memory.

It keeps rows as W&B does, by their line number in a file of the run, and answers a resume with what it was sent before.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

ENTITY = "team"
Json = dict[str, Any]


@dataclass
class OnlineRun:
    """What was received of a run."""

    project: str
    config: Json = field(default_factory=dict)
    files: dict[str, dict[int, str]] = field(default_factory=dict)  # JSON by line number
    exit_code: int | None = None  # of the last process that finished it

    def lines(self, file: str) -> list[Any]:
        lines = self.files.get(file, {})
        assert sorted(lines) == [*range(len(lines))], f"{file} has a gap"
        return [json.loads(lines[number]) for number in sorted(lines)]

    @property
    def history(self) -> list[Json]:
        return self.lines("wandb-history.jsonl")

    @property
    def summary(self) -> Json:
        return (self.lines("wandb-summary.json") or [{}])[0]

    def status(self, name: str) -> Json:
        """What a client that resumes the run asks for."""
        bucket = {"id": name, "name": name, "displayName": name, "tags": [], "logLineCount": 0}
        for kind in ("history", "events"):
            lines = self.lines(f"wandb-{kind}.jsonl")
            bucket |= {f"{kind}LineCount": len(lines), f"{kind}Tail": json.dumps([json.dumps(x) for x in lines[-1:]])}
        started = {"t": self.config.get("_wandb", {}).get("value", {}).get("t")}
        known = {"summaryMetrics": self.summary, "config": self.config, "wandbConfig": started}
        return bucket | {key: json.dumps(value) for key, value in known.items()}


class Server(ThreadingHTTPServer):
    """Everything that the clients sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url, self.lock = f"http://127.0.0.1:{self.server_port}", Lock()
        self.runs: dict[str, OnlineRun] = {}
        self.uploads: dict[str, bytes] = {}  # by the name of the file
        self.views: list[Json] = []
        self.alerts: list[Json] = []  # all that were sent
        self.delivered: list[Json] = []  # those of them that reach the user
        self.errors: list[Exception] = []
        self._delivered_at: dict[tuple[str, str], float] = {}

    def receive(self, path: str, body: Json) -> Json:
        """Take in a request and return the answer."""
        if path == "/graphql":
            (operation,) = re.findall(r"^\s*(?:query|mutation)\s+(\w+)", body["query"])
            return {"data": self.answer(operation, body.get("variables") or {})}
        run = self.runs[path.split("/")[-2]]
        for file, chunk in (body.get("files") or {}).items():
            run.files.setdefault(file, {}).update(enumerate(chunk["content"], start=chunk["offset"]))
        if body.get("complete"):
            run.exit_code = body["exitcode"]
        return {}

    def answer(self, operation: str, sent: Json) -> Json:
        """The answer to a GraphQL operation."""
        match operation:
            case "Viewer":
                return {
                    "viewer": {
                        "id": "user",
                        "entity": ENTITY,
                        "username": "user",
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            case "RunResumeStatus":
                bucket = self.runs[sent["name"]].status(sent["name"]) if sent["name"] in self.runs else None
                return {"model": {**_project(sent["project"]), "bucket": bucket}}
            case "UpsertBucket":
                run = self.runs.setdefault(sent["name"], OnlineRun(sent["project"]))
                run.config = json.loads(sent["config"] or "{}") or run.config
                return {"upsertBucket": {"bucket": {**run.status(sent["name"]), "project": _project(run.project)}}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in sent["files"]]
                return {"createRunFiles": {"runID": sent["run"], "uploadHeaders": [], "files": files}}
            case "ArtifactType":
                return {"project": None}  # there is none of that name yet
            case "CreateArtifact":  # claims to have it already: tables are uploaded as files of the run too
                known = {"id": "artifact", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
                return {"createArtifact": {"artifact": known}}
            case "NotifyScriptableRunAlert":
                return {"notifyScriptableRunAlert": {"success": self.alert(sent)}}
            case "UpsertView2":
                self.views.append(sent)
                return {"upsertView": {"view": {"id": f"view-{len(self.views)}", "name": sent["name"]}}}
        return {}

    def alert(self, sent: Json) -> bool:
        """Deliver an alert unless one of the same title was, too recently: the rule of `wandb.Run.alert`."""
        self.alerts.append(sent)
        key, now = (sent["runName"], sent["title"]), time.monotonic()
        if now - self._delivered_at.get(key, -math.inf) < sent["waitDuration"] / 1000:
            return False
        self._delivered_at[key] = now
        self.delivered.append(sent)
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client has left without a farewell, as it does."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"  # keeps connections open

    def do_POST(self) -> None:
        body = self._body()
        if self.path != "/graphql" and not self.path.endswith("/file_stream"):
            return self._reply({})  # telemetry
        try:
            with self.server.lock:
                return self._reply(self.server.receive(self.path, json.loads(body)))
        except Exception as error:
            self.server.errors.append(error)
            return self._reply({}, status=400)  # which the client does not try again

    def do_PUT(self) -> None:
        self.server.uploads[self.path.removeprefix("/upload/")] = self._body()
        self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        return gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body

    def _reply(self, answer: Json, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Stay quiet."""


def _project(name: str) -> Json:
    return {"id": "project", "name": name, "entity": {"id": "entity", "name": ENTITY}}


@contextmanager
def serve() -> Iterator[Server]:
    """A server on a free port of this machine, that has understood everything it was sent."""
    with Server() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
        assert not server.errors, server.errors
