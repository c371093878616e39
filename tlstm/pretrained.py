"""`PreTrainedModel`: save, load and push a model the way users of the Hugging Face Hub know."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn

from tlstm.checkpoint.files import is_weights_file, save_checkpoint
from tlstm.config import CONFIG_NAME, LSTMConfig
from tlstm.hub.card import CARD_NAME, card_in, encoded, is_own, make_card, renewed
from tlstm.hub.locate import checkpoint_folder
from tlstm.hub.push import push_folder
from tlstm.quantization import quantized_state
from tlstm.transformers_shim import AUTO_MAP, SHIM, SHIM_NAME, names_shim
from tlstm.weight_loading import GENERATION_CONFIG_NAME, check_device, check_dtype, load_model


class SavableTokenizer(Protocol):
    """What `save_pretrained` needs of a tokenizer: its files, to be swapped in together with the model's."""

    def files(self) -> dict[str, bytes]: ...


class PreTrainedModel(nn.Module):
    """Base of all models: holds the config, and knows how to get weights from disk or Hub and back.

    Subclasses take a config as the only argument of `__init__`. One that shares parameters between modules sets
    `_tied_weights`, alias name -> owner name; a shared parameter is stored once, under its owner's name.
    """

    config_class: ClassVar[type[LSTMConfig]] = LSTMConfig
    _tied_weights: Mapping[str, str] = {}

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"config: expected a {self.config_class.__name__}, got {type(config).__name__}; to load a checkpoint "
                f"use {type(self).__name__}.from_pretrained(path)"
            )
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The first floating-point parameter's dtype."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of scalar parameters; a tied one counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def train(self, mode: bool = True) -> Self:
        """As `torch.nn.Module.train`. `ValueError` for a quantised model, whose steps training cannot refine."""
        if mode and self.config.quantization is not None:
            raise ValueError(
                f"the model is quantised ({self.config.quantization}) and cannot be trained; train the checkpoint that "
                "it was made from, and quantise the result"
            )
        return super().train(mode)

    # ---- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: LSTMConfig | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        strict: bool = True,
        output_loading_info: bool = False,
    ) -> Self:
        """Load a model from a folder or a Hub repo, in evaluation mode.

        Config and weight headers are compared before any memory is allocated for the weights. All files come from one
        commit of a Hub repo, or from one completed save in a local folder.

        Args:
            pretrained_model_name_or_path: a folder, or a repo id such as "user/model".
            config: used instead of the checkpoint's own `config.json`.
            revision: branch, tag, commit or "refs/pr/N" of the repo.
            cache_dir, force_download, local_files_only, token: as in `huggingface_hub.snapshot_download`.
            subfolder: where the checkpoint lies inside the folder or repo.
            variant: "fp16" reads `model.fp16.safetensors` instead of `model.safetensors`.
            dtype: "auto" keeps each weight's stored dtype; or a floating-point torch.dtype, or its name.
            device: where the weights go; the CPU by default.
            strict: refuse a checkpoint with missing, unexpected or mismatched tensors. If False, what fits is loaded
                and the rest keeps the model's own initialisation.
            output_loading_info: also return a dict of `missing_keys`, `unexpected_keys`, `mismatched_keys` and
                `error_msgs`, each a list of strings.

        Returns:
            The model, or `(model, info)`.

        Raises:
            CheckpointError (a ValueError): damaged files, a config or tensors that do not fit; it names the file.
            CheckpointNotFoundError (also a FileNotFoundError): no such folder, or no safetensors weights in it.
            ValueError: a wrong argument. huggingface_hub's errors pass unchanged.
        """
        target_dtype, target_device = check_dtype(dtype), check_device(device)
        if config is not None and not isinstance(config, cls.config_class):
            raise ValueError(f"config: expected a {cls.config_class.__name__}, got {type(config).__name__}")
        folder = checkpoint_folder(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        model, info = load_model(
            cls, folder, config=config, variant=variant, dtype=target_dtype, device=target_device, strict=strict
        )
        # Typed for the common case: a union would burden every caller with a check.
        return cast(Any, (model, info)) if output_loading_info else model

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        tokenizer: SavableTokenizer | None = None,
        extra_files: Mapping[str, bytes] | None = None,
        transformers_shim: bool = False,
        **push_kwargs: Any,
    ) -> None:
        """Save weights, `config.json` and `generation_config.json` into a folder, replacing a former model as one set.

        Killed at any point, the folder loads the old model or the new one, whole. Files that are not the model's own
        are left alone. A folder without a model card gets one; a card that tlstm made before is made anew, and one
        that somebody has written or changed is never touched (`tlstm.hub.card` tells how that is known).

        Args:
            save_directory: made if missing.
            max_shard_size: above this size the weights are split into shards; an int in bytes or a string like "5GB".
            variant: "fp16" writes `model.fp16.safetensors` and leaves other variants alone.
            is_main_process: False does nothing; for the other processes of a distributed run.
            push_to_hub: also push, to `repo_id` in `push_kwargs` or a repo named as the folder; `push_kwargs` as in
                `push_to_hub`.
            tokenizer: saved as part of the same set.
            extra_files: name -> content of further files of the set. `README.md` is the model card, instead of the one
                that would be made; the figures in a `training.json` go into the latter.
            transformers_shim: add `modeling_tlstm.py`, one line with which transformers loads the checkpoint with
                `trust_remote_code=True` where tlstm is installed; a checkpoint that had it keeps it.

        Raises:
            ValueError: a wrong argument. OSError: nothing could be saved; the old model is unchanged.
        """
        if push_kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained: unexpected arguments {sorted(push_kwargs)} (they need push_to_hub=True)")
        if not is_main_process:
            return
        files = self._companion_files(tokenizer, extra_files, transformers_shim)
        if CARD_NAME not in files:
            folder = Path(save_directory)
            card, there = self._make_card(folder.resolve().name, files), card_in(folder)
            files |= {CARD_NAME: encoded(renewed(card, there))} if there is None or is_own(there) else {}
        save_checkpoint(save_directory, self._owned_state(), files, variant=variant, max_shard_size=max_shard_size)
        if push_to_hub:
            repo_id = push_kwargs.pop("repo_id", None) or Path(save_directory).resolve().name
            self.push_to_hub(
                repo_id,
                max_shard_size=max_shard_size,
                variant=variant,
                tokenizer=tokenizer,
                extra_files=extra_files,
                transformers_shim=transformers_shim,
                **push_kwargs,
            )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        parent_commit: str | None = None,
        tags: Sequence[str] | None = None,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        tokenizer: SavableTokenizer | None = None,
        extra_files: Mapping[str, bytes] | None = None,
        transformers_shim: bool = False,
    ) -> CommitInfo:
        """Push the model to a Hub repo in one commit, which also removes the variant's former weights.

        The repo's model card is treated as that of a folder in `save_pretrained`.

        Args:
            repo_id: "user/name"; the repo is made if missing, private if `private`.
            commit_message, commit_description, token, create_pr: as in `huggingface_hub.HfApi.create_commit`.
            revision: the branch, made if missing; the main branch by default.
            parent_commit: fail if the branch has moved on from this commit.
            tags: added to the model card's.
            max_shard_size, variant, tokenizer, extra_files, transformers_shim: as in `save_pretrained`.

        Raises:
            huggingface_hub's errors, unchanged; the repo then holds what it held before.
        """
        with tempfile.TemporaryDirectory(prefix="tlstm-push-") as folder:
            files = self._companion_files(tokenizer, extra_files, transformers_shim)
            save_checkpoint(folder, self._owned_state(), files, variant=variant, max_shard_size=max_shard_size)
            return push_folder(
                Path(folder),
                repo_id,
                is_stale=lambda name: is_weights_file(name, variant),
                make_card=lambda full_name: self._make_card(full_name, files),
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                private=private,
                token=token,
                create_pr=create_pr,
                revision=revision,
                parent_commit=parent_commit,
                tags=tags,
            )

    def _owned_state(self) -> dict[str, Tensor]:
        """The state dict as it is stored: without the aliases of tied weights, quantised where the config says so."""
        state = {name: tensor for name, tensor in self.state_dict().items() if name not in self._tied_weights}
        return state if self.config.quantization is None else quantized_state(state)

    def _companion_files(
        self, tokenizer: SavableTokenizer | None, extra_files: Mapping[str, bytes] | None, transformers_shim: bool
    ) -> dict[str, bytes]:
        dtype = str(self.dtype).removeprefix("torch.") if self.config.quantization is None else "float32"
        config = dataclasses.replace(self.config, architectures=[type(self).__name__], dtype=dtype)
        if transformers_shim:
            config.extra = {**config.extra, "auto_map": AUTO_MAP}
        own = {CONFIG_NAME: config.to_json().encode()}
        if names_shim(config.extra):
            own[SHIM_NAME] = SHIM
        generation_config = getattr(self, "generation_config", None)
        if generation_config is not None:
            own[GENERATION_CONFIG_NAME] = generation_config.to_json().encode()
        files = {**(extra_files or {}), **(tokenizer.files() if tokenizer is not None else {})}
        clash = sorted(set(files) & set(own))
        if clash:
            raise ValueError(f"extra_files: {clash} are written by the model itself; give further files other names")
        return {**files, **own}

    def _make_card(self, name: str, files: Mapping[str, bytes]) -> str:
        config = json.loads(files[CONFIG_NAME])
        return make_card(config, name=name, parameters=self.num_parameters(), files=files)
