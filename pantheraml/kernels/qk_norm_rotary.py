"""RMSNorm of every head of q and k, then rotary position embedding: one launch for both, forward and backward.

``n = x * rsqrt(mean(x²) + eps) * (offset + weight)`` over a head, then ``y = n * cos + rotate(n) * sin`` on its first R
channels, as Qwen3 (offset 0) and Gemma 3 (offset 1) have it. Computed in float32 and rounded once; the backward keeps
q and k as they came and computes their norms again. The weights' gradients are sums of partial sums in a fixed order:
the same bits in every run on the same chip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import dispatch
from ._once import once_differentiable
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .reference.rotary import qk_norm_rotary as qk_norm_rotary_reference
from .rotary import (
    Angles,
    HeadSettings,
    head_settings,
    load_angles,
    load_pairs,
    load_shared_pairs,
    make_angles,
    store_pairs,
    token_settings,
    turn_pairs,
)
from .utils import next_power_of_2, persistent_programs, require_floating, require_same_device, require_shape

# Pairs of channels a program of the backward takes, of one block of heads: 8 heads of 128 channels by 64 threads.
BACKWARD_PAIRS = 512
# Warps a multiprocessor should hold while partial sums are formed; more programs mean more partial sums to add.
RESIDENT_WARPS = 32


@jit
def _load(
    p_row, m_row, half, rest, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr
):
    """First and second of each pair, and the channels that do not turn, of some heads, read once; float32."""
    x_1, x_2 = load_pairs(p_row, m_row, half, "evict_first", INTERLEAVED, HEADS, HALF)
    x_3 = x_1
    if REST > 0:
        o_rest = tl.arange(0, REST)[None, :]
        m_rest = m_row & (o_rest < rest)
        x_3 = tl.load(p_row + 2 * half + o_rest, mask=m_rest, other=0.0, eviction_policy="evict_first").to(tl.float32)
    return x_1, x_2, x_3


@jit
def _load_weight(
    weight, offset, half, rest, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr
):
    """``offset + weight`` for each of some heads, parted as ``_load`` parts a head."""
    w_1, w_2 = load_shared_pairs(weight, half, INTERLEAVED, HEADS, HALF)
    w_3 = w_1
    if REST > 0:
        o_rest = tl.zeros((HEADS, 1), tl.int32) + tl.arange(0, REST)[None, :]
        w_3 = tl.load(weight + 2 * half + o_rest, mask=o_rest < rest, other=0.0).to(tl.float32)
    return w_1 + offset, w_2 + offset, w_3 + offset


@jit
def _sum(a_1, b_1, a_2, b_2, a_3, b_3, REST: tl.constexpr):
    """Sum of products over the channels of each head."""
    total = tl.sum(a_1 * b_1 + a_2 * b_2, axis=1)
    if REST > 0:
        total += tl.sum(a_3 * b_3, axis=1)
    return total[:, None]


@jit
def _store(
    p_row,
    m_row,
    y_1,
    y_2,
    y_3,
    half,
    rest,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """The inverse of ``_load``."""
    store_pairs(p_row, m_row, y_1, y_2, half, INTERLEAVED, HEADS, HALF)
    if REST > 0:
        o_rest = tl.arange(0, REST)[None, :]
        tl.store(p_row + 2 * half + o_rest, y_3.to(p_row.dtype.element_ty), mask=m_row & (o_rest < rest))


@jit
def _forward_heads(
    x,
    weight,
    y,
    i_head,
    heads,
    x_head,
    y_head,
    c_1,
    c_2,
    s_1,
    s_2,
    half,
    rest,
    eps,
    offset,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """HEADS heads of one token."""
    o_head = i_head + tl.arange(0, HEADS)[:, None]
    m_head = o_head < heads
    o_head = o_head.to(tl.int64)
    x_1, x_2, x_3 = _load(x + o_head * x_head, m_head, half, rest, INTERLEAVED, HEADS, HALF, REST)
    w_1, w_2, w_3 = _load_weight(weight, offset, half, rest, INTERLEAVED, HEADS, HALF, REST)
    r = tl.rsqrt(_sum(x_1, x_1, x_2, x_2, x_3, x_3, REST) / (2 * half + rest) + eps)
    y_1, y_2 = turn_pairs(x_1 * r * w_1, x_2 * r * w_2, c_1, c_2, s_1, s_2, False)
    y_3 = x_3 * r * w_3
    _store(y + o_head * y_head, m_head, y_1, y_2, y_3, half, rest, INTERLEAVED, HEADS, HALF, REST)


@jit(do_not_specialize=["tokens"])
def _forward_kernel(
    q,
    k,
    q_weight,
    k_weight,
    q_out,
    k_out,
    cos,
    sin,
    position_ids,
    tokens,
    q_heads,
    k_heads,
    half,
    rest,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    qo_batch,
    qo_head,
    qo_token,
    ko_batch,
    ko_head,
    ko_token,
    cos_axis,
    cos_batch,
    cos_row,
    position_axis,
    position_batch,
    position_token,
    section_1,
    section_2,
    eps,
    offset,
    INTERLEAVED: tl.constexpr,
    SECTIONS: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """One program takes one token, HEADS heads at a time."""
    i_row = tl.program_id(0)
    i_batch = (i_row // tokens).to(tl.int64)
    i_token = (i_row % tokens).to(tl.int64)
    c_1, c_2, s_1, s_2 = load_angles(
        cos,
        sin,
        position_ids,
        i_batch,
        i_token,
        half,
        cos_axis,
        cos_batch,
        cos_row,
        position_axis,
        position_batch,
        position_token,
        section_1,
        section_2,
        INTERLEAVED,
        SECTIONS,
        HEADS,
        HALF,
    )
    for block in tl.static_range(Q_BLOCKS):
        _forward_heads(
            q + i_batch * q_batch + i_token * q_token,
            q_weight,
            q_out + i_batch * qo_batch + i_token * qo_token,
            block * HEADS,
            q_heads,
            q_head,
            qo_head,
            c_1,
            c_2,
            s_1,
            s_2,
            half,
            rest,
            eps,
            offset,
            INTERLEAVED,
            HEADS,
            HALF,
            REST,
        )
    for block in tl.static_range(K_BLOCKS):
        _forward_heads(
            k + i_batch * k_batch + i_token * k_token,
            k_weight,
            k_out + i_batch * ko_batch + i_token * ko_token,
            block * HEADS,
            k_heads,
            k_head,
            ko_head,
            c_1,
            c_2,
            s_1,
            s_2,
            half,
            rest,
            eps,
            offset,
            INTERLEAVED,
            HEADS,
            HALF,
            REST,
        )


@jit
def _backward_heads(
    x,
    weight,
    upstream,
    y,
    p_dweight,
    cos,
    sin,
    position_ids,
    i_first,
    rows,
    programs,
    tokens,
    heads,
    i_head,
    half,
    rest,
    x_batch,
    x_head,
    x_token,
    d_batch,
    d_head,
    d_token,
    y_batch,
    y_head,
    y_token,
    cos_axis,
    cos_batch,
    cos_row,
    position_axis,
    position_batch,
    position_token,
    section_1,
    section_2,
    eps,
    offset,
    INTERLEAVED: tl.constexpr,
    SECTIONS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """HEADS heads of a token or, where the weight is trained, of tokens ``i_first, i_first + programs, ...``."""
    width = 2 * half + rest
    o_head = i_head + tl.arange(0, HEADS)[:, None]
    m_head = o_head < heads
    o_head = o_head.to(tl.int64)
    w_1, w_2, w_3 = _load_weight(weight, offset, half, rest, INTERLEAVED, HEADS, HALF, REST)
    sum_1 = tl.zeros((HEADS, HALF), tl.float32)
    sum_2 = tl.zeros((HEADS, HALF), tl.float32)
    sum_3 = sum_1
    if REST > 0:
        sum_3 = tl.zeros((HEADS, REST), tl.float32)
    end = i_first + 1
    step = 1
    if p_dweight is not None:
        end = rows
        step = programs
    # Without sums one token: the compiler sees that, and keeps no loop.
    for i_row in range(i_first, end, step):
        i_batch = (i_row // tokens).to(tl.int64)
        i_token = (i_row % tokens).to(tl.int64)
        c_1, c_2, s_1, s_2 = load_angles(
            cos,
            sin,
            position_ids,
            i_batch,
            i_token,
            half,
            cos_axis,
            cos_batch,
            cos_row,
            position_axis,
            position_batch,
            position_token,
            section_1,
            section_2,
            INTERLEAVED,
            SECTIONS,
            HEADS,
            HALF,
        )
        p_x = x + i_batch * x_batch + i_token * x_token + o_head * x_head
        x_1, x_2, x_3 = _load(p_x, m_head, half, rest, INTERLEAVED, HEADS, HALF, REST)
        p_d = upstream + i_batch * d_batch + i_token * d_token + o_head * d_head
        g_1, g_2, g_3 = _load(p_d, m_head, half, rest, INTERLEAVED, HEADS, HALF, REST)
        r = tl.rsqrt(_sum(x_1, x_1, x_2, x_2, x_3, x_3, REST) / width + eps)
        x_1 *= r
        x_2 *= r
        x_3 *= r
        g_1, g_2 = turn_pairs(g_1, g_2, c_1, c_2, s_1, s_2, True)
        if p_dweight is not None:
            sum_1 += g_1 * x_1
            sum_2 += g_2 * x_2
            if REST > 0:
                sum_3 += g_3 * x_3
        g_1 *= w_1
        g_2 *= w_2
        g_3 *= w_3
        mean = _sum(g_1, x_1, g_2, x_2, g_3, x_3, REST) / width
        y_1 = (g_1 - x_1 * mean) * r
        y_2 = (g_2 - x_2 * mean) * r
        y_3 = (g_3 - x_3 * mean) * r
        p_y = y + i_batch * y_batch + i_token * y_token + o_head * y_head
        _store(p_y, m_head, y_1, y_2, y_3, half, rest, INTERLEAVED, HEADS, HALF, REST)
    if p_dweight is not None:
        o_half = tl.arange(0, HALF)
        o_1 = o_half
        o_2 = half + o_half
        if INTERLEAVED:
            o_1 = 2 * o_half
            o_2 = o_1 + 1
        tl.store(p_dweight + o_1, tl.sum(sum_1, axis=0), mask=o_half < half)
        tl.store(p_dweight + o_2, tl.sum(sum_2, axis=0), mask=o_half < half)
        if REST > 0:
            o_rest = tl.arange(0, REST)
            tl.store(p_dweight + 2 * half + o_rest, tl.sum(sum_3, axis=0), mask=o_rest < rest)


@jit(do_not_specialize=["tokens", "rows", "programs"])
def _backward_kernel(
    q,
    k,
    q_weight,
    k_weight,
    dq,
    dk,
    q_out,
    k_out,
    dweight,
    cos,
    sin,
    position_ids,
    tokens,
    rows,
    programs,
    q_heads,
    k_heads,
    half,
    rest,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    dq_batch,
    dq_head,
    dq_token,
    dk_batch,
    dk_head,
    dk_token,
    qo_batch,
    qo_head,
    qo_token,
    ko_batch,
    ko_head,
    ko_token,
    cos_axis,
    cos_batch,
    cos_row,
    position_axis,
    position_batch,
    position_token,
    section_1,
    section_2,
    eps,
    offset,
    INTERLEAVED: tl.constexpr,
    SECTIONS: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """One program takes HEADS heads of q or of k of one token; dq and dk are gradients of the outputs, out of q and k.

    With dweight, it takes tokens ``program, program + programs, ...`` of all sequences, and the sum over its heads and
    tokens goes to ``dweight[block, program]``.
    """
    i_block = tl.program_id(0) % (Q_BLOCKS + K_BLOCKS)
    i_first = tl.program_id(0) // (Q_BLOCKS + K_BLOCKS)
    p_dweight = dweight
    if dweight is not None:
        p_dweight = dweight + (i_block.to(tl.int64) * programs + i_first) * (2 * half + rest)
    if i_block < Q_BLOCKS:
        _backward_heads(
            q,
            q_weight,
            dq,
            q_out,
            p_dweight,
            cos,
            sin,
            position_ids,
            i_first,
            rows,
            programs,
            tokens,
            q_heads,
            i_block * HEADS,
            half,
            rest,
            q_batch,
            q_head,
            q_token,
            dq_batch,
            dq_head,
            dq_token,
            qo_batch,
            qo_head,
            qo_token,
            cos_axis,
            cos_batch,
            cos_row,
            position_axis,
            position_batch,
            position_token,
            section_1,
            section_2,
            eps,
            offset,
            INTERLEAVED,
            SECTIONS,
            HEADS,
            HALF,
            REST,
        )
    else:
        _backward_heads(
            k,
            k_weight,
            dk,
            k_out,
            p_dweight,
            cos,
            sin,
            position_ids,
            i_first,
            rows,
            programs,
            tokens,
            k_heads,
            (i_block - Q_BLOCKS) * HEADS,
            half,
            rest,
            k_batch,
            k_head,
            k_token,
            dk_batch,
            dk_head,
            dk_token,
            ko_batch,
            ko_head,
            ko_token,
            cos_axis,
            cos_batch,
            cos_row,
            position_axis,
            position_batch,
            position_token,
            section_1,
            section_2,
            eps,
            offset,
            INTERLEAVED,
            SECTIONS,
            HEADS,
            HALF,
            REST,
        )


class Norms(NamedTuple):
    """The weights [D] of the two norms, what is added to them, and epsilon."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    offset: float
    eps: float


