"""The Hub's own command line as a second client, and the default environment where files are in LFS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub.calls import command, made, pull, push
from hub.client import Client, ClientError
from hub.loopback import LoopbackHub
from small_models import assert_same_model, causal_lm

from tlstm import LSTMForCausalLM, Tokenizer

MODEL = {"config.json", "generation_config.json", "README.md", "tokenizer.json", "tokenizer_config.json"}


def hf(hub: LoopbackHub, home: Path, *arguments: object, **environment: str) -> str:
    """What `hf arguments...` prints, in an environment of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_owner", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", *map(str, arguments)],
        env={**kept, **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("form", [{}, {"max_shard_size": 4000}])
@pytest.mark.parametrize("part_size", [None, 1000])
def test_hf_downloads_what_was_pushed(
    hub: LoopbackHub, lfs_client: Client, name: str, tmp_path: Path, form: dict, part_size: int | None
) -> None:
    """With Xet on, as users have it; the files went into LFS whole and in parts."""
    hub.lfs_suffixes, hub.part_size = (".safetensors",), part_size
    code = """
        tokenizer = Tokenizer.bytes()
        causal_lm(3, vocab_size=tokenizer.vocab_size).push_to_hub(name, tokenizer=tokenizer, **form)
    """
    lfs_client.run(code, name=name, form=form)
    hf(hub, tmp_path, "download", name, "--local-dir", tmp_path / "got")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "got")
    expected = causal_lm(3, vocab_size=tokenizer.vocab_size)
    assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "got"), expected)
    assert {path.name for path in (tmp_path / "got").iterdir() if path.is_file()} >= MODEL
    for path in (tmp_path / "got").glob("*.safetensors"):
        assert hub.repos[name].find("main").files[path.name].lfs


@pytest.mark.parametrize("lfs", [False, True])
def test_tlstm_pulls_what_hf_uploaded(hub: LoopbackHub, client: Client, name: str, tmp_path: Path, lfs: bool) -> None:
    hub.lfs_suffixes = (".safetensors",) if lfs else ()
    causal_lm(4).save_pretrained(tmp_path / "saved", tokenizer=Tokenizer.bytes(), max_shard_size=700)
    hf(hub, tmp_path, "upload", name, tmp_path / "saved", HF_HUB_DISABLE_XET="1")
    assert pull(client, name) == made(client, 4)
    code, _, err = command(client, "pull", name, tmp_path / "pulled")
    assert code == 0, err
    assert_same_model(LSTMForCausalLM.from_pretrained(tmp_path / "pulled"), causal_lm(4))


def test_the_cache_is_shared_with_hf(hub: LoopbackHub, client: Client, name: str, tmp_path: Path) -> None:
    push(client, name)
    hf(hub, tmp_path, "download", name, "--cache-dir", tmp_path / "cache")
    hub.requests.clear()
    assert pull(client, name, cache_dir=str(tmp_path / "cache"), local_files_only=True) == made(client, 0)
    assert hub.requests == []


@pytest.mark.parametrize("part_size", [None, 1000])
def test_the_default_environment_pulls_from_lfs(
    hub: LoopbackHub, lfs_client: Client, default_client: Client, name: str, part_size: int | None
) -> None:
    hub.lfs_suffixes, hub.part_size = (".safetensors",), part_size
    push(lfs_client, name, max_shard_size=700)
    assert pull(default_client, name) == made(default_client, 0)
    shards = [file for path, file in hub.repos[name].find("main").files.items() if path.endswith(".safetensors")]
    assert len(shards) > 1
    assert all(shard.lfs for shard in shards)


def test_the_default_environment_pushes_to_a_hub_without_xet(
    hub: LoopbackHub, lfs_client: Client, default_client: Client, name: str
) -> None:
    """The client sends large files by Xet where its package is installed, and this Hub has none: told, nothing lost."""
    hub.lfs_suffixes = (".safetensors",)
    first = push(lfs_client, name)
    try:
        second = push(default_client, name, 1)
    except ClientError as error:
        assert {"HfHubHTTPError", "OSError", "ValueError"} & set(error.kinds), error  # noqa: PT017
        assert hub.repos[name].head == first
    else:  # hf_xet is not installed: by Git LFS after all
        assert hub.repos[name].head == second
        assert pull(default_client, name) == made(default_client, 1)


def test_progress_bars_are_for_terminals_and_not_for_quiet(hub: LoopbackHub, client: Client, name: str) -> None:
    shown = client.run(
        """
        import contextlib, io
        from tlstm.cli import main

        class Terminal(io.StringIO):
            def isatty(self):
                return True

        tokenizer = Tokenizer.bytes()
        causal_lm(vocab_size=tokenizer.vocab_size).push_to_hub(name, tokenizer=tokenizer)
        result = []
        for err, flags in ((Terminal(), []), (Terminal(), ["--quiet"]), (io.StringIO(), ["--quiet"])):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                code = main(["generate", "--model", name, "--prompt", "Hi", "--max-new-tokens", "3", *flags])
            result.append([code, err.getvalue()])
        """,
        name=name,
    )
    assert "Fetching" in shown[0][1]
    assert [code for code, _ in shown] == [0, 0, 0]
    assert shown[1:] == [[0, ""], [0, ""]]
    code, _, err = command(client, "info", "--model", f"{name}@main")
    assert (code, err) == (0, "")
