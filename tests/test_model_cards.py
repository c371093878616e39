"""Every folder in model_cards/ against its own card, config, weights and training figures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import tokenizers
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from tlstm import LSTMForCausalLM, Tokenizer
from tlstm.hub.card import is_own, make_card

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))
SIZE_LIMIT = 10_000_000  # bytes of a whole folder: it is part of the wheel


def figures(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


def test_the_default_checkpoint_is_there():
    assert [folder.name for folder in FOLDERS] == ["shakespeare-char"]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


def test_holds_what_its_hub_repository_holds(folder):
    names = {path.name for path in folder.iterdir()}
    required = {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
        "loss.png",
    }
    assert names == required
    table = (ROOT / "model_cards" / "README.md").read_text().split("## What a folder holds")[1].split("\n## ")[0]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall("`(.*?)`", row)}
    assert listed == required
    assert sum(path.stat().st_size for path in folder.iterdir()) <= SIZE_LIMIT


def test_config_and_weights_agree(folder):
    model = LSTMForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == figures(folder)["parameters"]
    assert str(model.dtype) == f"torch.{model.config.dtype}"
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert weights.metadata()["format"] == "pt"
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - not a dict
    assert sum(map(math.prod, shapes)) == model.num_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_tokenizer_reads_the_same_everywhere(folder):
    text = "O Romeo, Romeo!\nwherefore art thou Romeo?"
    own = Tokenizer.from_pretrained(folder)
    ids = own.encode(text)
    assert own.decode(ids) == text
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids == ids
    assert own.vocab_size == LSTMForCausalLM.from_pretrained(folder).config.vocab_size
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids


def test_card_states_the_measured_figures(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "tlstm"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0"
    assert card.data.language
    assert card.data.datasets
    assert "lstm" in card.data.tags
    run = figures(folder)
    assert run["command"] in re.sub(r" \\\n\s+", " ", card.text)
    assert f"{run['parameters']:,}" in card.text
    assert len({result["protocol"] for result in run["valid"]}) == 2
    for result in run["valid"]:
        assert f"{result['loss']:.4f}" in card.text
        assert f"{result['perplexity']:.3f}" in card.text
        assert f"{result['bits_per_character']:.4f}" in card.text
        assert f"{result['tokens']:,}" in card.text
    stated = {(r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert stated == {
        (kind, round(run["valid"][0][key], 4))
        for kind, key in (("loss", "loss"), ("perplexity", "perplexity"), ("bits_per_character", "bits_per_character"))
    }


def test_card_states_the_model_and_the_run(folder):
    """What somebody wants to know before they load it, each against the config and the run's own record."""
    card, run = ModelCard.load(folder / "README.md"), figures(folder)
    config = json.loads((folder / "config.json").read_text())
    text = " ".join(card.text.split())
    layers = f"{config['num_layers']} layers of {config['hidden_size']} units"
    data = f"{run['data']['text']['tokens']:,} characters, {config['vocab_size']} symbols"
    batch = f"{run['training_config']['batch_size']} x {run['training_config']['window']} characters"
    work = f"{run['steps']:,} steps of {batch} ({run['epochs']:.0f} epochs), {run['seconds'] / 60:.0f} minutes"
    for fact in (layers, config["dtype"], data, work, run["hardware"].removeprefix("CPU, "), run["torch_version"]):
        assert fact in text, fact
    assert re.search(r"!\[.+\]\(loss\.png\)", card.text)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_card_says_what_the_generated_one_would(folder):
    """The figures of the metadata, and the facts, come from the same files; only the words are the author's."""
    written = ModelCard.load(folder / "README.md")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(files["config.json"])
    made = ModelCard(
        make_card(config, name=folder.name, parameters=figures(folder)["parameters"], files=files, license="apache-2.0")
    )
    assert not is_own(files["README.md"].decode())
    for key in ("library_name", "pipeline_tag", "license", "model_name"):
        assert written.data[key] == made.data[key]
    values = {result.metric_type: result.metric_value for result in made.data.eval_results}
    assert {result.metric_type: result.metric_value for result in written.data.eval_results}.items() <= values.items()
    for fact in (f"{figures(folder)['parameters']:,}", str(config["hidden_size"]), config["dtype"], "(loss.png)"):
        assert fact in written.text
        assert fact in made.text


def test_snippet_of_the_card_runs(folder, monkeypatch, capsys):
    card = ModelCard.load(folder / "README.md")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, "card", "exec"), {})
    assert len(capsys.readouterr().out) > 100
