"""The one line of code in a checkpoint with which transformers loads it under `trust_remote_code=True`.

It saves the user an import of `tlstm.integrations.transformers`, not the installation of tlstm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tlstm.config import CONFIG_NAME, LSTMConfig

SHIM_NAME = "modeling_tlstm.py"
SHIM = b"from tlstm.integrations.transformers import LSTMConfig, LSTMForCausalLM\n"
AUTO_MAP = {"AutoConfig": "modeling_tlstm.LSTMConfig", "AutoModelForCausalLM": "modeling_tlstm.LSTMForCausalLM"}


def names_shim(settings: dict[str, Any]) -> bool:
    """Whether these settings of a `config.json` send transformers to the shim."""
    return settings.get("auto_map") == AUTO_MAP


def add_shim(folder: Path) -> None:
    """Put the shim into a checkpoint folder, and its name into the folder's `config.json`."""
    config = LSTMConfig.from_json_file(folder / CONFIG_NAME)
    (folder / SHIM_NAME).write_bytes(SHIM)
    config.extra = {**config.extra, "auto_map": AUTO_MAP}
    config.save_pretrained(folder)
