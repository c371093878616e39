"""`tlstm push` and `tlstm pull` against a loopback Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from small_models import assert_same_model, causal_lm

from tlstm import LSTMForCausalLM, Tokenizer

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
FILES = {"config.json", "generation_config.json", "model.safetensors", "README.md"} | TOKENIZER


@pytest.fixture
def tlstm(client):
    def run(*arguments: object) -> tuple[int, str, str]:
        code = "result = tlstm_command(*arguments)"
        return tuple(client.run(code, arguments=[str(argument) for argument in arguments]))

    return run


def saved(folder: Path, seed: int = 0, **options) -> LSTMForCausalLM:
    tokenizer = Tokenizer.bytes()
    model = causal_lm(seed, vocab_size=tokenizer.vocab_size)
    model.save_pretrained(folder, tokenizer=tokenizer, **options)
    return model


def visible(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def test_there_and_back(hub, tlstm, name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "made", extra_files={"README.md": b"# Mine\n", "figures/loss.png": b"PNG"})
    (tmp_path / "made" / ".secret").write_text("no part of the model")
    code, out, err = tlstm("push", tmp_path / "made", name, "--private", "--message", "Look")
    assert code == 0, err
    repo = hub.repos[name]
    assert out == f"{hub.url}/{name}/commit/{repo.head}\n"
    assert repo.private
    assert repo.find("main").title == "Look"
    assert repo.names() == FILES | {"figures/loss.png", ".gitattributes"}
    code, out, err = tlstm("pull", name, tmp_path / "new" / "pulled")
    assert code == 0, err
    assert f"{model.num_parameters():,} parameters" in out
    pulled = tmp_path / "new" / "pulled"
    assert visible(pulled) == FILES
    assert not any(path.is_symlink() for path in pulled.iterdir())
    assert_same_model(LSTMForCausalLM.from_pretrained(pulled), model)
    assert Tokenizer.from_pretrained(pulled).kind == "byte"


def test_branch_and_pull_request(hub, tlstm, name: str, tmp_path: Path) -> None:
    models = [saved(tmp_path / str(seed), seed) for seed in range(3)]
    assert tlstm("push", tmp_path / "0", name)[0] == 0
    assert tlstm("push", tmp_path / "1", name, "--revision", "dev")[0] == 0
    code, out, _ = tlstm("push", tmp_path / "2", name, "--create-pr")
    assert (code, out) == (0, f"{hub.url}/{name}/discussions/1\n")
    for revision, model in zip(("main", "dev", "refs/pr/1"), models, strict=True):
        assert tlstm("pull", name, tmp_path / "pulled", "--revision", revision)[0] == 0
        assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "pulled"), model)


def test_revision_in_the_name_and_tag(hub, tlstm, name: str, tmp_path: Path) -> None:
    models = [saved(tmp_path / str(seed), seed) for seed in range(2)]
    assert tlstm("push", tmp_path / "0", name, "--branch", "dev", "--tag", "v1.0")[0] == 0
    assert tlstm("push", tmp_path / "1", name, "--revision", "dev")[0] == 0
    for revision, model in zip(("v1.0", "dev"), models, strict=True):
        assert tlstm("pull", f"{name}@{revision}", tmp_path / "pulled")[0] == 0
        assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "pulled"), model)
    head = hub.repos[name].find("dev").oid
    for arguments, message in (
        (("--tag", "v1.0"), "has this tag already"),
        (("--tag", "v2.0", "--create-pr"), "--tag and --create-pr exclude each other"),
    ):
        code, out, err = tlstm("push", tmp_path / "0", name, "--revision", "dev", *arguments)
        assert (code, out) == (2, "")
        assert message in err
    assert hub.repos[name].find("dev").oid == head
    code, _, err = tlstm("pull", f"{name}@dev", tmp_path / "pulled", "--revision", "v1.0")
    assert (code, "the revision is given twice" in err) == (2, True)


def test_token_and_parent_commit(hub, tlstm, name: str, tmp_path: Path) -> None:
    saved(tmp_path / "first")
    model = saved(tmp_path / "second", 1)
    assert tlstm("push", tmp_path / "first", name, "--private")[0] == 0
    first = hub.repos[name].head
    for command in (("push", tmp_path / "second", name), ("pull", name, tmp_path / "pulled")):
        code, _, err = tlstm(*command, "--token", "hf_stranger")
        assert (code, err.count("\n")) == (2, 1)
    assert hub.repos[name].head == first
    assert tlstm("push", tmp_path / "second", name, "--parent-commit", first, "--token", "hf_owner")[0] == 0
    code, _, err = tlstm("push", tmp_path / "first", name, "--parent-commit", first)
    assert (code, "412" in err) == (2, True)
    assert tlstm("pull", name, tmp_path / "pulled", "--token", "hf_owner")[0] == 0
    assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "pulled"), model)


def test_variants_travel_by_themselves(hub, tlstm, name: str, tmp_path: Path) -> None:
    plain = saved(tmp_path / "made")
    half = saved(tmp_path / "made", 1, variant="fp16", max_shard_size=2000)
    assert tlstm("push", tmp_path / "made", name, "--variant", "fp16")[0] == 0
    weights = {file for file in hub.repos[name].names() if file.startswith("model")}
    assert len(weights) > 2
    assert all("fp16" in file for file in weights)
    assert tlstm("pull", name, tmp_path / "pulled", "--variant", "fp16")[0] == 0
    assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "pulled", variant="fp16"), half)
    saved(tmp_path / "made", 1, variant="fp16")
    assert tlstm("push", tmp_path / "made", name)[0] == 0
    assert {"model.safetensors", "model.fp16.safetensors"} <= hub.repos[name].names()
    assert tlstm("pull", name, tmp_path / "other")[0] == 0
    assert "model.fp16.safetensors" not in visible(tmp_path / "other")
    assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "other"), plain)


def test_a_card_for_a_folder_without_one(hub, tlstm, name: str, tmp_path: Path) -> None:
    saved(tmp_path / "made", extra_files={"training.json": b'{"command": "tlstm train --data sea.txt"}'})
    (tmp_path / "made" / "README.md").unlink()
    arguments = ("push", tmp_path / "made", name, "--license", "mit", "--card-tag", "sea", "--card-tag", "wind")
    assert tlstm(*arguments)[0] == 0
    card = ModelCard(hub.repos[name].find("main").files["README.md"].content.decode())
    assert (card.data.license, card.data.tags) == ("mit", ["lstm", "sea", "wind"])
    assert f'path = "{name}"' in card.text
    assert "tlstm train --data sea.txt" in card.text
    (tmp_path / "made" / "README.md").write_text("# Mine\n")
    assert tlstm(*arguments)[0] == 0
    card = ModelCard(hub.repos[name].find("main").files["README.md"].content.decode())
    assert (card.data.license, card.text.strip()) == ("mit", "# Mine")


def test_a_readme_that_is_no_card_stays(hub, tlstm, name: str, tmp_path: Path) -> None:
    saved(tmp_path / "made", extra_files={"loss.png": b"PNG"})
    assert tlstm("push", tmp_path / "made", name)[0] == 0
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("My project")
    assert tlstm("pull", name, tmp_path / "project")[0] == 0
    assert (tmp_path / "project" / "README.md").read_text() == "My project"
    assert visible(tmp_path / "project") == FILES | {"loss.png"}


def test_the_former_checkpoint_goes_as_a_whole(hub, tlstm, name: str, tmp_path: Path) -> None:
    model = causal_lm(1)
    model.save_pretrained(tmp_path / "sharded", max_shard_size=700)
    saved(tmp_path / "single")
    (tmp_path / "single" / "notes.txt").write_text("mine")
    assert tlstm("push", tmp_path / "single", name)[0] == 0
    assert tlstm("push", tmp_path / "sharded", name)[0] == 0
    assert "model.safetensors" not in hub.repos[name].names()
    repo = hub.repos[name]
    without = {path: file for path, file in repo.find("main").files.items() if "tokenizer" not in path}
    repo.refs["refs/heads/main"] = repo.add_commit("no tokenizer", "", without, repo.head).oid
    assert tlstm("pull", name, tmp_path / "single")[0] == 0
    assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "single"), model)
    assert visible(tmp_path / "single") == visible(tmp_path / "sharded") | {"notes.txt", "README.md"}


def test_what_is_no_checkpoint_is_neither_pushed_nor_pulled(hub, tlstm, name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    assert tlstm("push", tmp_path / "model", name)[0] == 0
    head = hub.repos[name].head
    damaged = tmp_path / "damaged"
    saved(damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-1])
    for folder in (damaged, tmp_path / "nowhere", tmp_path):
        code, _, err = tlstm("push", folder, name)
        assert (code, err.count("\n")) == (2, 1)
    assert hub.repos[name].head == head
    repo = hub.repos[name]
    repo.refs["refs/heads/main"] = repo.add_commit("empty", "", {}, head).oid
    code, _, err = tlstm("pull", name, tmp_path / "model")
    assert code == 2
    assert f"{name}: no checkpoint" in err
    assert "config.json" in err
    assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "model"), model)


@pytest.mark.parametrize(
    ("link", "leads_to"),
    [
        ("notes.txt", "../secret.txt"),
        ("notes.txt", "../model-and-more/secret.txt"),  # a name that begins like the folder's
        ("notes.txt", ".git/config"),
        ("figures/loss.png", "../../secret.txt"),
        ("figures", "../others"),
        ("blobs", "../others"),
    ],
)
def test_links_out_of_the_folder_are_not_pushed(
    hub, tlstm, name: str, tmp_path: Path, link: str, leads_to: str
) -> None:
    folder = tmp_path / "model"
    saved(folder)
    for secret in ("secret.txt", "model-and-more/secret.txt", "others/secret.txt", "model/.git/config"):
        (tmp_path / secret).parent.mkdir(exist_ok=True)
        (tmp_path / secret).write_text("password")
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(leads_to)
    code, _, err = tlstm("push", folder, name)
    assert (code, err.count("\n")) == (2, 1)
    assert "a link to" in err
    assert name not in hub.repos
    (folder / link).unlink()
    assert tlstm("push", folder, name)[0] == 0  # hidden files without a link to them are simply left out
    assert hub.repos[name].names() == FILES | {".gitattributes"}


def test_links_of_the_hubs_cache_and_within_a_folder_are_followed(hub, tlstm, name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    cache = tmp_path / "models--user--name"
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(path for path in (tmp_path / "model").iterdir() if path.name[0] != "."):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "copy.json").symlink_to("config.json")
    (tmp_path / "short").symlink_to(snapshot)  # the folder itself may be named by a link
    assert tlstm("push", tmp_path / "short", name)[0] == 0
    assert hub.repos[name].names() == FILES | {"copy.json", ".gitattributes"}
    assert tlstm("pull", name, tmp_path / "pulled")[0] == 0
    assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "pulled"), model)
    (cache / "secret.txt").write_text("password")
    (snapshot / "notes.txt").symlink_to("../../secret.txt")
    code, _, err = tlstm("push", snapshot, name)
    assert (code, "a link to" in err) == (2, True)


def test_a_server_that_is_gone_is_told_in_one_line(hub, tlstm, name: str, tmp_path: Path) -> None:
    saved(tmp_path / "model")
    hub.stop()
    for arguments in (("push", tmp_path / "model", name), ("pull", name, tmp_path / "pulled")):
        code, out, err = tlstm(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("tlstm: error: ")
    assert not (tmp_path / "pulled").exists()
