"""The head's loss in chunks of rows that are divided over the devices."""

from __future__ import annotations

import pytest
import torch

from pantheraml import kernels, xla_runtime
from pantheraml.parallel import xla

ROWS, LENGTH, WIDTH, VOCABULARY = 8, 12, 16, 40


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[2, 3:] = -100
    return hidden.to(dtype), weight.to(dtype), labels


def on_devices(tensor):
    placed = tensor.to(xla_runtime.device())
    spec = (xla.FSDP, *[None] * (tensor.dim() - 1))
    xla.current_mesh().shard(placed, spec)
    return placed


def results(compute, hidden, weight, labels):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    value = compute(hidden, weight, labels)
    value.sum().backward()
    found = [value.detach(), hidden.grad, weight.grad]
    return xla_runtime.read(found) if hidden.device.type == "xla" else found


@pytest.mark.parametrize("chunk", [40, None], ids=["chunks", "whole"])
@pytest.mark.parametrize(
    "compute",
    [
        lambda h, w, y, **options: kernels.linear_cross_entropy(h, w, y, **options),
        lambda h, w, y, **options: kernels.linear_log_probs(h, w, y, **options).log_probs,
    ],
    ids=["loss", "log_probs"],
)
def test_chunks_of_divided_rows_give_what_the_cpu_gives(compute, chunk):
    hidden, weight, labels = data()
    expected = results(compute, hidden, weight, labels)
    placed = (on_devices(hidden), weight.to(xla_runtime.device()), on_devices(labels))
    found = results(lambda h, w, y: compute(h, w, y, chunk_tokens=chunk), *placed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
