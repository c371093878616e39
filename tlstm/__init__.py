"""tlstm: LSTMs that keep their weights on the GPU chip, in a layer and in language models you already know how to use.

    from tlstm import LSTMForCausalLM, Tokenizer

    model = LSTMForCausalLM.from_pretrained(path)
    tokenizer = Tokenizer.from_pretrained(path)
    print(tokenizer.decode(model.generate(tokenizer("ROMEO:").input_ids, max_new_tokens=200)[0]))

Names are imported when first used, so that `import tlstm` costs nothing beyond the file it is written in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tlstm.version import __version__

if TYPE_CHECKING:
    from tlstm.checkpoint.files import CheckpointError
    from tlstm.config import LSTMConfig
    from tlstm.functional import BackendUnavailableError
    from tlstm.generation.config import GenerationConfig
    from tlstm.generation.output import GenerateOutput
    from tlstm.generation.state import GenerationState
    from tlstm.generation.streamers import TextIteratorStreamer, TextStreamer
    from tlstm.layer import LSTM
    from tlstm.models import BackboneOutput, CausalLMOutput, LSTMForCausalLM, LSTMModel
    from tlstm.pretrained import PreTrainedModel
    from tlstm.state import LSTMState
    from tlstm.tokenizer.tokenizer import Tokenizer
    from tlstm.training import Trainer, TrainingConfig

_HOMES = {
    "BackboneOutput": "tlstm.models",
    "BackendUnavailableError": "tlstm.functional",
    "CausalLMOutput": "tlstm.models",
    "CheckpointError": "tlstm.checkpoint.files",
    "GenerateOutput": "tlstm.generation.output",
    "GenerationConfig": "tlstm.generation.config",
    "GenerationState": "tlstm.generation.state",
    "LSTM": "tlstm.layer",
    "LSTMConfig": "tlstm.config",
    "LSTMForCausalLM": "tlstm.models",
    "LSTMModel": "tlstm.models",
    "LSTMState": "tlstm.state",
    "PreTrainedModel": "tlstm.pretrained",
    "TextIteratorStreamer": "tlstm.generation.streamers",
    "TextStreamer": "tlstm.generation.streamers",
    "Tokenizer": "tlstm.tokenizer.tokenizer",
    "Trainer": "tlstm.training",
    "TrainingConfig": "tlstm.training",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tlstm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # found once, then an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
