"""Gated linear units: ``act(gate) * up``, separate or packed, forward and backward.

Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202; squared ReLU:
https://arxiv.org/abs/2109.08668. Everything between the load and the store is float32, so the result is rounded once.
No reductions (but for the row maximum of fp8 output): deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..errors import ArgumentError, ConfigError, UnsupportedError
from . import dispatch
from ._once import once_differentiable
from ._triton import Launch, jit, on_device, remembered, tl
from ._variants import Variant, bfloat16_minimum
from .reference.glu import ACTIVATIONS, split
from .reference.glu import glu as glu_reference
from .reference.numerics import quantize_rows
from .utils import (
    cdiv,
    fp8_dtype,
    launch_settings,
    require_floating,
    require_same_device,
    require_shape,
    single_stride,
)

# One 16-byte load of a 2-byte dtype a thread and operand.
BLOCK = 1024
NUM_WARPS = 4
# The error function keeps the multiprocessors busy; with 16 elements a thread for 8 the forward takes 98 % of the time.
FORWARD_WARPS = {"gelu": 2}


@jit
def activation_and_slope(g, alpha, ACTIVATION: tl.constexpr):
    """The activation of ``g`` and its slope there, float32."""
    if ACTIVATION == "silu":
        scaled = g if alpha is None else g * alpha
        s = tl.sigmoid(scaled)
        value = g * s
        slope = s * (1.0 + scaled * (1.0 - s))
    elif ACTIVATION == "gelu":
        s = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * s
        slope = s + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) * (g + 0.044715 g^3)
        z = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
        s = tl.sigmoid(z)
        value = g * s
        # 1 - s by its own sigmoid: the difference would cancel for large g
        slope = s + g * s * tl.sigmoid(-z) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    elif ACTIVATION == "relu":
        value = tl.where(g < 0.0, 0.0, g)
        slope = tl.where(g > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        r = tl.where(g < 0.0, 0.0, g)
        value = r * r
        slope = 2.0 * r
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        value = tl.sigmoid(g)
        slope = value * (1.0 - value)
    return value, slope


@jit
def _load_parts(gate, up, i_gate, i_up, count, BLOCK: tl.constexpr):
    """The next ``count`` of gate and up from the given offsets, float32.

    Without ``up``, ``gate`` holds both in turn, even elements gate and odd ones up, and its offset counts pairs. The
    pairs are loaded as one flat block and parted in registers, which keeps the loads 16 bytes wide.
    """
    if up is None:
        o_flat = tl.arange(0, 2 * BLOCK)
        flat = tl.load(gate + 2 * i_gate + o_flat, mask=o_flat < 2 * count, other=0.0).to(tl.float32)
        g, u = tl.split(tl.reshape(flat, (BLOCK, 2)))
    else:
        o_col = tl.arange(0, BLOCK)
        g = tl.load(gate + i_gate + o_col, mask=o_col < count, other=0.0).to(tl.float32)
        u = tl.load(up + i_up + o_col, mask=o_col < count, other=0.0).to(tl.float32)
    return g, u


@jit
def _glu_forward_kernel(
    gate,
    up,
    out,
    scale,
    width,
    blocks,
    gate_stride,
    up_stride,
    out_stride,
    limit,
    alpha,
    up_offset,
    ACTIVATION: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = act(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)``. With ``scale``, a block is a whole row.

    Strides of an interleaved gate count pairs.
    """
    i_program = tl.program_id(0)
    i_row = (i_program // blocks).to(tl.int64)  # divided in 32 bits, where a division is cheap
    i_col = (i_program % blocks).to(tl.int64) * BLOCK
    count = width - i_col
    g, u = _load_parts(gate, up, i_row * gate_stride + i_col, i_row * up_stride + i_col, count, BLOCK)
    o_col = tl.arange(0, BLOCK)
    mask = o_col < count
    if HAS_LIMIT:
        # comparisons let NaN through
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    value, _ = activation_and_slope(g, alpha, ACTIVATION)
    result = value * (u + up_offset)
    if scale is not None:
        amax = tl.max(tl.where(mask, tl.abs(result), 0.0), axis=0)
        s = tl.where(amax > 0.0, amax / FP8_MAX, 1.0)
        tl.store(scale + i_row, s)
        result = tl.clamp(result / s, -FP8_MAX, FP8_MAX)
    tl.store(out + i_row * out_stride + i_col + o_col, result.to(out.dtype.element_ty), mask=mask)


@jit
def _glu_backward_kernel(
    dout,
    gate,
    up,
    dgate,
    dup,
    out,
    width,
    blocks,
    dout_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    out_stride,
    limit,
    alpha,
    up_offset,
    ACTIVATION: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dgate = dout * (up + up_offset) * act'(gate)`` and ``dup = dout * act(gate)``, zero where the clamp held.

    Writes the forward's result again into ``out`` when there is one. ``dup`` is None with an interleaved gate.
    """
    i_program = tl.program_id(0)
    i_row = (i_program // blocks).to(tl.int64)  # divided in 32 bits, where a division is cheap
    i_col = (i_program % blocks).to(tl.int64) * BLOCK
    count = width - i_col
    g, u = _load_parts(gate, up, i_row * gate_stride + i_col, i_row * up_stride + i_col, count, BLOCK)
    o_col = tl.arange(0, BLOCK)
    mask = o_col < count
    d = tl.load(dout + i_row * dout_stride + i_col + o_col, mask=mask, other=0.0).to(tl.float32)
    d_g = d
    d_u = d
    if HAS_LIMIT:
        d_g = tl.where(g > limit, 0.0, d)
        d_u = tl.where((u > limit) | (u < -limit), 0.0, d)
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    u += up_offset
    value, slope = activation_and_slope(g, alpha, ACTIVATION)
    if out is not None:
        tl.store(out + i_row * out_stride + i_col + o_col, (value * u).to(out.dtype.element_ty), mask=mask)
    d_g = (d_g * u * slope).to(dgate.dtype.element_ty)
    d_u = (d_u * value).to(dgate.dtype.element_ty)
    i_gate = i_row * dgate_stride + i_col
    if dup is None:
        o_flat = tl.arange(0, 2 * BLOCK)
        flat = tl.reshape(tl.join(d_g, d_u), (2 * BLOCK,))
        tl.store(dgate + 2 * i_gate + o_flat, flat, mask=o_flat < 2 * count)
    else:
        tl.store(dgate + i_gate + o_col, d_g, mask=mask)
        tl.store(dup + i_row * dup_stride + i_col + o_col, d_u, mask=mask)


class GluSpec(NamedTuple):
    """What is computed: see ``glu``."""

    activation: str = "silu"
    limit: float | None = None
    alpha: float | None = None
    up_offset: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of the kernels."""
        return {
            "limit": self.limit if self.limit is not None else 0.0,
            "alpha": self.alpha,
            "up_offset": self.up_offset,
            "ACTIVATION": self.activation,
            "HAS_LIMIT": self.limit is not None,
        }


class _Grid(NamedTuple):
    """Rows × width of the elements, as one long row where no operand leaves gaps between its rows."""

    rows: int
    width: int
    blocks: int

    @classmethod
    def over(cls, rows: int, width: int, *strides: int) -> _Grid:
        if all(stride == width for stride in strides):
            rows, width = min(rows, 1), rows * width
        return cls(rows, width, cdiv(width, BLOCK))


def _operands(
    gate: torch.Tensor, up: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, int, int, int, int]:
    """Gate and up with contiguous rows; rows, width, and the two row strides (of pairs when interleaved)."""
    gate, rows, gate_stride = single_stride(gate)
    if up is not None:
        up, _, up_stride = single_stride(up)
        return gate, up, rows, gate.shape[-1], gate_stride, up_stride
    if gate_stride % 2:
        gate, rows, gate_stride = single_stride(gate.contiguous())
    return gate, None, rows, gate.shape[-1] // 2, gate_stride // 2, gate_stride // 2


def _buffer(like: torch.Tensor, width: int, out: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """The output tensor and its row stride; a caller's buffer is used as it is."""
    if out is None:
        return torch.empty((*like.shape[:-1], width), dtype=like.dtype, device=like.device), width
    tensor, _, stride = single_stride(out)
    if tensor.data_ptr() != out.data_ptr():
        raise ConfigError(
            f"the output buffer's strides {tuple(out.stride())} cannot be written in place",
            where="argument out of glu",
            hint="the last dimension must be contiguous and the leading ones must fold into one",
        )
    return tensor, stride


@remembered
def _forward_launch(rows: int, width: int, gate_stride: int, up_stride: int, out_stride: int, spec: GluSpec) -> Launch:
    grid = _Grid.over(rows, width, gate_stride, up_stride, out_stride)
    return Launch(
        _glu_forward_kernel,
        (grid.rows * grid.blocks,),
        ("gate", "up", "out", "scale"),
        width=grid.width,
        blocks=grid.blocks,
        gate_stride=gate_stride,
        up_stride=up_stride,
        out_stride=out_stride,
        **spec.arguments(),
        FP8_MAX=0.0,
        BLOCK=BLOCK,
        num_warps=FORWARD_WARPS.get(spec.activation, NUM_WARPS),
    )


@remembered
def _backward_launch(
    rows: int,
    width: int,
    dout_stride: int,
    gate_stride: int,
    up_stride: int,
    dgate_stride: int,
    dup_stride: int,
    out_stride: int,
    spec: GluSpec,
) -> Launch:
    strides = {
        "dout_stride": dout_stride,
        "gate_stride": gate_stride,
        "up_stride": up_stride,
        "dgate_stride": dgate_stride,
        "dup_stride": dup_stride,
        "out_stride": out_stride,
    }
    grid = _Grid.over(rows, width, *strides.values())
    return Launch(
        _glu_backward_kernel,
        (grid.rows * grid.blocks,),
        ("dout", "gate", "up", "dgate", "dup", "out"),
        width=grid.width,
        blocks=grid.blocks,
        **strides,
        **spec.arguments(),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def glu_forward(
    gate: torch.Tensor, up: torch.Tensor | None, spec: GluSpec, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Launch the forward kernel. ``up=None`` means that ``gate`` is ``[..., 2 I]`` with gate and up in turn."""
    gate, up, rows, width, gate_stride, up_stride = _operands(gate, up)
    result, out_stride = _buffer(gate, width, out)
    if rows * width:
        _forward_launch(rows, width, gate_stride, up_stride, out_stride, spec)(gate, up, result, None)
    return result


def glu_forward_fp8(
    gate: torch.Tensor, up: torch.Tensor | None, spec: GluSpec, fp8: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel with row-wise fp8 output; returns values ``[..., I]`` and scales ``[..., 1]``."""
    gate, up, rows, width, gate_stride, up_stride = _operands(gate, up)
    settings = launch_settings(width, where="glu_fp8")
    values = torch.empty((*gate.shape[:-1], width), dtype=fp8, device=gate.device)
    scales = torch.empty((*gate.shape[:-1], 1), dtype=torch.float32, device=gate.device)
    if rows * width:
        with on_device(gate):
            _glu_forward_kernel[(rows,)](
                gate=gate,
                up=up,
                out=values,
                scale=scales,
                width=width,
                blocks=1,
                gate_stride=gate_stride,
                up_stride=up_stride,
                out_stride=width,
                **spec.arguments(),
                FP8_MAX=torch.finfo(fp8).max,
                BLOCK=settings.block,
                num_warps=settings.num_warps,
            )
    return values, scales


def glu_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    spec: GluSpec,
    *,
    dgate: torch.Tensor | None = None,
    dup: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the backward kernel.

    Args:
        dout: Gradient of the output ``[..., I]``.
        gate: As in the forward; ``[..., 2 I]`` with ``up=None`` when interleaved.
        up: As in the forward.
        spec: As in the forward.
        dgate: Buffer for the gradient of ``gate``, any row stride; allocated when None.
        dup: Buffer for the gradient of ``up``.
        out: Buffer that receives the forward's output again, for a caller that did not keep it.

    Returns:
        Gradients of gate and up (None when interleaved).
    """
    gate, up, rows, width, gate_stride, up_stride = _operands(gate, up)
    dout, _, dout_stride = single_stride(dout)
    dgate, dgate_stride = _buffer(gate, gate.shape[-1], dgate)
    dup_stride = out_stride = width
    if up is None:
        dgate_stride //= 2
    else:
        dup, dup_stride = _buffer(up, width, dup)
    if out is not None:
        out, out_stride = _buffer(gate, width, out)
    if rows * width:
        strides = (dout_stride, gate_stride, up_stride, dgate_stride, dup_stride, out_stride)
        _backward_launch(rows, width, *strides, spec)(dout, gate, up, dgate, dup, out)
    return dgate, dup


# A caller's buffer travels in a tuple: autograd sees plain memory, and the result is a new tensor over it.


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate, up, spec: GluSpec, out: tuple[torch.Tensor | None]):  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        ctx.spec = spec
        return glu_forward(gate, up, spec, *out).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        dgate, dup = glu_backward(dout, gate, up, ctx.spec)
        return dgate, dup, None, None


class _PackedGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up, spec: GluSpec, interleaved: bool, out: tuple[torch.Tensor | None]):  # type: ignore[override]
        ctx.save_for_backward(gate_up)
        ctx.spec, ctx.interleaved = spec, interleaved
        gate, up = (gate_up, None) if interleaved else split(gate_up, interleaved)
        return glu_forward(gate, up, spec, *out).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        if ctx.interleaved:
            glu_backward(dout, gate_up, None, ctx.spec, dgate=gradient)
        else:
            dgate, dup = split(gradient, interleaved=False)
            glu_backward(dout, *split(gate_up, interleaved=False), ctx.spec, dgate=dgate, dup=dup)
        return gradient, None, None, None


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result, out: tuple[torch.Tensor]):  # type: ignore[override]
        return out[0].copy_(result).detach()

    @staticmethod
    def backward(ctx: Any, gradient):  # type: ignore[override]
        return gradient, None


def check_spec(op: str, spec: GluSpec) -> None:
    """Raise a ``ConfigError`` unless the options mean something."""
    if spec.activation not in ACTIVATIONS:
        raise ConfigError(
            f"unknown activation {spec.activation!r}",
            where=f"argument activation of {op}",
            hint=f"use one of {', '.join(ACTIVATIONS)}",
        )
    if spec.alpha is not None and spec.activation != "silu":
        raise ConfigError(
            f"alpha scales the sigmoid of silu and means nothing for {spec.activation}",
            where=f"argument alpha={spec.alpha} of {op}",
        )
    if spec.limit is not None and not spec.limit > 0:
        raise ConfigError(f"the limit must be positive, not {spec.limit}", where=f"argument limit of {op}")


def _check(op: str, spec: GluSpec, shape: tuple[int, ...], out: torch.Tensor | None, **inputs: torch.Tensor) -> None:
    require_floating(op, **inputs)
    require_same_device(op, out=out, **inputs)
    check_spec(op, spec)
    dtypes = {name: tensor.dtype for name, tensor in inputs.items()}
    if out is not None:
        require_shape(op, "out", out, shape)
        dtypes["out"] = out.dtype
    if len(set(dtypes.values())) > 1:
        raise ArgumentError(f"{op} needs one dtype and got {dtypes}", where=f"arguments {', '.join(dtypes)} of {op}")


def glu(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    limit: float | None = None,
    alpha: float | None = None,
    up_offset: float = 0.0,
    out: torch.Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Gated linear unit ``act(g) * (u + up_offset)``, computed in float32 and rounded once.

    ``g = min(gate, limit)`` and ``u = clamp(up, -limit, limit)``. gpt-oss is ``glu(gate, up, "silu", limit=7.0,
    alpha=1.702, up_offset=1.0)``.

    Args:
        gate: ``[..., I]``, float32, float16 or bfloat16 (also float64 on the reference). Rows with a contiguous last
            dimension and one row stride (such as halves of a packed tensor) are read in place, others are copied.
        up: ``[..., I]`` of the same dtype.
        activation: ``silu`` (SwiGLU), ``gelu`` (exact), ``gelu_tanh``, ``relu``, ``relu2`` or ``sigmoid``.
        limit: Clamp, or None for none. No gradient flows where it holds.
        alpha: Factor inside silu's sigmoid, ``g * sigmoid(alpha * g)``; None means 1.
        up_offset: Added to ``u``.
        out: Buffer ``[..., I]`` for the result; its rows may lie apart. Gradients flow through the returned tensor,
            which lies in the buffer, not through the buffer itself.
        backend: See ``dispatch.resolve``.

    Returns:
        ``[..., I]`` in the dtype of the inputs; it lies in ``out`` when given.

    Raises:
        ConfigError: A shape, stride of ``out`` or option is wrong.
        ArgumentError: Dtypes or devices differ.

    Deterministic. Saves gate and up, and overwrites neither.
    """
    spec = GluSpec(activation, limit, alpha, up_offset)
    _check("glu", spec, tuple(gate.shape), out, gate=gate, up=up)
    require_shape("glu", "up", up, tuple(gate.shape))
    if dispatch.resolve("glu", gate, backend) == "triton":
        return _GLU.apply(gate, up, spec, (out,))
    result = glu_reference(gate, up, activation, limit=limit, alpha=alpha, up_offset=up_offset)
    return result if out is None else _Into.apply(result, (out,))


def packed_glu(
    gate_up: torch.Tensor,
    activation: str = "silu",
    *,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
    up_offset: float = 0.0,
    out: torch.Tensor | None = None,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """``glu`` of gate and up in one tensor, whose gradient is written as one tensor too.

    Args:
        gate_up: ``[..., 2 I]``: gate then up, or, when ``interleaved`` (gpt-oss), gate in the even and up in the odd
            columns.
        activation: As in ``glu``, like the remaining arguments.
        interleaved: Layout of ``gate_up``.
        limit: As in ``glu``.
        alpha: As in ``glu``.
        up_offset: As in ``glu``.
        out: As in ``glu``.
        backend: See ``dispatch.resolve``.

    Returns:
        ``[..., I]``.

    Raises:
        ConfigError: The last dimension is odd, or as in ``glu``.
    """
    spec = GluSpec(activation, limit, alpha, up_offset)
    if gate_up.shape[-1] % 2:
        raise ConfigError(
            f"packed_glu needs an even last dimension and got {gate_up.shape[-1]}",
            where="argument gate_up of packed_glu",
        )
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _check("packed_glu", spec, shape, out, gate_up=gate_up)
    if dispatch.resolve("packed_glu", gate_up, backend) == "triton":
        return _PackedGLU.apply(gate_up, spec, interleaved, (out,))
    result = glu_reference(*split(gate_up, interleaved), activation, limit=limit, alpha=alpha, up_offset=up_offset)
    return result if out is None else _Into.apply(result, (out,))


def glu_fp8(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    limit: float | None = None,
    alpha: float | None = None,
    up_offset: float = 0.0,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``glu`` whose float32 result is quantised row by row to fp8, for a following fp8 matrix product.

    Arguments as in ``glu``; ``I <= 65,536``. It has no autograd of its own: call it where gradients are off, as inside
    a hand-written ``autograd.Function``, with ``glu_backward`` there.

    Returns:
        Values ``[..., I]`` (e4m3fn, or e4m3fnuz on AMD's gfx94x) and scales ``[..., 1]`` float32; their product is the
        result.

    Raises:
        UnsupportedError: An input requires a gradient while gradients are recorded, or a row is too wide.
    """
    spec = GluSpec(activation, limit, alpha, up_offset)
    _check("glu_fp8", spec, tuple(gate.shape), None, gate=gate, up=up)
    require_shape("glu_fp8", "up", up, tuple(gate.shape))
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        raise UnsupportedError(
            "glu_fp8 is not differentiable by autograd", hint="call it under torch.no_grad() with glu_backward"
        )
    fp8 = fp8_dtype(gate.device)
    if dispatch.resolve("glu_fp8", gate, backend, fp8=True) == "triton":
        return glu_forward_fp8(gate, up, spec, fp8)
    wide = glu_reference(gate.float(), up.float(), activation, limit=limit, alpha=alpha, up_offset=up_offset)
    return quantize_rows(wide, fp8)


def variants() -> Iterator[Variant]:
    """Forms of the kernels for ahead-of-time compilation."""
    floats = dict.fromkeys(("limit", "up_offset"), "fp32")
    forward_integers = dict.fromkeys(("width", "blocks", "gate_stride", "up_stride", "out_stride"), "i32")
    backward_integers = forward_integers | dict.fromkeys(("dout_stride", "dgate_stride", "dup_stride"), "i32")
    plain = {"alpha": None, "HAS_LIMIT": False, "BLOCK": BLOCK}
    limited = {"HAS_LIMIT": True, "BLOCK": BLOCK}
    for dtype in ("fp16", "bf16", "fp32"):
        p, minimum = f"*{dtype}", bfloat16_minimum(dtype)
        for activation in ACTIVATIONS:
            representative = activation == "gelu" and dtype == "bf16"
            yield Variant(
                f"glu_forward-{dtype}-{activation}",
                _glu_forward_kernel,
                {"gate": p, "up": p, "out": p, **forward_integers, **floats},
                {"scale": None, "ACTIVATION": activation, "FP8_MAX": 0.0, **plain},
                FORWARD_WARPS.get(activation, NUM_WARPS),
                minimum=minimum,
                representative=representative,
            )
            yield Variant(
                f"glu_backward-{dtype}-{activation}",
                _glu_backward_kernel,
                {"dout": p, "gate": p, "up": p, "dgate": p, "dup": p, "out": p, **backward_integers, **floats},
                {"ACTIVATION": activation, **plain},
                NUM_WARPS,
                minimum=minimum,
                representative=representative,
            )
        yield Variant(
            f"glu_forward-{dtype}-interleaved-limit",
            _glu_forward_kernel,
            {"gate": p, "out": p, **forward_integers, **floats, "alpha": "fp32"},
            {"up": None, "scale": None, "ACTIVATION": "silu", "FP8_MAX": 0.0, **limited},
            NUM_WARPS,
            minimum=minimum,
        )
        yield Variant(
            f"glu_backward-{dtype}-interleaved-limit",
            _glu_backward_kernel,
            {"dout": p, "gate": p, "dgate": p, **backward_integers, **floats, "alpha": "fp32"},
            {"up": None, "dup": None, "out": None, "ACTIVATION": "silu", **limited},
            NUM_WARPS,
            minimum=minimum,
            representative=dtype == "bf16",
        )
    for fp8, least, amd, largest in (("fp8e4nv", 89, (), 448.0), ("fp8e4b8", None, ("gfx942",), 240.0)):
        settings = launch_settings(14336, lanes=64 if amd else 32)
        yield Variant(
            f"glu_forward-bf16-{fp8}",
            _glu_forward_kernel,
            {"gate": "*bf16", "up": "*bf16", "out": f"*{fp8}", "scale": "*fp32", **forward_integers, **floats},
            {"alpha": None, "ACTIVATION": "silu", "HAS_LIMIT": False, "FP8_MAX": largest, "BLOCK": settings.block},
            settings.num_warps,
            minimum=least,
            amd=amd,
        )
