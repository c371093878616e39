"""int8 weights: every matrix as whole numbers from -127 to 127 with one float32 scale per row. A quarter of the size.

`w[r, c] = q[r, c] * scale[r]`, with `scale[r] = max |w[r]| / 127`, the absmax rule. Only what is stored is narrow: it
is multiplied out when a checkpoint is loaded, and every way to compute works on it as on other weights. Scales are
rounded up to 16 significant bits, so that the products are exact in float32: a model that is loaded and saved again
gives the same file, and what was rounded once is never rounded further.

torch has a product with int8 weights on the CPU (`torch._weight_int8pack_mm`). It is not used: with float32 activations
it is slower than the float32 product, and with bfloat16 ones, where it is faster, their rounding changes the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tlstm.checkpoint.files import CheckpointError, StoredWeights, TensorHeader
from tlstm.config import LSTMConfig

INT8 = "int8"
SCALE_SUFFIX = "_scale"
_LEVELS = 127
_SPARE_BITS = 0xFF  # of a float32's mantissa: 24 - 8 = 16 stay, and 7 more of the whole number fit
_SMALLEST_SCALE = 2.0**-100  # below, products would leave the range in which they are exact


def quantize_matrix(
    matrix: Tensor,  # (rows, columns) floating point
) -> tuple[Tensor, Tensor]:  # int8 (rows, columns), float32 (rows,)
    """Whole numbers and scales of a matrix. Rows of zeros have the scale 1."""
    values = matrix.detach().float()
    scale = values.abs().amax(1) / _LEVELS
    scale = ((scale.view(torch.int32) + _SPARE_BITS) & ~_SPARE_BITS).view(torch.float32)
    tiny = scale < _SMALLEST_SCALE
    scale = scale.masked_fill(tiny, 1.0)
    numbers = (values / scale[:, None]).round_().clamp_(-_LEVELS, _LEVELS)
    return numbers.to(torch.int8), scale


def dequantize_matrix(
    numbers: Tensor,  # (rows, columns) int8
    scale: Tensor,  # (rows,) float32
) -> Tensor:  # (rows, columns) float32
    """The matrix that whole numbers and scales stand for; exact."""
    return numbers.float().mul_(scale[:, None])


@torch.no_grad()
def quantize(model: nn.Module) -> None:
    """Round a model's matrices to int8 values, in place, and note it in its config: `save_pretrained` then writes int8.

    The model, converted to float32, computes from here on as it will when loaded again, and can no longer be trained.

    Raises:
        ValueError: it is quantised already, or a weight is not finite.
    """
    config = model.config
    assert isinstance(config, LSTMConfig)
    if config.quantization is not None:
        raise ValueError(f"the model is quantised already ({config.quantization}); load the one that it was made from")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"{name}: expected finite weights, got infinity or NaN; the model is damaged")
    model.float()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(dequantize_matrix(*quantize_matrix(parameter)))
    config.quantization, config.dtype = INT8, "float32"
    model.eval()


def quantized_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it is stored: int8 matrices, their scales beside them, vectors in float32."""
    stored = {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and tensor.is_floating_point():
            stored[name], stored[name + SCALE_SUFFIX] = quantize_matrix(tensor)
        else:
            stored[name] = tensor.float() if tensor.is_floating_point() else tensor
    return stored


class DequantizedWeights(StoredWeights):
    """An opened int8 checkpoint, seen as one of float32 matrices; each is multiplied out when it is asked for.

    Raises:
        CheckpointError: a matrix is not int8, or its scales are missing, not float32, or of another number than its
            rows; on reading: scales that are not positive numbers.
    """

    def __init__(self, stored: StoredWeights) -> None:
        super().__init__(stored.source, {}, stored._handles, stored._stack)
        self._stored = stored
        for name, header in stored.headers.items():
            matrix = name.removesuffix(SCALE_SUFFIX)
            if matrix != name and matrix in stored.headers:
                continue
            if len(header.shape) == 2:
                self._check(name, header)
                header = TensorHeader(header.shape, torch.float32, header.file)
            self.headers[name] = header

    def _check(self, name: str, header: TensorHeader) -> None:
        if header.dtype != torch.int8:
            raise CheckpointError(
                f"{header.file}: config.json says quantization {INT8!r}, but {name!r} is stored as {header.dtype}; "
                "config and weights are of different checkpoints: save or download both again"
            )
        scale = self._stored.headers.get(name + SCALE_SUFFIX)
        if scale is None or scale.shape != header.shape[:1] or scale.dtype != torch.float32:
            found = "none" if scale is None else f"{scale.dtype} of shape {scale.shape}"
            raise CheckpointError(
                f"{header.file}: expected the scales of {name!r} as {name + SCALE_SUFFIX!r}, float32 of shape "
                f"{header.shape[:1]}, got {found}; quantise the model again"
            )

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU."""
        tensor = self._stored.tensor(name)
        if tensor.ndim != 2:
            return tensor
        scale = self._stored.tensor(name + SCALE_SUFFIX)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(
                f"{self.headers[name].file}: the scales {name + SCALE_SUFFIX!r} are not all positive numbers; the file "
                "is damaged: download or save it again"
            )
        return dequantize_matrix(tensor, scale)


def is_scale(name: str, headers: Mapping[str, TensorHeader]) -> bool:
    """Whether `name` holds the scales of another stored tensor, and so no weights of its own."""
    matrix = headers.get(name.removesuffix(SCALE_SUFFIX))
    return name.endswith(SCALE_SUFFIX) and matrix is not None and matrix.dtype == torch.int8
