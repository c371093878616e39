"""From logits to a token: penalties, filters and the draw, as pure functions on `(rows, V)` float32 logits.

Each row's result depends on that row alone. Forbidden tokens hold -inf. The filters follow the processors of
transformers (`generation/logits_process.py`) with one definite rule where logits tie: tokens tied with the last one
that a filter keeps are kept too (transformers does so in top-k and typical-p; its top-p drops some of them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tlstm.generation.config import GenerationConfig
from tlstm.generation.philox import GumbelNoise

# From this vocabulary on, noise is drawn only for the tokens that survive the filters, where those are few.
_LARGE_VOCABULARY = 4096


# ---- penalties: what the sequence so far forbids or disfavours -------------------------------------------------------


def repetition_penalty(
    logits: Tensor,  # (rows, V)
    seen: Tensor,  # (rows, V) bool: tokens of the row's sequence so far
    penalty: float,
) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by `penalty` (Keskar et al. 2019, CTRL)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def forbid_tokens(
    logits: Tensor,  # (rows, V)
    token_ids: Tensor,  # (n,) int64
) -> Tensor:
    """Forbid the same ids in every row: suppressed tokens, or end-of-sequence before the minimum length."""
    return logits.index_fill(-1, token_ids, -math.inf)


def forbid_repeated_ngrams(
    logits: Tensor,  # (rows, V)
    history: Tensor,  # (rows, N) int64, padded on the left with -1
    size: int,
) -> Tensor:
    """Forbid every token that would complete an n-gram of `size` tokens which the row's history already holds."""
    if history.shape[1] < size:
        return logits
    prefix = history[:, history.shape[1] + 1 - size :]  # (rows, size - 1)
    windows = history.unfold(1, size, 1)  # (rows, N - size + 1, size)
    # Padding comes first, so that a window whose first token is real is real altogether.
    repeats = (windows[..., :-1] == prefix[:, None]).all(-1) & (windows[..., 0] >= 0)
    return _forbid(logits, torch.where(repeats, windows[..., -1], logits.shape[-1]))


def forbid_bad_words(
    logits: Tensor,  # (rows, V)
    history: Tensor,  # (rows, N) int64, padded on the left with -1
    words: Sequence[Sequence[int]],
) -> Tensor:
    """Forbid every token that would complete one of the token sequences `words`."""
    last = torch.full((len(logits), len(words)), logits.shape[-1], device=logits.device)
    for column, word in enumerate(words):
        n = len(word) - 1
        if n <= history.shape[1]:
            start = torch.tensor(word[:-1], device=history.device, dtype=history.dtype)
            matches = (history[:, history.shape[1] - n :] == start).all(-1)
            last[:, column] = torch.where(matches, word[-1], logits.shape[-1])
    return _forbid(logits, last)


