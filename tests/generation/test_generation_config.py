"""`GenerationConfig`: round trips, defaults, and an error or a warning for everything that cannot be meant."""

from __future__ import annotations

import json
import math

import pytest

from tlstm import GenerationConfig
from tlstm.generation.inputs import resolve_config

FULL = {
    "max_new_tokens": 7,
    "max_length": 99,
    "min_new_tokens": 2,
    "max_time": 1.5,
    "stop_strings": ["a", "b"],
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[1], [2, 3]],
    "suppress_tokens": [4],
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.5,
    "seed": [1, 2**64 - 1],
    "num_return_sequences": 2,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
    "pad_token_id": 3,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
}


def test_round_trip_through_a_folder(tmp_path) -> None:
    for settings in ({}, FULL, {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never"}):
        config = GenerationConfig(**settings)
        config.save_pretrained(tmp_path / "model")
        assert GenerationConfig.from_pretrained(tmp_path / "model") == config
        stored = json.loads((tmp_path / "model" / "generation_config.json").read_text())
        assert {**stored, "tlstm_version": None} == {**settings, "tlstm_version": None}  # only what differs
        assert [file.name for file in (tmp_path / "model").iterdir()] == ["generation_config.json"]


def test_unknown_keys_are_kept_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"\['from_the_future'\] are kept but have no effect"):
        config = GenerationConfig.from_dict({"top_k": 3, "from_the_future": {"x": [1]}, "temperature": None})
    assert config.top_k == 3
    assert config.temperature == 1.0
    assert config.to_dict()["from_the_future"] == {"x": [1]}
    assert config.replace(top_k=4).extra == {"from_the_future": {"x": [1]}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature: 0 .* do_sample=False"),
        ({"temperature": -1.0}, r"temperature: expected a number in \(0, inf\), got -1.0"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, r"top_p: expected a number in \(0, 1\] or null, got 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"typical_p": 0.0}, "typical_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": -1}, "top_k: expected a whole number of at least 0 or null"),
        ({"top_k": 2.0}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number of at least 1 or null, got 0"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens=5 is above max_new_tokens=4; change"),
        ({"max_time": 0}, "max_time"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "do_sample": True}, "num_beams and do_sample exclude each other"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is above num_beams=2.*raise num_beams"),
        ({"num_return_sequences": 2}, "would repeat one text; set do_sample=True or num_beams"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"length_penalty": math.inf}, "length_penalty"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"seed": [1, 2**64]}, "seed"),
        ({"stop_strings": ""}, "stop_strings"),
        ({"stop_strings": 5}, "stop_strings"),
        ({"stop_strings": ["a", 5]}, "stop_strings"),
        ({"bad_words_ids": [1]}, "bad_words_ids: expected a list of non-empty lists"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"suppress_tokens": 3}, "suppress_tokens"),
        ({"suppress_tokens": [-1]}, "suppress_tokens"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [None]}, "eos_token_id"),
        ({"pad_token_id": -100}, "pad_token_id"),
        ({"do_sample": "yes"}, "do_sample: expected true or false"),
        ({"extra": None}, "extra"),
    ],
)
def test_what_cannot_be_meant_is_an_error(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**settings)


def test_errors_in_a_file_name_it(tmp_path) -> None:
    path = tmp_path / "generation_config.json"
    for text, message in (
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"top_p": 7}', "top_p"),
        ("[" * 100_000, "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"generation_config\.json: .*{message}"):
            GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        GenerationConfig.from_pretrained(tmp_path / "nowhere")


def test_unknown_settings_are_errors_with_a_suggestion(model) -> None:
    with pytest.raises(TypeError, match="unknown generation setting 'temprature'; did you mean 'temperature'"):
        model.generate([[1]], temprature=0.5)
    with pytest.raises(TypeError, match="the settings are bad_words_ids, bos_token_id"):
        GenerationConfig().replace(zzz=1)


def test_ids_outside_the_vocabulary_are_errors(model) -> None:
    for settings in (
        {"bos_token_id": 13},
        {"eos_token_id": [1, 13]},
        {"pad_token_id": 14},
        {"suppress_tokens": [13]},
        {"bad_words_ids": [[1, 13]]},
    ):
        with pytest.raises(ValueError, match=rf"{next(iter(settings))}: expected ids below .* 13, got \[1[34]\]"):
            model.generate([[1]], **settings)
    with pytest.raises(ValueError, match=r"bad_words_ids forbids the end-of-sequence id 5; .* eos_token_id=\[\]"):
        model.generate([[1]], bad_words_ids=[[5]], eos_token_id=5)


def test_settings_without_effect_are_warned_of(model, recwarn) -> None:
    for settings, names in (
        ({"temperature": 0.5, "top_k": 3}, r"temperature \(needs do_sample=True\), top_k \(needs do_sample=True\)"),
        ({"seed": 5}, "seed"),
        ({"length_penalty": 2.0}, r"length_penalty \(needs num_beams\)"),
        ({"output_scores": True}, r"output_scores \(needs return_dict_in_generate=True and num_beams=1\)"),
    ):
        with pytest.warns(UserWarning, match=f"without effect: {names}"):
            model.generate([[1]], max_new_tokens=1, **settings)
    sampling = GenerationConfig(do_sample=True, top_k=3, seed=5, max_new_tokens=1)
    recwarn.clear()
    model.generate([[1]], generation_config=sampling)
    model.generate([[1]], generation_config=sampling, do_sample=False)  # switched off on purpose
    assert not recwarn.list


def test_token_ids_come_from_the_model_where_the_settings_have_none(build_model) -> None:
    config = build_model(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=4).config
    default = GenerationConfig(eos_token_id=5)
    resolved = resolve_config(None, default, config, {"bos_token_id": 6})
    assert (resolved.bos_token_id, resolved.eos_token_id, resolved.pad_token_id) == (6, 5, 4)
    assert resolve_config(GenerationConfig(), default, config, {}).eos_ids == [2, 3]
    with pytest.raises(ValueError, match="expected a GenerationConfig, got dict"):
        resolve_config({}, default, config, {})
