"""The named sets of workloads, each with the source of its sizes.

Sizes are those of a GPU; on a CPU each workload is shrunk (`Workload.small`) unless full size is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from tlstm.benchmark.workload import Workload


@dataclass(frozen=True)
class WorkloadSet:
    """A name, why these sizes, and the workloads, the most telling first."""

    name: str
    source: str
    workloads: tuple[Workload, ...]
    decode: bool = False  # tokens are generated; the other modes do not apply
    curve: str = ""  # the size along which time and memory are fitted


SETS: dict[str, WorkloadSet] = {}


def _set(make: Callable[[], list[Workload]], name: str, curve: str = "", decode: bool = False) -> None:
    source = " ".join((make.__doc__ or "").split())
    SETS[name] = WorkloadSet(name, source, tuple(dict.fromkeys(make())), decode, curve)


def _layer(T: int, B: int, H: int, I: int | None = None, layers: int = 1, bidirectional: bool = False) -> Workload:
    return Workload(T=T, B=B, H=H, I=H if I is None else I, layers=layers, bidirectional=bidirectional)


def _headline() -> list[Workload]:
    """One layer of 768 units, 1024 steps: FlashRNN's published comparison (Poeppel et al. 2024, batch 16 on an H100),
    and the batch sizes around it."""
    return [_layer(1024, B, 768) for B in (16, 1, 2, 4, 8, 32, 64, 128, 256)]


def _cliffs() -> list[Workload]:
    """Both sides of the rule by which PyTorch gives a shape to cuDNN's persistent kernels (ATen/native/cudnn/RNN.cpp):
    H a multiple of 128 or not above 192, B a multiple of 8 up to 128."""
    return [_layer(512, B, H) for H, B in product((128, 192, 256, 512, 1024), (8, 12, 16, 64, 128, 136))]


def _deepbench_train() -> list[Workload]:
    """Baidu's DeepBench, LSTM training (machine translation, language modelling, speaker and character models)."""
    large = [_layer(25, B, H) for H, B in product((512, 1024, 2048, 4096), (16, 32, 64, 128))]
    return large + [_layer(50, B, 1536) for B in (8, 16, 32)] + [_layer(150, B, 256) for B in (16, 32, 64)]


def _deepbench_infer() -> list[Workload]:
    """Baidu's DeepBench, LSTM inference on a server: batches of 1, 2 and 4."""
    large = [_layer(25, B, H) for H, B in product((512, 1024, 2048), (1, 2, 4))]
    return large + [_layer(50, B, 1536) for B in (1, 2, 4)] + [_layer(150, B, 256) for B in (1, 2, 4)]


def _lm() -> list[Workload]:
    """Word-level language models: AWD-LSTM (Merity et al. 2017; batch 20 for Penn Treebank, 80 for WikiText-2) and the
    medium model of Zaremba et al. 2014."""
    return [_layer(70, B, 1150, layers=3) for B in (20, 80)] + [_layer(35, 20, 650, layers=2)]


def _speech() -> list[Workload]:
    """A bidirectional acoustic model of 4 x 512, 10 seconds of 10 ms frames (after Graves et al. 2013)."""
    return [_layer(1000, 32, 512, layers=4, bidirectional=True)]


def _rl() -> list[Workload]:
    """Recurrent policies (R2D2, Kapturowski et al. 2019; batches of IMPALA and of simulators on a GPU), with episodes
    that end at 0, 0.1 and 3 % of the steps."""
    shapes = ((128, 128, 256), (128, 256, 512), (32, 4096, 256))  # T, B, H
    return [Workload(T=T, B=B, H=H, I=H, resets=resets) for resets in (0.0, 0.001, 0.03) for T, B, H in shapes]


def _odd() -> list[Workload]:
    """Widths and batches that are no multiple of anything: those of Zaremba et al. 2014 and Merity et al. 2017."""
    return [_layer(128, B, H) for H, B in product((650, 1150, 1500), (1, 7, 20))]


def _capacity() -> list[Workload]:
    """Around the size at which recurrent weights no longer fit on the chip: about 1900 units in 16 bits on an H100."""
    return [_layer(512, 16, H) for H in (1280, 1536, 1792, 2048)]


