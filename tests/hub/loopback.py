"""A Hub on 127.0.0.1 that answers what `kernels` and `huggingface_hub` ask for when they load a kernel.

    GET  /api/kernels/<repo>/refs                     branches and their commits: version -> commit
    GET  /api/kernels/<repo>/revision/<revision>      the repository and its files at a commit
    GET  /api/kernels/<repo>/tree/<revision>[/<dir>]  files and folders with sizes
    GET  /api/organizations/<name>/overview           whether its kernels are trusted
    HEAD, GET /kernels/<repo>/resolve/<revision>/<file>

Repositories live in memory, a commit is a dictionary of path -> content, and a test may change them, or
damage downloads, while the server runs. Every request is kept in `requests`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


def read_files(folder: Path, prefix: str = "") -> Files:
    """The files of a folder, their paths behind `prefix`; without byte code and hidden entries."""
    relative = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        prefix + name.as_posix(): path.read_bytes()
        for name, path in relative.items()
        if not any(part.startswith((".", "__pycache__")) for part in name.parts)
    }


def git_hash(kind: str, content: bytes) -> str:
    """A 40-digit hash as git has them; the Hub's ETag of a small file."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Repository:
    """Branches and the files of each commit."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """Put `files` on a branch and return the commit, which follows from the content."""
        listing = "".join(f"{path} {git_hash('blob', files[path])}\n" for path in sorted(files))
        commit = git_hash("commit", listing.encode())
        self.branches[branch] = commit
        self.commits[commit] = dict(files)
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or a commit names."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


class LoopbackHub:
    """The server; use it as a context. `url` is the value for HF_ENDPOINT.

    Attributes:
        repositories: name ("org/flash-kda") -> Repository.
        trusted: organisations whose kernels need no trust_remote_code.
        damage: path -> function of its content; what it returns is sent instead, under the true content's
            hash and size.
        requests: "GET /path?query" of everything asked for, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.trusted: set[str] = set()
        self.damage: dict[str, Callable[[bytes], bytes]] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloads(self) -> list[str]:
        """Paths of the files whose content was asked for."""
        return [
            line.split("/resolve/", 1)[1].split("/", 1)[1]
            for line in self.requests
            if line.startswith("GET") and "/resolve/" in line
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path.startswith("/api/organizations/") and path.endswith("/overview"):
            return self._organization(path.split("/")[3])
        for name, repository in self.hub.repositories.items():
            if path.startswith(f"/api/kernels/{name}"):
                rest = path.removeprefix(f"/api/kernels/{name}").strip("/")
                return self._api(name, repository, rest, recursive="recursive=true" in url.query.lower())
            for prefix in (f"/kernels/{name}/resolve/", f"/{name}/resolve/"):
                if path.startswith(prefix):
                    return self._file(repository, *path.removeprefix(prefix).split("/", 1))
        return self._refuse("RepoNotFound")

    do_HEAD = do_GET

    def _organization(self, name: str) -> None:
        trusted = name in self.hub.trusted
        self._send_json({"name": name, "fullname": name, "avatarUrl": "", "trustedKernelPublisher": trusted})

    def _api(self, name: str, repository: Repository, rest: str, recursive: bool) -> None:
        if rest == "refs":
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
                for branch, commit in repository.branches.items()
            ]
            return self._send_json({"branches": branches, "converts": [], "tags": []})
        kind, _, rest = rest.partition("/")
        revision, _, folder = rest.partition("/")
        commit = repository.resolve(revision or "main")
        if commit is None:
            return self._refuse("RevisionNotFound")
        files = repository.commits[commit]
        if kind == "tree":
            return self._send_json(list(_tree(files, folder.strip("/"), recursive)))
        return self._send_json(
            {
                "_id": git_hash("repository", name.encode()),
                "id": name,
                "author": name.split("/")[0],
                "sha": commit,
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        commit = repository.resolve(revision)
        if commit is None:
            return self._refuse("RevisionNotFound")
        content = repository.commits[commit].get(path)
        if content is None:
            return self._refuse("EntryNotFound", {"X-Repo-Commit": commit})
        headers = {
            "ETag": f'"{git_hash("blob", content)}"',
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(content)),
        }
        if self.command == "GET" and path in self.hub.damage:
            content = self.hub.damage[path](content)
        return self._send(content, headers, content_type="application/octet-stream")

    def _refuse(self, code: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": code}).encode()
        self._send(body, {"X-Error-Code": code, **(headers or {})}, status=404)

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {})

    def _send(
        self, body: bytes, headers: dict[str, str], status: int = 200, content_type: str = "application/json"
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree(files: Files, folder: str, recursive: bool):
    """The entries of a folder, as the Hub lists them: folders first seen, then files."""
    prefix = f"{folder}/" if folder else ""
    folders = set()
    for path, content in files.items():
        if not path.startswith(prefix):
            continue
        *parents, _ = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
            below = prefix + "/".join(parents[:depth])
            if below not in folders:
                folders.add(below)
                yield {"type": "directory", "oid": git_hash("tree", below.encode()), "size": 0, "path": below}
        if recursive or not parents:
            yield {"type": "file", "oid": git_hash("blob", content), "size": len(content), "path": path}
