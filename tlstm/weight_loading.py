"""From an opened checkpoint to a model: compare names, shapes and dtypes, then fill it tensor by tensor."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from tlstm.checkpoint.files import (
    CheckpointError,
    FolderView,
    StoredWeights,
    TensorHeader,
    open_checkpoint,
    read_consistently,
    read_json,
)
from tlstm.checkpoint.memory import check_fits
from tlstm.config import CONFIG_NAME, DTYPES, LSTMConfig
from tlstm.quantization import DequantizedWeights

if TYPE_CHECKING:
    from tlstm.pretrained import PreTrainedModel

GENERATION_CONFIG_NAME = "generation_config.json"
_FLOATS = {name: getattr(torch, name) for name in DTYPES}
_LISTED = 20  # names of wrong tensors in one error message

Model = TypeVar("Model", bound="PreTrainedModel")


@dataclass
class KeyReport:
    """How a checkpoint's tensors and a model's differ; `load_from` maps each model tensor that fits to a stored one."""

    load_from: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def info(self) -> dict[str, list[str]]:
        """The dict that `output_loading_info=True` returns."""
        return {
            "missing_keys": self.missing,
            "unexpected_keys": self.unexpected,
            "mismatched_keys": self.mismatched,
            "error_msgs": self.errors,
        }

    def problems(self) -> str:
        """One line per kind of difference, or an empty string."""
        lines = []
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{kind} tensors: {_listed(names)}")
        if self.errors:
            lines.append(f"tensors that do not fit: {_listed(self.errors)}")
        return "\n".join(lines)


def check_dtype(dtype: object) -> torch.dtype | None:
    """The torch dtype meant by `dtype`, `None` for "auto". Raises `ValueError` for what is no floating-point dtype."""
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in _FLOATS:
        return _FLOATS[dtype.removeprefix("torch.")]
    if isinstance(dtype, torch.dtype) and dtype in _FLOATS.values():
        return dtype
    raise ValueError(f"dtype: expected 'auto' or one of {', '.join(_FLOATS)} (name or torch.dtype), got {dtype!r}")


def check_device(device: str | torch.device | None) -> torch.device:
    """The device, tried out, so that one that is not there is reported before anything is downloaded or read."""
    try:
        checked = torch.device("cpu" if device is None else device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that torch can use here, got {device!r} ({reason})") from None
    return checked


def load_model(
    model_class: type[Model],
    folder: Path,
    *,
    config: LSTMConfig | None,
    variant: str | None,
    dtype: torch.dtype | None,
    device: torch.device,
    strict: bool,
) -> tuple[Model, dict[str, list[str]]]:
    """The model in `folder`, in evaluation mode, and the report on its keys; see `PreTrainedModel.from_pretrained`."""

    def read(view: FolderView) -> tuple[LSTMConfig, dict[str, Any] | None, StoredWeights]:
        return (
            copy.deepcopy(config) if config is not None else _read_config(view, model_class),
            _read_generation_config(view),
            open_checkpoint(view, variant),
        )

    found_config, generation_values, stored = read_consistently(folder, read)
    with stored:
        if found_config.quantization is not None:
            stored = DequantizedWeights(stored)
        model = _on_meta(model_class, found_config, folder)
        _set_generation_config(model, generation_values, folder)
        report = compare(model, stored)
        if strict and report.problems():
            raise CheckpointError(
                f"{stored.source}: the weights do not fit {model_class.__name__} with this config\n"
                f"{report.problems()}\n"
                "Load with the class and config that saved them, or pass strict=False to load what fits"
            )
        _check_memory(model, stored, report, dtype, device)
        _fill(model, stored, report, dtype, device)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    return model.eval(), report.info()


def _read_config(view: FolderView, model_class: type[PreTrainedModel]) -> LSTMConfig:
    path = view.folder / CONFIG_NAME
    values = read_json(path, view.read_bytes(CONFIG_NAME))
    try:
        config = model_class.config_class.from_dict(values, source=str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    names = config.architectures
    if names and not any(parent.__name__ in names for parent in model_class.__mro__):
        raise CheckpointError(
            f"{path}: expected architecture {model_class.__name__}, got {', '.join(names)[:200]}; load it "
            f"with {names[0][:100]}.from_pretrained"
        )
    return config


def _read_generation_config(view: FolderView) -> dict[str, Any] | None:
    path = view.folder / GENERATION_CONFIG_NAME
    if view.path(GENERATION_CONFIG_NAME) is None:
        return None
    return read_json(path, view.read_bytes(GENERATION_CONFIG_NAME))


def _set_generation_config(model: nn.Module, values: dict[str, Any] | None, folder: Path) -> None:
    own = getattr(model, "generation_config", None)
    if own is None or values is None:
        return
    try:
        model.generation_config = type(own).from_dict(values, source=str(folder / GENERATION_CONFIG_NAME))
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _on_meta(model_class: type[Model], config: LSTMConfig, folder: Path) -> Model:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"):
            return model_class(config)
    except RuntimeError as error:  # sizes whose product overflows
        raise CheckpointError(f"{folder / CONFIG_NAME}: no model can have these sizes ({error})") from None


def compare(model: PreTrainedModel, stored: StoredWeights) -> KeyReport:
    """Match the model's tensors with the stored headers. Reads data only where a tied weight is stored twice."""
    report = KeyReport()
    headers = dict(stored.headers)
    for alias, owner in model._tied_weights.items():
        if alias not in headers:
            continue
        if owner not in headers:  # saved under its other name
            headers[owner] = headers[alias]
            report.load_from[owner] = alias
        elif not torch.equal(stored.tensor(alias), stored.tensor(owner)):
            raise CheckpointError(
                f"{headers[alias].file}: {alias!r} and {owner!r} are tied in this model but differ in the file; load "
                "it with tie_word_embeddings=False in its config, or save it again"
            )
        del headers[alias]
    for name, tensor in model.state_dict().items():
        if name in model._tied_weights:
            continue
        header = headers.pop(name, None)
        if header is None:
            report.missing.append(name)
        elif _fits(tensor, header):
            report.load_from.setdefault(name, name)
        else:
            report.load_from.pop(name, None)
            report.mismatched.append(name)
            report.errors.append(
                f"{name} (expected {tuple(tensor.shape)} {_kind(tensor)}, got {header.shape} {header.dtype} in "
                f"{header.file.name})"
            )
    report.unexpected = sorted(headers)
    return report


