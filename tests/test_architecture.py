"""The rules of the house, read from the source: who imports whom, what is never used, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "tlstm").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "tlstm_kernels").rglob("*.py"))
SOURCES = [*LIBRARY, *KERNELS]
LONGEST_FILE = 300

# Room -> the modules directly under `tlstm` that are in it; a folder is a room as a whole.
ROOMS = {
    "functional": ["functional"],
    "layer": ["layer", "layer_arguments"],
    "trials": ["trials"],
    "leaf": ["state", "validation", "version"],
    "config": ["config", "transformers_shim"],
    "files": ["checkpoint"],
    "tokenizer": ["tokenizer"],
    "hub": ["hub"],
    "pretrained": ["pretrained", "quantization", "weight_loading"],
    "generation": ["generation"],
    "models": ["models"],
    "training": ["training"],
    "integrations": ["integrations"],
    "benchmark": ["benchmark"],
    "cli": ["cli", "__main__"],
}
# Room -> the rooms that its modules may import besides their own. `checks` and `kernels` are those of tlstm_kernels.
MAY_IMPORT = {
    "checks": set(),
    "kernels": {"checks"},
    "trials": {"kernels"},
    "functional": {"kernels", "checks", "trials"},
    "layer": {"functional", "checks"},
    "leaf": {"files"},
    "config": {"files", "leaf", "hub"},
    "files": set(),
    "hub": {"files", "leaf"},
    "tokenizer": {"files", "leaf", "hub"},
    "pretrained": {"files", "leaf", "config", "hub"},
    "generation": {"files", "leaf", "config", "kernels", "trials"},
    "models": {"layer", "functional", "leaf", "config", "pretrained", "generation"},
    "training": {"models", "leaf", "config", "files", "hub", "pretrained", "tokenizer", "generation", "layer"},
    "integrations": {"models", "leaf", "config", "files", "pretrained", "tokenizer", "generation"},
    "benchmark": {"kernels", "checks", "functional", "layer", "leaf", "config", "models"},
    "cli": {
        "benchmark",
        "functional",
        "layer",
        "leaf",
        "config",
        "files",
        "tokenizer",
        "hub",
        "pretrained",
        "generation",
        "models",
        "training",
        "checks",
    },
}


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if path in KERNELS else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, typing_too: bool = False) -> set[str]:
    """Absolute names of all modules imported anywhere in a file, also inside functions; relative ones are resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: set[str] = set()
    skipped = set() if typing_too else {id(n) for block in typing_blocks(tree) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else []
            name = ".".join(base) if node.level else str(node.module)
            found |= {f"{name}.{alias.name}" for alias in node.names}  # the name may be a submodule
    return found


def typing_blocks(tree: ast.AST) -> list[ast.stmt]:
    """Bodies of `if TYPE_CHECKING:`, which are never executed."""
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    return [
        s for node in tests if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" for s in node.body
    ]


def room_of(module: str) -> str | None:
    """The room of a module of the project, None for other modules and for the bare package `tlstm`."""
    first, _, rest = module.partition(".")
    if first == "tlstm_kernels":
        return "checks" if rest.startswith("checks") else "kernels"
    name = rest.partition(".")[0]
    if first != "tlstm" or not name:
        return None
    return next((room for room, names in ROOMS.items() if any(fnmatch(name, n) for n in names)), "no room")


def name_of(path: object) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_imports_only_rooms_it_may(path):
    room = room_of(module_name(path))
    if module_name(path) == "tlstm":
        allowed = {"leaf"}  # everything else is imported when it is first used
    else:
        assert room in MAY_IMPORT, f"{name_of(path)} has no room: give it one in ROOMS of this test"
        allowed = MAY_IMPORT[room] | {room}
    wrong = {m for m in imports(path) if room_of(m) not in {None, *allowed}}
    assert not wrong, f"{name_of(path)} ({room}) may import {sorted(allowed)}, but imports {sorted(wrong)}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_generation_knows_no_model(path):
    """Also not for type checking: generation is written against a protocol, so that every later head gets it."""
    if room_of(module_name(path)) != "generation":
        return
    assert not {m for m in imports(path, typing_too=True) if room_of(m) in {"models", "training", "tokenizer"}}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_transformers_outside_the_bridge_and_no_pickle(path):
    roots = {module.partition(".")[0] for module in imports(path, typing_too=True)}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    assert "transformers" not in roots or path.is_relative_to(ROOT / "tlstm" / "integrations")
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)]
    loads = {
        f"{node.value.id}.{node.attr}:{node.lineno}"
        for node in calls
        if isinstance(node.value, ast.Name) and (node.value.id, node.attr) in {("torch", "load"), ("torch", "save")}
    }
    assert not loads, "pickled files are neither read nor written: use safetensors"


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_the_kernels_stand_alone(path):
    roots = {module.partition(".")[0] for module in imports(path, typing_too=True)} - set(sys.stdlib_module_names)
    assert roots <= {
        "torch",
        "triton",
        "tlstm_kernels",
    }  # relative inside: see kernels/test_hub_kernel.py


@pytest.mark.parametrize("name", ["reference", "launch_plan", "checks", "decode_plan", "decode_shape"])
def test_pure_python_rooms_of_the_kernels_never_import_triton(name):
    path = ROOT / "kernels" / "tlstm_kernels" / f"{name}.py"
    if path.exists() or name == "reference":
        assert "triton" not in {module.partition(".")[0] for module in imports(path)}


def test_kernels_is_no_importable_package():
    """An importable `kernels` would shadow the Hub's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_too_long_or_has_loose_ends(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE, f"{name_of(path)}: more than {LONGEST_FILE} lines; give it two rooms"
    assert not [word for word in ("TODO", "FIXME", "XXX", "raise NotImplementedError") if word in text]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_exceptions_are_never_swallowed_whole(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
            )
            silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
            assert not (broad and silent), f"{name_of(path)}:{node.lineno}"


def run_python(code: str, *, blocked: str = "") -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter that sees this tree, where importing any of `blocked` fails."""
    block = f"import sys\nfor name in {blocked.split()!r}: sys.modules[name] = None\n"
    path = f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    return subprocess.run([sys.executable, "-c", block + path + code], capture_output=True, text=True, check=False)


def test_the_library_works_without_triton():
    """As on a Mac: the names, the layer on a CPU, and its gradient."""
    done = run_python(
        "import tlstm, torch\n"
        "for name in tlstm.__all__: getattr(tlstm, name)\n"
        "layer = tlstm.LSTM(3, 7)\n"
        "layer(torch.ones(5, 2, 3))[0].sum().backward()\n"
        "assert layer.weight_hh_l0.grad.abs().sum() > 0\n",
        blocked="triton",
    )
    assert done.returncode == 0, done.stderr


def test_importing_is_cheap_and_needs_no_extra():
    """`import tlstm` loads nothing heavy, and using all of its names needs none of the optional packages."""
    done = run_python("import tlstm; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "tokenizers", "huggingface_hub"} & set(done.stdout.split())
    optional = "transformers matplotlib tensorboard scipy datasets hypothesis pytest"
    done = run_python(
        "import tlstm\nfor name in tlstm.__all__: getattr(tlstm, name)\nimport tlstm.cli", blocked=optional
    )
    assert done.returncode == 0, done.stderr
