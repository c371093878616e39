"""Model cards: the README.md of a checkpoint, from its config and from the figures of its training.

Whose a card is. The last line of a card that tlstm made holds a hash of the text above it. As long as it fits, the
text is tlstm's, and the next save or push writes it anew. Once somebody has changed a word, or where the line is
missing, the card is theirs: from then on nothing rewrites it. Of a card that is still tlstm's the metadata (the block
between the `---` lines) is written key by key: `library_name`, `pipeline_tag` and `model-index` are tlstm's, tags add
up, and what anybody else has put there, such as `license`, `language` or `datasets`, stays.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, RepoCard

from tlstm.checkpoint.folder_view import FolderView, read_consistently
from tlstm.hub import card_text as sections
from tlstm.hub.card_text import CURVE_NAME, FIGURES_NAME

__all__ = [
    "CARD_NAME",
    "CURVE_NAME",
    "FIGURES_NAME",
    "card_in",
    "decoded",
    "encoded",
    "is_own",
    "make_card",
    "renewed",
    "short_card",
    "with_metadata",
]

CARD_NAME = "README.md"
_SIGNATURE = (
    "<!-- Made by tlstm from config.json and training.json. Change a word above, and the text is yours: it is not made "
    "again. sha256:{digest} -->"
)
_SIGNED = re.compile(re.escape(_SIGNATURE).replace(r"\{digest\}", "([0-9a-f]{64})"))
_METADATA = re.compile(r"\A\s*---[ \t]*\r?\n.*?\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_DERIVED = ("library_name", "pipeline_tag", "model-index")


def make_card(
    config: Mapping[str, Any],
    *,
    name: str,
    parameters: int,
    files: Mapping[str, bytes] | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The card of a checkpoint.

    Args:
        config: the content of its `config.json`.
        name: what `from_pretrained` is to be given in the snippet, a folder or "user/name"; its last part is the title.
        parameters: how many the model has.
        files: name -> content of what lies beside the weights. `training.json` gives the figures, `tokenizer.json` the
            prompt of the snippet, `loss.png` is shown.
        license: an identifier such as "apache-2.0". tags: put into the metadata besides "lstm".
    """
    files = files or {}
    run = sections.read_json_object(files.get(FIGURES_NAME))
    title = _title(name)
    results = sections.eval_results(run)
    data = ModelCardData(
        library_name="tlstm",
        license=license,
        pipeline_tag="text-generation" if sections.class_name(config) == "LSTMForCausalLM" else None,
        tags=list(dict.fromkeys(["lstm", *tags])),
        model_name=title if results else None,
        eval_results=results or None,
    )
    parts = [
        f"# {title}",
        sections.description(config, parameters),
        sections.usage(config, name, files.get("tokenizer.json")),
        sections.quality(run, with_curve=CURVE_NAME in files),
        sections.training(run) if run else "",
        sections.LICENCE,
    ]
    return _card(data, _signed("\n\n".join(filter(None, parts))))


def short_card(repo_id: str) -> str:
    """For a repo that holds no model (yet): a tokenizer or a configuration by itself."""
    return _card(ModelCardData(library_name="tlstm"), _signed(f"# {_title(repo_id)}"))


def is_own(card: str) -> bool:
    """Whether tlstm made the card's text and nobody has changed it since; the metadata does not count."""
    lines = _text_of(card).rstrip().splitlines()
    found = _SIGNED.fullmatch(lines[-1].strip()) if lines else None
    return found is not None and found[1] == _digest("\n".join(lines[:-1]))


def renewed(new: str, old: str | None) -> str:
    """What to put in the place of the card `old`: `new` with its foreign metadata, or `old` where it is not tlstm's."""
    if old is None:
        return new
    if not is_own(old):
        return old
    try:
        theirs = _parsed(old).data.to_dict()
    except ValueError:  # somebody has been at work in the metadata
        return old
    mine = _parsed(new).data.to_dict()
    kept = {key: value for key, value in theirs.items() if key not in _DERIVED}
    return with_metadata(_card(ModelCardData(**(kept | mine)), _text_of(new)), tags=_tags(theirs))


def with_metadata(card: str, *, tags: Sequence[str] = (), license: str | None = None) -> str:
    """The card with `tags` added to its metadata, and `license` set; its text is not touched.

    Raises:
        ValueError: metadata that are no YAML mapping.
    """
    if not tags and license is None:
        return card
    parsed = _parsed(card)
    before = parsed.data.to_dict()
    if not set(tags) <= set(_tags(before)):
        parsed.data["tags"] = list(dict.fromkeys([*_tags(before), *tags]))
    if license is not None:
        parsed.data["license"] = license
    return card if parsed.data.to_dict() == before else str(parsed)


def card_in(folder: Path) -> str | None:
    """The text of the folder's card, `None` where there is none. What is no UTF-8 survives as in `os.fsdecode`."""

    def read(view: FolderView) -> str | None:
        if view.path(CARD_NAME) is None:
            return None
        return decoded(view.read_bytes(CARD_NAME))

    return read_consistently(folder, read) if folder.is_dir() else None


def decoded(card: bytes) -> str:
    return card.decode("utf-8", errors="surrogateescape")


def encoded(card: str) -> bytes:
    return card.encode("utf-8", errors="surrogateescape")


def _title(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def _parsed(card: str) -> RepoCard:
    """The card, its metadata as they stand: `ModelCard` would leave out what it does not know how to read."""
    try:
        return RepoCard(card if _METADATA.match(card) else f"---\n{{}}\n---\n\n{card}", ignore_metadata_errors=True)
    except Exception as error:  # YAML's errors are no ValueErrors
        raise ValueError(f"{CARD_NAME}: its metadata cannot be read ({error}); mend the part between the ---") from None


def _tags(metadata: Mapping[str, Any]) -> list[str]:
    tags = metadata.get("tags") or []
    return [tags] if isinstance(tags, str) else list(tags)


def _text_of(card: str) -> str:
    return _METADATA.sub("", card, count=1)


def _card(data: ModelCardData, text: str) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def _signed(text: str) -> str:
    return f"{text}\n\n{_SIGNATURE.format(digest=_digest(text))}"


def _digest(text: str) -> str:
    lines = [line.rstrip() for line in text.strip().splitlines()]  # editors and git may change line ends
    return hashlib.sha256(encoded("\n".join(lines))).hexdigest()
