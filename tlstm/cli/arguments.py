"""Command-line flags made from dataclasses: each field is one flag, so that none is missing.

Types and defaults come from the fields, help texts and groups from the class's docstring, which has the form

    Section, a remark on it:
        name: what it means. other_name (a remark), third_name: what these mean.

All flags default to "not given": what is in the namespace is what the user asked for, and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "0": "\0"}


def unescape(text: str) -> str:
    """Backslash escapes as in a Python string, `\\n` and the like; other backslashes stay."""

    def character(match: re.Match[str]) -> str:
        code = match[1]
        return _ESCAPES[code] if code in _ESCAPES else chr(int(code[1:], 16))

    return re.sub(r"\\([ntr0\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})", character, text)


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def add_dataclass_arguments(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    exclude: Collection[str] = (),
    aliases: Mapping[str, Sequence[str]] | None = None,
    escaped: Collection[str] = (),
    texts: Mapping[str, str] | None = None,
    prefix: str = "",
) -> None:
    """Add one flag per field of `cls`, in the groups of its docstring.

    Args:
        exclude: fields that are no flags. aliases: further flags of a field. escaped: text fields that take
            backslash escapes. texts: help for fields whose docstring speaks of Python. prefix: put before the
            groups' titles.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    groups: dict[str, argparse._ArgumentGroup] = {}

    def speak(text: str) -> str:
        """Docstring to command line: fields are flags here, and `None` is written `none`."""
        text = re.sub("`([a-z_]+)`", lambda match: flag_name(match[1]) if match[1] in fields else match[0], text)
        return re.sub(r"\bNone\b", "none", text).replace("`", "").replace("%", "%%")

    for entry in read_docstring(cls):
        if entry.name in exclude:
            continue
        if entry.section not in groups:
            title, remark = ([*re.split("[,;.] ", entry.section, maxsplit=1), ""])[:2]
            groups[entry.section] = parser.add_argument_group((prefix + title).lower(), speak(remark) or None)
        options = _options(hints[entry.name], escaped=entry.name in escaped)
        groups[entry.section].add_argument(
            flag_name(entry.name),
            *(aliases or {}).get(entry.name, ()),
            dest=entry.name,
            default=argparse.SUPPRESS,
            help=_help((texts or {}).get(entry.name, entry.text), fields[entry.name], speak),
            **options,
        )


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of `cls` that were set on the command line; where one value is as good as a list, a single one."""
    values = {}
    for name, annotation in typing.get_type_hints(cls).items():
        if hasattr(args, name):
            value = getattr(args, name)
            kinds = typing.get_args(annotation)
            single = isinstance(value, list) and len(value) == 1 and type(value[0]) in kinds
            values[name] = value[0] if single else value
    return values


# ---- help texts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A documented field: its section's heading and its explanation."""

    name: str
    section: str
    text: str


def read_docstring(cls: type) -> list[Entry]:
    """Every field of `cls` with its section and text, in the docstring's order; undocumented ones come last."""
    names = [field.name for field in dataclasses.fields(cls)]
    one = rf"(?:{'|'.join(sorted(names, key=len, reverse=True))})(?: \([^()]*\))?"
    heads = re.compile(rf"(?:^|(?<=[.;)] ))({one}(?:, {one})*)(?::(?=\s)|\.$)", re.MULTILINE)
    entries: dict[str, Entry] = {}
    for title, body in _sections(inspect.cleandoc(cls.__doc__ or "")):
        found = list(heads.finditer(body))
        for match, following in zip_longest(found, found[1:]):
            text = " ".join(body[match.end() : following.start() if following else len(body)].split())
            for name in re.findall(one, match[1]):
                remark = re.search(r" \(([^()]*)\)$", name)
                key = name.split(" ")[0]
                entries.setdefault(key, Entry(key, title, f"{remark[1]}: {text}" if remark else text))
    ordered = list(entries.values())
    for name in (name for name in names if name not in entries):
        # Explained along with another field, as in "lr: reached after `warmup_steps` steps".
        mention = re.compile(rf"`[^`]*\b{name}\b[^`]*`")
        place = next((place for place, entry in enumerate(ordered) if mention.search(entry.text)), None)
        if place is None:
            ordered.append(Entry(name, "Further settings", ""))
        else:
            ordered.insert(place + 1, Entry(name, ordered[place].section, f"see `{ordered[place].name}`"))
    return ordered


