"""Bad prompts: each one an error that says what came, what was expected and what to do."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    ("input_ids", "mask", "message"),
    [
        (torch.zeros(1, 3), None, r"expected whole numbers \(int64\), got torch.float32; pass token ids"),
        (torch.zeros(1, 3, dtype=torch.bool), None, "got torch.bool"),
        (torch.zeros(1, 1, 3, dtype=torch.int64), None, r"expected shape \(B, T\) or \(T,\), got \(1, 1, 3\)"),
        (torch.tensor(3), None, r"expected shape \(B, T\)"),
        (torch.zeros(0, 3, dtype=torch.int64), None, r"expected shape \(B, T\)"),
        (torch.tensor([[1, 13]]), None, r"ids from 0 to 12 .*got \[13\] in prompt 0; encode the text"),
        (torch.tensor([[1, 2], [-100, 3]]), None, r"got \[-100\] in prompt 1.*attention_mask if this is padding"),
        ([[1, 2], [3, 99]], None, r"got \[99\] in prompt 1"),
        ("ROMEO:", None, "got text; encode it first"),
        (["ROMEO:"], None, "got text; encode it first"),
        ([[1.5, 2.0]], None, "expected whole numbers in prompt 0, got torch.float32"),
        ([[1, 2], [[3]]], None, r"expected whole numbers in prompt 1.*of shape \(1, 1\)"),
        ({"a": 1}, None, "expected a tensor, a list of ids or a list of such lists, got dict"),
        (5, None, "expected a tensor, a list of ids or a list of such lists, got int"),
        ([[1, "x"]], None, "expected a tensor, a list of ids"),
        ([[1, 2]], torch.ones(1, 2), "attention_mask: needless with lists"),
        (None, torch.ones(1, 2), "attention_mask: given without input_ids"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 4), r"the shape of input_ids \(2, 3\), got \(2, 4\)"),
        (torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 1]]), "row 0 has padding between real tokens"),
        (None, None, "prompt 0 is empty and the model has no bos_token_id.*set bos_token_id"),
        ([[1], []], None, "prompt 1 is empty"),
        (torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 0, 0]]), "prompt 1 is empty"),
        (torch.zeros(1, 0, dtype=torch.int64), None, "prompt 0 is empty"),
    ],
    ids=str,
)
def test_bad_prompts(model, input_ids, mask, message) -> None:
    for call in (model.generate, model.prefill, model.generate_stream):
        with pytest.raises(ValueError, match=message):
            call(input_ids, mask)


def test_padding_may_hold_anything(model) -> None:
    ids = torch.tensor([[-100, -100, 1, 2], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    out = model.generate(ids, mask, max_new_tokens=5)
    assert torch.equal(out[:, :4], ids)
    assert torch.equal(out[:1, 4:], model.generate([[1, 2]], max_new_tokens=5)[:, 2:])


def test_one_seed_per_prompt(model) -> None:
    with pytest.raises(ValueError, match=r"seed: expected one per prompt \(2\), got 3; one number serves all"):
        model.generate([[1], [2]], do_sample=True, seed=[1, 2, 3])


def test_damaged_weights_are_an_error_not_a_text(build_model) -> None:
    model = build_model()
    with torch.no_grad():
        model.lm_head.bias[3] = torch.nan
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        model.generate([[1]])
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        model.generate([[1]], num_beams=2)
