"""Pallas's attention is called so that it gives what sdpa gives; the kernel runs on TPUs, and interpreted by jax."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from pantheraml import xla_runtime
from pantheraml.models.attention import xla as attention
from pantheraml.parallel import xla

from .support import load

ROWS, LENGTH = 8, 48


def plain(query, key, value, segments, scale):
    """What the kernel documents."""
    order = torch.arange(query.shape[2], device=query.device)
    seen = (segments[:, None, :, None] == segments[:, None, None, :]) & (order[:, None] >= order)
    scores = (query.float() @ key.float().transpose(2, 3)) * scale
    return (scores.masked_fill(~seen, -1e30).softmax(-1) @ value.float()).to(value.dtype)


@pytest.mark.parametrize("lanes", [1, 128], ids=["kernel", "head too small"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_long_rows_come_out_as_short_ones_do(packed, lanes, tiny_llama_dir, monkeypatch):
    model, _ = load(tiny_llama_dir)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 50, (ROWS, LENGTH), generator=generator)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[3, 20:] = 0
    positions = torch.arange(LENGTH) % 16 if packed else None

    def outcome():
        model.zero_grad()
        batch = {"input_ids": ids, "attention_mask": mask}
        batch = {name: value.to(xla_runtime.device()) for name, value in batch.items()}
        given = None if positions is None else positions.expand(ROWS, -1).to(xla_runtime.device())
        with attention.isolated_documents(given):
            hidden = model.base_model.model.model(**batch, position_ids=given).last_hidden_state
        (hidden * batch["attention_mask"][..., None]).sum().backward()
        trained = [p.grad for p in model.parameters() if p.grad is not None]
        out, *gradients = xla_runtime.read([hidden.detach(), *trained])
        return out[mask.bool()], gradients

    expected, expected_gradients = outcome()
    calls = []

    def kernel(query, key, value, segments, scale, mesh, spec):
        calls.append(spec)
        assert query.shape == key.shape == value.shape
        assert query.shape[2] % 64 == 0
        assert segments.dtype is torch.int32
        return plain(query, key, value, segments, scale)

    monkeypatch.setattr(attention, "FLASH_LENGTH", LENGTH)
    monkeypatch.setattr(attention, "BLOCK", 64)
    monkeypatch.setattr(attention, "LANES", lanes)
    monkeypatch.setattr(xla_runtime, "has_flash_attention", lambda: True)
    monkeypatch.setattr(xla_runtime, "flash_attention", kernel)
    found, gradients = outcome()
    assert set(calls) == ({(xla.FSDP, xla.TENSOR, None, None)} if lanes == 1 else set())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(gradients) == len(expected_gradients) > 0
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax has the kernel, and is not installed")
@pytest.mark.skipif("xla_runtime.device_count() > 1", reason="the interpreter is one device")
def test_the_kernel_does_what_it_documents(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    import jax.numpy as jnp
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, 2, 256, 128, generator=generator) for _ in range(3))
    segments = (torch.arange(256) // 100 + 1).int()[None]
    segments[:, 240:] = 0
    with pltpu.force_tpu_interpret_mode():
        arrays = [jnp.asarray(x.numpy()) for x in (query, key, value)]
        ids = jnp.asarray(segments.numpy())
        out = flash_attention(*arrays, segment_ids=SegmentIds(ids, ids), causal=True, sm_scale=0.1)
    expected = plain(query, key, value, segments, 0.1)
    torch.testing.assert_close(torch.tensor(np.array(out)), expected, rtol=0, atol=1e-4)
