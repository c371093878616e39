"""`tlstm generate` through a batch of few rows: order, files that are completed later, Ctrl-C; and the decoders."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
from generate_outcomes import load, tokens_of

from tlstm.cli.generate_batch import generate_batch
from tlstm.cli.generate_texts import Text
from tlstm.cli.texts_file import TextsFile

PROMPTS = ["the quick", "ROMEO:", "", "fox", "né", "lazy dog", "over"]
COMMON = ("--seed", 4, "--max-new-tokens", 11)


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    return path


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_few_rows_give_the_texts_of_each_alone_in_order(cli, byte_checkpoint, prompt_file, batch_size):
    """A byte model with an end of text, so that rows are refilled at different steps."""
    model = ("generate", "--model", byte_checkpoint, "--seed", 4, "--max-new-tokens", 40, "--temperature", 3)
    alone = [cli(*model, "--prompt", prompt).out for prompt in PROMPTS]
    together = cli(*model, "--prompt-file", prompt_file, "--batch-size", batch_size)
    assert together.out == "---\n".join(alone)
    state = cli(*model, "--prompt-file", prompt_file, "--batch-size", batch_size, "--json")
    assert [len(tokens) for tokens in tokens_of(state)] == [
        len(tokens_of(cli(*model, "--prompt", prompt, "--json"))[0]) for prompt in PROMPTS
    ]


def test_out_holds_the_texts_in_order_and_is_completed(cli, checkpoint, prompt_file, tmp_path):
    out = tmp_path / "texts.jsonl"
    command = ("generate", "--model", checkpoint, "--prompt-file", prompt_file, "--num-return-sequences", 2)
    expected = json.loads(cli(*command, *COMMON, "--json").out)["sequences"]
    first = cli(*command, *COMMON, "--batch-size", 3, "--out", out)
    assert first.out == ""
    written = records(out)
    assert [record["index"] for record in written] == list(range(14))
    for record, sequence in zip(written, expected, strict=True):
        assert {key: record[key] for key in sequence} == sequence
    whole = out.read_bytes()

    lines = whole.splitlines(keepends=True)
    kept = [lines[5], lines[0], lines[1], lines[9], lines[13][:20]]  # as a kill leaves it: unsorted, one cut off
    out.write_bytes(b"".join(kept))
    resumed = cli(*command, "--max-new-tokens", 11, "--batch-size", 3, "--out", out, "--resume")  # the seed is in there
    assert resumed.code == 0
    assert out.read_bytes() == whole
    assert "generated 132 tokens" in resumed.err  # six of seven prompts: a half-done one is made again
    again = cli(*command, *COMMON, "--out", out, "--resume")
    assert (again.code, out.read_bytes()) == (0, whole)
    assert "generated 0 tokens" in again.err


def test_out_of_a_single_prompt(cli, checkpoint, tmp_path):
    out = tmp_path / "one.jsonl"
    assert cli("generate", "--model", checkpoint, "--prompt", "fox", *COMMON, "--out", out).code == 0
    plain = json.loads(cli("generate", "--model", checkpoint, "--prompt", "fox", *COMMON, "--json").out)["sequences"]
    assert [record["tokens"] for record in records(out)] == [plain[0]["tokens"]]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, ["--seed", 4], "the file exists; add --resume"),
        (None, ["--seed", 4, "--resume", "--temperature", 0.5], "made with another model or other settings"),
        (lambda line: line.replace(b"the quick", b"another"), ["--resume"], "line 1: it holds another prompt"),
        (lambda line: b"{}\n" + line, ["--resume"], "line 1: not a record"),
        (lambda line: line.replace(b'"index": 0', b'"index": 99'), ["--resume"], "another prompt"),
    ],
)
def test_a_file_that_does_not_fit_is_left_alone(cli, checkpoint, prompt_file, tmp_path, change, arguments, message):
    out = tmp_path / "texts.jsonl"
    command = ("generate", "--model", checkpoint, "--prompt-file", prompt_file, "--max-new-tokens", 3, "--out", out)
    cli(*command, "--seed", 4)
    if change is not None:
        out.write_bytes(change(out.read_bytes()))
    before = out.read_bytes()
    outcome = cli(*command, *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "add --out FILE.jsonl"),
        (["--out", "x.jsonl", "--json"], "--out and --json exclude each other"),
        (["--out", "x.jsonl", "--num-beams", 2], "--out and --num-beams exclude each other"),
        (["--out", "/no/such/folder/x.jsonl"], "its folder does not exist"),
        (["--out", "no-such.jsonl", "--resume"], "there is no no-such.jsonl to go on with"),
        (["--batch-size", 0], "--batch-size: expected at least 1"),
        (["--decoder", "kernel"], "decoder='kernel' cannot serve this request: it needs a CUDA GPU"),
    ],
)
def test_mistakes(cli, checkpoint, arguments, message):
    outcome = cli("generate", "--model", checkpoint, "--prompt", "the", *arguments, "--device", "cpu")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


class StopAfter:
    """Like a `StopRequest` whose signal comes after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    @property
    def signal(self) -> int | None:
        self.left -= 1
        return None if self.left >= 0 else signal.SIGINT


