"""One step of AdamW whose two states are kept in 8 bits, block by block, as bitsandbytes keeps them.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", https://arxiv.org/abs/2110.02861. Everything between
the load and the store is float32. A program holds whole blocks, so that a state is decoded, updated and encoded in
registers: 10 bytes are moved for a 16-bit parameter. No sum is formed: deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..errors import ArgumentError, ConfigError
from . import dispatch
from ._triton import jit, on_device, tl
from ._variants import Variant, bfloat16_minimum
from .reference.adamw_8bit import BLOCK, TINY, Codebook, Scalars, codebook
from .reference.adamw_8bit import adamw_8bit as adamw_8bit_reference
from .utils import cdiv, require_floating, require_same_device, require_shape

__all__ = ["BLOCK", "Codebook", "Scalars", "adamw_8bit", "codebook"]

# Blocks a program. A warp holds a block, eight elements a thread: one 16-byte load of a 2-byte dtype.
ROWS = 4
NUM_WARPS = 4
# Elements from which a parameter fills the GPU by itself, and need not be looked up in a table.
ALONE = 1 << 23


@jit
def _nearest(x, floors, SIGNED: tl.constexpr, TOP: tl.constexpr):
    """The code of ``x``, a state in units of its block's scale: the last whose floor is below ``x``.

    In a decade of the dynamic map the values are equally spaced, ten times as far apart as half as many are in the
    decade below. So how many values of its sign lie up to ``|x|`` is a concave function of straight pieces, the least
    of the decades' lines. The lines lie a little higher than that, up to half a step in the highest decade, whose
    last value is half a step below 1: what they say is the code or the next one, and one comparison tells which.
    ``TOP`` is how many values have one sign.
    """
    magnitude = tl.abs(x)
    # The highest decade has half of the values, from a tenth to 1, after the other half.
    slope = TOP / 1.8
    start = TOP / 2.25 + 0.515625
    count = magnitude * slope + (start - 1.0)
    # The lowest decade of the signed map is one value, which the line above leaves right.
    for _ in tl.static_range(5 if SIGNED else 6):
        slope = slope * 5.0
        start = start * 0.5
        count = tl.minimum(count, magnitude * slope + (start - 1.0))
    if SIGNED:
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        count = (count.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True) + TOP
    code = count.to(tl.int32)
    return code - (x <= tl.load(floors + code, eviction_policy="evict_last")).to(tl.int32)


@jit
def _adamw_8bit_kernel(
    table,
    owners,
    p,
    gradient,
    state1,
    state2,
    absmax1,
    absmax2,
    values1,
    values2,
    floors1,
    floors2,
    discard,
    count,
    beta1,
    beta2,
    gain1,
    gain2,
    rate,
    eps,
    keep,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TINY: tl.constexpr,
):
    """``m = beta1 m + gain1 g; v = beta2 v + gain2 g²; p = keep p - rate m / (sqrt(v) + eps)`` of ``ROWS`` blocks.

    With a table, the blocks are those of the parameter in row ``owners[program]``, see ``Table``, and the pointers that
    were given tell only their types. Where ``discard`` is not zero, everything stays as it is.
    """
    i_program = tl.program_id(0).to(tl.int64)
    if table is not None:
        row = table + tl.load(owners + i_program).to(tl.int64) * 8
        p = tl.load(row).to(p.dtype)
        gradient = tl.load(row + 1).to(gradient.dtype)
        state1 = tl.load(row + 2).to(state1.dtype)
        state2 = tl.load(row + 3).to(state2.dtype)
        absmax1 = tl.load(row + 4).to(absmax1.dtype)
        absmax2 = tl.load(row + 5).to(absmax2.dtype)
        count = tl.load(row + 6)
        i_program -= tl.load(row + 7)
        if ALIGNED:
            p = tl.multiple_of(p, 16)
            gradient = tl.multiple_of(gradient, 16)
            state1 = tl.multiple_of(state1, 16)
            state2 = tl.multiple_of(state2, 16)
            count = tl.multiple_of(count, 16)
    if discard is not None:
        count = tl.where(tl.load(discard) == 0.0, count, 0)
        if ALIGNED:
            count = tl.multiple_of(count, 16)
    i_block = i_program * ROWS
    i_start = i_block * BLOCK
    o_row = tl.arange(0, ROWS)
    offsets = o_row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = offsets < count - i_start
    m_row = o_row * BLOCK < count - i_start

    # What lies beyond the end counts as not finite, which leaves it out of everything.
    g = tl.load(gradient + i_start + offsets, mask=mask, other=float("inf")).to(tl.float32)
    w = tl.load(p + i_start + offsets, mask=mask, other=0.0).to(tl.float32)
    c_1 = tl.load(state1 + i_start + offsets, mask=mask, other=0).to(tl.int32)
    c_2 = tl.load(state2 + i_start + offsets, mask=mask, other=0).to(tl.int32)
    s_1 = tl.load(absmax1 + i_block + o_row, mask=m_row, other=0.0)
    s_2 = tl.load(absmax2 + i_block + o_row, mask=m_row, other=0.0)
    m = tl.load(values1 + c_1, eviction_policy="evict_last") * s_1[:, None]
    v = tl.load(values2 + c_2, eviction_policy="evict_last") * s_2[:, None]

    finite = tl.abs(g) < float("inf")
    m = tl.where(finite, beta1 * m + gain1 * g, 0.0)
    v = tl.where(finite, beta2 * v + gain2 * g * g, 0.0)
    updated = w * keep - rate * (m / (tl.sqrt(v) + eps))
    tl.store(p + i_start + offsets, tl.where(finite, updated, w).to(p.dtype.element_ty), mask=mask)

    s_1 = tl.max(tl.abs(m), axis=1)
    s_2 = tl.max(v, axis=1)
    tl.store(absmax1 + i_block + o_row, s_1, mask=m_row)
    tl.store(absmax2 + i_block + o_row, s_2, mask=m_row)
    c_1 = _nearest(m * tl.div_rn(1.0, tl.maximum(s_1, TINY))[:, None], floors1, SIGNED=True, TOP=128)
    c_2 = _nearest(v * tl.div_rn(1.0, tl.maximum(s_2, TINY))[:, None], floors2, SIGNED=False, TOP=256)
    tl.store(state1 + i_start + offsets, c_1.to(tl.uint8), mask=mask)
    tl.store(state2 + i_start + offsets, c_2.to(tl.uint8), mask=mask)


class Update(NamedTuple):
    """A parameter and what its update needs; see ``adamw_8bit``."""

    p: torch.Tensor
    gradient: torch.Tensor
    states: tuple[torch.Tensor, torch.Tensor]
    absmax: tuple[torch.Tensor, torch.Tensor]


class Table(NamedTuple):
    """Where many parameters lie, for one launch.

    Attributes:
        key: What the table was made from: as long as it is the same, the table is.
        rows: ``[parameters, 8]`` int64: addresses of parameter, gradient, states and scales, the number of elements,
            and the first program.
        owners: ``[programs]`` int32, the row of each.
        aligned: Whether all addresses and numbers are multiples of 16.
    """

    key: tuple[int, ...]
    rows: torch.Tensor
    owners: torch.Tensor
    aligned: bool

    @classmethod
    def of(cls, updates: Sequence[Update], last: Table | None = None) -> Table:
        """The table of these parameters: ``last`` where it is theirs."""
        found = [ROWS]
        for p, gradient, (state1, state2), (absmax1, absmax2) in updates:
            pointers = (tensor.data_ptr() for tensor in (p, gradient, state1, state2, absmax1, absmax2))
            found += [*pointers, p.numel()]
        key = tuple(found)
        if last is not None and last.key == key:
            return last
        rows = torch.tensor(key[1:], dtype=torch.int64).view(-1, 7)
        programs = -(-rows[:, 6] // (ROWS * BLOCK))
        device = updates[0].p.device
        if last is not None and (last.key[0], *last.key[7::7]) == (ROWS, *key[7::7]):
            owners = last.owners
        else:
            numbers = torch.arange(len(rows), dtype=torch.int32)
            owners = numbers.repeat_interleave(programs).to(device, non_blocking=True)
        first = programs.cumsum(0) - programs
        rows = torch.cat([rows, first[:, None]], 1).to(device, non_blocking=True)
        return cls(key, rows, owners, all(value % 16 == 0 for value in key[1:]))


def _launch(
    update: Update,
    books: tuple[Codebook, Codebook],
    scalars: Scalars,
    programs: int,
    table: Table | None = None,
    discard: torch.Tensor | None = None,
) -> None:
    p, gradient, (state1, state2), (absmax1, absmax2) = update
    with on_device(p):
        _adamw_8bit_kernel[(programs,)](
            table=table.rows if table is not None else None,
            owners=table.owners if table is not None else None,
            p=p,
            gradient=gradient,
            state1=state1,
            state2=state2,
            absmax1=absmax1,
            absmax2=absmax2,
            values1=books[0].values,
            values2=books[1].values,
            floors1=books[0].floors,
            floors2=books[1].floors,
            discard=discard,
            count=p.numel() if table is None else None,
            **scalars.arguments(),
            ALIGNED=table is not None and table.aligned,
            ROWS=ROWS,
            BLOCK=BLOCK,
            TINY=TINY,
            num_warps=NUM_WARPS,
        )


def adamw_8bit_step(
    update: Update, books: tuple[Codebook, Codebook], scalars: Scalars, discard: torch.Tensor | None = None
) -> None:
    """Launch the kernel for one parameter, with arguments that are right; see ``adamw_8bit_steps``."""
    if update.p.numel():
        _launch(update, books, scalars, cdiv(update.p.numel(), ROWS * BLOCK), None, discard)
        torch.autograd.graph.increment_version(update.p)


def adamw_8bit_steps(
    updates: Sequence[Update],
    books: tuple[Codebook, Codebook],
    scalars: Scalars,
    last: Table | None = None,
    discard: torch.Tensor | None = None,
) -> Table | None:
    """Update many parameters in one launch, except large ones, which get one each.

    Args:
        updates: Parameters of one dtype with gradients of one dtype, all on one device; see ``adamw_8bit``.
        books: As in ``adamw_8bit``.
        scalars: As in ``adamw_8bit``.
        last: What the call before returned, which saves the table where nothing moved.
        discard: A float32 number on the device: where it is not zero, everything stays as it is. Default None.

    Returns:
        The table to give to the next call.
    """
    together = [update for update in updates if 0 < update.p.numel() < ALONE]
    for update in updates:
        if update.p.numel() >= ALONE:
            adamw_8bit_step(update, books, scalars, discard)
    if not together:
        return None
    table = Table.of(together, last)
    _launch(together[0], books, scalars, len(table.owners), table, discard)
    torch.autograd.graph.increment_version([update.p for update in together])
    return table


def adamw_8bit(
    p: torch.Tensor,
    gradient: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    absmax: tuple[torch.Tensor, torch.Tensor],
    books: tuple[Codebook, Codebook],
    scalars: Scalars,
    *,
    backend: dispatch.Backend = "auto",
) -> None:
    """One step of AdamW in place, with both moments in 8 bits a number and a float32 scale a block of 256.

    With the moments ``m`` and ``v`` decoded: ``m = beta1 m + (1 - beta1) g``, ``v = beta2 v + (1 - beta2) g²``, ``p =
    (1 - lr * weight_decay) p - lr m' / (sqrt(v') + eps)``, where ``m'`` and ``v'`` are corrected for their bias. Then
    both are encoded: a block's scale is its largest absolute value, a code that of the nearest value of the codebook,
    and a negative ``m`` never gets the code of zero. Where a gradient is not finite, the moments become zero and the
    parameter stays.

    Args:
        p: Parameter, contiguous, float32, float16 or bfloat16.
        gradient: Of the shape of ``p``, contiguous, any of these dtypes.
        states: Codes of ``m`` and ``v``: uint8, contiguous, of the shape of ``p``.
        absmax: Scales of ``m`` and ``v``: float32 ``[ceil(numel / 256)]``.
        books: Codebooks of ``m`` (signed) and ``v`` (unsigned), see ``codebook``.
        scalars: The numbers of the step, see ``Scalars.of``.
        backend: See ``dispatch.resolve``.

    Raises:
        ConfigError: A shape is wrong, or a tensor is not contiguous.
        ArgumentError: A dtype is wrong, or the devices differ.

    Deterministic.
    """
    op = "adamw_8bit"
    blocks = cdiv(p.numel(), BLOCK)
    require_floating(op, p=p, gradient=gradient)
    tensors = {"p": p, "gradient": gradient}
    require_shape(op, "gradient", gradient, tuple(p.shape))
    for i, (state, scale, book) in enumerate(zip(states, absmax, books, strict=True)):
        tensors |= {f"states[{i}]": state, f"absmax[{i}]": scale, f"books[{i}]": book.values}
        require_shape(op, f"states[{i}]", state, tuple(p.shape))
        require_shape(op, f"absmax[{i}]", scale, (blocks,))
        if state.dtype != torch.uint8 or scale.dtype != torch.float32:
            raise ArgumentError(
                f"{op} needs uint8 states with float32 scales and got {state.dtype} with {scale.dtype}",
                where=f"arguments states[{i}] and absmax[{i}] of {op}",
            )
    require_same_device(op, **tensors)
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ConfigError(
                f"{op} writes in place and needs contiguous tensors",
                where=f"argument {name} of {op}, strides {tuple(tensor.stride())}",
                hint="call .contiguous() on it and keep the result",
            )
    if dispatch.resolve(op, p, backend) == "reference":
        adamw_8bit_reference(p, gradient, states, absmax, books, scalars)
    else:
        adamw_8bit_step(Update(p, gradient, states, absmax), books, scalars)


def variants() -> Iterator[Variant]:
    """Forms of the kernel for ahead-of-time compilation."""
    floats = ("absmax1", "absmax2", "values1", "values2", "floors1", "floors2")
    scalars = ("beta1", "beta2", "gain1", "gain2", "rate", "eps", "keep")
    common = (
        dict.fromkeys(("state1", "state2"), "*u8") | dict.fromkeys(floats, "*fp32") | dict.fromkeys(scalars, "fp32")
    )
    table = {"table": "*i64", "owners": "*i32"}
    forms = (
        ("one", {"count": "i32", "discard": "*fp32"}, {"table": None, "owners": None, "ALIGNED": False}),
        ("table", table | {"discard": "*fp32"}, {"count": None, "ALIGNED": True}),
        ("table-unaligned", table, {"count": None, "discard": None, "ALIGNED": False}),
    )
    for dtype in ("fp16", "bf16", "fp32"):
        for form, arguments, constants in forms:
            yield Variant(
                f"adamw_8bit-{dtype}-{form}",
                _adamw_8bit_kernel,
                {"p": f"*{dtype}", "gradient": f"*{dtype}"} | common | arguments,
                constants | {"ROWS": ROWS, "BLOCK": BLOCK, "TINY": TINY},
                NUM_WARPS,
                minimum=bfloat16_minimum(dtype),
                representative=dtype == "bf16" and form != "table-unaligned",
            )