def _fits(tensor: Tensor, header: TensorHeader) -> bool:
    if tensor.is_floating_point():
        return tensor.shape == header.shape and header.dtype in _FLOATS.values()
    return tensor.shape == header.shape and header.dtype == tensor.dtype


def _kind(tensor: Tensor) -> str:
    return "floating point" if tensor.is_floating_point() else str(tensor.dtype)


def _check_memory(
    model: PreTrainedModel, stored: StoredWeights, report: KeyReport, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Refuse what the machine cannot hold: a sparse file, or with strict=False a config whose weights are in no file.

    torch would find out by being killed, because Linux promises more memory than there is.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in model._tied_weights}
    needed = 0
    if device.type == "cpu":
        for name, source in report.load_from.items():
            stored_dtype = stored.headers[source].dtype
            wide = dtype if dtype is not None and stored_dtype.is_floating_point else stored_dtype
            needed += tensors[name].numel() * wide.itemsize
    if len(report.load_from) < len(tensors):  # then the model is also made afresh
        needed += sum(tensor.nbytes for tensor in tensors.values())
    check_fits(needed, stored.source)


def _fill(
    model: PreTrainedModel, stored: StoredWeights, report: KeyReport, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Give every tensor of the meta `model` memory on `device`: the stored values, or else the model's own."""
    state: dict[str, Tensor] = {}
    for name, source in report.load_from.items():
        tensor = stored.tensor(source)
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # A copy always: the stored tensor lies in the file's memory map, whose file may be replaced or changed.
        state[name] = torch.empty(tensor.shape, dtype=wanted, device=device).copy_(tensor)
    common = dtype or next((t.dtype for t in state.values() if t.is_floating_point()), _FLOATS[model.config.dtype])
    transient = [name for name, _ in model.named_buffers() if name not in model.state_dict()]
    if report.missing or report.mismatched or transient:
        fresh = type(model)(model.config)
        initial = {**fresh.state_dict(), **dict(fresh.named_buffers())}
        for name in (*report.missing, *report.mismatched, *transient):
            tensor = initial[name].detach()
            state[name] = tensor.to(device=device, dtype=common if tensor.is_floating_point() else tensor.dtype)
    for name in transient:
        parent, attribute = _place(model, name)
        setattr(parent, attribute, state.pop(name))
    model.load_state_dict(state, strict=False, assign=True)
    for alias, owner in model._tied_weights.items():
        parent, attribute = _place(model, alias)
        setattr(parent, attribute, operator.attrgetter(owner)(model))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor `name`, and its attribute there."""
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
