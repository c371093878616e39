"""Beam search against brute force over all sequences, against transformers' own, and alone against in a batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tlstm import GenerateOutput, LSTMForCausalLM
from tlstm.generation.beam_search import beam_search
from tlstm.generation.config import GenerationConfig

transformers = pytest.importorskip("transformers")


def search(model, *args, **settings) -> GenerateOutput:
    return model.generate(*args, return_dict_in_generate=True, **settings)


@torch.no_grad()
def brute_force(
    model: LSTMForCausalLM, prompt: list[int], length: int, eos: set[int], length_penalty: float
) -> list[tuple[float, list[int]]]:
    """Every sequence that ends with its first end token, or at `length`; best first. Scored in float64."""
    found = []
    for count in range(1, length + 1):
        for new in itertools.product(range(model.config.vocab_size), repeat=count):
            if eos & set(new[:-1]) or (count < length and new[-1] not in eos):
                continue
            log_probs = model(torch.tensor([[*prompt, *new]])).logits[0].double().log_softmax(-1)
            total = sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(new))
            found.append((total / count**length_penalty, list(new)))
    return sorted(found, key=lambda item: -item[0])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("eos", [[], [0], [0, 3]], ids=str)
def test_a_wide_beam_finds_what_brute_force_finds(build_model, length_penalty, eos) -> None:
    model = build_model(vocab_size=5, seed=2)
    length = 3
    for prompt in ([1], [4, 2, 2]):
        expected = brute_force(model, prompt, length, set(eos), length_penalty)
        out = search(
            model,
            [prompt],
            num_beams=5 ** (length - 1),
            num_return_sequences=7,
            max_new_tokens=length,
            length_penalty=length_penalty,
            eos_token_id=eos,
            pad_token_id=0,
            early_stopping="never",
        )
        assert out.new_tokens == [new for _, new in expected[:7]]
        torch.testing.assert_close(
            out.sequences_scores.double(), torch.tensor([score for score, _ in expected[:7]], dtype=torch.float64),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        for new, reason in zip(out.new_tokens, out.finish_reasons, strict=True):
            assert reason == ("eos" if new[-1] in eos else "length")


class StatelessModel(transformers.PreTrainedModel, transformers.GenerationMixin):
    """The same predictions behind transformers' own `generate`, which reads the whole text for every token."""

    config_class = transformers.PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, model: LSTMForCausalLM) -> None:
        config = transformers.PretrainedConfig(vocab_size=model.config.vocab_size, use_cache=False)
        config.num_hidden_layers = 1
        super().__init__(config)
        self.inner = model
        self.generation_config.use_cache = False

    def forward(self, input_ids, attention_mask=None, **kwargs) -> transformers.modeling_outputs.CausalLMOutput:
        return transformers.modeling_outputs.CausalLMOutput(logits=self.inner(input_ids).logits)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize(
    "settings",
    [
        {"length_penalty": 1.0},
        {"length_penalty": -0.5, "eos_token_id": [5, 7]},
        {"length_penalty": 2.0, "eos_token_id": 7, "min_new_tokens": 3},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "eos_token_id": [5, 7]},
    ],
    ids=str,
)
def test_beams_are_those_of_transformers(model, prompts, num_beams, early_stopping, settings) -> None:
    common = {
        "num_beams": num_beams,
        "num_return_sequences": num_beams - 1,
        "max_new_tokens": 11,
        "early_stopping": early_stopping,
        "pad_token_id": 12,
        "return_dict_in_generate": True,
        **settings,
    }
    theirs = StatelessModel(model).generate
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected = theirs(ids, attention_mask=torch.ones_like(ids), do_sample=False, output_scores=True, **common)
        out = model.generate([prompt], **common)
        for row, new in enumerate(out.new_tokens):
            wanted = expected.sequences[row, len(prompt) :].tolist()
            assert wanted[: len(new)] == new
            assert set(wanted[len(new) :]) <= {12}
        torch.testing.assert_close(out.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_unequal_prompts_finds_what_each_finds_alone(build_model, prompts, dtype) -> None:
    model = build_model(dtype=dtype, eos_token_id=[5], pad_token_id=0)
    settings = {"num_beams": 4, "num_return_sequences": 3, "max_length": 21, "no_repeat_ngram_size": 3}
    together = search(model, prompts, **settings)
    alone = [search(model, [prompt], **settings) for prompt in prompts]
    assert together.new_tokens == [new for out in alone for new in out.new_tokens]
    assert together.finish_reasons == [reason for out in alone for reason in out.finish_reasons]
    assert len(set(together.finish_reasons)) == 2
    torch.testing.assert_close(together.sequences_scores, torch.cat([out.sequences_scores for out in alone]))


def test_one_beam_is_greedy(model, prompts) -> None:
    for settings in ({}, {"eos_token_id": [5, 7], "early_stopping": True, "num_beams": 2}):
        config = GenerationConfig(max_new_tokens=17, **settings)
        config.num_beams = 1
        greedy = search(model, prompts, max_new_tokens=17, eos_token_id=config.eos_token_id, pad_token_id=0)
        assert beam_search(model, model.prefill(prompts), config).new_tokens == greedy.new_tokens


def test_the_state_of_a_beam_is_that_of_its_text(model, prompts) -> None:
    out = search(model, prompts, num_beams=3, num_return_sequences=2, max_new_tokens=9, eos_token_id=5, pad_token_id=0)
    for row, new in enumerate(out.new_tokens):
        text = prompts[row // 2] + new
        assert out.state.tokens[row].tolist() == text
        fresh = model.prefill([text])
        for got, expected in zip(out.state.recurrent.h + out.state.recurrent.c, fresh.recurrent.h + fresh.recurrent.c,
                                 strict=True):  # fmt: skip
            torch.testing.assert_close(got[row], expected[0], rtol=1e-5, atol=1e-6)
    resumed = model.generate(state=out.state, max_new_tokens=4)
    whole = model.generate([ids.tolist() for ids in out.state.tokens], max_new_tokens=4)
    assert torch.equal(resumed, whole[:, -4:])


def test_fewer_continuations_than_beams(build_model) -> None:
    model = build_model(vocab_size=3)
    out = search(model, [[1]], num_beams=9, num_return_sequences=3, max_new_tokens=1)
    assert sorted(out.new_tokens) == [[0], [1], [2]]
    assert all(map(math.isfinite, out.sequences_scores.tolist()))
    with pytest.raises(ValueError, match="only 3 continuations are possible"):
        model.generate([[1]], num_beams=9, num_return_sequences=4, max_new_tokens=1)
    with pytest.raises(ValueError, match="every token is forbidden"):
        model.generate([[1]], num_beams=2, suppress_tokens=[0, 1, 2])


def test_beams_end_by_time_and_by_stop_string(model) -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(chr(97 + token) for token in ids)

    plain = search(model, [[1]], num_beams=3, max_new_tokens=12)
    text = Letters().decode(plain.new_tokens[0])
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12, "stop_strings": text[3:5]}
    settings["length_penalty"] = 0.0  # short sequences win
    out = search(model, [[1]], tokenizer=Letters(), **settings)
    assert "stop_string" in out.finish_reasons
    for new, reason in zip(out.new_tokens, out.finish_reasons, strict=True):
        found = Letters().decode([1, *new]).find(text[3:5])
        assert found == (len(new) - 1 if reason == "stop_string" else -1)
    late = search(model, [[1]], num_beams=3, max_new_tokens=10**6, max_time=1e-9)
    assert late.finish_reasons == ["time"]
    assert len(late.new_tokens[0]) == 1
