"""`tlstm train`: from text to a model, its settings and starts, stopping and going on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest
import torch

from tlstm import LSTMForCausalLM, Tokenizer

SMALL = ("--hidden-size", 9, "--num-layers", 1, "--batch-size", 4, "--window", 7, "--no-plot")


def exported(out):
    return LSTMForCausalLM.from_pretrained(out / "model")


def same_weights(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_from_text_to_text(cli, text_file, tmp_path):
    """train, then eval, info and generate with what it made."""
    out = tmp_path / "run"
    trained = cli(
        "train", "--data", text_file, "--out", out, *SMALL, "--epochs", 3, "--lr", 0.02, "--tie", "--seed", 3,
        "--valid-fraction", 0.2, "--eval-every", 50,
    )  # fmt: skip
    assert trained.code == 0
    characters = len(text_file.read_text(encoding="utf-8"))
    model, data, run = (
        next(line for line in trained.out.splitlines() if line.startswith(word)) for word in ("model", "data", "run")
    )
    assert f"{exported(out).num_parameters():,} parameters: 1 LSTM layers, 9 wide" in model
    assert "head tied" in model
    assert f"{int(0.8 * characters):,} tokens to train on" in data
    assert "steps of 4 x 7 tokens on 1 x cpu" in run
    assert f"tlstm generate --model {out / 'model'}" in trained.out

    figures = json.loads((out / "model" / "training.json").read_text())
    assert figures["command"].startswith("tlstm train --data ")
    assert figures["training_config"]["lr"] == 0.02
    measured = json.loads(
        cli("eval", "--model", out / "model", "--data", text_file, "--fraction-last", 0.2, "--json").out
    )
    for result, again in zip(figures["valid"], measured["results"].values(), strict=True):
        assert again["protocol"] == result["protocol"]
        assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)
    assert measured["results"]["stream"]["loss"] < 3.2  # it has learnt: a guess among 41 characters costs 3.71
    info = json.loads(cli("info", "--model", out / "model", "--json").out)
    assert info["training"] == figures
    assert (info["tied"], info["tokenizer"]) == (True, "char")
    generated = cli("generate", "--model", out / "model", "--prompt", "the ", "--max-new-tokens", 12)
    assert generated.code == 0
    assert len(generated.out) == 4 + 12 + 1


def test_model_flags_reach_the_model(cli, text_file, tmp_path):
    out = tmp_path / "run"
    outcome = cli(
        "train", "--data", text_file, "--out", out, "--layer-sizes", "11,7,5", "--embedding-size", 6, "--proj-size", 3,
        "--output-projection", "--tie", "--no-head-bias", "--weight-dropout", 0.1, "--hidden-dropout", 0.2,
        "--forget-bias", 1, "--initializer", "orthogonal", "--batch-size", 2, "--window", 5, "--max-steps", 2,
        "--no-plot", "--save-dtype", "bfloat16",
    )  # fmt: skip
    assert outcome.code == 0
    model = exported(out)
    config = model.config
    assert (config.widths, config.embedding_size, config.output_sizes) == ([11, 7, 5], 6, [3, 3, 3])
    assert (config.output_projection, config.tie_word_embeddings, config.head_bias) == (True, True, False)
    assert (config.weight_dropout, config.hidden_dropout, config.forget_bias) == (0.1, 0.2, 1.0)
    assert config.initializer == "orthogonal"
    assert model.dtype == torch.bfloat16
    assert "3 LSTM layers, 11-7-5 wide" in outcome.out


def test_settings_file_and_flags(cli, text_file, tmp_path):
    """A file gives settings, flags win; the file may be that of another run."""
    recipe = tmp_path / "recipe.json"
    settings = {
        "data": str(text_file), "hidden_size": 8, "num_layers": 1, "batch_size": 4, "window": 6, "max_steps": 3,
        "lr": 0.5, "plot": False, "tokenizer": "byte",
    }  # fmt: skip
    recipe.write_text(json.dumps(settings))
    first = tmp_path / "first"
    assert cli("train", "--config", recipe, "--out", first, "--lr", 0.125, "--hidden-size", 5).code == 0
    stored = json.loads((first / "training_config.json").read_text())
    assert (stored["lr"], stored["window"], stored["max_steps"]) == (0.125, 6, 3)
    assert (exported(first).config.hidden_size, exported(first).config.vocab_size) == (5, 256)
    second = tmp_path / "second"
    assert cli("train", "--config", first / "training_config.json", "--out", second, "--hidden-size", 5).code == 0
    assert json.loads((second / "training_config.json").read_text()) == stored
    for content, message in (
        ({"hiden_size": 8}, "unknown setting 'hiden_size'; did you mean 'hidden_size'?"),
        ({"vocab_size": 8}, "--vocab-size is for --tokenizer bpe"),
        ({"lr": "fast"}, "lr: expected a number"),
        ([1], "expected a JSON object"),
    ):
        recipe.write_text(json.dumps(content))
        outcome = cli("train", "--config", recipe, "--data", text_file, "--out", tmp_path / "third")
        assert outcome.code == 2
        assert message in outcome.err
    recipe.write_text("{")
    assert f"{recipe}: not valid JSON" in cli("train", "--config", recipe, "--out", tmp_path / "third").err


def test_tokenizers(cli, text_file, tmp_path):
    """Made from the data, with a token between files; or loaded. Validation text counts for characters only."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    valid = tmp_path / "valid.txt"
    valid.write_text("a new symbol: § " * 20, encoding="utf-8")
    common = ("--batch-size", 2, "--window", 5, "--max-steps", 1, "--hidden-size", 4, "--num-layers", 1, "--no-plot")

    def trained(name, *arguments):
        outcome = cli("train", "--out", tmp_path / name, *common, *arguments)
        assert outcome.code == 0, outcome.err
        return Tokenizer.from_pretrained(tmp_path / name / "model"), exported(tmp_path / name).config

    char, config = trained("char", "--data", folder, "--valid", valid)
    assert char.kind == "char"
    assert char.decode(char.encode("§")) == "§"
    assert config.eos_token_id == char.eos_token_id == char.encode("<eos>")[0]
    byte, config = trained("byte", "--data", text_file, "--tokenizer", "byte")
    assert (byte.kind, byte.vocab_size, byte.eos_token_id, config.vocab_size) == ("byte", 256, None, 256)
    bpe, config = trained("bpe", "--data", text_file, "--tokenizer", "bpe", "--vocab-size", 280, "--eos-token", "<end>")
    assert (bpe.kind, bpe.vocab_size, config.vocab_size) == ("bpe", 280, 280)
    assert bpe.decode([bpe.eos_token_id]) == "<end>"
    loaded, _ = trained("loaded", "--data", text_file, "--tokenizer", tmp_path / "bpe" / "model")
    assert loaded.encode("the quick") == bpe.encode("the quick")


