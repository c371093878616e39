"""What the README promises: its Python runs as printed, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = README.split("## On the command line")[1].split("```")[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_runs_in_order(tmp_path, monkeypatch, capsys):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")  # the snippets write beside themselves
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict = {}
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"README, snippet {number}", "exec"), scope)
    out = capsys.readouterr().out
    assert len(SNIPPETS) == 5
    assert out.startswith("JULIET:\n")
    assert len(out) > 200 + 3 * 80  # one text, then three of the cached prompt
    assert scope["y"].shape == (70, 20, 115)


@pytest.mark.parametrize("command", re.findall(r"^tlstm (\w+)", COMMANDS, re.MULTILINE))
def test_commands_exist(command):
    done = subprocess.run([sys.executable, "-m", "tlstm", command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([\w-]+)", README, re.MULTILINE)
    assert set(targets) == {"generate", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_tree_is_the_tree():
    tree = README.split("## The tree")[1].split("```")[1]
    for line in tree.strip().splitlines():
        assert (ROOT / line.split()[0]).is_dir(), line
