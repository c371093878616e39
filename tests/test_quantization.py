"""int8 checkpoints: rounding within its bound, exact round trips, clear refusals."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import assert_same_model, causal_lm, rewrite

from tlstm import CheckpointError, LSTMConfig, LSTMForCausalLM, Trainer
from tlstm.quantization import dequantize_matrix, quantize, quantize_matrix

MODELS = [
    {},
    {"tie_word_embeddings": True},
    {"proj_size": 5, "bias": False},
    {"layer_sizes": [7, 11], "residual": True},
]


def matrices(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-20, 20, 65)[:, None]
    odd = torch.zeros(7, 13)
    odd[1, 3], odd[2] = -5.0, 3.0
    return [torch.randn(65, 13, generator=generator) * scales, torch.rand(13, 7, generator=generator), odd]


@pytest.mark.parametrize("matrix", matrices(), ids=["wide range", "uniform", "rows of zeros"])
def test_rounding_is_within_half_a_level_and_happens_once(matrix):
    numbers, scale = quantize_matrix(matrix)
    assert (numbers.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, matrix.shape[:1])
    exact = numbers.double() * scale.double()[:, None]
    assert torch.equal(dequantize_matrix(numbers, scale).double(), exact)  # the product is exact in float32
    largest = matrix.double().abs().amax(1, keepdim=True)
    assert ((exact - matrix.double()).abs() <= largest / 127 / 2 * 1.0001).all()
    assert (numbers.abs().amax(1) == 127)[largest[:, 0] > 0].all()
    again = quantize_matrix(exact.float())
    assert torch.equal(again[0], numbers)
    assert torch.equal(again[1], scale)


@pytest.mark.parametrize("settings", MODELS, ids=str)
def test_saved_and_loaded_again_it_is_the_same(tmp_path, settings):
    model = causal_lm(**settings)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name]) == (tensor.ndim == 1), name
    model.save_pretrained(tmp_path / "first")
    loaded = LSTMForCausalLM.from_pretrained(tmp_path / "first")
    assert_same_model(loaded, model)
    assert loaded.config.quantization == "int8"
    loaded.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    stored = load_file(first)
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim == 2} == {torch.int8}
    kept = [name for name, tensor in stored.items() if tensor.ndim == 1]
    assert all(stored[name].dtype == torch.float32 for name in kept)
    ids = torch.randint(13, (3, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    narrow = LSTMForCausalLM.from_pretrained(tmp_path / "first", dtype="bfloat16")
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert torch.equal(narrow.lm_head.weight, model.lm_head.weight.bfloat16())


def test_shards_and_16_bit_models(tmp_path):
    model = causal_lm(hidden_size=65, num_layers=3).half()
    quantize(model)
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path), model)


def test_it_generates_and_refuses_to_be_trained(tmp_path):
    model = causal_lm()
    quantize(model)
    out = model.generate([[1, 2]], max_new_tokens=9, return_dict_in_generate=True)
    assert len(out.new_tokens[0]) == 9
    assert out.decoder.refused.get("lean") is None
    for train in (model.train, lambda: Trainer(model, out_dir=tmp_path / "run")):
        with pytest.raises(ValueError, match=r"quantised \(int8\) and cannot be trained; train the checkpoint that"):
            train()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model)
    broken = causal_lm()
    with torch.no_grad():
        broken.lm_head.weight[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"lm_head.weight: expected finite weights"):
        quantize(broken)
    assert broken.config.quantization is None
    with pytest.raises(ValueError, match="quantization"):
        LSTMConfig(vocab_size=13, quantization="int3")


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _set(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("lm_head.weight_scale"), "expected the scales of 'lm_head.weight' as 'lm_head.weight_scale'.*got none"),
        (_set("lm_head.weight_scale", lambda s: s[1:].clone()), r"\(13,\), got torch.float32 of shape \(12,\)"),
        (_set("lm_head.weight_scale", lambda s: s.half()), "got torch.float16"),
        (_set("lm_head.weight", lambda q: q.float()), "'lm_head.weight' is stored as torch.float32"),
        (_set("lm_head.weight_scale", lambda s: s * torch.nan), "are not all positive numbers"),
        (_set("lm_head.weight_scale", lambda s: -s), "are not all positive numbers"),
        (_drop("lm_head.weight"), "missing tensors: lm_head.weight"),
        (_set("lm_head.weight", lambda q: q[:, 1:].contiguous()), r"expected \(13, 7\) floating point"),
        (lambda tensors: tensors.update({"stray_scale": torch.ones(3)}), "unexpected tensors: stray_scale"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused(tmp_path, change, message):
    model = causal_lm()
    quantize(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        LSTMForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_config_and_weights_of_different_checkpoints(tmp_path):
    model = causal_lm()
    model.save_pretrained(tmp_path / "plain")
    quantize(model)
    model.save_pretrained(tmp_path / "narrow")
    shutil.copy(tmp_path / "narrow" / "config.json", tmp_path / "config.json")
    shutil.copy(tmp_path / "plain" / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"says quantization 'int8', but .* is stored as torch.float32"):
        LSTMForCausalLM.from_pretrained(tmp_path)
    rewrite(tmp_path / "narrow" / "config.json", quantization=None)
    with pytest.raises(CheckpointError, match=r"unexpected tensors: .*_scale"):
        LSTMForCausalLM.from_pretrained(tmp_path / "narrow")
