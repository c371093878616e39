"""Flags made from dataclasses: none missing, types, help."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from tlstm import GenerationConfig, LSTMConfig, TrainingConfig
from tlstm.cli import generate, train
from tlstm.cli.arguments import add_dataclass_arguments, flag_name, given, read_docstring, unescape
from tlstm.cli.generate import API_FIELDS
from tlstm.cli.train_setup import DERIVED_FIELDS

# One value for every field that is a flag: as typed, and as it must arrive.
GENERATION = {
    "max_new_tokens": ("7", 7), "max_length": ("9", 9), "min_new_tokens": ("2", 2), "max_time": ("1.5", 1.5),
    "stop_strings": (r"a\nb", "a\nb"), "repetition_penalty": ("1.1", 1.1), "no_repeat_ngram_size": ("3", 3),
    "bad_words_ids": ("1,2", [[1, 2]]), "suppress_tokens": ("4,5", [4, 5]), "temperature": ("0.5", 0.5),
    "top_k": ("3", 3), "top_p": ("0.9", 0.9), "min_p": ("0.1", 0.1), "typical_p": ("0.8", 0.8), "seed": ("11", 11),
    "num_return_sequences": ("2", 2), "num_beams": ("4", 4), "length_penalty": ("0.7", 0.7),
    "early_stopping": ("never", "never"), "bos_token_id": ("1", 1), "eos_token_id": ("1,2", [1, 2]),
    "pad_token_id": ("3", 3), "do_sample": (None, True),
}  # fmt: skip
TRAINING = {
    "data": ("a", "a"), "valid_data": ("b", "b"), "valid_fraction": ("0.2", 0.2), "batch_size": ("4", 4),
    "window": ("5", 5), "random_window": (None, True), "gradient_accumulation": ("2", 2), "epochs": ("0.5", 0.5),
    "max_steps": ("6", 6), "optimizer": ("sgd", "sgd"), "lr": ("0.1", 0.1), "betas": ("0.8,0.9", [0.8, 0.9]),
    "eps": ("1e-6", 1e-6), "momentum": ("0.9", 0.9), "weight_decay": ("0", 0.0), "schedule": ("step", "step"),
    "warmup_steps": ("3", 3), "min_lr_ratio": ("0.1", 0.1), "decay_factor": ("0.3", 0.3), "decay_after": ("2", 2),
    "patience": ("4", 4), "clip_norm": ("0.25", 0.25), "autocast": ("bf16", "bf16"), "ema_decay": ("0.9", 0.9),
    "eval_every": ("7", 7), "eval_window": ("8", 8), "eval_streams": ("9", 9), "save_every": ("10", 10),
    "keep_last": ("3", 3), "export": ("best", "best"), "sample_every": ("11", 11), "sample_prompt": (r"\n", "\n"),
    "sample_tokens": ("12", 12), "log_every": ("13", 13), "save_dtype": ("bfloat16", "bfloat16"),
    "tensorboard": (None, True), "plot": (None, True), "hub_model_id": ("me/it", "me/it"),
    "hub_strategy": ("end", "end"), "hub_every_steps": ("15", 15), "hub_private": (None, True),
    "hub_revision": ("dev", "dev"), "seed": ("14", 14), "threads": ("2", 2),
}  # fmt: skip
MODEL = {
    "hidden_size": ("8", 8), "num_layers": ("3", 3), "layer_sizes": ("[5,6]", [5, 6]), "embedding_size": ("4", 4),
    "proj_size": ("2", 2), "output_projection": (None, True), "residual": (None, True), "bias": (None, True),
    "head_bias": (None, True), "tie_word_embeddings": (None, True), "embedding_dropout": ("0.1", 0.1),
    "input_dropout": ("0.2", 0.2), "hidden_dropout": ("0.3", 0.3), "output_dropout": ("0.4", 0.4),
    "weight_dropout": ("0.5", 0.5), "initializer": ("orthogonal", "orthogonal"), "initializer_range": ("0.05", 0.05),
    "forget_bias": ("1", 1.0), "num_heads": ("2", 2), "recompute": (None, True), "zoneout_h": ("0.05", 0.05),
    "zoneout_c": ("0.5", 0.5),
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "cls", "samples", "excluded", "required"),
    [
        (generate, GenerationConfig, GENERATION, API_FIELDS, []),
        (train, TrainingConfig, TRAINING, (), ["--out", "x"]),
        (train, LSTMConfig, MODEL, DERIVED_FIELDS, ["--out", "x"]),
    ],
)
def test_every_field_is_a_flag(module, cls, samples, excluded, required):
    names = {field.name for field in dataclasses.fields(cls)}
    assert set(excluded) <= names
    assert set(samples) == names - set(excluded)  # a new field needs a flag, and a sample here
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert given(parser.parse_args(required), cls) == {}  # what is not given is not set
    for name, (typed, expected) in samples.items():
        flags = [flag_name(name)] + ([typed] if typed is not None else [])
        assert given(parser.parse_args([*required, *flags]), cls) == {name: expected}
        if typed is None:
            off = flag_name(name).replace("--", "--no-", 1)
            assert given(parser.parse_args([*required, off]), cls) == {name: False}
    for action in parser._actions:
        if action.dest in samples:
            assert action.help, f"{action.dest} has no help"


def test_flags_of_generation_make_a_valid_config():
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    typed = ["--sample", "--top-k", "none", "--stop", ",", "--stop", r"\\n", "--eos-token-id", "[]", "--seed", "1,2"]
    values = given(parser.parse_args(typed), GenerationConfig)
    assert values == {
        "do_sample": True,
        "top_k": None,
        "stop_strings": [",", r"\n"],
        "eos_token_id": [],
        "seed": [1, 2],
    }
    config = GenerationConfig().replace(**values)
    assert (config.top_k, config.stop_texts, config.eos_ids) == (None, [",", r"\n"], [])
    assert given(parser.parse_args(["--greedy"]), GenerationConfig) == {"do_sample": False}
    words = given(parser.parse_args(["--bad-words-ids", "1,2", "--bad-words-ids", "3"]), GenerationConfig)
    assert words == {"bad_words_ids": [[1, 2], [3]]}
    stopped = given(parser.parse_args(["--early-stopping", "true"]), GenerationConfig)
    assert stopped == {"early_stopping": True}


@dataclass
class Example:
    """A heading that is no section.

    Sizes, in tokens:
        width: how wide. depth (levels), height: how far up, at most 50 % of
            `width`; see `slack`.
        alone.
    Rest:
        slow: waits. Only then:
        mode: `"a"` or `"b"`, or `None`.

    Raises:
        ValueError: never.
    """

    width: int = 3
    depth: int = 1
    height: float = 0.5
    slack: float = 0.0
    alone: str = "x"
    slow: bool = False
    mode: bool | Literal["b"] | None = None
    hidden: str | None = None


def test_docstring_is_read():
    entries = {entry.name: (entry.section, entry.text) for entry in read_docstring(Example)}
    text = "how far up, at most 50 % of `width`; see `slack`."
    assert entries == {
        "width": ("Sizes, in tokens", "how wide."),
        "depth": ("Sizes, in tokens", f"levels: {text}"),
        "height": ("Sizes, in tokens", text),
        "slack": ("Sizes, in tokens", "see `depth`"),
        "alone": ("Sizes, in tokens", ""),
        "slow": ("Rest", "waits. Only then:"),
        "mode": ("Rest", '`"a"` or `"b"`, or `None`.'),
        "hidden": ("Further settings", ""),
    }
    assert list(entries) == ["width", "depth", "slack", "height", "alone", "slow", "mode", "hidden"]


def test_help_speaks_of_flags(capsys):
    parser = argparse.ArgumentParser(prog="x")
    add_dataclass_arguments(parser, Example, exclude=("slack", "hidden"), texts={"alone": "overridden"}, prefix="my: ")
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    text = " ".join(lines)
    assert "my: sizes: in tokens" in text
    assert "--height X how far up, at most 50 % of --width; see --slack (default: 0.5)" in text
    assert "waits (default: off)" in text
    assert "--mode {true,false,b}" in text
    assert 'or "b", or none' in text
    assert "overridden (default: x)" in text
    assert "--slack X" not in text
    assert "--hidden" not in text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n\t\r\0", "\n\t\r\0"),
        (r"a\\nb", r"a\nb"),
        (r"\x41\u00e9", "Aé"),
        ("naïve “x”", "naïve “x”"),
        (r"\q \x4", r"\q \x4"),
    ],
)
def test_unescape(typed, meant):
    assert unescape(typed) == meant
