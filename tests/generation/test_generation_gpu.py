"""On a GPU: the same random numbers, the same tokens and interchangeable states."""

from __future__ import annotations

import pytest
import torch

from tlstm import GenerationState
from tlstm.generation.philox import GumbelNoise

pytestmark = pytest.mark.gpu

SAMPLING = {"do_sample": True, "seed": 9, "top_k": 9, "top_p": 0.95, "repetition_penalty": 1.2}


@pytest.mark.parametrize("vocab_size", [65, 50_257])
def test_noise_is_that_of_the_cpu(vocab_size) -> None:
    arguments = ([3, 2**64 - 1], [0, 5], [1, 70_001], vocab_size)
    here, there = GumbelNoise(*arguments, "cpu"), GumbelNoise(*arguments, "cuda")
    for _ in range(3):
        assert torch.equal(here.next(), there.next().cpu())


@pytest.mark.parametrize("settings", [{}, SAMPLING, {"no_repeat_ngram_size": 2, "bad_words_ids": [[3, 4]]}], ids=str)
def test_tokens_are_those_of_the_cpu(build_model, prompts, settings) -> None:
    model = build_model(dtype=torch.float64)
    common = {"max_new_tokens": 33, "eos_token_id": [5], "pad_token_id": 0, **settings}
    expected = model.generate(prompts, **common)
    out = model.cuda().generate(prompts, **common)
    assert out.is_cuda
    assert torch.equal(out.cpu(), expected)


def test_beams_are_those_of_the_cpu(build_model, prompts) -> None:
    model = build_model(dtype=torch.float64)
    common = {"max_new_tokens": 12, "eos_token_id": [5], "pad_token_id": 0, "num_beams": 3}
    expected = model.generate(prompts, **common)
    assert torch.equal(model.cuda().generate(prompts, **common).cpu(), expected)


def test_a_text_goes_on_upon_another_device(build_model, prompts, tmp_path) -> None:
    model, path = build_model(dtype=torch.float64), tmp_path / "state.safetensors"
    whole = model.generate(prompts, max_new_tokens=20, return_dict_in_generate=True, **SAMPLING)
    model.cuda()
    first = model.generate(prompts, max_new_tokens=8, return_dict_in_generate=True, **SAMPLING)
    first.state.save(path)
    model.cpu()
    second = model.generate(
        state=GenerationState.load(path), max_new_tokens=12, return_dict_in_generate=True, **SAMPLING
    )
    assert [a + b for a, b in zip(first.new_tokens, second.new_tokens, strict=True)] == whole.new_tokens
