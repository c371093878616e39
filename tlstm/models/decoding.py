"""What a decoder may compute with in place of the model's forward pass, and when it may not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tlstm.config import LSTMConfig
from tlstm.generation.step_weights import LayerWeights, StepWeights
from tlstm.layer import LSTM
from tlstm.models.backbone import LSTMModel

if TYPE_CHECKING:
    from tlstm.models.causal_lm import LSTMForCausalLM

# Settings that a step honours, or that mean nothing to it. Any other one is unknown here and keeps the plain loop.
_UNDERSTOOD = {
    "vocab_size", "hidden_size", "num_layers", "layer_sizes", "embedding_size", "proj_size", "output_projection",
    "residual", "bias", "head_bias", "tie_word_embeddings", "recompute", "embedding_dropout", "input_dropout",
    "hidden_dropout", "output_dropout", "weight_dropout", "initializer", "initializer_range", "forget_bias",
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "quantization", "architectures", "model_type",
    "config_version", "tlstm_version", "extra",
}  # fmt: skip
_BACKENDS = ("auto", "native")


def step_weights(model: LSTMForCausalLM, forward: Any) -> StepWeights | str:
    """The weights of one step in evaluation mode, or why the step is more than they tell.

    Args:
        forward: the `forward` that they describe; a subclass with another one is not described.
    """
    if type(model).forward is not forward:
        return f"{type(model).__name__} has a forward pass of its own"
    for field in dataclasses.fields(LSTMConfig):
        if field.name not in _UNDERSTOOD and getattr(model.config, field.name) != field.default:
            return f"it does not know the setting {field.name}"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a forward hook"
        if parametrize.is_parametrized(module):
            return f"{name} has a parametrization"
        if "forward" in vars(module):
            return f"{name or 'the model'} has a forward pass of its own"
    backbone, layers = model.model, []
    kinds = [
        (backbone, LSTMModel),
        (backbone.projection, nn.Linear if model.config.output_projection else nn.Identity),
        (backbone.embedding, nn.Embedding),
        (model.lm_head, nn.Linear),
        *((part, LSTM) for part in backbone.layers),
    ]
    for part, kind in kinds:
        if type(part) is not kind:
            return f"{type(part).__name__} stands in the place of {kind.__name__}"
    for index, layer in enumerate(backbone.layers):
        assert isinstance(layer, LSTM)
        if layer.backend not in _BACKENDS:
            return f"the backend {layer.backend!r} was asked for by name"
        if max(layer.zoneout) > 0 or layer.num_heads > 1:
            return "a layer has zoneout or several heads"
        weights = {name.removesuffix("_l0"): tensor.detach() for name, tensor in layer.named_parameters()}
        output = layer.proj_size or layer.hidden_size
        layers.append(
            LayerWeights(
                w_ih=weights["weight_ih"],
                w_hh=weights["weight_hh"],
                bias=weights["bias_ih"] + weights["bias_hh"] if layer.bias else None,
                w_hr=weights.get("weight_hr"),
                residual=model.config.residual and index > 0 and layer.input_size == output,
            )
        )
    projection = backbone.projection
    return StepWeights(
        embedding=backbone.embedding.weight.detach(),
        layers=tuple(layers),
        projection=_detached(projection) if isinstance(projection, nn.Linear) else None,
        head=model.lm_head.weight.detach(),
        head_bias=None if model.lm_head.bias is None else model.lm_head.bias.detach(),
    )


def _detached(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight.detach(), linear.bias.detach()
