"""What a model card says, section by section: plain Markdown from a config and the figures of a training run.

A `training.json` that `tlstm train` has not written may hold anything; what is not there, or of another kind, is left
out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from tlstm.version import __version__

CURVE_NAME, FIGURES_NAME = "loss.png", "training.json"
# Key in training.json -> (metric type on the Hub, its name, the table's column).
METRICS = {
    "loss": ("loss", "Loss (nats per token)", "nats/token"),
    "perplexity": ("perplexity", "Perplexity per token", "perplexity"),
    "bits_per_character": ("bits_per_character", "Bits per character", "bits/character"),
    "bits_per_byte": ("bits_per_byte", "Bits per byte", "bits/byte"),
}
LICENCE = "## Licence\n\nThe head of this card states it (`license`); where it does not, none has been granted yet."
_PROMPTS = ("The ", "the ", "\n", " ")


def class_name(config: Mapping[str, Any]) -> str:
    """The model class that the checkpoint names."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "LSTMForCausalLM"


def read_json_object(content: bytes | None) -> dict[str, Any]:
    """The JSON object in a file; an empty one, where there is no file or something else in it."""
    try:
        values = json.loads(content or b"{}")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _part(values: Any, key: str) -> dict[str, Any]:
    part = values.get(key) if isinstance(values, dict) else None
    return part if isinstance(part, dict) else {}


def _number(values: Any, key: str) -> float | None:
    """A finite number; a file that is not from `tlstm train` may hold anything."""
    value = values.get(key) if isinstance(values, dict) else None
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def _evaluations(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = run.get("valid")
    return [each for each in found if _number(each, "loss") is not None] if isinstance(found, list) else []


def _data_name(run: Mapping[str, Any]) -> str | None:
    """The file name of the validation text (of the whole one, where validation is a part of it)."""
    data = _part(run, "data")
    path = (_part(data, "valid") or _part(data, "text")).get("path")
    return Path(path).name if isinstance(path, str) else None


def eval_results(run: Mapping[str, Any]) -> list[EvalResult]:
    """The figures of the first protocol, for the Hub's table."""
    first = next(iter(_evaluations(run)), {})
    data = _data_name(run) or "validation tokens"
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Language modelling",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", Path(data).stem.lower()).strip("-") or "text",
            dataset_name=f"{data}, validation part: {first['protocol']}",
            metric_type=kind,
            metric_name=title,
            metric_value=round(first[key], 4),
        )
        for key, (kind, title, _) in METRICS.items()
        if _number(first, key) is not None and isinstance(first.get("protocol"), str)
    ]


def description(config: Mapping[str, Any], parameters: int) -> str:
    """What kind of model it is, in a sentence."""
    widths = config.get("layer_sizes") or [config.get("hidden_size")] * int(config.get("num_layers") or 1)
    sizes = str(widths[0]) if len(set(widths)) == 1 else "-".join(map(str, widths))
    extras = [
        f"recurrent projections to {config['proj_size']}" if config.get("proj_size") else "",
        "residual connections" if config.get("residual") else "",
        "the head tied to the embedding" if config.get("tie_word_embeddings") else "",
    ]
    listed = ", ".join(filter(None, extras))
    stored = f"{config['quantization']} matrices" if config.get("quantization") else config.get("dtype")
    return (
        f"{'A language model' if class_name(config) == 'LSTMForCausalLM' else 'A recurrent network'} of "
        f"{len(widths)} LSTM layer{'s' * (len(widths) > 1)}, {sizes} units wide{', with ' + listed if listed else ''}; "
        f"vocabulary {config.get('vocab_size'):,}; {parameters:,} parameters, stored in {stored}. "
        "It loads with the library `tlstm`."
    )


def usage(config: Mapping[str, Any], name: str, tokenizer: bytes | None) -> str:
    """A snippet that runs as it stands, beside the folder or anywhere with a Hub repo."""
    kind, path = class_name(config), json.dumps(name, ensure_ascii=False)
    if kind != "LSTMForCausalLM":
        lines = ["output = model(torch.tensor([[0]]))", "print(output.last_hidden_state.shape)"]
    elif tokenizer is None:
        lines = ["ids = model.generate(torch.tensor([[0]]), max_new_tokens=200, do_sample=True, seed=1)", "print(ids)"]
    else:
        lines = [
            "tokenizer = Tokenizer.from_pretrained(path)",
            "",
            f"prompt = tokenizer({json.dumps(_prompt(tokenizer), ensure_ascii=False)}).input_ids",
            "ids = model.generate(prompt, max_new_tokens=200, do_sample=True, temperature=0.8, seed=1)",
            "print(tokenizer.decode(ids[0]))",
        ]
    with_text = tokenizer is not None and kind == "LSTMForCausalLM"
    imports = (
        [f"from tlstm import {kind}, Tokenizer"] if with_text else ["import torch", "", f"from tlstm import {kind}"]
    )
    snippet = [*imports, "", f"path = {path}", f"model = {kind}.from_pretrained(path)", *lines]
    return "## How to use it\n\n" + _fenced("\n".join(snippet), "python")


