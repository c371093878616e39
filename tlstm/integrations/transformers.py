"""tlstm checkpoints in transformers: `AutoConfig`, `AutoModelForCausalLM`, `AutoTokenizer`, `pipeline`, `Trainer`.

    import tlstm.integrations.transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("user/name")

The import registers the model type. Files, parameter names and equations are those of tlstm: either library reads what
the other one saves, and the logits are the same to the bit. Works with transformers 5 and newer; the older ones need a
huggingface_hub that is too old for tlstm.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlstm.config import LSTMConfig as OwnConfig
from tlstm.models import LSTMForCausalLM as OwnModel
from tlstm.state import LSTMState
from tlstm.transformers_shim import AUTO_MAP, SHIM, SHIM_NAME

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Cache,
        GenerationConfig,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        f"tlstm.integrations.transformers needs transformers 5 or newer ({error}); pip install 'tlstm[transformers]'"
    ) from error

IGNORE_INDEX = -100
_SETTINGS = tuple(f.name for f in dataclasses.fields(OwnConfig) if f.name not in ("extra", "model_type"))
_DRAWN = "_is_hf_initialized"  # transformers' mark on parameters that have their values
_NOT_OFFERED = ("inputs_embeds", "output_hidden_states", "output_attentions")
# What this transformers calls a cache, in calls and in outputs: "cache" from 5.24 on, before that "past_key_values".
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"


class LSTMConfig(PreTrainedConfig):
    """`tlstm.LSTMConfig` as transformers wants it: the same settings and checks, and whatever transformers adds.

    Raises:
        ValueError: a setting is out of range or contradicts another one; the message names it.
    """

    model_type = OwnConfig.model_type
    attribute_map = {"num_hidden_layers": "num_layers"}  # noqa: RUF012 - transformers' own way
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012
    has_no_defaults_at_init = True  # a vocabulary has no default size

    def __init__(self, **settings: Any) -> None:
        if settings.get("auto_map"):
            settings["auto_map"] = AUTO_MAP  # of a Hub repo it comes back with the repo's name in it
        super().__init__(**{**settings, **_own_config(settings).to_dict()})

    def to_tlstm(self) -> OwnConfig:
        """The settings as a `tlstm.LSTMConfig`, checked again, because attributes can be set."""
        return _own_config({name: getattr(self, name) for name in _SETTINGS})

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the JSON file, and beside it the shim that it names, if it names one."""
        super().to_json_file(json_file_path, use_diff)
        if getattr(self, "auto_map", None):
            Path(json_file_path).with_name(SHIM_NAME).write_bytes(SHIM)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: transformers would copy this whole file into every checkpoint, where the shim does."""


def _own_config(settings: dict[str, Any]) -> OwnConfig:
    own = {name: settings[name] for name in _SETTINGS if name in settings}
    dtype = own.pop("dtype", None)  # a name, or what transformers makes of it
    return OwnConfig.from_dict(own if dtype is None else {**own, "dtype": str(dtype).removeprefix("torch.")})


class LSTMCache(Cache):
    """The recurrent state of `B` streams as transformers' cache: one size, however long the text.

    Like every cache of transformers it is changed in place; `copy.deepcopy` keeps a prompt for several continuations.

    Fields:
        state: the `LSTMState` after the tokens read so far; None before the first one.
        seen_tokens: how many positions were read, padding included.
    """

    is_compileable = is_croppable = False
    is_linear = [False]  # noqa: RUF012 - as layers that know what they have read: `generate` asks where to go on

    def __init__(self, state: LSTMState | None = None, seen_tokens: int = 0) -> None:
        super().__init__(layers=[])
        self.state = state
        self.seen_tokens = seen_tokens

    def __len__(self) -> int:
        return 0 if self.state is None else self.state.num_layers

    def __repr__(self) -> str:
        return f"LSTMCache(seen_tokens={self.seen_tokens}, state={self.state!r})"

    @property
    def batch_size(self) -> int:
        """Number of streams, -1 before the first token."""
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions read, which is where `generate` goes on reading."""
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    def reset(self) -> None:
        """Back to before the first token."""
        self.state, self.seen_tokens = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Stream `i` goes on from where stream `beam_idx[i]` was; `(B,)` int64."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the streams `indices`, in their order; repeats allowed."""
        if self.state is not None:
            self.state = self.state.select(indices.to(self.state.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each stream `repeats` times in a row: one prompt, several continuations."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises `ValueError`, unless nothing is to be removed: a recurrent state cannot unread a token."""
        if tokens_to_remove:
            raise ValueError("LSTMCache: a recurrent state cannot be cropped; keep a copy.deepcopy of the earlier one")


class LSTMForCausalLM(PreTrainedModel, GenerationMixin):
    """`tlstm.LSTMForCausalLM` as a model of transformers: the same modules under the same names."""

    config_class = LSTMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012
    _is_stateful = True  # no assisted generation: the state cannot go back to an earlier token
    _no_split_modules = ["LSTMModel"]  # noqa: RUF012

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        own = _draw(config.to_tlstm())
        self.model = own.model
        self.lm_head = own.lm_head
        for parameter in self.parameters():
            setattr(parameter, _DRAWN, not parameter.is_meta)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,  # (B, T) integer
        attention_mask: Tensor | None = None,  # (B, T) or (B, seen + T), non-zero at real tokens
        past_key_values: LSTMCache | None = None,
        labels: Tensor | None = None,  # (B, T) int64
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: LSTMCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Score every next token, and the loss where `labels` are given.

        Args:
            input_ids: the tokens that the cache has not read yet.
            attention_mask: each row's ones must be one contiguous run; of a longer mask, the last `T` columns count.
            cache: the cache to go on from; it is changed in place. Before transformers 5.24 its name was
                `past_key_values`, which is understood with every version.
            labels: usually `input_ids` itself: the shift by one is done here. Entries of -100, and padded positions, do
                not count. The loss is transformers' `self.loss_function`, which takes `num_items_in_batch`.
            use_cache: whether to return a cache; by default, in evaluation mode.
            logits_to_keep: score only this many last positions (0: all), or those of an index; not with labels.

        Returns:
            `loss`, `logits` (B, T, V) and the cache, named as in `CACHE`; as a tuple of those that there are, if not
            `return_dict`.

        Raises:
            ValueError: see `tlstm.LSTMForCausalLM.forward`; or something that the model does not offer.
        """
        for name in _NOT_OFFERED:
            if (asked := kwargs.pop(name, None)) is not None and asked is not False:
                raise ValueError(f"{name}: tlstm models do not offer it; leave it out")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache: expected one cache, received past_key_values, its older name, as well")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, LSTMCache):
            raise ValueError(
                f"{CACHE}: expected an LSTMCache, received {type(cache).__name__}; pass an earlier output's, or none"
            )
        T = input_ids.shape[1]
        attention_mask = None if attention_mask is None else attention_mask[:, -T:]
        output = self.model(input_ids, attention_mask, None if cache is None else cache.state)
        if cache is None and (not self.training if use_cache is None else use_cache):
            cache = LSTMCache()
        if cache is not None:
            cache.state, cache.seen_tokens = output.state, cache.seen_tokens + T

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        features = output.last_hidden_state
        logits = self.lm_head(features if labels is not None else features[:, kept])
        loss = None if labels is None else self._loss(logits, labels, attention_mask, **kwargs)
        named: dict[str, Any] = {CACHE: cache}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **named)
        return result if return_dict or (return_dict is None and self.config.return_dict) else result.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        targets = labels[:, 1:]
        if attention_mask is not None:
            targets = targets.masked_fill(~attention_mask[:, 1:].bool(), IGNORE_INDEX)
        targets, vocab_size = targets.contiguous(), logits.shape[-1]
        return self.loss_function(
            logits[:, :-1].contiguous(), labels, vocab_size=vocab_size, shift_labels=targets, **kwargs
        )

    # ---- what generate asks for ----------------------------------------------------------------------------------

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kw: Any) -> Any:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kw)  # type: ignore[misc]
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = LSTMCache()

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[GenerationConfig, dict]:
        """Sampling is from the whole distribution unless somebody asks for `top_k`; transformers' own default is 50."""
        chosen = (kwargs.get("top_k"), getattr(generation_config, "top_k", None), self.generation_config.top_k)
        prepared, rest = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        if all(top_k is None for top_k in chosen):
            prepared.top_k = 0
        return prepared, rest

    # ---- what loading and resizing ask for -----------------------------------------------------------------------

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """At the first of its modules: give all parameters that a checkpoint lacks what tlstm would have drawn."""
        missing = {name: p for name, p in self.named_parameters() if not getattr(p, _DRAWN, False)}
        if missing:
            drawn = _draw(self.model.config)
            for name, parameter in missing.items():
                parameter.copy_(drawn.get_parameter(name))
                setattr(parameter, _DRAWN, True)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value
        self.model.config.vocab_size = value.num_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing; see `LSTMConfig.register_for_auto_class`."""


def _draw(config: OwnConfig) -> OwnModel:
    """A fresh model in torch's default dtype, drawn in float32: orthogonal matrices need it."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return OwnModel(config).to(dtype)
    finally:
        torch.set_default_dtype(dtype)


AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)
