"""Whatever stands in a checkpoint's files: what loads works, and what does not is a `ValueError` or `OSError` that
names the file."""

from __future__ import annotations

import dataclasses
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from hostile import fuzzing
from hostile.samples import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tlstm import LSTMConfig
from tlstm.generation.config import GenerationConfig

NAMES = {
    "config.json": [field.name for field in dataclasses.fields(LSTMConfig)],
    "generation_config.json": [field.name for field in dataclasses.fields(GenerationConfig)],
    "tokenizer_config.json": ["bos_token", "eos_token", "pad_token", "unk_token", "padding_side"],
    "tokenizer.json": ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens"],
}


def read_anything(folder: Path, name: str, content: bytes) -> bool:
    """Put `content` into the file and read it; whether that succeeded."""
    (folder / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown settings
        try:
            READERS[name](folder)
        except (ValueError, OSError) as error:
            message = str(error)
            assert re.search(re.escape(str(folder)) + r"/\S+\.(json|safetensors)", message), message
            assert len(message) < 5000
            return False
    return True


def fuzz(pristine: Path, scratch: Path, name: str, slow: bool) -> None:
    folder = Path(shutil.copytree(pristine, scratch / "checkpoint"))
    sound = (pristine / name).read_bytes()
    outcomes = set()

    @settings(
        max_examples=6000 if slow else 150,
        derandomize=not slow,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def run(data: Any) -> None:
        if data.draw(st.booleans()):
            content = fuzzing.spoil(data.draw, sound)
        elif name.endswith(".json"):
            content = fuzzing.mutate_json(data.draw, sound, NAMES.get(name, ["format", "step", "groups"]))
        else:
            content = fuzzing.mutate_tensors(data.draw, sound)
        outcomes.add(read_anything(folder, name, content))

    run()
    assert outcomes == {True, False}, "sound mutations and damage must both come up, or nothing is tested"


@pytest.mark.parametrize("name", READERS)
def test_any_file(pristine: Path, tmp_path: Path, name: str) -> None:
    fuzz(pristine, tmp_path, name, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", READERS)
def test_any_file_for_long(pristine: Path, tmp_path: Path, name: str) -> None:
    fuzz(pristine, tmp_path, name, slow=True)
