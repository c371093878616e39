"""One side of a comparison of two versions: a process that measures when it is told to.

    python -m tlstm.benchmark.worker        reads one JSON object a line from stdin, answers with one a line on stdout

    {"do": "prepare", "workload": {...}, "mode": "train", "dtype": "float32", "provider": "tlstm", "device": "cpu"}
        -> {"status": "ok", "seconds": 0.01, "input_sets": 2} or {"status": "wrong", "error": "..."}
    {"do": "time", "inputs": [0, 1]}        -> {"seconds": 0.01}, the average of those calls

The other side waits meanwhile, so that the two versions take turns on the device.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from tlstm.benchmark.decode import DecodeProblem, DecodeTruth
from tlstm.benchmark.results import FAILED, OK, UNAVAILABLE, WRONG
from tlstm.benchmark.runner import bounded_waits, call_of, lookup_for, make_problem
from tlstm.benchmark.timing import Call, Clock, warm_up
from tlstm.benchmark.verification import Truth, WrongResultError
from tlstm.benchmark.workload import Workload


class Bench:
    """The problem at hand."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.clock: Clock | None = None
        self.problem: Any = None

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["do"] == "prepare":
            return self.prepare(message)
        assert self.call is not None
        assert self.clock is not None
        with self.problem.precision():
            return {"seconds": self.clock.time(self.call, message["inputs"])}

    def prepare(self, message: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(message.get("threads", 1))
        mode, device = message["mode"], message["device"]
        self.call = self.problem = None
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(torch.device(device))
        try:
            workload = Workload.from_row(message["workload"])
            self.problem = make_problem(workload, mode, message["dtype"], device)
            provider = lookup_for(mode)(message["provider"])
            reason = provider.why_not(self.problem)
            if reason is not None:
                return {"status": UNAVAILABLE, "error": reason}
            built = provider.build(self.problem)
            truth = DecodeTruth(self.problem) if isinstance(self.problem, DecodeProblem) else Truth(self.problem)
            with bounded_waits(self.problem):
                truth.check(built)
            call, self.clock = call_of(built, self.problem), Clock(device)
            with self.problem.precision():
                seconds = warm_up(call, self.clock, len(self.problem.xs))
        except WrongResultError as error:
            return {"status": WRONG, "error": str(error)}
        except Exception as error:  # of whatever version: the other side is told
            return {"status": FAILED, "error": f"{type(error).__name__}: {error}"}
        self.call = call
        return {"status": OK, "seconds": seconds, "input_sets": len(self.problem.xs)}


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever else is printed is no answer
    bench = Bench()
    for line in sys.stdin:
        print(json.dumps(bench.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
