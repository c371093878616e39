"""`tlstm generate` in several goes: saved states, Ctrl-C, readers that leave, pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest
import torch
from generate_outcomes import FIGURES, load, tokens_of

from tlstm import GenerationState
from tlstm.cli.generate_texts import generate_many

# ---- states ----------------------------------------------------------------------------------------------------------


def test_state_goes_on_as_one_long_run(cli, checkpoint, tmp_path):
    saved = tmp_path / "state.safetensors"
    common = ("generate", "--model", checkpoint, "--temperature", 1.3)
    whole = cli(*common, "--prompt", "ROMEO:", "--seed", 9, "--max-new-tokens", 31)
    first = cli(*common, "--prompt", "ROMEO:", "--seed", 9, "--max-new-tokens", 12, "--state-out", saved)
    second = cli(*common, "--state-in", saved, "--max-new-tokens", 10, "--state-out", saved)  # the seed is in the state
    third = cli(*common, "--state-in", saved, "--max-new-tokens", 9, "--json")
    text = json.loads(third.out)["sequences"][0]["text"]
    assert first.out[:-1] + second.out[:-1] + text + "\n" == whole.out
    assert second.err.startswith("prompt 0 tokens | generated 10")
    assert second.err.endswith("seed 9\n")


def test_state_with_more_text(cli, checkpoint, tmp_path):
    saved = tmp_path / "state.safetensors"
    common = ("generate", "--model", checkpoint, "--greedy")
    start = cli(*common, "--prompt", "the", "--max-new-tokens", 5, "--state-out", saved)
    more = cli(*common, "--state-in", saved, "--prompt", "fox", "--max-new-tokens", 7)
    whole = cli(*common, "--prompt", start.out[:-1] + "fox", "--max-new-tokens", 7)
    assert start.out[:-1] + more.out == whole.out


def test_state_of_a_batch(cli, checkpoint, tmp_path):
    prompts, saved = tmp_path / "prompts.txt", tmp_path / "state.safetensors"
    prompts.write_text("the\nfox jumps\n")
    common = ("generate", "--model", checkpoint, "--num-return-sequences")
    whole = cli(*common, 2, "--prompt-file", prompts, "--seed", 1, "--max-new-tokens", 20, "--json")
    first = cli(
        *common, 2, "--prompt-file", prompts, "--seed", 1, "--max-new-tokens", 8, "--json", "--state-out", saved
    )
    second = cli(*common, 1, "--state-in", saved, "--max-new-tokens", 12, "--json")
    joined = [a + b for a, b in zip(tokens_of(first), tokens_of(second), strict=True)]
    assert joined == tokens_of(whole)
    assert len(joined) == 4
    wrong = cli(*common, 1, "--state-in", saved, "--prompt", "fox")
    assert wrong.code == 2
    assert "holds 4 texts and input_ids 1" in wrong.err


def test_wrong_states(cli, checkpoint, byte_checkpoint, tmp_path):
    saved = tmp_path / "state.safetensors"
    cli("generate", "--model", checkpoint, "--prompt", "the", "--max-new-tokens", 2, "--state-out", saved)
    other = cli("generate", "--model", byte_checkpoint, "--state-in", saved)
    assert (other.code, other.out) == (2, "")
    assert "another model" in other.err
    assert "No such file" in cli("generate", "--model", checkpoint, "--state-in", tmp_path / "absent").err
    saved.write_bytes(b"no state")
    assert "damaged or no safetensors file" in cli("generate", "--model", checkpoint, "--state-in", saved).err
    nowhere = cli("generate", "--model", checkpoint, "--prompt", "the", "--state-out", tmp_path / "no" / "state")
    assert (nowhere.code, nowhere.out) == (2, "")
    assert "its folder does not exist" in nowhere.err


# ---- stopping --------------------------------------------------------------------------------------------------------


class StopAfter:
    """Like a `StopRequest` whose signal comes after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    @property
    def signal(self) -> int | None:
        self.left -= 1
        return None if self.left >= 0 else signal.SIGINT


