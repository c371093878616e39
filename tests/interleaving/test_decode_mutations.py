"""Broken protocols of the decode kernel must be caught, and the state must be right wherever a text is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from tlstm_kernels import decode, decode_exchange, exchange
from tlstm_kernels.decode_launch import DecodeSession
from tlstm_kernels.kernel_calls import ExchangeError
from tlstm_kernels.launch_options import launch_options

from tlstm.generation.kernel_rows import KernelRows
from tlstm.generation.stopping import StopStrings

from .decoding import DecodeCase, Run, assert_same, clear_case, decoder_of, with_kernel
from .grid import DeadlockError

CASE = DecodeCase(widths=(7, 7), steps=3, V=23)  # two programs, each with a block of the vocabulary
SCHEDULES = 12


@triton.jit
def never_unwritten(words, DTYPE: tl.constexpr):
    return tl.zeros(words.shape, tl.int32)


@triton.jit
def keys_at_once(pointers, mask, error_ptr, step, MAX_SPINS: tl.constexpr):
    return tl.load(pointers, mask=mask, other=-0x8000000000000000, volatile=True)


@triton.jit
def publish_twice(pointers, values, mask):
    tl.store(pointers, (values * 0.5).to(pointers.dtype.element_ty), mask=mask)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def publish_nothing(pointers, values, mask):
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask & (tl.program_id(0) != 1))


def outcomes(case: DecodeCase) -> set[str]:
    """Everything that comes of the mutation, until a schedule goes wrong."""
    model, expected = clear_case(case)
    seen = set()
    for seed in range(SCHEDULES):
        try:
            assert_same(with_kernel(case, model, seed), expected, case.dtype)
        except DeadlockError:
            return {"deadlock"}
        except (AssertionError, ValueError):  # wrong tokens or states, or scores that are no numbers
            return {"wrong"}
        seen.add("right")
    return seen


@pytest.mark.parametrize("keep_tile", [0, 1])
def test_a_missing_sentinel_check_gives_wrong_results(monkeypatch, keep_tile):
    monkeypatch.setattr(decode_exchange if keep_tile == 0 else exchange, "sentinel_bits", never_unwritten)
    assert outcomes(replace(CASE, keep_tile=keep_tile)) == {"wrong"}


def test_keys_that_are_not_waited_for_give_wrong_results(monkeypatch):
    monkeypatch.setattr(decode, "receive_keys", keys_at_once)
    assert outcomes(CASE) == {"wrong"}


def test_an_element_stored_twice_gives_wrong_results(monkeypatch):
    monkeypatch.setattr(decode, "publish", publish_twice)
    assert outcomes(CASE) == {"wrong"}


def test_a_store_that_never_comes_is_a_deadlock_that_names_it(monkeypatch):
    model, _ = clear_case(CASE)
    monkeypatch.setattr(decode, "publish", publish_nothing)
    with pytest.raises(DeadlockError, match=r"program \(0, 0, 0\) waits for h_ptr\[0, 0, 4\]"):
        with_kernel(CASE, model, 0)


def test_a_bounded_wait_ends_and_reports(monkeypatch):
    model, _ = clear_case(CASE)
    monkeypatch.setattr(decode, "publish", publish_nothing)
    monkeypatch.setattr("tlstm_kernels.decode_launch.Chunk._arrived", checked_on_arrival)
    with launch_options(max_spins=3), pytest.raises(ExchangeError, match="in step 0, for h of layer 0, near column 4"):
        with_kernel(CASE, model, 0, launch_options={"patience": 100})


def checked_on_arrival(chunk):
    """As on a GPU, where results arrive later than the launch."""
    chunk._check()
    return chunk._keys


# ---- cutting a text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
def test_the_state_between_any_two_tokens_is_that_of_python(sampled):
    """Also in the middle of a chunk, with the next one already made."""
    case = DecodeCase(widths=(7, 5), steps=5, chunk=2, B=2, rows=2, settings={"do_sample": sampled})
    model, _ = clear_case(case)
    decoder = decoder_of(case, model, 0)
    for steps in range(1, 5):
        config = case.config(model).replace(max_new_tokens=steps, return_dict_in_generate=True)
        output = model.generate(case.prompts(), generation_config=config)
        decoder.step()
        found = Run(decoder.new_tokens, output.finish_reasons, decoder.state())
        assert_same(found, Run(output.new_tokens, output.finish_reasons, output.state), case.dtype)


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize("seed", [3, 4])
def test_stop_strings_end_a_text_in_the_middle_of_a_chunk(seed):
    case = DecodeCase(B=2, rows=2, steps=6, chunk=4, settings={"do_sample": True})
    model, expected = clear_case(case)
    text = Letters().decode(expected.tokens[0])
    stop = StopStrings([text[1:3]], Letters())
    config = case.config(model).replace(return_dict_in_generate=True, stop_strings=[text[1:3]])
    output = model.generate(case.prompts(), generation_config=config, tokenizer=Letters())
    found = with_kernel(case, model, seed, stop=stop)
    assert found.reasons[0] == "stop_string"
    assert_same(found, Run(output.new_tokens, output.finish_reasons, output.state), case.dtype)


@pytest.mark.parametrize("seed", [0, 1])
def test_less_than_a_chunk_is_made_beyond_a_stop_string(seed, monkeypatch):
    case = DecodeCase(steps=12, chunk=4, settings={"do_sample": True})
    model, expected = clear_case(case)
    launch, steps = DecodeSession.launch, []
    monkeypatch.setattr(DecodeSession, "launch", lambda self, n: (steps.append(n), launch(self, n))[1])
    stop = StopStrings([Letters().decode(expected.tokens[0][3:5])], Letters())
    found = with_kernel(case, model, seed, stop=stop)
    assert found.reasons == ["stop_string"]
    assert 0 < sum(steps) - len(found.tokens[0]) < case.chunk


@pytest.mark.parametrize("seed", [0, 1])
def test_time_that_is_up_ends_every_text_with_one_token(seed):
    case = DecodeCase(B=3, rows=4, steps=6)
    model, expected = clear_case(case)
    found = with_kernel(case, model, seed, deadline=0.0)
    assert found.reasons == ["time"] * 3
    assert found.tokens == [tokens[:1] for tokens in expected.tokens]


def test_a_continued_state_goes_on_as_if_it_had_never_stopped():
    case = DecodeCase(widths=(7, 7), steps=6, chunk=2, settings={"do_sample": True})
    model, expected = clear_case(case)
    first = with_kernel(case, model, 0, steps=3)
    rest = with_kernel(replace(case, steps=3), model, 1, start=first.state)
    assert first.tokens[0] + rest.tokens[0] == expected.tokens[0]


@pytest.mark.parametrize("seed", [0, 1], ids=["token by token", "all at once"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_the_error_that_python_raises(value, seed):
    case = DecodeCase(B=2, rows=2)
    model = case.make_model()
    with torch.no_grad():
        model.lm_head.bias[3] = value
    with pytest.raises(ValueError, match="row 0: the model's logits are not finite") as found:
        with_kernel(case, model, seed)
    with pytest.raises(ValueError, match="row 0: the model's logits are not finite") as expected:
        model.generate(case.prompts(), generation_config=case.config(model))
    assert str(found.value) == str(expected.value)


def test_everything_forbidden_is_the_error_that_python_raises():
    case = DecodeCase(settings={"suppress_tokens": list(range(13))})
    with pytest.raises(ValueError, match="row 0: every token is forbidden"):
        with_kernel(case, case.make_model(), 0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_what_was_begun_token_by_token_can_be_ended_all_at_once(steps):
    case = DecodeCase(widths=(7, 5), B=3, rows=4, steps=6, chunk=4, settings={"eos_token_id": [2, 7]})
    model, expected = clear_case(case)
    decoder = decoder_of(case, model, 0)
    for _ in range(steps):
        decoder.step()
    decoder.run()
    assert_same(Run(decoder.new_tokens, list(decoder.finish_reasons), decoder.state()), expected, case.dtype)


def test_nan_in_a_state_never_stalls():
    case = DecodeCase(widths=(7, 7))
    model = case.make_model()
    with torch.no_grad():
        model.model.layers[0].weight_hh_l0[0, 0] = torch.nan
        model.model.layers[1].weight_ih_l0.view(torch.int32)[0, 0] = -1  # a NaN with the sentinel's pattern
    with pytest.raises(ValueError, match="not finite"):
        with_kernel(case, model, 0)


def test_what_the_kernel_refuses_is_said():
    model = DecodeCase().make_model()
    refusal = KernelRows.refusal(model, DecodeCase().config(model))
    assert refusal == "the model is on cpu, and the decode kernel runs on CUDA GPUs"
