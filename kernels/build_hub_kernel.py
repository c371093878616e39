"""Build `tlstm_kernels` as a kernel repository of the Hugging Face Hub, which the `kernels` package loads.

    python kernels/build_hub_kernel.py OUT
    python -c "import pathlib, kernels; print(kernels.get_local_kernel(pathlib.Path('OUT')).lstm_layer)"
    hf upload user/tlstm-kernels OUT --repo-type kernel --revision v1

Nothing is compiled: Triton does that on the user's machine. One variant for each backend that the package runs on, all
with the same files, and a `metadata.json` that names the variant after its content.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "tlstm_kernels"
LICENSE = HERE.parent / "LICENSE"
NAME = "tlstm-kernels"
VERSION = 1  # of the interface; a change that breaks callers needs the next one
BACKENDS = ("cpu", "cuda", "rocm")
CARD = """---
library_name: kernels
license: apache-2.0
---

# tlstm-kernels

One LSTM layer, one or both directions, forward and backward: Triton kernels that keep the recurrent weights on the GPU
chip (`backend="triton"`) and the equations in plain torch (`backend="reference"`).

```python
from kernels import get_kernel

tlstm_kernels = get_kernel("user/tlstm-kernels", version=1, trust_remote_code=True)
y, h_n, c_n, _ = tlstm_kernels.lstm_layer(x, h_0, c_0, weights)
```
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the Hub kernel repository of tlstm_kernels.")
    parser.add_argument("folder", metavar="OUT", type=Path, help="folder to build in; its build/ is made anew")
    folder = parser.parse_args(arguments).folder
    if (folder / "build").exists() and not _is_ours(folder / "build"):
        print(
            f"build_hub_kernel: error: {folder / 'build'} is no build of {NAME}; name another folder", file=sys.stderr
        )
        return 2
    shutil.rmtree(folder / "build", ignore_errors=True)
    for backend in BACKENDS:
        build_variant(folder / "build" / f"torch-{backend}", backend)
    shutil.copyfile(LICENSE, folder / "LICENSE")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    print(*(folder / "build" / f"torch-{backend}" for backend in BACKENDS), sep="\n")
    return 0


def build_variant(folder: Path, backend: str) -> None:
    """The package's modules and the metadata into `folder`."""
    folder.mkdir(parents=True)
    digest = hashlib.sha256()
    for path in sorted(SOURCE.glob("*.py")):
        content = path.read_bytes()
        (folder / path.name).write_bytes(content)
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    metadata = {
        "name": NAME,
        # The name under which Python knows the loaded package, and so the namespace of its operators.
        "id": f"_{NAME.replace('-', '_')}_{backend}_{digest.hexdigest()[:8]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _is_ours(build: Path) -> bool:
    variants = [path / "metadata.json" for path in build.iterdir()]
    return all(path.is_file() and json.loads(path.read_text(encoding="utf-8"))["name"] == NAME for path in variants)


if __name__ == "__main__":
    sys.exit(main())
