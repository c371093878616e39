"""`tlstm generate`: text from a model, on stdout as it is made; figures on stderr."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlstm.cli import arguments
from tlstm.cli.common import (
    ModelSource,
    add_model_arguments,
    load_model,
    peak_memory,
    set_threads,
)
from tlstm.cli.errors import UsageError

if TYPE_CHECKING:
    from tlstm.cli.generate_texts import Result, Text
    from tlstm.models import LSTMForCausalLM
    from tlstm.tokenizer.tokenizer import Tokenizer
    from tlstm.training.interrupt import StopRequest

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
  tlstm generate --prompt-file prompts.txt --out texts.jsonl --batch-size 64 [--resume]
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
        help="way to make the tokens (default: the fastest that serves the request; --verbose tells which, and why)",
    )
    prompt = parser.add_argument_group("prompt")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue; - or a pipe reads it from stdin, as it is (default: begin a new text)",
    )
    source.add_argument("--prompt-file", metavar="FILE", help="one prompt a line, --batch-size of them at a time")
    prompt.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="texts side by side; one that ends makes room for the next (default: 16)",
    )
    prompt.add_argument("--state-in", metavar="FILE", help="continue where --state-out left off; a prompt adds to it")
    prompt.add_argument("--state-out", metavar="FILE", help="save where the text stands, to be continued later")
    output = parser.add_argument_group("output")
    output.add_argument("--no-echo", action="store_true", help="leave the prompt out of the text")
    output.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="write texts into a file, one JSON object a line, as they end; Ctrl-C keeps those that have",
    )
    output.add_argument("--resume", action="store_true", help="make only the texts that --out lacks")
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
    from tlstm.cli.generate_report import figures, introduction, report
    from tlstm.cli.generate_texts import encode_prompt, generate_many, generate_one, read_prompts
    from tlstm.generation.state import GenerationState
    from tlstm.training.interrupt import StopRequest

    _check_flags(args)
    words = read_prompts(args)
    source = ModelSource.parse(args.model)
    state = None if args.state_in is None else GenerationState.load(args.state_in)
    model, tokenizer = load_model(source, args)
    settings = choose_settings(args, model, has_seeds=state is not None and state.seeds is not None)
    effective = model.generation_config.replace(**settings)  # checks them before any work is done
    bos = effective.bos_token_id if effective.bos_token_id is not None else model.config.bos_token_id
    prompts = [(text, encode_prompt(text, tokenizer, bos, continued=state is not None)) for text in words]
    texts = effective.num_return_sequences * max(len(prompts), 1 if state is None else state.batch_size)
    # A state is continued, and beams are searched, as one batch; other texts take turns in the rows of one.
    queued = state is None and effective.num_beams == 1 and (texts > 1 or args.out is not None)
    rows = min(texts, args.batch_size) if queued else texts
    if args.threads is None and model.num_parameters() * rows < _SMALL_STEP:
        set_threads(1)
    if args.verbose:
        print(introduction(str(source), model, settings), file=sys.stderr)

    stop = StopRequest()
    write = _write if not args.json else _swallow
    if effective.num_beams > 1:  # its steps are not told apart from outside: Ctrl-C ends it at once
        result = generate_many(model, tokenizer, prompts, state, settings, None, args.decoder)
    elif queued:
        with stop:
            result = _generate_queued(args, str(source), model, tokenizer, prompts, settings, stop, write)
    elif texts > 1:
        with stop:
            result = generate_many(model, tokenizer, prompts, state, settings, stop, args.decoder)
    else:
        with stop:
            prompt = prompts[0] if prompts else None
            result = generate_one(
                model, tokenizer, prompt, state, settings, stop, write, echo=not args.no_echo, decoder=args.decoder
            )
            if not result.reader_gone:
                write("\n")
    if args.state_out is not None and result.state is not None:
        result.state.save(args.state_out)
    if effective.num_beams > 1 or (texts > 1 and not queued):
        write("\n---\n".join(("" if args.no_echo else text.prompt) + text.text for text in result.texts) + "\n")
    memory = peak_memory(model.device)
    if args.json:
        print(json.dumps(report(str(source), result, memory), ensure_ascii=False), flush=True)
    if args.verbose:
        print(f"decoder {result.decoder or 'beam search: the model is called for every token'}", file=sys.stderr)
    if not args.quiet:
        print(figures(result, sum(len(ids) for _, ids in prompts), memory), file=sys.stderr)
    if result.reader_gone:
        raise BrokenPipeError
    return 0 if stop.signal is None else 128 + stop.signal


def _check_flags(args: argparse.Namespace) -> None:
    """What can be told to be wrong before a model is loaded."""
    if args.state_out is not None and not Path(args.state_out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--state-out {args.state_out}: its folder does not exist; make it first")
    if args.batch_size < 1:
        raise UsageError(f"--batch-size: expected at least 1, got {args.batch_size}")
    if args.out is None:
        if args.resume:
            raise UsageError("--resume completes the file that --out names; add --out FILE.jsonl")
        return
    for name in ("state_in", "state_out", "json"):
        if getattr(args, name):
            raise UsageError(f"--out and --{name.replace('_', '-')} exclude each other; leave one out")
    if getattr(args, "num_beams", 1) > 1:
        raise UsageError("--out and --num-beams exclude each other; use --json for a beam search")


def _generate_queued(
    args: argparse.Namespace,
    name: str,
    model: LSTMForCausalLM,
    tokenizer: Tokenizer,
    prompts: list[tuple[str, list[int]]],
    settings: dict[str, Any],
    stop: StopRequest,
    write: Callable[[str], None],
) -> Result:
    """Texts through the rows of one batch, to stdout or into `--out`."""
    from tlstm.cli.generate_batch import generate_batch, show_progress
    from tlstm.cli.texts_file import TextsFile

    effective = model.generation_config.replace(**settings)
    copies, file, first = effective.num_return_sequences, None, True
    if args.out is not None:
        run = {key: value for key, value in effective.to_dict().items() if key not in ("seed", "tlstm_version")}
        words = [text for text, _ in prompts for _ in range(copies)]
        file = TextsFile(args.out, words, {"model": name, **run}, resume=args.resume)
        if file.records and not hasattr(args, "seed") and effective.do_sample:
            if len(file.seeds) > 1:
                raise UsageError(f"{args.out}: its texts have seeds of their own; give the same --seed again")
            settings = settings | {"seed": next(iter(file.seeds))}

    def emit(text: Text) -> None:
        nonlocal first
        write(("" if first else "---\n") + ("" if args.no_echo else text.prompt) + text.text + "\n")
        first = False

    return generate_batch(
        model,
        tokenizer,
        prompts,
        settings,
        stop,
        batch_size=args.batch_size,
        decoder=args.decoder,
        copies=copies,
        emit=emit,
        file=file,
        progress=show_progress(args.quiet, to_stdout=file is None and not args.json),
    )


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
