"""`generate` against a loop that reads the whole text anew for every token, and alone against in batches."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from tlstm import GenerateOutput, GenerationConfig, LSTMForCausalLM
from tlstm.generation.philox import seed_words, token_noise

transformers = pytest.importorskip("transformers")

SAMPLING = {"do_sample": True, "seed": 2**63 + 5, "temperature": 1.2, "top_k": 9, "top_p": 0.95}


@torch.no_grad()
def continue_naively(
    model: LSTMForCausalLM, prompt: list[int], count: int, processors=(), seed: int | None = None, index: int = 0
) -> list[int]:
    """No state, no batch: the whole text is read again for every token; processors are those of transformers."""
    text = list(prompt)
    for _ in range(count):
        ids = torch.tensor([text])
        scores = transformers.LogitsProcessorList(processors)(ids, model(ids).logits[:, -1].float())
        if seed is not None:
            place = (torch.tensor([len(text)]), torch.tensor([index]))
            scores = scores + token_noise(seed_words([seed]), *place, model.config.vocab_size)
        text.append(int(scores.argmax()))
    return text[len(prompt) :]


def run(model, *args, **settings) -> GenerateOutput:
    return model.generate(*args, return_dict_in_generate=True, **settings)


# ---- the tokens ------------------------------------------------------------------------------------------------------


def test_greedy_is_the_most_likely_token_each_time(model, prompts) -> None:
    for prompt in prompts:
        out = model.generate([prompt], max_new_tokens=21)
        assert out.dtype == torch.int64
        assert out.tolist() == [prompt + continue_naively(model, prompt, 21)]
    assert len(set(out[0, len(prompt) :].tolist())) > 3  # not one token for ever


def test_every_setting_together_is_what_transformers_processors_give(model, prompts) -> None:
    settings = {
        "do_sample": True,
        "temperature": 1.5,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[4], [2, 5]],
        "suppress_tokens": [11],
        "top_k": 9,
        "top_p": 0.98,
        "min_p": 0.001,
        "typical_p": 0.97,
    }
    chain = [
        transformers.RepetitionPenaltyLogitsProcessor(1.2),
        transformers.NoRepeatNGramLogitsProcessor(3),
        transformers.NoBadWordsLogitsProcessor([[4], [2, 5]]),
        transformers.SuppressTokensLogitsProcessor([11]),
        transformers.TemperatureLogitsWarper(1.5),
        transformers.TopKLogitsWarper(9),
        transformers.TopPLogitsWarper(0.98),
        transformers.MinPLogitsWarper(0.001),
        transformers.TypicalLogitsWarper(0.97),
    ]
    out = run(model, prompts, max_new_tokens=25, seed=99, **settings)
    for prompt, new in zip(prompts, out.new_tokens, strict=True):
        assert new == continue_naively(model, prompt, 25, chain, seed=99)
        assert 4 not in new
        assert 11 not in new
        triples = list(zip(*[(prompt + new)[i:] for i in range(3)], strict=False))
        made = triples[max(0, len(prompt) - 2) :]
        assert len(set(made)) == len(made)
        assert (2, 5) not in set(itertools.pairwise(new))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, SAMPLING, {**SAMPLING, "repetition_penalty": 1.3}], ids=["greedy", "", "pen"])
def test_unequal_prompts_in_one_batch_are_what_each_is_alone(build_model, prompts, dtype, settings) -> None:
    model = build_model(dtype=dtype, vocab_size=13, layer_sizes=[7, 11])
    alone = [run(model, [prompt], max_new_tokens=33, **settings).new_tokens[0] for prompt in prompts]
    assert len(set(map(tuple, alone))) > 1
    assert run(model, prompts, max_new_tokens=33, **settings).new_tokens == alone

    width = max(map(len, prompts))
    for side in ("left", "right"):
        ids = torch.full((len(prompts), width), 12)
        mask = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
            ids[row, place], mask[row, place] = torch.tensor(prompt), 1
        out = run(model, ids, mask, max_new_tokens=33, **settings)
        assert out.new_tokens == alone
        assert torch.equal(out.sequences[:, :width], ids)
        assert out.sequences[:, width:].tolist() == alone


def test_same_seed_same_text_whatever_the_batch_and_its_order(model, prompts) -> None:
    seeds = [5, 6, 7, 8, 2**64 - 1]
    alone = [
        run(model, [prompt], do_sample=True, seed=seed, max_new_tokens=19).new_tokens[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert run(model, prompts, do_sample=True, seed=seeds, max_new_tokens=19).new_tokens == alone
    backwards = run(model, prompts[::-1], do_sample=True, seed=seeds[::-1], max_new_tokens=19).new_tokens
    assert backwards[::-1] == alone
    assert alone[0] == continue_naively(model, prompts[0], 19, seed=5)
    assert alone[0] != run(model, prompts[:1], do_sample=True, seed=6, max_new_tokens=19).new_tokens[0]


def test_rows_that_end_early_leave_the_others_as_they_were(model, prompts) -> None:
    alone = [run(model, [prompt], max_new_tokens=29, eos_token_id=[5, 7], **SAMPLING) for prompt in prompts]
    out = run(model, prompts, max_new_tokens=29, eos_token_id=[5, 7], pad_token_id=12, **SAMPLING)
    assert out.new_tokens == [single.new_tokens[0] for single in alone]
    assert out.finish_reasons == [single.finish_reasons[0] for single in alone]
    lengths = list(map(len, out.new_tokens))
    assert len(set(lengths)) > 2, "the case needs rows that end at different steps"
    for new, reason, row in zip(out.new_tokens, out.finish_reasons, out.sequences.tolist(), strict=True):
        assert (reason == "eos") == (new[-1] in (5, 7))
        assert not {5, 7} & set(new[:-1])
        assert row[13 : 13 + len(new)] == new
        assert set(row[13 + len(new) :]) <= {12}
    assert out.timings.decode_tokens == sum(lengths)
    assert out.timings.prefill_tokens == sum(len(prompt) - 1 for prompt in prompts)


def test_several_continuations_of_one_prompt(model, prompts) -> None:
    out = run(model, prompts[:2], num_return_sequences=3, do_sample=True, seed=4, max_new_tokens=15)
    assert len(out.new_tokens) == 6
    assert len(set(map(tuple, out.new_tokens))) == 6
    for row, new in enumerate(out.new_tokens):
        prompt = prompts[row // 3]
        assert new == continue_naively(model, prompt, 15, seed=4, index=row % 3)
    assert out.sequences.shape == (6, 7 + 15)
    assert out.state.return_index == (0, 1, 2, 0, 1, 2)
    assert out.timings.prefill_tokens == len(prompts[0]) - 1  # each prompt is read once


def test_without_a_seed_torch_manual_seed_decides(model) -> None:
    def text() -> list[int]:
        return model.generate([[1, 2]], do_sample=True, max_new_tokens=20)[0].tolist()

    torch.manual_seed(3)
    first, second = text(), text()
    torch.manual_seed(3)
    assert text() == first != second
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.generate([[1, 2]], max_new_tokens=2)
    model.generate([[1, 2]], do_sample=True, seed=1, max_new_tokens=2)
    assert torch.equal(before, torch.get_rng_state())  # drawn from only where seeds are needed


# ---- when a text ends ------------------------------------------------------------------------------------------------


def test_min_new_tokens_forbids_the_end_until_then(model, prompts) -> None:
    free = run(model, prompts, max_new_tokens=20, eos_token_id=[5, 7], pad_token_id=0, **SAMPLING)
    held = run(model, prompts, max_new_tokens=20, min_new_tokens=9, eos_token_id=[5, 7], pad_token_id=0, **SAMPLING)
    assert min(map(len, free.new_tokens)) < 9
    for prompt, new in zip(prompts, held.new_tokens, strict=True):
        assert len(new) > 9
        assert not {5, 7} & set(new[:9])
        processor = transformers.MinNewTokensLengthLogitsProcessor(len(prompt), 9, [5, 7])
        chain = [
            processor,
            transformers.TemperatureLogitsWarper(1.2),
            transformers.TopKLogitsWarper(9),
            transformers.TopPLogitsWarper(0.95),
        ]
        assert new == continue_naively(model, prompt, len(new), chain, seed=SAMPLING["seed"])


def test_max_length_counts_each_texts_own_prompt(model, prompts) -> None:
    out = run(model, prompts, max_length=15, pad_token_id=0)
    assert [len(new) for new in out.new_tokens] == [15 - len(prompt) for prompt in prompts]
    assert set(out.finish_reasons) == {"length"}
    both = run(model, prompts, max_length=15, max_new_tokens=6, pad_token_id=0)
    assert [len(new) for new in both.new_tokens] == [min(6, 15 - len(prompt)) for prompt in prompts]
    with pytest.raises(ValueError, match=r"max_length=13 leaves no room: text 2 has 13 tokens.*max_new_tokens"):
        model.generate(prompts, max_length=13)
    assert model.generate([[1]]).shape == (1, 1 + 256)


def test_max_time_ends_every_text_after_at_least_one_token(model, prompts) -> None:
    out = run(model, prompts, max_time=1e-9, max_new_tokens=1000)
    assert [len(new) for new in out.new_tokens] == [1] * 5
    assert set(out.finish_reasons) == {"time"}
    started = time.perf_counter()
    out = run(model, [[1]], max_time=0.05, max_new_tokens=10**9)
    assert out.finish_reasons == ["time"]
    assert time.perf_counter() - started >= 0.05
    assert len(out.new_tokens[0]) >= 1


def test_the_models_own_end_token_is_used_unless_switched_off(build_model) -> None:
    model = build_model(eos_token_id=7, bos_token_id=3, pad_token_id=0)
    assert run(model, [[1, 2]], max_new_tokens=200, **SAMPLING).finish_reasons == ["eos"]
    endless = run(model, [[1, 2]], max_new_tokens=200, eos_token_id=[], **SAMPLING)
    assert endless.finish_reasons == ["length"]
    assert 7 in endless.new_tokens[0]


def test_empty_prompts_begin_with_bos(build_model) -> None:
    model = build_model(bos_token_id=3)
    expected = [3, *continue_naively(model, [3], 9)]
    for empty in (None, [], [[]], torch.zeros(1, 0, dtype=torch.int64)):
        assert model.generate(empty, max_new_tokens=9).tolist() == [expected]
    mixed = run(model, [[], [1, 2]], max_new_tokens=9)
    assert mixed.sequences[0].tolist() == [0, *expected]
    ids, mask = torch.tensor([[0, 0], [1, 2]]), torch.tensor([[0, 0], [1, 1]])
    assert run(model, ids, mask, max_new_tokens=9).new_tokens == mixed.new_tokens


# ---- forms of input and output ---------------------------------------------------------------------------------------


def test_forms_of_one_prompt(model) -> None:
    expected = model.generate([[1, 2, 3]], max_new_tokens=5)
    mask = torch.ones(1, 3, dtype=torch.bool)
    forms = [
        [1, 2, 3],
        torch.tensor([1, 2, 3]),
        torch.tensor([[1, 2, 3]], dtype=torch.int32),
        [torch.tensor([1, 2, 3])],
    ]
    for ids in [*forms, torch.tensor([[1, 2, 3]]).numpy()]:
        assert torch.equal(model.generate(ids, max_new_tokens=5), expected)
    assert torch.equal(model.generate(torch.tensor([[1, 2, 3]]), mask, max_new_tokens=5), expected)
    config = GenerationConfig(max_new_tokens=5)
    assert torch.equal(model.generate([1, 2, 3], generation_config=config), expected)
    assert torch.equal(model.generate([1, 2, 3], None, config.replace(max_new_tokens=9), max_new_tokens=5), expected)


def test_scores_are_the_processed_logits_of_each_step(model, prompts) -> None:
    settings = {"max_new_tokens": 12, "eos_token_id": [5, 7], "pad_token_id": 0, **SAMPLING}
    out = run(model, prompts, output_scores=True, output_logits=True, **settings)
    assert len(out.scores) == len(out.logits) == max(map(len, out.new_tokens))
    for row, (prompt, new) in enumerate(zip(prompts, out.new_tokens, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].float()
        got = torch.stack([step[row] for step in out.logits])
        torch.testing.assert_close(got[: len(new)], logits, rtol=1e-5, atol=1e-5)
        assert (got[len(new) :] == -torch.inf).all()
        for step, scores in enumerate(out.scores[: len(new)]):
            assert scores.shape == (5, 13)
            assert torch.isfinite(scores[row]).sum() <= 9
            assert torch.isfinite(scores[row, new[step]])
            kept = torch.isfinite(scores[row])
            torch.testing.assert_close(scores[row][kept], out.logits[step][row][kept] / 1.2)


def test_rows_of_unequal_length_are_filled(model, prompts) -> None:
    settings = {"max_length": 15}
    assert model.generate(prompts, eos_token_id=[5], min_new_tokens=14, **settings)[2, 13 + 2 :].tolist() == [5] * 12
    with pytest.warns(UserWarning, match="no pad_token_id"):
        out = model.generate(prompts, **settings)
    assert out[2, 13 + 2 :].tolist() == [0] * 12


def test_dropout_is_off_while_generating_and_restored_after(build_model) -> None:
    model = build_model(hidden_dropout=0.9, output_dropout=0.9, embedding_dropout=0.5, weight_dropout=0.5)
    expected = model.generate([[1, 2, 3]], max_new_tokens=9)
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.generate([[1, 2, 3]], max_new_tokens=9), expected)
    assert list(model.generate_stream([[1, 2, 3]], max_new_tokens=9)) == expected[0, 3:].tolist()
    with pytest.raises(ValueError, match="ids from 0 to 12"):
        model.generate([[13]])
    assert [module.training for module in model.modules()] == modes


def test_results_are_ordinary_tensors_that_autograd_accepts(model) -> None:
    out = run(model, [[1, 2, 3], [4]], max_new_tokens=4)
    for state in (out.state, model.prefill([[1, 2, 3], [4]])):
        loss = model(torch.tensor([[1, 2], [3, 4]]), labels=torch.tensor([[1, 2], [3, 4]]), state=state.recurrent).loss
        loss.backward()
        model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_generate(build_model, dtype) -> None:
    out = run(build_model(dtype=dtype), [[1, 2, 3], [4]], max_new_tokens=9, output_scores=True, **SAMPLING)
    assert out.scores[0].dtype == torch.float32
    assert list(map(len, out.new_tokens)) == [9, 9]


def test_long_prompts_are_read_in_bounded_pieces(model, monkeypatch) -> None:
    texts = [torch.arange(101).remainder(13).tolist(), [1, 2, 3], torch.arange(50).remainder(11).tolist()]
    expected = run(model, texts, max_new_tokens=9).new_tokens
    monkeypatch.setattr("tlstm.generation.prefill._PREFILL_TOKENS", 24)
    assert run(model, texts, max_new_tokens=9).new_tokens == expected
