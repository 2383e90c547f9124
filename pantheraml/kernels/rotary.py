"""Rotary position embedding on q and k in one launch, forward and backward.

Su et al., "RoFormer", https://arxiv.org/abs/2104.09864; sections as in Qwen2-VL, https://arxiv.org/abs/2409.12191. With
``rotate(x1, x2) = (-x2, x1)`` over halves or pairs of the last dimension: ``y = x * cos + rotate(x) * sin``, computed
in float32 and rounded once. The backward is the transposed rotation and saves only cos and sin. Deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from ..errors import ArgumentError, ConfigError, UnsupportedError
from . import dispatch
from ._once import once_differentiable
from ._triton import Launch, jit, remembered, tl
from ._variants import Variant, bfloat16_minimum
from .reference.rotary import rotary as rotary_reference
from .utils import LANES, MAX_THREADS, cdiv, next_power_of_2, require_floating, require_same_device, require_shape

LAYOUTS = ("half", "interleaved")
# Pairs of channels that a thread turns at a time, one 16-byte load of each half from a 2-byte dtype, and that a program
# turns at a time: 16 heads of 128 channels by 128 threads.
PAIRS_PER_THREAD = 8
PAIRS = 1024
# Blocks of heads that a program takes in turn, unrolled; of more heads, more threads take more at a time.
MAX_BLOCKS = 8


@jit
def load_pairs(
    p_row,
    m_row,
    half,
    EVICTION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """First and second of each pair of channels of some rows, [HEADS, HALF], float32.

    ``p_row`` [HEADS, 1] points to the first channels (or [HEADS, channels], to those of the row a channel belongs to).
    """
    if INTERLEAVED:
        # Pairs are loaded and stored as flat rows and parted in registers, which keeps the accesses wide.
        o_flat = tl.arange(0, 2 * HALF)[None, :]
        flat = tl.load(p_row + o_flat, mask=m_row & (o_flat < 2 * half), other=0.0, eviction_policy=EVICTION)
        x_1, x_2 = tl.split(tl.reshape(flat.to(tl.float32), (HEADS, HALF, 2)))
    else:
        o_half = tl.arange(0, HALF)[None, :]
        mask = m_row & (o_half < half)
        x_1 = tl.load(p_row + o_half, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        x_2 = tl.load(p_row + half + o_half, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    return x_1, x_2


@jit
def store_pairs(p_row, m_row, y_1, y_2, half, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """The inverse of ``load_pairs``."""
    kind = p_row.dtype.element_ty
    if INTERLEAVED:
        o_flat = tl.arange(0, 2 * HALF)[None, :]
        flat = tl.reshape(tl.join(y_1.to(kind), y_2.to(kind)), (HEADS, 2 * HALF))
        tl.store(p_row + o_flat, flat, mask=m_row & (o_flat < 2 * half))
    else:
        o_half = tl.arange(0, HALF)[None, :]
        mask = m_row & (o_half < half)
        tl.store(p_row + o_half, y_1.to(kind), mask=mask)
        tl.store(p_row + half + o_half, y_2.to(kind), mask=mask)


@jit
def load_shared_pairs(p_row, half, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """The pairs of one row, the same for each of HEADS heads: [HEADS, HALF], float32.

    Each thread loads what its heads need, from the first-level cache but for the first time. A row that is loaded once
    would lie in other threads, and reach these through shared memory, behind barriers.
    """
    o_row = tl.zeros((HEADS, 1), tl.int32)
    return load_pairs(p_row + o_row, o_row == 0, half, "", INTERLEAVED, HEADS, HALF)


@jit
def load_angles(
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
    INTERLEAVED: tl.constexpr,
    SECTIONS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Cos and sin of one token for HEADS heads, of the first and the second of each pair."""
    i_axis = 0
    if SECTIONS:
        o_pair = tl.zeros((HEADS, 1), tl.int32)
        if INTERLEAVED:
            o_pair += tl.arange(0, 2 * HALF)[None, :] // 2
        else:
            o_pair += tl.arange(0, HALF)[None, :]
        i_axis = tl.where(o_pair < section_1, 0, tl.where(o_pair < section_2, 1, 2)).to(tl.int64)
    if position_ids is not None:
        o_position = i_axis * position_axis + i_batch * position_batch + i_token * position_token
        o_cos = tl.load(position_ids + o_position).to(tl.int64) * cos_row
    else:
        o_cos = i_axis * cos_axis + i_batch * cos_batch + i_token * cos_row
    c_1, c_2 = load_shared_pairs(cos + o_cos, half, INTERLEAVED, HEADS, HALF)
    s_1, s_2 = load_shared_pairs(sin + o_cos, half, INTERLEAVED, HEADS, HALF)
    return c_1, c_2, s_1, s_2


