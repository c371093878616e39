"""What a loopback Hub holds: repos with commits, branches, tags and pull requests, all in memory."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

DATE = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer that is no success: status and `X-Error-Code`, as the Hub gives them."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def git_oid(self) -> str:
        """The git blob's id; of an LFS file that of its pointer."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    files: dict[str, File]


@dataclass
class Repo:
    """`refs` maps full names (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`) to commits."""

    id: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    _numbers: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        first = self.add_commit("initial commit", "", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        self.refs["refs/heads/main"] = first.oid

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def head(self) -> str:
        return self.refs["refs/heads/main"]

    def names(self, revision: str = "main") -> set[str]:
        return set(self.find(revision).files)

    def add_commit(self, title: str, message: str, files: dict[str, File], parent: str | None = None) -> Commit:
        oid = hashlib.sha1(f"{self.id} {next(self._numbers)} {title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, message, files)
        return self.commits[oid]

    def full_ref(self, revision: str) -> str | None:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return name
        return None

    def find(self, revision: str) -> Commit:
        ref = self.full_ref(revision)
        oid = revision if ref is None else self.refs[ref]
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        found = [self.find(revision)]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found

    def tree(self, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        commit = self.find(revision)
        prefix = f"{folder}/" if folder else ""
        below = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
        if folder and not below:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound", commit.oid)
        folders = {path[: i + len(prefix)] for path in below for i, c in enumerate(path[len(prefix) :]) if c == "/"}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
        entries += [file.entry(path) for path, file in sorted(below.items())]
        return [entry for entry in entries if recursive or "/" not in entry["path"][len(prefix) :]]

    def commit(self, revision: str, lines: Iterable[bytes], objects: dict[str, bytes], create_pr: bool) -> dict:
        """Apply the NDJSON of one commit, all of it or nothing; the answer's `ref` is what has moved."""
        ref = self.full_ref(revision)
        base = self.find(revision)
        if not create_pr and (ref is None or ref.startswith("refs/tags/")):
            raise HubError(400, f"cannot commit to {revision!r}: not a branch")
        header: dict[str, Any] = {}
        files = dict(base.files)
        for line in lines:
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    header = value
                    parent = value.get("parentCommit")
                    if parent is not None and parent != base.oid:
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    if value["encoding"] != "base64":
                        raise HubError(400, f"encoding {value['encoding']!r}")
                    files[value["path"]] = File(base64.b64decode(value["content"], validate=True), False)
                case "lfsFile":
                    content = objects.get(value["oid"])
                    if content is None or len(content) != value["size"]:
                        raise HubError(400, f"LFS object of {value['path']} was never uploaded")
                    files[value["path"]] = File(content, True)
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                case "deletedFolder":
                    folder = value["path"].rstrip("/") + "/"
                    files = {path: file for path, file in files.items() if not path.startswith(folder)}
                case key:
                    raise HubError(400, f"unknown key {key!r}")
        if not header.get("summary"):
            raise HubError(400, "no summary")
        commit = self.add_commit(header["summary"], header.get("description", ""), files, base.oid)
        if create_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in self.refs)
            ref = f"refs/pr/{number}"
        assert ref is not None
        self.refs[ref] = commit.oid
        return {"commitOid": commit.oid, "ref": ref}

    def list_refs(self) -> dict[str, list[dict[str, str]]]:
        kinds = {
            "branches": "refs/heads/",
            "tags": "refs/tags/",
            "pullRequests": "refs/pr/",
            "converts": "refs/convert/",
        }
        return {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in self.refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }
