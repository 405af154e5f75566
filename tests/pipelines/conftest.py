"""A Kubeflow Pipelines API server for tests: the endpoints in use, over real HTTP.

It holds every request body against the published API models (kfp_server_api) and every pipeline
against Kubeflow's own protocol buffers, and answers 400 to what does not fit.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from kfp_server_api import ApiClient

API = "/apis/v2beta1"


class KubeflowServer:
    """What the server holds, and which requests it is told to refuse."""

    def __init__(self) -> None:
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.schedules: dict[str, dict[str, Any]] = {}
        self.history: list[str] = []
        self.active_counts: list[int] = []
        self.refused: set[str] = set()
        self.protected: set[str] = set()
        self.tokens: set[str | None] = set()
        self.host = ""
        self._next = 0

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        """Return the answer's JSON; KeyError means 404, ValueError 400, PermissionError 403."""
        route = f"{method} {path.removeprefix(API)}"
        kind, _, rest = path.removeprefix(f"{API}/").partition("/")
        if kind == "healthz":
            return {"multi_user": False}
        verb = rest.rpartition(":")[2] if ":" in rest else method
        if f"{verb} {kind}" in self.refused:
            raise PermissionError(f"{verb} of {kind} is not allowed")
        self.history.append(route)
        if kind == "experiments":
            return self._experiments(method, query, body)
        if kind == "runs" and method == "POST":
            _check(body, "V2beta1Run")
            return self._add(self.runs, body, "run_id")
        if kind == "recurringruns":
            return self._schedules(method, rest, query, body)
        raise KeyError(route)

    def _experiments(self, method: str, query: dict[str, str], body: Any) -> Any:
        if method == "GET":
            return {"experiments": _filtered(self.experiments, query)}
        _check(body, "V2beta1Experiment")
        return self._add(self.experiments, body, "experiment_id")

    def _schedules(self, method: str, rest: str, query: dict[str, str], body: Any) -> Any:
        if method == "GET":
            found = _filtered(list(self.schedules.values()), query)
            # One a page, so that paging is exercised.
            start = int(query.get("page_token") or 0)
            more = str(start + 1) if start + 1 < len(found) else ""
            return {"recurringRuns": found[start : start + 1], "next_page_token": more}
        schedule_id = rest.partition(":")[0]
        if schedule_id in self.protected:
            raise PermissionError(f"{schedule_id} is protected")
        if method == "DELETE":
            del self.schedules[schedule_id]
        elif rest.endswith(":disable"):
            self.schedules[schedule_id]["mode"] = "DISABLE"
        else:
            _check(body, "V2beta1RecurringRun")
            made: list[dict[str, Any]] = []
            self._add(made, body, "recurring_run_id")
            self.schedules[made[0]["recurring_run_id"]] = made[0]
            self._count()
            return made[0]
        self._count()
        return {}

    def _count(self) -> None:
        self.active_counts.append(sum(s["mode"] == "ENABLE" for s in self.schedules.values()))

    def _add(self, held: list[dict[str, Any]], body: Any, id_name: str) -> dict[str, Any]:
        self._next += 1
        held.append({**body, id_name: f"id-{self._next}"})
        return held[-1]


@pytest.fixture
def kubeflow() -> Iterator[KubeflowServer]:
    """A running server; ``host`` is its address."""
    state = KubeflowServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def do_DELETE(self) -> None:
            self._serve()

        def log_message(self, *_: object) -> None:
            pass

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            text = self.rfile.read(length)
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            state.tokens.add(self.headers.get("Authorization"))
            try:
                code, value = (
                    200,
                    state.answer(self.command, url.path, query, json.loads(text) if text else None),
                )
            except KeyError as error:
                code, value = 404, {"message": f"{error} was not found"}
            except ValueError as error:
                code, value = 400, {"message": str(error)}
            except PermissionError as error:
                code, value = 403, {"message": str(error)}
            answer = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.host = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _filtered(entries: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
    predicates = json.loads(query["filter"])["predicates"] if query.get("filter") else []
    for predicate in predicates:
        assert predicate["operation"] in ("EQUALS", 1), predicate
    return [
        entry
        for entry in entries
        if all(entry[each["key"]] == each["stringValue"] for each in predicates)
        and query.get("experiment_id", entry.get("experiment_id")) == entry.get("experiment_id")
    ]


def _check(body: Any, model: str) -> None:
    """Hold a body against the API's model: nothing may be lost in reading it."""
    client = ApiClient()
    read = client.deserialize(SimpleNamespace(data=json.dumps(body)), model)
    again = client.sanitize_for_serialization(read)
    # JSON for a 64-bit integer is a text, but servers take numbers too, and the SDK sends them.
    wrong = [name for name in body if str(again.get(name)) != str(body[name])]
    if wrong:
        raise ValueError(f"the body is no {model}: {wrong} would be lost or changed")
    if body.get("pipeline_spec"):
        specs = body["pipeline_spec"]
        # The SDK wraps the pipeline only where it has something to say on the platform.
        pipeline = specs.get("pipeline_spec", specs)
        json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(specs.get("platform_spec", {}), pipeline_spec_pb2.PlatformSpec())
