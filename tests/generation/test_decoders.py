"""Every decoder makes the tokens of the plain loop; the choice among them, and what each one refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

from tlstm import LSTMForCausalLM
from tlstm.generation.decoders import DecoderRefusedError, graph_step, lean_step
from tlstm.generation.graph_step import GraphError, GraphStep
from tlstm.generation.loop import DecodeLoop
from tlstm.generation.model_step import PlainStep
from tlstm.generation.request import read_request
from tlstm.generation.rows import Rows

ROOT = Path(__file__).parents[2]
SAMPLING = {"do_sample": True, "seed": 3, "temperature": 1.2}
MODELS = [
    {},
    {"num_layers": 1, "bias": False, "head_bias": False},
    {"num_layers": 3, "residual": True},
    {"layer_sizes": [7, 11, 11], "residual": True, "embedding_size": 5},
    {"num_layers": 3, "proj_size": 5, "residual": True},
    {"hidden_size": 11, "embedding_size": 7, "output_projection": True, "tie_word_embeddings": True},
    {"vocab_size": 65, "embedding_size": 7, "num_layers": 1},  # the table of gates would be larger than the model
]


def run(model, *args, **settings):
    return model.generate(*args, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("settings", MODELS, ids=str)
def test_lean_logits_are_the_models_within_rounding(build_model, settings) -> None:
    """Against float64: at most twice the error of the model's own float32, root mean square, in logits and states."""
    model = build_model(sharpness=0.7, dtype=torch.float32, **settings)
    exact = copy.deepcopy(model).double()
    ids = torch.randint(model.config.vocab_size, (5, 35), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, own = exact(ids), model(ids)

    def errors(logits, state) -> list[float]:
        pairs = [(logits, expected.logits)]
        pairs += zip((*state.h, *state.c), (*expected.state.h, *expected.state.c), strict=True)
        differences = [(mine.double() - theirs).flatten() for mine, theirs in pairs]
        return [float(part.square().mean().sqrt()) for part in (differences[0], torch.cat(differences[1:]))]

    for tokens in (1, 10**6):  # without and with gates that are looked up
        step = lean_step(model, tokens)
        step.extend(model.zero_state(5))
        with torch.inference_mode():
            got = torch.stack([step(column).clone() for column in ids.t()], dim=1)
        assert got.dtype == torch.float32
        for mine, theirs in zip(errors(got, step.recurrent), errors(own.logits, own.state), strict=True):
            assert mine <= 2 * theirs


@pytest.mark.parametrize("settings", MODELS, ids=str)
@pytest.mark.parametrize("request_", [{}, {**SAMPLING, "eos_token_id": [5, 7], "pad_token_id": 0}], ids=["greedy", ""])
def test_lean_and_loop_make_the_same_tokens(build_model, prompts, settings, request_) -> None:
    # In float64, because these random models multiply a rounding error some ten thousand times within 40 tokens.
    model = build_model(dtype=torch.float64, **settings)
    for some in (prompts, prompts[2:3]):
        expected = run(model, some, max_new_tokens=40, decoder="loop", **request_)
        out = run(model, some, max_new_tokens=40, decoder="lean", **request_)
        assert out.new_tokens == expected.new_tokens
        assert out.finish_reasons == expected.finish_reasons
        assert (out.decoder.name, expected.decoder.name) == ("lean", "loop")
        for mine, theirs in zip(out.state.recurrent.c, expected.state.recurrent.c, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def test_lean_and_loop_make_the_same_text_of_the_shipped_checkpoint() -> None:
    model = LSTMForCausalLM.from_pretrained(ROOT / "model_cards" / "shakespeare-char", dtype="float32")
    texts = [
        run(model, [[1, 2, 3], [4]], max_new_tokens=99, do_sample=True, seed=5, temperature=0.8, decoder=name)
        for name in ("lean", "loop")
    ]
    assert texts[0].new_tokens == texts[1].new_tokens


def test_scores_and_logits_of_each_step_are_kept_apart(model, prompts) -> None:
    settings = {"max_new_tokens": 9, "output_scores": True, "output_logits": True, "eos_token_id": [5], **SAMPLING}
    lean, loop = (run(model, prompts, decoder=name, pad_token_id=0, **settings) for name in ("lean", "loop"))
    for mine, theirs in ((lean.scores, loop.scores), (lean.logits, loop.logits)):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), rtol=1e-4, atol=1e-5)
    greedy = run(model, prompts, max_new_tokens=9, output_scores=True, decoder="lean")  # whose scores are the logits
    assert not torch.equal(greedy.scores[0], greedy.scores[1])


