"""What a loopback Hub answers, path by path."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from hub.store import DATE, File, HubError, Repo

if TYPE_CHECKING:
    from hub.loopback import LoopbackHub


class Router:
    """One request's answer: status, headers and body; `HubError` for what is no success."""

    def __init__(self, hub: LoopbackHub, method: str, path: str) -> None:
        self.hub, self.method, self.path = hub, method, path

    def answer(self, parts: list[str], query: dict, body: bytes, user: str | None) -> tuple[int, dict, bytes]:
        hub, method = self.hub, self.method
        match [method, *parts]:
            case ["GET", "api", "whoami-v2"]:
                if user is None:
                    raise HubError(401, "Invalid username or password.")
                auth = {"type": "access_token", "accessToken": {"role": "write"}}
                return _json({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": auth})
            case ["POST", "api", "validate-yaml"]:
                return _json({"errors": [], "warnings": []})
            case ["POST", "api", "repos", "create"]:
                return self._create(json.loads(body), user)
            case ["DELETE", "api", "repos", "delete"]:
                fields = json.loads(body)
                del hub.repos[hub.repo(f"{fields.get('organization') or user}/{fields['name']}", user, write=True).id]
                return _json({})
            case [_, "api", "models", owner, name, *rest]:
                write = method in ("PUT", "DELETE") or (method == "POST" and rest[0] != "paths-info")
                write = write and not (rest[0] in ("commit", "preupload") and "create_pr" in query)
                return self._model(hub.repo(f"{owner}/{name}", user, write=write), rest, query, body)
            case ["POST", owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                hub.repo(f"{owner}/{name.removesuffix('.git')}", user)
                objects = [self._lfs_actions(item) for item in json.loads(body)["objects"]]
                return _json({"transfer": "basic", "objects": objects})
            case ["PUT", "lfs", oid]:
                return self._store(oid, body)
            case ["PUT", "lfs", oid, number]:
                hub.parts.setdefault(oid, {})[int(number)] = body
                return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
            case ["POST", "lfs", oid]:
                stored = hub.parts.pop(oid)
                for part in json.loads(body)["parts"]:
                    if part["etag"].strip('"') != hashlib.md5(stored[part["partNumber"]]).hexdigest():
                        raise HubError(400, f"part {part['partNumber']} has another etag")
                return self._store(oid, b"".join(stored[number] for number in sorted(stored)))
            case ["POST", "lfs", oid, "verify"]:
                if len(hub.objects.get(oid, b"")) != json.loads(body)["size"]:
                    raise HubError(400, f"object {oid} is not there, or of another size")
                return _json({})
            case ["GET" | "HEAD", owner, name, "resolve", revision, *path]:
                return self._resolve(hub.repo(f"{owner}/{name}", user), revision, "/".join(path), user)
        raise HubError(404, f"no such route: {method} {self.path}")

    def _create(self, fields: dict[str, Any], user: str | None) -> tuple[int, dict, bytes]:
        owner = fields.get("organization") or user
        if user is None or owner != user:
            raise HubError(403 if user else 401, f"You don't have the rights to create a model under {owner!r}")
        name = f"{owner}/{fields['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return _json(answer | {"error": "You already created this model repo"}, status=409)
        private = fields.get("visibility") == "private" or fields.get("private") is True
        self.hub.repos[name] = Repo(name, private)
        return _json(answer)

    def _model(self, repo: Repo, rest: list[str], query: dict, body: bytes) -> tuple[int, dict, bytes]:
        create_pr = query.get("create_pr") == ["1"]
        match [self.method, *rest]:
            case ["GET"] | ["GET", "revision", _]:
                commit = repo.find(rest[1] if rest else "main")
                info = {"id": repo.id, "sha": commit.oid, "private": repo.private, "lastModified": DATE, "tags": []}
                info |= {"gated": "manual" if repo.gated else False}
                return _json(info | {"siblings": [{"rfilename": path} for path in sorted(commit.files)]})
            case ["GET", "tree", revision, *folder]:
                recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                return _json(repo.tree(revision, "/".join(folder), recursive))
            case ["POST", "paths-info", revision]:
                files = repo.find(revision).files
                paths = parse_qs(body.decode()).get("paths", [])
                return _json([files[path].entry(path) for path in paths if path in files])
            case ["GET", "refs"]:
                return _json(repo.list_refs())
            case ["GET", "commits", revision]:
                fields = [{"id": c.oid, "title": c.title, "message": c.message} for c in repo.history(revision)]
                return _json([entry | {"date": DATE, "authors": [{"user": repo.owner}]} for entry in fields])
            case ["PUT", "settings"]:
                settings = json.loads(body)
                repo.gated = bool(settings.get("gated", repo.gated))
                repo.private = settings.get("visibility", "private" if repo.private else "public") == "private"
                return _json({})
            case ["POST", "branch" | "tag" as kind, name]:
                fields = json.loads(body or b"{}") or {}
                start = name if kind == "tag" else fields.get("startingPoint", "main")
                ref = f"refs/tags/{fields['tag']}" if kind == "tag" else f"refs/heads/{name}"
                if ref in repo.refs:
                    raise HubError(409, f"Reference already exists: {ref}")
                repo.refs[ref] = repo.find(start).oid
                return _json({})
            case ["DELETE", "branch" | "tag" as kind, name]:
                if repo.refs.pop(f"refs/{'tags' if kind == 'tag' else 'heads'}/{name}", None) is None:
                    raise HubError(404, f"no such {kind}", "RevisionNotFound")
                return _json({})
            case ["POST", "preupload", revision]:
                return _json({"files": [self._mode(repo, revision, item) for item in json.loads(body)["files"]]})
            case ["POST", "commit", revision]:
                answer = repo.commit(revision, body.splitlines(), self.hub.objects, create_pr)
                url = f"{self.hub.url}/{repo.id}"
                answer["commitUrl"] = f"{url}/commit/{answer['commitOid']}"
                if create_pr:
                    answer["pullRequestUrl"] = f"{url}/discussions/{answer['ref'].rsplit('/', 1)[-1]}"
                return _json(answer)
        raise HubError(404, f"no such route: {self.method} {self.path}")

    def _mode(self, repo: Repo, revision: str, item: dict[str, Any]) -> dict[str, Any]:
        path = item["path"]
        answer = {"path": path, "uploadMode": "lfs" if self.hub.is_lfs(path) else "regular", "shouldIgnore": False}
        present = repo.find(revision).files.get(path)
        return answer | ({} if present is None else {"oid": present.etag})

    def _lfs_actions(self, item: dict[str, Any]) -> dict[str, Any]:
        oid, size = item["oid"], item["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid in self.hub.objects:
            return answer
        href = f"{self.hub.url}/lfs/{oid}"
        upload: dict[str, Any] = {"href": href}
        if self.hub.part_size is not None and size > self.hub.part_size:
            count = -(-size // self.hub.part_size)
            urls = {f"{number:05d}": f"{href}/{number}" for number in range(1, count + 1)}
            upload["header"] = {"chunk_size": str(self.hub.part_size), **urls}
        return answer | {"actions": {"upload": upload, "verify": {"href": f"{href}/verify"}}}

    def _store(self, oid: str, content: bytes) -> tuple[int, dict, bytes]:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"the content is not that of {oid}")
        self.hub.objects[oid] = content
        return _json({})

    def _resolve(self, repo: Repo, revision: str, path: str, user: str | None) -> tuple[int, dict, bytes]:
        commit = repo.find(revision)
        if repo.gated and user != repo.owner:
            raise HubError(403 if user else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")
        file: File | None = commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return 200, headers, file.content


def _json(value: Any, status: int = 200) -> tuple[int, dict, bytes]:
    return status, {}, json.dumps(value).encode()
