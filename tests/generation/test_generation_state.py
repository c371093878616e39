"""A text that stops and goes on is the text that never stopped; a prompt is read once for many continuations."""

from __future__ import annotations

import os

import pytest
import torch

from tlstm import GenerationState, LSTMState

SETTINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 77, "temperature": 1.3, "top_p": 0.95},
    "penalties": {"do_sample": True, "seed": 78, "repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
    "bad words": {"bad_words_ids": [[5, 7], [1, 2, 3]], "repetition_penalty": 1.2},
}


def run(model, *args, **settings):
    return model.generate(*args, return_dict_in_generate=True, **settings)


def count_fed_tokens(model, monkeypatch) -> list[int]:
    """Sizes of all input_ids that reach the backbone from here on."""
    fed: list[int] = []
    forward = model.model.forward

    def counting(input_ids, *args, **kwargs):
        fed.append(input_ids.numel())
        return forward(input_ids, *args, **kwargs)

    monkeypatch.setattr(model.model, "forward", counting)
    return fed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_resume_at_any_point_is_one_long_run(build_model, prompts, tmp_path, settings, dtype) -> None:
    model, total = build_model(dtype=dtype, layer_sizes=[7, 11]), 17
    whole = run(model, prompts, max_new_tokens=total, **settings)
    later = {name: value for name, value in settings.items() if name != "seed"}  # the state remembers its seeds
    for split in range(1, total):
        first = run(model, prompts, max_new_tokens=split, **settings)
        first.state.save(tmp_path / "text.safetensors")
        state = GenerationState.load(tmp_path / "text.safetensors")
        second = run(model, state=state, max_new_tokens=total - split, **later)
        assert [a + b for a, b in zip(first.new_tokens, second.new_tokens, strict=True)] == whole.new_tokens
        assert second.sequences.tolist() == second.new_tokens  # no prompt was given in this call
        for got, expected in zip(second.state.tokens, whole.state.tokens, strict=True):
            assert torch.equal(got, expected)


def test_rows_that_ended_at_different_steps_resume_from_where_they_are(model, prompts) -> None:
    settings = {"do_sample": True, "seed": [3, 4, 5, 6, 7], "eos_token_id": 5, "pad_token_id": 0}
    first = run(model, prompts, max_new_tokens=20, **settings)
    assert len(set(map(len, first.new_tokens))) > 2
    settings.pop("seed")
    second = run(model, state=first.state, max_new_tokens=9, **settings)
    for row, prompt in enumerate(prompts):
        text = prompt + first.new_tokens[row]
        assert first.state.tokens[row].tolist() == text
        alone = run(model, [text], max_new_tokens=9, seed=3 + row, **settings)
        assert second.new_tokens[row] == alone.new_tokens[0]


def test_more_text_may_be_added_on_the_way(model, prompts) -> None:
    additions = [[1, 2], [], [3], [4, 5, 6, 7], [8]]
    first = run(model, prompts, max_new_tokens=6)
    second = run(model, additions, state=first.state, max_new_tokens=6)
    for row in range(5):
        text = prompts[row] + first.new_tokens[row] + additions[row]
        assert second.new_tokens[row] == model.generate([text], max_new_tokens=6)[0, len(text) :].tolist()
        assert second.state.tokens[row].tolist() == text + second.new_tokens[row]
    assert second.sequences.shape == (5, 4 + 6)
    assert second.sequences[3, :4].tolist() == additions[3]


def test_a_cached_prompt_serves_many_suffixes_and_is_read_once(model, monkeypatch) -> None:
    prompt = torch.randint(13, (101,), generator=torch.Generator().manual_seed(5)).tolist()
    suffixes = [[1], [2, 3, 4], [5, 6]]
    expected = [run(model, [prompt + suffix], max_new_tokens=9).new_tokens[0] for suffix in suffixes]

    fed = count_fed_tokens(model, monkeypatch)
    cached = model.prefill([prompt])
    assert sum(fed) == 100
    fed.clear()
    one_by_one = [run(model, [suffix], state=cached, max_new_tokens=9, decoder="loop") for suffix in suffixes]
    assert [out.new_tokens[0] for out in one_by_one] == expected
    assert sum(fed) == sum(len(suffix) for suffix in suffixes) + 3 * 9
    assert [out.timings.prefill_tokens for out in one_by_one] == [1, 3, 2]
    assert run(model, suffixes, state=cached, max_new_tokens=9).new_tokens == expected  # one state, several prompts
    assert cached.tokens[0].tolist() == prompt  # and it is still what it was
    size = sum(tensor.numel() for tensor in cached.recurrent.tensors().values())
    assert size == sum(tensor.numel() for tensor in model.prefill([[1]]).recurrent.tensors().values())


