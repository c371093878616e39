"""Model cards: what they say, that their snippets run, and whose text is never touched."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, RepoCard
from small_models import causal_lm

from tlstm import LSTMConfig, LSTMModel, Tokenizer
from tlstm.hub.card import CARD_NAME, is_own, make_card, renewed, short_card, with_metadata

RUN = {
    "tlstm_version": "0.1.0",
    "torch_version": "2.13.0",
    "command": "tlstm train --data data/sea.txt --out runs/a",
    "hardware": "CPU, a small one",
    "processes": 3,
    "data": {"text": {"path": "sea.txt"}, "train_tokens": 1234567, "valid_tokens": 7654},
    "steps": 4880, "total_steps": 4880, "epochs": 2.5, "tokens": 39976960, "seconds": 3309.4,
    "weights": "exponential moving average",
    "valid": [
        {"protocol": "state carried, one stream", "tokens": 7653, "loss": 1.39339, "perplexity": 4.02849,
         "bits_per_character": 2.01024, "bits_per_byte": 2.00001},
        {"protocol": "cold windows of 256 tokens", "tokens": 7653, "loss": 1.42503, "perplexity": 4.15797},
    ],
}  # fmt: skip


def card_of(run: object = RUN, name: str = "user/sea", **files: bytes) -> str:
    config = json.loads(causal_lm(hidden_size=7, residual=True).config.to_json())
    beside = {"training.json": json.dumps(run).encode(), **files}
    return make_card(config, name=name, parameters=1090, files=beside, license="mit", tags=["sea", "lstm"])


def test_metadata_are_those_of_the_hub() -> None:
    data = ModelCard(card_of()).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("tlstm", "text-generation", "mit")
    assert data.tags == ["lstm", "sea"]
    assert data.model_name == "sea"
    stated = {(result.metric_type, result.metric_value) for result in data.eval_results}
    assert stated == {
        ("loss", 1.3934), ("perplexity", 4.0285), ("bits_per_character", 2.0102), ("bits_per_byte", 2.0),
    }  # fmt: skip
    assert {result.dataset_type for result in data.eval_results} == {"sea"}


def test_text_states_the_run(tmp_path: Path) -> None:
    text = ModelCard(card_of(**{"loss.png": b"PNG"})).text
    for fact in (
        "# sea\n", "2 LSTM layers, 7 units wide, with residual connections", "1,090 parameters", RUN["command"],
        "3 x CPU, a small one", "steps: 4,880", "epochs: 2.5", "tokens: 39,976,960", "55 minutes", "`sea.txt`",
        "1,234,567 / 7,654", "exponential moving average", "2.13.0", "![Loss", "(loss.png)", 'path = "user/sea"',
        "| state carried, one stream | 1.3934 | 4.0285 | 2.0102 | 2.0000 | 7,653 |",
        "| cold windows of 256 tokens | 1.4250 | 4.1580 | - | - | 7,653 |",
    ):  # fmt: skip
        assert fact in text, fact
    assert "not finished" not in text
    assert "loss.png" not in card_of()


def test_an_unfinished_run_says_so() -> None:
    latest = {"step": 20, "loss": 1.5, "protocol": "state carried, 16 parallel streams"}
    text = card_of(RUN | {"steps": 20, "valid": [], "latest_valid": latest})
    assert "**Training is not finished: step 20 of 4,880.**" in text
    assert "at step 20: 1.5000 nats per token (state carried, 16 parallel streams)" in text
    assert ModelCard(text).data.eval_results is None


@pytest.mark.parametrize(
    "run",
    [
        {}, [], 3, {"valid": 3}, {"valid": [3, {}, {"loss": "x"}]}, {"valid": [{"loss": float("nan")}]}, {"data": "x"},
        {"valid": [{"loss": 1}]}, {"steps": "many", "seconds": None, "command": 1}, {"data": {"text": {"path": 7}}},
        {"command": "````\n# not a heading"},
    ],
)  # fmt: skip
def test_foreign_figures_do_no_harm(run: object) -> None:
    card = card_of(run)
    assert is_own(card)
    assert ModelCard(card).data.library_name == "tlstm"


def test_a_file_that_is_no_json_does_no_harm() -> None:
    assert is_own(make_card({"hidden_size": 3, "vocab_size": 5}, name="a", parameters=1, files={"training.json": b"{"}))


@pytest.mark.parametrize(
    "tokenizer",
    [Tokenizer.bytes(), *(Tokenizer.train_char(text) for text in ("The hat", "né“😀", "\n\t")), None],
    ids=["byte", "char", "no-latin", "blank", "none"],
)  # fmt: skip
def test_the_snippet_runs(tokenizer: Tokenizer | None, tmp_path: Path, monkeypatch, capsys) -> None:
    vocabulary = 5 if tokenizer is None else tokenizer.vocab_size
    causal_lm(vocab_size=vocabulary).save_pretrained(tmp_path / "my model", tokenizer=tokenizer)
    run_snippet(tmp_path / "my model" / CARD_NAME, monkeypatch)
    assert capsys.readouterr().out


def test_the_snippet_of_a_backbone_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    LSTMModel(LSTMConfig(vocab_size=5, hidden_size=7)).save_pretrained(tmp_path / "features")
    run_snippet(tmp_path / "features" / CARD_NAME, monkeypatch)
    assert capsys.readouterr().out == "torch.Size([1, 1, 7])\n"
    assert ModelCard.load(tmp_path / "features" / CARD_NAME).data.pipeline_tag is None


def run_snippet(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(card.parent.parent)
    exec(compile(snippet, "card", "exec"), {})


# ---- whose it is -----------------------------------------------------------------------------------------------------


def test_a_card_of_ours_is_made_anew(tmp_path: Path) -> None:
    causal_lm().save_pretrained(tmp_path, extra_files={"training.json": json.dumps(RUN).encode()})
    first = (tmp_path / CARD_NAME).read_text()
    assert "1.3934" in first
    causal_lm(hidden_size=13).save_pretrained(tmp_path)
    second = (tmp_path / CARD_NAME).read_text()
    assert "13 units wide" in second
    assert "1.3934" not in second, "the new weights have no such figures"
    assert "model-index" not in second
    causal_lm(hidden_size=13).save_pretrained(tmp_path)
    assert (tmp_path / CARD_NAME).read_text() == second


@pytest.mark.parametrize(
    "card",
    [
        b"# Mine\n",
        b"",
        b"---\nlicense: [\n---\n# Mine\n",
        b"---\nlicense: mit\n---\nMine \xff\xfe\r\n",
        b"\xef\xbb\xbfMine",
    ],
)
def test_a_card_of_the_users_is_left_alone(card: bytes, tmp_path: Path) -> None:
    (tmp_path / CARD_NAME).write_bytes(card)
    causal_lm().save_pretrained(tmp_path)
    assert (tmp_path / CARD_NAME).read_bytes() == card


@pytest.mark.parametrize("change", [("LSTM", "lstm"), ("\n## How to", "\nA word of mine.\n\n## How to"), ("<!--", "")])
def test_a_changed_word_makes_it_the_users(change: tuple[str, str], tmp_path: Path) -> None:
    causal_lm().save_pretrained(tmp_path)
    path = tmp_path / CARD_NAME
    changed = path.read_text().replace(*change, 1)
    assert changed != path.read_text()
    path.write_text(changed)
    assert not is_own(changed)
    causal_lm(hidden_size=13).save_pretrained(tmp_path)
    assert path.read_text() == changed


def test_metadata_of_the_users_stay_on_a_card_of_ours(tmp_path: Path) -> None:
    """As when somebody fills in the form on the Hub, with other line ends."""
    causal_lm().save_pretrained(tmp_path, extra_files={"training.json": json.dumps(RUN).encode()})
    path = tmp_path / CARD_NAME
    edited = ModelCard.load(path)
    edited.data["license"], edited.data["language"] = "cc0-1.0", ["en"]
    edited.data["datasets"], edited.data["tags"] = ["me/sea"], ["poems"]
    path.write_bytes(str(edited).replace("\n", "\r\n").encode())
    run = RUN | {"valid": [RUN["valid"][0] | {"loss": 1.25}]}
    causal_lm(hidden_size=13).save_pretrained(tmp_path, extra_files={"training.json": json.dumps(run).encode()})
    card = ModelCard.load(path)
    assert (card.data.license, card.data.language, card.data.datasets) == ("cc0-1.0", ["en"], ["me/sea"])
    assert card.data.tags == ["lstm", "poems"]
    assert "13 units wide" in card.text
    losses = [result.metric_value for result in card.data.eval_results if result.metric_type == "loss"]
    assert losses == [1.25]
    assert is_own(path.read_text())


def test_metadata_that_cannot_be_read_are_left_alone() -> None:
    broken = re.sub(r"\A---\n.*?\n---\n", "---\ntags: [\n---\n", card_of(), flags=re.DOTALL)
    assert is_own(broken)
    assert renewed(short_card("a/b"), broken) == broken
    with pytest.raises(ValueError, match="its metadata cannot be read"):
        with_metadata(broken, tags=["x"])


def test_tags_and_licence_on_a_card_of_the_users() -> None:
    card = "---\ntags: poems\nlicense: mit\nmodel-index: mine\n---\n\n# Mine\n"
    changed = with_metadata(card, tags=["sea"], license="cc0-1.0")
    assert changed.endswith("---\n\n# Mine\n")
    data = {"tags": ["poems", "sea"], "license": "cc0-1.0", "model-index": "mine"}
    assert list(RepoCard(changed).data.to_dict().items()) == list(data.items())
    assert with_metadata(card, tags=["poems"], license="mit") == card
    assert ModelCard(with_metadata("# Mine\n", tags=["sea"])).data.tags == ["sea"]
