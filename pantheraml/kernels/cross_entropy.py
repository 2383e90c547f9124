"""Cross entropy over logits of any vocabulary, one program a row.

The forward reads a row once (online softmax in blocks). Where the gradient is wanted at once, the same program goes
over its row a second time, most of which is still in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from ..errors import ArgumentError, ConfigError, ConflictError, UnsupportedError
from . import dispatch
from ._once import once_differentiable
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .reference import cross_entropy as reference
from .reference.rows import RowOptions, RowResult
from .utils import cdiv, next_power_of_2

# Share of the copy bandwidth on an H100, 4,096 rows of 128,256 bf16 logits, by block and warps.
# Losses alone: 8,192 with 8 warps 91 %, with 16 warps 80 %, 16,384 with 32 warps 70 %.
# Losses and gradient in one program, counting one read and one write: 8,192 with 16 warps 68 %, 16,384 with 32 warps
# 66 %; going forwards the second time, 61 % and 65 %.
# Gradient alone: 94 % for all but the extremes.
LOSS_BLOCK, LOSS_ELEMENTS_A_WARP = 8192, 1024
FUSED_BLOCK, FUSED_ELEMENTS_A_WARP = 8192, 512
GRADIENT_BLOCK, GRADIENT_ELEMENTS_A_WARP = 4096, 512
MAX_WARPS_HIP = 16
# No row has this label where the caller has already taken the ignored rows out.
NO_LABEL = -(2**31)


@jit
def _tanh(x):
    # The quotient has an absolute error of one float32 ulp at 1; near zero a series is relatively accurate too.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(square < 0.0625, series, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@jit
def _logits(p_row, o_block, m_block, inner, outer, CAP: tl.constexpr):
    """One block of a row after scale, cap and temperature; and tanh of it when there is a cap."""
    b_raw = tl.load(p_row + o_block, mask=m_block, other=0.0).to(tl.float32)
    b_tanh = b_raw
    if CAP:
        b_tanh = _tanh(b_raw * inner)
        b_z = b_tanh * outer
    else:
        b_z = b_raw * inner
    return b_z, b_tanh


@jit
def _gradient(b_z, b_tanh, o_block, lse, label, factor, slope, smoothing, inner, outer, vocabulary, CAP: tl.constexpr):
    """D loss / d raw logits of one block: ``factor`` is the row's coefficient, ``slope`` is 1 + 2 z_loss lse."""
    b_grad = slope * tl.exp(b_z - lse) - smoothing / vocabulary
    b_grad = tl.where(o_block == label, b_grad - (1.0 - smoothing), b_grad)
    if CAP:
        b_grad *= outer * (1.0 - b_tanh * b_tanh)
    return b_grad * inner * factor


