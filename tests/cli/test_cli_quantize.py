"""`tlstm quantize`, and what the other commands make of its checkpoint."""

from __future__ import annotations

import json

import torch
from generate_outcomes import load

from tlstm.quantization import quantize


def test_quantized_checkpoint_is_used_like_any_other(cli, byte_checkpoint, text_file, tmp_path):
    out = tmp_path / "narrow"
    made = cli("quantize", byte_checkpoint, out)
    assert made.code == 0
    assert str(out) in made.out
    assert "largest relative change of a matrix: 0." in made.out
    model, tokenizer = load(byte_checkpoint)
    quantize(model)
    loaded, _ = load(out)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 9}
    expected = model.generate([tokenizer.encode("né")], seed=1, **settings)
    outcome = cli("generate", "--model", out, "--prompt", "né", "--seed", 1, "--json")  # settings came along
    assert json.loads(outcome.out)["sequences"][0]["tokens"] == expected[0, 3:].tolist()

    losses = [
        json.loads(cli("eval", "--model", folder, "--data", text_file, "--protocol", "stream", "--json").out)
        for folder in (byte_checkpoint, out)
    ]
    before, after = (loss["results"]["stream"]["loss"] for loss in losses)
    assert 0 < abs(after - before) < 0.02 * before
    infos = [json.loads(cli("info", "--model", folder, "--json").out) for folder in (byte_checkpoint, out)]
    assert infos[0]["parameters"] == infos[1]["parameters"]
    assert infos[1]["dtype"] == "float32+int8"


def test_mistakes(cli, checkpoint, text_file, tmp_path):
    out = tmp_path / "narrow"
    assert cli("quantize", checkpoint, out).code == 0
    assert "holds a checkpoint already" in cli("quantize", checkpoint, out).err
    assert "quantised already" in cli("quantize", out, tmp_path / "twice").err
    assert not (tmp_path / "twice").exists()
    assert cli("quantize", tmp_path / "absent", tmp_path / "other").code == 2
    trained = cli("train", "--data", text_file, "--out", tmp_path / "run", "--init-from", out, "--batch-size", 1)
    assert trained.code == 2
    assert "cannot be trained" in trained.err
