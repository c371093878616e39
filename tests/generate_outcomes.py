"""What the tests of `tlstm generate` share."""

from __future__ import annotations

import json
import re

from tlstm import LSTMForCausalLM, Tokenizer

FIGURES = re.compile(
    r"prompt \d+ tokens?(, [\d,]+ tokens/s)? \| generated \d+ tokens, [\d,]+ tokens/s \| peak memory [\d.]+ [MG]B"
    r"( \| seed [\d,]+)?\n"
)


def load(folder):
    return LSTMForCausalLM.from_pretrained(folder), Tokenizer.from_pretrained(folder)


def tokens_of(outcome):
    return [sequence["tokens"] for sequence in json.loads(outcome.out)["sequences"]]
