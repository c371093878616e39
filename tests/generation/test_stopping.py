"""Stop strings: found wherever token boundaries lie, by row, and only where new text completes them."""

from __future__ import annotations

import pytest

from tlstm import Tokenizer
from tlstm.generation.stopping import StopStrings


class Pieces:
    """A tokenizer whose tokens are these texts."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[token] for token in ids)


LETTERS = Pieces(*"abcdefghijklm")
WORDS = Pieces("ab", "c", "abc", "bca", "ca", "b", "", "ccc", "a b", " ", "\n", "bb", "ac")


def run(model, *args, **settings):
    return model.generate(*args, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize(
    ("pieces", "stops"),
    [
        (LETTERS, "hh"),
        (LETTERS, ["kjk", "fhag"]),
        (LETTERS, ["zz"]),
        (WORDS, "ca"),
        (WORDS, ["bb", "\n", "cab"]),
        (WORDS, ["bcaa b", "d"]),
        (WORDS, ["cccccc", "b a b"]),
    ],
    ids=str,
)
def test_each_text_ends_with_the_token_that_completes_a_stop_string(model, prompts, pieces, stops) -> None:
    settings = {"do_sample": True, "seed": 5, "temperature": 2.0, "max_new_tokens": 40}
    free = run(model, prompts, **settings)
    out = run(model, prompts, stop_strings=stops, tokenizer=pieces, **settings)
    texts = [stops] if isinstance(stops, str) else stops
    for prompt, whole, new, reason in zip(prompts, free.new_tokens, out.new_tokens, out.finish_reasons, strict=True):
        expected = None  # by the whole text, decoded anew for every prefix
        for count in range(1, len(whole) + 1):
            before, text = pieces.decode(prompt + whole[: count - 1]), pieces.decode(prompt + whole[:count])
            if any(text.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in texts):
                expected = count
                break
        assert new == (whole if expected is None else whole[:expected])
        assert reason == ("length" if expected is None else "stop_string")
    assert ("stop_string" in out.finish_reasons) == (stops != ["zz"])


def test_a_stop_string_within_the_prompt_does_not_count() -> None:
    stop = StopStrings(["ab"], LETTERS)
    assert not stop.completed_by_last([0, 1, 2])
    assert stop.completed_by_last([2, 0, 1])  # begun in the prompt, completed by the new token
    assert StopStrings(["ab"], WORDS).completed_by_last([1, 3 - 1])  # within one token
    assert not StopStrings(["a"], WORDS).completed_by_last([0, 6])  # the last token is empty


def test_stop_strings_of_several_bytes_are_seen_when_complete() -> None:
    tokenizer = Tokenizer.bytes()
    stop = StopStrings(["東京"], tokenizer)
    ids = tokenizer.encode("in 東京")
    for count in range(1, len(ids) + 1):
        assert stop.completed_by_last(ids[:count][-stop.window :]) == (count == len(ids))


def test_the_window_holds_the_longest_stop_string() -> None:
    tokenizer = Tokenizer.bytes()
    text = "🙂" * 40
    stop = StopStrings(["x", text], tokenizer)
    ids = tokenizer.encode("some earlier text" + text)
    assert stop.completed_by_last(ids[-stop.window :])
    assert not stop.completed_by_last(ids[:-1][-stop.window :])


def test_resume_sees_a_stop_string_that_straddles_the_cut(model) -> None:
    settings = {"max_new_tokens": 30, "tokenizer": LETTERS, "temperature": 2.0, "do_sample": True, "seed": 3}
    free = run(model, [[1]], **settings)
    stop = LETTERS.decode(free.new_tokens[0])[8:12]
    whole = run(model, [[1]], stop_strings=stop, **settings)
    cut = len(whole.new_tokens[0]) - 2
    first = run(model, [[1]], stop_strings=stop, **{**settings, "max_new_tokens": cut})
    second = run(model, state=first.state, stop_strings=stop, **settings)
    assert whole.finish_reasons == second.finish_reasons == ["stop_string"]
    assert first.new_tokens[0] + second.new_tokens[0] == whole.new_tokens[0]


def test_stop_strings_need_a_tokenizer(model) -> None:
    with pytest.raises(ValueError, match=r"expected a tokenizer with decode\(ids\), got NoneType; pass"):
        model.generate([[1]], stop_strings="x")
