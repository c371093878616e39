"""The command line: `tlstm COMMAND ...`, also as `python -m tlstm`.

Only argparse is imported before the command is known, so that `tlstm --help` answers at once; each command's module
(`tlstm.cli.generate`, ...) gives `add_arguments(parser)` and `run(args) -> exit code`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from tlstm.cli.errors import EXIT_INTERRUPTED, EXIT_PIPE, EXIT_USER_ERROR, UsageError, describe, is_user_error
from tlstm.version import __version__

COMMANDS = {
    "generate": "continue a text, or make one up, with a trained model",
    "train": "train a model on text files",
    "eval": "measure loss and perplexity of a model on a text",
    "info": "say what a checkpoint is, without loading it",
    "quantize": "make an int8 checkpoint, a quarter of the size, of a checkpoint",
    "bench": "time LSTM layers beside one another on this machine",
    "push": "send a checkpoint folder to the Hugging Face Hub",
    "pull": "fetch a checkpoint from the Hugging Face Hub into a folder",
}
MODULES = {name: name for name in COMMANDS} | {"eval": "evaluate"}
SECRET_FLAGS = ("--token", "--hub-token")
TRACEBACK_VARIABLE = "TLSTM_TRACEBACK"
EPILOG = """examples:
  tlstm generate --prompt "ROMEO:"
  tlstm train --data input.txt --out runs/first
  tlstm eval --model runs/first/model --data test.txt
  tlstm info --model runs/first/model

`tlstm COMMAND --help` explains a command.
"""


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, so that every error is reported in one way, by `main`."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 success; 2 a mistake of the user's or of their files, told in one line on stderr; 130 Ctrl-C; 141 the reader of
    our output has gone (`| head`). `--help` and `--version` raise `SystemExit(0)`, as argparse does. What is none of
    these is a bug and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _short_warnings():
            code = _dispatch(arguments)
            sys.stdout.flush()  # a reader that has gone is noticed here, not at interpreter exit
        return code
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_PIPE
    except KeyboardInterrupt:
        _report("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        if not is_user_error(error):
            raise
        if "--traceback" in arguments or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            traceback.print_exc()
        _report(f"error: {describe(error)}")
        return EXIT_USER_ERROR


def _dispatch(arguments: list[str]) -> int:
    parser = Parser(
        prog="tlstm",
        description="Train, measure and run LSTM language models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tlstm {__version__}")
    _add_traceback_flag(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        raise UsageError(f"unknown command {chosen!r}; {_suggest(chosen, COMMANDS)} (see `tlstm --help`)")
    modules = {}
    for name, summary in COMMANDS.items():
        if name != chosen:  # listed, but neither imported nor filled
            commands.add_parser(name, help=summary)
            continue
        module = modules[name] = importlib.import_module(f"tlstm.cli.{MODULES[name]}")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        _add_traceback_flag(command)
        _refuse_unknown_flags(command, arguments[arguments.index(name) + 1 :])
    args = parser.parse_args(arguments)
    args.command_line = shlex.join(["tlstm", *_without_secrets(arguments)])  # for the records of a training run
    if chosen is None:
        raise UsageError(f"no command given; expected one of {', '.join(COMMANDS)} (see `tlstm --help`)")
    return modules[chosen].run(args)


def _add_traceback_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traceback",
        action="store_true",
        default=argparse.SUPPRESS,
        help=f"on an error, show where it arose (also: {TRACEBACK_VARIABLE}=1)",
    )


def _refuse_unknown_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Unknown flags are told before anything else: a misspelt one is often the reason for a missing one."""
    known = parser._option_string_actions
    for argument in arguments:
        if argument == "--":
            return
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and " " not in flag and flag not in known:
            raise UsageError(f"unknown flag {flag}; {_suggest(flag, known)} (see `{parser.prog} --help`)")


def _without_secrets(arguments: Sequence[str]) -> list[str]:
    """The arguments without access tokens: the command line of a training run is published with its model."""
    kept: list[str] = []
    for index, argument in enumerate(arguments):
        before = arguments[index - 1] if index else ""
        if before not in SECRET_FLAGS and argument.partition("=")[0] not in SECRET_FLAGS:
            kept.append(argument)
    return kept


def _suggest(word: str, known: dict) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(known)}"


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line for the user, without the library's file name and source line."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if not issubclass(category, DeprecationWarning | FutureWarning):
            _report(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _report(message: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"tlstm: {message}", file=sys.stderr, flush=True)


def _silence_stdout() -> None:
    """Point stdout at nothing: the interpreter flushes it once more at exit, and would complain again."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no real file has nothing to silence
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
