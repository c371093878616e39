"""Runs that several training tests compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_samples import make_trainer


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `make_trainer`'s defaults."""
    out_dir = tmp_path_factory.mktemp("uninterrupted")
    make_trainer(out_dir).train()
    return out_dir
