"""Configuration files made to hurt: each is refused by name, before memory or time is spent on it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hostile.samples import JSON_FILES, READERS, refusal, use_model, use_tokenizer
from small_models import rewrite

from tlstm.cli import main

HUGE = 10**400


def spoiled(text: bytes, how: str) -> bytes:
    inner = text.strip()[1:-1].strip()  # the members of the object
    return {
        "empty": b"",
        "cut": text[: len(text) // 2],
        "garbage": bytes(range(256)),
        "not utf-8": b'{"name": "\xff\xfe\xc0", ' + inner + b"}",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
        "web page": b"<!doctype html><title>Sign in</title>",
        "a list": b"[" + text + b"]",
        "a number": b"7",
        "null": b"null",
        "text after the end": text + b"}",
        "100,000 brackets": b"[" * 100_000,
        "100,000 braces": b'{"a":' * 100_000,
        "101 lists": b'{"deep": ' + b"[" * 101 + b"]" * 101 + b", " + inner + b"}",
        "900 lists": b'{"deep": ' + b"[" * 900 + b"]" * 900 + b", " + inner + b"}",
        "a number of 5,000 digits": b'{"big": ' + b"9" * 5000 + b", " + inner + b"}",
        "a key twice": b"{" + inner + b", " + inner + b"}",
        "a key twice, deep inside": b'{"x": {"y": [{"z": 1, "z": 2}]}, ' + inner + b"}",
        "NaN": b'{"x": NaN, ' + inner + b"}",
        "-Infinity": b'{"x": [-Infinity], ' + inner + b"}",
        "half a character": b'{"x": ["\\uD800"], ' + inner + b"}",
    }[how]


DAMAGE = [
    "empty", "cut", "garbage", "not utf-8", "git-lfs pointer", "web page", "a list", "a number", "null",
    "text after the end", "100,000 brackets", "100,000 braces", "101 lists", "900 lists", "a number of 5,000 digits",
    "a key twice", "a key twice, deep inside", "NaN", "-Infinity",
    "half a character",
]  # fmt: skip

# The library that reads tokenizers takes the last of two keys, here and everywhere else; a loss may be NaN.
READ_ALL_THE_SAME = [("tokenizer.json", "a key twice"), ("trainer.json", "NaN"), ("trainer.json", "-Infinity")]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", JSON_FILES)
def test_damaged_json_is_refused_by_name(folder: Path, name: str, how: str) -> None:
    path = folder / name
    path.write_bytes(spoiled(path.read_bytes(), how))
    if (path.name, how) in READ_ALL_THE_SAME:
        READERS[name](folder)
    else:
        refusal(folder, name)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to itself"])
def test_what_is_no_file_is_not_read(folder: Path, name: str, kind: str) -> None:
    """From a pipe, or from /dev/zero, one would read for ever."""
    path = folder / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    refusal(folder, name)


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_huge_file_is_not_read(folder: Path, name: str) -> None:
    """A sparse one: it costs nothing to make, and all the memory there is to read."""
    with (folder / name).open("ab") as file:
        file.truncate(1 << 40)
    refusal(folder, name, "larger than 256 MiB")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**12},
        {"hidden_size": HUGE},
        {"hidden_size": 7.0},
        {"hidden_size": True},
        {"hidden_size": "7"},
        {"hidden_size": [7]},
        {"vocab_size": 10**12},
        {"vocab_size": False},
        {"num_layers": 10**12},
        {"layer_sizes": [7] * 10**6},
        {"layer_sizes": [10**12]},
        {"layer_sizes": {"0": 7}},
        {"embedding_size": 10**12},
        {"proj_size": 10**12},
        {"bias": 1},
        {"hidden_dropout": True},
        {"hidden_dropout": HUGE},
        {"initializer_range": HUGE},
        {"initializer_range": 1e300},
        {"forget_bias": -HUGE},
        {"forget_bias": 1e300},
        {"initializer": "x" * 10**6},
        {"eos_token_id": list(range(10**5))},
        {"eos_token_id": [True]},
        {"eos_token_id": [None]},
        {"pad_token_id": HUGE},
        {"dtype": ["float32"]},
        {"model_type": {"a": list(range(10**5))}},
        {"config_version": HUGE},
        {"config_version": True},
        {"architectures": ["x" * 10**6] * 3},
        {"architectures": [["LSTMForCausalLM"]]},
        {"architectures": "LSTMForCausalLM"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_absurd_settings_of_the_model(folder: Path, change: dict) -> None:
    rewrite(folder / "config.json", **change)
    refusal(folder, "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"num_beams": 10**12},
        {"num_return_sequences": 10**12, "do_sample": True},
        {"temperature": HUGE},
        {"repetition_penalty": HUGE},
        {"length_penalty": -HUGE},
        {"max_time": HUGE},
        {"top_p": True},
        {"top_k": 7.5},
        {"seed": HUGE},
        {"seed": [True]},
        {"max_new_tokens": True},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [[3]]},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [["x"]]},
        {"suppress_tokens": [1.0]},
        {"stop_strings": [7]},
        {"stop_strings": "x" * 10**6, "min_p": "x" * 10**6},
        {"early_stopping": "x" * 10**6},
    ],
    ids=lambda change: str(change)[:40],
)
def test_absurd_settings_of_generation(folder: Path, change: dict) -> None:
    rewrite(folder / "generation_config.json", **change)
    refusal(folder, "generation_config.json")


def test_ten_thousand_unknown_settings_are_kept_under_a_short_warning(folder: Path) -> None:
    unknown = {f"setting {number}": [number] for number in range(10_000)}
    for name in ("config.json", "generation_config.json"):
        rewrite(folder / name, **unknown)
    with pytest.warns(UserWarning, match="kept but have no effect") as caught:
        model = use_model(folder)
    assert model.config.extra == model.generation_config.extra == unknown
    assert len(caught) == 2
    assert all(len(str(warning.message)) < 1000 for warning in caught)


def test_depth_that_is_read_can_be_copied_and_written(folder: Path, tmp_path: Path) -> None:
    value: object = "bottom"
    for _ in range(98):
        value = [value]
    rewrite(folder / "config.json", deep=value)
    with pytest.warns(UserWarning, match="deep"):
        model = use_model(folder)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["deep"] == value


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token", "unk_token"])
@pytest.mark.parametrize("value", [7, True, 1.5, [], ["a"], {}, {"content": 7}, {"content": None}, "x" * 10**6, "no"])
def test_special_tokens_that_are_none(folder: Path, role: str, value: object) -> None:
    rewrite(folder / "tokenizer_config.json", **{role: value})
    refusal(folder, "tokenizer_config.json")


@pytest.mark.parametrize("token_id", [1 << 21, (1 << 32) - 1, 1 << 32, -1])
def test_a_token_with_an_absurd_id(folder: Path, token_id: int) -> None:
    """With 2^32 - 1 the library that reads tokenizers ends the process when it lists the ids without a token."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = token_id
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refusal(folder, "tokenizer.json")


def test_other_settings_of_a_tokenizer(folder: Path) -> None:
    for value in (7, "middle", None, ["left"]):
        rewrite(folder / "tokenizer_config.json", padding_side=value)
        refusal(folder, "tokenizer_config.json", "padding_side")
    rewrite(folder / "tokenizer_config.json", padding_side="right", eos_token={"content": "a", "special": True})
    assert use_tokenizer(folder).eos_token_id == ord("a")


def test_the_command_line_says_it_in_one_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "config.json").write_bytes(b"[" * 100_000)
    for command in (["info"], ["generate", "--prompt", "x"]):
        assert main([*command, "--model", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert str(folder / "config.json") in err


@pytest.mark.parametrize("training", [{"valid": 7}, {"valid": [{"loss": "low"}]}, {"valid": [7]}, {"valid": [{}]}])
def test_info_tells_the_rest_of_a_model_with_a_strange_training_record(
    folder: Path, capsys: pytest.CaptureFixture, training: dict
) -> None:
    (folder / "training.json").write_text(json.dumps(training))
    assert main(["info", "--model", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "training.json does not have the form" in out
    assert err == ""
