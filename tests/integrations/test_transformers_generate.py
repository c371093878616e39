"""transformers' own `generate` and pipeline on tlstm models, against tlstm's `generate`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import scipy.stats
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, StoppingCriteriaList, TextIteratorStreamer, pipeline

from tlstm import LSTMForCausalLM, Tokenizer
from tlstm.integrations.transformers import CACHE, LSTMCache

SHIPPED = Path(__file__).parents[2] / "model_cards" / "shakespeare-char"
PAD = 64
PROMPTS = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5])]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """The prompts, padded on the left."""
    ids = pad_sequence(PROMPTS, batch_first=True, padding_value=PAD, padding_side="left")
    mask = pad_sequence([torch.ones_like(p) for p in PROMPTS], batch_first=True, padding_side="left")
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def lengths_fed(theirs) -> list[int]:
    """How many positions the recurrence read in each call."""
    found: list[int] = []
    theirs.model.register_forward_pre_hook(lambda module, arguments: found.append(arguments[0].shape[1]))
    return found


def own_texts(own: LSTMForCausalLM, **settings) -> list[torch.Tensor]:
    """What tlstm makes of each prompt alone; only the new tokens."""
    return [own.generate(ids.tolist(), **settings)[0][len(ids) :] for ids in PROMPTS]


@pytest.mark.parametrize("ends", [False, True], ids=["all long", "some end"])
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 0.5}], ids=["greedy", "beams", "short beams"]
)
def test_texts_are_those_of_tlstm(own, theirs, batch, settings, ends):
    """Each text of a left-padded batch is that of its prompt alone; in one go, in chunks, and without a cache."""
    expected = own_texts(own, max_new_tokens=23, **settings)
    if ends:
        settings = {**settings, "eos_token_id": [int(expected[0][9]), int(expected[1][4])], "pad_token_id": PAD}
        expected = own_texts(own, max_new_tokens=23, **settings)
        assert min(map(len, expected)) < 23
    expected = [[*text.tolist(), *[PAD] * (23 - len(text))] for text in expected]
    for more in ({}, {"prefill_chunk_size": 3}, {"use_cache": False}):
        made = theirs.generate(**batch, max_new_tokens=23, do_sample=False, **settings, **more)[:, 7:]
        assert torch.nn.functional.pad(made, (0, 23 - made.shape[1]), value=PAD).tolist() == expected


def test_every_token_is_read_once(theirs, batch, lengths_fed):
    theirs.generate(**batch, max_new_tokens=13, do_sample=False)
    assert lengths_fed == [7, *[1] * 12]
    lengths_fed.clear()
    theirs.generate(**batch, max_new_tokens=5, num_beams=3, prefill_chunk_size=3)
    assert lengths_fed == [3, 3, 1, 1, 1, 1, 1]


def test_a_text_goes_on_from_its_cache(own, theirs, batch, lengths_fed):
    whole = theirs.generate(**batch, max_new_tokens=20, do_sample=False)
    lengths_fed.clear()
    part = theirs.generate(**batch, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    assert part[CACHE].get_seq_length() == 7 + 9 - 1
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 9, dtype=torch.long)], dim=1)
    cached = {"attention_mask": mask, CACHE: part[CACHE], "do_sample": False}
    assert torch.equal(theirs.generate(part.sequences, max_new_tokens=11, **cached), whole)
    assert lengths_fed == [7, *[1] * 19]
    read = own.prefill([ids.tolist() for ids in PROMPTS]).recurrent
    cache = LSTMCache()
    theirs(batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1], **{CACHE: cache})
    for found, expected in zip(cache.state.h + cache.state.c, read.h + read.c, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_prompt_is_read_once_for_many_texts(theirs, lengths_fed):
    prompt = PROMPTS[0][None]
    with torch.no_grad():
        cache = theirs(prompt[:, :-1])[CACHE]
    many = copy.deepcopy(cache)
    many.batch_repeat_interleave(4)
    assert (cache.batch_size, many.batch_size) == (1, 4)
    lengths_fed.clear()
    texts = theirs.generate(prompt.repeat(4, 1), **{CACHE: many}, max_new_tokens=6, do_sample=False)
    assert lengths_fed == [1] * 6
    assert texts.tolist() == theirs.generate(prompt, max_new_tokens=6, do_sample=False).tolist() * 4
    assert cache.get_seq_length() == 6
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)


def test_sampling_is_from_the_whole_distribution(theirs):
    """transformers' default of the 50 likeliest of 65 tokens would be seen, and is still to be had."""
    prompt = PROMPTS[0][None]
    theirs.lm_head.weight.data /= 40
    draws = {"do_sample": True, "max_new_tokens": 1, "num_return_sequences": 6500}
    with torch.no_grad():
        expected = torch.softmax(theirs(prompt).logits[0, -1].double(), -1) * draws["num_return_sequences"]
    torch.manual_seed(0)
    counts = theirs.generate(prompt, **draws)[:, -1].bincount(minlength=65)
    assert expected.min() > 5
    assert scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4
    likeliest = set(expected.topk(9).indices.tolist())
    assert set(theirs.generate(prompt, top_k=9, **draws)[:, -1].tolist()) == likeliest
    config = transformers.GenerationConfig(top_k=9, **draws)
    assert set(theirs.generate(prompt, generation_config=config)[:, -1].tolist()) == likeliest
    theirs.generation_config.top_k = 9
    assert set(theirs.generate(prompt, **draws)[:, -1].tolist()) == likeliest


