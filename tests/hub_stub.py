"""The Hugging Face Hub's HTTP interface for uploads, on this machine, with its bad days."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

OWNER = "somebody"
LFS_SUFFIXES = (".safetensors", ".msgpack")
# What huggingface_hub 1.x asks for its statistics, once a day, where it believes to be run by an agent.
AGENTS = "/api/agent-harnesses"
REPOSITORY = re.compile(r"/(?:api/models/)?([^/]+/[^/.]+)")


class Request(http.server.BaseHTTPRequestHandler):
    """A request, read whole, and how to answer it."""

    protocol_version = "HTTP/1.1"
    stub: HubStub
    body: bytes

    def answer(self) -> None:
        self.body = b"".join(self.read_body())
        if self.path == AGENTS:
            return self.send(404, {})
        with self.stub.lock:
            self.stub.requests.append(f"{self.command} {self.path}")
            self.stub.received.append(self.body)
            answer = self.stub.always or (self.stub.answers.pop(0) if self.stub.answers else self.stub.serve)
        answer(self)

    do_GET = do_POST = do_PUT = answer

    def read_body(self) -> Iterator[bytes]:
        """Read what is sent, at once or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Message", value.get("error", ""))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is nothing to report."""


Answer = Callable[[Request], None]


def status(number: int) -> Answer:
    """Answer with an error that quotes what it was asked with, as careless servers do."""
    return lambda request: request.send(number, {"error": f"no (asked with {request.headers.get('Authorization')})"})


def hang(request: Request) -> None:
    """Say nothing until the stub is closed."""
    request.stub.closing.wait(60)


def drop(request: Request) -> None:
    """Hang up."""
    request.close_connection = True
    request.connection.close()


def late(seconds: float) -> Answer:
    """Answer well, but not soon."""
    return lambda request: request.stub.closing.wait(seconds) or request.stub.serve(request)


class HubStub:
    """One user's account, as the server sees it."""

    def __init__(self, token: str) -> None:
        self.token = token  # that may write
        self.answers: list[Answer] = []  # used up first, one a request, before the requests are answered well
        self.always: Answer | None = None  # answers every request in the place of that
        self.repositories: dict[str, dict[str, bytes]] = {}  # content of each file by path, by repository
        self.commits: list[tuple[str, str, list[str]]] = []  # (repository, message, paths) in order
        self.requests: list[str] = []  # method and path of each, in order
        self.received: list[bytes] = []  # every body, to be searched
        self.lfs: dict[str, bytes] = {}
        self.closing, self.lock = threading.Event(), threading.Lock()
        self._server = Server(("127.0.0.1", 0), type("RequestOfStub", (Request,), {"stub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, request: Request) -> None:
        """Answer as the Hub does."""
        path = request.path.partition("?")[0]
        if path.startswith("/lfs/") and request.command == "PUT":  # a signed address elsewhere: no token is sent there
            return self._store(request, path.removeprefix("/lfs/"))
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return request.send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(request)
        if path == "/api/validate-yaml":
            return self._validate(request)
        found = REPOSITORY.match(path)
        repository = found.group(1) if found else ""
        if repository not in self.repositories:
            return request.send(404, {"error": "Repository not found"})
        parts = {"/preupload/": self._preupload, "/objects/batch": self._batch, "/commit/": self._commit}
        for part, serve in parts.items():
            if part in path:
                return serve(request, repository)
        return request.send(200, {"id": repository, "sha": "0" * 40})

    def _create(self, request: Request) -> None:
        asked = json.loads(request.body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        error = {"error": "You already created this model repo"} if name in self.repositories else {}
        self.repositories.setdefault(name, {})
        request.send(409 if error else 200, {"url": f"{self.url}/{name}", **error})

    def _validate(self, request: Request) -> None:
        """Hold a card's metadata to the shape that the Hub wants."""
        match = REGEX_YAML_BLOCK.search(json.loads(request.body)["content"])
        errors = ["there is no metadata"] if match is None else wrong_metadata(yaml.safe_load(match.group(2)))
        request.send(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    def _preupload(self, request: Request, repository: str) -> None:
        def mode(file: dict[str, Any]) -> dict[str, Any]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or "tfevents" in file["path"]
            oid = None
            if (there := self.repositories[repository].get(file["path"])) is not None:
                blob = there if lfs else b"blob %d\0" % len(there) + there
                oid = hashlib.new("sha256" if lfs else "sha1", blob).hexdigest()
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
        files = {
            line["value"]["path"]: self.lfs[line["value"]["oid"]]
            if line["key"] == "lfsFile"
            else base64.b64decode(line["value"]["content"])
            for line in lines
        }
        self.received += files.values()
        self.repositories[repository] |= files
        self.commits.append((repository, header["value"]["summary"], sorted(files)))
        oid = f"{len(self.commits):040x}"
        return request.send(200, {"commitUrl": f"{self.url}/{repository}/commit/{oid}", "commitOid": oid})


LISTS, TEXTS = ("tags", "datasets", "metrics", "base_model"), ("pipeline_tag", "library_name")


def wrong_metadata(data: Any) -> list[str]:
    """List what the Hub would not take of a card's metadata, by its documentation."""
    kinds = {**dict.fromkeys(LISTS, list), **dict.fromkeys(TEXTS, str)}
    wrong = [
        f"{key} must be {kind.__name__}" for key, kind in kinds.items() if not isinstance(data.get(key, kind()), kind)
    ]
    for result in (result for index in data.get("model-index", []) for result in index["results"]):
        wrong += [f"{part} has no type" for part in ("task", "dataset") if not result[part].get("type")]
        wrong += [] if result["dataset"].get("name") else ["the data set has no name"]
        wrong += [f"{m} is no metric" for m in result["metrics"] if not m.get("type") or m.get("value") is None]
    names = [*data.get("base_model", []), *data.get("datasets", [])]
    return wrong + [f"{name} is no id" for name in names if name.startswith((".", "/")) or name.count("/") > 1]
