"""A gated activation with what the adapters of the projections around it add, in one pass over the wide tensors.

With the bases' products gate and up [T, I], their adapters' thin products t [T, 2 r] and factors B [I, r], or one t and
the halves of one B where one projection makes both, and the factor A [r', I] of the projection that follows::

    g = gate + s * t_g @ B_g.T        u = up + s * t_u @ B_u.T
    out = act(g) * (u + up_offset)    sums = out @ A.T

and back, with the thin gradient t' [T, r'] of that projection, whose base gives dout::

    d = dout + t' @ A       dgate = d * act'(g) * (u + up_offset)       dup = d * act(g)       dA = t'.T @ out

Neither the sums with the adapters' updates nor, in the backward, out are written to memory. Everything between loads
and stores is float32, but for the operands of the thin products, which have the dtype of gate. Partial sums of programs
are float32, kept apart and added in a fixed order: the same bits in every run on the same chip. (The sums with dgate
and dup, in the same pass, would take as long as one of their own: registers run out.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ._lora_glu_kernels import lora_glu_backward_kernel, lora_glu_forward_kernel
from ._triton import Launch, remembered
from ._variants import Variant, bfloat16_minimum
from .glu import GluSpec
from .low_rank import DTYPES, MIN_RANK, MOST_SHARED, SHARED_RESERVE, Tile, combination, padded_rank
from .reference.glu import ACTIVATIONS
from .utils import LEAST_SHARED, cdiv, next_power_of_2, processors_of, shared_memory

# With larger ranks these tiles run out of registers.
MAX_RANK = 32
FORWARD = Tile(64, 64, 4, 3)
BACKWARD = Tile(32, 64, 4, 3)
# Registers of a thread with which an SM holds four programs of the backward; an option of the CUDA backend alone.
BACKWARD_PROGRAMS = 4
REGISTERS = 128 if torch.version.cuda else None
# Programs that share a sum over columns in the forward, and over rows in the backward, at most.
PARTS = 8
MOST_PARTS = 12


class Lift(NamedTuple):
    """What adapters add to gate and up.

    Attributes:
        thin: [T, 2 r], the thin products of gate and of up, or [T, r] where they share one; in the dtype of gate,
            contiguous rows.
        gate: [I, r].
        up: [I, r] with the dtype and the strides of the former.
        scaling: Factor s of both.
    """

    thin: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    scaling: float

    @property
    def up_thin(self) -> int:
        """Where the columns of up's thin product begin."""
        return self.thin.shape[1] - self.gate.shape[1]


def serves(gate: torch.Tensor, rank: int, down_rank: int) -> bool:
    """Whether the kernels take gate and up such as this [T, I] and these ranks; a ``down_rank`` of 0 is none."""
    return gate.dtype in DTYPES and 0 < rank <= MAX_RANK and down_rank <= MAX_RANK and gate.dim() == 2