@pytest.mark.parametrize("looks", [3, 13, 25])
def test_stopped_texts_are_handed_out_and_only_finished_ones_written(checkpoint, tmp_path, looks):
    model, tokenizer = load(checkpoint)
    prompts = [(text, tokenizer.encode(text)) for text in ("the quick", "ROMEO:", "fox", "lazy")]
    settings = {"do_sample": True, "seed": 6, "max_new_tokens": 10}

    def run(stop, file=None):
        handed_out: list[Text] = []
        result = generate_batch(
            model, tokenizer, prompts, settings, stop, batch_size=2, decoder="auto", copies=1,
            emit=handed_out.append, file=file,
        )  # fmt: skip
        return result, handed_out

    whole, all_texts = run(StopAfter(10**6))
    assert [text.prompt for text in all_texts] == ["the quick", "ROMEO:", "fox", "lazy"]
    stopped, texts = run(StopAfter(looks))
    assert texts == stopped.texts
    assert [text.prompt for text in texts] == [text.prompt for text in all_texts[: len(texts)]]
    for short, long in zip(texts, all_texts, strict=False):
        assert short.tokens == long.tokens[: len(short.tokens)]
        assert short.finish_reason == ("length" if len(short.tokens) == 10 else "interrupted")
    assert sum(len(text.tokens) for text in texts) == 2 * min(looks, 20)
    rest = model.generate(state=stopped.state.select([0]), do_sample=True, max_new_tokens=5)
    assert rest[0].tolist()[: 10 - len(texts[0].tokens)] == whole.texts[0].tokens[len(texts[0].tokens) :][:5]

    path = tmp_path / "texts.jsonl"
    names = [text for text, _ in prompts]
    run(StopAfter(looks), TextsFile(str(path), names, {}, resume=False))
    assert {record["index"] for record in records(path)} == set(range(looks // 10 * 2)) & set(range(4))
    run(StopAfter(10**6), TextsFile(str(path), names, {}, resume=True))
    assert [record["tokens"] for record in records(path)] == [text.tokens for text in all_texts]


def test_interrupt_keeps_what_has_ended(cli, spawn, checkpoint, prompt_file, tmp_path):
    """A real SIGINT, and a second run that completes the file to what one run gives."""
    out = tmp_path / "texts.jsonl"
    command = ("generate", "--model", checkpoint, "--prompt-file", prompt_file, "--seed", 1, "--batch-size", 1)
    with open(prompt_file, "a") as file:
        file.write("the\n" * 20_000)
    process = spawn(*command, "--max-new-tokens", 50, "--out", out, "--verbose")
    os.read(process.stderr.fileno(), 1)  # settings are told when the stop request can be heard soon
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    written = records(out)
    assert 0 < len(written) < 20_000
    assert [record["index"] for record in written] == list(range(len(written)))
    with open(prompt_file, "w") as file:  # the first ones are enough to see that it goes on
        file.write("".join(f"{record['prompt']}\n" for record in written) + "fox\n")
    assert cli(*command, "--max-new-tokens", 50, "--out", out, "--resume").code == 0
    completed = records(out)
    assert completed[:-1] == written
    alone = cli("generate", "--model", checkpoint, "--prompt", "fox", "--seed", 1, "--max-new-tokens", 50, "--json")
    assert completed[-1]["tokens"] == tokens_of(alone)[0]


def test_verbose_tells_the_decoder_and_all_give_one_text(cli, checkpoint):
    arguments = ("generate", "--model", checkpoint, "--prompt", "the", "--device", "cpu", "--verbose", *COMMON)
    outcomes = {name: cli(*arguments, "--decoder", name) for name in ("auto", "lean", "loop")}
    assert len({outcome.out for outcome in outcomes.values()}) == 1
    assert "decoder lean; not kernel: it needs a CUDA GPU" in outcomes["auto"].err
    assert "decoder lean\n" in outcomes["lean"].err
    assert "decoder loop\n" in outcomes["loop"].err
    beams = cli("generate", "--model", checkpoint, "--prompt", "the", "--num-beams", 2, "--verbose")
    assert "decoder beam search" in beams.err


def test_16_bits_are_computed_as_float32_on_a_cpu(cli, checkpoint, tmp_path):
    model, tokenizer = load(checkpoint)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow", tokenizer=tokenizer)
    arguments = ("generate", "--model", tmp_path / "narrow", "--prompt", "the", "--device", "cpu", "--verbose", *COMMON)
    outcome = cli(*arguments)
    assert "parameters, cpu, float32" in outcome.err
    assert "decoder lean" in outcome.err
    assert outcome.out == cli(*arguments, "--dtype", "float32").out
    narrow = cli(*arguments, "--dtype", "bfloat16")
    assert "parameters, cpu, bfloat16" in narrow.err
    assert "decoder loop" in narrow.err
