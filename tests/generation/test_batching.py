"""Continuous batching: each text is what its prompt gives alone, rows are refilled at once, prompts are read lazily."""

from __future__ import annotations

import pytest
import torch

from tlstm import Tokenizer
from tlstm.generation import decoders
from tlstm.generation.batching import TextBatcher
from tlstm.generation.graph_step import GraphStep

SAMPLING = {"do_sample": True, "seed": 2**63 + 5, "temperature": 1.2, "top_k": 9}


@pytest.fixture
def many() -> list[list[int]]:
    """23 prompts of 1 to 13 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 14, (23,), generator=generator).tolist()
    return [torch.randint(13, (length,), generator=generator).tolist() for length in lengths]


def alone(model, prompts, **settings):
    """(tokens, reason) of each prompt by itself, through the plain loop."""
    outs = [model.generate([p], decoder="loop", return_dict_in_generate=True, **settings) for p in prompts]
    return [(out.new_tokens[row], out.finish_reasons[row]) for out in outs for row in range(len(out.new_tokens))]


def in_order(batcher: TextBatcher):
    texts = sorted(batcher, key=lambda text: (text.prompt, text.copy))
    return [(text.new_tokens, text.finish_reason) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 20},
        {"max_new_tokens": 50, "eos_token_id": [5, 7], "pad_token_id": 0, **SAMPLING},
        {"max_length": 17, "repetition_penalty": 1.2, "eos_token_id": [5], "min_new_tokens": 3, **SAMPLING},
    ],
    ids=["greedy", "eos", "max_length"],
)
def test_each_text_is_what_it_is_alone(model, many, batch_size, settings) -> None:
    expected = alone(model, many, **settings)
    assert in_order(model.generate_many(many, batch_size, **settings)) == expected
    if "eos_token_id" in settings:
        assert len({len(tokens) for tokens, _ in expected}) > 5, "the case needs texts of many lengths"


@pytest.mark.parametrize("settings", [{}, {"eos_token_id": [5, 7], "pad_token_id": 0, **SAMPLING}], ids=["greedy", ""])
def test_the_graphed_step_serves_a_queue(model, many, settings, monkeypatch) -> None:
    """Recorded without a GPU as the function itself, once for all texts."""
    recorded = []

    def record(function):
        recorded.append(function)
        return function

    monkeypatch.setattr(decoders, "graph_step", lambda model, places: GraphStep(model, places, record))
    batcher = model.generate_many(many, 5, max_new_tokens=20, decoder="graph", **settings)
    assert batcher.decoder.name == "graph"
    assert in_order(batcher) == alone(model, many, max_new_tokens=20, **settings)
    assert len(recorded) == 1


def test_a_recording_that_fails_leaves_the_queue_to_the_next_decoder(model, many, monkeypatch) -> None:
    def broken(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoders, "graph_step", lambda model, places: GraphStep(model, places, broken))
    batcher = model.generate_many(many, 5, max_new_tokens=3)
    assert batcher.decoder.name == "lean"
    assert "operation not permitted" in batcher.decoder.refused["graph"]
    assert in_order(batcher) == alone(model, many, max_new_tokens=3)
    with pytest.raises(ValueError, match="decoder='graph' cannot serve this request: recording the step failed"):
        model.generate_many(many, decoder="graph")


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["graph", "loop"])
def test_a_queue_on_a_gpu_gives_the_texts_of_the_cpu(build_model, many, decoder) -> None:
    settings = {"max_new_tokens": 30, "eos_token_id": [5, 7], "pad_token_id": 0, **SAMPLING}
    model = build_model(dtype=torch.float64)
    expected = alone(model, many, **settings)
    batcher = model.cuda().generate_many(many, 5, decoder=decoder, **settings)
    assert batcher.decoder.name == decoder
    assert in_order(batcher) == expected


def test_rows_are_refilled_at_once_and_prompts_read_as_needed(model, many) -> None:
    """Steps are those of a perfect queue, simulated here; the generator is never ahead of the rows."""
    settings = {"max_new_tokens": 50, "eos_token_id": [5, 7], **SAMPLING}
    lengths = [len(tokens) for tokens, _ in alone(model, many, pad_token_id=0, **settings)]
    read = []

    def prompts():
        for prompt in many:
            read.append(prompt)
            yield prompt

    batcher = model.generate_many(prompts(), 4, **settings)
    queue, rows, ended = list(range(len(many))), [], []
    while True:
        while queue and len(rows) < 4:
            rows.append([queue[0], lengths[queue.pop(0)]])
        got = batcher.step()
        if not rows:
            assert got is None
            break
        assert len(read) == len(many) - len(queue)
        rows = [[number, left - 1] for number, left in rows]
        over = [number for number, left in rows if left == 0]
        rows = [row for row in rows if row[1] > 0]
        assert sorted(text.prompt for text in got) == over
        ended += over
    assert sorted(ended) == list(range(len(many)))
    assert batcher.timings.decode_tokens == sum(lengths)
    assert batcher.timings.prefill_tokens == sum(len(prompt) - 1 for prompt in many)
    assert batcher.timings.decode_seconds > 0


def test_several_copies_of_each_and_seeds_of_their_own(model, many) -> None:
    settings = {"do_sample": True, "max_new_tokens": 11, "num_return_sequences": 3, "eos_token_id": [5]}
    expected = [
        alone(model, [prompt], seed=seed, pad_token_id=0, **settings) for seed, prompt in enumerate(many[:7], start=4)
    ]
    texts = list(model.generate_many(many[:7], 5, seed=list(range(4, 11)), **settings))
    texts.sort(key=lambda text: (text.prompt, text.copy))
    assert [(text.new_tokens, text.finish_reason) for text in texts] == [text for three in expected for text in three]
    assert [text.seed for text in texts] == [seed for seed in range(4, 11) for _ in range(3)]


def test_texts_go_on_from_their_states_finished_or_not(model, many) -> None:
    whole = alone(model, many[:6], max_new_tokens=30, **SAMPLING)
    short = sorted(model.generate_many(many[:6], 4, max_new_tokens=12, **SAMPLING), key=lambda text: text.prompt)
    batcher = model.generate_many(many[:6], 4, max_new_tokens=30, **SAMPLING)
    for _ in range(7):
        assert batcher.step() == []
    begun = batcher.unfinished
    assert [(text.prompt, len(text.new_tokens)) for text in begun] == [(0, 7), (1, 7), (2, 7), (3, 7)]
    assert all(text.finish_reason is None for text in begun)
    for text in [*short, *begun]:
        left = 30 - len(text.new_tokens)
        rest = model.generate(state=text.state, max_new_tokens=left, do_sample=True, temperature=1.2, top_k=9)
        assert text.new_tokens + rest[0].tolist() == whole[text.prompt][0]
    assert in_order(batcher) == whole  # and looking changed nothing


def test_stop_strings_and_half_done_prompts(build_model) -> None:
    tokenizer = Tokenizer.bytes()
    model = build_model(vocab_size=tokenizer.vocab_size)
    settings = {"max_new_tokens": 200, "stop_strings": ["a", "e"], "tokenizer": tokenizer, **SAMPLING}
    prompts = [tokenizer.encode(text) for text in ("the", "né", "fox")]
    assert in_order(model.generate_many(prompts, 2, **settings)) == alone(model, prompts, **settings)


def test_mistakes(model) -> None:
    assert list(model.generate_many([])) == []
    assert model.generate_many([]).step() is None
    with pytest.raises(ValueError, match="batch_size"):
        model.generate_many([[1]], 0)
    with pytest.raises(ValueError, match="expected no beams"):
        model.generate_many([[1]], num_beams=2)
    with pytest.raises(ValueError, match=r"seed: expected one per prompt \(2\), got 3"):
        model.generate_many([[1], [2]], do_sample=True, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="an unknown number"):
        model.generate_many(iter([[1]]), do_sample=True, seed=[1])
    for name in ("kernel", "graph"):
        with pytest.raises(ValueError, match=f"decoder='{name}' cannot serve this request: it needs a CUDA GPU"):
            model.generate_many([[1]], decoder=name)
    batcher = model.generate_many([[1], [2], [99], [3]], 2, max_new_tokens=3)
    with pytest.raises(ValueError, match="prompts 2 to 3: input_ids: expected ids from 0 to 12"):
        list(batcher)
