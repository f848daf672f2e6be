"""As much of a W&B server as its client asks for: GraphQL to make a run, and the stream of its history.

It remembers runs by id, as the real one does: a second start with ``resume`` is told how far the first one got.
"""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class Run:
    """What the server knows of a run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked = 0  # how often a client opened it
        self.lines: dict[int, dict[str, Any]] = {}  # the history, by its number in the stream
        self.config: dict[str, Any] = {}
        self.group = self.display = ""
        self.exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self.lines[number] for number in sorted(self.lines)]


class WandbServer:
    """Listens on loopback while it is entered.

    Attributes:
        runs: by id.
        asked: the names of the GraphQL operations, in their order.
        status: when set, what every request is answered with.
        stalled: when True, nothing is answered at all.
        keys: the API keys that are let in.
    """

    def __init__(self, keys: tuple[str, ...] = ("0" * 40,)) -> None:
        self.runs: dict[str, Run] = {}
        self.asked: list[str] = []
        self.paths: list[str] = []
        self.status: int | None = None
        self.stream_status: int | None = None
        self.stalled = False
        self.keys = keys
        self.verbose = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                while outer.stalled:
                    time.sleep(0.05)
                status, content = outer._answer(self.path, self.headers, body)
                if outer.verbose:
                    print(">>", self.path, body[:1500], "\n<<", status, content, flush=True)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that hangs up is none of our concern."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the stage for good; once or several times."""
        self.stalled = False
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        self.paths.append(path)
        if self.status is not None:
            return self.status, {"error": "refused"}
        if path.startswith("/graphql"):
            return self._graphql(headers, json.loads(body))
        stream = re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path)
        if stream:
            if self.stream_status is not None:
                return self.stream_status, {"error": "refused"}
            return self._stream(self.runs[stream[3]], json.loads(body))
        return 200, {}

    def _stream(self, run: Run, content: dict[str, Any]) -> tuple[int, Any]:
        for name, file in (content.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                for number, line in enumerate(file["content"], file["offset"]):
                    run.lines[number] = json.loads(line)
        if "exitcode" in content:
            run.exit_code = content["exitcode"]
        return 200, {"exitcode": None, "limits": {}}

    def _graphql(self, headers: Any, content: dict[str, Any]) -> tuple[int, Any]:
        query, values = content["query"], content.get("variables") or {}
        name = content.get("operationName") or query.split("(")[0].split("{")[0].split()[-1]
        self.asked.append(name)
        import base64

        key = base64.b64decode(headers.get("Authorization", "Basic ").partition(" ")[2]).decode().partition(":")[2]
        if key not in self.keys:
            return 401, {"errors": [{"message": "user is not logged in"}]}
        answer = getattr(self, f"_on_{name}", None)
        return 200, {"data": answer(values) if answer else {}}

    def _on_Viewer(self, values: dict[str, Any]) -> Any:
        return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def _on_UpsertBucket(self, values: dict[str, Any]) -> Any:
        name = values["name"]
        new = name not in self.runs
        run = self.runs.setdefault(name, Run(name))
        run.asked += 1
        run.group, run.display = values.get("groupName") or run.group, values.get("displayName") or run.display
        if values.get("config"):
            run.config = {key: value.get("value") for key, value in json.loads(values["config"]).items()}
        bucket = {
            "id": f"id-{name}",
            "name": name,
            "displayName": run.display,
            "description": None,
            "config": values.get("config") or "{}",
            "sweepName": None,
            "project": {"id": "p", "name": values.get("project"), "entity": {"id": "e", "name": "me"}},
            "historyLineCount": len(run.lines),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _on_RunResumeStatus(self, values: dict[str, Any]) -> Any:
        run = self.runs.get(values["name"])
        project = {"id": "p", "entity": {"id": "e", "name": "me"}, "name": values.get("project")}
        if run is None:
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": None}}
        last = run.history[-1:] or [{}]
        config = json.dumps({key: {"value": value} for key, value in run.config.items()})
        bucket = {
            "name": run.name,
            "id": f"id-{run.name}",
            "summaryMetrics": json.dumps(last[0]),
            "displayName": run.display,
            "logLineCount": 0,
            "historyLineCount": len(run.lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in run.history[-1:]]),
            "eventsTail": "[]",
            "config": config,
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {**project, "bucket": bucket}}

    def _on_CreateRunFiles(self, values: dict[str, Any]) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in values["files"]]
        return {"createRunFiles": {"runID": f"id-{values['run']}", "uploadHeaders": [], "files": files}}
