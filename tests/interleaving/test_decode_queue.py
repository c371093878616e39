"""A queue of prompts through the slots of the decode kernel: each text is what its prompt gives alone, to the state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tlstm.generation import batching
from tlstm.generation.batching import BatchedText, TextBatcher
from tlstm.generation.decoders import DecoderChoice
from tlstm.generation.state import GenerationState

from .decoding import DecodeCase, Run, assert_same, clear_case, kernel_rows

# Seven texts that end at steps of their own, through two slots of which other texts are in the middle of a chunk.
QUEUE = DecodeCase(B=7, slots=2, rows=2, steps=6, chunk=2, settings={"eos_token_id": [2, 7]})
SAMPLED = replace(QUEUE, settings={"do_sample": True, "eos_token_id": [2, 7], "repetition_penalty": 1.2})


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


@pytest.fixture
def queue(monkeypatch):
    """queue(case, model, prompts, batch_size): as `generate_many` over the kernel, which runs in the interpreter."""

    def start(case, model, prompts, batch_size=2, **more) -> TextBatcher:
        def choose(model, config, places, tokens, **options):
            assert options.pop("wanted") == "kernel"
            return kernel_rows(case, model, 0, **options), DecoderChoice("kernel")

        monkeypatch.setattr(batching, "choose_rows", choose)
        config = case.config(model)
        return model.generate_many(prompts, batch_size, config, decoder="kernel", **more)

    return start


def joined(texts: list[BatchedText]) -> Run:
    """Texts in the order of their prompts, as one batch."""
    texts = sorted(texts, key=lambda text: text.prompt)
    recurrent = type(texts[0].state.recurrent).cat([text.state.recurrent for text in texts])
    tokens = tuple(ids for text in texts for ids in text.state.tokens)
    state = GenerationState(recurrent, tokens, texts[0].state.vocab_size)
    return Run([text.new_tokens for text in texts], [text.finish_reason for text in texts], state)


@pytest.mark.parametrize("batch_size", [2, 4], ids=["as many as slots", "more than slots"])
@pytest.mark.parametrize("case", [QUEUE, SAMPLED], ids=["greedy", "sampled"])
def test_each_text_is_what_it_is_alone(queue, case, batch_size) -> None:
    model, expected = clear_case(case)
    assert len({len(tokens) for tokens in expected.tokens}) > 2, "the case needs texts of many lengths"
    batcher = queue(case, model, case.prompts(), batch_size)
    texts = list(batcher)
    assert_same(joined(texts), expected, case.dtype)
    assert batcher.decoder.name == "kernel"
    assert [text.prompt for text in texts] != list(range(7)), "in the order in which they end"
    assert batcher.timings.decode_tokens == sum(map(len, expected.tokens))
    assert batcher.timings.prefill_tokens == sum(len(prompt) - 1 for prompt in case.prompts())


def test_prompts_are_read_when_slots_become_free(queue) -> None:
    model, expected = clear_case(QUEUE)
    read = []

    def prompts():
        for prompt in QUEUE.prompts():
            read.append(prompt)
            yield prompt

    batcher, ended = queue(QUEUE, model, prompts()), []
    while (new := batcher.step()) is not None:
        assert len(read) <= len(ended) + 2
        ended += new
    assert_same(joined(ended), expected, QUEUE.dtype)


def test_a_slot_is_filled_while_the_other_text_goes_on(queue) -> None:
    """One text of nine tokens beside three of two, which pass through the other slot before it has ended."""
    case = replace(QUEUE, B=4, settings={"max_length": 10, "max_new_tokens": None})
    model, prompts = case.make_model(), [[1], [2] * 8, [3] * 8, [4] * 8]
    alone = [model.generate([p], generation_config=case.config(model))[0, len(p) :].tolist() for p in prompts]
    ended = [(text.prompt, text.new_tokens) for text in queue(case, model, prompts)]
    assert sorted(ended) == list(enumerate(alone))
    assert [prompt for prompt, _ in ended].index(2) < [prompt for prompt, _ in ended].index(0)


def test_texts_in_the_slots_go_on_from_where_they_stand(queue) -> None:
    model, expected = clear_case(SAMPLED)
    batcher, ended = queue(SAMPLED, model, SAMPLED.prompts()), []
    for _ in range(3):  # in the middle of a chunk, with the next one made already
        ended += batcher.step()
    begun = batcher.unfinished
    assert begun
    for text in begun:
        assert text.finish_reason is None
        config = SAMPLED.config(model).replace(max_new_tokens=6 - len(text.new_tokens), seed=None)
        rest = model.generate(state=text.state, generation_config=config)
        whole = [*text.new_tokens, *rest[0].tolist()]
        assert whole == expected.tokens[text.prompt]
    assert_same(joined([*ended, *batcher]), expected, SAMPLED.dtype)  # and looking changed nothing


def test_stop_strings_free_a_slot(queue) -> None:
    case = replace(SAMPLED, chunk=4)
    model, plain = clear_case(case)
    stop = Letters().decode(plain.tokens[0][:2])
    config = case.config(model).replace(return_dict_in_generate=True, stop_strings=[stop])
    output = model.generate(case.prompts(), generation_config=config, tokenizer=Letters())
    assert output.finish_reasons[0] == "stop_string"
    texts = list(queue(case, model, case.prompts(), tokenizer=Letters(), stop_strings=[stop]))
    assert_same(joined(texts), Run(output.new_tokens, output.finish_reasons, output.state), case.dtype)


def test_time_that_is_up_ends_every_text_with_one_token(queue) -> None:
    model, expected = clear_case(QUEUE)
    texts = joined(list(queue(QUEUE, model, QUEUE.prompts(), max_time=1e-9)))
    assert texts.tokens == [tokens[:1] for tokens in expected.tokens]
    assert set(texts.reasons) <= {"time", "eos"}


def test_states_do_not_hold_on_to_the_chunks(queue) -> None:
    model, _ = clear_case(QUEUE)
    for text in queue(QUEUE, model, QUEUE.prompts()):
        for tensor in (*text.state.recurrent.h, *text.state.recurrent.c):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert not tensor.is_inference()
    assert torch.is_inference_mode_enabled() is False
