"""The saved tokenizers, read by `transformers` and `tokenizers` themselves, and files that cannot be read."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizer_samples import CORPUS, KINDS, TOKENIZERS

from tlstm.tokenizer.tokenizer import Tokenizer

TRANSFORMERS_MODEL_CONFIG = {
    "model_type": "tlstm",
    "architectures": ["LSTMForCausalLM"],
    "vocab_size": 65,
    "hidden_size": 8,
    "eos_token_id": [1, 2],
    "config_version": 1,
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(TRANSFORMERS_MODEL_CONFIG))  # as in a real checkpoint
    TOKENIZERS[request.param].save_pretrained(folder)
    return TOKENIZERS[request.param], folder


def test_transformers_and_tokenizers_read_the_same_tokenizer(saved):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer

    tokenizer, folder = saved
    theirs = AutoTokenizer.from_pretrained(folder)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = "".join(token.content for token in plain.get_added_tokens_decoder().values())
    characters = sorted(set(CORPUS))
    texts = [
        CORPUS,
        "",
        " ",
        "\n",
        f"{special}speak{special} a\n{special}",
        *random.Random(1).choices(characters, k=30),
    ]
    texts += ["".join(random.Random(seed).choices(characters, k=65)) for seed in range(20)]
    if tokenizer.kind != "char" or tokenizer.unk_token_id is not None:
        texts += ["unseen: ß€ğ𝔘", f"{special[:-1]}speak <eo"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"] == plain.encode(text).ids
        assert tokenizer.decode(ids) == theirs.decode(ids) == plain.decode(ids, skip_special_tokens=False)
        without = tokenizer.decode(ids, skip_special_tokens=True)
        assert without == theirs.decode(ids, skip_special_tokens=True) == plain.decode(ids)
    assert tokenizer.vocab_size == len(tokenizer) == len(theirs) == plain.get_vocab_size()
    for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(tokenizer, role) == getattr(theirs, role)
    assert theirs.padding_side == "left"
    assert theirs.model_max_length > 10**20
    assert set(theirs("speak")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_that_of_transformers(saved, side):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer

    tokenizer, folder = saved
    theirs = AutoTokenizer.from_pretrained(folder, padding_side=side)
    pads_alike = theirs.pad_token_id == tokenizer.pad_token_id is not None
    if theirs.pad_token_id is None:  # transformers then refuses to pad: lend it a token, which is masked out anyway
        theirs.pad_token = "a" if tokenizer.eos_token_id is None else "<eos>"
    texts = ["speak", "hear me", "All: \n", "a"]
    ours = tokenizer(texts, padding_side=side)
    reference = theirs(texts, padding=True, return_tensors="pt")
    assert torch.equal(ours.attention_mask, reference["attention_mask"])
    mask = ours.attention_mask.bool()
    assert torch.equal(ours.input_ids[mask], reference["input_ids"][mask])
    assert not pads_alike or torch.equal(ours.input_ids, reference["input_ids"])
    for text, ids, mask in zip(texts, ours["input_ids"], ours["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == tokenizer.encode(text)
        assert set(ids[~mask.bool()].tolist()) <= {tokenizer.pad_token_id or 0}


def test_transformers_saves_what_is_read_here(saved, tmp_path):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer

    tokenizer, folder = saved
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.kind == tokenizer.kind
    assert again.encode(CORPUS) == tokenizer.encode(CORPUS)
    assert (again.eos_token_id, again.pad_token_id, again.unk_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    )


def test_a_round_trip_through_files_changes_nothing(saved, tmp_path):
    tokenizer, folder = saved
    again = Tokenizer.from_pretrained(folder)
    assert again.files() == tokenizer.files()
    assert (again.kind, again.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
    again.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["tokenizer.json", "tokenizer_config.json"]
    in_subfolder = Tokenizer.from_pretrained(tmp_path, subfolder="new/folder")
    assert in_subfolder.encode("speak") == tokenizer.encode("speak")


@pytest.mark.parametrize("revision", [None, "v1", "a" * 40])
def test_a_hub_repo_is_read_from_the_cache_at_one_commit(saved, tmp_path, revision):
    """The cache layout of huggingface_hub, written by hand; the library's own client finds the files in it."""
    tokenizer, _ = saved
    cache = tmp_path / "models--user--model"
    commit = "a" * 40
    tokenizer.save_pretrained(cache / "snapshots" / commit / "sub")
    (cache / "refs").mkdir()
    for name in ("main", "v1"):
        (cache / "refs" / name).write_text(commit)
    options = {"revision": revision, "cache_dir": tmp_path, "local_files_only": True}
    again = Tokenizer.from_pretrained("user/model", subfolder="sub", **options)
    assert again.files() == tokenizer.files()
    assert again.name_or_path == "user/model"
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.from_pretrained("user/model", **options)
    from huggingface_hub.errors import LocalEntryNotFoundError

    with pytest.raises(LocalEntryNotFoundError):
        Tokenizer.from_pretrained("user/another", **options)


def test_another_tokenizer_family_loads_with_its_own_ids(tmp_path):
    """WordPiece with a normalizer, framing, truncation and padding in its file: not made here, read all the same."""
    foreign = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"[UNK]": 0, "[CLS]": 1, "hear": 2, "##ing": 3, "me": 4}, unk_token="[UNK]")
    )
    foreign.normalizer = tokenizers.normalizers.Lowercase()
    foreign.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    foreign.decoder = tokenizers.decoders.WordPiece()
    foreign.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", None, [("[CLS]", 1)])
    foreign.enable_truncation(2)
    foreign.enable_padding(length=9)
    foreign.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.kind == "other"
    assert tokenizer.encode("HEARING me") == [1, 2, 3, 4]
    assert (
        tokenizer.encode_array("HEARING me").tolist()
        == [2, 3, 4]
        == tokenizer.encode("HEARING me", add_special_tokens=False)
    )
    assert tokenizer.decode([2, 3, 4]) == "hearing me"


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Tokenizer.from_pretrained(tmp_path / "missing")
    with pytest.raises(ValueError, match="subfolder"):
        Tokenizer.from_pretrained(tmp_path, subfolder="../other")
    file = tmp_path / "tokenizer.json"
    for content in (b"", b"{", b"[1]", b'{"version": "1.0"}', b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json.*download or save it again"):
            Tokenizer.from_pretrained(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json.*git lfs pull"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="pass the folder it lies in"):
        Tokenizer.from_pretrained(file)
    TOKENIZERS["char"].save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json.*JSON object"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ValueError, match=r"'<end>' as eos_token.*same save"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_save_replaces_both_files_as_one_set(tmp_path, monkeypatch):
    """Killed at any rename, the folder holds one tokenizer whole; the model's own files are left alone."""
    (tmp_path / "config.json").write_text("{}")
    old, new = TOKENIZERS["char"], TOKENIZERS["bpe"]
    for survived in range(5):
        old.save_pretrained(tmp_path)
        done = 0
        replace = os.replace

        def dying(source, target, survived=survived, replace=replace):
            nonlocal done
            if done == survived:
                raise OSError("killed")
            done += 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with contextlib.suppress(OSError):
                new.save_pretrained(tmp_path)
        assert Tokenizer.from_pretrained(tmp_path).files() in (old.files(), new.files())
    assert (tmp_path / "config.json").read_text() == "{}"
