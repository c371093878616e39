"""Whether the decode kernel can run a model and a request, and the model's weights as the kernel reads them."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tlstm.generation.config import GenerationConfig
from tlstm.generation.prefill import LanguageModel
from tlstm.generation.step_weights import StepWeights

if TYPE_CHECKING:
    from tlstm_kernels.decode_launch import ChoiceSettings
    from tlstm_kernels.decode_shape import Choice, DecodePlan, DecodeShape
    from tlstm_kernels.decode_weights import PackedWeights

_LARGEST_TABLE = 1 / 8  # of a GPU's memory, for the first layer's input product of every token


def refuse(model: LanguageModel, config: GenerationConfig) -> str | None:
    """Why the decode kernel cannot serve this model and request, or None. Any number of texts takes its turn."""
    device = model.device
    if device.type != "cuda":
        return f"the model is on {device.type}, and the decode kernel runs on CUDA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    reason = _refuse_config(config) or _refuse_model(model)
    if reason is not None:
        return reason
    from tlstm_kernels.decode_plan import refusal
    from tlstm_kernels.plan_at_hand import gpu_of

    assert device.index is not None
    weights = _weights(model)
    table = len(weights.embedding) * len(weights.layers[0].w_hh) * weights.head.element_size()
    memory = torch.cuda.get_device_properties(device).total_memory
    if table > _LARGEST_TABLE * memory:
        return f"the table of the first layer's input product would take {table >> 20} of {memory >> 20} MiB"
    return refusal(shape_of(model), choice_of(config), 1, gpu_of(device.index))


def _refuse_config(config: GenerationConfig) -> str | None:
    unsupported = {
        "num_beams": config.num_beams > 1,
        "typical_p": config.do_sample and config.typical_p is not None and config.typical_p < 1,
        "no_repeat_ngram_size": config.no_repeat_ngram_size > 0,
        "bad_words_ids": bool(config.bad_words_ids),
        "output_scores": config.output_scores,
        "output_logits": config.output_logits,
    }
    return next((f"the decode kernel has no {name}" for name, asked in unsupported.items() if asked), None)


def _refuse_model(model: LanguageModel) -> str | None:
    weights = described(model)
    if isinstance(weights, str):
        return weights
    if weights.projection is not None:
        return "the decode kernel has no output_projection"
    if any(layer.w_hr is not None for layer in weights.layers):
        return "the decode kernel has no proj_size"
    if len({(w.dtype, w.device) for w in (weights.embedding, *weights.products)}) > 1:
        return "the model's weights are not all of one dtype on one device"
    return None


def described(model: LanguageModel) -> StepWeights | str:
    """What a step of the model computes with, or why nobody can tell."""
    tell = getattr(model, "step_weights", None)
    return tell() if callable(tell) else f"{type(model).__name__} does not tell its step_weights()"


def _weights(model: LanguageModel) -> StepWeights:
    weights = described(model)
    assert not isinstance(weights, str), "refuse() said why"
    return weights


def shape_of(model: LanguageModel) -> DecodeShape:
    """The model's sizes."""
    from tlstm_kernels.decode_shape import DecodeShape

    weights = _weights(model)
    widths = tuple(layer.w_hh.shape[1] for layer in weights.layers)
    dtype = str(weights.head.dtype).removeprefix("torch.")
    tf32 = dtype == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    residual = any(layer.residual for layer in weights.layers)
    return DecodeShape(widths, len(weights.head), dtype, residual, "tf32" if tf32 else "ieee")


def choice_of(config: GenerationConfig) -> Choice:
    """What the choice of a token needs in the kernel."""
    from tlstm_kernels.decode_shape import Choice

    if not config.do_sample:
        return Choice()
    top_p = config.top_p is not None and config.top_p < 1
    return Choice(True, bool(config.top_k), top_p, bool(config.min_p))


def plan_for(model: LanguageModel, config: GenerationConfig, texts: int) -> DecodePlan:
    """The plan for as many texts at once as the GPU takes."""
    from tlstm_kernels.decode_launch import too_large
    from tlstm_kernels.decode_plan import choose_decode_plan
    from tlstm_kernels.plan_at_hand import gpu_of

    shape, choice = shape_of(model), choice_of(config)
    index: Any = model.device.index
    gpu = gpu_of(index)
    plan = choose_decode_plan(shape, choice, texts, gpu, frozenset(too_large))
    while plan is None and texts > 1:
        texts = -(-texts // 2)
        plan = choose_decode_plan(shape, choice, texts, gpu, frozenset(too_large))
    if plan is None:
        raise RuntimeError(f"no plan of the decode kernel fits on {gpu.name}; pass decoder='graph' or 'loop'")
    return plan


def kernel_name(plan: DecodePlan, config: GenerationConfig) -> str:
    """All that the compiled kernel for a request depends on."""
    has_flags = bool(config.suppress_tokens or config.eos_ids)
    return f"decode {plan.constants()} {plan.num_warps} {has_flags} {config.repetition_penalty != 1}"


def settings_of(config: GenerationConfig) -> ChoiceSettings:
    """The numbers of the choice."""
    from tlstm_kernels.decode_launch import ChoiceSettings

    choice = choice_of(config)
    return ChoiceSettings(
        repetition_penalty=config.repetition_penalty,
        temperature=config.temperature if choice.sample else 1.0,
        top_k=config.top_k or 0,
        top_p=config.top_p if choice.top_p and config.top_p is not None else 1.0,
        log_min_p=math.log(config.min_p) if choice.min_p and config.min_p else 0.0,
    )


def flags_of(config: GenerationConfig, vocab_size: int, device: torch.device) -> Tensor | None:
    """(V,) int8 of tokens that are forbidden and tokens that end a text; None where there is none of either."""
    from tlstm_kernels.decode_launch import ENDS, FORBIDDEN

    forbidden = config.suppress_tokens or []
    if not forbidden and not config.eos_ids:
        return None
    flags = torch.zeros(vocab_size, dtype=torch.int8)
    flags[forbidden] = FORBIDDEN
    flags[config.eos_ids] |= ENDS
    return flags.to(device)


# Per model what its weights were when they were packed, and the packed weights of each way to cut them.
_packed: WeakKeyDictionary[Any, tuple[Any, dict[Any, PackedWeights]]] = WeakKeyDictionary()


def packed_weights(model: LanguageModel, plan: DecodePlan) -> PackedWeights:
    """The model's weights for a plan; packed once and kept as long as the model does not change."""
    from tlstm_kernels.decode_weights import ModelWeights, pack_weights

    # Tensors made in inference mode have no version; they cannot be changed in place outside of it either.
    parameters = [p for module in model.modules() for p in module.parameters(recurse=False)]
    now = [(p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in parameters]
    before, kept = _packed.get(model, (None, {}))
    if before != now:
        kept = {}
        _packed[model] = now, kept
    way = (plan.programs, plan.units, plan.block_k)
    if way not in kept:
        weights = _weights(model)
        layers = weights.layers
        kept[way] = pack_weights(
            ModelWeights(
                weights.embedding,
                [layer.w_ih for layer in layers],
                [layer.w_hh for layer in layers],
                [layer.bias for layer in layers],
                weights.head,
                weights.head_bias,
            ),
            plan,
        )
    return kept[way]
