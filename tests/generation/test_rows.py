"""Rows that come and go: each text, its history and its random numbers are what they are alone."""

from __future__ import annotations

import pytest
import torch

from tlstm.generation.decoders import choose_rows
from tlstm.generation.history import TokenHistory
from tlstm.generation.philox import GumbelNoise
from tlstm.generation.request import read_request
from tlstm.generation.texts import state_of


def test_history_takes_texts_at_any_time() -> None:
    """Against plain lists, with texts longer and shorter than those that are there."""
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(13, (length,), generator=generator) for length in (7, 1, 101, 13, 65)]
    history, plain = TokenHistory(texts[:2], vocab_size=13), [text.tolist() for text in texts[:2]]
    for more, steps, keep in ((texts[2:4], 70, [0, 2, 3]), (texts[4:], 3, [1, 0]), (texts[:1], 1, [2])):
        history.extend(more)
        plain += [text.tolist() for text in more]
        for _ in range(steps):
            new = torch.randint(13, (len(plain),), generator=generator)
            history.append(new)
            assert torch.equal(history.last(), new)
            for text, token in zip(plain, new.tolist(), strict=True):
                text.append(token)
        assert [history.text(row).tolist() for row in range(len(plain))] == plain
        assert [history.tail(row, 5) for row in range(len(plain))] == [text[-5:] for text in plain]
        assert [row[row >= 0].tolist() for row in history.tokens()] == plain
        assert [set(row.nonzero()[:, 0].tolist()) for row in history.seen] == [set(text) for text in plain]
        history.select(keep)
        plain = [plain[row] for row in keep]
    history.extend(texts[1:2])
    assert history.tokens().shape[1] == max(map(len, [*plain, texts[1]]))  # columns of texts gone by are dropped


@pytest.mark.parametrize("used", [0, 1, 255, 256, 300])
def test_noise_of_new_rows_begins_at_their_own_position(used) -> None:
    noise = GumbelNoise([3, 2**64 - 1], [0, 2], [5, 70_001], 13)
    for _ in range(used):
        noise.next()
    noise.extend([9], [1], [41])
    alone = [GumbelNoise([3], [0], [5 + used], 13), GumbelNoise([2**64 - 1], [2], [70_001 + used], 13)]
    alone.append(GumbelNoise([9], [1], [41], 13))
    for _ in range(260):
        assert torch.equal(noise.next(), torch.cat([single.next() for single in alone]))


@pytest.mark.parametrize("decoder", ["lean", "loop"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "seed": 4, "eos_token_id": [5, 7], "min_new_tokens": 6},
        {"do_sample": True, "seed": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[2, 4]]},
    ],
    ids=str,
)
def test_a_text_that_joins_late_is_what_it_is_alone(build_model, prompts, decoder, settings) -> None:
    model = build_model(dtype=torch.float64)
    alone = [
        model.generate([prompt], max_new_tokens=23, return_dict_in_generate=True, **settings) for prompt in prompts
    ]
    requests = [
        read_request(model, [prompt], None, None, None, None, "auto", {"max_new_tokens": 23, **settings})
        for prompt in prompts
    ]
    rows, choice = choose_rows(model, requests[0].config, 5, 1000, wanted=decoder)
    assert choice.name == decoder
    texts = []
    for request in requests:
        texts += rows.add(request.state)
        for _ in range(5):
            if rows.texts:
                rows.step()
    while rows.texts:
        rows.step()
    assert [text.new_tokens for text in texts] == [single.new_tokens[0] for single in alone]
    assert [text.finish_reason for text in texts] == [single.finish_reasons[0] for single in alone]
    after = state_of(texts, rows, 13)
    for row, single in enumerate(alone):
        assert torch.equal(after.tokens[row], single.state.tokens[0])
        torch.testing.assert_close(after.recurrent.c[1][row], single.state.recurrent.c[1][0])