def test_merges_are_learnt_from_the_training_part(cli, tmp_path):
    """What only the validation part holds is no token: its text must not shape the vocabulary it is measured with."""
    text = tmp_path / "text.txt"
    text.write_text("abab " * 400 + "zqzq " * 100)
    common = ("--tokenizer", "bpe", "--vocab-size", 262, "--batch-size", 1, "--window", 3, "--max-steps", 1)
    sizes = ("--hidden-size", 4, "--num-layers", 1, "--no-plot")
    for fraction, learnt in ((0.2, False), (0.0, True)):
        out = tmp_path / str(fraction)
        assert cli("train", "--data", text, "--out", out, "--valid-fraction", fraction, *common, *sizes).code == 0
        assert (len(Tokenizer.from_pretrained(out / "model").encode("zqzq")) < 4) == learnt


def test_fine_tuning(cli, checkpoint, text_file, tmp_path):
    """The weights are those of the checkpoint: with a learning rate of almost nothing they stay; dropouts change."""
    out = tmp_path / "run"
    common = ("train", "--data", text_file, "--batch-size", 4, "--window", 7, "--no-plot", "--init-from")
    outcome = cli(*common, checkpoint, "--out", out, "--lr", 1e-30, "--max-steps", 2, "--hidden-dropout", 0.3)
    assert outcome.code == 0
    model = exported(out)
    for name, weight in LSTMForCausalLM.from_pretrained(checkpoint).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-29)
    assert (model.config.hidden_dropout, model.config.widths) == (0.3, [17, 13])
    for arguments, message in (
        ([checkpoint, "--layer-sizes", "17,14"], "model.layers.1.weight_hh_l0"),
        ([checkpoint, "--tokenizer", "byte"], "--tokenizer and --init-from exclude each other"),
        (["./nowhere"], "no such folder"),
    ):
        outcome = cli(*common, *arguments, "--out", tmp_path / "other")
        assert outcome.code == 2
        assert message in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/text"], "/no/such/text: no such file or folder"),
        (["--valid", "/no/such/text"], "/no/such/text: no such file or folder"),
        (["--lr", "0"], "lr: expected a number in (0, inf)"),
        (["--window", "100000"], "the training text is too short"),
        (["--optimizer", "magic"], "optimizer: expected one of"),
        (["--layer-sizes", "5,x"], "expected a whole number, got 'x'"),
        (["--hidden-dropout", "1"], "hidden_dropout: expected a probability"),
        (["--tie", "--embedding-size", "3"], "tie_word_embeddings"),
        (["--vocab-size", "300"], "--vocab-size is for --tokenizer bpe"),
        (["--tokenizer", "bpe", "--vocab-size", "100"], "expected vocab_size >= 256"),
        (["--tokenizer", "/no/tokenizer"], "no such folder"),
        (["--tokenizer", "./nowhere", "--eos-token", "<e>"], "--eos-token is for a tokenizer made here"),
        (["--resume"], "--resume: no run in"),
        (["--device", "abacus"], "--device abacus"),
        (["--backend", "magic"], "invalid choice: 'magic'"),
    ],
)
def test_bad_values(cli, text_file, tmp_path, arguments, message):
    outcome = cli("train", "--data", text_file, "--out", tmp_path / "run", *SMALL, *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("tlstm: error: ")
    assert message in outcome.err


def test_a_run_is_not_overwritten(cli, text_file, tmp_path):
    out = tmp_path / "run"
    assert cli("train", "--data", text_file, "--out", out, *SMALL, "--max-steps", 2).code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    outcome = cli("train", "--data", text_file, "--out", out, *SMALL, "--tokenizer", "byte")
    assert outcome.code == 2
    assert "holds a run already" in outcome.err
    assert "--resume" in outcome.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    outcome = cli("train", "--data", text_file, "--out", text_file, *SMALL)
    assert (outcome.code, "expected a folder, found a file" in outcome.err) == (2, True)


def test_interrupted_run_goes_on(cli, spawn, text_file, tmp_path):
    """A real SIGINT in a process of its own; the command it names ends with the weights of an uninterrupted run."""
    settings = (
        "--data", text_file, *SMALL, "--max-steps", 600, "--eval-every", 20, "--hidden-dropout", 0.1,
        "--ema-decay", 0.9, "--threads", torch.get_num_threads(),
    )  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "run"
    process = spawn("train", "--out", out, *settings)
    for line in process.stderr:
        if line.startswith(b"step 20 "):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()
    told = re.search(r"tlstm: stopped at step (\d+) and saved; go on with: tlstm (train .*)\n", errors.decode())
    assert 20 <= int(told[1]) < 600
    assert not (out / "model").exists()
    changed = cli("train", "--out", out, "--resume", "--hidden-size", 10)
    assert changed.code == 2
    assert "--hidden-size cannot be changed when a run is resumed (it is 9)" in changed.err
    assert "--tokenizer cannot be changed" in cli("train", "--out", out, "--resume", "--tokenizer", "byte").err
    assert cli(*told[2].split()).code == 0
    assert cli("train", "--out", whole, *settings).code == 0
    assert same_weights(exported(out), exported(whole))


def test_two_processes(environment, text_file, tmp_path):
    """Under torchrun: one summary, one model, the batch shared."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tlstm", "train",
        "--data", text_file, "--out", tmp_path / "run", *SMALL, "--max-steps", 4, "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters: 1 LSTM layers") == 1
    assert "4 steps of 4 x 7 tokens on 2 x cpu" in done.stdout
    assert exported(tmp_path / "run").config.hidden_size == 9
    assert json.loads((tmp_path / "run" / "model" / "training.json").read_text())["processes"] == 2
