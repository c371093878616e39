"""Two processes under torchrun against one process with the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_samples import assert_same_run, log_without_times, make_model, make_trainer

SCRIPT = """
import sys
from pathlib import Path
import torch
from training_samples import DROPOUT, make_model, make_trainer

torch.set_num_threads(1)
folder = Path(sys.argv[1])

exact = {"gradient_accumulation": 3, "batch_size": 12, "max_steps": 20}
make_trainer(folder / "exact", make_model(torch.float64), **exact).train()

make_trainer(folder / "whole", max_steps=24).train()
trainer = make_trainer(folder / "cut", max_steps=24)
if trainer.world.rank == 1:
    trainer.request_stop()  # one process is asked, all stop
stopped = trainer.train()
assert (stopped.status, stopped.step) == ("interrupted", 0), stopped
trainer = make_trainer(folder / "cut", max_steps=24)
if trainer.world.rank == 0:
    trainer.callbacks.append(lambda record: record["step"] == 12 and trainer.request_stop())
stopped = trainer.train(resume=True)
assert (stopped.status, stopped.step) == ("interrupted", 16), stopped
finished = make_trainer(folder / "cut", max_steps=24).train(resume=True)
assert finished.status == "finished"
masks = torch.rand(9)
(folder / f"draws-{trainer.world.rank}").write_text(str(masks.tolist()))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*torchrun, str(folder / "script.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )
    return folder


def test_two_processes_give_the_losses_of_one(two_processes: Path, tmp_path: Path) -> None:
    """In float64 and without dropout only the order of a few sums differs."""
    make_trainer(tmp_path, make_model(torch.float64), batch_size=12, max_steps=20).train()
    one, two = (log_without_times(path) for path in (tmp_path, two_processes / "exact"))
    assert [record["event"] for record in one] == [record["event"] for record in two]
    for mine, theirs in zip(one, two, strict=True):
        numbers = {key for key, value in mine.items() if not isinstance(value, str)}
        assert {key: mine[key] for key in numbers} == pytest.approx({key: theirs[key] for key in numbers}, rel=1e-11)
    assert sum(record["event"] == "train" for record in one) == 7


def test_two_processes_resume_exactly(two_processes: Path) -> None:
    """Every process has its own hidden states and generators, and finds them again."""
    assert_same_run(two_processes / "cut", two_processes / "whole", 24)


def test_processes_drop_out_independently(two_processes: Path) -> None:
    assert (two_processes / "draws-0").read_text() != (two_processes / "draws-1").read_text()


def test_another_number_of_processes_is_refused(two_processes: Path) -> None:
    with pytest.raises(ValueError, match=r"saved by 2 process\(es\), this one has 1"):
        make_trainer(two_processes / "cut", max_steps=24).train(resume=True)
