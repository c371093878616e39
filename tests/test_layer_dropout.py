"""Dropout from a seed: its masks by the published generator, the same in every backend, form and batch."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tlstm.functional import available_backends
from tlstm.functional.dropout import dropout_between_layers, seed_tensor, weight_dropout
from tlstm.layer import LSTM

both_backends = pytest.mark.parametrize("backend", available_backends())
T, B, I, H = 6, 3, 5, 7


def words(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on Python's own integers, as Salmon et al. (2011) print it."""
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1])
def test_masks_are_those_of_the_generator(seed):
    key, p = (seed & 0xFFFFFFFF, seed >> 32), 0.3
    tensor = seed_tensor(seed, torch.device("cpu"))
    between = dropout_between_layers(torch.ones(T, B, H), p, tensor, 2, None, None)
    weight = weight_dropout(torch.ones(4 * H, H), p, tensor, 2, 1)
    for column in range(H):
        for t in range(T):
            for row in range(B):
                kept = words(column // 4, t, row, 4 + 2 * 2, *key)[column % 4] >= round(p * 2**32)
                assert (between[t, row, column] != 0) == kept
        for row in range(4 * H):
            kept = words(column // 4, row, 1, 5 + 2 * 2, *key)[column % 4] >= round(p * 2**32)
            assert (weight[row, column] != 0) == kept
    assert set(between.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p)))}


def test_each_entry_is_dropped_with_its_probability():
    seeds = [seed_tensor(n, torch.device("cpu")) for n in range(200)]
    kept = torch.stack([dropout_between_layers(torch.ones(T, B, H), 0.3, s, 0, None, None) != 0 for s in seeds])
    count = int((~kept).sum())
    assert stats.binomtest(count, kept.numel(), 0.3).pvalue > 1e-3
    per_entry = (~kept).sum(0).flatten().numpy()
    assert stats.chisquare(per_entry, [count / per_entry.size] * per_entry.size).pvalue > 1e-3


@both_backends
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_heads": 7}])
def test_the_layer_uses_these_masks(backend, options):
    """Layer after layer through torch.nn.functional's LSTM cell, with the masks put in by hand."""
    module = LSTM(I, H, 2, dropout=0.4, weight_dropout=0.25, backend=backend, **options)
    x, seed = torch.randn(T, B, I), seed_tensor(11, torch.device("cpu"))
    y, (h_n, c_n) = module(x, dropout_seed=11)
    D = 1 + module.bidirectional
    for layer in range(2):
        single = LSTM(x.shape[-1], H, backend="reference", **options)
        for name, parameter in single.named_parameters():
            value = module.get_parameter(name.replace("_l0", f"_l{layer}")).detach()
            if "weight_hh" in name:
                value = weight_dropout(value, 0.25, seed, layer, int("reverse" in name))
            parameter.data.copy_(value)
        x, (h, c) = single(x)
        torch.testing.assert_close(h_n[layer * D : (layer + 1) * D], h)
        torch.testing.assert_close(c_n[layer * D : (layer + 1) * D], c)
        if layer == 0:
            x = dropout_between_layers(x, 0.4, seed, 0, None, None)
    torch.testing.assert_close(y, x)
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_all_backends_draw_the_same():
    x, gradients = torch.randn(T, B, I), []
    source = LSTM(I, H, 3, dropout=0.5, weight_dropout=0.5)
    for backend in available_backends():
        source.backend = backend
        y, _ = source(x, dropout_seed=torch.tensor(3))
        gradients.append([y, *torch.autograd.grad(y.sum(), list(source.parameters()))])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@both_backends
def test_a_row_gets_the_same_masks_whatever_stands_beside_it(backend):
    """In a batch, alone at its place, padded, packed, batch first, longer or shorter."""
    module = LSTM(I, H, 3, dropout=0.5, backend=backend)
    x, lengths = torch.randn(T, B, I), torch.tensor((2, 6, 4))
    y, _ = module(x, lengths=lengths, dropout_seed=5)
    longer, _ = module(torch.cat((x, x)), dropout_seed=5)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(y[:length, row], longer[:length, row])
    packed, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False), dropout_seed=5)
    torch.testing.assert_close(pad_packed_sequence(packed)[0], y)
    ordered, _ = module(pack_padded_sequence(x[:, :1], lengths[:1]), dropout_seed=5)
    torch.testing.assert_close(ordered.data, y[:2, 0])
    module.batch_first = True
    torch.testing.assert_close(module(x.transpose(0, 1), lengths=lengths, dropout_seed=5)[0], y.transpose(0, 1))
    with_resets = module(
        x.transpose(0, 1), resets=torch.zeros(B, T).bool().index_fill(1, torch.tensor(0), True), dropout_seed=5
    )
    torch.testing.assert_close(with_resets[0][1], y[:, 1])


@both_backends
def test_seeds_and_generators(backend):
    module, x = LSTM(I, H, 2, dropout=0.5, weight_dropout=0.5, backend=backend), torch.randn(T, B, I)
    before = torch.random.get_rng_state()
    first = module(x, dropout_seed=1)[0]
    assert torch.equal(first, module(x, dropout_seed=torch.tensor([1], dtype=torch.int32))[0])
    assert not torch.equal(first, module(x, dropout_seed=2)[0])
    assert not torch.equal(first, module(x, dropout_seed=1 + 2**32)[0])
    assert torch.equal(torch.random.get_rng_state(), before)  # torch's own generator is left alone
    generator = torch.Generator().manual_seed(3)
    drawn = [module(x, dropout_seed=generator)[0] for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(drawn[0], module(x, dropout_seed=generator.manual_seed(3))[0])
    assert torch.equal(module.eval()(x, dropout_seed=1)[0], module(x)[0])


@both_backends
def test_everything_dropped(backend):
    module, x = LSTM(I, H, 2, dropout=1.0, backend=backend), torch.randn(T, B, I)
    torch.testing.assert_close(module(x, dropout_seed=1), module(x))


@pytest.mark.parametrize("wrong", [-1, 2**64, 1.5, "7", True, torch.tensor([1, 2]), torch.tensor(0.5)])
def test_wrong_seeds(wrong):
    with pytest.raises(ValueError, match="dropout_seed: expected a whole number from 0 to 2"):
        LSTM(I, H, 2, dropout=0.5)(torch.randn(T, B, I), dropout_seed=wrong)


def test_a_seed_that_is_a_tensor_is_an_input_of_the_compiled_graph():
    module, x, compilations = LSTM(I, H, 2, dropout=0.5, backend="reference"), torch.randn(T, B, I), []

    def count(graph_module, _):
        compilations.append(graph_module)
        return graph_module.forward

    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(lambda x, seed: module(x, dropout_seed=seed)[0], fullgraph=True, backend=count)
        for seed in (torch.tensor(1), torch.tensor(2**40)):
            torch.testing.assert_close(compiled(x, seed), module(x, dropout_seed=seed)[0])
    assert len(compilations) == 1
