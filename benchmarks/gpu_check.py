"""The Python half of gpu_check.sh: what ran where, and small shapes for the sanitizer. Speeds are `benchmarks.run`.

python benchmarks/gpu_check.py environment --out DIR
python benchmarks/gpu_check.py sanitize [--device cpu]
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tlstm.benchmark.environment import commit_of, describe_machine
from tlstm.layer import LSTM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("environment").add_argument("--out", type=Path, required=True)
    commands.add_parser("sanitize").add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.command == "sanitize":
        sanitize(arguments.device)
    else:
        found = {"commit": commit_of(Path(__file__).parents[1]), **describe_machine("cuda")}
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "environment.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def sanitize(device: str) -> None:
    """Forward and backward of small layers in every regime; correctness is the tests' business, this is for memory."""
    from tlstm_kernels.launch_options import launch_options

    backend = "triton" if device == "cuda" else "reference"
    for regime, H in (("single", 13), ("persistent", 40), ("streamed", 40)):
        for dtype, bidirectional in product((torch.float16, torch.float32), (False, True)):
            with launch_options({"regime": regime}, {"regime": regime}):
                options = {"bidirectional": bidirectional, "dtype": dtype, "device": device, "backend": backend}
                x = torch.randn(4, 5, 7, dtype=dtype, device=device, requires_grad=True)
                lengths = torch.tensor((4, 0, 2, 1, 3), device=device)
                resets = torch.rand(4, 5, device=device) < 0.5
                state = tuple(torch.randn(1 + bidirectional, 5, H, dtype=dtype, device=device) for _ in range(2))
                calls: list[dict[str, Any]] = [{}, {"lengths": lengths}]
                calls += [{"resets": resets}, {"lengths": lengths, "resets": resets, "reset_state": state}]
                for zoneout, call in product(((0.0, 0.0), (0.5, 0.3)), calls):
                    module = LSTM(7, H, zoneout=zoneout, **options)
                    module(x, **call)[0].sum().backward()
                    module.eval()(x, **call)
            print(f"{regime} H={H} {dtype} bidirectional={bidirectional}: done", flush=True)


if __name__ == "__main__":
    main()
