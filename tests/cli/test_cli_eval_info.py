"""`tlstm eval` and `tlstm info`: their figures against ones computed another way."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tlstm import GenerationConfig, LSTMConfig, LSTMForCausalLM, Tokenizer


def float64_losses(folder, ids, window=None):
    """Loss of every predicted token, from torch.nn.LSTM in float64, over the whole text or over cold windows."""
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    config = LSTMConfig.from_json_file(folder / "config.json")
    ids, losses = torch.tensor(ids), []
    size = window or len(ids)
    for start in range(0, len(ids) - 1, size):
        x = weights["model.embedding.weight"][ids[start : min(start + size, len(ids) - 1)]]
        targets = ids[start + 1 : start + 1 + len(x)]
        for layer, width in enumerate(config.widths):
            lstm = torch.nn.LSTM(x.shape[1], width, dtype=torch.float64)
            prefix = f"model.layers.{layer}."
            lstm.load_state_dict({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)})
            x = lstm(x)[0]
        head = weights.get("lm_head.weight", weights["model.embedding.weight"])
        logits = x @ head.T + weights["lm_head.bias"]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses).detach()


@pytest.mark.parametrize("kind", ["checkpoint", "byte_checkpoint"])
def test_eval_against_torch_in_float64(cli, request, text_file, kind):
    folder = request.getfixturevalue(kind)
    tokenizer = Tokenizer.from_pretrained(folder)
    text = text_file.read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    last = ids[int(0.75 * len(ids)) :]
    outcome = cli(
        "eval", "--model", folder, "--data", text_file, "--fraction-last", 0.25, "--window", 65, "--json",
        "--dtype", "float64",
    )  # fmt: skip
    report = json.loads(outcome.out)
    assert (report["tokens"], report["part"]) == (len(last), "last 0.25")
    predicted = tokenizer.decode(last[1:])
    for name, window in (("stream", None), ("windows", 65)):
        losses, result = float64_losses(folder, last, window), report["results"][name]
        mean = losses.mean().item()
        assert result["loss"] == pytest.approx(mean, rel=1e-6)  # losses of a block are averaged in float64, or wider
        assert result["tokens"] == len(losses) == len(last) - 1
        assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        assert result["bits_per_token"] == pytest.approx(mean / math.log(2), rel=1e-6)
        bits = losses.sum().item() / math.log(2)
        assert result["bits_per_character"] == pytest.approx(bits / len(predicted), rel=1e-6)
        assert result["bits_per_byte"] == pytest.approx(bits / len(predicted.encode(errors="replace")), rel=1e-6)
        assert result["tokens_per_second"] > 0


def test_eval_parts_and_protocols(cli, checkpoint, text_file):
    common = ("eval", "--model", checkpoint, "--data", text_file, "--json")
    whole = len(text_file.read_text(encoding="utf-8"))
    parts = [
        json.loads(cli(*common, flag, value).out)
        for flag, value in (("--fraction-first", 0.9), ("--fraction-last", 0.1))
    ]
    assert [part["part"] for part in parts] == ["first 0.9", "last 0.1"]
    assert sum(part["tokens"] for part in parts) == whole  # nothing twice, nothing left out
    only = json.loads(cli(*common, "--protocol", "stream", "--batch-streams", 3).out)
    assert (only["part"], list(only["results"])) == ("all", ["stream"])
    assert only["results"]["stream"]["tokens"] == (whole - 1) // 3 * 3
    assert list(json.loads(cli(*common, "--protocol", "windows").out)["results"]) == ["windows"]


def test_eval_table(cli, checkpoint, text_file):
    report = json.loads(cli("eval", "--model", checkpoint, "--data", text_file, "--json").out)
    lines = cli("eval", "--model", checkpoint, "--data", text_file).out.splitlines()
    assert lines[0].startswith(f"{checkpoint} on {text_file} (all, ")
    assert lines[2].split() == [
        "nats/token",
        "perplexity",
        "bits/token",
        "bits/char",
        "bits/byte",
        "tokens",
        "tokens/s",
    ]
    for line, result in zip(lines[3:], report["results"].values(), strict=True):
        assert line.startswith(result["protocol"])
        assert f" {result['loss']:.4f} " in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/text"], "/no/such/text: no such file or folder"),
        (["--fraction-last", "1.5"], "--fraction-last: expected a number in (0, 1], got 1.5"),
        (["--fraction-first", "0"], "--fraction-first: expected a number in (0, 1], got 0.0"),
        (["--fraction-first", "0.1", "--fraction-last", "0.1"], "not allowed with"),
        (["--window", "0"], "--window: expected at least 1"),
        (["--batch-streams", "-1"], "--batch-streams: expected at least 1"),
        (["--batch-streams", "100000"], "expected at least 100001 tokens"),
    ],
)
def test_eval_bad_values(cli, checkpoint, text_file, arguments, message):
    outcome = cli("eval", "--model", checkpoint, "--data", text_file, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_eval_bad_texts(cli, checkpoint, tmp_path):
    path = tmp_path / "t.txt"
    for content, message in ((b"", "the file is empty"), (b"ab\xff", "expected UTF-8"), ("日".encode(), "U+65E5")):
        path.write_bytes(content)
        outcome = cli("eval", "--model", checkpoint, "--data", path)
        assert outcome.code == 2
        assert message in outcome.err


def test_info_counts_what_the_model_has(cli, checkpoint, byte_checkpoint):
    for folder in (checkpoint, byte_checkpoint):
        report = json.loads(cli("info", "--model", folder, "--json").out)
        model = LSTMForCausalLM.from_pretrained(folder)
        backbone, counts = model.model, report["parameters"]
        assert counts["total"] == model.num_parameters()
        assert counts["embedding"] == backbone.embedding.weight.numel()
        assert counts["lstm"] == sum(p.numel() for p in backbone.layers.parameters())
        assert counts["recurrent"] == sum(layer.weight_hh_l0.numel() for layer in backbone.layers)
        tied = model.config.tie_word_embeddings
        assert counts["head"] == model.lm_head.bias.numel() + (0 if tied else model.lm_head.weight.numel())
        assert counts["total"] == sum(counts[part] for part in ("embedding", "lstm", "projection", "head"))
        assert [layer["width"] for layer in report["layers"]] == model.config.widths
        assert (report["tied"], report["vocab_size"]) == (tied, model.config.vocab_size)
        assert report["tokenizer"] == Tokenizer.from_pretrained(folder).kind
        assert report["dtype"] == "float32"
        assert report["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
        assert report["size_on_disk"] == sum(report["files"].values())
        assert report["training"] is None
    assert report["generation"] == {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 9}


def test_info_of_shards_projection_and_dtype(cli, tmp_path):
    config = LSTMConfig(
        vocab_size=65, hidden_size=32, num_layers=3, proj_size=13, embedding_size=9, output_projection=True
    )
    model = LSTMForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    report = json.loads(cli("info", "--model", tmp_path / "model", "--json").out)
    assert report["parameters"]["total"] == model.num_parameters()
    assert report["parameters"]["projection"] == 9 * 13 + 9
    assert report["layers"] == [{"width": 32, "output": 13}] * 3
    assert (report["dtype"], report["tokenizer"]) == ("bfloat16", None)
    assert len(report["weight_files"]) > 1
    text = cli("info", "--model", tmp_path / "model").out
    for part in (
        f"weights in {len(report['weight_files'])} shards", "3 LSTM, 32-32-32 wide, projected to 13; embedding 9",
        "65 (no tokenizer)", "bfloat16", "library defaults", f"{model.num_parameters():,}",
    ):  # fmt: skip
        assert part in text


def test_info_as_text(cli, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    GenerationConfig(do_sample=True, temperature=0.8).save_pretrained(folder)
    figures = {
        "valid": [{"protocol": "state carried, one stream", "loss": 1.46912, "perplexity": 4.3454}],
        "seconds": 2220.5, "steps": 1500, "hardware": "CPU, two cores", "command": "tlstm train --data t.txt",
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(figures))
    outcome = cli("info", "--model", folder)
    for part in (
        "17-13 wide; embedding 7", "(char tokenizer)", "do_sample true, temperature 0.8", "model.safetensors  ",
        "validation 1.4691 nats/token, perplexity 4.345 (state carried, one stream)", "steps 1,500",
        "command tlstm train --data t.txt",
    ):  # fmt: skip
        assert part in outcome.out
    assert json.loads(cli("info", "--model", folder, "--json").out)["training"] == figures


def test_info_reads_no_weights(cli, checkpoint, monkeypatch):
    """Headers only: the data of a file of any size stay where they are."""

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("tlstm.checkpoint.stored_weights.StoredWeights.tensor", refuse)
    monkeypatch.setattr(LSTMForCausalLM, "__init__", refuse)
    assert cli("info", "--model", checkpoint).code == 0


def test_info_of_what_is_no_checkpoint(cli, checkpoint, tmp_path):
    assert "config.json" in cli("info", "--model", tmp_path).err
    assert "found a file" in cli("info", "--model", checkpoint / "config.json").err
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "training.json").write_text("{")
    outcome = cli("info", "--model", folder)
    assert outcome.code == 2
    assert str(folder / "training.json") in outcome.err
    (folder / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 3}')
    assert "expected model_type 'tlstm', got 'gpt2'" in cli("info", "--model", folder).err