def _sections(docstring: str) -> list[tuple[str, str]]:
    """(heading, body) of each indented block; text between blocks belongs to none."""
    sections = []
    for block in re.finditer(
        r"^(\S[^\n]*(?:\n\S[^\n]*)*):\n((?:(?: {4}[^\n]*)?\n)*(?: {4}[^\n]*))", docstring, re.MULTILINE
    ):
        heading = block[1].rsplit("\n\n", 1)[-1]
        sections.append((" ".join(heading.split()), inspect.cleandoc(block[2])))
    return sections


def _help(text: str, field: dataclasses.Field[Any], speak: Callable[[str], str]) -> str:
    text = speak(re.sub(r"[^.]*:$", "", text).strip().rstrip("."))  # without a lead-in to the next field
    if field.default is not dataclasses.MISSING and field.default is not None and "default" not in text:
        value = field.default
        shown = ("on" if value else "off") if isinstance(value, bool) else json.dumps(value).strip('[]"')
        text = f"{text} (default: {shown})".strip()
    return text


# ---- types -----------------------------------------------------------------------------------------------------------


def _options(annotation: Any, escaped: bool) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for a field of this type."""
    choices = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    choices = choices if typing.get_origin(annotation) is not typing.Union else typing.get_args(annotation)
    optional = type(None) in choices
    kinds = [kind for kind in choices if kind is not type(None)]
    sequence = next((kind for kind in kinds if typing.get_origin(kind) in (list, tuple)), None)
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if bool in kinds:  # true, false or a word of a Literal
        words = {"true": True, "false": False} | {word: word for kind in kinds for word in typing.get_args(kind)}
        return {"type": _choice(words), "metavar": "{" + ",".join(words) + "}"}
    if sequence is None:
        kind = float if float in kinds else kinds[0]
        return {"type": _or_none(_scalar(kind, escaped), optional), "metavar": _METAVARS[kind]}
    element = typing.get_args(sequence)[0]
    if typing.get_origin(element) is list:  # a list of lists: each use of the flag gives one
        parse, metavar = _comma_list(typing.get_args(element)[0]), "N,N"
        return {"action": _Collect, "type": _or_none(lambda text: [parse(text)], optional), "metavar": metavar}
    if element is str:  # texts may hold commas: each use of the flag gives one
        convert = _scalar(str, escaped)
        return {"action": _Collect, "type": _or_none(lambda text: [convert(text)], optional), "metavar": "TEXT"}
    return {
        "action": _Collect,
        "type": _or_none(_comma_list(element), optional),
        "metavar": f"{_METAVARS[element]},...",
    }


class _Collect(argparse.Action):
    """A list that grows with every use of its flag; `none` empties it for good."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if values is None or before is None else [*before, *values])


def _scalar(kind: type, escaped: bool = False) -> Callable[[str], Any]:
    if kind is str:
        return unescape if escaped else str
    return {int: _whole_number, float: _number}[kind]


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _choice(words: Mapping[str, Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        if text not in words:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(words)}, got {text!r}")
        return words[text]

    return convert


def _comma_list(kind: type) -> Callable[[str], list[Any]]:
    convert = _scalar(kind)

    def split(text: str) -> list[Any]:
        inside = text.strip().removeprefix("[").removesuffix("]")  # brackets as in a config file are welcome too
        return [convert(part) for part in inside.split(",")] if inside else []

    return split


def _or_none(convert: Callable[[str], Any], optional: bool) -> Callable[[str], Any]:
    if not optional:
        return convert
    return lambda text: None if text.lower() == "none" else convert(text)


_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