def test_prefill_in_pieces_is_prefill_at_once(model, prompts) -> None:
    whole = model.prefill([prompt + prompt for prompt in prompts])
    pieces = model.prefill(prompts, state=model.prefill(prompts))
    for got, expected in zip(pieces.recurrent.h, whole.recurrent.h, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, pieces.tokens, whole.tokens))


def test_a_bare_recurrent_state_has_consumed_its_text(model) -> None:
    text = [3, 1, 4, 1, 5, 9]
    with torch.no_grad():
        recurrent = model(torch.tensor([text[:4]])).state
    expected = model.generate([text], max_new_tokens=9)
    assert torch.equal(model.generate([text[4:]], state=recurrent, max_new_tokens=9)[:, 2:], expected[:, 6:])
    with pytest.raises(ValueError, match="input_ids: a bare LSTMState has consumed all its text"):
        model.generate(state=recurrent)


def test_state_round_trip_keeps_everything(model, prompts, tmp_path) -> None:
    settings = {"do_sample": True, "seed": [2**64 - 1, 0, 1, 2, 3], "num_return_sequences": 2}
    state = run(model, prompts, max_new_tokens=3, **settings).state
    path = tmp_path / "state.safetensors"
    state.save(path)
    loaded = GenerationState.load(path)
    assert loaded.seeds == state.seeds == (2**64 - 1, 2**64 - 1, 0, 0, 1, 1, 2, 2, 3, 3)
    assert loaded.return_index == state.return_index
    assert loaded.vocab_size == 13
    assert all(map(torch.equal, loaded.tokens, state.tokens))
    for name, tensor in state.recurrent.tensors().items():
        assert torch.equal(loaded.recurrent.tensors()[name], tensor)
    some = state.select([3, 3, 0])
    assert some.return_index == (1, 1, 0)
    assert some.seeds == (0, 0, 2**64 - 1)
    again = some.select([0, 2]).repeat_interleave(2)
    assert again.return_index == (2, 3, 0, 1)  # each copy draws random numbers of its own


def test_a_save_that_fails_leaves_the_old_file(model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "state.safetensors"
    model.prefill([[1, 2, 3]]).save(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        model.prefill([[4]]).save(path)
    assert GenerationState.load(path).tokens[0].tolist() == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_states_of_other_models_are_refused(build_model, model) -> None:
    state = model.prefill([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"h of widths \[7, 11\].*got.*\[7, 7\].*another model"):
        build_model(layer_sizes=[7, 11]).generate(state=state)
    with pytest.raises(ValueError, match=r"vocab_size 17, got one of vocab_size 13; load the model"):
        build_model(vocab_size=17).generate(state=state)
    with pytest.raises(ValueError, match="another model"):
        build_model(layer_sizes=[7, 11]).generate([1], state=state.recurrent)
    with pytest.raises(ValueError, match="expected a GenerationState or an LSTMState, got dict"):
        model.generate([1], state={})
    with pytest.raises(ValueError, match="holds 2 texts and input_ids 3"):
        model.generate([[1], [2], [3]], state=model.prefill([[1], [2]]))


def test_damaged_files_are_named(model, tmp_path) -> None:
    path = tmp_path / "broken.safetensors"
    model.prefill([[1, 2, 3]]).save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"broken.safetensors: damaged or no safetensors file"):
        GenerationState.load(path)
    model.zero_state(1).save(path)
    with pytest.raises(ValueError, match=r"broken.safetensors: expected a file of format 'tlstm-generation-state-1'"):
        GenerationState.load(path)
    with pytest.raises(FileNotFoundError):
        GenerationState.load(tmp_path / "none.safetensors")


def test_parts_that_do_not_fit_are_refused() -> None:
    recurrent = LSTMState.zeros([3], [3], 2)
    ids = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"tokens: expected one entry per stream of the recurrent state \(2\), got 1"):
        GenerationState(recurrent, (ids,), 5)
    with pytest.raises(ValueError, match=r"tokens\[1\]: expected a 1-D int64 tensor of at least one id"):
        GenerationState(recurrent, (ids, ids[:0]), 5)
    with pytest.raises(ValueError, match=r"tokens\[0\]: expected ids from 0 to 1, got 1 to 2"):
        GenerationState(recurrent, (ids, ids), 2)