def test_lean_reads_the_weights_of_the_moment(build_model) -> None:
    model = build_model()
    before = model.generate([[1, 2]], max_new_tokens=20, decoder="lean")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(-0.8)
    after = model.generate([[1, 2]], max_new_tokens=20, decoder="lean")
    assert torch.equal(after, model.generate([[1, 2]], max_new_tokens=20, decoder="loop"))
    assert not torch.equal(after, before)


def test_lean_leaves_the_state_that_it_continues(model) -> None:
    state = model.prefill([[1, 2, 3]])
    kept = copy.deepcopy(state.recurrent)
    first = model.generate(state=state, max_new_tokens=9, decoder="lean")
    assert torch.equal(model.generate(state=state, max_new_tokens=9, decoder="lean"), first)
    assert all(map(torch.equal, (*state.recurrent.h, *state.recurrent.c), (*kept.h, *kept.c)))


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_the_choice_says_why_faster_ones_were_not_taken(build_model) -> None:
    choice = run(build_model(), [[1]], max_new_tokens=2).decoder
    assert choice.name == "lean"
    assert str(choice).startswith("lean; not kernel: it needs a CUDA GPU, and the model is on cpu; not graph: ")
    stream = build_model().generate_stream([[1]], max_new_tokens=2)
    assert stream.decoder == choice
    narrow = run(build_model(dtype=torch.bfloat16), [[1]], max_new_tokens=2).decoder
    assert narrow.name == "loop"
    assert "bfloat16" in narrow.refused["lean"]
    assert 'dtype="float32"' in narrow.refused["lean"]


class _Louder(LSTMForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output


class _Negated(torch.nn.Module):
    def forward(self, weight):
        return -weight


def _hooked(model):
    model.model.layers[1].register_forward_hook(lambda module, args, output: (-output[0], output[1]))


def _parametrized(model):
    parametrize.register_parametrization(model.lm_head, "weight", _Negated())


def _reference(model):
    model.model.layers[0].backend = "reference"


def _replaced(model):
    class Head(torch.nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    head = Head(7, 13, dtype=model.dtype)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head


def _zoned_out(model) -> None:
    model.model.layers[1].zoneout = (0.5, 0.5)


def _negated_layer(model) -> None:
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (-(result := forward(*args, **kwargs))[0], result[1])


def _negated_features(model) -> None:
    class Negated(torch.nn.Identity):
        def forward(self, x):
            return -x

    model.model.projection = Negated()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "model.layers.1 has a forward hook"),
        (_parametrized, "lm_head has a parametrization"),
        (_reference, "the backend 'reference' was asked for by name"),
        (_replaced, "Head stands in the place of Linear"),
        (_zoned_out, "a layer has zoneout or several heads"),
        (_negated_layer, "model.layers.1 has a forward pass of its own"),
        (_negated_features, "Negated stands in the place of Identity"),
    ],
)
def test_lean_refuses_a_model_that_its_weights_do_not_describe(build_model, change, reason) -> None:
    model = build_model()
    before = model.generate([[1, 2]], max_new_tokens=20)
    change(model)
    out = run(model, [[1, 2]], max_new_tokens=20)
    assert (out.decoder.name, out.decoder.refused["lean"]) == ("loop", reason)
    assert change is _reference or not torch.equal(out.sequences, before)
    with pytest.raises(ValueError, match=f"decoder='lean' cannot serve this request: {reason}; use decoder='auto'"):
        model.generate([[1, 2]], decoder="lean")


def test_lean_refuses_another_forward_autocast_and_strangers(build_model, model) -> None:
    louder = _Louder(model.config).eval()
    assert run(louder, [[1]], max_new_tokens=2).decoder.refused["lean"] == "_Louder has a forward pass of its own"
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model, [[1]], max_new_tokens=2).decoder.refused["lean"] == "autocast is on"

    class Stranger:
        device = torch.device("cpu")

    with pytest.raises(DecoderRefusedError, match=r"Stranger does not tell its step_weights\(\)"):
        lean_step(Stranger(), 1)