def _small() -> list[Workload]:
    """Sizes at which the launch and the exchange are everything, up to large batches of small layers."""
    return [_layer(512, B, H) for H, B in product((32, 64, 128), (1, 64, 1024))]


def _decode() -> list[Workload]:
    """Generating text: character (65), byte (256), 10k-word and 50k-subword vocabularies, 1 to 64 streams. 1024 tokens,
    so that what a call does once, for its prompts and its results, is not most of it."""
    sizes = [(2, 1024, 65, 1), (2, 1024, 65, 64)]
    sizes += product((2, 1), (1024, 512, 256), (65, 50_257, 256, 10_000), (1, 64, 8))
    return [Workload(T=1024, B=B, H=H, I=H, layers=layers, vocab=V) for layers, H, V, B in sizes]


def _short() -> list[Workload]:
    """What `tlstm bench` runs unless told otherwise: one workload of each kind, a few minutes in all."""
    return [_layer(1024, 16, 768), _layer(25, 64, 1024), _layer(70, 80, 1150, layers=3), _layer(128, 7, 650)]


def _layer_set() -> list[Workload]:
    """The layer beside torch's own where the call itself weighs most: single tokens, the smallest sizes, options."""
    return [
        _layer(1, 1, 512, layers=2),
        _layer(1, 1, 8),
        _layer(35, 7, 65, layers=2),
        _layer(64, 32, 256, layers=2),
        _layer(32, 16, 128),
        _layer(32, 16, 128, bidirectional=True),
        Workload(T=32, B=16, H=128, I=128, proj_size=64),
        Workload(T=32, B=16, H=128, I=128, resets=0.03),
    ]


def _check() -> list[Workload]:
    """A first look at a new card, for `benchmarks/gpu_check.sh`: the anchor of `headline`, then widths for one batch
    size after another."""
    widths = (64, 128, 256, 512, 650, 768, 1024, 1536, 2048)
    return [_layer(1024, 16, 768), *(_layer(512, B, H) for B in (16, 1, 64, 7, 128) for H in widths)]


def _curve_t() -> list[Workload]:
    """Time and memory against the length of the sequence, for the layer of `headline`."""
    return [_layer(T, 16, 768) for T in (64, 128, 256, 512, 1024, 2048)]


def _curve_b() -> list[Workload]:
    """Time against the batch: up to where the matrix product, not the exchange, takes the step."""
    return [_layer(512, B, 768) for B in (4, 8, 16, 32, 64, 128, 256, 512)]


def _curve_h() -> list[Workload]:
    """Time against the width: one program, many programs, weights streamed from the L2."""
    return [_layer(512, 16, H) for H in (128, 256, 384, 512, 768, 1024, 1536, 2048)]


def _curve_layers() -> list[Workload]:
    """Time against the number of layers, which run one after another."""
    return [_layer(512, 16, 512, layers=layers) for layers in (1, 2, 3, 4, 6, 8)]


_set(_headline, "headline")
_set(_cliffs, "cliffs")
_set(_deepbench_train, "deepbench-train")
_set(_deepbench_infer, "deepbench-infer")
_set(_lm, "lm")
_set(_speech, "speech")
_set(_rl, "rl")
_set(_odd, "odd")
_set(_capacity, "capacity")
_set(_small, "small")
_set(_decode, "decode", decode=True)
_set(_short, "short")
_set(_layer_set, "layer")
_set(_check, "check")
_set(_curve_t, "curve-T", curve="T")
_set(_curve_b, "curve-B", curve="B")
_set(_curve_h, "curve-H", curve="H")
_set(_curve_layers, "curve-layers", curve="layers")


def workloads_of(name: str, small: bool) -> list[Workload]:
    """The workloads of a set, shrunk for a CPU if `small`.

    Raises:
        ValueError: no set of that name. The layer set is small already and is never shrunk.
    """
    if name not in SETS:
        raise ValueError(f"set: expected one of {', '.join(SETS)}; received {name!r}.")
    found = SETS[name].workloads
    return list(dict.fromkeys(w.small() for w in found)) if small and name != "layer" else list(found)
