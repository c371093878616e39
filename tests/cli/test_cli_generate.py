"""`tlstm generate`: what it prints is what the model makes; prompts, states, JSON, signals, pipes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from tlstm import GenerationState, LSTMForCausalLM, Tokenizer
from tlstm.cli.generate_texts import generate_many

FIGURES = re.compile(
    r"prompt \d+ tokens?(, [\d,]+ tokens/s)? \| generated \d+ tokens, [\d,]+ tokens/s \| peak memory [\d.]+ [MG]B"
    r"( \| seed [\d,]+)?\n"
)


def load(folder):
    return LSTMForCausalLM.from_pretrained(folder), Tokenizer.from_pretrained(folder)


def tokens_of(outcome):
    return [sequence["tokens"] for sequence in json.loads(outcome.out)["sequences"]]


# ---- one text --------------------------------------------------------------------------------------------------------


def test_text_is_what_the_model_makes(cli, checkpoint):
    model, tokenizer = load(checkpoint)
    ids = model.generate([tokenizer.encode("ROMEO:")], do_sample=True, temperature=0.9, seed=5, max_new_tokens=23)
    outcome = cli(
        "generate",
        "--model",
        checkpoint,
        "--prompt",
        "ROMEO:",
        "--temperature",
        0.9,
        "--seed",
        5,
        "--max-new-tokens",
        23,
    )
    assert outcome.out == tokenizer.decode(ids[0]) + "\n"
    assert FIGURES.fullmatch(outcome.err)
    assert outcome.err.startswith("prompt 6 tokens, ")
    assert "generated 23 tokens" in outcome.err
    assert outcome.err.endswith("| seed 5\n")


def test_greedy_and_sampling_by_default(cli, checkpoint):
    model, tokenizer = load(checkpoint)
    expected = tokenizer.decode(model.generate([tokenizer.encode("the")], max_new_tokens=15)[0])
    arguments = ("generate", "--model", checkpoint, "--prompt", "the", "--max-new-tokens", 15)
    for flag in ("--greedy", "--no-do-sample"):
        outcome = cli(*arguments, flag)
        assert outcome.out == expected + "\n"
        assert "seed" not in outcome.err
    sampled = cli(*arguments)
    seed = int(sampled.err.rsplit("seed ", 1)[1])
    assert cli(*arguments, "--seed", seed).out == sampled.out  # the seed that was told repeats the text
    assert len({cli(*arguments).out for _ in range(5)}) > 1  # and without it the texts differ


def test_settings_of_the_checkpoint_hold(cli, byte_checkpoint):
    """generation_config.json: temperature 0.7, top_k 5, 9 tokens; a flag wins over it, `none` switches a setting off."""
    model, tokenizer = load(byte_checkpoint)
    prompt = tokenizer.encode("né")
    expected = model.generate([prompt], do_sample=True, temperature=0.7, top_k=5, max_new_tokens=9, seed=1)
    arguments = ("generate", "--model", byte_checkpoint, "--prompt", "né", "--seed", 1, "--json")
    assert tokens_of(cli(*arguments)) == [expected[0, len(prompt) :].tolist()]
    hot = cli(*arguments, "--top-k", "none", "--temperature", 3, "--max-new-tokens", 40)
    expected = model.generate([prompt], do_sample=True, temperature=3.0, top_k=0, max_new_tokens=40, seed=1)
    assert tokens_of(hot) == [expected[0, len(prompt) :].tolist()]


def test_json_equals_the_stream(cli, byte_checkpoint):
    """Bytes that are no characters become U+FFFD in the same places, whether streamed or not."""
    arguments = ("generate", "--model", byte_checkpoint, "--prompt", "Zoë ", "--seed", 3, "--max-new-tokens", 60)
    streamed, report = cli(*arguments), json.loads(cli(*arguments, "--json").out)
    (sequence,) = report["sequences"]
    assert streamed.out == sequence["prompt"] + sequence["text"] + "\n"
    assert cli(*arguments, "--no-echo").out == sequence["text"] + "\n"
    assert len(sequence["tokens"]) == report["timings"]["decode_tokens"] <= 60
    assert sequence["finish_reason"] in ("length", "eos")
    assert (sequence["prompt"], sequence["seed"], report["model"]) == ("Zoë ", 3, str(byte_checkpoint))
    assert report["timings"]["decode_tokens_per_second"] > 0
    assert report["peak_memory_bytes"]["host"] > 1 << 20
    _, tokenizer = load(byte_checkpoint)
    assert sequence["text"] == tokenizer.decode(sequence["tokens"], skip_special_tokens=True)


def test_stop_strings_and_eos(cli, checkpoint, byte_checkpoint):
    arguments = ("generate", "--model", checkpoint, "--prompt", "the", "--seed", 1, "--json", "--max-new-tokens", 200)
    full = json.loads(cli(*arguments).out)["sequences"][0]["text"]
    stop = full[20:22]
    assert stop not in "the" + full[:20]
    (sequence,) = json.loads(cli(*arguments, "--stop", "§never§", "--stop", stop).out)["sequences"]
    assert sequence["text"] == full[:22]
    assert sequence["finish_reason"] == "stop_string"
    model, tokenizer = load(byte_checkpoint)
    (first,) = tokens_of(cli("generate", "--model", byte_checkpoint, "--prompt", "a", "--seed", 2, "--json"))
    outcome = cli(
        "generate", "--model", byte_checkpoint, "--prompt", "a", "--seed", 2, "--json", "--eos-token-id", first[4]
    )
    (sequence,) = json.loads(outcome.out)["sequences"]
    assert sequence["tokens"] == first[: first.index(first[4]) + 1]
    assert sequence["finish_reason"] == "eos"


def test_special_tokens_are_not_text(cli, byte_checkpoint):
    _, tokenizer = load(byte_checkpoint)
    outcome = cli(
        "generate",
        "--model",
        byte_checkpoint,
        "--prompt",
        "a",
        "--json",
        "--suppress-tokens",
        ",".join(map(str, range(257))),
    )
    (sequence,) = json.loads(outcome.out)["sequences"]
    assert sequence["tokens"] == [tokenizer.eos_token_id]
    assert (sequence["text"], sequence["finish_reason"]) == ("", "eos")


def test_quiet_verbose_dtype_backend_threads(cli, checkpoint):
    arguments = ("generate", "--model", checkpoint, "--prompt", "the", "--greedy", "--max-new-tokens", 5)
    plain = cli(*arguments)
    assert cli(*arguments, "--quiet") == (0, plain.out, "")
    threads = torch.get_num_threads()
    verbose = cli(
        *arguments, "--verbose", "--dtype", "float64", "--backend", "reference", "--device", "cpu", "--threads", threads
    )
    assert verbose.out == plain.out
    for part in (str(checkpoint), "parameters, cpu, float64, backend reference", "max_new_tokens=5"):
        assert part in verbose.err


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_empty_prompt_is_a_beginning(cli, checkpoint, byte_checkpoint):
    """bos where the model has one, else a line end; neither is printed as a prompt."""
    for folder, start in ((byte_checkpoint, None), (checkpoint, "\n")):
        model, tokenizer = load(folder)
        first = [tokenizer.bos_token_id] if start is None else tokenizer.encode(start)
        expected = model.generate([first], max_new_tokens=8, do_sample=False)[0, 1:]
        for prompt in ([], ["--prompt", ""]):
            outcome = cli("generate", "--model", folder, "--greedy", "--max-new-tokens", 8, *prompt)
            assert outcome.out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_empty_prompt_without_a_beginning(cli, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    model, _ = load(checkpoint)
    letters = Tokenizer.train_char("".join(chr(ord("a") + k) for k in range(model.config.vocab_size)))
    letters.save_pretrained(folder)
    outcome = cli("generate", "--model", folder)
    assert outcome.code == 2
    assert "the prompt is empty" in outcome.err
    assert "--prompt TEXT" in outcome.err


def test_prompt_from_stdin_is_taken_as_it_is(cli, checkpoint, monkeypatch, tmp_path):
    expected = cli("generate", "--model", checkpoint, "--prompt", "ROMEO:\nthe\n", "--seed", 1, "--max-new-tokens", 5)
    for content, arguments in ((b"ROMEO:\nthe\n", ["--prompt", "-"]), (b"ROMEO:\nthe\n", [])):
        path = tmp_path / "stdin"
        path.write_bytes(content)
        with open(path) as stdin:  # a file, as with `<`
            monkeypatch.setattr(sys, "stdin", stdin)
            outcome = cli("generate", "--model", checkpoint, "--seed", 1, "--max-new-tokens", 5, *arguments)
        assert outcome.out == expected.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    outcome = cli("generate", "--model", checkpoint, "--prompt", "-")
    assert outcome.code == 2
    assert "standard input: expected UTF-8 text, byte 2 is not" in outcome.err


def test_prompt_file_makes_a_batch(cli, checkpoint, tmp_path):
    """Each line comes out as it would alone, in order; several texts of each are told apart by a line of dashes."""
    prompts = ["the quick", "ROMEO:", "", "fox"]
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    common = ("--seed", 4, "--max-new-tokens", 11)
    alone = [cli("generate", "--model", checkpoint, "--prompt", prompt, *common).out for prompt in prompts]
    together = cli("generate", "--model", checkpoint, "--prompt-file", path, *common)
    assert together.out == "---\n".join(alone)
    assert "generated 44 tokens" in together.err
    two = cli("generate", "--model", checkpoint, "--prompt-file", path, *common, "--num-return-sequences", 2, "--json")
    sequences = json.loads(two.out)["sequences"]
    assert [sequence["prompt"] for sequence in sequences] == [prompt for prompt in prompts for _ in range(2)]
    assert [s["prompt"] + s["text"] + "\n" for s in sequences[::2]] == alone  # the first of each is the one made alone
    assert sequences[0]["text"] != sequences[1]["text"]
    seeds = cli("generate", "--model", checkpoint, "--prompt-file", path, "--max-new-tokens", 11, "--seed", "4,5,6,7")
    assert seeds.err.rstrip().endswith("seed 4,5,6,7")
    assert seeds.out.split("---\n")[0] == alone[0]


def test_beams(cli, checkpoint):
    model, tokenizer = load(checkpoint)
    output = model.generate(
        [tokenizer.encode("the")], num_beams=3, num_return_sequences=2, max_new_tokens=6, return_dict_in_generate=True
    )
    outcome = cli(
        "generate", "--model", checkpoint, "--prompt", "the", "--num-beams", 3, "--num-return-sequences", 2,
        "--max-new-tokens", 6, "--json",
    )  # fmt: skip
    assert tokens_of(outcome) == output.new_tokens
    scores = [sequence["score"] for sequence in json.loads(outcome.out)["sequences"]]
    assert scores == pytest.approx(output.sequences_scores.tolist(), rel=1e-6)


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
    assert "not a readable safetensors file" in cli("generate", "--model", checkpoint, "--state-in", saved).err
    nowhere = cli("generate", "--model", checkpoint, "--prompt", "the", "--state-out", tmp_path / "no" / "state")
    assert (nowhere.code, nowhere.out) == (2, "")
    assert "its folder does not exist" in nowhere.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "temperature: 0 would divide by zero"),
        (["--top-p", "1.5"], "top_p: expected a number"),
        (["--max-new-tokens", "0"], "max_new_tokens: expected a whole number of at least 1"),
        (["--greedy", "--num-return-sequences", "2"], "would repeat one text"),
        (["--num-beams", "2", "--sample"], "exclude each other"),
        (["--suppress-tokens", "999"], "below the model's vocab_size"),
        (["--prompt", "日本"], "U+65E5"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--device", "abacus"], "--device abacus: cannot be used here"),
        (["--device", "meta:1:2"], "cannot be used here"),
        (["--backend", "triton"], "backend 'triton' cannot run"),
        (["--prompt-file", "/no/such/file"], "/no/such/file: No such file or directory"),
        (["--prompt-file", os.devnull], "expected one prompt a line"),
    ],
)
def test_bad_values(cli, checkpoint, arguments, message):
    if arguments[0] == "--backend" and torch.cuda.is_available():
        arguments = [*arguments, "--device", "cpu"]
    prompt = [] if any(argument.startswith("--prompt") for argument in arguments) else ["--prompt", "the"]
    outcome = cli("generate", "--model", checkpoint, *prompt, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("tlstm: error: ")
    assert message in outcome.err


def test_bad_checkpoints(cli, checkpoint, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli("generate", "--model", empty, "--prompt", "the").code == 2
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"")
    outcome = cli("generate", "--model", broken, "--prompt", "the")
    assert outcome.code == 2
    assert str(broken / "model.safetensors") in outcome.err
    assert "the file is empty" in outcome.err


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
