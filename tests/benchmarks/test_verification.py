"""A provider that is wrong in any way gets an error and no time; one that is right gets a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tlstm.benchmark.decode import DecodeProblem, DecodeTruth, decode_registry
from tlstm.benchmark.problem import Problem, run_in_pieces
from tlstm.benchmark.providers import Built, Provider, provider, registry
from tlstm.benchmark.runner import measure
from tlstm.benchmark.verification import Truth, WrongResultError
from tlstm.benchmark.workload import Workload

from .conftest import TINY, lookup, of_torch

OWN = ["tlstm", "tlstm:native", "tlstm:reference", "tlstm:recompute", "torch-loop"]
OPTIONS = [
    TINY,
    replace(TINY, layers=2, bidirectional=True),
    replace(TINY, proj_size=3),
    replace(TINY, resets=0.3),
    replace(TINY, T=1, B=1),
]


@pytest.mark.parametrize("workload", OPTIONS, ids=Workload.label)
@pytest.mark.parametrize("name", OWN)
def test_every_provider_of_ours_is_right(name, workload):
    for mode, dtype in (("train", "float32"), ("forward", "bfloat16")):
        problem = Problem(workload, mode, dtype, "cpu")
        verdict = Truth(problem).check(provider(name).build(problem))
        assert 0 <= verdict.share <= 1


def test_exact_results_with_resets_are_those_of_torchs_cell():
    """Step by step with LSTMCell, against the calls of LSTM on the pieces."""
    workload = replace(TINY, resets=0.4, T=11)
    problem = Problem(workload, "forward", "float32", "cpu", seed=3)
    cell = torch.nn.LSTMCell(TINY.I, TINY.H)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in problem.module.state_dict().items()})
    h, c = torch.zeros(2, TINY.B, TINY.H)
    for t, x in enumerate(problem.xs[0]):
        keep = ~problem.resets[t, :, None]
        h, c = cell(x, (h * keep, c * keep))
    y = run_in_pieces(problem.module, problem.xs[0], problem.resets)
    assert problem.resets.any()
    assert torch.allclose(y[-1], h, atol=1e-6)


WRONG = {
    "off by a little": lambda y: y * 1.001,
    "one step late": lambda y: y.roll(1, 0),
    "one element": lambda y: torch.cat((y.flatten()[:-1], y.flatten()[-1:] + 1e-4)).view_as(y),
    "NaN": lambda y: y * float("nan"),
    "another shape": lambda y: y[:-1],
    "no gradient to the weights": lambda y: y.detach() + 0 * y.sum(),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_provider_gets_no_time(kind, tiny):
    rows = measure(
        tiny, "train", "float32", ["bad", "good"], "cpu", 0.01,
        lookup=lookup(of_torch("bad", WRONG[kind]), of_torch("good")),
    )  # fmt: skip
    bad, good = rows
    assert bad["status"] in ("wrong", "failed")
    assert bad["error"]
    assert not {"ms_p50", "us_per_step", "speedup_p50", "turns"} & bad.keys()
    assert good["status"] == "ok"
    assert good["ms_p50"] > 0


def test_a_provider_that_raises_is_told_and_the_others_are_measured(tiny):
    def broken(problem):
        raise KeyError("its kernel is gone")

    late = of_torch("late", on_call=lambda n: 1 / (2 - n))  # right when it is verified, then it breaks
    rows = measure(
        tiny, "forward", "float32", ["broken", "late", "torch"], "cpu", 0.01,
        lookup=lookup(Provider("broken", "", lambda p: None, broken), late, of_torch("torch")),
    )  # fmt: skip
    assert [row["status"] for row in rows] == ["failed", "failed", "ok"]
    assert rows[0]["error"] == "KeyError: 'its kernel is gone'"
    assert "ZeroDivisionError" in rows[1]["error"]
    assert "ms_p50" not in rows[1]


def test_what_is_granted_follows_the_dtype(tiny):
    granted = {}
    for dtype in ("bfloat16", "float16", "float32"):
        granted[dtype] = Truth(Problem(tiny, "forward", dtype, "cpu")).allowed["y"]
    assert granted["bfloat16"] > granted["float16"] > granted["float32"]
    assert granted["float32"] < 1e-5


@pytest.mark.parametrize("dtype", ["tf32", "float32", "bfloat16"])
def test_the_precision_of_products_is_the_rows_and_cudnn_stays_on(dtype, tiny):
    def settings() -> tuple:
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return (
            cudnn.enabled,
            cudnn.benchmark,
            cudnn.deterministic,
            cudnn.allow_tf32,
            cuda.allow_tf32,
            cuda.fp32_precision,
        )

    before = settings()
    allowed = dtype == "tf32"
    with Problem(tiny, "forward", dtype, "cpu").precision():
        assert settings()[:5] == (*before[:3], allowed, allowed)
        assert (settings()[5] == "tf32") == allowed  # what the library's own plans go by
    assert before[0] is True
    assert settings() == before


def test_weights_in_another_layout_are_not_compared_but_the_input_is(tiny):
    problem = Problem(tiny, "train", "float32", "cpu")
    leaf = torch.ones(1, requires_grad=True)
    right = Built(lambda x: problem.module(x)[0] * leaf, {"own": leaf}, torch_layout=False)
    assert Truth(problem).check(right).share <= 1
    wrong = Built(lambda x: problem.module(x.detach())[0] * leaf + 0 * x.sum(), {"own": leaf}, torch_layout=False)
    with pytest.raises(WrongResultError, match="d_x: error"):
        Truth(problem).check(wrong)


def test_why_a_provider_cannot_run_here(tiny):
    problem = Problem(replace(tiny, resets=0.3), "forward", "float32", "cpu")
    reasons = {name: each.why_not(problem) for name, each in registry().items()}
    assert "has no resets" in reasons["torch"]
    assert "need a GPU" in reasons["torch-graph"]
    assert reasons["tlstm"] is None
    for name in ("flashrnn", "flashrnn-triton", "haste", "xlstm", "torchrl"):
        assert "is not installed" in reasons[name]
    assert provider("tlstm:streamed").why_not(problem) == "launch plans are for a GPU"
    assert provider("tlstm[forward: units=8]").why_not(problem) == "launch plans are for a GPU"
    for name in ("nonsense", "tlstm:nonsense", "tlstm-x", "tlstm[units=8]"):
        with pytest.raises(ValueError, match="expected"):
            provider(name)


def test_decoders_write_the_best_tokens_and_others_are_refused():
    workload = Workload(T=9, B=3, H=13, I=7, layers=2, vocab=17)
    problem = DecodeProblem(workload, "float32", "cpu")
    truth, providers = DecodeTruth(problem), decode_registry()
    right = {name: providers[name].build(problem) for name in ("tlstm", "tlstm:lean", "tlstm:loop", "torch")}
    assert torch.equal(right["tlstm"].run(problem.xs[0]), right["torch"].run(problem.xs[0]))
    assert all(truth.check(built).share <= 1 for built in right.values())

    def decoder(change):
        return Built(lambda prompt: change(right["torch"].run(prompt)), {})

    for change, message in (
        (lambda tokens: tokens.roll(1, 1), "behind the best"),
        (lambda tokens: tokens[:, :-1], "expected shape"),
        (lambda tokens: tokens + 17, "expected ids of 0..16"),
    ):
        with pytest.raises(WrongResultError, match=message):
            truth.check(decoder(change))
