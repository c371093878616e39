"""`tlstm generate`: text from a model, on stdout as it is made; figures on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlstm.cli import arguments
from tlstm.cli.common import (
    ModelSource,
    add_model_arguments,
    format_bytes,
    format_count,
    load_model,
    peak_memory,
    set_threads,
)

if TYPE_CHECKING:
    from tlstm.cli.generate_texts import Result
    from tlstm.models import LSTMForCausalLM

DESCRIPTION = """Continue a text, or make one up. The text goes to stdout as it is made, the prompt first; speed, memory
and the seed (which repeats the text) go to stderr.

Settings that are not given come from the checkpoint's generation_config.json, except that this command samples unless
--greedy or --num-beams says otherwise. Ctrl-C ends the text; what was made is kept, --state-out included.
"""
EPILOG = """examples:
  tlstm generate --prompt "ROMEO:" --max-new-tokens 500 --temperature 0.8 --seed 7
  echo "Once upon a time" | tlstm generate --model user/name@v1.0 --top-p 0.95
  tlstm generate --prompt - --stop "\\n\\n" < beginning.txt
  tlstm generate --prompt-file prompts.txt --num-return-sequences 4 --json > texts.json
  tlstm generate --prompt "First" --max-new-tokens 100 --state-out text.safetensors
  tlstm generate --state-in text.safetensors --max-new-tokens 100
