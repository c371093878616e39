"""The decode kernel on a GPU: what it chooses is what the model's own scores say, and it repeats itself bit for bit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tlstm import LSTMConfig, LSTMForCausalLM
from tlstm.generation.gpu_model import choice_of
from tlstm.generation.inputs import resolve_config
from tlstm.generation.kernel_rows import KernelRows
from tlstm.generation.loop import DecodeLoop
from tlstm.generation.philox import seed_words, token_noise
from tlstm.generation.sampling import LogitsProcessor
from tlstm.generation.stopping import StopStrings

FILTERS = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
# By how much a choice may miss the best score: logits of both sides are rounded to the dtype, from states that are too.
CLOSE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2.5e-1}
NEW = 40


def make_model(widths=(200, 200), V=65, dtype=torch.float16, **settings) -> LSTMForCausalLM:
    torch.manual_seed(0)
    config = LSTMConfig(V, layer_sizes=list(widths), embedding_size=24, initializer_range=0.5, **settings)
    return LSTMForCausalLM(config).eval().to("cuda", dtype)


def prompts_of(B: int, V: int) -> list[list[int]]:
    return [[(7 * text + place) % V for place in range(1 + text % 5)] for text in range(B)]


def run(model, prompts, seeds=None, stop=None, chunk=64, max_steps=None, **settings):
    given = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None, **settings}
    config = resolve_config(None, model.generation_config, model.config, given)
    assert KernelRows.refusal(model, config) is None
    start = model.prefill(prompts)
    if config.do_sample:
        start = replace(start, seeds=tuple(seeds or [text + 2**63 for text in range(len(prompts))]))
    decoder = DecodeLoop(KernelRows(model, config, len(prompts), stop=stop, chunk=chunk), start, config)
    steps = 0
    while not decoder.finished and (max_steps is None or steps < max_steps):
        decoder.step()
        steps += 1
    return decoder, config, start


def check_choices(model, decoder, config, start) -> None:
    """Every token is the best by the scores of the model, run in float32 over the text, or as good as the best.

    Near a filter's edge rounding may keep a token or drop it: the token must be inside a somewhat wider filter, and as
    good as everything inside a narrower one.
    """
    device, weight = model.device, model.lm_head.weight
    exact = LSTMForCausalLM(model.config).to(device, torch.float32).eval()
    exact.load_state_dict(model.state_dict())
    close = CLOSE[weight.dtype] / (config.temperature if config.do_sample else 1)
    wide, narrow = config, config
    if choice_of(config).filters:
        wide = config.replace(top_k=config.top_k + 2, top_p=config.top_p + 0.06, min_p=0.7 * config.min_p)
        narrow = config.replace(top_k=config.top_k - 2, top_p=config.top_p - 0.06, min_p=1.4 * config.min_p)
    processes = [LogitsProcessor(one, device) for one in (wide, narrow)]
    for text, new in enumerate(decoder.new_tokens):
        ids = torch.tensor([*start.tokens[text].tolist(), *new], device=device)
        first = len(start.tokens[text])
        with torch.no_grad():
            logits = exact(ids[None, :-1]).logits[0]
        for step, token in enumerate(new):
            before = ids[: first + step]
            seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=device)
            seen[0, before] = True
            allowed, certain = (p(logits[first + step - 1][None], before[None], seen, step)[0] for p in processes)
            if config.do_sample:
                one = torch.zeros(1, dtype=torch.int64)
                noise = token_noise(seed_words([start.seeds[text]]), one + first + step, one, len(allowed))[0]
                allowed, certain = allowed + noise.to(device), certain + noise.to(device)
            assert allowed[token] >= certain.max() - close, f"text {text}, token {step}: {token}"


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("V", [65, 1000])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, FILTERS], ids=["greedy", "sampled", "filtered"])
def test_choices(dtype, B, V, settings):
    model = make_model(V=V, dtype=dtype, residual=True)
    check_choices(model, *run(model, prompts_of(B, V), **settings))


@pytest.mark.parametrize("widths", [(7,), (65, 33), (448, 448, 448), (1024, 1024), (1150, 1150, 400)], ids=str)
@pytest.mark.timeout(300)
def test_sizes(widths):
    model = make_model(widths, dtype=torch.bfloat16)
    check_choices(model, *run(model, prompts_of(2, 65), do_sample=True))


@pytest.mark.parametrize("V", [4097, 50_257])
@pytest.mark.parametrize("settings", [{"do_sample": True}, FILTERS], ids=["sampled", "filtered"])
@pytest.mark.timeout(300)
def test_a_large_vocabulary(V, settings):
    model = make_model(V=V, dtype=torch.float16)
    check_choices(model, *run(model, prompts_of(3, V), **settings))


@pytest.mark.parametrize("settings", [{"do_sample": True}, FILTERS], ids=["sampled", "filtered"])
def test_neither_the_batch_nor_the_launches_change_a_bit(settings):
    model, prompts = make_model(residual=True), prompts_of(64, 65)
    together, _, _ = run(model, prompts, eos_token_id=[3], **settings)
    again, _, _ = run(model, prompts, eos_token_id=[3], chunk=7, **settings)
    assert together.new_tokens == again.new_tokens
    assert together.finish_reasons == again.finish_reasons
    first, second = together.state().recurrent, again.state().recurrent
    assert all(torch.equal(a, b) for a, b in zip(first.h + first.c, second.h + second.c, strict=True))


def test_more_texts_than_fit_at_once():
    model, prompts = make_model((1024, 1024), dtype=torch.bfloat16), prompts_of(150, 65)
    decoder, config, start = run(model, prompts, do_sample=True, eos_token_id=[3, 4])
    assert all(len(new) == NEW or new[-1] in (3, 4) for new in decoder.new_tokens)
    check_choices(model, decoder, config, start)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_queue(batch_size):
    model, prompts = make_model(residual=True), prompts_of(150, 65)
    settings = {"max_new_tokens": NEW, "eos_token_id": [3], "pad_token_id": 0, "do_sample": True}
    batcher = model.generate_many(iter(prompts), batch_size, decoder="kernel", seed=7, **settings)
    texts = sorted(batcher, key=lambda text: text.prompt)
    assert batcher.decoder.name == "kernel"
    assert [text.prompt for text in texts] == list(range(150))
    assert all(len(text.new_tokens) == NEW or text.new_tokens[-1] == 3 for text in texts)
    config = resolve_config(None, model.generation_config, model.config, settings)
    start = replace(model.prefill(prompts), seeds=(7,) * 150)
    check_choices(model, SimpleNamespace(new_tokens=[text.new_tokens for text in texts]), config, start)
    batch, _, _ = run(model, prompts[:batch_size], seeds=[7] * batch_size, eos_token_id=[3], do_sample=True)
    expected = batch.state().recurrent  # in slots of the same plan: to the bit
    for row, text in enumerate(texts[:batch_size]):
        assert text.new_tokens == batch.new_tokens[row]
        found = text.state.recurrent
        pairs = zip(found.h + found.c, expected.h + expected.c, strict=True)
        assert all(torch.equal(mine[0], theirs[row]) for mine, theirs in pairs)


def test_the_state_in_the_middle_of_a_chunk_goes_on_to_the_same_tokens():
    model, prompts = make_model(), prompts_of(2, 65)
    whole, _, start = run(model, prompts, do_sample=True)
    part, config, _ = run(model, prompts, do_sample=True, max_steps=11)
    config = config.replace(max_new_tokens=NEW - 11)
    rest = DecodeLoop(KernelRows(model, config, 2), part.state(), config)
    while not rest.finished:
        rest.step()
    joined = [a + b for a, b in zip(part.new_tokens, rest.new_tokens, strict=True)]
    assert joined == whole.new_tokens
    assert start.seeds == rest.state().seeds


def test_stop_strings():
    class Letters:
        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

    model, prompts = make_model(), prompts_of(2, 65)
    whole, _, _ = run(model, prompts, do_sample=True)
    text = Letters().decode(whole.new_tokens[0])
    found, _, _ = run(model, prompts, do_sample=True, stop=StopStrings([text[9:12]], Letters()))
    assert found.finish_reasons[0] == "stop_string"
    assert found.new_tokens[0] == whole.new_tokens[0][: len(found.new_tokens[0])]
    assert len(found.new_tokens[0]) <= 12


@pytest.mark.timeout(60)
def test_nan_ends():
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].weight_hh_l0.view(torch.int16)[3, 5] = -1
    with pytest.raises(ValueError, match="not finite"):
        run(model, prompts_of(3, 65))