def _forbid(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Forbid each row's own `token_ids` `(rows, n)`; the id `V` stands for none."""
    forbidden = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    forbidden.scatter_(1, token_ids, True)
    return logits.masked_fill(forbidden[:, :-1], -math.inf)


# ---- filters: which part of the distribution stays -------------------------------------------------------------------


def top_k_filter(
    logits: Tensor,  # (rows, V)
    k: int,
) -> Tensor:
    """Keep the `k` most likely tokens and those tied with the last of them."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -math.inf)


def top_p_filter(
    logits: Tensor,  # (rows, V)
    p: float,
) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches `p`, and ties (Holtzman et al. 2020)."""
    ascending = logits.sort().values
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    first_kept = tail.sum(-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)
    return logits.masked_fill(logits < ascending.gather(-1, first_kept), -math.inf)


def min_p_filter(
    logits: Tensor,  # (rows, V)
    p: float,
) -> Tensor:
    """Keep tokens whose probability is at least `p` times the largest one (Nguyen et al. 2024)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def typical_p_filter(
    logits: Tensor,  # (rows, V)
    p: float,
) -> Tensor:
    """Keep the tokens whose information content is nearest the entropy, up to probability `p` (Meister et al. 2022)."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    entropy = -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1, keepdim=True)
    distance = (-log_probs - entropy).abs()
    nearest, order = distance.sort(-1)
    last_kept = (probs.gather(-1, order).cumsum(-1) < p).sum(-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > nearest.gather(-1, last_kept), -math.inf)


# ---- the draw --------------------------------------------------------------------------------------------------------


def greedy(
    logits: Tensor,  # (rows, V)
) -> Tensor:  # (rows,) int64
    """The most likely token of each row, the lowest id among equals. `ValueError` where a row has none."""
    best, tokens = logits.max(dim=-1)
    check_some_token(best)
    return tokens


def draw(
    logits: Tensor,  # (rows, V)
    noise: GumbelNoise,
) -> Tensor:  # (rows,) int64
    """One token per row from `softmax(logits)`: the largest `logits + noise` (Gumbel-max; Maddison et al. 2014).

    The lowest id wins among equals. `ValueError` where a row allows no token.
    """
    vocab_size = noise.vocab_size
    if vocab_size >= _LARGE_VOCABULARY:
        survivors = int((logits > -math.inf).sum(-1).max())
        if 0 < survivors <= vocab_size // 16:
            ids = logits.topk(survivors).indices.sort(-1).values
            best, place = (logits.gather(-1, ids) + noise.next_of(ids)).max(dim=-1)
            check_some_token(best)
            return ids.gather(-1, place[:, None])[:, 0]
    best, tokens = (logits + noise.next()).max(dim=-1)
    check_some_token(best)
    return tokens


def check_some_token(
    best: Tensor,  # (rows,)
) -> None:
    """Raise `ValueError` unless each row's largest score is finite: -inf means all forbidden, NaN a damaged logit."""
    values = best.tolist()
    for value in values:
        if not -math.inf < value < math.inf:
            break
    else:
        return
    row = next(i for i, value in enumerate(values) if not math.isfinite(value))
    if values[row] == -math.inf:
        raise ValueError(
            f"row {row}: every token is forbidden, none is left to choose; relax suppress_tokens, bad_words_ids, "
            "no_repeat_ngram_size or min_new_tokens"
        )
    raise ValueError(
        f"row {row}: the model's logits are not finite (largest: {values[row]}); its weights or its state overflowed "
        "or were damaged: check them with torch.isfinite, or use a wider dtype than float16"
    )


# ---- all of it, as a config asks -------------------------------------------------------------------------------------


class LogitsProcessor:
    """The penalties and filters that a `GenerationConfig` asks for, in the order that its documentation states."""

    def __init__(self, config: GenerationConfig, device: torch.device | str = "cpu") -> None:
        self._config = config
        self._eos = torch.tensor(config.eos_ids, dtype=torch.int64, device=device)
        self._suppressed = torch.tensor(config.suppress_tokens or [], dtype=torch.int64, device=device)
        self.needs_seen = config.repetition_penalty != 1.0
        self.needs_history = config.no_repeat_ngram_size > 0 or bool(config.bad_words_ids)
        self.needs_count = config.min_new_tokens > 0 and bool(config.eos_ids)
        self._penalises = self.needs_seen or self.needs_history or self.needs_count or bool(config.suppress_tokens)
        self._filters = _filters(config)

    def __call__(
        self,
        logits: Tensor,  # (rows, V) float32
        history: Tensor | None,  # (rows, N) int64, padded on the left with -1, where `needs_history`
        seen: Tensor | None,  # (rows, V) bool, where `needs_seen`
        new_tokens: int | Sequence[int],
    ) -> Tensor:
        """Process one step's logits; `new_tokens` is how many were made so far, in every row or in each."""
        if self._penalises:
            logits = self._penalise(logits, history, seen, new_tokens)
        for keep in self._filters:
            logits = keep(logits)
        return logits

    def _penalise(
        self, logits: Tensor, history: Tensor | None, seen: Tensor | None, new_tokens: int | Sequence[int]
    ) -> Tensor:
        config = self._config
        if self.needs_seen:
            assert seen is not None
            logits = repetition_penalty(logits, seen, config.repetition_penalty)
        if self.needs_history:
            assert history is not None
            if config.no_repeat_ngram_size:
                logits = forbid_repeated_ngrams(logits, history, config.no_repeat_ngram_size)
            if config.bad_words_ids:
                logits = forbid_bad_words(logits, history, config.bad_words_ids)
        if self.needs_count:
            logits = self._forbid_early_end(logits, new_tokens)
        if len(self._suppressed):
            logits = forbid_tokens(logits, self._suppressed)
        return logits

    def _forbid_early_end(self, logits: Tensor, new_tokens: int | Sequence[int]) -> Tensor:
        counts = [new_tokens] if isinstance(new_tokens, int) else new_tokens
        young = [count < self._config.min_new_tokens for count in counts]
        if not any(young):
            return logits
        forbidden = forbid_tokens(logits, self._eos)
        return torch.where(torch.tensor(young, device=logits.device)[:, None], forbidden, logits)


def _filters(config: GenerationConfig) -> list[Callable[[Tensor], Tensor]]:
    """What of temperature and filters is on, as functions of the logits."""
    if not config.do_sample:
        return []
    filters: list[Callable[[Tensor], Tensor]] = []
    if config.temperature != 1.0:
        # A tensor: torch makes one of a number anew at every call, at twice the cost of the division.
        temperature = torch.tensor(config.temperature, dtype=torch.float32)
        filters.append(lambda logits: logits / temperature)
    if config.top_k:
        filters.append(partial(top_k_filter, k=config.top_k))
    if config.top_p is not None and config.top_p < 1:
        filters.append(partial(top_p_filter, p=config.top_p))
    if config.min_p:
        filters.append(partial(min_p_filter, p=config.min_p))
    if config.typical_p is not None and config.typical_p < 1:
        filters.append(partial(typical_p_filter, p=config.typical_p))
    return filters
