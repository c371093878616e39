"""The frame: help, errors, suggestions, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import huggingface_hub.errors
import pytest

import tlstm
import tlstm.cli.info
from tlstm.cli import COMMANDS, EXIT_INTERRUPTED, main
from tlstm.cli.common import ModelSource, default_checkpoint, format_bytes, format_count
from tlstm.cli.errors import describe, is_user_error


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_describes_and_gives_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*([command] if command else []), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"tlstm {command or 'generate'} " in text.split("examples:")[1]
    if command is None:
        assert all(f"    {name} " in text and summary in text for name, summary in COMMANDS.items())


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"tlstm {tlstm.__version__}\n")


def test_help_imports_nothing_heavy(environment):
    """What makes `tlstm --help` fast: neither torch, numpy nor any command is imported for it."""
    script = (
        "import sys\nfrom tlstm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print([name for name in ('torch', 'numpy', 'tokenizers', 'tlstm.cli.train') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no command", "generate, train, eval"]),
        (["generrate"], ["unknown command 'generrate'", "did you mean generate?"]),
        (["zzz"], ["unknown command 'zzz'", "expected one of generate, train"]),
        (["--colour"], ["unrecognized arguments: --colour"]),
        (["generate", "--temprature", "0.8"], ["unknown flag --temprature", "did you mean --temperature"]),
        (
            ["train", "--hiden-size=3", "--out", "x"],
            ["unknown flag --hiden-size;", "--hidden-size", "tlstm train --help"],
        ),
        (["eval"], ["required", "--data", "tlstm eval --help"]),
        (["generate", "--top-k", "many"], ["--top-k", "expected a whole number, got 'many'"]),
        (["generate", "--temperature", "hot"], ["--temperature", "expected a number, got 'hot'"]),
        (["generate", "--early-stopping", "soon"], ["expected one of true, false, never, got 'soon'"]),
        (["generate", "--prompt", "a", "--prompt-file", "b"], ["not allowed with"]),
        (["info", "surplus"], ["unrecognized arguments: surplus"]),
        (["info", "--model", "./nowhere"], ["--model ./nowhere: no such folder", "user/name"]),
        (["generate", "--device", "abacus", "--model", "./nowhere"], ["no such folder"]),
        (["train", "--out", "somewhere"], ["--data is missing"]),
    ],
)
def test_usage_errors_are_one_line(cli, arguments, parts):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tlstm: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_values_that_look_like_flags(cli, byte_checkpoint):
    """Only flags are looked up: neither a value after `=`, nor one with blanks."""
    for typed, prompt in ((["--prompt=--the"], "--the"), (["--prompt", "--model fox"], "--model fox")):
        outcome = cli("generate", "--model", byte_checkpoint, *typed, "--max-new-tokens", 1)
        assert outcome.code == 0
        assert outcome.out.startswith(prompt)
    assert cli("generate", "--prompt=--the", "--top-kk", "1").err.startswith("tlstm: error: unknown flag --top-kk;")


def test_traceback_on_request(cli, monkeypatch):
    assert "Traceback" not in cli("info", "--model", "./nowhere").err
    assert "Traceback (most recent call last)" in cli("info", "--model", "./nowhere", "--traceback").err
    assert "Traceback" in cli("--traceback", "info", "--model", "./nowhere").err
    monkeypatch.setenv("TLSTM_TRACEBACK", "1")
    assert "Traceback" in cli("info", "--model", "./nowhere").err


def test_interrupt_pipe_and_bug(cli, monkeypatch):
    def failing_with(error):
        def run(args):
            raise error

        monkeypatch.setattr(tlstm.cli.info, "run", run)

    failing_with(KeyboardInterrupt())
    outcome = cli("info")
    assert (outcome.code, outcome.err) == (EXIT_INTERRUPTED, "tlstm: interrupted\n")
    failing_with(tlstm.BackendUnavailableError("no kernels\nhere"))
    assert cli("info") == (2, "", "tlstm: error: no kernels here\n")
    failing_with(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli("info")


def test_warnings_are_one_line(cli, checkpoint):
    outcome = cli(
        "generate", "--model", checkpoint, "--prompt", "the", "--greedy", "--top-p", "0.5", "--max-new-tokens", 2
    )
    assert outcome.code == 0
    warning, figures = outcome.err.splitlines()
    assert warning.startswith("tlstm: warning: generation settings without effect: top_p")
    assert figures.startswith("prompt 3 tokens")


def test_which_errors_are_the_users():
    response_error = huggingface_hub.errors.LocalEntryNotFoundError("not\n\n  cached")
    assert is_user_error(response_error)
    assert describe(response_error) == "not cached"
    with pytest.raises(OSError, match="No such file") as caught:
        Path("/no/such/file").read_bytes()
    assert describe(caught.value) == "/no/such/file: No such file or directory"
    caught.value.add_note("a note")
    assert describe(caught.value).endswith("directory (a note)")
    assert describe(ValueError()) == "ValueError"
    assert not is_user_error(TypeError("bug"))
    assert not is_user_error(RuntimeError("bug"))
    assert is_user_error(FloatingPointError("diverged"))


def test_default_checkpoint(tmp_path, monkeypatch):
    """An installed wheel has it inside the package, a source checkout beside it."""
    monkeypatch.setattr(tlstm, "__file__", str(tmp_path / "site" / "tlstm" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"shakespeare-char.*--model"):
        default_checkpoint()
    places = [tmp_path / "site" / "model_cards", tmp_path / "site" / "tlstm" / "model_cards"]
    for place in places:  # the later one is preferred
        (place / "shakespeare-char").mkdir(parents=True)
        (place / "shakespeare-char" / "config.json").touch()
        assert default_checkpoint() == place / "shakespeare-char"
    assert ModelSource.parse(None).name == str(places[1] / "shakespeare-char")


def test_model_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ModelSource.parse("user/name") == ModelSource("user/name", None, False)
    assert ModelSource.parse("user/name@v1.0") == ModelSource("user/name", "v1.0", False)
    assert str(ModelSource.parse("user/name@refs/pr/3")) == "user/name@refs/pr/3"
    (tmp_path / "user" / "name").mkdir(parents=True)
    assert ModelSource.parse("user/name").is_local
    for wrong in ("name", "a/b/c", "./a", "/a/b", "~/no-such", "nobody/", ""):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            ModelSource.parse(wrong)


def test_numbers_for_people():
    assert [format_bytes(size) for size in (0, 999, 1500, 4_300_000, 2.5e9, 3e13)] == [
        "0 B", "999 B", "1.5 kB", "4.3 MB", "2.5 GB", "30.0 TB",
    ]  # fmt: skip
    assert [format_count(n) for n in (12, 999_999, 4_274_241)] == ["12", "999,999", "4,274,241 (4.27 M)"]
