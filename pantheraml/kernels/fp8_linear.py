"""Products with frozen fp8 weights on fp8 matrix units, forward and for the gradient of the input.

``y = x @ W.T`` and ``dx = dy @ W`` with ``W ≈ values * scales``; ``x`` and ``dy`` are quantised on the fly.

*Row-wise* (a scale a row of W [O, I]): the rows of x get a scale each, and the product both. In the backward W's scales
lie on the dimension that is summed over, so they go into dy, column by column, before dy's rows are quantised.

*Tiles* (a scale a 128 x 128 tile): x and dy get a scale for each 128 elements of a row. Matrix units that take such
scales exist on Hopper; elsewhere the weight is dequantised and multiplied in 16 bits: more accurate, and slower.

*4-bit storage*: an nf4 weight becomes row-wise fp8 on its way to the product, either way round, under row scales
computed once.

Matrix units contract along the contiguous dimension of both factors, so ``dy @ W`` needs W's bytes transposed. They are
transposed for each product into memory that is free again after it: on an H100 that adds about a twelfth to the
product of an 8B model's MLP, while a kept copy would double the memory of the weights, which buys more when it holds
activations that then need not be computed again. A copy is used where one is kept (``keep_transposed``). The
buffers come from torch's caching allocator, which hands the same memory out again at every layer.

Projections that share their input share its quantisation; in the backward their gradients are quantised side by side
under one scale a row, which makes the sum over projections part of one product, in float32. fp8 keeps its three bits
over fifteen powers of two, so a common scale costs nothing unless one gradient is thousands of times the other.

Error: e4m3 rounds to within 2**-4 of each element, so with both factors rounded an output is off by at most
``(2**-3 + 2**-8) * sum |x| |w|``, and by 3.7 % in the root mean square for Gaussian factors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..device import get_device
from ..errors import ArgumentError, ConfigError, UnsupportedError
from . import dispatch
from .fp8 import MATMUL_MULTIPLE, Fp8Matrix, fp8_matmul, fp8_quantize_blocks, fp8_quantize_rows, fp8_transpose
from .fp8_operands import GROUP, MAX_PARTS, dequantize, nf4_to_fp8, quantize_groups, quantize_joined_rows
from .nf4 import nf4_dequantize
from .reference import fp8_linear as reference
from .reference.nf4 import Quantized4Bit
from .utils import cdiv, fp8_dtype

# The libraries want whole groups of four rows and of four tiles along the sum when scales belong to groups and tiles.
GROUP_MULTIPLE = 4


def _check_widths(shape: Sequence[int], where: str) -> None:
    if len(shape) != 2 or any(size % MATMUL_MULTIPLE for size in shape):
        raise UnsupportedError(
            f"a weight {list(shape)} cannot be an fp8 factor",
            where=where,
            why=f"fp8 matrix units take matrices whose sides are multiples of {MATMUL_MULTIPLE}",
            hint="keep it in 16 bits",
        )


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A frozen weight in fp8: ``weight ≈ values * scales``.

    Attributes:
        values: [O, I] fp8, contiguous.
        scales: float32, [O, 1] (row-wise) or [ceil(O / 128), ceil(I / 128)] (tiles).
        dtype: Dtype that it stands for.
        transposed: A kept copy [I, O] of the values, or None.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype = torch.bfloat16
    transposed: torch.Tensor | None = None

    def __post_init__(self) -> None:
        where = "Fp8Weight"
        _check_widths(self.values.shape, where)
        rows, width = self.values.shape
        if self.values.dtype not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz) or not self.values.is_contiguous():
            raise ArgumentError(f"values must be contiguous e4m3, not {self.values.dtype}", where=where)
        if self.scales.dtype != torch.float32 or not self.scales.is_contiguous():
            raise ArgumentError(f"scales must be contiguous float32, not {self.scales.dtype}", where=where)
        if tuple(self.scales.shape) not in ((rows, 1), (cdiv(rows, GROUP), cdiv(width, GROUP))):
            raise ConfigError(f"scales {list(self.scales.shape)} do not fit {[rows, width]}", where=where)
        if self.transposed is not None and tuple(self.transposed.shape) != (width, rows):
            raise ConfigError(f"the transposed copy of {[rows, width]} is {list(self.transposed.shape)}", where=where)

    @classmethod
    def quantize(
        cls,
        weight: torch.Tensor,
        *,
        block: bool = False,
        keep_transposed: bool = False,
        backend: dispatch.Backend = "auto",
    ) -> Fp8Weight:
        """Quantise a dense weight.

        Args:
            weight: [O, I]; both multiples of 16.
            block: A scale a 128 x 128 tile instead of a row. Default False.
            keep_transposed: Keep a transposed copy. Default False; see the top of this file.
            backend: See ``dispatch.resolve``.

        Raises:
            UnsupportedError: O or I is no multiple of 16.
        """
        _check_widths(weight.shape, "Fp8Weight.quantize")
        quantize = fp8_quantize_blocks if block else fp8_quantize_rows
        matrix = quantize(weight, transposed=keep_transposed, backend=backend)
        return cls(matrix.values, matrix.scales, weight.dtype, matrix.transposed)

    @property
    def shape(self) -> torch.Size:
        """``(out_features, in_features)``."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def row_wise(self) -> bool:
        """Whether scales belong to rows."""
        return self.scales.shape == (self.values.shape[0], 1)

    def dense(self, dtype: torch.dtype, backend: dispatch.Backend = "auto") -> torch.Tensor:
        """The weight in ``dtype``."""
        return dequantize(self.values, self.scales, dtype, backend=backend)

    def forward_values(self, backend: dispatch.Backend = "auto") -> torch.Tensor:
        """fp8 values [O, I]."""
        return self.values

    def write_transposed(self, out: torch.Tensor, backend: dispatch.Backend = "auto") -> None:
        """Write fp8 values into ``out`` [I, O], whose rows may be apart."""
        fp8_transpose(self.values, out=out, backend=backend)


