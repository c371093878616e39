"""What the decode kernel is asked to do, and what it refuses before a GPU is touched."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tlstm.generation.config import GenerationConfig

pytest.importorskip("triton", reason="the decode kernel is written in triton")
from tlstm_kernels import plan_at_hand
from tlstm_kernels.decode_shape import Choice
from tlstm_kernels.gpu import KNOWN_GPUS

from tlstm.generation import gpu_model
from tlstm.generation.gpu_model import choice_of, flags_of, packed_weights, refuse, settings_of, shape_of


class OnGPU:
    """A model as refuse() sees one on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, model) -> None:
        self.step_weights = model.step_weights


@pytest.fixture
def h100(monkeypatch):
    memory = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(plan_at_hand, "gpu_of", lambda index: KNOWN_GPUS["H100"])
    return memory


def test_a_plain_model_and_request_are_not_refused(build_model, h100) -> None:
    sampling = GenerationConfig(do_sample=True, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, eos_token_id=3)
    for config in (GenerationConfig(), sampling):
        assert refuse(OnGPU(build_model(residual=True, dtype=torch.float32)), config) is None


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("no num_beams", {"num_beams": 2}),
        ("no typical_p", {"do_sample": True, "typical_p": 0.5}),
        ("no no_repeat_ngram_size", {"no_repeat_ngram_size": 2}),
        ("no bad_words_ids", {"bad_words_ids": [[1, 2]]}),
        ("no output_scores", {"output_scores": True, "return_dict_in_generate": True}),
        ("no output_logits", {"output_logits": True, "return_dict_in_generate": True}),
    ],
)
def test_requests_that_are_refused(build_model, h100, reason, settings) -> None:
    assert reason in refuse(OnGPU(build_model()), GenerationConfig(**settings))


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("no proj_size", {"proj_size": 3}),
        ("no output_projection", {"output_projection": True, "embedding_size": 5}),
        ("no float64", {"dtype": torch.float64}),
    ],
)
def test_models_that_are_refused(build_model, h100, reason, settings) -> None:
    assert reason in refuse(OnGPU(build_model(**settings)), GenerationConfig())


def test_a_table_that_is_too_large_is_refused(build_model, h100) -> None:
    h100.total_memory = 1 << 10
    assert "table" in refuse(OnGPU(build_model()), GenerationConfig())


def test_a_model_on_a_cpu_and_strangers_are_refused(build_model, h100) -> None:
    assert "runs on CUDA GPUs" in refuse(build_model(), GenerationConfig())
    stranger = SimpleNamespace(device=OnGPU.device)
    assert "does not tell its step_weights()" in refuse(stranger, GenerationConfig())


def test_numbers_of_the_choice() -> None:
    idle = GenerationConfig(temperature=0.5, top_k=3, top_p=0.5, min_p=0.5)  # without do_sample
    assert choice_of(idle) == Choice()
    assert settings_of(idle).temperature == 1
    config = GenerationConfig(do_sample=True, top_p=1.0, min_p=0.2, temperature=0.5, repetition_penalty=1.5)
    assert choice_of(config) == Choice(sample=True, min_p=True)
    settings = settings_of(config)
    assert (settings.temperature, settings.repetition_penalty, settings.top_p) == (0.5, 1.5, 1.0)
    assert settings.log_min_p == math.log(0.2)


def test_flags_of_tokens() -> None:
    cpu = torch.device("cpu")
    assert flags_of(GenerationConfig(), 5, cpu) is None
    flags = flags_of(GenerationConfig(eos_token_id=[2, 3], suppress_tokens=[0, 3]), 5, cpu)
    assert flags.tolist() == [1, 0, 2, 3, 0]


def test_weights_are_packed_again_when_the_model_changes(build_model) -> None:
    from tlstm_kernels.decode_shape import DecodePlan

    model = build_model()
    shape = shape_of(model)
    plan = DecodePlan(shape, Choice(), 1, 2, 8, 8, 16, 4, 1, (False,) * (2 * shape.layers), "reduce")
    first = packed_weights(model, plan)
    assert packed_weights(model, plan) is first
    with torch.no_grad():
        model.model.embedding.weight.mul_(2)
    second = packed_weights(model, plan)
    assert second is not first
    assert not torch.equal(second.table, first.table)
    assert gpu_model._packed[model][1].keys() == {(plan.programs, plan.units, plan.block_k)}
