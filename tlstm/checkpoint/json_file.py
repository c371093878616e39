"""JSON files of a checkpoint, read without trusting them: one object, of bounded size and depth, with each key once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tlstm.checkpoint.folder_view import CheckpointError, read_whole

# No such file comes near it. Python's recursive functions, such as `copy.deepcopy`, give up at depths that its JSON
# parser still reads.
MAX_DEPTH = 100


def read_json(path: Path, content: bytes | None = None, *, nan: bool = False) -> dict[str, Any]:
    """The JSON object in `path` (or in `content`, read from there); see `parse_json`."""
    return parse_json(read_whole(path) if content is None else content, str(path), nan=nan)


def parse_json(content: bytes | str, source: str, *, nan: bool = False) -> dict[str, Any]:
    """The JSON object in `content`, as it was read from the file `source`.

    Stricter than `json.loads`: of a key that stands twice nobody can tell which of its values another reader would
    take, and NaN and Infinity, which Python writes, are no JSON. `nan` accepts those two.

    Raises:
        CheckpointError: anything else; it names `source` and the most likely story.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        value = json.loads(content, object_pairs_hook=_unique, parse_constant=None if nan else _refuse_constant)
        _check_depth(value)
        if b"\\ud" in data.lower():  # half of a pair makes a string that cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = str(error) or type(error).__name__
        story = what_came_instead(data) or f"not valid JSON ({reason}); download or save it again"
        raise CheckpointError(f"{source}: {story}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{source}: expected a JSON object, got {type(value).__name__}; download or save it again"
        )
    return value


def what_came_instead(start: bytes) -> str | None:
    """What is wrong with a file that begins like this, whatever it should have been; `None` if that does not show."""
    if not start:
        return "the file is empty; download or save it again"
    if start.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the file itself; run `git lfs pull` in that folder"
    if start[:512].lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "this is a web page, not the file itself; download it again, logged in where the model is gated"
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} stands twice in one object")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"objects and lists are nested more than {MAX_DEPTH} deep")
