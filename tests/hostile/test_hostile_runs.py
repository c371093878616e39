"""A run's checkpoint that was tampered with: resuming from it is refused by name, before a step is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import fuzzing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from training_samples import DROPOUT, make_model, make_trainer

STEP = "step-00000002"
OPTIONS = {"max_steps": 4, "save_every": 2, "eval_every": 2, "keep_last": 5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    make_trainer(folder, **OPTIONS).train()
    return folder


def resume(run: Path) -> int:
    """Take the run up at step 2 and finish it; the steps made."""
    return make_trainer(run, make_model(**DROPOUT), **OPTIONS).train(resume=run / "checkpoints" / STEP).step


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {"stop": 2}}, {"progress": {"step": "2"}}, {"progress": None}, {"progress": [2]},
        {"batches": {"epoch": 0, "index": 10**12}}, {"batches": {"epoch": -1, "index": 0}}, {"batches": {}},
        {"batches": {"epoch": 10**30, "index": 0}}, {"batches": {"epoch": True, "index": 0}},
        {"plateau": {"scale": "1", "best": None, "bad": 0}}, {"plateau": 7}, {"parts": 10**12}, {"parts": "1"},
        {"log": {"log.jsonl": -1, "log.csv": 0}}, {"log": []}, {"config": []}, {"config": None}, {"model_config": 7},
        {"data": None}, {"world_size": "1"}, {"groups": ["model"]}, {"groups": []}, {"scaler": None, "progress": {}},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_no_run_wrote(run: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    path = copy / "checkpoints" / STEP / "trainer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{STEP}.*(resume|start|settings|tokens)") as caught:
        resume(copy)
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize("group", ["model", "optimizer", "average", "processes"])
@pytest.mark.parametrize("how", ["no tensors", "one is missing", "another shape", "whole numbers", "one too many"])
def test_tensors_that_no_run_wrote(run: Path, tmp_path: Path, group: str, how: str) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    path = copy / "checkpoints" / STEP / f"{group}.safetensors"
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel() * tensors[name].is_floating_point())
    whole = {key: tensor.to(torch.int64) for key, tensor in tensors.items()}
    changed = {
        "no tensors": {},
        "one is missing": {key: tensor for key, tensor in tensors.items() if key != name},
        "another shape": tensors | {name: torch.ones(3, 2)},
        "whole numbers": whole,
        "one too many": tensors | {"7777.other": torch.ones(3)},
    }[how]
    save_file(changed, path)
    try:
        resume(copy)
    except ValueError as error:
        assert str(path.parent) in str(error)  # noqa: PT017
    else:  # what is not asked for, and what is converted, does no harm
        assert how in ("one too many", "whole numbers")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_values(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    sound = (run / "checkpoints" / STEP / "trainer.json").read_bytes()
    names = list(json.loads(sound))

    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def fuzz(data: Any) -> None:
        shutil.rmtree(copy)
        shutil.copytree(run, copy)
        path = copy / "checkpoints" / STEP / "trainer.json"
        path.write_bytes(fuzzing.mutate_json(data.draw, sound, names))
        try:
            resume(copy)
        except (ValueError, OSError) as error:
            assert str(copy / "checkpoints") in str(error)  # noqa: PT017

    fuzz()
