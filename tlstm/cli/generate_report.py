"""What `tlstm generate` tells of its work: settings, figures, the JSON object."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from tlstm.cli.common import format_bytes, format_count

if TYPE_CHECKING:
    from tlstm.cli.generate_texts import Result
    from tlstm.models import LSTMForCausalLM


def introduction(name: str, model: LSTMForCausalLM, settings: dict[str, Any]) -> str:
    """Two lines: the model and where it runs; the settings."""
    from tlstm.functional import LayerSize, resolve_backend
    from tlstm.layer import LSTM

    layer = next(module for module in model.modules() if isinstance(module, LSTM))
    defaults = {key: value for key, value in model.generation_config.to_dict().items() if key != "tlstm_version"}
    shown = ", ".join(f"{key}={value!r}" for key, value in sorted((defaults | settings).items()))
    where = f"{model.device}, {str(model.dtype).removeprefix('torch.')}"
    return (
        f"model {name}: {format_count(model.num_parameters())} parameters, {where}, backend "
        f"{resolve_backend(layer.backend, model.device, model.dtype, LayerSize(layer.hidden_size, 1))}"
        f"\nsettings {shown}"
    )


def report(name: str, result: Result, memory: dict[str, int]) -> dict[str, Any]:
    """The object that `--json` prints."""
    timings = dataclasses.asdict(result.timings)
    timings |= {"prefill_tokens_per_second": _prefill_speed(result), "decode_tokens_per_second": _decode_speed(result)}
    return {
        "model": name,
        "sequences": [
            {key: value for key, value in dataclasses.asdict(text).items() if key != "score" or value is not None}
            for text in result.texts
        ],
        "timings": timings,
        "peak_memory_bytes": memory,
    }


def figures(result: Result, prompt_tokens: int, memory: dict[str, int]) -> str:
    """One line: `prompt 6 tokens, 1,234 tokens/s | generated ... | peak memory ... | seed 7`."""
    # A prompt's last token is fed by the first step, so a single one has no speed of its own.
    speed = f", {_prefill_speed(result):,.0f} tokens/s" if result.timings.prefill_tokens else ""
    parts = [
        f"prompt {prompt_tokens:,} tokens{speed}",
        f"generated {result.timings.decode_tokens:,} tokens, {_decode_speed(result):,.0f} tokens/s",
    ]
    if memory:
        names = {"host": "", "device": "GPU "}
        parts.append("peak memory " + ", ".join(names[place] + format_bytes(size) for place, size in memory.items()))
    seeds = list(dict.fromkeys(text.seed for text in result.texts if text.seed is not None))
    if seeds:
        parts.append(f"seed {','.join(map(str, seeds))}")
    return " | ".join(parts)


def _prefill_speed(result: Result) -> float:
    timings = result.timings
    return timings.prefill_tokens / timings.prefill_seconds if timings.prefill_seconds else 0.0


def _decode_speed(result: Result) -> float:
    return result.timings.decode_tokens_per_second
