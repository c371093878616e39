"""Backends by name, and what a user may get wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tlstm_kernels import ArgumentError
from tlstm_kernels.gpu import KNOWN_GPUS
from torch.nn.utils.rnn import pack_sequence

from tlstm.functional import (
    BackendUnavailableError,
    LSTMOptions,
    available_backends,
    dispatch,
    explain_backends,
    lstm,
    resolve_backend,
)
from tlstm.layer import LSTM


def test_auto_on_a_cpu_is_native():
    assert resolve_backend("auto", "cpu") == "native"
    assert resolve_backend("reference", torch.device("cpu")) == "reference"
    assert available_backends("cpu") == ["native", "reference"]


def test_triton_says_why_it_cannot_run(monkeypatch):
    with pytest.raises(BackendUnavailableError, match=r"need a GPU and the tensors are on cpu.*backend='auto'.*native"):
        resolve_backend("triton", "cpu")
    module = LSTM(5, 7, backend="triton")  # the tensors' device is not known yet
    with pytest.raises(BackendUnavailableError, match="tensors are on cpu"):
        module(torch.randn(2, 1, 5))

    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: False)
    assert explain_backends("cuda")["triton"] == "torch sees no GPU"
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in explain_backends("cpu")["triton"]
    with pytest.raises(BackendUnavailableError, match="not installed"):
        LSTM(5, 7, backend="triton")
    module = LSTM(5, 7)
    with pytest.raises(BackendUnavailableError, match="not installed"):
        module.backend = "triton"
    assert module.backend == "auto"


@pytest.mark.parametrize(
    ("capability", "reason"), [((8, 0), None), ((9, 0), None), ((7, 5), r"8.0 or newer and this GPU has 7.5")]
)
def test_auto_takes_triton_on_a_gpu_that_can(monkeypatch, capability, reason):
    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch.torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch, "trial_refusal", lambda *key: None)
    assert resolve_backend("auto", "cuda") == ("triton" if reason is None else "native")
    if reason is not None:
        assert reason in explain_backends("cuda:0")["triton"]


CHOICES = {
    # H, B, gradients, options of the call -> auto
    "on the chip": ((768, 16, True), {}, "triton"),
    "wide": ((2048, 16, False), {}, "native"),
    "the backward pass would stream": ((1024, 64, True), {}, "native"),
    "the forward pass alone does not": ((1024, 64, False), {}, "triton"),
    "several launches": ((256, 4096, False), {}, "native"),
    "resets, which torch has not": ((2048, 16, False), {"resets": True}, "triton"),
    "cell states, which torch has not": ((2048, 16, False), {"beyond_torch": True}, "triton"),
    "heads, which torch multiplies out": ((2048, 16, False), {"num_heads": 4}, "triton"),
    "both directions": ((512, 16, True), {"bidirectional": True}, "triton"),
    "float64": ((64, 16, True), {"dtype": torch.float64}, "native"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_leaves_to_torch_what_would_not_stay_on_the_chip(monkeypatch, name):
    plan_at_hand = pytest.importorskip("tlstm_kernels.plan_at_hand", reason="needs triton")
    monkeypatch.setattr(plan_at_hand, "gpu_of", lambda index: KNOWN_GPUS["H100"])
    monkeypatch.setattr(plan_at_hand, "_usual_plan", plan_at_hand._plan)
    monkeypatch.setattr(dispatch, "why_unavailable", lambda name, device: None)
    monkeypatch.setattr(dispatch, "trial_refusal", lambda *key: None)
    (H, B, gradients), call, expected = CHOICES[name]
    call = dict(call)
    dtype, resets = call.pop("dtype", torch.bfloat16), call.pop("resets", False)
    beyond = call.pop("beyond_torch", False)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=dtype, requires_grad=gradients)
    arguments = (x, B, (None, torch.empty(4 * H, 1)), LSTMOptions(**call), beyond, resets)
    assert dispatch._pick("auto", *arguments) == expected
    assert dispatch._pick("triton", *arguments) == "triton"
    with torch.no_grad():
        assert dispatch._pick("auto", *arguments) == ("triton" if "stream" in name else expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # for whatever sizes
    assert dispatch._pick("auto", *arguments) == ("native" if dtype == torch.float64 else "triton")


def test_triton_is_refused_on_amd(monkeypatch):
    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch.torch.version, "hip", "6.4")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(BackendUnavailableError, match=r"AMD.*coherent L2 cache"):
        resolve_backend("triton", "cuda")


@pytest.mark.parametrize("name", ["cudnn", "", None, 3])
def test_unknown_backend(name):
    for call in (lambda: LSTM(5, 7, backend=name), lambda: resolve_backend(name, "cpu")):
        with pytest.raises(ValueError, match="'auto', 'triton', 'native', 'reference'; received"):
            call()


def test_backend_can_be_changed_later():
    module = LSTM(5, 7)
    x = torch.randn(6, 3, 5)
    native = module(x)[0]
    module.backend = "reference"
    assert "Reference" in module(x)[0].grad_fn.name()
    torch.testing.assert_close(module(x)[0], native)
    with pytest.raises(ValueError, match="received 'fast'"):
        module.backend = "fast"


@pytest.mark.parametrize("backend", available_backends())
def test_function_takes_flat_weights(backend):
    module = torch.nn.LSTM(5, 7, 2, bidirectional=True)
    x, state = torch.randn(6, 3, 5), (torch.randn(4, 3, 7), torch.randn(4, 3, 7))
    options = LSTMOptions(num_layers=2, bidirectional=True)
    actual = lstm(x, state, tuple(module.parameters()), options, backend=backend)
    torch.testing.assert_close(actual, module(x, state))


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
def test_native_export_with_lengths_says_what_to_do():
    with pytest.raises(BackendUnavailableError, match="Export with backend='reference'"):
        torch.export.export(LSTM(5, 7), (torch.randn(4, 2, 5),), {"lengths": torch.tensor([2, 4])})


STATE = torch.zeros(1, 3, 7)
X = torch.zeros(6, 3, 5)
BAD_CALLS = {
    "not a tensor": (([1, 2],), {}, "expected a tensor or a PackedSequence; received list"),
    "token ids": ((X.long(),), {}, r"expected a floating point tensor.*received torch.int64.*embedding"),
    "wrong dtype": ((X.double(),), {}, r"expected torch.float32.*received torch.float64.*layer.to\(torch.float64\)"),
    "wrong device": ((X.to("meta"),), {}, r"expected a tensor on cpu.*received one on meta"),
    "wrong width": ((torch.zeros(6, 3, 4),), {}, r"input_size = 5; received shape \(6, 3, 4\)"),
    "one dimension": ((torch.zeros(5),), {}, r"expected 2-D or 3-D.*received shape \(5,\)"),
    "four dimensions": ((torch.zeros(1, 6, 3, 5),), {}, r"received shape \(1, 6, 3, 5\)"),
    "packed of the wrong width": ((pack_sequence([torch.zeros(2, 4)]),), {}, r"= 5; received shape \(2, 4\)"),
    "packed of the wrong dtype": ((pack_sequence([torch.zeros(2, 5).double()]),), {}, r"received torch.float64"),
    "packed with a wrong state": ((pack_sequence([X[:, 0]]), (STATE, STATE)), {}, r"expected shape \(1, 1, 7\)"),
    "one state": ((X, STATE), {}, r"expected a tuple of two tensors \(h_0, c_0\); received a tensor of shape"),
    "three states": ((X, (STATE,) * 3), {}, r"expected a tuple of two tensors.*received a tuple of 3"),
    "state without c": ((X, (STATE, None)), {}, r"c_0: expected a tensor of shape \(1, 3, 7\); received NoneType"),
    "wrong h_0": ((X, (STATE[..., 1:], STATE)), {}, r"h_0: expected shape \(1, 3, 7\).*received \(1, 3, 6\)"),
    "wrong c_0": ((X, (STATE, STATE[:, 1:])), {}, r"c_0: expected shape \(1, 3, 7\).*received \(1, 2, 7\)"),
    "unbatched state": ((X, (STATE[:, 0], STATE[:, 0])), {}, r"\(1, 3, 7\).* batched input; received \(1, 7\)"),
    "batched state": ((X[:, 0], (STATE, STATE)), {}, r"expected shape \(1, 7\).*unbatched input; received \(1, 3, 7\)"),
    "state of another dtype": ((X, (STATE, STATE.double())), {}, r"c_0: expected torch.float32"),
    "lengths as a list": ((X,), {"lengths": [6, 2, 1]}, r"shape \(3,\); received a list of 3"),
    "real lengths": ((X,), {"lengths": torch.ones(3)}, r"expected an integer tensor; received torch.float32"),
    "too few lengths": ((X,), {"lengths": torch.tensor([6, 2])}, r"expected shape \(3,\).*received \(2,\)"),
    "too long": ((X,), {"lengths": torch.tensor([6, 7, 1])}, r"from 0 to 6.*received values from 1 to 7"),
    "negative": ((X,), {"lengths": torch.tensor([6, -1, 1])}, r"received values from -1 to 6"),
    "unbatched lengths": ((X[:, 0],), {"lengths": torch.tensor([6])}, r"expected None for an unbatched input"),
    "packed lengths": ((pack_sequence([X[:, 0]]),), {"lengths": torch.tensor([6])}, r"expected None with a Packed"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("backend", available_backends())
def test_wrong_arguments(name, backend):
    args, kwargs, message = BAD_CALLS[name]
    module = LSTM(5, 7, backend=backend)
    with pytest.raises(ArgumentError, match=message):
        module(*args, **kwargs)


@pytest.mark.parametrize(
    "name", ["wrong dtype", "wrong width", "one dimension", "wrong h_0", "wrong c_0", "batched state"]
)
def test_errors_are_of_the_kind_that_torch_raises(name):
    args, kwargs, _ = BAD_CALLS[name]
    with pytest.raises((ValueError, RuntimeError)) as torchs:
        torch.nn.LSTM(5, 7)(*args, **kwargs)
    with pytest.raises(type(torchs.value)):
        LSTM(5, 7)(*args, **kwargs)


@pytest.mark.parametrize("p", [-0.1, 1.5, "0.5", True, None])
def test_weight_dropout_is_a_probability(p):
    with pytest.raises(ValueError, match=r"weight_dropout: expected a number in \[0, 1\]"):
        LSTM(5, 7, weight_dropout=p)