@jit
def cross_entropy_rows_kernel(
    p_logits,
    p_gradient,
    p_labels,
    p_coefficients,
    p_loss,
    p_lse,
    p_entropy,
    p_top1,
    logits_stride,
    gradient_stride,
    vocabulary,
    ignore_index,
    inner,
    outer,
    smoothing,
    z_loss,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses of rows, and with ``p_gradient`` the gradient of each row times its coefficient (in place or apart)."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * logits_stride
    label = tl.load(p_labels + i_row)
    o_lane = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(p_loss + i_row, 0.0)
        tl.store(p_lse + i_row, 0.0)
        if p_entropy is not None:
            tl.store(p_entropy + i_row, 0.0)
        if p_top1 is not None:
            tl.store(p_top1 + i_row, 0)
        if p_gradient is not None:
            b_zero = tl.zeros((BLOCK,), dtype=p_gradient.dtype.element_ty)
            for start in range(0, vocabulary, BLOCK):
                o_block = start + o_lane
                tl.store(p_gradient + i_row * gradient_stride + o_block, b_zero, mask=o_block < vocabulary)
        return

    row_max = -float("inf")
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    b_total = tl.zeros((BLOCK,), dtype=tl.float32)
    b_dot = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):
        o_block = start + o_lane
        m_block = o_block < vocabulary
        b_z, _ = _logits(p_row, o_block, m_block, inner, outer, CAP)
        if SMOOTH:
            b_total += tl.where(m_block, b_z, 0.0)
        b_z = tl.where(m_block, b_z, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(b_z, axis=0))
        # Rows may begin with -inf (a masked vocabulary), and inf - inf is NaN.
        safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        fade = tl.exp(row_max - safe_max)
        b_exp = tl.exp(b_z - safe_max)
        b_sum = b_sum * fade + b_exp
        if p_entropy is not None:
            b_dot = b_dot * fade + tl.where(b_exp > 0.0, b_exp * b_z, 0.0)
        row_max = new_max
    total = tl.sum(b_sum, axis=0)
    lse = tl.log(total) + row_max

    inside = (label >= 0) & (label < vocabulary)
    raw_label = tl.load(p_row + label, mask=inside, other=float("nan")).to(tl.float32)
    z_label = _tanh(raw_label * inner) * outer if CAP else raw_label * inner
    loss = lse - z_label
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + smoothing * (lse - tl.sum(b_total, axis=0) / vocabulary)
    loss += z_loss * lse * lse
    tl.store(p_loss + i_row, loss)
    tl.store(p_lse + i_row, lse)
    if p_entropy is not None:
        tl.store(p_entropy + i_row, lse - tl.sum(b_dot, axis=0) / total)
    if p_top1 is not None:
        tl.store(p_top1 + i_row, (z_label >= row_max).to(tl.int8))

    if p_gradient is not None:
        # Every thread has read the label's logit before anyone overwrites it.
        tl.debug_barrier()
        factor = tl.load(p_coefficients + i_row).to(tl.float32)
        slope = 1.0 + 2.0 * z_loss * lse
        # Backwards, because what was read last is still in the L2 cache.
        blocks = (vocabulary + BLOCK - 1) // BLOCK
        for step in range(blocks):
            o_block = (blocks - 1 - step) * BLOCK + o_lane
            m_block = o_block < vocabulary
            b_z, b_tanh = _logits(p_row, o_block, m_block, inner, outer, CAP)
            b_grad = _gradient(
                b_z, b_tanh, o_block, lse, label, factor, slope, smoothing, inner, outer, vocabulary, CAP
            )
            p_out = p_gradient + i_row * gradient_stride + o_block
            b_grad = b_grad.to(p_gradient.dtype.element_ty)
            tl.store(p_out, b_grad, mask=m_block, eviction_policy="evict_first")


