"""`tlstm generate`: what it prints is what the model makes; settings, prompts, JSON, mistakes."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import pytest
import torch
from generate_outcomes import FIGURES, load, tokens_of

from tlstm import Tokenizer

# ---- one text --------------------------------------------------------------------------------------------------------


def test_text_is_what_the_model_makes(cli, checkpoint):
    model, tokenizer = load(checkpoint)
    ids = model.generate([tokenizer.encode("ROMEO:")], do_sample=True, temperature=0.9, seed=5, max_new_tokens=23)
    common = ("generate", "--model", checkpoint, "--prompt", "ROMEO:")
    outcome = cli(*common, "--temperature", 0.9, "--seed", 5, "--max-new-tokens", 23)
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
    """generation_config.json: temperature 0.7, top_k 5, 9 tokens; a flag wins over it, `none` switches one off."""
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
    (first,) = tokens_of(cli("generate", "--model", byte_checkpoint, "--prompt", "a", "--seed", 2, "--json"))
    outcome = cli(
        "generate", "--model", byte_checkpoint, "--prompt", "a", "--seed", 2, "--json", "--eos-token-id", first[4]
    )
    (sequence,) = json.loads(outcome.out)["sequences"]
    assert sequence["tokens"] == first[: first.index(first[4]) + 1]
    assert sequence["finish_reason"] == "eos"


def test_special_tokens_are_not_text(cli, byte_checkpoint):
    _, tokenizer = load(byte_checkpoint)
    all_but_eos = ",".join(map(str, range(tokenizer.eos_token_id)))
    outcome = cli("generate", "--model", byte_checkpoint, "--prompt", "a", "--json", "--suppress-tokens", all_but_eos)
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


# ---- mistakes --------------------------------------------------------------------------------------------------------


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
