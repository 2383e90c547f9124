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
from torch.autograd.function import once_differentiable

from . import dispatch
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .reference.rotary import qk_norm_rotary as qk_norm_rotary_reference
from .rotary import ELEMENTS_PER_WARP, TILE, Angles, load_angles, make_angles
from .utils import cdiv, next_power_of_2, persistent_programs, require_floating, require_same_device, require_shape

# Warps a multiprocessor should hold while partial sums are formed; more programs mean more partial sums to add.
RESIDENT_WARPS = 32


@jit
def _load(
    x, o_x, half, rest, m_head, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr
):
    """First and second of each pair, and the channels that do not turn, of some heads; float32."""
    o_half = tl.arange(0, HALF)
    if INTERLEAVED:
        o_flat = tl.arange(0, 2 * HALF)
        mask = m_head[:, None] & (o_flat < 2 * half)[None, :]
        flat = tl.load(x + o_x[:, None] + o_flat[None, :], mask=mask, other=0.0).to(tl.float32)
        x_1, x_2 = tl.split(tl.reshape(flat, (HEADS, HALF, 2)))
    else:
        mask = m_head[:, None] & (o_half < half)[None, :]
        x_1 = tl.load(x + o_x[:, None] + o_half[None, :], mask=mask, other=0.0).to(tl.float32)
        x_2 = tl.load(x + o_x[:, None] + half + o_half[None, :], mask=mask, other=0.0).to(tl.float32)
    x_3 = x_1
    if REST > 0:
        o_rest = tl.arange(0, REST)
        m_rest = m_head[:, None] & (o_rest < rest)[None, :]
        x_3 = tl.load(x + o_x[:, None] + 2 * half + o_rest[None, :], mask=m_rest, other=0.0).to(tl.float32)
    return x_1, x_2, x_3


