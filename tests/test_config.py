"""LSTMConfig: validation, derived sizes, JSON round trip."""

from __future__ import annotations

import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstm import GenerationConfig, LSTMConfig


def test_derived_sizes_follow_the_plain_fields():
    config = LSTMConfig(vocab_size=65, hidden_size=13, num_layers=3)
    assert config.widths == [13, 13, 13]
    assert config.output_sizes == [13, 13, 13]
    assert config.embedding_width == config.head_width == 13


def test_layer_sizes_override_and_are_reflected():
    config = LSTMConfig(vocab_size=65, layer_sizes=[115, 115, 40], embedding_size=40, tie_word_embeddings=True)
    assert config.widths == [115, 115, 40]
    assert (config.hidden_size, config.num_layers) == (115, 3)
    assert config.embedding_width == config.head_width == 40


def test_projections_set_the_output_widths():
    config = LSTMConfig(vocab_size=65, hidden_size=31, proj_size=7, embedding_size=11, output_projection=True)
    assert config.output_sizes == [7, 7]
    assert config.head_width == 11


@given(
    vocab_size=st.integers(1, 10**5),
    layer_sizes=st.one_of(st.none(), st.lists(st.integers(1, 2000), min_size=1, max_size=5)),
    dropout=st.floats(0, 0.99),
    tie=st.booleans(),
    eos=st.one_of(st.none(), st.just(0), st.just([0])),
)
def test_json_round_trip(vocab_size, layer_sizes, dropout, tie, eos):
    config = LSTMConfig(
        vocab_size=vocab_size,
        layer_sizes=layer_sizes,
        output_projection=True,
        tie_word_embeddings=tie,
        weight_dropout=dropout,
        eos_token_id=eos,
    )
    text = config.to_json()
    assert LSTMConfig.from_json(text) == config
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_save_and_read_file(tmp_path):
    config = LSTMConfig(vocab_size=7)
    config.save_pretrained(tmp_path / "new")
    assert LSTMConfig.from_json_file(tmp_path / "new" / "config.json") == config
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["config.json"]


def test_unknown_keys_are_kept_with_a_warning():
    with pytest.warns(UserWarning, match="from_the_future"):
        config = LSTMConfig.from_dict({"vocab_size": 7, "from_the_future": {"a": [1]}})
    assert config.extra == {"from_the_future": {"a": [1]}}
    assert json.loads(config.to_json())["from_the_future"] == {"a": [1]}


@pytest.mark.parametrize("config_class", [LSTMConfig, GenerationConfig])
def test_what_transformers_adds_is_kept_without_a_word(config_class):
    added = {"auto_map": {"AutoConfig": "modeling_tlstm.LSTMConfig"}, "transformers_version": "5.23.0"}
    required = {"vocab_size": 7} if config_class is LSTMConfig else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = config_class.from_dict({**required, **added})
    assert config.extra == added
    assert json.loads(config.to_json()).items() >= added.items()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": 7, "hidden_size": 2.5}, "hidden_size"),
        ({"vocab_size": 7, "hidden_size": 10**12}, "hidden_size"),
        ({"vocab_size": 7, "num_layers": 10**9}, "num_layers"),
        ({"vocab_size": 7, "layer_sizes": []}, "layer_sizes"),
        ({"vocab_size": 7, "layer_sizes": [3, -1]}, "layer_sizes"),
        ({"vocab_size": 7, "layer_sizes": "33"}, "layer_sizes"),
        ({"vocab_size": 7, "hidden_size": 5, "proj_size": 5}, "proj_size"),
        ({"vocab_size": 7, "weight_dropout": 1.0}, "weight_dropout"),
        ({"vocab_size": 7, "hidden_dropout": float("nan")}, "hidden_dropout"),
        ({"vocab_size": 7, "residual": 1}, "residual"),
        ({"vocab_size": 7, "initializer": "magic"}, "initializer"),
        ({"vocab_size": 7, "initializer_range": -1.0}, "initializer_range"),
        ({"vocab_size": 7, "forget_bias": float("inf")}, "forget_bias"),
        ({"vocab_size": 7, "dtype": "int8"}, "dtype"),
        ({"vocab_size": 7, "eos_token_id": 7}, "eos_token_id"),
        ({"vocab_size": 7, "eos_token_id": []}, "eos_token_id"),
        ({"vocab_size": 7, "eos_token_id": [1, None]}, "eos_token_id"),
        ({"vocab_size": 7, "pad_token_id": -1}, "pad_token_id"),
        ({"vocab_size": 7, "architectures": "LSTMForCausalLM"}, "architectures"),
        ({"vocab_size": 7, "embedding_size": 3, "tie_word_embeddings": True}, "output_projection=True"),
    ],
)
def test_bad_fields_are_named(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        LSTMConfig(**fields)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "JSON object"),
        ("{}", "vocab_size"),
        ('{"model_type": "gpt2", "vocab_size": 7}', "another kind of model"),
        ('{"config_version": 99, "vocab_size": 7}', "upgrade tlstm"),
        ('{"vocab_size": 7, "hidden_size": null}', "hidden_size"),
    ],
)
def test_bad_files_are_named(tmp_path, text, complaint):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        LSTMConfig.from_json_file(path)
    assert str(path) in str(caught.value)
