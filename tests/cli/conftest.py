"""Tiny models on disk, and the command line run in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tlstm import GenerationConfig, LSTMConfig, LSTMForCausalLM, Tokenizer
from tlstm.cli import main

ROOT = Path(__file__).parents[2]
SAMPLE = "the quick brown fox jumps over the lazy dog; Zoë naïvely said: “né?”\nROMEO:\n" * 40


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `tlstm` with these arguments in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For `python -m tlstm` in a process of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def spawn(environment: dict[str, str]) -> Callable[..., subprocess.Popen[bytes]]:
    """Start `python -m tlstm` with these arguments."""

    def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tlstm", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, env=environment, **pipes | options)

    return start


def _save(folder: Path, tokenizer: Tokenizer, seed: int, **settings: object) -> Path:
    torch.manual_seed(seed)
    config = LSTMConfig(
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=1.0,  # logits that differ: greedy choice and sampling see a real distribution
        **settings,
    )
    LSTMForCausalLM(config).save_pretrained(folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character model without special tokens."""
    return _save(
        tmp_path_factory.mktemp("models") / "char",
        Tokenizer.train_char(SAMPLE),
        1,
        layer_sizes=[17, 13],
        embedding_size=7,
    )


@pytest.fixture(scope="session")
def byte_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model with bos and eos, a tied head, and generation settings of its own."""
    tokenizer = Tokenizer.bytes(bos_token="<bos>", eos_token="<eos>")
    folder = _save(
        tmp_path_factory.mktemp("models") / "byte", tokenizer, 2, hidden_size=11, num_layers=1, tie_word_embeddings=True
    )
    GenerationConfig(do_sample=True, temperature=0.7, top_k=5, max_new_tokens=9).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SAMPLE, encoding="utf-8")
    return path
