"""One tokenizer of each kind, over a text of awkward characters: shared by the tests of the tokenizers."""

from __future__ import annotations

from tlstm.tokenizer.tokenizer import Tokenizer

CORPUS = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\n\n  All:\t speak, speak...\r\n"
    "Naïve café Zoë; 東京 の 夜\u3000だ, Здравствуй 👩‍👩‍👧 e\u0301 \ufffd \x00\x7f\n'tis 'll 1234 -- (end)\n \n"
)


def make(kind: str) -> Tokenizer:
    if kind == "char":
        return Tokenizer.train_char(CORPUS, eos_token="<eos>", pad_token="<pad>")
    if kind == "char-unk":
        return Tokenizer.train_char(CORPUS, unk_token="<unk>")
    if kind == "byte":
        return Tokenizer.bytes(bos_token="<s>", eos_token="<eos>")
    return Tokenizer.train_bpe(
        [CORPUS] * 3, 300, eos_token="<eos>", pad_token="<pad>", special_tokens=["<|user|>"], progress=False
    )


KINDS = ["char", "char-unk", "byte", "bpe"]
TOKENIZERS = {kind: make(kind) for kind in KINDS}
