"""Whether the decode kernel can run a model and a request, and the model's weights as the kernel reads them."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tlstm.config import LSTMConfig
from tlstm.generation.config import GenerationConfig
from tlstm.generation.prefill import LanguageModel

if TYPE_CHECKING:
    from tlstm_kernels.decode_launch import ChoiceSettings
    from tlstm_kernels.decode_shape import Choice, DecodePlan, DecodeShape
    from tlstm_kernels.decode_weights import PackedWeights

# Settings of a model that the kernel follows, or that change nothing in generation. One that is not among these, and is
# not at its default, is unknown here.
_KNOWN_SETTINGS = {
    *("vocab_size", "hidden_size", "num_layers", "layer_sizes", "embedding_size", "residual", "bias", "head_bias"),
    *("tie_word_embeddings", "embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout"),
    *("weight_dropout", "initializer", "initializer_range", "forget_bias", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "dtype", "quantization", "recompute", "architectures", "model_type", "config_version"),
    *("tlstm_version", "extra"),
}
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
    from tlstm_kernels.kernel_calls import gpu_of

    assert device.index is not None
    table = 4 * model.config.widths[0] * model.config.vocab_size * _weights(model)["lm_head.weight"].element_size()
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
    config = model.config
    for setting in dataclasses.fields(LSTMConfig):
        if setting.name not in _KNOWN_SETTINGS and getattr(config, setting.name) != setting.default:
            return f"the decode kernel has no {setting.name}"
    weights = _weights(model)
    if weights.keys() != _expected_names(config):
        other = sorted(weights.keys() ^ _expected_names(config))[0]
        return f"the decode kernel knows models of embedding, LSTM layers and head; this one differs in {other}"
    if len({(w.dtype, w.device) for w in weights.values()}) > 1:
        return "the model's weights are not all of one dtype on one device"
    return None


def _weights(model: LanguageModel) -> dict[str, Tensor]:
    module: Any = model
    return dict(module.named_parameters(remove_duplicate=False))


def _expected_names(config: LSTMConfig) -> set[str]:
    kinds = ("weight_ih_l0", "weight_hh_l0", *(("bias_ih_l0", "bias_hh_l0") if config.bias else ()))
    layers = {f"model.layers.{layer}.{kind}" for layer in range(len(config.widths)) for kind in kinds}
    return layers | {"model.embedding.weight", "lm_head.weight"} | ({"lm_head.bias"} if config.head_bias else set())


def shape_of(model: LanguageModel) -> DecodeShape:
    """The model's sizes."""
    from tlstm_kernels.decode_shape import DecodeShape

    config, dtype = model.config, str(_weights(model)["lm_head.weight"].dtype).removeprefix("torch.")
    tf32 = dtype == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return DecodeShape(tuple(config.widths), config.vocab_size, dtype, config.residual, "tf32" if tf32 else "ieee")


def choice_of(config: GenerationConfig) -> Choice:
    """What the choice of a token needs in the kernel."""
    from tlstm_kernels.decode_shape import Choice

    if not config.do_sample:
        return Choice()
    top_p = config.top_p is not None and config.top_p < 1
    return Choice(True, bool(config.top_k), top_p, bool(config.min_p))


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

    weights = _weights(model)
    # Tensors made in inference mode have no version; they cannot be changed in place outside of it either.
    now = [(w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights.values()]
    before, kept = _packed.get(model, (None, {}))
    if before != now:
        kept = {}
        _packed[model] = now, kept
    way = (plan.programs, plan.units, plan.block_k)
    if way not in kept:

        def of_layers(kind: str) -> list[Tensor]:
            return [weights[f"model.layers.{layer}.{kind}"].detach() for layer in range(plan.shape.layers)]

        biases: list[Tensor | None] = [None] * plan.shape.layers
        if model.config.bias:
            pairs = zip(of_layers("bias_ih_l0"), of_layers("bias_hh_l0"), strict=True)
            biases = [b_ih + b_hh for b_ih, b_hh in pairs]
        head_bias = weights.get("lm_head.bias")
        kept[way] = pack_weights(
            ModelWeights(
                weights["model.embedding.weight"].detach(),
                of_layers("weight_ih_l0"),
                of_layers("weight_hh_l0"),
                biases,
                weights["lm_head.weight"].detach(),
                None if head_bias is None else head_bias.detach(),
            ),
            plan,
        )
    return kept[way]
