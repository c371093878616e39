"""`PreTrainedModel`: a saved model comes back as it was, in the dtype and on the device asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import SMALL, assert_same_model, causal_lm, rewrite, tensors_in
from torch import nn

from tlstm import LSTMConfig, LSTMForCausalLM, Tokenizer, __version__
from tlstm.checkpoint.files import CheckpointError, CheckpointNotFoundError
from tlstm.pretrained import PreTrainedModel


class TestRoundTrip:
    @pytest.mark.parametrize("size", ["5GB", 700])
    @pytest.mark.parametrize(
        "overrides",
        [
            {},
            {"tie_word_embeddings": True},
            {"layer_sizes": [9, 13, 5], "output_projection": True, "proj_size": 3, "residual": True},
            {"bias": False, "head_bias": False, "initializer": "orthogonal", "forget_bias": 1.0},
        ],
    )
    def test_the_same_model_comes_back(self, tmp_path: Path, size: int | str, overrides: dict) -> None:
        model = causal_lm(**overrides).train()
        model.generation_config.top_k = 5
        model.save_pretrained(tmp_path, max_shard_size=size)
        loaded = LSTMForCausalLM.from_pretrained(tmp_path)
        assert_same_model(loaded, model)
        assert not loaded.training
        assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
        assert loaded.generation_config.top_k == 5
        assert loaded.config.to_dict() == {**model.config.to_dict(), "architectures": ["LSTMForCausalLM"]}
        ids = torch.randint(13, (3, 5))
        expected, found = model.eval()(ids, labels=ids), loaded(ids, labels=ids)
        assert torch.equal(found.logits, expected.logits)
        found.loss.backward()
        assert all(p.grad is not None for p in loaded.parameters())
        assert loaded.num_parameters() == sum(p.numel() for p in set(model.parameters()))

    def test_the_folder_is_what_others_expect(self, tmp_path: Path) -> None:
        model = causal_lm().bfloat16()
        model.save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]
        text = (tmp_path / "config.json").read_text()
        config = json.loads(text)
        assert config["architectures"] == ["LSTMForCausalLM"]
        assert (config["model_type"], config["dtype"], config["tlstm_version"]) == ("tlstm", "bfloat16", __version__)
        assert list(config) == sorted(config)
        assert text.endswith("}\n")
        assert list(tensors_in(tmp_path / "model.safetensors")) == sorted(model.state_dict())
        assert model.config.architectures is None, "saving does not change the model"

    def test_tokenizer_and_further_files_are_part_of_the_set(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer.train_char(["hello world"])
        model = causal_lm(vocab_size=tokenizer.vocab_size)
        extra = {"README.md": b"# Hello\n", "figures/loss.png": b"\x89PNG"}
        model.save_pretrained(tmp_path, tokenizer=tokenizer, extra_files=extra)
        assert (tmp_path / "figures" / "loss.png").read_bytes() == b"\x89PNG"
        assert (tmp_path / "README.md").read_bytes() == b"# Hello\n"
        assert Tokenizer.from_pretrained(tmp_path).encode("low") == tokenizer.encode("low")
        with pytest.raises(ValueError, match=r"\['config.json'\] are written by the model itself"):
            model.save_pretrained(tmp_path, extra_files={"config.json": b""})

    def test_the_main_process_saves_alone(self, tmp_path: Path) -> None:
        causal_lm().save_pretrained(tmp_path / "new", is_main_process=False)
        assert not (tmp_path / "new").exists()

    def test_subfolder_and_variant(self, tmp_path: Path) -> None:
        causal_lm(1).save_pretrained(tmp_path / "checkpoints" / "best")
        causal_lm(2).half().save_pretrained(tmp_path / "checkpoints" / "best", variant="fp16", max_shard_size=500)
        found = LSTMForCausalLM.from_pretrained(tmp_path, subfolder="checkpoints/best")
        assert_same_model(found, causal_lm(1))
        found = LSTMForCausalLM.from_pretrained(str(tmp_path), subfolder="checkpoints/best", variant="fp16")
        assert_same_model(found, causal_lm(2).half())
        with pytest.raises(CheckpointNotFoundError, match=r"found nothing there.*checkpoints/worst"):
            LSTMForCausalLM.from_pretrained(tmp_path, subfolder="checkpoints/worst")
        with pytest.raises(ValueError, match="subfolder: expected a relative path"):
            LSTMForCausalLM.from_pretrained(tmp_path, subfolder="../elsewhere")

    def test_a_loaded_model_does_not_depend_on_its_files(self, tmp_path: Path) -> None:
        causal_lm().save_pretrained(tmp_path)
        loaded = LSTMForCausalLM.from_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"")  # in place: what is mapped from it would be gone
        assert_same_model(loaded, causal_lm())

    def test_saving_over_the_folder_it_came_from(self, tmp_path: Path) -> None:
        causal_lm().save_pretrained(tmp_path)
        for size in (700, "5GB", 300):
            loaded = LSTMForCausalLM.from_pretrained(tmp_path)
            with torch.no_grad():
                loaded.lm_head.weight += 1
            loaded.save_pretrained(tmp_path, max_shard_size=size)
            assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path), loaded)


class TestDtypeAndDevice:
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("wanted", ["auto", "float16", "torch.float32", torch.bfloat16, torch.float64])
    def test_stored_or_asked_for(self, tmp_path: Path, stored: torch.dtype, wanted: str | torch.dtype) -> None:
        model = causal_lm().to(stored)
        model.save_pretrained(tmp_path)
        loaded = LSTMForCausalLM.from_pretrained(tmp_path, dtype=wanted)
        dtype = {"auto": stored, "float16": torch.float16, "torch.float32": torch.float32}.get(wanted, wanted)
        assert loaded.dtype == dtype
        assert loaded.config.dtype == str(dtype).removeprefix("torch.")
        assert_same_model(loaded, model.to(dtype))

    @pytest.mark.parametrize("wanted", ["float31", "int64", torch.int8, 32, torch.complex64, ["float32"]])
    def test_dtypes_that_make_no_sense(self, tmp_path: Path, wanted: object) -> None:
        with pytest.raises(ValueError, match="dtype: expected 'auto' or one of float64, float32"):
            LSTMForCausalLM.from_pretrained(tmp_path, dtype=wanted)

    def test_device(self, tmp_path: Path) -> None:
        causal_lm().save_pretrained(tmp_path)
        for device in ("cpu", torch.device("cpu"), "meta"):
            assert LSTMForCausalLM.from_pretrained(tmp_path, device=device).device == torch.device(device)
        for device in ("gpu", "cuda:63", 1.5):
            with pytest.raises(ValueError, match="device: expected one that torch can use here"):
                LSTMForCausalLM.from_pretrained(tmp_path, device=device)

    @pytest.mark.gpu
    def test_gpu(self, tmp_path: Path) -> None:
        causal_lm().save_pretrained(tmp_path)
        loaded = LSTMForCausalLM.from_pretrained(tmp_path, device="cuda", dtype="float16")
        assert loaded.device.type == "cuda"
        loaded.generate(torch.zeros(1, 3, dtype=torch.int64, device="cuda"), max_new_tokens=3)
        loaded.save_pretrained(tmp_path)  # also after cuDNN has moved all weights into one buffer
        assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path), causal_lm().half())


class TestTiedWeights:
    def test_stored_once_and_tied_again(self, tmp_path: Path) -> None:
        model = causal_lm(tie_word_embeddings=True)
        model.save_pretrained(tmp_path)
        assert "lm_head.weight" not in tensors_in(tmp_path / "model.safetensors")
        for options in ({}, {"dtype": "bfloat16"}, {"strict": False}):
            loaded = LSTMForCausalLM.from_pretrained(tmp_path, **options)
            assert loaded.lm_head.weight is loaded.model.embedding.weight
            assert loaded.num_parameters() == model.num_parameters()

    def test_stored_under_both_names_or_the_other_one(self, tmp_path: Path) -> None:
        model = causal_lm(tie_word_embeddings=True)
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        tensors = tensors_in(path)
        weight = tensors["model.embedding.weight"]
        save_file({**tensors, "lm_head.weight": weight.clone()}, path)
        assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path), model)
        save_file({**tensors, "lm_head.weight": weight + 1}, path)
        with pytest.raises(CheckpointError, match=r"'lm_head.weight' and 'model.embedding.weight' are tied.*differ"):
            LSTMForCausalLM.from_pretrained(tmp_path)
        del tensors["model.embedding.weight"]
        save_file({**tensors, "lm_head.weight": weight}, path)
        loaded, info = LSTMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert_same_model(loaded, model)
        assert not any(info.values())

    def test_an_untied_model_keeps_both(self, tmp_path: Path) -> None:
        causal_lm(tie_word_embeddings=True).save_pretrained(tmp_path)
        rewrite(tmp_path / "config.json", tie_word_embeddings=False)
        with pytest.raises(CheckpointError, match=r"missing tensors: lm_head.weight"):
            LSTMForCausalLM.from_pretrained(tmp_path)


class WithBuffers(PreTrainedModel):
    """Buffers that are stored, that are not, and one that is no float."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.hidden_size, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("positions", torch.arange(config.hidden_size), persistent=False)


def test_buffers(tmp_path: Path) -> None:
    model = WithBuffers(LSTMConfig(**SMALL))
    model.mean += 2
    model.steps += 9
    model.save_pretrained(tmp_path)
    loaded = WithBuffers.from_pretrained(tmp_path, dtype="float64")
    assert loaded.mean.tolist() == [2] * 5
    assert loaded.mean.dtype == torch.float64
    assert (loaded.steps.item(), loaded.steps.dtype) == (9, torch.int64)
    assert torch.equal(loaded.positions, torch.arange(7))
    assert "positions" not in loaded.state_dict()
