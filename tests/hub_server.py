"""A Hugging Face Hub on the loopback interface, for tests: repositories, commits, branches, access rights, a log.

It answers what huggingface_hub asks for when it creates a repository, commits files and downloads them.  Contents live
in memory; nothing is authenticated beyond comparing with one token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # a dependency of huggingface_hub

TOKEN = "hf_test"


@dataclass
class Repo:
    """One model repository."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Commit the whole content of a branch and return the commit."""
        sha = hashlib.sha1(f"{len(self.commits)} {branch} {id(self)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha


class HubServer:
    """Serve repositories until closed.

    Attributes:
        repos: repositories by id.
        log: method and path of every request.
        before: called with method and path before each answer; a number it returns is sent as HTTP status instead.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[str] = []
        self.before: Callable[[str, str], int | None] = lambda method, path: None
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Refused(Exception):
    """An answer that is an error: status and the code that huggingface_hub reads from a header."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.hub.log.append(f"{self.command} {url.path}")
        try:
            status = self.hub.before(self.command, url.path)
            if status is not None:
                raise _Refused(status, "")
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            if parts[2:3] == ["resolve"]:
                repo, sha = self._find("/".join(parts[:2]), parts[3])
                if repo.gated:
                    raise _Refused(403, "GatedRepo")
                content = repo.commits[sha].get("/".join(parts[4:]))
                if content is None:
                    raise _Refused(404, "EntryNotFound", sha)
                self._send(200, content, {"X-Repo-Commit": sha, "ETag": f'"{_blob_id(content)}"'})
            else:
                status, answer = self._api(parts[1:], body, parse_qs(url.query))
                self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        except _Refused as error:
            status, code, *sha = error.args
            self._send(status, b"", {"X-Error-Code": code, **({"X-Repo-Commit": sha[0]} if sha else {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _find(self, repo_id: str, revision: str) -> tuple[Repo, str]:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._has_token()):
            raise _Refused(404 if self._has_token() else 401, "RepoNotFound")
        sha = (repo.branches | repo.tags).get(revision, revision)
        if sha not in repo.commits:
            raise _Refused(404, "RevisionNotFound")
        return repo, sha

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _api(self, parts: list[str], body: bytes, query: dict[str, list[str]]) -> tuple[int, object]:
        if parts == ["validate-yaml"]:
            errors = _card_errors(json.loads(body)["content"])
            return (400 if errors else 200), {"errors": errors, "warnings": []}
        if self.command == "POST" and not self._has_token():
            raise _Refused(403, "")
        if parts == ["repos", "create"]:
            wanted = json.loads(body)
            repo_id = f"{wanted['organization']}/{wanted['name']}"
            if repo_id in self.hub.repos:
                return 409, {"url": f"{self.hub.url}/{repo_id}"}
            repo = self.hub.repos[repo_id] = Repo(
                private=wanted.get("visibility") == "private" or bool(wanted.get("private"))  # newer, older clients
            )
            repo.commit({})
            return 200, {"url": f"{self.hub.url}/{repo_id}"}
        if parts[0] != "models":
            raise _Refused(404, "")
        repo_id, action, revision = "/".join(parts[1:3]), (parts[3:4] or ["revision"])[0], (parts[4:5] or ["main"])[0]
        if action == "branch":
            repo, sha = self._find(repo_id, "main")
            if revision in repo.branches:
                return 409, {}
            repo.branches[revision] = sha
            return 200, {}
        if action == "refs":
            repo, _ = self._find(repo_id, "main")
            kinds = {"branches": repo.branches, "tags": repo.tags, "converts": {}}
            return 200, {
                kind: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]
                for kind, refs in kinds.items()
            }
        repo, sha = self._find(repo_id, revision)
        files = repo.commits[sha]
        if action == "tag":
            repo.tags[json.loads(body)["tag"]] = sha
            return 200, {}
        if action == "revision":
            return 200, {
                "id": repo_id,
                "sha": sha,
                "private": repo.private,
                "siblings": [{"rfilename": name} for name in files],
            }
        if action == "tree":
            return 200, [
                {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
                for name, content in files.items()
            ]
        if action == "preupload":
            names = [entry["path"] for entry in json.loads(body)["files"]]
            oids = {name: _blob_id(files[name]) for name in names if name in files}
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": oids.get(n)} for n in names]
            return 200, {"files": modes}
        if action == "commit":
            return 200, self._commit(repo, repo_id, revision, body, "1" in query.get("create_pr", []))
        raise _Refused(404, "")

    def _commit(self, repo: Repo, repo_id: str, revision: str, body: bytes, is_pr: bool) -> dict[str, str]:
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repo.commits[repo.branches[revision]])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        branch = "refs/pr/1" if is_pr else revision
        sha = repo.commit(files, branch, lines[0]["value"]["summary"])
        answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        return answer | ({"pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/1"} if is_pr else {})


def _card_errors(card: str) -> list[str]:
    """Return what the Hub's check of front matter would find wrong, as far as cards of this package go."""
    data = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else None
    if not isinstance(data, dict):
        return ["no front matter"]
    tags = data.get("tags", [])
    errors = {
        "license": data.get("license", "other") not in ("apache-2.0", "mit", "other"),
        "library_name": not isinstance(data.get("library_name", ""), str),
        "tags": not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags),
    }
    return [f"{key} is not valid" for key, wrong in errors.items() if wrong]


def _blob_id(content: bytes) -> str:
    """Return the name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