@jit
def _store(
    y,
    o_y,
    y_1,
    y_2,
    y_3,
    half,
    rest,
    m_head,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """The inverse of ``_load``."""
    kind = y.dtype.element_ty
    if INTERLEAVED:
        o_flat = tl.arange(0, 2 * HALF)
        mask = m_head[:, None] & (o_flat < 2 * half)[None, :]
        flat = tl.reshape(tl.join(y_1.to(kind), y_2.to(kind)), (HEADS, 2 * HALF))
        tl.store(y + o_y[:, None] + o_flat[None, :], flat, mask=mask)
    else:
        o_half = tl.arange(0, HALF)
        mask = m_head[:, None] & (o_half < half)[None, :]
        tl.store(y + o_y[:, None] + o_half[None, :], y_1.to(kind), mask=mask)
        tl.store(y + o_y[:, None] + half + o_half[None, :], y_2.to(kind), mask=mask)
    if REST > 0:
        o_rest = tl.arange(0, REST)
        m_rest = m_head[:, None] & (o_rest < rest)[None, :]
        tl.store(y + o_y[:, None] + 2 * half + o_rest[None, :], y_3.to(kind), mask=m_rest)


@jit
def _sum(a_1, b_1, a_2, b_2, a_3, b_3, REST: tl.constexpr):
    """Sum of products over the channels of each head."""
    total = tl.sum(a_1 * b_1 + a_2 * b_2, axis=1)
    if REST > 0:
        total += tl.sum(a_3 * b_3, axis=1)
    return total


@jit
def _block_of_heads(
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
    """Some heads of tokens ``i_first, i_first + programs, ...``: forward, or backward where there is an upstream."""
    width = 2 * half + rest
    o_head = (i_head + tl.arange(0, HEADS)).to(tl.int64)
    m_head = o_head < heads
    o_half = tl.arange(0, HALF)
    m_half = o_half < half
    o_1 = o_half
    o_2 = half + o_half
    if INTERLEAVED:
        o_1 = 2 * o_half
        o_2 = o_1 + 1
    w_1 = tl.load(weight + o_1, mask=m_half, other=0.0).to(tl.float32)[None, :] + offset
    w_2 = tl.load(weight + o_2, mask=m_half, other=0.0).to(tl.float32)[None, :] + offset
    o_rest = o_half
    m_rest = m_half
    w_3 = w_1
    if REST > 0:
        o_rest = tl.arange(0, REST)
        m_rest = o_rest < rest
        w_3 = tl.load(weight + 2 * half + o_rest, mask=m_rest, other=0.0).to(tl.float32)[None, :] + offset
    sum_1 = w_1
    sum_2 = w_2
    sum_3 = w_3
    if p_dweight is not None:
        sum_1 = tl.zeros((HEADS, HALF), tl.float32)
        sum_2 = tl.zeros((HEADS, HALF), tl.float32)
        if REST > 0:
            sum_3 = tl.zeros((HEADS, REST), tl.float32)
    for i_row in range(i_first, rows, programs):
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
            upstream is not None,
            HALF,
        )
        p_x = x + i_batch * x_batch + i_token * x_token
        x_1, x_2, x_3 = _load(p_x, o_head * x_head, half, rest, m_head, INTERLEAVED, HEADS, HALF, REST)
        r = tl.rsqrt(_sum(x_1, x_1, x_2, x_2, x_3, x_3, REST) / width + eps)[:, None]
        x_1 *= r
        x_2 *= r
        x_3 *= r
        p_y = y + i_batch * y_batch + i_token * y_token
        if upstream is None:
            n_1 = x_1 * w_1
            n_2 = x_2 * w_2
            y_1 = n_1 * c_1[None, :] - n_2 * s_1[None, :]
            y_2 = n_2 * c_2[None, :] + n_1 * s_2[None, :]
            y_3 = x_3 * w_3
        else:
            p_d = upstream + i_batch * d_batch + i_token * d_token
            d_1, d_2, d_3 = _load(p_d, o_head * d_head, half, rest, m_head, INTERLEAVED, HEADS, HALF, REST)
            g_1 = d_1 * c_1[None, :] - d_2 * s_1[None, :]
            g_2 = d_2 * c_2[None, :] + d_1 * s_2[None, :]
            g_3 = d_3
            if p_dweight is not None:
                sum_1 += g_1 * x_1
                sum_2 += g_2 * x_2
                if REST > 0:
                    sum_3 += g_3 * x_3
            g_1 *= w_1
            g_2 *= w_2
            g_3 *= w_3
            mean = (_sum(g_1, x_1, g_2, x_2, g_3, x_3, REST) / width)[:, None]
            y_1 = (g_1 - x_1 * mean) * r
            y_2 = (g_2 - x_2 * mean) * r
            y_3 = (g_3 - x_3 * mean) * r
        _store(p_y, o_head * y_head, y_1, y_2, y_3, half, rest, m_head, INTERLEAVED, HEADS, HALF, REST)
    if p_dweight is not None:
        tl.store(p_dweight + o_1, tl.sum(sum_1, axis=0), mask=m_half)
        tl.store(p_dweight + o_2, tl.sum(sum_2, axis=0), mask=m_half)
        if REST > 0:
            tl.store(p_dweight + 2 * half + o_rest, tl.sum(sum_3, axis=0), mask=m_rest)


@jit(do_not_specialize=["tokens", "rows", "programs"])
def _qk_norm_rotary_kernel(
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
    q_blocks,
    k_blocks,
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
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """One program takes HEADS heads of q or of k, of tokens ``program, program + programs, ...`` of all sequences.

    Forward: out from q and k. Backward, with dq and dk, the gradients of the outputs: out is the gradient of q and k;
    with dweight, the sum over a program's heads and tokens goes to ``dweight[block, program]``.
    """
    blocks = q_blocks + k_blocks
    i_block = tl.program_id(0) % blocks
    i_first = tl.program_id(0) // blocks
    p_dweight = dweight
    if dweight is not None:
        p_dweight = dweight + (i_block.to(tl.int64) * programs + i_first) * (2 * half + rest)
    if i_block < q_blocks:
        _block_of_heads(
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
        _block_of_heads(
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
            (i_block - q_blocks) * HEADS,
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


def _strides(name: str, x: torch.Tensor | None, head: int, token: int) -> dict[str, int]:
    values = (0, 0, 0) if x is None else (x.stride(0), x.stride(head), x.stride(token))
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_token"), values))


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
    dq, dk = (None, None) if upstream is None else (x if x.stride(-1) == 1 else x.contiguous() for x in upstream)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    head, token = (1, 2) if angles.head_axis == 1 else (2, 1)
    half, width = angles.cos.shape[-1] // 2, q.shape[-1]
    rest = width - 2 * half
    block = next_power_of_2(half)
    q_heads, k_heads = q.shape[head], k.shape[head]
    heads = min(max(TILE // next_power_of_2(width), 1), next_power_of_2(max(q_heads, k_heads)))
    q_blocks, k_blocks = cdiv(q_heads, heads), cdiv(k_heads, heads)
    num_warps = max(heads * next_power_of_2(width) // ELEMENTS_PER_WARP, 1)
    rows = q.shape[0] * q.shape[token]
    programs = rows
    partial = None
    if weight_grad:
        programs = max(
            min(persistent_programs(q, max(RESIDENT_WARPS // num_warps, 1)) // (q_blocks + k_blocks), rows), 1
        )
        partial = torch.empty((q_blocks + k_blocks, programs, width), dtype=torch.float32, device=q.device)
    cos, positions = angles.cos, angles.position_ids
    sections = angles.sections or (0, 0, 0)
    if rows:
        with on_device(q):
            _qk_norm_rotary_kernel[(programs * (q_blocks + k_blocks),)](
                q=q,
                k=k,
                q_weight=norms.q_weight.contiguous(),
                k_weight=norms.k_weight.contiguous(),
                dq=dq,
                dk=dk,
                q_out=q_out,
                k_out=k_out,
                dweight=partial,
                cos=cos,
                sin=angles.sin,
                position_ids=positions,
                tokens=q.shape[token],
                rows=rows,
                programs=programs,
                q_heads=q_heads,
                k_heads=k_heads,
                q_blocks=q_blocks,
                k_blocks=k_blocks,
                half=half,
                rest=rest,
                **_strides("q", q, head, token),
                **_strides("k", k, head, token),
                **_strides("dq", dq, head, token),
                **_strides("dk", dk, head, token),
                **_strides("qo", q_out, head, token),
                **_strides("ko", k_out, head, token),
                cos_axis=cos.stride(0) if positions is None else 0,
                cos_batch=cos.stride(1) if positions is None else 0,
                cos_row=cos.stride(-2),
                position_axis=positions.stride(0) if positions is not None else 0,
                position_batch=positions.stride(1) if positions is not None else 0,
                position_token=positions.stride(2) if positions is not None else 0,
                section_1=sections[0],
                section_2=sections[0] + sections[1],
                eps=norms.eps,
                offset=norms.offset,
                INTERLEAVED=angles.layout == "interleaved",
                SECTIONS=angles.sections is not None,
                HEADS=heads,
                HALF=block,
                REST=next_power_of_2(rest) if rest else 0,
                num_warps=num_warps,
            )
    if partial is None:
        return q_out, k_out, None
    if not rows:
        partial.zero_()
    return q_out, k_out, (partial[:q_blocks].sum((0, 1)), partial[q_blocks:].sum((0, 1)))


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
    """Forms of the kernel for ahead-of-time compilation."""
    names = ["tokens", "rows", "programs", "q_heads", "k_heads", "q_blocks", "k_blocks", "half", "rest"]
    names += [f"{x}_{axis}" for x in ("q", "k", "dq", "dk", "qo", "ko") for axis in ("batch", "head", "token")]
    names += ["cos_axis", "cos_batch", "cos_row", "position_axis", "position_batch", "position_token"]
    common = dict.fromkeys([*names, "section_1", "section_2"], "i32") | {"eps": "fp32", "offset": "fp32"}
    for dtype in ("fp16", "bf16", "fp32"):
        p = f"*{dtype}"
        pointers = dict.fromkeys(("q", "k", "q_weight", "k_weight", "q_out", "k_out", "cos", "sin"), p)
        absent = dict.fromkeys(("dq", "dk", "dweight", "position_ids"))
        for form, arguments, flags in (
            ("forward", {}, (False, False, 8, 64, 0)),
            ("backward", {"dq": p, "dk": p}, (False, False, 8, 64, 0)),
            (
                "backward-trained-interleaved-partial-positions",
                {"dq": p, "dk": p, "dweight": "*fp32", "position_ids": "*i64"},
                (True, True, 8, 32, 64),
            ),
        ):
            constants = dict(zip(("INTERLEAVED", "SECTIONS", "HEADS", "HALF", "REST"), flags))
            constants |= {name: None for name in absent if name not in arguments}
            yield Variant(
                f"qk_norm_rotary-{dtype}-{form}",
                _qk_norm_rotary_kernel,
                pointers | arguments | common,
                constants,
                2,
                minimum=bfloat16_minimum(dtype),
                representative="trained" in form and dtype == "bf16",
            )
