"""keep_freed_memory: large blocks are reused instead of being fetched from the kernel again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from tlstm.training.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def touch():
    torch.ones(8 << 20)  # 32 MiB: 8,192 pages
for _ in range(5):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc's allocator")
def test_freed_blocks_are_used_again():
    faults = {
        setting: int(
            subprocess.run([sys.executable, "-c", SCRIPT, setting], check=True, capture_output=True, text=True).stdout
        )
        for setting in ("default", "kept")
    }
    assert faults["kept"] * 10 < faults["default"]


def test_other_systems_are_left_alone(monkeypatch):
    from tlstm.training import memory

    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed_memory() is False
