"""A local model hub that answers huggingface_hub's client when it creates, fills and downloads model repos."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_of-the-tests"


class Hub:
    """Repos as {repo: {commit: {file: bytes}}}, and their branches; reading `private` ones needs the token."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.messages: list[str] = []
        self.private: set[str] = set()
        self.fetched: list[str] = []

    def create(self, repo: str) -> None:
        self.repos[repo], self.branches[repo] = {}, {}
        self.put(repo, "main", {})

    def put(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(repr((repo, branch, sorted(files.items()), len(self.messages))).encode()).hexdigest()
        self.repos[repo][commit], self.branches[repo][branch] = files, commit
        return commit

    def commit(self, repo: str, revision: str) -> str | None:
        return revision if revision in self.repos[repo] else self.branches[repo].get(revision)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, contents: Any, status: int = 200, **headers: str) -> None:
        body = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif parts == ["api", "repos", "create"]:
            request = json.loads(body)
            repo = f"{request.get('organization') or 'me'}/{request['name']}"
            if repo in self.hub.repos:
                self.answer({"url": f"{constants.ENDPOINT}/{repo}"}, 409)
            else:
                self.hub.create(repo)
                self.answer({"url": f"{constants.ENDPOINT}/{repo}"})
        elif parts == ["api", "validate-yaml"]:  # of a card
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self.answer({"errors": [] if isinstance(front.get("tags"), list) else ["no tags"], "warnings": []})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer({"files": modes})
        elif parts[4] == "branch":
            repo = "/".join(parts[2:4])
            branches = self.hub.branches[repo]
            self.answer({}, 409 if parts[5] in branches else 200)
            branches.setdefault(parts[5], branches["main"])
        elif parts[4] == "commit":
            repo, branch = "/".join(parts[2:4]), parts[5]
            files = dict(self.hub.repos[repo][self.hub.branches[repo][branch]])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            commit = self.hub.put(repo, branch, files)
            self.answer(
                {"success": True, "commitOid": commit, "commitUrl": f"{constants.ENDPOINT}/{repo}/commit/{commit}"}
            )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo not in self.hub.repos or (repo in self.hub.private and "Authorization" not in self.headers):
            return self.answer({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
        kind, revision, *rest = (parts[4:] or ["revision"]) if api else parts[2:]
        commit = self.hub.commit(repo, revision)
        if commit is None:
            return self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        files = self.hub.repos[repo][commit]
        if kind == "revision":
            return self.answer({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if kind == "tree":
            tree = [{"type": "file", "path": name, "size": len(data), "oid": sha(data)} for name, data in files.items()]
            return self.answer(tree)
        name = "/".join(rest)
        if name not in files:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        self.hub.fetched.append(name)
        return self.answer(files[name], X_Repo_Commit=commit, ETag=f'"{sha(files[name])}"')


def sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def running_hub(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that this process's client uses, with an empty cache and a token that may write."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
