"""Checkpoints that do not fit the model: refused with everything that is wrong, before memory is spent on them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import SMALL, assert_same_model, causal_lm, rewrite, tensors_in

from tlstm import LSTMConfig, LSTMForCausalLM, LSTMModel
from tlstm.checkpoint.files import CheckpointError, CheckpointNotFoundError


class TestStrictness:
    def test_missing_unexpected_and_mismatched_are_one_error(self, tmp_path: Path) -> None:
        causal_lm().save_pretrained(tmp_path)
        tensors = tensors_in(tmp_path / "model.safetensors")
        del tensors["lm_head.bias"]
        tensors["lm_head.scale"] = torch.ones(3)
        tensors["model.embedding.weight"] = torch.ones(13, 8)
        tensors["model.layers.0.bias_ih_l0"] = torch.ones(28, dtype=torch.int64)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            LSTMForCausalLM.from_pretrained(tmp_path)
        message = str(caught.value)
        assert str(tmp_path) in message
        assert "missing tensors: lm_head.bias\n" in message
        assert "unexpected tensors: lm_head.scale\n" in message
        assert (
            "model.embedding.weight (expected (13, 7) floating point, got (13, 8) torch.float32 in model.safe"
            in message
        )
        assert "model.layers.0.bias_ih_l0 (expected (28,) floating point, got (28,) torch.int64" in message
        assert "strict=False" in message

        model, info = LSTMForCausalLM.from_pretrained(tmp_path, strict=False, output_loading_info=True)
        assert info["missing_keys"] == ["lm_head.bias"]
        assert info["unexpected_keys"] == ["lm_head.scale"]
        assert info["mismatched_keys"] == ["model.embedding.weight", "model.layers.0.bias_ih_l0"]
        assert len(info["error_msgs"]) == 2
        state = model.state_dict()
        assert all(
            torch.equal(state[name], tensors[name]) for name in set(state) - {n for kind in info.values() for n in kind}
        )
        assert not any(p.is_meta for p in model.parameters())
        assert torch.equal(model.lm_head.bias, torch.zeros(13)), "the model's own initialisation"
        assert 0 < model.model.embedding.weight.abs().max() <= 0.1
        assert model.model.embedding.weight.dtype == torch.float32

    def test_a_checkpoint_with_none_of_the_tensors(self, tmp_path: Path) -> None:
        """PyTorchModelHubMixin takes such a file without a word and returns random weights."""
        causal_lm().save_pretrained(tmp_path)
        save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
        with pytest.raises(
            CheckpointError, match=r"missing tensors: model.embedding.weight.*\nunexpected tensors: other"
        ):
            LSTMForCausalLM.from_pretrained(tmp_path)

    def test_long_lists_are_cut(self, tmp_path: Path) -> None:
        causal_lm(num_layers=40).save_pretrained(tmp_path)
        rewrite(tmp_path / "config.json", num_layers=1)
        with pytest.raises(CheckpointError, match="and 136 more"):
            LSTMForCausalLM.from_pretrained(tmp_path)

    def test_a_complete_checkpoint_reports_nothing(self, tmp_path: Path) -> None:
        causal_lm().save_pretrained(tmp_path)
        _, info = LSTMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}

    def test_missing_tensors_take_the_dtype_asked_for(self, tmp_path: Path) -> None:
        causal_lm().save_pretrained(tmp_path)
        tensors = tensors_in(tmp_path / "model.safetensors")
        save_file({"lm_head.bias": tensors["lm_head.bias"].half()}, tmp_path / "model.safetensors")
        for dtype, expected in (("auto", torch.float16), ("float64", torch.float64)):
            model = LSTMForCausalLM.from_pretrained(tmp_path, strict=False, dtype=dtype)
            assert {p.dtype for p in model.parameters()} == {expected}

    def test_sizes_are_compared_before_memory_is_taken(self, tmp_path: Path) -> None:
        """A config that asks for terabytes over a small file is refused at once, not after allocation."""
        causal_lm(initializer="orthogonal", forget_bias=1.0).save_pretrained(tmp_path)
        rewrite(tmp_path / "config.json", hidden_size=1 << 17, vocab_size=1 << 26)
        with pytest.raises(CheckpointError, match=r"expected \(67108864, 131072\) floating point, got \(13, 7\)"):
            LSTMForCausalLM.from_pretrained(tmp_path)


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"model_type": "gpt2"}, "expected model_type 'tlstm', got 'gpt2'"),
            (
                {"architectures": ["LSTMForOther"]},
                "expected architecture LSTMForCausalLM, got LSTMForOther; load it with",
            ),
            ({"vocab_size": ...}, "`vocab_size` is missing"),
            ({"hidden_size": -7}, "hidden_size: expected"),
            ({"dtype": "float31"}, "dtype: expected"),
        ],
    )
    def test_a_config_that_does_not_fit(self, tmp_path: Path, changes: dict, complaint: str) -> None:
        causal_lm().save_pretrained(tmp_path)
        rewrite(tmp_path / "config.json", **changes)
        with pytest.raises(CheckpointError, match=complaint) as caught:
            LSTMForCausalLM.from_pretrained(tmp_path)
        assert str(tmp_path / "config.json") in str(caught.value)

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"version https://git-lfs.github.com"])
    def test_damaged_json_is_named(self, tmp_path: Path, name: str, text: bytes) -> None:
        causal_lm().save_pretrained(tmp_path)
        (tmp_path / name).write_bytes(text)
        with pytest.raises(CheckpointError) as caught:
            LSTMForCausalLM.from_pretrained(tmp_path)
        assert str(tmp_path / name) in str(caught.value)

    def test_a_generation_config_out_of_range_is_named(self, tmp_path: Path) -> None:
        causal_lm().save_pretrained(tmp_path)
        rewrite(tmp_path / "generation_config.json", temperature=-1)
        with pytest.raises(CheckpointError, match=r"generation_config.json: temperature"):
            LSTMForCausalLM.from_pretrained(tmp_path)
        (tmp_path / "generation_config.json").unlink()
        LSTMForCausalLM.from_pretrained(tmp_path)

    def test_the_backbone_of_a_language_model_says_which_class_to_use(self, tmp_path: Path) -> None:
        causal_lm().save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"expected architecture LSTMModel.*LSTMForCausalLM.from_pretrained"):
            LSTMModel.from_pretrained(tmp_path)

    def test_a_subclass_loads_what_its_parent_saved(self, tmp_path: Path) -> None:
        class Mine(LSTMForCausalLM):
            pass

        causal_lm().save_pretrained(tmp_path)
        assert_same_model(Mine.from_pretrained(tmp_path), causal_lm())

    def test_a_config_of_ones_own(self, tmp_path: Path) -> None:
        causal_lm().half().save_pretrained(tmp_path)
        (tmp_path / "config.json").unlink()
        with pytest.raises(CheckpointNotFoundError, match=r"config.json: no such file"):
            LSTMForCausalLM.from_pretrained(tmp_path)
        config = LSTMConfig(**SMALL, hidden_dropout=0.5)
        model = LSTMForCausalLM.from_pretrained(tmp_path, config=config)
        assert model.config.hidden_dropout == 0.5
        assert (model.config.dtype, config.dtype) == ("float16", "float32"), "the caller's object stays as it is"
        with pytest.raises(ValueError, match="config: expected a LSTMConfig, got dict"):
            LSTMForCausalLM.from_pretrained(tmp_path, config=SMALL)
        with pytest.raises(ValueError, match=r"config: expected a LSTMConfig, got PosixPath.*from_pretrained\(path\)"):
            LSTMForCausalLM(tmp_path)


class TestPaths:
    @pytest.mark.parametrize(
        "name", ["./no/such", "/no/such", "../no-such", "~/no-such-folder", "a/b/c", "a\\b", "", "a/"]
    )
    def test_what_looks_like_a_path_is_not_sought_on_the_hub(self, name: str) -> None:
        with pytest.raises(CheckpointNotFoundError, match=r"no such folder.*check the path"):
            LSTMForCausalLM.from_pretrained(name)

    def test_path_objects_and_files(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFoundError, match="no such folder"):
            LSTMForCausalLM.from_pretrained(Path("user/model"))
        causal_lm().save_pretrained(tmp_path)
        with pytest.raises(CheckpointNotFoundError, match=r"got a file.*pass the folder it lies in"):
            LSTMForCausalLM.from_pretrained(tmp_path / "model.safetensors")

    def test_pickle_only_and_empty_folders(self, tmp_path: Path) -> None:
        model = causal_lm()
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointNotFoundError, match="only pickle files"):
            LSTMForCausalLM.from_pretrained(tmp_path)

    def test_unknown_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"\['repo_id'\] \(they need push_to_hub=True\)"):
            causal_lm().save_pretrained(tmp_path, repo_id="user/model")
        assert not os.listdir(tmp_path)