def _strides(name: str, x: torch.Tensor, head: int, token: int) -> dict[str, int]:
    return {f"{name}_batch": x.stride(0), f"{name}_head": x.stride(head), f"{name}_token": x.stride(token)}


def _constants(settings: HeadSettings) -> dict[str, int]:
    return {
        "Q_BLOCKS": settings.q_blocks,
        "K_BLOCKS": settings.k_blocks,
        "HEADS": settings.heads,
        "num_warps": settings.num_warps,
    }


def qk_norm_rotary_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    norms: Norms,
    angles: Angles,
    upstream: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    weight_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Launch the kernel; for hand-written backward passes.

    Args:
        q: As in ``qk_norm_rotary``.
        k: As in ``qk_norm_rotary``.
        norms: Weights and options of the norms.
        angles: From ``rotary.make_angles``.
        upstream: Gradients of the outputs; None for the forward.
        weight_grad: Whether the backward also sums the gradients of the weights.

    Returns:
        The outputs, or the gradients of q and k; and the float32 gradients [D] of the weights or None.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    head, token = (1, 2) if angles.head_axis == 1 else (2, 1)
    half, width = angles.cos.shape[-1] // 2, q.shape[-1]
    rest = width - 2 * half
    q_heads, k_heads, pairs = q.shape[head], k.shape[head], max(next_power_of_2(width) // 2, 1)
    rows = q.shape[0] * q.shape[token]
    cos, positions = angles.cos, angles.position_ids
    sections = angles.sections or (0, 0, 0)
    common = {
        "q": q,
        "k": k,
        "q_weight": norms.q_weight.contiguous(),
        "k_weight": norms.k_weight.contiguous(),
        "q_out": q_out,
        "k_out": k_out,
        "cos": cos,
        "sin": angles.sin,
        "position_ids": positions,
        "tokens": q.shape[token],
        "q_heads": q_heads,
        "k_heads": k_heads,
        "half": half,
        "rest": rest,
        **_strides("q", q, head, token),
        **_strides("k", k, head, token),
        **_strides("qo", q_out, head, token),
        **_strides("ko", k_out, head, token),
        "cos_axis": cos.stride(0) if positions is None else 0,
        "cos_batch": cos.stride(1) if positions is None else 0,
        "cos_row": cos.stride(-2),
        "position_axis": positions.stride(0) if positions is not None else 0,
        "position_batch": positions.stride(1) if positions is not None else 0,
        "position_token": positions.stride(2) if positions is not None else 0,
        "section_1": sections[0],
        "section_2": sections[0] + sections[1],
        "eps": norms.eps,
        "offset": norms.offset,
        "INTERLEAVED": angles.layout == "interleaved",
        "SECTIONS": angles.sections is not None,
        "HALF": next_power_of_2(half),
        "REST": next_power_of_2(rest) if rest else 0,
    }
    if upstream is None:
        settings = token_settings(q_heads, k_heads, pairs)
        if rows:
            with on_device(q):
                _forward_kernel[(rows,)](**common, **_constants(settings))
        return q_out, k_out, None
    dq, dk = (x if x.stride(-1) == 1 else x.contiguous() for x in upstream)
    settings = head_settings(q_heads, k_heads, pairs, BACKWARD_PAIRS)
    blocks = settings.q_blocks + settings.k_blocks
    programs = rows
    partial = None
    if weight_grad:
        resident = max(RESIDENT_WARPS // settings.num_warps, 1)
        programs = max(min(persistent_programs(q, resident) // blocks, rows), 1)
        partial = torch.empty((blocks, programs, width), dtype=torch.float32, device=q.device)
    if rows:
        with on_device(q):
            _backward_kernel[(programs * blocks,)](
                **common,
                dq=dq,
                dk=dk,
                dweight=partial,
                rows=rows,
                programs=programs,
                **_strides("dq", dq, head, token),
                **_strides("dk", dk, head, token),
                **_constants(settings),
            )
    if partial is None:
        return q_out, k_out, None
    if not rows:
        partial.zero_()
    of_q, of_k = partial[: settings.q_blocks], partial[settings.q_blocks :]
    return q_out, k_out, (of_q.sum((0, 1)), of_k.sum((0, 1)))


class _QKNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, q_weight, k_weight, angles: Angles, offset: float, eps: float):  # type: ignore[override]
        ctx.save_for_backward(q, k, q_weight, k_weight, *angles[:3])
        ctx.options = angles[3:]
        ctx.norms = offset, eps
        return qk_norm_rotary_launch(q, k, Norms(q_weight, k_weight, offset, eps), angles)[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq, dk):  # type: ignore[override]
        q, k, q_weight, k_weight, *angles = ctx.saved_tensors
        _, _, need_q_weight, need_k_weight, *_ = ctx.needs_input_grad
        dq, dk, dweights = qk_norm_rotary_launch(
            q,
            k,
            Norms(q_weight, k_weight, *ctx.norms),
            Angles(*angles, *ctx.options),
            (dq, dk),
            weight_grad=need_q_weight or need_k_weight,
        )
        dq_weight = dk_weight = None
        if dweights is not None:
            dq_weight = dweights[0].to(q_weight.dtype) if need_q_weight else None
            dk_weight = dweights[1].to(k_weight.dtype) if need_k_weight else None
        return dq, dk, dq_weight, dk_weight, None, None, None


def qk_norm_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    layout: str = "half",
    position_ids: torch.Tensor | None = None,
    sections: Sequence[int] | None = None,
    head_axis: int = 1,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise every head of q and k by its root mean square, then turn them.

    Args:
        q: ``[B, H, T, D]`` (``[B, T, H, D]`` with ``head_axis=2``), float32, float16 or bfloat16 (also float64 on the
            reference). Any strides with a contiguous last dimension are read in place.
        k: Like q, with its own number of heads.
        q_weight: ``[D]``, the norm's weight for q. Its gradient is computed only when one of the weights requires one.
        k_weight: ``[D]``, that for k.
        cos: As in ``rotary``.
        sin: As in ``rotary``.
        eps: Added to the mean square.
        offset: Added to the weights, in float32.
        layout: As in ``rotary``.
        position_ids: As in ``rotary``.
        sections: As in ``rotary``.
        head_axis: As in ``rotary``.
        backend: See ``dispatch.resolve``.

    Returns:
        q and k in their own dtype and memory layout.

    Raises:
        ConfigError: A shape or option is wrong.
        ArgumentError: Dtypes or devices differ.
        UnsupportedError: cos or sin requires a gradient.

    Deterministic. Saves q, k, cos and sin for the backward.
    """
    op = "qk_norm_rotary"
    options = {"layout": layout, "position_ids": position_ids, "sections": sections, "head_axis": head_axis}
    require_floating(op, q_weight=q_weight, k_weight=k_weight)
    require_same_device(op, q=q, q_weight=q_weight, k_weight=k_weight)
    angles = make_angles(q, k, cos, sin, **options)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        require_shape(op, name, weight, (q.shape[-1],))
    if dispatch.resolve(op, q, backend) == "triton":
        return _QKNormRotary.apply(q, k, q_weight, k_weight, angles, offset, eps)
    return qk_norm_rotary_reference(q, k, q_weight, k_weight, cos, sin, eps=eps, offset=offset, **options)


def variants() -> Iterator[Variant]:
    """Forms of the kernels for ahead-of-time compilation."""
    names = ["tokens", "q_heads", "k_heads", "half", "rest"]
    names += [f"{x}_{axis}" for x in ("q", "k", "qo", "ko") for axis in ("batch", "head", "token")]
    names += ["cos_axis", "cos_batch", "cos_row", "position_axis", "position_batch", "position_token"]
    common = dict.fromkeys([*names, "section_1", "section_2"], "i32") | {"eps": "fp32", "offset": "fp32"}
    gradients = [f"{x}_{axis}" for x in ("dq", "dk") for axis in ("batch", "head", "token")]
    backward = dict.fromkeys(["rows", "programs", *gradients], "i32")
    flags = ("INTERLEAVED", "SECTIONS", "Q_BLOCKS", "K_BLOCKS", "HEADS", "HALF", "REST")
    for dtype in ("fp16", "bf16", "fp32"):
        p = f"*{dtype}"
        pointers = dict.fromkeys(("q", "k", "q_weight", "k_weight", "q_out", "k_out", "cos", "sin"), p) | common
        upstream = backward | {"dq": p, "dk": p}
        trained = upstream | {"dweight": "*fp32"}
        for form, kernel, arguments, absent, values in (
            ("forward", _forward_kernel, {}, ["position_ids"], (False, False, 2, 1, 16, 64, 0)),
            ("backward", _backward_kernel, upstream, ["dweight", "position_ids"], (False, False, 4, 1, 8, 64, 0)),
            ("backward-trained", _backward_kernel, trained, ["position_ids"], (False, False, 4, 1, 8, 64, 0)),
            (
                "backward-trained-interleaved-partial-positions",
                _backward_kernel,
                trained | {"position_ids": "*i64"},
                [],
                (True, True, 4, 1, 8, 32, 64),
            ),
        ):
            yield Variant(
                f"qk_norm_rotary-{dtype}-{form}",
                kernel,
                pointers | arguments,
                dict(zip(flags, values)) | dict.fromkeys(absent),
                4 if kernel is _forward_kernel else 2,
                minimum=bfloat16_minimum(dtype),
                representative=form in ("forward", "backward-trained-interleaved-partial-positions")
                and dtype == "bf16",
            )
