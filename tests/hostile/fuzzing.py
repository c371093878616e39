"""Mutations of sound checkpoint files: of their structure, and of their bytes."""

from __future__ import annotations

import json
from typing import Any

from hostile.samples import tensor_file
from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([0, 1, 255, 256, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, 10**400]),
    st.integers(),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-320, 1e300, -1e300, float("nan"), float("inf"), float("-inf")]),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", "x", "tlstm", "float16", "F16", "I64", "BOOL", "never", "LSTMModel", "../x", "/etc/passwd", "\0", "\ud800",
         "left", "BPE", "WordLevel", "Sequence", "ByteLevel", "(?<=a*)b", "[", "<unk>", "[\\s\\S]"]
    ),
    st.text(max_size=20),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.dictionaries(TEXTS, SCALARS, max_size=3),
    st.lists(st.lists(NUMBERS, max_size=3), max_size=3),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutate(draw: Any, value: Any, names: list[str]) -> None:
    """One to three changes somewhere in the JSON object `value`; `names` are keys worth setting."""
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        action = draw(st.sampled_from(["set", "set", "set", "new", "known", "remove", "copy"]))
        if action in ("new", "known") or not found:
            value[draw(st.sampled_from(names) if action == "known" else TEXTS)] = draw(VALUES)
            continue
        container, key = draw(st.sampled_from(found))
        if action == "set":
            container[key] = draw(VALUES)
        elif action == "remove":
            del container[key]
        else:
            other, source = draw(st.sampled_from(found))
            container[key] = json.loads(json.dumps(other[source]))


def spoil(draw: Any, content: bytes) -> bytes:
    """Bytes replaced, removed, repeated or added; or other bytes altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60))
    spoiled = bytearray(content)
    if draw(st.booleans()):
        spoiled[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        return bytes(spoiled)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(spoiled)))
        end = min(len(spoiled), start + draw(st.integers(0, 8)))
        piece = draw(st.one_of(st.binary(max_size=4), st.sampled_from([b"}", b"{", b'"', b"\xff", b",", b"9" * 30])))
        spoiled[start:end] = piece
    return bytes(spoiled[: draw(st.integers(0, len(spoiled)))] if draw(st.integers(0, 7)) == 0 else spoiled)


def mutate_json(draw: Any, content: bytes, names: list[str]) -> bytes:
    value = json.loads(content)
    mutate(draw, value, names)
    return json.dumps(value).encode()


def mutate_tensors(draw: Any, content: bytes) -> bytes:
    """Another header over the same data, which may lose or gain some bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    mutate(draw, header, list(header))
    if draw(st.integers(0, 3)) == 0:
        data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=8))
    return tensor_file(header, data)
