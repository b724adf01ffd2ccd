"""The Hugging Face Hub's HTTP interface for uploads, on this machine, with its bad days."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

OWNER = "somebody"
LFS_SUFFIXES = (".safetensors", ".msgpack")
AGENTS = "/api/agent-harnesses"
"""What huggingface_hub 1.x asks for its statistics, once a day, where it believes to be run by an agent."""
Answer = Callable[["Request"], None]


@dataclass
class Request:
    """A request that was read whole, and how to answer it."""

    handler: http.server.BaseHTTPRequestHandler
    stub: HubStub
    body: bytes

    @property
    def path(self) -> str:
        return self.handler.path.partition("?")[0]

    def send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.handler.send_response(status)
        self.handler.send_header("Content-Type", "application/json")
        self.handler.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.handler.send_header("X-Error-Message", value.get("error", ""))
        self.handler.end_headers()
        self.handler.wfile.write(body)


def status(number: int, text: str = "the stub says so") -> Answer:
    """Answer with an error that quotes what it was asked with, as careless servers do."""

    def answer(request: Request) -> None:
        request.send(number, {"error": f"{text} (asked with {request.handler.headers.get('Authorization')})"})

    return answer


def hang(request: Request) -> None:
    """Say nothing until the stub is closed."""
    request.stub.closing.wait(60)


def drop(request: Request) -> None:
    """Hang up."""
    request.handler.close_connection = True
    request.handler.connection.close()


def late(seconds: float) -> Answer:
    """Answer well, but not soon."""

    def answer(request: Request) -> None:
        request.stub.closing.wait(seconds)
        request.stub.serve(request)

    return answer


@dataclass
class HubStub:
    """One user's account, as the server sees it.

    Attributes:
        token: that may write.
        answers: used up first, one a request, before the requests are answered well.
        always: answers every request in the place of that.
        repositories: content of each file by path, by repository.
        commits: (repository, message, paths) in order.
        requests: method and path of each, in order.
        received: every body, to be searched.
    """

    token: str
    answers: list[Answer] = field(default_factory=list)
    always: Answer | None = None
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)
    closing: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        stub, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = b"".join(read_body(self))
                if self.path == AGENTS:
                    return Request(self, stub, body).send(404, {})
                with lock:
                    stub.requests.append(f"{self.command} {self.path}")
                    stub.received.append(body)
                    answer = stub.always or (stub.answers.pop(0) if stub.answers else stub.serve)
                answer(Request(self, stub, body))

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None:
                """A client that hangs up is nothing to report."""

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, request: Request) -> None:
        """Answer as the Hub does."""
        path, method = request.path, request.handler.command
        if path.startswith("/lfs/") and method == "PUT":  # a signed address elsewhere: no token is sent there
            return self._store(request, path.removeprefix("/lfs/"))
        if request.handler.headers.get("Authorization") != f"Bearer {self.token}":
            return request.send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(request)
        if path == "/api/validate-yaml":
            return self._validate(request)
        kind, _, rest = path.removeprefix("/").partition("/")
        repository = "/".join((rest if kind == "api" else f"{kind}/{rest}").removeprefix("models/").split("/")[:2])
        repository = repository.removesuffix(".git")
        if repository not in self.repositories:
            return request.send(404, {"error": "Repository not found"})
        for part, serve in (
            ("/preupload/", self._preupload),
            ("/objects/batch", self._batch),
            ("/commit/", self._commit),
        ):
            if part in path:
                return serve(request, repository)
        return request.send(200, {"id": repository, "sha": "0" * 40})

    def _create(self, request: Request) -> None:
        asked = json.loads(request.body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        there = name in self.repositories
        self.repositories.setdefault(name, {})
        answer = {"url": f"{self.url}/{name}", **({"error": "You already created this model repo"} if there else {})}
        request.send(409 if there else 200, answer)

    def _validate(self, request: Request) -> None:
        """Hold a card's metadata to the shape that the Hub wants."""
        content = json.loads(request.body)["content"]
        match = REGEX_YAML_BLOCK.search(content)
        errors = ["there is no metadata"] if match is None else wrong_metadata(yaml.safe_load(match.group(2)))
        request.send(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    def _preupload(self, request: Request, repository: str) -> None:
        def mode(file: dict[str, Any]) -> dict[str, Any]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or "tfevents" in file["path"] or file["size"] > 10_000_000
            there = self.repositories[repository].get(file["path"])
            if there is None:
                oid = None
            elif lfs:
                oid = hashlib.sha256(there).hexdigest()
            else:
                oid = hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
            return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

        request.send(200, {"files": [mode(file) for file in json.loads(request.body)["files"]]})

    def _batch(self, request: Request, repository: str) -> None:
        objects = [
            {key: asked[key] for key in ("oid", "size")}
            | ({} if asked["oid"] in self.lfs else {"actions": {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}})
            for asked in json.loads(request.body)["objects"]
        ]
        request.send(200, {"transfer": "basic", "objects": objects})

    def _store(self, request: Request, oid: str) -> None:
        if hashlib.sha256(request.body).hexdigest() != oid:
            return request.send(400, {"error": "the content has another hash than was said"})
        self.lfs[oid] = request.body
        return request.send(200, {})

    def _commit(self, request: Request, repository: str) -> None:
        header, *lines = [json.loads(line) for line in request.body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.lfs:
                    return request.send(400, {"error": f"there is no content of {value['path']}"})
                files[value["path"]] = self.lfs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        self.received += files.values()
        self.repositories[repository] |= files
        self.commits.append((repository, header["value"]["summary"], sorted(files)))
        oid = f"{len(self.commits):040x}"
        return request.send(200, {"commitUrl": f"{self.url}/{repository}/commit/{oid}", "commitOid": oid})


def read_body(handler: http.server.BaseHTTPRequestHandler) -> Iterator[bytes]:
    """Read what a request sends, at once or in chunks."""
    if handler.headers.get("Transfer-Encoding") != "chunked":
        yield handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        return
    while size := int(handler.rfile.readline(), 16):
        yield handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()


def wrong_metadata(data: Any) -> list[str]:
    """List what the Hub would not take of a card's metadata, by its documentation."""
    wrong = [
        f"{key} must be {kind.__name__}" for key, kind in KINDS.items() if not isinstance(data.get(key, kind()), kind)
    ]
    for index in data.get("model-index", []):
        for result in index["results"]:
            wrong += [f"{part} has no type" for part in ("task", "dataset") if not result[part].get("type")]
            wrong += [] if result["dataset"].get("name") else ["the data set has no name"]
            wrong += [f"{m} is no metric" for m in result["metrics"] if not m.get("type") or m.get("value") is None]
    names = [*data.get("base_model", []), *data.get("datasets", [])]
    return wrong + [f"{name} is no id" for name in names if name.startswith((".", "/")) or name.count("/") > 1]


KINDS = {"tags": list, "datasets": list, "metrics": list, "base_model": list, "pipeline_tag": str, "library_name": str}