@jit
def cross_entropy_bwd_kernel(
    p_logits,
    p_gradient,
    p_labels,
    p_coefficients,
    p_lse,
    logits_stride,
    gradient_stride,
    vocabulary,
    ignore_index,
    inner,
    outer,
    smoothing,
    z_loss,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of one block of one row from the saved log-sum-exp."""
    i_row = tl.program_id(0).to(tl.int64)
    o_block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < vocabulary
    label = tl.load(p_labels + i_row)
    p_out = p_gradient + i_row * gradient_stride + o_block
    if label == ignore_index:
        tl.store(p_out, tl.zeros((BLOCK,), dtype=p_gradient.dtype.element_ty), mask=m_block)
        return
    lse = tl.load(p_lse + i_row)
    factor = tl.load(p_coefficients + i_row).to(tl.float32)
    slope = 1.0 + 2.0 * z_loss * lse
    b_z, b_tanh = _logits(p_logits + i_row * logits_stride, o_block, m_block, inner, outer, CAP)
    b_grad = _gradient(b_z, b_tanh, o_block, lse, label, factor, slope, smoothing, inner, outer, vocabulary, CAP)
    tl.store(p_out, b_grad.to(p_gradient.dtype.element_ty), mask=m_block)


def _inner_outer(options: RowOptions) -> tuple[float, float]:
    """Factors such that ``z = outer * tanh(inner * raw)`` with a cap, ``z = inner * raw`` without."""
    if options.soft_cap is None:
        return options.logit_scale / options.temperature, 1.0
    return options.logit_scale / options.soft_cap, options.soft_cap / options.temperature


def _block_and_warps(vocabulary: int, limit: int, elements_a_warp: int) -> tuple[int, int]:
    block = min(next_power_of_2(vocabulary), limit)
    warps = max(1, block // elements_a_warp)
    return block, min(warps, MAX_WARPS_HIP) if torch.version.hip is not None else warps


def cross_entropy_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    coefficients: torch.Tensor | None,
    options: RowOptions,
    *,
    gradient: torch.Tensor | None,
    ignore_index: int = NO_LABEL,
    entropy: bool = False,
    top1: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch ``cross_entropy_rows_kernel``.

    Args:
        logits: [N, V], rows contiguous.
        labels: [N], integers.
        coefficients: [N] float32 factors of the gradient's rows; needed with ``gradient``.
        options: Scale, cap, temperature, smoothing, z-loss.
        gradient: [N, V] to write the gradient into; may be ``logits``.
        ignore_index: Rows with this label have loss and gradient zero.
        entropy: Whether to compute it.
        top1: Whether to compare the label's logit with the largest.

    Returns:
        Loss [N], log-sum-exp [N], entropy [N] or None, is_top1 [N] or None.
    """
    rows, vocabulary = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(loss)
    row_entropy = torch.empty_like(loss) if entropy else None
    is_top1 = torch.empty(rows, dtype=torch.bool, device=logits.device) if top1 else None
    if rows == 0:
        return loss, lse, row_entropy, is_top1
    inner, outer = _inner_outer(options)
    if gradient is None:
        block, warps = _block_and_warps(vocabulary, LOSS_BLOCK, LOSS_ELEMENTS_A_WARP)
    else:
        block, warps = _block_and_warps(vocabulary, FUSED_BLOCK, FUSED_ELEMENTS_A_WARP)
    with on_device(logits):
        cross_entropy_rows_kernel[(rows,)](
            p_logits=logits,
            p_gradient=gradient,
            p_labels=labels,
            p_coefficients=coefficients,
            p_loss=loss,
            p_lse=lse,
            p_entropy=row_entropy,
            p_top1=None if is_top1 is None else is_top1.view(torch.int8),
            logits_stride=logits.stride(0),
            gradient_stride=0 if gradient is None else gradient.stride(0),
            vocabulary=vocabulary,
            ignore_index=ignore_index,
            inner=inner,
            outer=outer,
            smoothing=options.label_smoothing,
            z_loss=options.z_loss,
            CAP=options.soft_cap is not None,
            SMOOTH=options.label_smoothing != 0.0,
            BLOCK=block,
            num_warps=warps,
        )
    return loss, lse, row_entropy, is_top1


def triton_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    coefficients: torch.Tensor,
    options: RowOptions,
    *,
    gradient: bool,
    entropy: bool,
    top1: bool,
) -> RowResult:
    """The Triton ``RowStep`` of the linear cross entropy: the gradient takes the place of the logits."""
    target = logits if gradient else None
    loss, _, row_entropy, is_top1 = cross_entropy_rows(
        logits, labels, coefficients, options, gradient=target, entropy=entropy, top1=top1
    )
    return RowResult(loss, row_entropy, is_top1, target)


