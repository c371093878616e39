"""LSTMState: reordering, joining, storage."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tlstm import LSTMState


def make_state(batch_size: int = 3) -> LSTMState:
    return LSTMState(
        h=(torch.randn(batch_size, 5), torch.randn(batch_size, 2)),
        c=(torch.randn(batch_size, 5), torch.randn(batch_size, 7)),
    )


def assert_same(a: LSTMState, b: LSTMState) -> None:
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name


def test_zeros_and_description():
    state = LSTMState.zeros([5, 2], [5, 7], 4, dtype=torch.float64)
    assert (state.batch_size, state.num_layers, state.dtype) == (4, 2, torch.float64)
    assert [tuple(t.shape) for t in (*state.h, *state.c)] == [(4, 5), (4, 2), (4, 5), (4, 7)]
    assert "batch_size=4" in repr(state)


def test_select_reorders_and_repeats_streams():
    state = make_state()
    chosen = state.select(torch.tensor([2, 0, 2]))
    for before, after in zip((*state.h, *state.c), (*chosen.h, *chosen.c), strict=True):
        assert torch.equal(after, torch.stack([before[2], before[0], before[2]]))


def test_row_is_one_stream_without_a_copy():
    state = make_state()
    for before, after in zip((*state.h, *state.c), (*state.row(2).h, *state.row(2).c), strict=True):
        assert torch.equal(after, before[2:3])
        assert after.data_ptr() == before[2].data_ptr()


def test_cat_undoes_select():
    state = make_state()
    assert_same(LSTMState.cat([state.select(torch.tensor([row])) for row in range(3)]), state)


def test_repeat_interleave_keeps_copies_together():
    state = make_state(2).repeat_interleave(3)
    assert state.batch_size == 6
    assert torch.equal(state.c[1][0], state.c[1][2])
    assert not torch.equal(state.c[1][2], state.c[1][3])


def test_detach_cuts_the_history():
    weight = torch.ones(1, 2, requires_grad=True)
    assert not LSTMState(h=(weight * 2,), c=(weight * 3,)).detach().h[0].requires_grad


def test_file_round_trip_is_exact(tmp_path):
    state = make_state()
    state.save(tmp_path / "state.safetensors")
    assert_same(LSTMState.load(tmp_path / "state.safetensors"), state)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_saves_a_non_contiguous_view_of_a_larger_tensor(tmp_path):
    state = make_state(6).map(lambda tensor: tensor[::2])
    state.save(tmp_path / "state")
    assert_same(LSTMState.load(tmp_path / "state"), state)


def test_damaged_and_foreign_files_are_named(tmp_path):
    garbage, foreign = tmp_path / "garbage", tmp_path / "foreign"
    garbage.write_bytes(b"not a state")
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="garbage"):
        LSTMState.load(garbage)
    with pytest.raises(ValueError, match=r"LSTMState\.save"):
        LSTMState.load(foreign)
    with pytest.raises(FileNotFoundError):
        LSTMState.load(tmp_path / "nowhere")


def test_a_state_with_a_missing_layer_is_refused(tmp_path):
    tensors = make_state().tensors()
    del tensors["c.1"]
    with pytest.raises(ValueError, match=r"c\.0"):
        LSTMState.from_tensors(tensors)
    with pytest.raises(ValueError, match="per layer"):
        LSTMState(h=(torch.zeros(1, 2),), c=())
    with pytest.raises(ValueError, match=r"c\[0\]"):
        LSTMState(h=(torch.zeros(1, 2),), c=(torch.zeros(2, 2),))
    with pytest.raises(ValueError, match="one model"):
        LSTMState.cat([make_state(), LSTMState(h=(torch.zeros(1, 2),), c=(torch.zeros(1, 2),))])
