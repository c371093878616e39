from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hostile.samples import write_sample


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sound checkpoint, saved once."""
    folder = tmp_path_factory.mktemp("pristine")
    write_sample(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))
