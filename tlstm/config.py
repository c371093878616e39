"""`LSTMConfig`: everything that decides the shape and the training-time behaviour of a tlstm language model."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlstm.checkpoint.folder_swap import replace_files
from tlstm.checkpoint.folder_view import read_whole
from tlstm.checkpoint.json_file import parse_json
from tlstm.hub.pushable import Pushable
from tlstm.validation import check_choice, check_int, check_number, is_int, is_number, shown
from tlstm.version import __version__

CONFIG_NAME = "config.json"
CONFIG_VERSION = 1
DTYPES = ("float64", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8",)
INITIALIZERS = ("uniform", "orthogonal")
# No real LSTM comes near these; they stop a damaged or hostile config before anything is allocated for it.
MAX_WIDTH, MAX_LAYERS, MAX_VOCABULARY = 1 << 17, 1 << 10, 1 << 26

# What transformers adds to the two configs it saves, and means nothing here; see `tlstm.integrations.transformers`.
WRITTEN_BY_TRANSFORMERS = frozenset(
    {"auto_map", "transformers_version", "use_cache", "_from_model_config", "output_attentions", "output_hidden_states"}
)

_DROPOUTS = (
    *("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout"),
    *("zoneout_h", "zoneout_c"),
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class LSTMConfig(Pushable):
    """Configuration of `LSTMModel` and `LSTMForCausalLM`. Every field is checked on construction.

    Sizes:
        vocab_size: number of token ids, `V`.
        hidden_size: units per layer, `H`, for all `num_layers` layers.
        num_layers: number of stacked LSTM layers, `L`.
        layer_sizes: width of each layer where they differ, e.g. `[1150, 1150, 400]` (AWD-LSTM); overrides
            `hidden_size` and `num_layers`.
        embedding_size: width of the token embedding; `None` means the first layer's output width.
        proj_size: recurrent projection in every layer, as in `torch.nn.LSTM` (Sak et al. 2014); 0 means none.
        num_heads: blocks of a block-diagonal recurrent weight in every layer (`tlstm.LSTM`); 1 means the usual LSTM.
        output_projection: a linear map from the last layer's width to `embedding_size` before the head, which lets a
            wide model tie its head to a narrower embedding.
        recompute: less memory in training for one more product in the backward pass (`tlstm.LSTM`).
    Wiring:
        residual: from the second layer on, add a layer's input to its output where the two widths agree.
        bias: biases in the LSTM layers. head_bias: bias in the language-model head.
        tie_word_embeddings: the head's weight is the embedding matrix (Press & Wolf 2017).
    Regularisation, active in training only, all probabilities in [0, 1):
        embedding_dropout: whole word types dropped from the embedding matrix (Gal & Ghahramani 2016).
        input_dropout: locked dropout on the embedded input: one mask per sequence, the same at every step.
        hidden_dropout: locked dropout between LSTM layers. output_dropout: locked dropout after the last layer.
        weight_dropout: DropConnect on the recurrent weights `W_hh` (Merity et al. 2017).
        zoneout_h, zoneout_c: how likely a unit keeps its h, and its c, of the step before (Krueger et al. 2016); these
            two also in evaluation, in expectation. The native backend has no zoneout and is replaced by a slower one.
    Initialisation:
        initializer: `"uniform"`: U(-1/sqrt(H), 1/sqrt(H)) as `torch.nn.LSTM`; `"orthogonal"`: each gate's recurrent
            matrix orthogonal, biases zero, the rest as for `"uniform"`.
        initializer_range: half-width of the uniform distribution of embedding and head; `None` means 0.1.
        forget_bias: added to the forget gate's initial bias (Jozefowicz et al. 2015 recommend 1).
    Tokens and storage:
        bos_token_id, eos_token_id (an id or a list of ids), pad_token_id: special ids, where there are any.
        dtype: the dtype in which the weights are stored, e.g. `"bfloat16"`.
        quantization: `"int8"` where the matrices are stored as whole numbers (`tlstm.quantization`), else `None`.
        architectures: class names that can load the checkpoint; written by `save_pretrained`.
        extra: keys this version does not know, kept and written back unchanged.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names it.
    """

    vocab_size: int
    hidden_size: int = 512
    num_layers: int = 2
    layer_sizes: list[int] | None = None
    embedding_size: int | None = None
    proj_size: int = 0
    num_heads: int = 1
    recompute: bool = False
    output_projection: bool = False
    residual: bool = False
    bias: bool = True
    head_bias: bool = True
    tie_word_embeddings: bool = False
    embedding_dropout: float = 0.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    initializer: str = "uniform"
    initializer_range: float | None = None
    forget_bias: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"
    quantization: str | None = None
    architectures: list[str] | None = None
    model_type: str = "tlstm"
    config_version: int = CONFIG_VERSION
    tlstm_version: str = __version__
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_choices()
        self._check_token_ids()

    # ---- derived sizes -------------------------------------------------------------------------------------------

    @property
    def widths(self) -> list[int]:
        """Hidden units of each layer, first to last."""
        return list(self.layer_sizes) if self.layer_sizes is not None else [self.hidden_size] * self.num_layers

    @property
    def output_sizes(self) -> list[int]:
        """Width of each layer's output `h`: `proj_size` where there is a recurrent projection, else its `widths`."""
        return [self.proj_size or width for width in self.widths]

    @property
    def embedding_width(self) -> int:
        """Width of the token embedding, with the default filled in."""
        return self.embedding_size if self.embedding_size is not None else self.output_sizes[0]

    @property
    def head_width(self) -> int:
        """Width of what the backbone hands to the head, `D`."""
        return self.embedding_width if self.output_projection else self.output_sizes[-1]

    # ---- JSON ----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; unknown keys that were read are put back in their place."""
        values = dataclasses.asdict(self)
        extra = values.pop("extra")
        return {**extra, **values}

    def to_json(self) -> str:
        """`config.json`'s text: sorted keys, two-space indent, a final newline."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def files(self) -> dict[str, bytes]:
        """`config.json`'s name and content."""
        return {CONFIG_NAME: self.to_json().encode()}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `config.json` into `save_directory` (made if missing), atomically."""
        replace_files(save_directory, self.files())

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "the configuration") -> LSTMConfig:
        """Build a config from JSON values. `source` names where they came from in errors and warnings.

        Keys that this version does not know are kept in `extra`, with a warning unless they are transformers' own.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{source}: expected a JSON object of settings, got {type(values).__name__}")
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"{source}: expected model_type {cls.model_type!r}, got {shown(model_type)}; this is a checkpoint of "
                "another kind of model: load it with the library that wrote it"
            )
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        if "vocab_size" not in values:
            raise ValueError(f"{source}: `vocab_size` is missing; a tlstm config states at least its vocabulary size")
        unknown = {key: value for key, value in values.items() if key not in known}
        strange = sorted(str(key) for key in unknown if key not in WRITTEN_BY_TRANSFORMERS)
        if strange:
            warnings.warn(
                f"{source}: unknown settings {shown(strange)} are kept but have no effect "
                f"(written by tlstm {shown(values.get('tlstm_version', 'of unknown version'))}, read by {__version__})",
                stacklevel=2,
            )
        version = values.get("config_version", CONFIG_VERSION)
        if is_int(version) and version > CONFIG_VERSION:
            raise ValueError(
                f"{source}: config_version {shown(version)} is newer than {CONFIG_VERSION}, the newest that tlstm "
                f"{__version__} reads; upgrade tlstm"
            )
        # The version that wrote the file is history; a config always states the version that holds it now.
        fields = {key: value for key, value in values.items() if key in known and key != "tlstm_version"}
        try:
            return cls(**fields, extra=unknown)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> LSTMConfig:
        """Read a `config.json`. Raises `ValueError` naming the file when it is not a valid tlstm config."""
        return cls.from_json(read_whole(Path(path)), source=str(path))

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "config.json") -> LSTMConfig:
        """Parse the text of a `config.json`; `source` names it in errors."""
        return cls.from_dict(parse_json(text, source), source=source)

    # ---- checks --------------------------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        check_int("vocab_size", self.vocab_size, 1, MAX_VOCABULARY)
        check_int("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        check_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        if self.layer_sizes is not None:
            if not isinstance(self.layer_sizes, list | tuple) or not 1 <= len(self.layer_sizes) <= MAX_LAYERS:
                got = shown(self.layer_sizes)
                raise ValueError(f"layer_sizes: expected a list of 1 to {MAX_LAYERS} widths, got {got}")
            for width in self.layer_sizes:
                check_int("layer_sizes", width, 1, MAX_WIDTH)
            self.layer_sizes = list(self.layer_sizes)
            # One truth: the two plain fields follow the list, so that readers of config.json see real numbers.
            self.hidden_size, self.num_layers = self.layer_sizes[0], len(self.layer_sizes)
        if self.embedding_size is not None:
            check_int("embedding_size", self.embedding_size, 1, MAX_WIDTH)
        check_int("proj_size", self.proj_size, 0, MAX_WIDTH)
        if self.proj_size >= min(self.widths):
            raise ValueError(
                f"proj_size: expected less than every layer's width {self.widths}, got {self.proj_size}; "
                "a recurrent projection must narrow the state (0 means none)"
            )
        check_int("num_heads", self.num_heads, 1, MAX_WIDTH)
        if any(width % self.num_heads for width in self.widths) or (self.num_heads > 1 and self.proj_size):
            raise ValueError(
                f"num_heads: expected a divisor of every layer's width {self.widths}, and 1 beside a projection; got "
                f"{self.num_heads} with proj_size {self.proj_size}"
            )

    def _check_choices(self) -> None:
        for name in ("output_projection", "residual", "bias", "head_bias", "tie_word_embeddings", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {shown(getattr(self, name))}")
        for name in _DROPOUTS:
            value = getattr(self, name)
            if not is_number(value) or not 0.0 <= value < 1.0:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {shown(value)}")
        check_choice("initializer", self.initializer, INITIALIZERS)
        # At most what every dtype can hold.
        check_number("initializer_range", self.initializer_range, "(0, 1e4]", optional=True)
        check_number("forget_bias", self.forget_bias, "[-1e4, 1e4]")
        check_choice("dtype", self.dtype, DTYPES)
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
        names = self.architectures
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"architectures: expected a list of class names, got {shown(names)}")
        if not isinstance(self.extra, dict):
            raise ValueError(f"extra: expected a dictionary of further settings, got {shown(self.extra)}")
        check_int("config_version", self.config_version, 1, CONFIG_VERSION)
        if self.tie_word_embeddings and self.head_width != self.embedding_width:
            raise ValueError(
                f"tie_word_embeddings: the last layer gives {self.head_width} features but the embedding holds "
                f"{self.embedding_width}; set output_projection=True, or make the two widths equal"
            )

    def _check_token_ids(self) -> None:
        for name in _TOKEN_IDS:
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
            if not ids:
                raise ValueError(f"{name}: expected an id, a list of ids or null, got an empty list")
            for token_id in ids:
                if token_id is not None:
                    check_int(name, token_id, 0, self.vocab_size - 1)
                elif value is not None:
                    raise ValueError(f"{name}: expected ids, got null inside the list {shown(value)}")