def test_stopping_criteria_and_streamers(theirs):
    prompt = PROMPTS[0][None]
    text = theirs.generate(prompt, max_new_tokens=20, do_sample=False)[0]
    stop = StoppingCriteriaList([lambda ids, scores: torch.full((len(ids),), ids.shape[1] == 12)])
    assert theirs.generate(prompt, max_new_tokens=20, do_sample=False, stopping_criteria=stop)[0].tolist() == (
        text[:12].tolist()
    )
    put: list[int] = []

    class Streamer(transformers.generation.BaseStreamer):
        def put(self, value):
            put.extend(value.flatten().tolist())

        def end(self):
            put.append(-1)

    theirs.generate(prompt, max_new_tokens=20, do_sample=False, streamer=Streamer())
    assert put == [*text.tolist(), -1]


def test_assisted_generation_is_refused(theirs):
    with pytest.raises(ValueError, match="not supported with stateful models"):
        theirs.generate(PROMPTS[0][None], assistant_model=theirs, max_new_tokens=3)


@pytest.fixture(scope="module")
def shipped():
    return pipeline("text-generation", model=str(SHIPPED), device="cpu")


def test_the_pipeline_writes_what_tlstm_writes(shipped):
    own, tokenizer = LSTMForCausalLM.from_pretrained(SHIPPED), Tokenizer.from_pretrained(SHIPPED)
    ids = own.generate(tokenizer("ROMEO:\n").input_ids, max_new_tokens=60, do_sample=False)
    expected = tokenizer.decode(ids[0])
    options = {"max_new_tokens": 60, "do_sample": False}
    assert shipped("ROMEO:\n", **options)[0]["generated_text"] == expected
    assert shipped("ROMEO:\n", return_full_text=False, **options)[0]["generated_text"] == expected[len("ROMEO:\n") :]
    line = shipped("ROMEO:\n", stop_strings=["\n"], tokenizer=shipped.tokenizer, **options)[0]["generated_text"]
    assert line == expected[: expected.index("\n", 7) + 1]
    torch.manual_seed(3)
    sampled = shipped(["ROMEO:\n", "JULIET:\n"], max_new_tokens=30)  # do_sample and temperature as in the checkpoint
    assert [len(texts[0]["generated_text"]) for texts in sampled] == [37, 38]


def test_text_streams_with_the_tokenizer(shipped):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    inputs = tokenizer("ROMEO:\n", return_tensors="pt")
    ids = shipped.model.generate(**inputs, streamer=streamer, max_new_tokens=40, do_sample=False)
    assert "".join(streamer) == tokenizer.decode(ids[0, 7:])