@dataclass(frozen=True, slots=True, eq=False)
class Nf4Fp8Weight:
    """A frozen weight stored in 4 bits and multiplied in fp8, with row-wise scales.

    Attributes:
        stored: [O, I]; I is whole blocks.
        scales: [O, 1] float32, of the fp8 values.
    """

    stored: Quantized4Bit
    scales: torch.Tensor

    def __post_init__(self) -> None:
        _check_widths(self.stored.shape, "Nf4Fp8Weight")
        if tuple(self.scales.shape) != (self.stored.shape[0], 1) or self.scales.dtype != torch.float32:
            raise ConfigError(f"scales {list(self.scales.shape)} do not fit {self.stored.shape}", where="Nf4Fp8Weight")

    @classmethod
    def of(cls, stored: Quantized4Bit, *, backend: dispatch.Backend = "auto") -> Nf4Fp8Weight:
        """Find the row scales of a 4-bit weight.

        Args:
            stored: [O, I]; O and I are multiples of 16, I of the block size.
            backend: See ``dispatch.resolve``.

        Raises:
            UnsupportedError: The shape does not fit.
        """
        _check_widths(stored.shape, "Nf4Fp8Weight.of")
        if stored.shape[1] % stored.blocksize:
            raise UnsupportedError(
                f"rows of {stored.shape[1]} elements are not whole blocks of {stored.blocksize}",
                where="Nf4Fp8Weight.of",
                hint="multiply it in 16 bits",
            )
        dense = nf4_dequantize(stored, dtype=torch.float32, backend=backend)
        return cls(stored, fp8_quantize_rows(dense, backend=backend).scales)

    @property
    def shape(self) -> torch.Size:
        """``(out_features, in_features)``."""
        return self.stored.shape

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.stored.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that it stands for."""
        return self.stored.dtype

    @property
    def row_wise(self) -> bool:
        """Whether scales belong to rows: always."""
        return True

    @property
    def transposed(self) -> None:
        """A kept copy of the transposed values: never."""
        return None

    def dense(self, dtype: torch.dtype, backend: dispatch.Backend = "auto") -> torch.Tensor:
        """The weight in ``dtype``, as the 4 bits have it."""
        return nf4_dequantize(self.stored, dtype=dtype, backend=backend)

    def forward_values(self, backend: dispatch.Backend = "auto") -> torch.Tensor:
        """fp8 values [O, I]."""
        return nf4_to_fp8(self.stored, self.scales, backend=backend)

    def write_transposed(self, out: torch.Tensor, backend: dispatch.Backend = "auto") -> None:
        """Write fp8 values into ``out`` [I, O], whose rows may be apart."""
        nf4_to_fp8(self.stored, self.scales, transposed=True, out=out, backend=backend)


Fp8Base = Fp8Weight | Nf4Fp8Weight


class Fp8Input:
    """An input of several products, quantised at most once in each form.

    Args:
        x: [T, I].
        rows: Its row-wise form, where a kernel before has made it already. Default None.
    """

    def __init__(self, x: torch.Tensor, rows: Fp8Matrix | None = None) -> None:
        self.x = x
        self._rows = rows
        self._groups: tuple[torch.Tensor, torch.Tensor] | None = None

    def rows(self, backend: dispatch.Backend) -> Fp8Matrix:
        """The form with a scale a row."""
        if self._rows is None:
            self._rows = fp8_quantize_rows(self.x, backend=backend)
        return self._rows

    def groups(self, backend: dispatch.Backend) -> tuple[torch.Tensor, torch.Tensor]:
        """The form with a scale for each 128 elements of a row, rows padded to a multiple of four."""
        if self._groups is None:
            self._groups = quantize_groups([self.x], rows=_padded(self.x.shape[0]), backend=backend)
        return self._groups


def _padded(rows: int) -> int:
    return cdiv(rows, GROUP_MULTIPLE) * GROUP_MULTIPLE


def _eager(x: torch.Tensor, backend: dispatch.Backend) -> bool:
    """Whether products are those of the specification: by request, and where there are no matrix units at all."""
    return x.device.type == "cpu" or dispatch.resolve("fp8_matmul", x, backend) == "reference"


def _row_matmul(
    x: Fp8Matrix, weight: Fp8Matrix, dtype: torch.dtype, *, eager: bool, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return fp8_matmul(x, weight, bias=bias, out_dtype=dtype, backend="reference" if eager else "auto")


def _tile_matmul(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """``x @ weight.T`` in bfloat16 of x scaled in groups and a weight scaled in tiles, by the matrix units."""
    from torch.nn.functional import ScalingType, scaled_mm

    padded = torch.nn.functional.pad(weight_scales, (0, -weight_scales.shape[1] % GROUP_MULTIPLE))
    return scaled_mm(
        values,
        weight.t(),
        scales.t(),
        ScalingType.BlockWise1x128,
        padded.t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


@functools.cache
def tiles_supported(device: torch.device) -> bool:
    """Whether the matrix units of a GPU take scales of groups and tiles: tried once on a small product.

    What decides is the chip, the CUDA library and torch's own checks together; only a product tells.
    """
    if device.type != "cuda" or not get_device().float8 or not hasattr(torch.nn.functional, "scaled_mm"):
        return False
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 640, generator=generator).to(device, torch.bfloat16) for rows in (8, 256))
    weight = fp8_quantize_blocks(w)
    values, scales = quantize_groups([x])
    try:
        ours = _tile_matmul(values, scales, weight.values, weight.scales)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    expected = reference.group_matmul(values, scales, weight.values, weight.scales, torch.float32, GROUP)
    # bfloat16's rounding and the order of the sum; a misread scale is off by far more.
    return bool((ours.float() - expected).norm() <= 0.02 * expected.norm())


def _tiled(weight: Fp8Weight, device: torch.device, dtype: torch.dtype, eager: bool) -> bool:
    """Whether a tiled weight is multiplied in fp8 here."""
    whole = not any(size % GROUP for size in weight.shape)
    return eager or (whole and dtype == torch.bfloat16 and tiles_supported(device))


def fp8_product(
    x: Fp8Input, weight: Fp8Base, *, bias: torch.Tensor | None = None, backend: dispatch.Backend = "auto"
) -> torch.Tensor:
    """``x @ weight.T + bias`` in the dtype of x, deterministic. No gradient of its own; see ``lora_linear``.

    Args:
        x: The input [T, I]. On a GPU bfloat16 (what row-wise scaled products give).
        weight: [O, I].
        bias: [O] in the dtype of x, or None (default).
        backend: Picks the kernels that quantise; ``"reference"`` also multiplies in float32. On a CPU products are
            always the specification's.

    Returns:
        [T, O].

    Raises:
        UnsupportedError: The device has no fp8 matrix units, or they do not give this dtype.
    """
    dtype, eager = x.x.dtype, _eager(x.x, backend)
    if x.x.shape[0] == 0:
        return x.x.new_zeros((0, weight.shape[0]))
    if isinstance(weight, Nf4Fp8Weight) or weight.row_wise:
        matrix = Fp8Matrix(weight.forward_values(backend), weight.scales)
        return _row_matmul(x.rows(backend), matrix, dtype, eager=eager, bias=bias)
    if not _tiled(weight, x.x.device, dtype, eager):
        return torch.nn.functional.linear(x.x, weight.dense(dtype, backend), bias)
    values, scales = x.groups(backend)
    if eager:
        y = reference.group_matmul(values, scales, weight.values, weight.scales, dtype, GROUP)
    else:
        y = _tile_matmul(values, scales, weight.values, weight.scales)
    y = y[: x.x.shape[0]]
    return y if bias is None else y.add_(bias)


@functools.lru_cache(maxsize=64)
def _ones(size: int, device: torch.device) -> torch.Tensor:
    return torch.ones((size, 1), dtype=torch.float32, device=device)


def _transposed(weights: Sequence[Fp8Base], backend: dispatch.Backend) -> torch.Tensor:
    """Transposed values of weights side by side, [I, sum of O]."""
    if len(weights) == 1 and weights[0].transposed is not None:
        return weights[0].transposed
    device = weights[0].device
    shape = (weights[0].shape[1], sum(weight.shape[0] for weight in weights))
    out = torch.empty(shape, dtype=fp8_dtype(device), device=device)
    start = 0
    for weight in weights:
        stop = start + weight.shape[0]
        weight.write_transposed(out[:, start:stop], backend)
        start = stop
    return out


def _row_gradient(grads: Sequence[torch.Tensor], weights: Sequence[Fp8Base], backend: dispatch.Backend) -> torch.Tensor:
    factors = [weight.scales.view(-1) for weight in weights]
    values, scales = quantize_joined_rows(grads, factors, backend=backend)
    transposed = _transposed(weights, backend)
    factor = Fp8Matrix(transposed, _ones(transposed.shape[0], transposed.device))
    return _row_matmul(Fp8Matrix(values, scales), factor, grads[0].dtype, eager=_eager(grads[0], backend))


def _tile_gradient(
    grads: Sequence[torch.Tensor], weights: Sequence[Fp8Base], backend: dispatch.Backend
) -> torch.Tensor:
    rows = grads[0].shape[0]
    values, scales = quantize_groups(grads, rows=_padded(rows), backend=backend)
    factors = torch.cat([weight.scales.t() for weight in weights], dim=1).contiguous()
    transposed = _transposed(weights, backend)
    if _eager(grads[0], backend):
        grad = reference.group_matmul(values, scales, transposed, factors, grads[0].dtype, GROUP)
    else:
        grad = _tile_matmul(values, scales, transposed, factors)
    return grad[:rows]


def fp8_input_gradient(
    grads: Sequence[torch.Tensor], weights: Sequence[Fp8Base], *, backend: dispatch.Backend = "auto"
) -> torch.Tensor:
    """``sum of grad @ weight`` over weights that share their input, in the dtype of the gradients. Deterministic.

    Args:
        grads: [T, O_i] each, of one dtype.
        weights: [O_i, I] each.
        backend: As in ``fp8_product``.

    Returns:
        [T, I], a tensor of its own.

    Raises:
        UnsupportedError: As in ``fp8_product``.
    """
    device, dtype = grads[0].device, grads[0].dtype
    if grads[0].shape[0] == 0:
        return grads[0].new_zeros((0, weights[0].shape[1]))
    eager = _eager(grads[0], backend)
    joined: dict[str, list[int]] = {"rows": [], "tiles": []}
    alone: list[tuple[str, list[int]]] = []
    for i, weight in enumerate(weights):
        if isinstance(weight, Nf4Fp8Weight) or weight.row_wise:
            kind = "rows"
        else:
            kind = "tiles" if _tiled(weight, device, dtype, eager) else "dense"
        # A kept copy is read where it lies; tiles that overhang cannot be joined.
        if kind == "dense" or weight.transposed is not None or (kind == "tiles" and weight.shape[0] % GROUP):
            alone.append((kind, [i]))
        else:
            joined[kind].append(i)
    tasks = [
        (kind, members[start : start + MAX_PARTS])
        for kind, members in joined.items()
        for start in range(0, len(members), MAX_PARTS)
    ]
    total: torch.Tensor | None = None
    for kind, members in (*tasks, *alone):
        some_grads, some = [grads[i] for i in members], [weights[i] for i in members]
        if kind == "dense":
            part = some_grads[0] @ some[0].dense(dtype, backend)
        else:
            part = (_row_gradient if kind == "rows" else _tile_gradient)(some_grads, some, backend)
        total = part if total is None else total.add_(part)
    if total is None:
        raise ConfigError("no gradient was given", where="fp8_input_gradient")
    return total
