"""A Hub on the loopback that the real client libraries talk to: repositories, commits, LFS, pull requests, and faults.

    with HubServer() as hub:
        hub.add_user("ada", "hf_ada")
        hub.drop("PUT", "/lfs/", bytes_read=1000)
        subprocess.run(command, env={**os.environ, **hub.variables(), "HF_TOKEN": "hf_ada"}, check=True)
        assert hub.files("ada/net")["config.json"] == b"{}"

The client reads its endpoint once, at import: give ``variables()`` to a new process.
"""

import base64
import codecs
import contextlib
import hashlib
import json
import re
import secrets
import socket
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
# fmt: off
_LICENSES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0",
    "cc0-1.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail",
    "openrail++", "odc-by", "pddl", "unlicense", "other", "unknown",
}
# fmt: on
_LFS_SUFFIXES = (".safetensors", ".bin", ".png")
_LFS_SIZE = 10 * 1024 * 1024


@dataclass
class Request:
    """What a client asked; ``status`` stays None where it got no answer."""

    method: str
    path: str
    token: str | None
    status: int | None = None


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether it is kept in LFS."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @cached_property
    def sha1(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def oid(self) -> str:
        """What clients compare their own file with."""
        return self.sha256 if self.lfs else self.sha1


@dataclass(frozen=True)
class Commit:
    """A state of all files; ``changed`` are the paths that were added, altered or removed by it."""

    oid: str
    title: str
    message: str
    author: str
    date: str
    parent: str | None
    files: dict[str, Blob]
    changed: tuple[str, ...]


@dataclass
class _User:
    name: str
    token: str
    orgs: tuple[str, ...]
    can_write: bool

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass
class _Repo:
    id: str
    type: str
    private: bool
    created: str = field(default_factory=lambda: _now())
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def page(self) -> str:
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        ref = self.ref(revision)
        oid = self.refs[ref] if ref else revision
        if oid not in self.commits:
            raise _Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, oid: str | None) -> Iterator[Commit]:
        while oid is not None:
            commit = self.commits[oid]
            yield commit
            oid = commit.parent

    def commit(
        self, ref: str, parent: Commit | None, files: dict[str, Blob], title: str, author: str, message: str = ""
    ) -> Commit:
        before = parent.files if parent else {}
        changed = tuple(sorted(path for path in {*before, *files} if before.get(path) != files.get(path)))
        parent_oid = parent.oid if parent else None
        commit = Commit(secrets.token_hex(20), title, message, author, _now(), parent_oid, files, changed)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit


