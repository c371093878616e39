"""LSTMForCausalLM: head, tying, loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tlstm import LSTMConfig, LSTMForCausalLM


def make_model(**fields) -> LSTMForCausalLM:
    torch.manual_seed(3)
    return LSTMForCausalLM(LSTMConfig(**{"vocab_size": 31, "hidden_size": 13, **fields})).double().eval()


def test_logits_are_the_head_over_the_backbone():
    model = make_model()
    ids = torch.randint(31, (3, 7))
    output = model(ids)
    features = model.model(ids).last_hidden_state
    torch.testing.assert_close(output.logits, features @ model.lm_head.weight.T + model.lm_head.bias)
    assert output.loss is None
    assert output.state.batch_size == 3


def test_tied_head_is_one_parameter_with_both_gradients():
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embedding.weight
    assert sum(p.numel() for p in model.parameters()) == make_model().num_parameters() - 31 * 13
    ids = torch.randint(31, (3, 7))
    model(ids, labels=ids).loss.backward()
    untied = make_model()
    untied.load_state_dict(model.state_dict())
    untied(ids, labels=ids).loss.backward()
    torch.testing.assert_close(
        model.lm_head.weight.grad, untied.lm_head.weight.grad + untied.model.embedding.weight.grad
    )


def test_tied_awd_lstm_shape():
    model = make_model(layer_sizes=[23, 23, 9], embedding_size=9, tie_word_embeddings=True)
    assert model(torch.randint(31, (2, 5))).logits.shape == (2, 5, 31)


def test_output_projection_allows_tying_a_narrow_embedding():
    model = make_model(hidden_size=23, embedding_size=9, output_projection=True, tie_word_embeddings=True)
    assert model(torch.randint(31, (2, 5))).logits.shape == (2, 5, 31)


def test_loss_is_shifted_cross_entropy():
    model = make_model()
    ids = torch.randint(31, (3, 7))
    output = model(ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].reshape(-1, 31), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, expected, rtol=1e-14, atol=0)


def test_ignored_labels_and_padding_do_not_count():
    model = make_model()
    ids = torch.randint(31, (2, 7))
    labels = ids.clone()
    labels[0, 3] = -100
    losses = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(model(ids, labels=labels).loss, losses[counted].mean(), rtol=1e-14, atol=0)

    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    torch.testing.assert_close(model(ids, mask, labels=ids).loss, losses[mask[:, 1:].bool()].mean(), rtol=1e-13, atol=0)


def test_left_padded_rows_score_as_alone():
    model = make_model()
    ids = torch.randint(31, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    torch.testing.assert_close(model(ids, mask).logits[0, 3:], model(ids[:1, 3:]).logits[0], rtol=0, atol=1e-13)


def test_half_precision_loss_is_computed_in_float32():
    model = make_model()
    logits, targets = torch.randn(5, 31, dtype=torch.bfloat16) * 8, torch.randint(31, (5,))
    assert model.loss_function(logits, targets).dtype == torch.float32
    torch.testing.assert_close(
        model.loss_function(logits, targets), F.cross_entropy(logits.float(), targets), rtol=0, atol=0
    )


def test_bad_labels_are_explained():
    model = make_model()
    ids = torch.randint(31, (2, 7))
    with pytest.raises(ValueError, match="shift by one"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="targets: expected int64"):
        model(ids, labels=ids.float())
    with pytest.raises(ValueError, match=r"got \[77\]"):
        model(ids, labels=ids.clone().index_put((torch.tensor(0), torch.tensor(3)), torch.tensor(77)))
