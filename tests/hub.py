"""A hub on this machine, that the real huggingface_hub talks to: names, commits of small files, and reading them."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest

TOKEN = "hf_of_the_owner"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Hub:
    """What arrived: OWNER/NAME → files. Who has no `TOKEN` is refused with `refusal`."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    refusal: int = 401


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def refused(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self.answer({"error": "no"}, self.hub.refusal)
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if not path:
            return self.answer({})
        of_api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if self.refused():
            return None
        if repository is None:
            return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
        commit = f"{repository.commits:040d}"
        if of_api and rest[:1] == ["tree"]:
            return self.answer(
                [{"type": "file", "path": path, "size": 1, "oid": commit} for path in repository.files]
                if len(rest) == 2
                else []
            )
        if of_api:
            siblings = [{"rfilename": path} for path in repository.files]
            return self.answer(
                {"id": f"{owner}/{name}", "private": repository.private, "sha": commit, "siblings": siblings}
            )
        content = repository.files.get("/".join(rest[2:]))
        if content is None:
            return self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        mark = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(content, ETag=mark, X_Repo_Commit=commit)

    def do_POST(self) -> None:
        body = self.body()
        if self.refused():
            return None
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            # huggingface_hub 1 says private, 2 says visibility
            new = Repository(given.get("visibility") == "private" or given.get("private") is True)
            known = name in self.hub.repositories
            self.hub.repositories.setdefault(name, new)
            return self.answer({"url": f"{self.hub.address}/{name}"}, 409 if known else 200)
        owner, name, verb, _ = self.path.partition("?")[0].removeprefix("/api/models/").split("/")
        repository = self.hub.repositories[f"{owner}/{name}"]
        if verb == "preupload":
            wanted = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]}
            )
        assert verb == "commit", self.path
        for line in body.splitlines():
            what = json.loads(line)
            if what["key"] == "file":
                repository.files[what["value"]["path"]] = base64.b64decode(what["value"]["content"])
            elif what["key"] == "deletedFile":
                del repository.files[what["value"]["path"]]
        repository.commits += 1
        commit = f"{repository.commits:040d}"
        return self.answer({"commitUrl": f"{self.hub.address}/{owner}/{name}/commit/{commit}", "commitOid": commit})


@contextmanager
def local_hub(patch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """Where huggingface_hub finds the hub while the body runs, and puts what it downloads."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", cache)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
    patch.setattr("transformers.utils.hub.hf_api", lambda: huggingface_hub.HfApi(endpoint=hub.address))
    # the one that it keeps, if somebody asked before; without, modules that hold `hf_api` itself wait for the real hub
    patch.setattr("transformers.utils.hub._hf_api", huggingface_hub.HfApi(endpoint=hub.address), raising=False)
    patch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