@dataclass
class _Fault:
    method: str
    pattern: str
    times: int | None
    after: int
    status: int | None = None  # None: the connection is dropped
    headers: dict[str, str] = field(default_factory=dict)
    after_handling: bool = False
    bytes_read: int | None = None
    bytes_sent: int | None = None

    def is_due(self, request: Request) -> bool:
        if self.times == 0 or request.method != self.method or not re.search(self.pattern, request.path):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class _Answer:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class _Problem(Exception):
    """An answer that is an error, as the Hub words them."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, **body: Any
    ) -> None:
        super().__init__(message)
        headers = {**(headers or {}), "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer = _json({"error": message, **body}, status, headers)


@dataclass
class _Call:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: _User | None

    @property
    def login(self) -> _User:
        if self.user is None:
            raise _Problem(401, "Invalid username or password.")
        return self.user

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body or b"{}")
        except ValueError as error:
            raise _Problem(400, f"Invalid JSON: {error}") from None
        if not isinstance(value, dict):
            raise _Problem(400, "Expected a JSON object")
        return value

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


_ROUTES: list[tuple[str, re.Pattern[str], str | None, Callable[..., Any]]] = []
_PLACES = {
    "{api}": r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)",
    "{page}": r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)",
    "{rev}": r"(?P<revision>[^/]+)",
}


def _route(method: str, pattern: str, right: str | None = None) -> Callable[[Any], Any]:
    """Answer requests by a method of the server; with ``right`` it gets the repository, checked for that right."""
    for name, place in _PLACES.items():
        pattern = pattern.replace(name, place)

    def register(function: Any) -> Any:
        _ROUTES.append((method, re.compile(pattern), right, function))
        return function

    return register


class HubServer:
    """A Hub on the loopback with what was put into it; see the module's docstring."""

    def __init__(self, page_size: int = 1000) -> None:
        self.page_size = page_size
        self.requests: list[Request] = []
        self._lock = threading.RLock()
        self._users: dict[str, _User] = {}
        self._repos: dict[tuple[str, str], _Repo] = {}
        self._moved: dict[tuple[str, str], str] = {}
        self._uploads: dict[str, tuple[_Repo, str, int]] = {}
        self._faults: list[_Fault] = []
        self._spoiled: dict[str, bytes] = {}
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop: open connections end, and later ones are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up_all()
        self._thread.join()

    # What tests set up and look at.

    def add_user(self, name: str, token: str, orgs: Iterable[str] = (), can_write: bool = True) -> None:
        """A user; ``can_write=False`` makes the token a read-only one."""
        with self._lock:
            self._users[token] = _User(name, token, tuple(orgs), can_write)

    def create_repo(self, repo_id: str, type: str = "model", private: bool = False) -> None:
        """A repository as it is when new: one commit, with ``.gitattributes``."""
        with self._lock:
            if (type, repo_id) in self._repos:
                raise ValueError(f"the {type} {repo_id} exists already")
            repo = self._repos[type, repo_id] = _Repo(repo_id, type, private)
            self._moved.pop((type, repo_id), None)
            lines = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES)
            files = {".gitattributes": Blob(lines.encode(), False)}
            repo.commit("refs/heads/main", None, files, "initial commit", repo.owner)

    def seed(
        self,
        repo_id: str,
        files: dict[str, bytes | None],
        type: str = "model",
        message: str = "Seed",
        revision: str = "main",
    ) -> str:
        """Commit from the test's side and return the commit's oid; None as a content deletes the file."""
        with self._lock:
            repo = self._repos[type, repo_id]
            after = dict(repo.at(revision).files)
            for path, content in files.items():
                after.pop(path, None)
                if content is not None:
                    after[path] = Blob(content, _goes_to_lfs(path, content[:512], len(content)))
                    repo.objects[after[path].sha256] = content
            ref = repo.ref(revision)
            assert ref is not None, f"{revision} is no branch"
            return repo.commit(ref, repo.at(ref), after, message, repo.owner).oid

    def files(self, repo_id: str, revision: str = "main", type: str = "model") -> dict[str, bytes]:
        """Contents by path at a branch, tag, commit or ``refs/pr/N``."""
        with self._lock:
            return {path: blob.content for path, blob in self._repos[type, repo_id].at(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main", type: str = "model") -> list[Commit]:
        """The history, newest first; the last is the one that creating the repository made."""
        with self._lock:
            repo = self._repos[type, repo_id]
            return list(repo.history(repo.at(revision).oid))

    def refs(self, repo_id: str, type: str = "model") -> dict[str, str]:
        """The commits that ``refs/heads/..``, ``refs/tags/..`` and ``refs/pr/N`` point to."""
        with self._lock:
            return dict(self._repos[type, repo_id].refs)

    def repos(self) -> list[tuple[str, str, bool]]:
        """Type, id and whether it is private, of every repository."""
        with self._lock:
            return [(repo.type, repo.id, repo.private) for repo in self._repos.values()]

    def variables(self) -> dict[str, str]:
        """The environment of a process that shall use this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_ETAG_TIMEOUT": "10",
            "HF_HUB_DOWNLOAD_TIMEOUT": "10",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    # Faults. The first that is due decides, in the order in which they were asked for.

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int = 503,
        times: int | None = 1,
        headers: dict[str, str] | None = None,
        after: int = 0,
    ) -> None:
        """Answer the next ``times`` requests like this (None: all) with an error, once ``after`` have passed.

        ``pattern`` is searched in the path with its query, as sent (``refs%2Fpr%2F1``).
        """
        with self._lock:
            self._faults.append(_Fault(method, pattern, times, after, status, headers or {}))

    def drop(
        self,
        method: str,
        pattern: str,
        *,
        times: int | None = 1,
        after: int = 0,
        after_handling: bool = False,
        bytes_read: int | None = None,
        bytes_sent: int | None = None,
    ) -> None:
        """Close the connection of such requests, unanswered and, without ``after_handling``, without any effect.

        ``bytes_read``: that far into the request's body. ``after_handling``: everything is done, the answer is lost.
        ``bytes_sent``: that far into the answer's body.
        """
        fault = _Fault(method, pattern, times, after, None, {}, after_handling, bytes_read, bytes_sent)
        with self._lock:
            self._faults.append(fault)

    def spoil(self, path: str, content: bytes) -> None:
        """Store other content than was sent for a file of every commit."""
        self._spoiled[path] = content

    def recover(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()
            self._spoiled.clear()

    # Requests.

    def _serve(self, handler: "_Handler") -> None:
        scheme, _, token = handler.headers.get("Authorization", "").partition(" ")
        request = Request(handler.command, handler.path, token if scheme == "Bearer" else None)
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.is_due(request)), None)
        if fault is not None and fault.status is None and not fault.after_handling and fault.bytes_sent is None:
            handler.rfile.read(min(fault.bytes_read or 0, int(handler.headers.get("Content-Length", 0))))
            handler.close_connection = True
            return
        # Read it whatever the answer is: what is left would be taken for the next request.
        body = handler.read_body()
        if body is None:
            handler.close_connection = True
            return
        if fault is not None and fault.status is not None:
            answer = _Problem(fault.status, f"Injected fault: {fault.status}", None, fault.headers).answer
        else:
            with self._lock:
                answer = self._answer(request, handler.headers, body)
        if fault is not None and fault.after_handling:
            handler.close_connection = True
            return
        request.status = answer.status
        handler.send(answer, fault.bytes_sent if fault is not None else None)

    def _answer(self, request: Request, headers: Any, body: bytes) -> _Answer:
        path, _, query = request.path.partition("?")
        try:
            if request.token is not None and request.token not in self._users:
                raise _Problem(401, "Invalid credentials in Authorization header")
            user = None if request.token is None else self._users[request.token]
            parameters = urllib.parse.parse_qs(query, keep_blank_values=True)
            return self._dispatch(_Call(request.method, path, parameters, headers, body, user))
        except _Problem as problem:
            return problem.answer
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return _Problem(500, f"The test server failed: {traceback.format_exc(limit=-1)}".replace("\n", " ")).answer

    def _dispatch(self, call: _Call) -> _Answer:
        for method, pattern, right, function in _ROUTES:
            found = pattern.fullmatch(call.path)
            if found is None or method != ("GET" if call.method == "HEAD" else call.method):
                continue
            groups: dict[str, Any] = {
                name: urllib.parse.unquote(value or "") for name, value in found.groupdict().items()
            }
            if right is not None:
                groups["repo"] = self._find(call, _KINDS[groups.pop("kind") or "models"], groups.pop("id"), right)
            answer = function(self, call, **groups)
            return answer if isinstance(answer, _Answer) else _json(answer)
        # Repositories without an owner exist on the Hub, though none do here.
        ownerless = r"/[^/]+/resolve/.*|/api/(models|datasets|spaces)/[^/]+(/(revision|tree)/.*)?"
        code = "RepoNotFound" if re.fullmatch(ownerless, call.path) else None
        raise _Problem(404, f"Not found: {call.method} {call.path}", code)

    def _find(self, call: _Call, type: str, repo_id: str, right: str) -> _Repo:
        """The repository, if the user has the right to ``read``, ``contribute`` (propose changes) or ``write``."""
        repo = self._repos.get((type, self._moved.get((type, repo_id), repo_id)))
        owns = repo is not None and call.user is not None and call.user.owns(repo.owner)
        if repo is None or (repo.private and not owns):
            # The same for both: nobody shall learn what is there.
            status, message = (401, "Invalid username or password.") if call.user is None else (404, "Not found")
            raise _Problem(status, f"{message} ({type} {repo_id})", "RepoNotFound")
        if right != "read" and (not call.login.can_write or (right == "write" and not owns)):
            raise _Problem(403, f"You don't have write access to the {type} {repo_id}")
        return repo

    def _check_namespace(self, call: _Call, name: str) -> None:
        if not call.login.can_write or not call.login.owns(name):
            raise _Problem(403, f'You don\'t have the rights to create under the namespace "{name}"')

    @_route("GET", "/api/whoami-v2")
    def _whoami(self, call: _Call) -> Any:
        role = "write" if call.login.can_write else "read"
        return {
            "type": "user",
            "name": call.login.name,
            "orgs": [{"type": "org", "name": name} for name in call.login.orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    @_route("POST", "/api/repos/create")
    def _create(self, call: _Call) -> Any:
        value = call.json()
        kind, name = value.get("type") or "model", value.get("name")
        owner = value.get("organization") or call.login.name
        self._check_namespace(call, owner)
        if kind not in _KINDS.values() or not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]{0,95}", name):
            raise _Problem(400, f"Invalid repo type or name: {kind}, {name}")
        repo_id = f"{owner}/{name}"
        url = f"{self.url}/{_Repo(repo_id, kind, False).page}"
        if (kind, repo_id) in self._repos:
            raise _Problem(409, f"You already created this {kind} repo", url=url)
        self.create_repo(repo_id, kind, value.get("visibility") == "private" or bool(value.get("private")))
        return {"url": url, "name": repo_id}

    @_route("DELETE", "/api/repos/delete")
    def _delete(self, call: _Call) -> Any:
        value = call.json()
        owner = value.get("organization") or call.login.name
        repo = self._find(call, value.get("type") or "model", f"{owner}/{value.get('name')}", "write")
        del self._repos[repo.type, repo.id]
        return {}

    @_route("POST", "/api/repos/move")
    def _move(self, call: _Call) -> Any:
        value = call.json()
        old, new, kind = value["fromRepo"], value["toRepo"], value.get("type") or "model"
        repo = self._find(call, kind, old, "write")
        self._check_namespace(call, new.split("/")[0])
        if (kind, new) in self._repos:
            raise _Problem(409, f"The {kind} {new} exists already")
        del self._repos[kind, repo.id]
        # The old name goes on leading to it, until someone takes that name.
        self._moved[kind, repo.id] = new
        self._moved.pop((kind, new), None)
        repo.id = new
        self._repos[kind, new] = repo
        return {}

    @_route("POST", "/api/validate-yaml")
    def _validate(self, call: _Call) -> Any:
        errors, warnings = check_card(str(call.json().get("content", "")))
        body = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return _json(body, 400 if errors else 200)

    @_route("GET", "{api}(?:/revision/{rev})?", "read")
    def _info(self, call: _Call, repo: _Repo, revision: str) -> Any:
        commit = repo.at(revision or "main")
        card = _card(commit)
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            row: dict[str, Any] = {"rfilename": path}
            if call.flag("blobs"):
                row |= {"size": len(blob.content), "blobId": blob.sha1}
                if blob.lfs:
                    lfs = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
                    row["lfs"] = lfs
            siblings.append(row)
        info = {
            "id": repo.id,
            "author": repo.owner,
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "createdAt": repo.created,
            "lastModified": commit.date,
            "siblings": siblings,
            "tags": _tags(card),
            "cardData": card,
        }
        if repo.type == "model":
            info |= {key: card.get(key) for key in ("pipeline_tag", "library_name", "model-index")}
        expand = call.query.get("expand", [])
        if expand:
            info["evalResults"] = list(_eval_results(commit))
            info = {key: value for key, value in info.items() if key in ("id", *expand)}
        return info

    @_route("GET", "{api}/tree/{rev}(?:/(?P<folder>.+))?", "read")
    def _tree(self, call: _Call, repo: _Repo, revision: str, folder: str) -> Any:
        commit = repo.at(revision)
        rows = _rows(commit, folder.strip("/"), call.flag("recursive"))
        if folder and not rows:
            raise _Problem(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return self._page(call, _with_commits(repo, commit, rows) if call.flag("expand") else rows)

    @_route("POST", "{api}/paths-info/{rev}", "read")
    def _paths_info(self, call: _Call, repo: _Repo, revision: str) -> Any:
        commit = repo.at(revision)
        form = urllib.parse.parse_qs(call.body.decode())
        asked = [path.strip("/") for path in form.get("paths", [])]
        rows = [row for row in _rows(commit, "", True) if row["path"] in asked]
        return _with_commits(repo, commit, rows) if form.get("expand") == ["true"] else rows

    @_route("GET", "{api}/commits/{rev}", "read")
    def _commits(self, call: _Call, repo: _Repo, revision: str) -> Any:
        rows = []
        for commit in repo.history(repo.at(revision).oid):
            row = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
            rows.append({**row, "authors": [{"user": commit.author}]})
        return self._page(call, rows)

    def _page(self, call: _Call, rows: list[Any]) -> _Answer:
        start = int(call.query.get("cursor", ["0"])[0])
        stop = start + self.page_size
        headers = {}
        if stop < len(rows):
            query = urllib.parse.urlencode({**call.query, "cursor": [str(stop)]}, doseq=True)
            headers["Link"] = f'<{self.url}{call.path}?{query}>; rel="next"'
        return _json(rows[start:stop], 200, headers)

    @_route("GET", "{api}/refs", "read")
    def _refs(self, call: _Call, repo: _Repo) -> Any:
        def group(prefix: str) -> list[dict[str, str]]:
            names = [ref for ref in repo.refs if ref.startswith(prefix)]
            return [{"name": ref[len(prefix) :], "ref": ref, "targetCommit": repo.refs[ref]} for ref in names]

        answer = {"branches": group("refs/heads/"), "converts": [], "tags": group("refs/tags/")}
        if call.flag("include_prs"):
            answer["pullRequests"] = group("refs/pr/")
        return answer

    @_route("POST", "{api}/branch/{rev}", "write")
    def _create_branch(self, call: _Call, repo: _Repo, revision: str) -> Any:
        return self._point(repo, f"refs/heads/{revision}", repo.at(call.json().get("startingPoint") or "main"))

    @_route("POST", "{api}/tag/{rev}", "write")
    def _create_tag(self, call: _Call, repo: _Repo, revision: str) -> Any:
        return self._point(repo, f"refs/tags/{call.json()['tag']}", repo.at(revision))

    def _point(self, repo: _Repo, ref: str, commit: Commit) -> Any:
        if ref in repo.refs:
            raise _Problem(409, f"Reference already exists: {ref}")
        repo.refs[ref] = commit.oid
        return {}

    @_route("DELETE", "{api}/(?P<what>branch|tag)/{rev}", "write")
    def _delete_ref(self, call: _Call, repo: _Repo, what: str, revision: str) -> Any:
        ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{revision}"
        if ref == "refs/heads/main":
            raise _Problem(403, "The default branch cannot be deleted")
        if repo.refs.pop(ref, None) is None:
            raise _Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return {}

    # Uploads.

    def _check_target(self, call: _Call, repo: _Repo, revision: str) -> tuple[str, Commit]:
        """The branch, and the head that a commit to it builds on, if the user may make it."""
        pull_request = re.fullmatch(r"refs/pr/(\d+)", revision)
        own = False
        if pull_request and revision in repo.refs:
            own = self._discussion(repo, pull_request[1])["author"]["name"] == call.login.name
        self._find(call, repo.type, repo.id, "contribute" if own or call.flag("create_pr") else "write")
        ref = repo.ref(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise _Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return ref, repo.at(ref)

    @_route("POST", "{api}/preupload/{rev}", "contribute")
    def _preupload(self, call: _Call, repo: _Repo, revision: str) -> Any:
        present = self._check_target(call, repo, revision)[1].files
        rows = []
        for file in call.json()["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            mode = "lfs" if _goes_to_lfs(path, sample, file["size"]) else "regular"
            row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            rows.append({**row, "oid": present[path].oid} if path in present else row)
        return {"files": rows}

    @_route("POST", r"{page}\.git/info/lfs/objects/batch", "contribute")
    def _lfs_batch(self, call: _Call, repo: _Repo) -> Any:
        rows = []
        for entry in call.json()["objects"]:
            row = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in repo.objects:
                # Uploads carry no token: like a signed address, the key is the permission.
                key = secrets.token_hex(16)
                self._uploads[key] = (repo, entry["oid"], entry["size"])
                verify = f"{self.url}/{repo.page}.git/info/lfs/objects/verify"
                upload = {"href": f"{self.url}/lfs/{entry['oid']}?key={key}"}
                row["actions"] = {"upload": upload, "verify": {"href": verify}}
            rows.append(row)
        return {"transfer": "basic", "objects": rows}

    @_route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def _lfs_upload(self, call: _Call, oid: str) -> Any:
        repo, expected, size = self._uploads.get(call.query.get("key", [""])[0], (None, "", 0))
        if repo is None or expected != oid:
            raise _Problem(403, "Not an address that an upload was allowed to")
        if len(call.body) != size or hashlib.sha256(call.body).hexdigest() != oid:
            raise _Problem(400, "The content does not have the announced size and SHA-256")
        repo.objects[oid] = call.body
        return {}

    @_route("POST", r"{page}\.git/info/lfs/objects/verify", "contribute")
    def _lfs_verify(self, call: _Call, repo: _Repo) -> Any:
        value = call.json()
        if len(repo.objects.get(value["oid"], b"")) != value["size"] or value["oid"] not in repo.objects:
            raise _Problem(404, f"No such object: {value['oid']}")
        return {}

    @_route("POST", "{api}/commit/{rev}", "contribute")
    def _make_commit(self, call: _Call, repo: _Repo, revision: str) -> Any:
        ref, head = self._check_target(call, repo, revision)
        header, files = self._apply(repo, head, call.body, proposal=call.flag("create_pr"))
        parent, summary = header.get("parentCommit"), header.get("summary")
        if not summary:
            raise _Problem(400, "A commit needs a summary")
        card = files.get("README.md")
        if card is not None and card != head.files.get("README.md"):
            errors, _ = check_card(card.content.decode(errors="replace"))
            if errors:
                raise _Problem(400, "Invalid metadata in README.md: " + "; ".join(errors))
        extra = {}
        if call.flag("create_pr"):
            number = self._open(call, repo, summary, pull_request=True)["num"]
            ref = f"refs/pr/{number}"
            head = repo.at(parent) if parent else head
            extra["pullRequestUrl"] = f"{self.url}/{repo.page}/discussions/{number}"
        commit = repo.commit(ref, head, files, summary, call.login.name, header.get("description") or "")
        url = f"{self.url}/{repo.page}/commit/{commit.oid}"
        for path in self._spoiled.keys() & commit.files.keys():
            commit.files[path] = Blob(self._spoiled[path], commit.files[path].lfs)
        return {"success": True, "commitUrl": url, "commitOid": commit.oid, **extra}

    def _apply(
        self, repo: _Repo, head: Commit, body: bytes, *, proposal: bool
    ) -> tuple[dict[str, Any], dict[str, Blob]]:
        """The header and the files after a commit's operations. Nothing is stored: a bad one leaves no trace."""
        try:
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            operations = [(line["key"], line["value"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise _Problem(400, f"Malformed commit: {error}") from None
        if not operations or operations[0][0] != "header":
            raise _Problem(400, "The first line has to be the header")
        header = operations[0][1]
        parent = header.get("parentCommit")
        if parent and proposal:
            head = repo.at(parent)
        elif parent and not head.oid.startswith(parent):
            raise _Problem(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for key, value in operations[1:]:
            path = value["path"]
            if key == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                files[path] = Blob(self._object(repo, value), True)
            elif key == "deletedFile" and path in files:
                del files[path]
            elif key == "deletedFolder" and (inside := [p for p in files if p.startswith(path.rstrip("/") + "/")]):
                for deleted in inside:
                    del files[deleted]
            elif key in ("deletedFile", "deletedFolder"):
                raise _Problem(404, f"{path} does not exist", "EntryNotFound")
            else:
                raise _Problem(400, f"Unknown operation: {key}")
        for path in files:
            parents = {path[:i] for i, letter in enumerate(path) if letter == "/"}
            if {"", ".", "..", ".git"} & set(path.split("/")) or parents & files.keys():
                raise _Problem(400, f"Invalid path: {path}")
        return header, files

    def _object(self, repo: _Repo, value: dict[str, Any]) -> bytes:
        oid, size = value["oid"], value.get("size")
        # A copy comes without the size. From another repository the client makes it through Xet alone.
        if oid not in repo.objects or size not in (None, len(repo.objects[oid])):
            raise _Problem(400, f"The LFS object {oid} of {value['path']} was not uploaded")
        return repo.objects[oid]

    # Discussions and pull requests.

    def _open(self, call: _Call, repo: _Repo, title: str, pull_request: bool) -> dict[str, Any]:
        discussion = {
            "num": len(repo.discussions) + 1,
            "title": title,
            "author": {"name": call.login.name},
            "createdAt": _now(),
            "status": "open",
            "repo": {"name": repo.id, "type": repo.type},
            "isPullRequest": pull_request,
            "events": [],
        }
        if pull_request:
            discussion |= {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": []}
        repo.discussions.append(discussion)
        return discussion

    def _discussion(self, repo: _Repo, number: str) -> dict[str, Any]:
        if not 1 <= int(number) <= len(repo.discussions):
            raise _Problem(404, f"No discussion {number}")
        return repo.discussions[int(number) - 1]

    @_route("GET", "{api}/discussions", "read")
    def _list_discussions(self, call: _Call, repo: _Repo) -> Any:
        return {"discussions": repo.discussions, "count": len(repo.discussions), "start": 0}

    @_route("POST", "{api}/discussions", "contribute")
    def _create_discussion(self, call: _Call, repo: _Repo) -> Any:
        value = call.json()
        discussion = self._open(call, repo, value["title"], bool(value.get("pullRequest")))
        if discussion["isPullRequest"]:
            discussion["status"] = "draft"
            repo.refs[f"refs/pr/{discussion['num']}"] = repo.at("main").oid
        return discussion

    @_route("GET", r"{api}/discussions/(?P<number>\d+)", "read")
    def _show_discussion(self, call: _Call, repo: _Repo, number: str) -> Any:
        return self._discussion(repo, number)

    @_route("POST", r"{api}/discussions/(?P<number>\d+)/merge", "write")
    def _merge(self, call: _Call, repo: _Repo, number: str) -> Any:
        discussion = self._discussion(repo, number)
        if not discussion["isPullRequest"] or discussion["status"] == "merged":
            raise _Problem(400, f"Discussion {number} is no pull request to be merged")
        main, proposed = repo.at("main"), repo.at(f"refs/pr/{number}")
        known = {commit.oid for commit in repo.history(main.oid)}
        base = next(commit for commit in repo.history(proposed.oid) if commit.oid in known).files
        files = dict(main.files)
        for path in {*base, *proposed.files}:
            if base.get(path) == proposed.files.get(path):
                continue
            if main.files.get(path) != base.get(path):
                raise _Problem(409, f"Conflict in {path}")
            files.pop(path, None)
            if path in proposed.files:
                files[path] = proposed.files[path]
        title = f"{discussion['title']} (#{number})"
        discussion["status"] = "merged"
        discussion["changes"]["mergeCommitId"] = repo.commit(
            "refs/heads/main", main, files, title, call.login.name
        ).oid
        return {}

    @_route("GET", "{page}/resolve/{rev}/(?P<path>.+)", "read")
    def _resolve(self, call: _Call, repo: _Repo, revision: str, path: str) -> Any:
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            raise _Problem(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        size = len(blob.content)
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
        if asked is None or not any(asked.groups()):
            return _Answer(blob.content, 200, headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= stop:
            raise _Problem(416, "Range not satisfiable", None, {**headers, "Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return _Answer(blob.content[start:stop], 206, headers)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> _Answer:
    # YAML reads dates where JSON has none.
    body = json.dumps(value, default=str).encode()
    return _Answer(body, status, {**(headers or {}), "Content-Type": "application/json; charset=utf-8"})


def _goes_to_lfs(path: str, sample: bytes, size: int) -> bool:
    if size == 0:
        return False
    try:
        # Not final: a sample may end in the middle of a letter.
        text = codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return True
    return "\0" in text or path.endswith(_LFS_SUFFIXES) or size > _LFS_SIZE


def _rows(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    rows: dict[str, dict[str, Any]] = {}
    for path, blob in commit.files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
            name = prefix + "/".join(parts[:depth])
            inside = sorted((p, b.sha1) for p, b in commit.files.items() if p.startswith(f"{name}/"))
            tree = hashlib.sha1(repr(inside).encode()).hexdigest()
            rows[name] = {"type": "directory", "path": name, "oid": tree, "size": 0}
        if recursive or len(parts) == 1:
            rows[path] = {"type": "file", "path": path, "oid": blob.sha1, "size": len(blob.content)}
            if blob.lfs:
                lfs = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
                rows[path]["lfs"] = lfs
    return [rows[path] for path in sorted(rows)]


def _with_commits(repo: _Repo, commit: Commit, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        path = row["path"]
        touched = (c for c in repo.history(commit.oid) if any(f"{p}/".startswith(f"{path}/") for p in c.changed))
        last = next(touched)
        row["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return rows


def _front_matter(text: str) -> str | None:
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)(?:^---[ \t]*$)", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else None


def _card(commit: Commit) -> dict[str, Any]:
    blob = commit.files.get("README.md")
    try:
        card = yaml.safe_load(_front_matter(blob.content.decode(errors="replace")) or "") if blob else None
    except yaml.YAMLError:
        card = None
    return card if isinstance(card, dict) else {}


def _tags(card: dict[str, Any]) -> list[str]:
    tags = [card[key] for key in ("library_name", "pipeline_tag") if card.get(key)] + _listed(card.get("tags"))
    for key, prefix in (("datasets", "dataset"), ("base_model", "base_model"), ("license", "license")):
        tags += [f"{prefix}:{value}" for value in _listed(card.get(key))]
    return list(dict.fromkeys(tags))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _eval_results(commit: Commit) -> Iterator[dict[str, Any]]:
    for path, blob in sorted(commit.files.items()):
        if not re.fullmatch(r"\.eval_results/[^/]+\.ya?ml", path):
            continue
        try:
            entries = yaml.safe_load(blob.content)
            for entry in entries:
                texts = (entry["dataset"]["id"], entry["dataset"]["task_id"], entry.get("date", ""))
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError("dataset.id, dataset.task_id and date have to be strings")
                if entry["value"] is None:
                    raise TypeError("value is missing")
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            yield {"filename": path, "error": f"{type(error).__name__}: {error}"}
        else:
            yield from ({"filename": path, "data": entry} for entry in entries)


def check_card(text: str) -> tuple[list[str], list[str]]:
    """What the Hub objects to in a card's metadata: errors and warnings."""
    block = _front_matter(text)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if card is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return ["The metadata has to be a mapping"], []
    card = {key: value for key, value in card.items() if value is not None}
    errors = []
    for name in _listed(card.get("license")):
        if not isinstance(name, str) or name not in _LICENSES:
            errors.append(f'"license" must be one of the known identifiers, not {name!r}')
    for key in ("pipeline_tag", "library_name"):
        if not isinstance(card.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets"):
        if not isinstance(card.get(key, []), list) or not _are_strings(card.get(key, [])):
            errors.append(f'"{key}" must be a list of strings')
    if not _are_strings(_listed(card.get("base_model"))):
        errors.append('"base_model" must be a string or a list of strings')
    return errors + list(_check_model_index(card.get("model-index", []))), []


def _are_strings(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _check_model_index(models: Any) -> Iterator[str]:
    if not isinstance(models, list):
        yield '"model-index" must be a list'
        return
    for i, model in enumerate(models):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            yield f'"model-index[{i}].name" is required'
            continue
        for j, result in enumerate(model.get("results") or []):
            place = f"model-index[{i}].results[{j}]"
            result = result if isinstance(result, dict) else {}
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                inner = result.get(part)
                if not isinstance(inner, dict) or not isinstance(inner.get(key), str):
                    yield f'"{place}.{part}.{key}" is required'
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                yield f'"{place}.metrics" is required'
                continue
            for k, metric in enumerate(metrics):
                for key in ("type", "value"):
                    if not isinstance(metric, dict) or metric.get(key) is None:
                        yield f'"{place}.metrics[{k}].{key}" is required'


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up_all(self) -> None:
        # Connections kept alive would go on being served after the server is gone.
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # the other side may be faster
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients that are killed or lose patience are part of the tests.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer's body would wait for its head to be acknowledged.
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        if "Transfer-Encoding" in self.headers:
            self.send_error(411)  # clients of the Hub always say how long a body is
        else:
            self.server.hub._serve(self)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def read_body(self) -> bytes | None:
        """The request's body; None if the client went away before its end."""
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        return body if len(body) == length else None

    def send(self, answer: _Answer, bytes_sent: int | None) -> None:
        self.send_response(answer.status)
        headers = {**answer.headers, "Content-Length": str(len(answer.body)), "X-Request-Id": secrets.token_hex(12)}
        for name, value in headers.items():
            self.send_header(name, value.replace("\n", " ").encode("latin-1", "replace").decode("latin-1"))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:bytes_sent])
        if bytes_sent is not None:
            self.close_connection = True
