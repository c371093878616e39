"""Penalties and filters against transformers' own, and drawn tokens against independently computed distributions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from tlstm import GenerationConfig
from tlstm.generation.history import TokenHistory
from tlstm.generation.philox import GumbelNoise
from tlstm.generation.sampling import (
    LogitsProcessor,
    draw,
    forbid_bad_words,
    forbid_repeated_ngrams,
    forbid_tokens,
    greedy,
    min_p_filter,
    repetition_penalty,
    top_k_filter,
    top_p_filter,
    typical_p_filter,
)

transformers = pytest.importorskip("transformers")

V = 65


def random_logits(rows: int = 7, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale


def random_history(rows: int = 7, length: int = 41, seed: int = 1, vocab_size: int = V) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 64, 65, 1000])
def test_top_k_is_that_of_transformers(k) -> None:
    logits = random_logits().round(decimals=1)  # with ties
    assert torch.equal(top_k_filter(logits, k), transformers.TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_top_p_is_that_of_transformers(p, scale) -> None:
    logits = random_logits(scale=scale)
    assert torch.equal(top_p_filter(logits, p), transformers.TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_is_that_of_transformers(p) -> None:
    logits = random_logits()
    assert torch.equal(min_p_filter(logits, p), transformers.MinPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.05, 0.2, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_typical_p_is_that_of_transformers(p, scale) -> None:
    logits = random_logits(scale=scale)
    assert torch.equal(typical_p_filter(logits, p), transformers.TypicalLogitsWarper(p)(None, logits))
    filtered = top_k_filter(logits, 9)  # with -inf among its input
    assert torch.equal(typical_p_filter(filtered, p), transformers.TypicalLogitsWarper(p)(None, filtered))


@pytest.mark.parametrize("penalty", [0.7, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(penalty) -> None:
    logits, history = random_logits(), random_history()
    seen = TokenHistory(list(history), vocab_size=V).seen
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
    assert torch.equal(repetition_penalty(logits, seen, penalty), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_repeated_ngrams_are_those_of_transformers(size) -> None:
    logits, history = random_logits(), random_history(vocab_size=3)
    expected = transformers.NoRepeatNGramLogitsProcessor(size)(history, logits)
    assert torch.equal(forbid_repeated_ngrams(logits, history, size), expected)
    assert (expected == -math.inf).any()  # the case is not empty


def test_repeated_ngrams_look_at_each_text_alone() -> None:
    texts = [torch.tensor(ids) for ids in ([1, 2, 3, 1, 2], [5], [1, 2], [4, 4, 4], [0, 1, 2, 0])]
    history, logits = TokenHistory(texts), torch.zeros(5, 9)
    for size in (1, 2, 3, 4):
        got = forbid_repeated_ngrams(logits, history.tokens(), size)
        for row, text in enumerate(texts):
            alone = transformers.NoRepeatNGramLogitsProcessor(size)(text[None], logits[:1])
            assert torch.equal(got[row], alone[0]), (size, row)


def test_bad_words_are_those_of_transformers() -> None:
    logits, history = random_logits(), random_history(vocab_size=4)
    words = [[3], [0, 17], [1, 2, 18], [2, 19], [3, 19], [1, 1, 1, 1, 1, 20], [2] * 50 + [21]]
    expected = transformers.NoBadWordsLogitsProcessor(words)(history, logits)
    assert torch.equal(forbid_bad_words(logits, history, words), expected)
    short = TokenHistory([torch.tensor([0]), torch.tensor([5, 1, 2])]).tokens()
    got = forbid_bad_words(torch.zeros(2, V), short, words)
    assert [row.isinf().nonzero()[:, 0].tolist() for row in got] == [[3, 17], [3, 18, 19]]


def test_suppressed_tokens_are_those_of_transformers() -> None:
    logits = random_logits()
    expected = transformers.SuppressTokensLogitsProcessor([0, 7, 64])(None, logits)
    assert torch.equal(forbid_tokens(logits, torch.tensor([0, 7, 64])), expected)


def test_all_together_are_in_the_order_of_transformers() -> None:
    settings = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[3], [1, 9]],
        "suppress_tokens": [11, 12],
        "temperature": 0.7,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.9,
    }
    logits, history = random_logits(), random_history(vocab_size=9)
    eos = [20 + int(logits[0, 20:].argmax()), 64]  # of which the first is likely
    chain = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.3),
            transformers.NoRepeatNGramLogitsProcessor(2),
            transformers.NoBadWordsLogitsProcessor([[3], [1, 9]]),
            transformers.MinNewTokensLengthLogitsProcessor(41, 5, eos),
            transformers.SuppressTokensLogitsProcessor([11, 12]),
            transformers.TemperatureLogitsWarper(0.7),
            transformers.TopKLogitsWarper(30),
            transformers.TopPLogitsWarper(0.95),
            transformers.MinPLogitsWarper(0.01),
            transformers.TypicalLogitsWarper(0.9),
        ]
    )
    config = GenerationConfig(do_sample=True, min_new_tokens=5, eos_token_id=eos, **settings)
    texts = TokenHistory(list(history), vocab_size=V)
    for new_tokens in (0, 4):
        got = LogitsProcessor(config)(logits, texts.tokens(), texts.seen, new_tokens)
        assert torch.equal(got, chain(history, logits.clone()))
    freed = LogitsProcessor(config)(logits, texts.tokens(), texts.seen, 5)
    assert not torch.equal(freed, got)  # the minimum is reached: end-of-sequence is allowed again


# ---- each row alone, and limits --------------------------------------------------------------------------------------


def test_ties_with_the_last_kept_token_are_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, -1.0]])
    assert top_k_filter(logits, 2).isfinite().tolist() == [[False, True, True, True, True, False]]
    assert top_p_filter(logits, 0.6).isfinite().tolist() == [[False, True, True, True, True, False]]
    assert greedy(torch.tensor([[0.0, 2.0, 2.0]])).tolist() == [1]  # the lowest id among equals


@pytest.mark.parametrize(
    "function",
    [
        lambda x: top_k_filter(x, 5),
        lambda x: top_p_filter(x, 0.7),
        lambda x: min_p_filter(x, 0.1),
        lambda x: typical_p_filter(x, 0.6),
    ],
)
def test_a_row_does_not_depend_on_the_others(function) -> None:
    logits = random_logits(rows=9)
    assert torch.equal(function(logits), torch.cat([function(row[None]) for row in logits]))


@pytest.mark.parametrize("function", [greedy, lambda x: draw(x, GumbelNoise([1, 2], [0, 0], [1, 1], x.shape[1]))])
@pytest.mark.parametrize("vocab_size", [7, 5000])
def test_a_row_without_a_token_is_an_error(function, vocab_size) -> None:
    logits = torch.zeros(2, vocab_size)
    logits[1] = -math.inf
    with pytest.raises(ValueError, match=r"row 1: every token is forbidden.*relax"):
        function(logits)
    logits[1, 3] = math.nan
    with pytest.raises(ValueError, match="row 1: the model's logits are not finite"):
        function(logits)


def test_filters_leave_a_fully_forbidden_row_without_nan() -> None:
    logits = torch.full((1, V), -math.inf)
    for filtered in (
        top_k_filter(logits, 3),
        top_p_filter(logits, 0.5),
        min_p_filter(logits, 0.5),
        typical_p_filter(logits, 0.5),
    ):
        assert (filtered == -math.inf).all()


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def reference_distribution(logits: np.ndarray, config: GenerationConfig) -> np.ndarray:
    """Temperature, top-k, top-p, min-p and typical-p from their definitions, by sets of tokens, in float64."""
    x = logits.astype(np.float64) / config.temperature
    alive = set(range(len(x)))

    def probabilities() -> np.ndarray:
        weights = np.array([math.exp(x[v] - x.max()) if v in alive else 0.0 for v in range(len(x))])
        return weights / weights.sum()

    if config.top_k:
        alive = set(sorted(alive, key=lambda v: -x[v])[: config.top_k])
    if config.top_p:
        p, kept = probabilities(), []
        for v in sorted(alive, key=lambda v: -p[v]):
            kept.append(v)
            if sum(p[u] for u in kept) >= config.top_p:
                break
        alive = set(kept)
    if config.min_p:
        p = probabilities()
        alive = {v for v in alive if p[v] >= config.min_p * p.max()}
    if config.typical_p:
        p, kept = probabilities(), []
        entropy = -sum(p[v] * math.log(p[v]) for v in alive)
        for v in sorted(alive, key=lambda v: abs(-math.log(p[v]) - entropy)):
            kept.append(v)
            if sum(p[u] for u in kept) >= config.typical_p:
                break
        alive = set(kept)
    return probabilities()


def check_counts(tokens: torch.Tensor, expected: np.ndarray) -> None:
    """Chi-square test of drawn tokens; rare ones (fewer than 5 expected) are counted together."""
    observed = np.bincount(tokens.numpy(), minlength=len(expected)).astype(float)
    assert observed[expected == 0].sum() == 0, "a token was drawn that the filters forbid"
    counts = expected * len(tokens)
    rare = counts < 5
    observed, counts = np.append(observed[~rare], observed[rare].sum()), np.append(counts[~rare], counts[rare].sum())
    observed, counts = observed[counts > 0], counts[counts > 0]
    if len(counts) > 1:
        assert stats.chisquare(observed, counts * observed.sum() / counts.sum()).pvalue > 1e-3


DRAWS = 100_000


class _Drawn:
    """Noise that was drawn once, for every setting: half of it over positions, half over seeds."""

    vocab_size = V

    def __init__(self) -> None:
        half = DRAWS // 2
        by_position = GumbelNoise([11] * half, [0] * half, list(range(half)), V)
        by_seed = GumbelNoise(list(range(half)), [1] * half, [77] * half, V)
        self._noise = torch.cat([by_position.next(), by_seed.next()])

    def next(self) -> torch.Tensor:
        return self._noise


@pytest.fixture(scope="module")
def drawn() -> _Drawn:
    return _Drawn()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"typical_p": 0.7},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
    ],
    ids=str,
)
def test_drawn_tokens_follow_the_reference_distribution(settings, drawn) -> None:
    config = GenerationConfig(do_sample=True, **settings)
    logits = random_logits(rows=1, seed=3, scale=1.5)
    expected = reference_distribution(logits[0].numpy(), config)
    filtered = LogitsProcessor(config)(logits, None, None, 0)
    check_counts(draw(filtered.expand(DRAWS, V), drawn), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.6},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3], [4, 9], [5, 8]]},
        {"suppress_tokens": [0, 7, 64]},
        {"min_new_tokens": 2, "eos_token_id": [20, 21]},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [9], "temperature": 1.3, "top_k": 30},
    ],
    ids=str,
)
def test_drawn_tokens_follow_the_penalties(settings, drawn) -> None:
    """Against the definitions, token by token, for a text that has one new token."""
    config = GenerationConfig(do_sample=True, **settings)
    logits = random_logits(rows=1, seed=3, scale=1.5)
    text = [4, 8, 4, 11, 5, 30, 12, 30, 4]
    penalised = logits[0].double().numpy()
    for token in range(V):
        if token in text:
            penalty = config.repetition_penalty
            penalised[token] *= penalty if penalised[token] < 0 else 1 / penalty
        longer = [*text, token]
        pairs = list(itertools.pairwise(longer))
        repeats = config.no_repeat_ngram_size == 2 and pairs[-1] in pairs[:-1]
        bad = any(longer[-len(word) :] == word for word in config.bad_words_ids or [])
        early = config.min_new_tokens > 1 and token in config.eos_ids
        if repeats or bad or early or token in (config.suppress_tokens or []):
            penalised[token] = -np.inf
    expected = reference_distribution(penalised, config)
    history = TokenHistory([torch.tensor(text)], vocab_size=V)
    filtered = LogitsProcessor(config)(logits, history.tokens(), history.seen, 1)
    check_counts(draw(filtered.expand(DRAWS, V), drawn), expected)


def test_large_vocabularies_draw_the_same_tokens_from_few_survivors() -> None:
    vocab_size = 5003
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(5)) * 2
    filtered = top_k_filter(logits, 40)
    direct = GumbelNoise(range(6), [0] * 6, [9] * 6, vocab_size)
    few = GumbelNoise(range(6), [0] * 6, [9] * 6, vocab_size)
    for _ in range(20):
        assert torch.equal(draw(filtered, few), (filtered + direct.next()).argmax(-1))


def test_generate_samples_the_models_distribution(model) -> None:
    rows, prompt = 6000, [1, 2, 3]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    settings = {"temperature": 1.3, "top_k": 9, "top_p": 0.95, "min_p": 0.02}
    expected = reference_distribution(logits.numpy(), GenerationConfig(do_sample=True, **settings))
    out = model.generate(
        torch.tensor([prompt] * rows), do_sample=True, seed=list(range(rows)), max_new_tokens=1, **settings
    )
    check_counts(out[:, -1], expected)