@pytest.mark.parametrize("continued", [False, True])
def test_stopped_batch_keeps_what_was_made(checkpoint, continued):
    """Texts and state are those of a shorter run; the state goes on to the texts of the longer one."""
    model, tokenizer = load(checkpoint)
    prompts = [(text, tokenizer.encode(text)) for text in ("the quick", "ROMEO:")]
    settings = {"do_sample": True, "seed": 6, "num_return_sequences": 2}
    state = model.prefill([tokenizer.encode("fox "), tokenizer.encode("lazy dog")]) if continued else None
    whole = generate_many(model, tokenizer, prompts, state, settings | {"max_new_tokens": 20}, StopAfter(10**6))
    stopped = generate_many(model, tokenizer, prompts, state, settings | {"max_new_tokens": 20}, StopAfter(7))
    assert {text.finish_reason for text in stopped.texts} == {"interrupted"}
    for short, long in zip(stopped.texts, whole.texts, strict=True):
        assert len(short.tokens) == 8
        assert short.tokens == long.tokens[:8]
        assert (short.prompt, short.seed, long.text[: len(short.text)]) == (long.prompt, long.seed, short.text)
    for now, then in zip(stopped.state.tokens, whole.state.tokens, strict=True):
        assert torch.equal(now, then[: len(now)])
    rest = model.generate(state=stopped.state, do_sample=True, max_new_tokens=12, return_dict_in_generate=True)
    assert [a.tokens + b for a, b in zip(stopped.texts, rest.new_tokens, strict=True)] == [
        t.tokens for t in whole.texts
    ]


def test_interrupt_keeps_text_and_state(cli, spawn, checkpoint, tmp_path):
    """A real SIGINT: the text ends with a line end, the state goes on to what one long run gives."""
    saved = tmp_path / "state.safetensors"
    process = spawn(
        "generate", "--model", checkpoint, "--prompt", "ROMEO:", "--seed", 8, "--max-new-tokens", 10**7,
        "--state-out", saved,
    )  # fmt: skip
    start = os.read(process.stdout.fileno(), 1 << 16)
    start += os.read(process.stdout.fileno(), 1 << 16)  # by now tokens are being made
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    text = (start + rest).decode()
    assert text.startswith("ROMEO:")
    assert text.endswith("\n")
    assert FIGURES.fullmatch(errors.decode())
    _, tokenizer = load(checkpoint)
    state = GenerationState.load(saved)
    assert tokenizer.decode(state.tokens[0]) + "\n" == text
    made = len(state.tokens[0]) - len("ROMEO:")
    more = cli("generate", "--model", checkpoint, "--state-in", saved, "--max-new-tokens", 15)
    whole = cli("generate", "--model", checkpoint, "--prompt", "ROMEO:", "--seed", 8, "--max-new-tokens", made + 15)
    assert text[:-1] + more.out == whole.out


def test_reader_that_leaves(spawn, checkpoint, tmp_path):
    """`| head`: quiet, and the state is saved all the same."""
    saved = tmp_path / "state.safetensors"
    process = spawn(
        "generate", "--model", checkpoint, "--prompt", "the", "--max-new-tokens", 10**7, "--state-out", saved
    )
    assert os.read(process.stdout.fileno(), 3) == b"the"
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert "error" not in errors.lower()
    assert "Traceback" not in errors
    assert len(GenerationState.load(saved).tokens[0]) > 3


def test_piped_prompt_in_a_process_of_its_own(cli, spawn, byte_checkpoint):
    process = spawn("generate", "--model", byte_checkpoint, "--seed", 1, "--quiet", stdin=subprocess.PIPE)
    out, errors = process.communicate("Zoë\n".encode(), timeout=60)
    assert (process.returncode, errors) == (0, b"")
    assert out.decode() == cli("generate", "--model", byte_checkpoint, "--prompt", "Zoë\n", "--seed", 1).out
