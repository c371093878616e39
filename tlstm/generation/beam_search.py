"""Beam search over a recurrent model: hypotheses carry their own state, reordered with them at every step.

Meaning of `length_penalty`, `early_stopping`, end-of-sequence and returned sequences as in transformers
(`GenerationMixin._beam_search`): each step ranks `max(2, 1 + number of eos ids) * num_beams` candidates; complete ones
among the first `num_beams` become hypotheses, the best incomplete ones go on. Penalties act on log-probabilities.
Unlike there, a prompt is searched on its own terms: the rest of the batch neither ends nor prolongs its search, and
slots that hold no hypothesis (a vocabulary smaller than the beam) never count as one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tlstm.generation.config import GenerationConfig
from tlstm.generation.history import TokenHistory
from tlstm.generation.model_step import model_step
from tlstm.generation.prefill import LanguageModel
from tlstm.generation.sampling import LogitsProcessor, check_some_token
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import StopStrings
from tlstm.generation.texts import FinishReason, new_token_limits
from tlstm.state import LSTMState

_DEAD = -torch.inf  # score of a beam that has no continuation


@dataclass
class BeamResult:
    """The best sequences, `R = B * num_return_sequences`, those of one prompt together, best first.

    Fields:
        new_tokens: generated ids of each. finish_reasons: why each ended.
        scores: `(R,)` float32, sum of log-probabilities / length ** length_penalty.
        state: where each text stands. seconds: time that the search took.
    """

    new_tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    scores: Tensor
    state: GenerationState
    seconds: float


@dataclass
class _Hypothesis:
    score: float
    text: Tensor  # (N,) int64: the whole text
    new: int  # how many of its tokens are new
    reason: FinishReason
    recurrent: LSTMState  # its row holds the state before the last token
    row: int


class _Search:
    """The search for one prompt: its complete hypotheses, and when it is over."""

    def __init__(self, config: GenerationConfig, limit: int) -> None:
        self._config, self.limit = config, limit
        self.hypotheses: list[_Hypothesis] = []  # best first

    @property
    def full(self) -> bool:
        return len(self.hypotheses) == self._config.num_beams

    def add(self, found: list[_Hypothesis]) -> None:
        """Keep the best `num_beams` of the known and the found; the known ones come first among equals."""
        ranked = sorted(self.hypotheses + found, key=lambda hypothesis: -hypothesis.score)
        self.hypotheses = ranked[: self._config.num_beams]

    def over(self, best_running: float, length: int) -> bool:
        """Whether to end, when the best incomplete hypothesis has `length` new tokens and sums to `best_running`."""
        if best_running == _DEAD:
            return True
        if not self.full:
            return False
        early, penalty = self._config.early_stopping, self._config.length_penalty
        if early is True:
            return True
        # A sum of log-probabilities is negative and falls, so its best future score is over the longest length.
        reachable = self.limit if early == "never" and penalty > 0 else length
        return best_running / reachable**penalty <= self.hypotheses[-1].score


@torch.inference_mode()
def _run(
    model: LanguageModel,
    state: GenerationState,
    config: GenerationConfig,
    stop: StopStrings | None,
    deadline: float | None,
) -> list[_Search]:
    beams, vocab_size, device = config.num_beams, state.vocab_size, state.recurrent.device
    eos = frozenset(config.eos_ids)
    process = LogitsProcessor(config, device)
    searches = [_Search(config, limit) for limit in new_token_limits(state, config)]
    active = searches
    start = state.repeat_interleave(beams)
    history = TokenHistory(start.tokens, device, vocab_size if process.needs_seen else None)
    recurrent = start.recurrent
    # All beams of a prompt begin alike, so that only the first may have continuations in the first step.
    scores = torch.tensor([[0.0] + [_DEAD] * (beams - 1)] * len(active), device=device)
    candidates = min(max(2, 1 + len(eos)), vocab_size) * beams
    steps = 0

    while active:
        logits, recurrent = model_step(model, history.last(), recurrent)
        log_probs = process(logits.log_softmax(-1), history.tokens(), history.seen, steps)
        totals = (scores.view(-1, 1) + log_probs).view(len(active), beams * vocab_size)
        best, place = totals.topk(candidates)
        if steps == 0 or bool(best.isnan().any()):
            check_some_token(best[:, 0])
        steps += 1
        late = deadline is not None and time.perf_counter() >= deadline

        rows: list[int] = []  # the beams to go on with: of which row, by which token, with which score
        tokens: list[int] = []
        running: list[list[float]] = []
        still_active = []
        for index, search in enumerate(active):
            ended: list[tuple[float, int, int, FinishReason]] = []
            going: list[tuple[float, int, int]] = []
            ranked = zip(best[index].tolist(), place[index].tolist(), strict=True)
            for rank, (score, where) in enumerate(ranked):
                if score == _DEAD:
                    break
                row, token = index * beams + where // vocab_size, where % vocab_size
                reason: FinishReason | None = None
                if token in eos:
                    reason = "eos"
                elif stop is not None and stop.completed_by_last([*history.tail(row, stop.window - 1), token]):
                    reason = "stop_string"
                elif steps >= search.limit:
                    reason = "length"
                elif late:
                    reason = "time"
                if reason is None:
                    going.append((score, row, token))
                elif rank < beams:
                    ended.append((score / steps**config.length_penalty, row, token, reason))
            if ended:
                ends = recurrent.select(torch.tensor([row for _, row, _, _ in ended], device=device))
                texts = [torch.cat([history.text(row), torch.tensor([token])]) for _, row, token, _ in ended]
                search.add(
                    [
                        _Hypothesis(score, texts[i], steps, reason, ends, i)
                        for i, (score, _, _, reason) in enumerate(ended)
                    ]
                )
            going = going[:beams]
            if not search.over(going[0][0] if going else _DEAD, steps):
                still_active.append(search)
                going += [(_DEAD, *going[0][1:])] * (beams - len(going))
                running.append([score for score, _, _ in going])
                rows += [row for _, row, _ in going]
                tokens += [token for _, _, token in going]
        active = still_active
        if active:
            scores = torch.tensor(running, device=device)
            recurrent = recurrent.select(torch.tensor(rows, device=device))
            history.select(rows)
            history.append(torch.tensor(tokens, device=device))
    return searches


def beam_search(
    model: LanguageModel,
    state: GenerationState,  # B texts
    config: GenerationConfig,
    *,
    stop: StopStrings | None = None,
    deadline: float | None = None,
) -> BeamResult:
    """Search the best continuations of each text; `config` as documented in `GenerationConfig`.

    Args:
        deadline: `time.perf_counter()` value after which incomplete hypotheses count as complete, or None.

    Raises:
        ValueError: every token is forbidden, or there are fewer continuations than `num_return_sequences`.
    """
    started = time.perf_counter()
    searches = _run(model, state, config, stop, deadline)
    count = config.num_return_sequences
    for text, search in enumerate(searches):
        if len(search.hypotheses) < count:
            raise ValueError(
                f"text {text}: only {len(search.hypotheses)} continuations are possible, num_return_sequences asks for "
                f"{count}; lower it, or relax max_new_tokens, suppress_tokens, bad_words_ids or no_repeat_ngram_size"
            )
    best = [hypothesis for search in searches for hypothesis in search.hypotheses[:count]]
    device = state.recurrent.device
    result = GenerationState(
        # Outside inference mode, so that the caller's tensors are ordinary ones.
        recurrent=LSTMState.cat([item.recurrent.select(torch.tensor([item.row], device=device)) for item in best]),
        tokens=tuple(item.text.clone() for item in best),
        vocab_size=state.vocab_size,
        seeds=None if state.seeds is None else tuple(seed for seed in state.seeds for _ in range(count)),
    )
    return BeamResult(
        new_tokens=[item.text[-item.new :].tolist() for item in best],
        finish_reasons=[item.reason for item in best],
        scores=torch.tensor([item.score for item in best], device=device),
        state=result,
        seconds=time.perf_counter() - started,
    )