def cross_entropy_bwd(
    logits: torch.Tensor,
    labels: torch.Tensor,
    coefficients: torch.Tensor,
    lse: torch.Tensor,
    options: RowOptions,
    ignore_index: int,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """Launch ``cross_entropy_bwd_kernel``: fill ``gradient`` [N, V], which may be ``logits``."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return gradient
    inner, outer = _inner_outer(options)
    block, warps = _block_and_warps(vocabulary, GRADIENT_BLOCK, GRADIENT_ELEMENTS_A_WARP)
    with on_device(logits):
        cross_entropy_bwd_kernel[(rows, cdiv(vocabulary, block))](
            p_logits=logits,
            p_gradient=gradient,
            p_labels=labels,
            p_coefficients=coefficients,
            p_lse=lse,
            logits_stride=logits.stride(0),
            gradient_stride=gradient.stride(0),
            vocabulary=vocabulary,
            ignore_index=ignore_index,
            inner=inner,
            outer=outer,
            smoothing=options.label_smoothing,
            z_loss=options.z_loss,
            CAP=options.soft_cap is not None,
            BLOCK=block,
            num_warps=warps,
        )
    return gradient


class _CrossEntropy(torch.autograd.Function):
    """Per-row losses; reductions and token weights are applied outside, by autograd, on [N] tensors."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, options: RowOptions, ignore_index: int, inplace: bool
    ) -> torch.Tensor:
        loss, lse, _, _ = cross_entropy_rows(logits, labels, None, options, gradient=None, ignore_index=ignore_index)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options, ctx.ignore_index, ctx.inplace, ctx.consumed = options, ignore_index, inplace, False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        logits, labels, lse = ctx.saved_tensors
        if ctx.consumed:
            raise ConflictError(
                "the logits have been overwritten by an earlier backward",
                where="cross_entropy(inplace_backward=True)",
                hint="use inplace_backward=False to go back through the graph more than once",
            )
        ctx.consumed = ctx.inplace
        gradient = logits if ctx.inplace else torch.empty_like(logits)
        coefficients = upstream[0].contiguous()
        cross_entropy_bwd(logits, labels, coefficients, lse, ctx.options, ctx.ignore_index, gradient)
        return gradient, None, None, None, None


def _check(logits: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor | None, reduction: str) -> None:
    where = "cross_entropy"
    if logits.dim() < 1 or labels.shape != logits.shape[:-1]:
        raise ConfigError(
            f"labels {list(labels.shape)} do not fit logits {list(logits.shape)}",
            where=where,
            hint="logits are [..., V] and labels [...]",
        )
    if not logits.is_floating_point():
        raise ArgumentError(f"logits must be floating point, not {logits.dtype}", where=where)
    if labels.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"labels must be int64 or int32, not {labels.dtype}", where=where)
    if labels.device != logits.device:
        raise ConfigError(f"logits on {logits.device} and labels on {labels.device}", where=where)
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"unknown reduction {reduction!r}", where="reduction", hint="use 'mean', 'sum' or 'none'")
    if token_weights is None:
        return
    if token_weights.shape != labels.shape:
        raise ConfigError(
            f"token_weights {list(token_weights.shape)} do not fit labels {list(labels.shape)}", where="token_weights"
        )
    if token_weights.requires_grad:
        raise UnsupportedError("token_weights get no gradient", where="token_weights", hint="detach them")


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weights: torch.Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    inplace_backward: bool = False,
    backend: dispatch.Backend = "auto",
) -> torch.Tensor:
    """Cross entropy of logits against labels.

    With ``z = soft_cap * tanh(logit_scale * logits / soft_cap)`` (``z = logit_scale * logits`` without a cap) and
    ``lse = logsumexp(z)``, a row's loss is
    ``(1 - label_smoothing) * (lse - z[label]) + label_smoothing * (lse - mean(z)) + z_loss * lse**2``.
    Computed in float32 (float64 for float64 logits, by the reference). Bitwise deterministic.

    Args:
        logits: [..., V], floating point; V is any. Rows that are not contiguous are copied.
        labels: [...], int64 or int32, already shifted. A label outside [0, V) that is not ``ignore_index`` raises in
            the reference and makes the loss NaN in the kernel.
        ignore_index: Rows with this label have loss and gradient zero. Default -100.
        label_smoothing: In [0, 1). Default 0.
        soft_cap: Positive, or None (default) for none.
        logit_scale: Factor of the raw logits. Default 1.
        z_loss: Factor of the squared log-sum-exp, see PaLM (https://arxiv.org/abs/2204.02311). Default 0.
        token_weights: [...], factor of each row's loss, without gradient. Default None: ones.
        reduction: ``"mean"`` (default) divides the sum by the sum of the weights of the rows that count (by their
            number without weights), and is zero when that is zero; ``"sum"``; ``"none"`` gives [...].
        inplace_backward: The backward writes the gradient over ``logits``, which the caller gives up; a second
            backward raises. Default False.
        backend: See ``dispatch.resolve``.

    Returns:
        The loss: float32 (float64 for float64 logits), scalar or [...].

    Raises:
        ConfigError: Shapes, devices or options do not fit.
        ArgumentError: A tensor has the wrong dtype.
        UnsupportedError: ``token_weights`` requires a gradient, or ``backend`` cannot be honoured.
    """
    _check(logits, labels, token_weights, reduction)
    options = RowOptions(label_smoothing, soft_cap, logit_scale, 1.0, z_loss)
    rows = logits.reshape(-1, logits.shape[-1])
    flat_labels = labels.reshape(-1)
    weights = None if token_weights is None else token_weights.reshape(-1)
    if dispatch.resolve("cross_entropy", logits, backend) == "reference":
        loss = reference.cross_entropy(
            rows, flat_labels.long(), options, ignore_index=ignore_index, token_weights=weights, reduction=reduction
        )
        return loss.view(labels.shape) if reduction == "none" else loss
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    loss = _CrossEntropy.apply(rows, flat_labels.contiguous(), options, ignore_index, inplace_backward)
    if weights is None and reduction != "mean":
        return loss.view(labels.shape) if reduction == "none" else loss.sum()
    valid = (flat_labels != ignore_index).float()
    weights = valid if weights is None else valid * weights
    if reduction == "none":
        return (loss * weights).view(labels.shape)
    total = torch.dot(loss, weights)
    return total * reference.reciprocal(weights.sum()) if reduction == "mean" else total


