"""`tlstm quantize`: an int8 checkpoint of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from tlstm.cli.common import ModelSource, format_bytes
from tlstm.cli.errors import UsageError

DESCRIPTION = """Store the matrices of a checkpoint as whole numbers from -127 to 127, with one float32 scale per row.

The new checkpoint is a quarter the size of a float32 one and half that of a 16-bit one, and is used like any other:
matrices are multiplied out as it is loaded. `tlstm eval` on both tells what the rounding costs. It cannot be trained.
"""
EPILOG = """examples:
  tlstm quantize runs/first/model runs/first/model-int8
  tlstm quantize user/name models/name-int8
  tlstm eval --model runs/first/model-int8 --data test.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR|REPO", help="checkpoint folder, or Hub repo id user/name[@revision]")
    parser.add_argument("out", metavar="OUT", help="folder for the new checkpoint; it must not hold one yet")


def run(args: argparse.Namespace) -> int:
    from tlstm.config import CONFIG_NAME
    from tlstm.models import LSTMForCausalLM
    from tlstm.quantization import quantize
    from tlstm.tokenizer.tokenizer import Tokenizer

    out = Path(args.out)
    if (out / CONFIG_NAME).exists():
        raise UsageError(f"{out} holds a checkpoint already; name a new folder")
    folder = ModelSource.parse(args.model).folder()
    model = LSTMForCausalLM.from_pretrained(folder, dtype="float32")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.ndim == 2}
    quantize(model)
    tokenizer = Tokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None
    model.save_pretrained(out, tokenizer=tokenizer)
    sizes = [format_bytes(_weight_bytes(place)) for place in (folder, out)]
    print(f"weights {sizes[0]} -> {sizes[1]}, in {out}")
    changes = {
        name: float((parameter.detach() - before[name]).norm() / before[name].norm().clamp(min=1e-30))
        for name, parameter in model.named_parameters()
        if name in before
    }
    worst = max(changes, key=lambda name: changes[name])
    print(f"largest relative change of a matrix: {changes[worst]:.2%} ({worst})")
    return 0


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