"""
# Fields that change what `generate` returns in Python and mean nothing to a reader of text.
API_FIELDS = ("return_dict_in_generate", "output_scores", "output_logits", "extra")
_FRESH_SEEDS = 1 << 32  # short enough to be typed again
# Multiply-adds of one step below which a second CPU thread is not worth it: it makes an idle machine some 40 % faster,
# but on a busy one the threads wait for each other at every product, and the text comes ten times slower.
_SMALL_STEP = 1 << 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tlstm.generation.config import GenerationConfig
    from tlstm.generation.decoders import DECODERS

    group = add_model_arguments(parser, threads="1 where a step is small, else torch's choice")
    group.add_argument(
        "--decoder",
        default="auto",
        choices=DECODERS,
        help="way to make the tokens (default: the fastest that serves the request; --verbose tells)",
    )
    prompt = parser.add_argument_group("prompt")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue; - or a pipe reads it from stdin, as it is (default: begin a new text)",
    )
    source.add_argument("--prompt-file", metavar="FILE", help="one prompt a line, continued side by side")
    prompt.add_argument("--state-in", metavar="FILE", help="continue where --state-out left off; a prompt adds to it")
    prompt.add_argument("--state-out", metavar="FILE", help="save where the text stands, to be continued later")
    output = parser.add_argument_group("output")
    output.add_argument("--no-echo", action="store_true", help="leave the prompt out of the text")
    output.add_argument("--json", action="store_true", help="print one JSON object: texts, tokens, reasons, figures")
    amount = output.add_mutually_exclusive_group()
    amount.add_argument("--quiet", action="store_true", help="no figures on stderr")
    amount.add_argument("--verbose", action="store_true", help="also say what runs where, with which settings")
    arguments.add_dataclass_arguments(
        parser,
        GenerationConfig,
        exclude=API_FIELDS,
        aliases={"stop_strings": ("--stop",), "do_sample": ("--sample",)},
        escaped=("stop_strings",),
        texts={
            "stop_strings": "end with the token that completes this text; may be repeated, \\n is a line end",
            "do_sample": "draw from the distribution (default: on, unless --num-beams)",
            "seed": "repeats a text: a 64-bit number, or one per prompt (default: a fresh one, told with the figures)",
            "early_stopping": "end a beam search when --num-beams texts are complete (true), when a better one is "
            "unlikely (false, the default), or impossible (never)",
            "eos_token_id": "ids that end a sequence; [] for none",
        },
    )
    parser.add_argument_group("shorthands").add_argument(
        "--greedy",
        dest="do_sample",
        action="store_const",
        const=False,
        default=argparse.SUPPRESS,
        help="always the most likely token (--no-do-sample)",
    )


def run(args: argparse.Namespace) -> int:
    from tlstm.cli.generate_texts import encode_prompt, generate_many, generate_one, read_prompts
    from tlstm.generation.state import GenerationState
    from tlstm.training.interrupt import StopRequest

    if args.state_out is not None and not Path(args.state_out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--state-out {args.state_out}: its folder does not exist; make it first")
    words = read_prompts(args)
    source = ModelSource.parse(args.model)
    state = None if args.state_in is None else GenerationState.load(args.state_in)
    model, tokenizer = load_model(source, args)
    settings = choose_settings(args, model, has_seeds=state is not None and state.seeds is not None)
    effective = model.generation_config.replace(**settings)  # checks them before any work is done
    bos = effective.bos_token_id if effective.bos_token_id is not None else model.config.bos_token_id
    prompts = [(text, encode_prompt(text, tokenizer, bos, continued=state is not None)) for text in words]
    rows = effective.num_return_sequences * max(len(prompts), 1 if state is None else state.batch_size)
    if args.threads is None and model.num_parameters() * rows < _SMALL_STEP:
        set_threads(1)
    if args.verbose:
        print(_introduction(str(source), model, settings), file=sys.stderr)

    stop = StopRequest()
    write = _write if not args.json else _swallow
    if effective.num_beams > 1:  # its steps are not told apart from outside: Ctrl-C ends it at once
        result = generate_many(model, tokenizer, prompts, state, settings, None)
    elif rows > 1:
        with stop:
            result = generate_many(model, tokenizer, prompts, state, settings, stop)
    else:
        with stop:
            prompt = prompts[0] if prompts else None
            result = generate_one(model, tokenizer, prompt, state, settings, stop, write, echo=not args.no_echo)
            if not result.reader_gone:
                write("\n")
    if args.state_out is not None:
        result.state.save(args.state_out)
    if effective.num_beams > 1 or rows > 1:
        write("\n---\n".join(("" if args.no_echo else text.prompt) + text.text for text in result.texts) + "\n")
    memory = peak_memory(model.device)
    if args.json:
        print(json.dumps(_report(str(source), result, memory), ensure_ascii=False), flush=True)
    if not args.quiet:
        print(_figures(result, sum(len(ids) for _, ids in prompts), memory), file=sys.stderr)
    if result.reader_gone:
        raise BrokenPipeError
    return 0 if stop.signal is None else 128 + stop.signal


def choose_settings(args: argparse.Namespace, model: LSTMForCausalLM, *, has_seeds: bool) -> dict[str, Any]:
    """What differs from the checkpoint's settings: the flags, sampling unless asked otherwise, a seed to name."""
    from tlstm.generation.config import GenerationConfig

    settings = arguments.given(args, GenerationConfig)
    defaults = model.generation_config
    if "do_sample" not in settings:
        settings["do_sample"] = settings.get("num_beams", defaults.num_beams) == 1
    if settings["do_sample"] and not has_seeds and settings.get("seed", defaults.seed) is None:
        settings["seed"] = secrets.randbelow(_FRESH_SEEDS)
    return settings


# ---- what the user sees ----------------------------------------------------------------------------------------------


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _swallow(piece: str) -> None:
    """With --json nothing but the object may reach stdout."""


def _introduction(name: str, model: LSTMForCausalLM, settings: dict[str, Any]) -> str:
    from tlstm.functional import resolve_backend
    from tlstm.layer import LSTM

    layer = next(module for module in model.modules() if isinstance(module, LSTM))
    defaults = {key: value for key, value in model.generation_config.to_dict().items() if key != "tlstm_version"}
    shown = ", ".join(f"{key}={value!r}" for key, value in sorted((defaults | settings).items()))
    where = f"{model.device}, {str(model.dtype).removeprefix('torch.')}"
    return (
        f"model {name}: {format_count(model.num_parameters())} parameters, {where}, backend "
        f"{resolve_backend(layer.backend, model.device)}\nsettings {shown}"
    )


def _report(name: str, result: Result, memory: dict[str, int]) -> dict[str, Any]:
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


def _figures(result: Result, prompt_tokens: int, memory: dict[str, int]) -> str:
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
