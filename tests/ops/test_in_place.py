"""Models write into what their modules return; the gradients are those of writing into a copy."""

from __future__ import annotations

import pytest
import torch

from pantheraml import kernels
from pantheraml.kernels import Adapter, Projection, Stack

from .support import random


def leaf(*shape, seed=0):
    return random(*shape, seed=seed).float()


def projections(outs, widths):
    """Of adapters on frozen weights."""
    return [
        Projection(
            leaf(out, width, seed=seed), [Adapter(leaf(2, width, seed=seed + 3), leaf(out, 2, seed=seed + 6), 0.5)]
        )
        for seed, (out, width) in enumerate(zip(outs, widths))
    ]


ONES, CHOSEN = torch.ones(16), torch.arange(6).view(6, 1) % 3
ANGLES = leaf(1, 3, 16), leaf(1, 3, 16, seed=1)
# Shape of the input, and the op; those with a kernel that takes float32 also by it.
OPS = {
    "rms_norm": ((2, 3, 16), lambda x, **o: kernels.rms_norm(x, ONES, **o)),
    "rms_norm with a residual": ((2, 3, 16), lambda x, **o: kernels.rms_norm(x, ONES, residual=x * 2, **o)[0]),
    "layer_norm": ((2, 3, 16), lambda x, **o: kernels.layer_norm(x, ONES, ONES, **o)),
    "glu": ((2, 3, 16), lambda x, **o: kernels.glu(x, x * 2, **o)),
    "packed_glu": ((2, 3, 16), kernels.packed_glu),
    "rotary": ((2, 4, 3, 16), lambda x, **o: kernels.rotary(x, x * 2, *ANGLES, **o)),
    "qk_norm_rotary": ((2, 4, 3, 16), lambda x, **o: kernels.qk_norm_rotary(x, x * 2, ONES, ONES, *ANGLES, **o)),
    "lora_linear": ((2, 3, 16), lambda x, **o: kernels.lora_linear(x, leaf(8, 16), leaf(2, 16), leaf(8, 2), **o)),
    "frozen linear": ((2, 3, 16), lambda x, **o: kernels.lora_linear(x, leaf(8, 16), **o)),
    "lora_qkv": ((2, 3, 16), lambda x, **o: kernels.lora_qkv(x, *projections((8, 4, 4), (16,) * 3), **o)),
    "lora_mlp": ((2, 3, 16), lambda x, **o: kernels.lora_mlp(x, *projections((24, 24, 16), (16, 16, 24)), **o)),
    "cross_entropy": (
        (2, 3, 16),
        lambda x, **o: kernels.cross_entropy(x, torch.ones(2, 3).long(), reduction="none", **o),
    ),
    "permute": ((6, 16), lambda x, **o: kernels.permute(x, kernels.route(CHOSEN, 3), **o)),
    "unpermute": ((6, 16), lambda x, **o: kernels.unpermute(x, kernels.route(CHOSEN, 3), torch.ones(6, 1), **o)),
    "grouped_gemm": ((6, 16), lambda x: kernels.grouped_gemm(x, leaf(3, 8, 16), torch.tensor([1, 4, 6]).int())),
    "experts_mlp": (
        (6, 16),
        lambda x: kernels.experts_mlp(x, CHOSEN, torch.ones(6, 1), Stack(leaf(3, 16, 16)), Stack(leaf(3, 16, 8))),
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("name", OPS)
def test_results_can_be_written_into(name, backend):
    shape, op = OPS[name]
    options = {} if backend == "auto" or name in ("grouped_gemm", "experts_mlp") else {"backend": backend}

    def gradient(write):
        x = leaf(*shape).requires_grad_()
        result = op(x, **options)
        total = torch.zeros(())
        for i, output in enumerate([result] if isinstance(result, torch.Tensor) else result):
            y = output if write else output.clone()
            y[:1] += 1.0
            y.mul_(i + 2.0)
            total = total + y.square().sum()
        return torch.autograd.grad(total, x)[0]

    torch.testing.assert_close(gradient(write=True), gradient(write=False))