def variants() -> Iterator[Variant]:
    """The compiled forms, for compilation ahead of time."""
    for dtype in ("fp16", "bf16", "fp32"):
        for cap in (False, True):
            for grad in (False, True):
                extras = cap and not grad
                row_arguments = {
                    "p_logits": f"*{dtype}",
                    "p_labels": "*i64",
                    "p_loss": "*fp32",
                    "p_lse": "*fp32",
                    "logits_stride": "i64",
                    "gradient_stride": "i64",
                    "vocabulary": "i32",
                    "ignore_index": "i64",
                    "inner": "fp32",
                    "outer": "fp32",
                    "smoothing": "fp32",
                    "z_loss": "fp32",
                }
                constants: dict[str, Any] = {"CAP": cap, "SMOOTH": cap, "BLOCK": FUSED_BLOCK if grad else LOSS_BLOCK}
                optional = {
                    "p_gradient": f"*{dtype}" if grad else None,
                    "p_coefficients": "*fp32" if grad else None,
                    "p_entropy": "*fp32" if extras else None,
                    "p_top1": "*i8" if extras else None,
                }
                for name, kind in optional.items():
                    if kind is None:
                        constants[name] = None
                    else:
                        row_arguments[name] = kind
                yield Variant(
                    name=f"cross_entropy_rows-{dtype}-{'cap' if cap else 'plain'}-{'grad' if grad else 'loss'}",
                    kernel=cross_entropy_rows_kernel,
                    arguments=row_arguments,
                    constants=constants,
                    num_warps=FUSED_BLOCK // FUSED_ELEMENTS_A_WARP if grad else LOSS_BLOCK // LOSS_ELEMENTS_A_WARP,
                    minimum=bfloat16_minimum(dtype),
                    representative=grad and not cap,
                )
            yield Variant(
                name=f"cross_entropy_bwd-{dtype}-{'cap' if cap else 'plain'}",
                kernel=cross_entropy_bwd_kernel,
                arguments={
                    "p_logits": f"*{dtype}",
                    "p_gradient": f"*{dtype}",
                    "p_labels": "*i64",
                    "p_coefficients": "*fp32",
                    "p_lse": "*fp32",
                    "logits_stride": "i64",
                    "gradient_stride": "i64",
                    "vocabulary": "i32",
                    "ignore_index": "i64",
                    "inner": "fp32",
                    "outer": "fp32",
                    "smoothing": "fp32",
                    "z_loss": "fp32",
                },
                constants={"CAP": cap, "BLOCK": GRADIENT_BLOCK},
                num_warps=8,
                minimum=bfloat16_minimum(dtype),
            )