@jit
def turn_pairs(x_1, x_2, c_1, c_2, s_1, s_2, BACKWARD: tl.constexpr):
    """``y1 = x1 c1 - x2 s1; y2 = x2 c2 + x1 s2``, or with BACKWARD its transpose."""
    if BACKWARD:
        y_1 = x_1 * c_1 + x_2 * s_2
        y_2 = x_2 * c_2 - x_1 * s_1
    else:
        y_1 = x_1 * c_1 - x_2 * s_1
        y_2 = x_2 * c_2 + x_1 * s_2
    return y_1, y_2


@jit
def _rotate_heads(
    x,
    y,
    i_head,
    heads,
    x_stride,
    y_stride,
    c_1,
    c_2,
    s_1,
    s_2,
    half,
    rest,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    COPY_REST: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """Turn HEADS heads of one token; channels beyond are copied."""
    o_head = i_head + tl.arange(0, HEADS)[:, None]
    m_head = o_head < heads
    p_x = x + o_head.to(tl.int64) * x_stride
    p_y = y + o_head.to(tl.int64) * y_stride
    # Read once: such lines leave the cache before those of the result.
    x_1, x_2 = load_pairs(p_x, m_head, half, "evict_first", INTERLEAVED, HEADS, HALF)
    y_1, y_2 = turn_pairs(x_1, x_2, c_1, c_2, s_1, s_2, BACKWARD)
    store_pairs(p_y, m_head, y_1, y_2, half, INTERLEAVED, HEADS, HALF)
    if COPY_REST:
        o_rest = tl.arange(0, REST)[None, :]
        m_rest = m_head & (o_rest < rest)
        value = tl.load(p_x + 2 * half + o_rest, mask=m_rest, other=0.0, eviction_policy="evict_first")
        tl.store(p_y + 2 * half + o_rest, value, mask=m_rest)


@jit(do_not_specialize=["tokens"])
def _rotary_kernel(
    q,
    k,
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
    INTERLEAVED: tl.constexpr,
    SECTIONS: tl.constexpr,
    BACKWARD: tl.constexpr,
    COPY_REST: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """One program turns one token, HEADS heads at a time; ``tokens`` is the length of a sequence."""
    # divided in 32 bits, where a division is cheap
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
        _rotate_heads(
            q + i_batch * q_batch + i_token * q_token,
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
            INTERLEAVED,
            BACKWARD,
            COPY_REST,
            HEADS,
            HALF,
            REST,
        )
    for block in tl.static_range(K_BLOCKS):
        _rotate_heads(
            k + i_batch * k_batch + i_token * k_token,
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
            INTERLEAVED,
            BACKWARD,
            COPY_REST,
            HEADS,
            HALF,
            REST,
        )


class Angles(NamedTuple):
    """Where each token finds its cos and sin.

    Attributes:
        cos: Contiguous last dimension; ``[P, R]`` with ``position_ids``, else ``[axes, batch, T, R]`` by its strides.
        sin: As ``cos``, with the same strides.
        position_ids: ``[axes, batch, T]`` integers, or None.
        layout: ``half`` or ``interleaved``.
        sections: Channels of each of three axes, or None.
        head_axis: 1 for ``[B, H, T, D]``, 2 for ``[B, T, H, D]``.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    position_ids: torch.Tensor | None
    layout: str
    sections: tuple[int, int, int] | None
    head_axis: int


class HeadSettings(NamedTuple):
    """How a program takes the heads of a token.

    Attributes:
        heads: Heads at a time, a power of two.
        q_blocks: Times it does so for q.
        k_blocks: Times it does so for k.
        num_warps: Warps a program.
    """

    heads: int
    q_blocks: int
    k_blocks: int
    num_warps: int


def head_settings(q_heads: int, k_heads: int, pairs: int, at_a_time: int) -> HeadSettings:
    """Settings for heads of ``pairs`` pairs of channels, a power of two, and ``at_a_time`` pairs of all heads."""
    heads = min(max(at_a_time // pairs, 1), next_power_of_2(max(q_heads, k_heads)))
    num_warps = min(max(heads * pairs // (LANES * PAIRS_PER_THREAD), 1), MAX_THREADS // LANES)
    return HeadSettings(heads, cdiv(q_heads, heads), cdiv(k_heads, heads), num_warps)


def token_settings(q_heads: int, k_heads: int, pairs: int) -> HeadSettings:
    """Settings for a program that takes all heads of a token."""
    least = next_power_of_2((q_heads + k_heads) * pairs) // MAX_BLOCKS
    return head_settings(q_heads, k_heads, pairs, min(max(PAIRS, least), MAX_THREADS * PAIRS_PER_THREAD))


@remembered
def _launch(
    q_shape: torch.Size,
    k_heads: int,
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    q_out_strides: tuple[int, ...],
    k_out_strides: tuple[int, ...],
    turned: int,
    cos_strides: tuple[int, ...],
    position_strides: tuple[int, ...] | None,
    layout: str,
    sections: tuple[int, int, int] | None,
    head: int,
    backward: bool,
    inplace: bool,
) -> Launch:
    token = 3 - head
    half = turned // 2
    rest = q_shape[-1] - turned
    block = next_power_of_2(half)
    settings = token_settings(q_shape[head], k_heads, block)
    first, second, _ = sections or (0, 0, 0)
    strides = {
        f"{name}_{axis}": by[at]
        for name, by in (("q", q_strides), ("k", k_strides), ("qo", q_out_strides), ("ko", k_out_strides))
        for axis, at in (("batch", 0), ("head", head), ("token", token))
    }
    table = position_strides is not None
    return Launch(
        _rotary_kernel,
        (q_shape[0] * q_shape[token],),
        ("q", "k", "q_out", "k_out", "cos", "sin", "position_ids"),
        tokens=q_shape[token],
        q_heads=q_shape[head],
        k_heads=k_heads,
        half=half,
        rest=rest,
        **strides,
        cos_axis=0 if table else cos_strides[0],
        cos_batch=0 if table else cos_strides[1],
        cos_row=cos_strides[-2],
        position_axis=position_strides[0] if position_strides is not None else 0,
        position_batch=position_strides[1] if position_strides is not None else 0,
        position_token=position_strides[2] if position_strides is not None else 0,
        section_1=first,
        section_2=first + second,
        INTERLEAVED=layout == "interleaved",
        SECTIONS=sections is not None,
        BACKWARD=backward,
        COPY_REST=rest > 0 and not inplace,
        Q_BLOCKS=settings.q_blocks,
        K_BLOCKS=settings.k_blocks,
        HEADS=settings.heads,
        HALF=block,
        REST=next_power_of_2(rest),
        num_warps=settings.num_warps,
    )


def rotary_launch(
    q: torch.Tensor, k: torch.Tensor, angles: Angles, *, backward: bool = False, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on q and k, or, with ``backward``, on their gradients. For hand-written backward passes."""
    if not inplace:
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (q, k) if inplace else (torch.empty_like(q), torch.empty_like(k))
    head, cos, positions = angles.head_axis, angles.cos, angles.position_ids
    if q.shape[0] * q.shape[3 - head]:
        launch = _launch(
            q.shape,
            k.shape[head],
            q.stride(),
            k.stride(),
            q_out.stride(),
            k_out.stride(),
            cos.shape[-1],
            cos.stride(),
            None if positions is None else positions.stride(),
            angles.layout,
            angles.sections,
            head,
            backward,
            inplace,
        )
        launch(q, k, q_out, k_out, cos, angles.sin, positions)
    return q_out, k_out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, angles: Angles, inplace: bool):  # type: ignore[override]
        ctx.save_for_backward(angles.cos, angles.sin, angles.position_ids)
        ctx.options = angles[3:]
        q_out, k_out = rotary_launch(q, k, angles, inplace=inplace)
        if inplace:
            # A producer that kept q or k for its own backward must notice that the values are gone.
            torch.autograd.graph.increment_version((q, k))
            return q_out.detach(), k_out.detach()
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq, dk):  # type: ignore[override]
        dq, dk = rotary_launch(dq, dk, Angles(*ctx.saved_tensors, *ctx.options), backward=True)
        return dq, dk, None, None