def test_lean_refuses_settings_that_it_does_not_know(build_model, monkeypatch) -> None:
    """As a later version's option that changes the equations would be."""
    model = build_model(forget_bias=1.0)
    known = __import__("tlstm.models.decoding", fromlist=["_UNDERSTOOD"])
    monkeypatch.setattr(known, "_UNDERSTOOD", known._UNDERSTOOD - {"forget_bias"})
    assert model.step_weights() == "it does not know the setting forget_bias"


def test_pinned_decoders_say_why_they_cannot_run(model) -> None:
    for name in ("kernel", "graph"):
        with pytest.raises(ValueError, match=f"decoder='{name}' cannot serve this request: it needs a CUDA GPU"):
            model.generate([[1]], decoder=name)
    with pytest.raises(ValueError, match="decoder"):
        model.generate([[1]], decoder="fast")


# ---- the graphed step, recorded without a GPU as the function itself -------------------------------------------------


def graphed(model, prompts, capture=lambda function: function, **settings) -> DecodeLoop:
    request = read_request(model, prompts, None, None, None, None, "auto", settings)
    step = GraphStep(model, len(prompts), capture)
    loop = DecodeLoop(Rows(step, request.config, 13, model.device), request.state, request.config)
    while not loop.finished:
        loop.step()
    return loop


@pytest.mark.parametrize("request_", [{}, {**SAMPLING, "eos_token_id": [5, 7]}], ids=["greedy", "sampling"])
def test_graphed_step_makes_the_tokens_of_the_loop(model, prompts, request_) -> None:
    """Rows leave at different steps: the buffers keep their size, the rows that are left keep their states."""
    loop = graphed(model, prompts, max_new_tokens=30, **request_)
    expected = run(model, prompts, max_new_tokens=30, decoder="loop", **request_)
    assert loop.new_tokens == expected.new_tokens
    assert loop.finish_reasons == expected.finish_reasons
    for mine, theirs in zip(loop.state().recurrent.c, expected.state.recurrent.c, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_graphed_step_takes_rows_where_others_left(model) -> None:
    step, plain, ids = GraphStep(model, 6, lambda function: function), PlainStep(model), torch.tensor([1, 2, 3, 4, 5])
    starts = model.prefill([[3, 1], [4, 1, 5], [9, 2], [6, 5, 3], [5, 8]]).recurrent
    first, rest, more = (starts.select(torch.tensor(rows)) for rows in ([0, 1, 2], [3], [4, 0, 1]))
    with torch.inference_mode():
        for act in (
            lambda s: s.extend(first),
            lambda s: s(ids[:3]),
            lambda s: s.select(torch.tensor([2, 0])),
            lambda s: s(ids[:2]),
            lambda s: s.extend(rest),  # into the free place
            lambda s: s(ids[1:4]),
            lambda s: s.extend(more),  # up to the last place
            lambda s: s(torch.tensor([1, 2, 3, 4, 5, 6])),
        ):
            got, expected = act(step), act(plain)
            if expected is not None:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_recording_that_is_wrong_or_fails_is_noticed(model, prompts) -> None:
    with pytest.raises(GraphError, match="gives other results than the model"):
        graphed(model, prompts, capture=lambda function: lambda: None)

    def fail(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(GraphError, match=r"recording the step failed \(operation not permitted.*capturing\)"):
        graphed(model, prompts, capture=fail)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_graph_on_a_gpu_makes_the_tokens_of_the_loop(build_model, prompts, dtype) -> None:
    model = build_model(dtype=dtype).cuda()
    assert graph_step(model, 5) is not None
    for request_ in ({}, {**SAMPLING, "eos_token_id": [5, 7], "pad_token_id": 0}):
        expected = run(model, prompts, max_new_tokens=30, decoder="loop", **request_)
        out = run(model, prompts, max_new_tokens=30, decoder="graph", **request_)
        assert out.new_tokens == expected.new_tokens
        assert out.decoder.name == "graph"
