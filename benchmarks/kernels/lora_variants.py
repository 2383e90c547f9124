"""Times the ways of adding a low-rank update to a frozen product, piece by piece and whole, on one GPU.

    python benchmarks/kernels/lora_variants.py [--out FILE] [--seconds 240]

For the shapes of Llama-3.1-8B at 8,192 tokens and rank 16: each product with a thin factor by torch and by the Triton
kernels at several launch settings, as a fraction of the copy bandwidth, the activation that adds the adapters around it
beside the separate kernels that it replaces, and the whole layer's forward and backward with either, over the bare
products.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch  # noqa: E402
from timing import copy_bandwidth, timed  # noqa: E402
from workload import DTYPE, RANK, SCALING, randn  # noqa: E402

from pantheraml.kernels import lora_glu, low_rank, projections  # noqa: E402
from pantheraml.kernels.glu import GluSpec, glu_backward, glu_forward  # noqa: E402
from pantheraml.kernels.low_rank import Tile  # noqa: E402

SHAPES = {"q": (4096, 4096), "gate": (14336, 4096), "down": (4096, 14336), "k": (1024, 4096)}
TOKENS = 8192
MILLISECONDS = 20.0
NARROW = (
    low_rank.NARROW,
    Tile(32, 128, 4, 5),
    Tile(64, 256, 4, 3),
    Tile(64, 256, 8, 3),
    Tile(128, 128, 8, 4),
    Tile(64, 64, 4, 6),
    Tile(128, 64, 4, 5),
)
WIDEN = (low_rank.WIDEN[16], Tile(64, 128, 4, 1), Tile(128, 128, 8, 1), Tile(32, 256, 4, 1), Tile(128, 256, 8, 1))
GRADIENTS = (
    low_rank.GRADIENTS[16],
    Tile(32, 512, 8, 3),
    Tile(64, 256, 8, 3),
    Tile(64, 128, 4, 4),
    Tile(16, 512, 4, 4),
    Tile(32, 256, 8, 5),
    Tile(64, 256, 4, 3),
    Tile(16, 256, 4, 6),
)
FORWARD = (lora_glu.FORWARD, Tile(64, 64, 4, 2), Tile(64, 128, 4, 2), Tile(32, 64, 4, 3), Tile(128, 64, 8, 2))
BACKWARD = (
    lora_glu.BACKWARD,
    Tile(32, 64, 4, 2),
    Tile(32, 64, 2, 3),
    Tile(32, 64, 8, 3),
    Tile(64, 64, 4, 3),
    Tile(32, 128, 4, 3),
)
Row = tuple[str, str, Callable[[], Any], int | None]


def pieces(name: str, device: torch.device) -> Iterator[Row]:
    """Name of the piece, of the way, the call, and the bytes it must move."""
    out, width = SHAPES[name]
    x, dy = randn(TOKENS, width, device=device), randn(TOKENS, out, device=device)
    W = randn(out, width, device=device, scale=0.02)
    A, B = (torch.randn(*shape, device=device) * 0.02 for shape in ((RANK, width), (out, RANK)))
    A16, B16 = A.to(DTYPE), B.to(DTYPE)
    thin = randn(TOKENS, RANK, device=device)
    y, dx, s = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(thin)
    dA, dB = torch.empty_like(A), torch.empty_like(B)
    wide_in, wide_out = x.numel() * 2, dy.numel() * 2
    yield "product", "forward", lambda: torch.mm(x, W.t(), out=y), None
    yield "product", "forward onto y", lambda: y.addmm_(x, W.t()), None
    yield "product", "backward", lambda: torch.mm(dy, W, out=dx), None
    yield "product", "backward onto dx", lambda: dx.addmm_(dy, W), None
    yield "x·Aᵀ", "torch", lambda: torch.mm(x, A16.t(), out=s), wide_in
    forms = [(tile, A16, "") for tile in NARROW] + [(NARROW[0], A, " float32 A")]
    for tile, factor, label in forms:
        for splits in (None, 1, 4):
            call = functools.partial(low_rank.narrow, x, factor, tile=tile, splits=splits)
            yield "x·Aᵀ", f"{tuple(tile)} splits={splits}{label}", call, wide_in
    yield "s·Bᵀ", "torch", lambda: torch.addmm(y, thin, B16.t(), beta=0, alpha=SCALING, out=y), wide_out
    for tile in WIDEN:
        yield "s·Bᵀ", f"{tuple(tile)}", lambda tile=tile: low_rank.widen(thin, B16, SCALING, out=y, tile=tile), wide_out
    yield "g·A", "torch", lambda: torch.mm(thin, A16, out=dx), wide_in
    yield "g·A", "kernel", lambda: low_rank.widen(thin, A16.t(), out=dx), wide_in
    yield "dy·B", "torch", lambda: torch.mm(dy, B16, out=s), wide_out
    yield "dyᵀ·s", "torch", lambda: torch.mm(dy.t(), thin, out_dtype=torch.float32), wide_out
    yield "gᵀ·x", "torch", lambda: torch.mm(thin.t(), x, out_dtype=torch.float32), wide_in
    for tile in GRADIENTS:
        for parts in (None, 4, 16):
            label = f"{tuple(tile)} parts={parts}"
            shared = {"tile": tile, "parts": parts}
            both = functools.partial(low_rank.gradients, [dy], [B16], thin, SCALING, thin=s, gradient=dB, **shared)
            yield "dy·B and dyᵀ·s", label, both, wide_out
            yield (
                "gᵀ·x",
                label,
                functools.partial(low_rank.gradients, [x], None, thin, gradient=dA.t(), **shared),
                wide_in,
            )


def activation(device: torch.device) -> Iterator[Row]:
    """The gated activation apart from the adapters around it, and with them; gate and up are of the shape of gate."""
    width = SHAPES["gate"][0]
    gate, up, dout = (randn(TOKENS, width, device=device) for _ in range(3))
    thin, down_thin = randn(TOKENS, 2 * RANK, device=device), randn(TOKENS, RANK, device=device)
    first, second = (torch.randn(width, RANK, device=device) * 0.02 for _ in range(2))
    A, spec = torch.randn(RANK, width, device=device) * 0.02, GluSpec()
    lift = lora_glu.Lift(thin, first, second, SCALING)
    wide = gate.numel() * 2
    out, dA = glu_forward(gate, up, spec), torch.empty_like(A)
    yield "forward apart", "updates", lambda: low_rank.widen_each(thin, [first, second], SCALING), 2 * wide
    yield "forward apart", "activation", lambda: glu_forward(gate, up, spec, out), 3 * wide
    yield "forward apart", "thin product", lambda: low_rank.narrow_parts(out, A, read=0), wide
    for tile in FORWARD:
        for parts in (4, lora_glu.PARTS, 16):
            label = f"{tuple(tile)} parts={parts}"
            call = functools.partial(lora_glu.lora_glu_forward, gate, up, lift, A, spec, tile=tile, parts=parts)
            yield "forward", label, call, 3 * wide
    yield "backward apart", "update", lambda: low_rank.widen(down_thin, A.t(), out=dout), wide
    again = functools.partial(glu_backward, dout, gate, up, spec, dgate=gate, dup=up, out=dout)
    yield "backward apart", "activation, written again", again, 6 * wide
    of_A = functools.partial(low_rank.gradients, [dout], None, down_thin, gradient=dA.t())
    yield "backward apart", "dA", of_A, wide
    for tile in BACKWARD:
        for parts in (None, 4, 8):
            label = f"{tuple(tile)} parts={parts}"
            shared = {"tile": tile, "parts": parts}
            call = functools.partial(lora_glu.lora_glu_backward, dout, gate, up, lift, (down_thin, A), spec, **shared)
            yield "backward", label, call, 5 * wide


def whole(names: list[str], device: torch.device) -> Iterator[Row]:
    """Forward and backward of one or several projections of an input, by torch's thin products and by the kernels."""
    width = SHAPES[names[0]][1]
    x = randn(TOKENS, width, device=device)
    weights = [randn(SHAPES[name][0], width, device=device, scale=0.02) for name in names]
    factors = [(torch.randn(RANK, width, device=device), torch.randn(len(W), RANK, device=device)) for W in weights]
    grads = [randn(TOKENS, len(W), device=device) for W in weights]
    joined = "+".join(names)

    def group(dtype: torch.dtype, *, kernels: bool) -> projections.Group:
        terms = [
            projections.Term(projections.Projection(W), W, None, (A * 0.02).to(dtype), B.to(dtype), SCALING, "auto")
            for W, (A, B) in zip(weights, factors)
        ]
        return projections.Group(terms, projections.joined_A(terms), kernels=kernels)

    def bare_backward() -> None:
        gradient = None
        for grad, W in zip(grads, weights):
            gradient = torch.mm(grad, W) if gradient is None else gradient.addmm_(grad, W)

    yield f"{joined} forward", "bare", lambda: [torch.mm(x, W.t()) for W in weights], None
    yield f"{joined} backward", "bare", bare_backward, None
    for dtype in (torch.float32, DTYPE):
        for kernels in (False, True):
            given = group(dtype, kernels=kernels)
            _, skinny = projections.project(x, x, given)
            way = f"{'kernels' if kernels else 'torch'}, {str(dtype).removeprefix('torch.')} adapters"

            def backward(given: Any = given, trained: bool = True, skinny: Any = skinny) -> None:
                needs = [projections.Needs(bias=False, A=trained, B=trained)] * len(given.terms)
                projections.project_backward(grads, x, skinny, given, needs, need_x=True, need_u=False)

            yield f"{joined} forward", way, functools.partial(projections.project, x, x, given), None
            yield f"{joined} backward", f"{way}, dx only", functools.partial(backward, trained=False), None
            yield f"{joined} backward", f"{way}, dx dA dB", backward, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="markdown file to write")
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after this time; default 240")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    bandwidth = copy_bandwidth(device)
    about = f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}"
    lines = [f"{about}; copy {bandwidth / 1e12:.2f} TB/s; T = {TOKENS}, r = {RANK}.", ""]
    lines += ["| shape | piece | way | µs | of copy | over bare | host µs |", "|---|---|---|---|---|---|---|"]
    sources = [
        (names[0], whole(names, device)) for names in (["q"], ["gate"], ["down"], ["q", "k", "k"], ["gate", "gate"])
    ]
    sources += [("gate, up", activation(device)), *((name, pieces(name, device)) for name in SHAPES)]
    bare: dict[str, float] = {}
    for shape, rows in sources:
        for piece, way, call, moved in rows:
            if time.monotonic() - started > options.seconds:
                lines.append(f"| | stopped after {options.seconds:.0f} s | | | | | |")
                break
            try:
                milliseconds, host = timed(call, device, MILLISECONDS)
            except Exception as error:  # noqa: BLE001 - settings that a chip cannot take are a result
                lines.append(f"| {shape} | {piece} | {way} | {type(error).__name__}: {str(error)[:80]} | | | |")
                continue
            share = f"{moved / (milliseconds * 1e-3) / bandwidth:.0%}" if moved else ""
            if way == "bare":
                bare[piece] = milliseconds
            over = f"{milliseconds / bare[piece] - 1:+.1%}" if piece in bare and way != "bare" else ""
            lines.append(f"| {shape} | {piece} | {way} | {milliseconds * 1e3:.1f} | {share} | {over} | {host:.0f} |")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if options.out is not None:
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