def _prompt(tokenizer: bytes) -> str:
    """A beginning that the tokenizer can encode: one of characters knows those of its training text only."""
    model = _part(read_json_object(tokenizer), "model")
    vocabulary = model.get("vocab")
    if model.get("type") != "WordLevel" or not isinstance(vocabulary, dict):
        return _PROMPTS[0]
    known = (prompt for prompt in _PROMPTS if all(character in vocabulary for character in prompt))
    return next(known, next((token for token in vocabulary if len(token) == 1), ""))


def quality(run: Mapping[str, Any], *, with_curve: bool) -> str:
    """The figures of the final evaluation, or the latest before it, and the curve."""
    rows = _evaluations(run)
    keys = [key for key in METRICS if any(_number(row, key) is not None for row in rows)]
    parts = []
    if rows:
        head = ["protocol", *(METRICS[key][2] for key in keys), "tokens scored"]
        cells = [
            [str(row.get("protocol")), *(_figure(row, key, ".4f") for key in keys), _figure(row, "tokens", ",")]
            for row in rows
        ]
        table = [head, ["---"] * len(head), *cells]
        data = f" of `{name}`" if (name := _data_name(run)) else ""
        parts += [
            f"On the validation part{data}, measured on the weights as stored:",
            "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table),
        ]
    latest = _part(run, "latest_valid")
    if not rows and _number(latest, "loss") is not None:
        parts.append(
            f"The latest evaluation during training, at step {_figure(latest, 'step', ',')}: "
            f"{_figure(latest, 'loss', '.4f')} nats per token ({latest.get('protocol')})."
        )
    if with_curve:
        parts.append(f"![Loss against the number of tokens trained on]({CURVE_NAME})")
    return "\n\n".join(["## How good it is", *parts]) if parts else ""


def training(run: Mapping[str, Any]) -> str:
    """The command, and what it took."""
    command = run.get("command")
    parts = [_fenced(command)] if isinstance(command, str) else []
    steps, total = _number(run, "steps"), _number(run, "total_steps")
    if steps is not None and total is not None and steps < total:
        parts.append(f"**Training is not finished: step {steps:,} of {total:,}.**")
    facts = [
        ("steps", _figure(run, "steps", ",")),
        ("epochs", _figure(run, "epochs", ",")),
        ("tokens", _figure(run, "tokens", ",")),
        ("time", "" if (seconds := _number(run, "seconds")) is None else _duration(seconds)),
        ("hardware", _hardware(run)),
        ("data", f"`{name}`" if (name := _data_name(run)) else ""),
        ("tokens to train on / to validate on", _split(_part(run, "data"))),
        ("exported weights", str(run.get("weights") or "")),
        ("torch", str(run.get("torch_version") or "")),
    ]
    listed = "\n".join(f"- {label}: {value}" for label, value in facts if value not in ("", "-"))
    closing = (
        f"`{FIGURES_NAME}` has every setting and figure. Trained with tlstm {run.get('tlstm_version', __version__)}."
    )
    return "\n\n".join(["## How it was trained", *parts, *([listed] if listed else []), closing])


def _figure(values: Mapping[str, Any], key: str, form: str) -> str:
    value = _number(values, key)
    return "-" if value is None else format(value, form)


def _hardware(run: Mapping[str, Any]) -> str:
    count = _number(run, "processes")
    prefix = f"{count} x " if count is not None and count > 1 else ""
    return f"{prefix}{run['hardware']}" if isinstance(run.get("hardware"), str) else ""


def _split(data: Mapping[str, Any]) -> str:
    if _number(data, "train_tokens") is None:
        return ""
    return f"{_figure(data, 'train_tokens', ',')} / {_figure(data, 'valid_tokens', ',')}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} minutes"


def _fenced(text: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