def _stages(tile: Tile, tensors: int, rank: int, limit: int) -> int:
    """As many of the tile's stages as fit into ``limit`` bytes of shared memory, beside what changes its layout."""
    elements = tile.rows * tile.columns
    stage = 2 * (tensors * elements + 3 * max(tile.rows, tile.columns) * rank)
    kept = SHARED_RESERVE + 2 * 3 * tile.columns * rank + 4 * elements
    return max(min(tile.num_stages, (limit - kept) // stage), 1)


def forward_stages(rank: int, limit: int, tile: Tile = FORWARD) -> int:
    """The forward's stages: gate and up stream, and the factors beside them; ``rank`` is the larger padded one."""
    return _stages(tile, 2, 2 * rank, limit)


def backward_stages(rank: int, limit: int, tile: Tile = BACKWARD) -> int:
    """The backward's stages: dout, gate and up stream, and the thin products."""
    return _stages(tile, 3, rank, limit)


def _parts(blocks: int, slots: int, tiles: int) -> int:
    """How many programs share the rows of a block, so that few of the chip's slots are empty towards the end."""

    def filled(parts: int) -> float:
        programs = blocks * parts
        # A part costs its sums besides.
        return programs / (cdiv(programs, slots) * slots) - 0.004 * parts

    return max(range(1, min(MOST_PARTS, tiles) + 1), key=filled)


class _Sizes(NamedTuple):
    """What both launches depend on."""

    rows: int
    width: int
    rank: int
    down_rank: int
    scaling: float
    gate_stride: int
    up_stride: int
    thin_stride: int
    up_thin: int
    factor_width: int
    factor_rank: int
    down_stride: int
    spec: GluSpec

    @classmethod
    def of(cls, gate: torch.Tensor, up: torch.Tensor, lift: Lift, down: torch.Tensor | None, spec: GluSpec) -> _Sizes:
        (rows, width), rank = gate.shape, lift.gate.shape[1]
        factor_width, factor_rank = lift.gate.stride()
        return cls(
            rows,
            width,
            rank,
            0 if down is None else down.shape[0],
            lift.scaling,
            gate.stride(0),
            up.stride(0),
            lift.thin.stride(0),
            lift.up_thin,
            factor_width,
            factor_rank,
            0 if down is None else down.stride(0),
            spec,
        )

    @property
    def largest(self) -> int:
        """The larger of the padded ranks."""
        return max(padded_rank(self.rank), padded_rank(self.down_rank))

    def columns(self, tile: Tile) -> int:
        """Those of a program."""
        return min(tile.columns, max(next_power_of_2(self.width), MIN_RANK))

    def arguments(self, tile: Tile, stages: int) -> dict[str, Any]:
        """As keyword arguments of either kernel's launch."""
        sizes = self._asdict()
        del sizes["spec"]
        return sizes | {
            **self.spec.arguments(),
            "ROWS": tile.rows,
            "COLUMNS": self.columns(tile),
            "RANK": padded_rank(self.rank),
            "DOWN_RANK": padded_rank(self.down_rank),
            "STAGES": stages,
            "num_warps": tile.num_warps,
            "num_stages": stages,
        }


@remembered
def _forward(sizes: _Sizes, tile: Tile, parts: int, device: torch.device) -> tuple[Launch, int]:
    """The launch and how many parts it leaves."""
    blocks = cdiv(sizes.width, sizes.columns(tile))
    tiles = cdiv(blocks, parts)
    parts = cdiv(blocks, tiles)
    launch = Launch(
        lora_glu_forward_kernel,
        (cdiv(sizes.rows, tile.rows), parts),
        ("gate", "up", "thin", "gate_factor", "up_factor", "down_factor", "out", "sums"),
        tiles=tiles,
        out_stride=sizes.width,
        **sizes.arguments(tile, forward_stages(sizes.largest, shared_memory(device), tile)),
    )
    return launch, parts


def lora_glu_forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    lift: Lift,
    down: torch.Tensor | None,
    spec: GluSpec,
    *,
    keep: bool = True,
    tile: Tile = FORWARD,
    parts: int = PARTS,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The activation, and its thin product with the factor that follows.

    Args:
        gate: [T, I], float16 or bfloat16, contiguous rows: the base's product alone.
        up: The same.
        lift: What is added to them.
        down: [r', I], contiguous rows, cast to the dtype of gate as it is read; or None.
        spec: The activation.
        keep: Whether the activation is wanted.
        tile: Launch settings.
        parts: Programs that share a sum over I, at most.

    Returns:
        [T, I], None unless kept; and [parts, T, r'] whose sum is ``out @ down.T``: float32, or one part in the dtype of
        gate; None without ``down``.
    """
    sizes = _Sizes.of(gate, up, lift, down, spec)
    launch, parts = _forward(sizes, tile, parts, gate.device)
    out = torch.empty((sizes.rows, sizes.width), dtype=gate.dtype, device=gate.device) if keep else None
    sums = None
    if down is not None:
        dtype = gate.dtype if parts == 1 else torch.float32
        sums = torch.empty((parts, sizes.rows, sizes.down_rank), dtype=dtype, device=gate.device)
    launch(gate, up, lift.thin, lift.gate, lift.up, down, out, sums)
    return out, sums


@remembered
def _backward(
    sizes: _Sizes, dout_stride: int, down_thin_stride: int, tile: Tile, parts: int | None, device: torch.device
) -> tuple[Launch, int]:
    """As ``_forward``."""
    blocks, tiles = cdiv(sizes.width, sizes.columns(tile)), cdiv(sizes.rows, tile.rows)
    if parts is None:
        parts = _parts(blocks, BACKWARD_PROGRAMS * processors_of(device), tiles)
    tiles = cdiv(tiles, parts)
    parts = cdiv(cdiv(sizes.rows, tile.rows), tiles)
    launch = Launch(
        lora_glu_backward_kernel,
        (blocks, parts),
        ("dout", "gate", "up", "thin", "gate_factor", "up_factor", "down_thin", "down_factor", "sums"),
        tiles=tiles,
        dout_stride=dout_stride,
        down_thin_stride=down_thin_stride,
        **sizes.arguments(tile, backward_stages(sizes.largest, shared_memory(device), tile)),
        **({"maxnreg": REGISTERS} if REGISTERS else {}),
    )
    return launch, parts


def lora_glu_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    lift: Lift,
    down: tuple[torch.Tensor, torch.Tensor] | None,
    spec: GluSpec,
    *,
    dtype: torch.dtype | None = None,
    tile: Tile = BACKWARD,
    parts: int | None = None,
) -> torch.Tensor | None:
    """Gate and up become their gradients.

    Args:
        dout: [T, I], contiguous rows: the gradient of the activation that comes through the base which follows.
        gate: As in the forward; overwritten.
        up: As in the forward; overwritten.
        lift: As in the forward.
        down: The thin gradient t' [T, r'] of the projection that follows, of the dtype of gate with contiguous rows,
            and its factor A [r', I] as in the forward; or None.
        spec: The activation.
        dtype: Of the gradient of A. Default None: that of A.
        tile: Launch settings.
        parts: Programs that share a sum over T. Default None: as many as fill the GPU best.

    Returns:
        The gradient of A, [r', I]; None without ``down``.
    """
    thin, A = down or (None, None)
    sizes = _Sizes.of(gate, up, lift, A, spec)
    launch, parts = _backward(sizes, dout.stride(0), 0 if thin is None else thin.stride(0), tile, parts, gate.device)
    if A is None:
        launch(dout, gate, up, lift.thin, lift.gate, lift.up, None, None, None)
        return None
    rank, width = A.shape
    sums = torch.empty((parts, width, rank), dtype=torch.float32, device=gate.device)
    launch(dout, gate, up, lift.thin, lift.gate, lift.up, thin, A, sums)
    grad = torch.empty(A.shape, dtype=dtype or A.dtype, device=A.device)
    combine = combination(sizes.rows, rank, None, (), grad.t().stride(), 0, parts, width, 1.0)
    combine(sums, None, grad.t())
    return grad


def variants() -> Iterator[Variant]:
    """The compiled forms, for compilation ahead of time: with the least and the most shared memory of any chip."""
    sizes = dict.fromkeys(("rows", "width", "rank", "down_rank", "tiles"), "i32")
    floats = dict.fromkeys(("scaling", "limit", "up_offset"), "fp32")
    strides = ("gate_stride", "up_stride", "thin_stride", "up_thin", "factor_width", "down_stride")
    forward, backward = (*strides, "out_stride"), (*strides, "dout_stride", "down_thin_stride")
    shared = ((LEAST_SHARED, ("gfx90a", "gfx942")), (MOST_SHARED, ()))
    kinds: list[tuple[str, str, int]] = [(kind, "bf16", MIN_RANK) for kind in ACTIVATIONS]
    kinds += [("silu", "fp16", MIN_RANK), ("silu", "fp16", MAX_RANK), ("silu", "bf16", MAX_RANK)]
    for activation, dtype, rank in kinds:
        p, least = f"*{dtype}", bfloat16_minimum(dtype)
        # Where ranks are large, adapters in float32 as well.
        factor = p if rank == MIN_RANK else "*fp32"
        wide: dict[str, str] = dict.fromkeys(("gate", "up", "thin"), p) | {"sums": "*fp32"} | sizes | floats
        wide |= dict.fromkeys(("gate_factor", "up_factor", "down_factor"), factor)
        chosen = {"alpha": None, "factor_rank": 1, "ACTIVATION": activation, "HAS_LIMIT": False}
        chosen |= {"RANK": rank, "DOWN_RANK": rank}
        for limit, amd in shared if activation == "silu" else shared[:1]:
            for name, kernel, more, integers, tile, stages in (
                ("forward", lora_glu_forward_kernel, {"out": p}, forward, FORWARD, forward_stages),
                (
                    "backward",
                    lora_glu_backward_kernel,
                    {"dout": p, "down_thin": p},
                    backward,
                    BACKWARD,
                    backward_stages,
                ),
            ):
                count = stages(rank, limit)
                yield Variant(
                    f"lora_glu_{name}-{dtype}-{activation}-r{rank}-{limit // 1024}k",
                    kernel,
                    wide | more | dict.fromkeys(integers, "i32"),
                    chosen | {"ROWS": tile.rows, "COLUMNS": tile.columns, "STAGES": count},
                    tile.num_warps,
                    count,
                    minimum=least if amd else 90,
                    amd=amd,
                    representative=(activation, dtype, rank) == ("silu", "bf16", MIN_RANK) and amd != (),
                )
