"""The tests' end of `driver.py`: a process in which tlstm talks to a loopback Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

PREAMBLE = """
import hashlib, json
from pathlib import Path
import torch
from huggingface_hub import HfApi
from small_models import causal_lm
from tlstm import LSTMForCausalLM, LSTMModel, Tokenizer

torch.set_num_threads(1)
api = HfApi()

def digest(model):
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.numpy().tobytes())
    return weights.hexdigest()
"""


class ClientError(Exception):
    """What the code raised: class names of its type and bases, message, and HTTP status where it has one."""

    def __init__(self, kinds: list[str], text: str, status: int | None) -> None:
        super().__init__(f"{kinds[0]}: {text}")
        self.kinds, self.text, self.status = kinds, text, status


class Client:
    def __init__(self, url: str, home: Path, token: str | None = "hf_owner", **environment: str) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_") and not name.lower().endswith("_proxy")
        }
        root = Path(__file__).parents[2]
        settings = {
            "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(str(root / name) for name in (".", "kernels", "tests")),
        }  # fmt: skip
        if token is not None:
            settings["HF_TOKEN"] = token
        self.log = open(home / "stderr.txt", "a+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=home,
            env={**kept, **settings, **environment},
        )
        self.run(PREAMBLE)

    def run(self, code: str, **values: Any) -> Any:
        """Run `code` with `values` as variables; what it leaves in `result`. `ClientError` if it raises."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"code": textwrap.dedent(code), "values": values}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the client has died: {self.log.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(**answer["error"])
        return answer["result"]

    def close(self) -> None:
        self.process.communicate()
        self.log.close()