def make_angles(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    position_ids: torch.Tensor | None = None,
    sections: Sequence[int] | None = None,
    head_axis: int = 1,
) -> Angles:
    """Check the arguments of ``rotary`` and bring cos, sin and position ids into the form that the kernel reads."""
    require_floating("rotary", q=q, k=k, cos=cos, sin=sin)
    require_same_device("rotary", q=q, k=k, cos=cos, sin=sin, position_ids=position_ids)
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}", where="argument layout of rotary", hint="half or interleaved")
    if head_axis not in (1, 2):
        raise ConfigError(f"the heads lie on axis 1 or 2, not {head_axis}", where="argument head_axis of rotary")
    if q.dim() != 4 or k.dim() != 4:
        raise ConfigError("rotary needs q and k with four dimensions", where=f"q {tuple(q.shape)}, k {tuple(k.shape)}")
    batch, length, width = q.shape[0], q.shape[3 - head_axis], q.shape[3]
    expected = list(q.shape)
    expected[head_axis] = k.shape[head_axis]
    require_shape("rotary", "k", k, tuple(expected))
    if q.dtype != k.dtype:
        raise ArgumentError(f"q is {q.dtype} and k is {k.dtype}", where="arguments q and k of rotary")
    require_shape("rotary", "sin", sin, tuple(cos.shape))
    if cos.requires_grad or sin.requires_grad:
        raise UnsupportedError("rotary gives no gradient for cos and sin", hint="detach them")
    turned = cos.shape[-1]
    if turned % 2 or turned > width:
        raise ConfigError(f"cos has {turned} channels and the heads have {width}", where="argument cos of rotary")
    if sections is not None and (len(sections) != 3 or sum(sections) != turned // 2):
        raise ConfigError(
            f"three sections must add up to {turned // 2} and are {tuple(sections)}",
            where="argument sections of rotary",
        )
    axes = 1 if sections is None else 3
    shapes = [(axes, n, length) for n in {1, batch}] if axes == 3 else [(length,), *((n, length) for n in {1, batch})]
    table = cos if position_ids is None else position_ids
    given = tuple(table.shape[:-1]) if position_ids is None else tuple(table.shape)
    name = "cos" if position_ids is None else "position_ids"
    if given not in shapes:
        raise ConfigError(
            f"rotary needs {name} of leading shape {' or '.join(map(str, shapes))} and got {given}",
            where=f"argument {name} of rotary",
        )
    if position_ids is not None and cos.dim() != 2:
        raise ConfigError(
            f"with position_ids, cos is a table [positions, R], not {tuple(cos.shape)}", where="argument cos of rotary"
        )
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    if position_ids is None:
        cos, sin = (t.expand(axes, batch, length, turned) for t in (cos, sin))
    else:
        position_ids = position_ids.expand(axes, batch, length)
    parts = None if sections is None else (sections[0], sections[1], sections[2])
    return Angles(cos, sin, position_ids, layout, parts, head_axis)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: Literal["half", "interleaved"] = "half",
    position_ids: torch.Tensor | None = None,
    sections: Sequence[int] | None = None,
    head_axis: int = 1,
    inplace: bool = False,
    backend: dispatch.Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding ``x * cos + rotate(x) * sin`` of q and k.

    Args:
        q: ``[B, H, T, D]`` or, with ``head_axis=2``, ``[B, T, H, D]``; float32, float16 or bfloat16 (also float64 on
            the reference). Any strides with a contiguous last dimension are read in place.
        k: Like q, with its own number of heads.
        cos: ``[T, R]``, ``[1, T, R]`` or ``[B, T, R]``, any floating dtype; or a table ``[P, R]`` with
            ``position_ids``. ``R`` is even and at most D: the channels beyond R pass unchanged (partial rotary). All R
            channels are read, in the layout's order, as transformers gives them. With ``sections``, ``[3, 1 or B, T,
            R]``.
        sin: Like cos.
        layout: ``"half"`` turns channel ``i`` with ``i + R/2`` (Llama), ``"interleaved"`` ``2 i`` with ``2 i + 1``
            (GLM, Cohere).
        position_ids: ``[T]``, ``[1, T]`` or ``[B, T]`` integers in ``[0, P)``, which restart at each document of a
            packed row; ``[3, 1 or B, T]`` with ``sections``. Not range-checked on a GPU.
        sections: Multi-section rotary: how many of the R/2 frequencies follow the temporal, height and width positions.
        head_axis: Which axis of q and k counts the heads.
        inplace: Overwrite q and k. A producer that saved their values for its backward then fails loudly there.
        backend: See ``dispatch.resolve``.

    Returns:
        Turned q and k in their own dtype, memory layout kept.

    Raises:
        ConfigError: A shape or option is wrong, or ``inplace`` meets strides it cannot write.
        ArgumentError: Dtypes or devices differ.
        UnsupportedError: cos or sin requires a gradient, or ``inplace`` would overwrite a trained leaf.

    Deterministic.
    """
    options = {"layout": layout, "position_ids": position_ids, "sections": sections, "head_axis": head_axis}
    angles = make_angles(q, k, cos, sin, **options)
    if inplace:
        if q.stride(-1) != 1 or k.stride(-1) != 1:
            raise ConfigError("rotary in place needs a contiguous last dimension", where="argument inplace of rotary")
        if torch.is_grad_enabled() and any(x.requires_grad and x.is_leaf for x in (q, k)):
            raise UnsupportedError("rotary cannot overwrite a leaf that requires a gradient", hint="use inplace=False")
    if dispatch.resolve("rotary", q, backend) == "triton":
        return _Rotary.apply(q, k, angles, inplace)
    q_out, k_out = rotary_reference(q, k, cos, sin, **options)
    return (q.copy_(q_out), k.copy_(k_out)) if inplace else (q_out, k_out)


def variants() -> Iterator[Variant]:
    """Forms of the kernel for ahead-of-time compilation."""
    strides = [f"{x}_{axis}" for x in ("q", "k", "qo", "ko") for axis in ("batch", "head", "token")]
    names = ["tokens", "q_heads", "k_heads", "half", "rest", *strides]
    names += ["cos_axis", "cos_batch", "cos_row", "position_axis", "position_batch", "position_token"]
    integers = dict.fromkeys([*names, "section_1", "section_2"], "i32")
    for dtype in ("fp16", "bf16", "fp32"):
        pointers = dict.fromkeys(("q", "k", "q_out", "k_out", "cos", "sin"), f"*{dtype}")
        for form, arguments, flags in (
            ("half", {}, (False, False, False, False)),
            ("half-backward", {}, (False, False, True, False)),
            ("interleaved-partial-positions", {"position_ids": "*i64"}, (True, False, False, True)),
            ("half-sections-positions", {"position_ids": "*i64"}, (False, True, False, False)),
        ):
            constants = dict(zip(("INTERLEAVED", "SECTIONS", "BACKWARD", "COPY_REST"), flags))
            constants |= {"Q_BLOCKS": 2, "K_BLOCKS": 1, "HEADS": 16, "HALF": 64, "REST": 64}
            yield Variant(
                f"rotary-{dtype}-{form}",
                _rotary_kernel,
                pointers | arguments | integers,
                constants if arguments else constants | {"position_ids": None},
                4,
                minimum=bfloat16_minimum(dtype),
                representative=form == "interleaved-partial-positions" and dtype == "bf16",
            )
