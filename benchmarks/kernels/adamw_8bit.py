"""Times a step of 8-bit AdamW over all matrices of Llama-3.2-1B's layers: PantheraML's and bitsandbytes', on one GPU.

    python benchmarks/kernels/adamw_8bit.py [--dtypes bfloat16 float32] [--tiles 4x4 8x4 8x8] [--layers 16] [--rank 16]

"update" is the update of every matrix, one launch each, and "update together" that of all in one launch; "step" is the
step of the optimizer, of which bitsandbytes waits for the device after every matrix. ``--tiles`` times both updates for
more numbers of blocks and warps a program.
``--rank`` times the steps for the float32 adapters of that rank as well; 0 leaves them out.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch  # noqa: E402
from timing import copy_bandwidth, timed  # noqa: E402

from pantheraml.kernels.reference.adamw_8bit import adamw_8bit as reference  # noqa: E402

# As an attribute of the package, the name means the op.
kernel = importlib.import_module("pantheraml.kernels.adamw_8bit")

SHAPES = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192))
MILLISECONDS = 200.0
OPTIONS = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "optim_bits": 8}


class Matrices:
    """Parameters with gradients, and the optimizer of each kind over them."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self.parameters = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
        for p in self.parameters:
            p.grad = torch.randn_like(p) * 1e-3
        self.count = sum(p.numel() for p in self.parameters)
        # Parameters are read and written, gradients read; two codes and a 64th of two scales are read and written.
        self.table: Any = None
        self.bytes = self.count * 3 * dtype.itemsize + self.count * 4 + self.count // 256 * 16

    def optimizer(self, ours: bool) -> Any:
        """An optimizer that made its first step."""
        import bitsandbytes

        from pantheraml.training.bitsandbytes_adamw import AdamW

        optimizer = (AdamW if ours else bitsandbytes.optim.AdamW)(self.parameters, **OPTIONS)
        optimizer.step()
        return optimizer

    def ours(self, optimizer: Any, together: bool = False) -> None:
        """The update of every matrix by PantheraML."""
        scalars = kernel.Scalars.of(step=100, lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
        books = optimizer._codebooks(optimizer.state[self.parameters[0]])
        updates = []
        for p in self.parameters:
            state = optimizer.state[p]
            states, absmax = ((state[f"{name}1"], state[f"{name}2"]) for name in ("state", "absmax"))
            updates.append(kernel.Update(p, p.grad, states, absmax))
        if not self.parameters[0].is_cuda:
            for update in updates:
                reference(*update, books, scalars)
        elif together:
            with mock.patch.object(kernel, "ALONE", self.count + 1):
                self.table = kernel.adamw_8bit_steps(updates, books, scalars, self.table)
        else:
            for update in updates:
                kernel.adamw_8bit_step(update, books, scalars)

    def theirs(self, optimizer: Any) -> None:
        """The update of every matrix by bitsandbytes."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        for p in self.parameters:
            s = optimizer.state[p]
            rates = (0.9, 0.999, 0.0, 0.0, 1e-8, 100, 1e-5)
            maps = (s["qmap1"], s["qmap2"], s["absmax1"], s["absmax2"])
            optimizer_update_8bit_blockwise("adam", p.grad, p, s["state1"], s["state2"], *rates, *maps, 0.01)


def calls(matrices: Matrices, tiles: list[tuple[int, int]], *, updates: bool) -> Iterator[tuple[str, str, Callable]]:
    """What is timed: its name, whose it is, and the call."""
    for who, ours in (("bitsandbytes", False), ("ours", True)):
        optimizer = matrices.optimizer(ours)
        if updates and not ours:
            yield "update", who, functools.partial(matrices.theirs, optimizer)
        for together in (False, True) if updates and ours else ():
            name = "update together" if together else "update"
            call = functools.partial(matrices.ours, optimizer, together)
            yield name, who, call
            for rows, warps in tiles:

                def tiled(call: Callable[[], None] = call, rows: int = rows, warps: int = warps) -> None:
                    with mock.patch.multiple(kernel, ROWS=rows, NUM_WARPS=warps):
                        call()

                yield f"{name} {rows}x{warps}", who, tiled
        yield "step", who, optimizer.step


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tiles", nargs="*", default=[], help="ROWSxWARPS")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by it, for a trial on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bandwidth(device)
    about = f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}"
    print(f"{about}; copy {bandwidth / 1e9:,.0f} GB/s.\n")
    print("| parameters | call | whose | ms | GB/s | of copy | host ms |\n|---|---|---|---|---|---|---|")
    tiles = [tuple(map(int, tile.split("x"))) for tile in options.tiles]
    full = [tuple(size // options.scale for size in shape) for shape in SHAPES] * options.layers
    thin = [(options.rank, i) for _, i in full] + [(o, options.rank) for o, _ in full]
    cases = [(full, getattr(torch, dtype), True) for dtype in options.dtypes]
    cases += [(thin, torch.float32, False)] if options.rank else []
    for shapes, dtype, updates in cases:
        matrices = Matrices(shapes, dtype, device)
        name = f"{matrices.count / 1e6:,.0f}M in {len(shapes)}, {str(dtype).removeprefix('torch.')}"
        for what, whose, call in calls(matrices, tiles, updates=updates):
            milliseconds, host = timed(call, device, MILLISECONDS)
            rate = matrices.bytes / milliseconds / 1e6
            share = f"{rate * 1e9 / bandwidth:.0%}"
            print(
                f"| {name} | {what} | {whose} | {milliseconds:.2f} | {rate:,.0f} | {share} | {host / 1e3:.2f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
