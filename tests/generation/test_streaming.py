"""Streams give the tokens of `generate`, one at a time, and their text in whole characters."""

from __future__ import annotations

import io
import threading

import pytest
import torch

from tlstm import TextIteratorStreamer, TextStreamer, Tokenizer
from tlstm.generation.generate import TokenStream

SAMPLING = {"do_sample": True, "seed": 12, "temperature": 1.2}


class Recorder:
    """Keeps what it is given."""

    supports_batch = True

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ends += 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture
def byte_model(build_model, tokenizer):
    return build_model(vocab_size=tokenizer.vocab_size)


@pytest.mark.parametrize("settings", [{}, SAMPLING, {**SAMPLING, "eos_token_id": [5, 7]}], ids=str)
def test_the_iterator_gives_the_tokens_of_generate(model, prompts, settings) -> None:
    for prompt in prompts:
        expected = model.generate([prompt], max_new_tokens=23, **settings)[0, len(prompt) :].tolist()
        stream = model.generate_stream([prompt], max_new_tokens=23, **settings)
        assert stream.finish_reason is None
        assert list(stream) == stream.new_tokens == expected
        assert stream.finish_reason == ("eos" if expected[-1] in settings.get("eos_token_id", []) else "length")
        assert stream.timings.decode_tokens == len(expected)


def test_a_stream_left_early_goes_on_from_its_state(model) -> None:
    expected = model.generate([[1, 2, 3]], max_new_tokens=20, **SAMPLING)[0, 3:].tolist()
    stream = model.generate_stream([[1, 2, 3]], max_new_tokens=20, **SAMPLING)
    assert isinstance(stream, TokenStream)
    states = {0: stream.state}
    for count, _ in enumerate(stream, start=1):
        states[count] = stream.state
        if count == 13:
            break
    for count, state in states.items():
        rest = model.generate(state=state, max_new_tokens=20 - count, do_sample=True, temperature=1.2)
        assert rest[0].tolist() == expected[count:]
    assert stream.new_tokens + list(stream) == expected


def test_streams_of_several_texts_are_refused(model) -> None:
    with pytest.raises(ValueError, match="expected one text and no beams"):
        model.generate_stream([[1], [2]])
    with pytest.raises(ValueError, match="expected one text and no beams"):
        model.generate_stream([[1]], num_beams=2)


def test_a_streamer_gets_prompt_tokens_and_end(model, prompts) -> None:
    recorder = Recorder()
    settings = {"max_new_tokens": 20, "eos_token_id": [5, 7], "pad_token_id": 0, **SAMPLING}
    out = model.generate(prompts, streamer=recorder, return_dict_in_generate=True, **settings)
    assert torch.equal(recorder.values[0], out.sequences[:, :13])
    steps = torch.stack(recorder.values[1:], dim=1)
    assert [[token for token in row if token >= 0] for row in steps.tolist()] == out.new_tokens
    assert recorder.ends == 1
    assert torch.equal(model.generate(prompts, **settings), out.sequences)


def test_end_is_called_whatever_happens(model) -> None:
    class Interrupted(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.values) == 5:
                raise KeyboardInterrupt

    interrupted = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        model.generate([[1]], streamer=interrupted, max_new_tokens=100)
    assert (len(interrupted.values), interrupted.ends) == (5, 1)
    refused = Recorder()
    with pytest.raises(ValueError, match="ids from 0 to 12"):
        model.generate([[99]], streamer=refused)
    assert refused.ends == 1


def test_streamers_that_do_not_fit_are_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match=r"expected an object with put\(tokens\) and end\(\), got list"):
        model.generate([[1]], streamer=[])
    with pytest.raises(ValueError, match=r"takes one sequence, and 2 are generated.*supports_batch"):
        model.generate([[1], [2]], streamer=TextStreamer(tokenizer, io.StringIO()))
    with pytest.raises(ValueError, match="beam search settles its tokens only at its end"):
        model.generate([[1]], streamer=Recorder(), num_beams=2)


def feed(streamer: TextStreamer, prompt: list[int], new: list[int]) -> None:
    streamer.put(torch.tensor([prompt]))
    for token in new:
        streamer.put(torch.tensor([token]))
    streamer.end()


def test_text_comes_in_whole_characters(tokenizer) -> None:
    text = "naïve – 東京 🙂 end"
    ids = tokenizer.encode(text)
    for cut in (0, 3, 4, len(ids) - 1):  # 3 is within the two bytes of ï

        class Pieces(io.StringIO):
            def write(self, piece: str) -> int:
                assert "\ufffd" not in piece
                return super().write(piece)

        for skip in (False, True):
            file = Pieces()
            feed(TextStreamer(tokenizer, file, skip_prompt=skip), ids[:cut], ids[cut:])
            shown = tokenizer.decode(ids[:cut]).rstrip("\ufffd") if skip else ""
            assert file.getvalue() == text.removeprefix(shown) + "\n"


def test_an_incomplete_character_at_the_end_is_shown_as_such(tokenizer) -> None:
    file = io.StringIO()
    streamer = TextStreamer(tokenizer, file)
    feed(streamer, tokenizer.encode("a"), tokenizer.encode("東")[:2])
    assert file.getvalue().startswith("a\ufffd")
    feed(streamer, [], tokenizer.encode("b"))  # the streamer can be used again
    assert file.getvalue().endswith("\nb\n")


def test_text_goes_to_the_standard_output(byte_model, tokenizer, capsys) -> None:
    prompt = tokenizer.encode("Hi")
    out = byte_model.generate([prompt], streamer=TextStreamer(tokenizer), max_new_tokens=30, **SAMPLING)
    assert capsys.readouterr().out == tokenizer.decode(out[0].tolist()) + "\n"


def test_text_can_be_read_in_another_thread(byte_model, tokenizer) -> None:
    prompt = tokenizer.encode("Hi")
    settings = {"max_new_tokens": 30, **SAMPLING}
    expected = tokenizer.decode(byte_model.generate([prompt], **settings)[0, 2:].tolist())
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=byte_model.generate, args=([prompt],), kwargs={"streamer": streamer, **settings})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_a_failed_call_does_not_leave_a_reader_waiting(byte_model, tokenizer) -> None:
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    with pytest.raises(TypeError, match="did you mean 'top_k'"):
        byte_model.generate([[1]], streamer=streamer, topk=3)
    assert list(streamer) == []


def test_a_streamer_of_transformers_works(byte_model, tokenizer, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    prompt = tokenizer.encode("Once")
    out = byte_model.generate([prompt], streamer=transformers.TextStreamer(tokenizer), max_new_tokens=40, **SAMPLING)
    assert capsys.readouterr().out == tokenizer.decode(out[0].tolist()) + "\n"
    iterator = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    byte_model.generate([prompt], streamer=iterator, max_new_tokens=40, **SAMPLING)
    assert "".join(iterator) == tokenizer.decode(out[0, 4:].tolist())
