"""Documents are recognised in mask functions and nothing else is, and every kernel computes what plain torch does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.attention import flex_attention
from transformers import masking_utils as masks

from pantheraml.device import get_device
from pantheraml.models.attention import efficient, exact, flash, flex, table
from pantheraml.models.attention.documents import Documents, from_lengths, from_mask_function, whole_rows
from pantheraml.models.attention.interface import equal_documents

CPU = torch.device("cpu")
ROWS = [[7, 1, 12], [3, 15, 2]]
LENGTHS = [length for row in ROWS for length in row]


def packed(function, rows=ROWS):
    """A mask function as transformers makes it for packed rows."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    documents = masks.find_packed_sequence_indices(positions)
    if not hasattr(masks, "packed_sequence_compatibility_function"):
        return masks.and_masks(masks.packed_sequence_mask_function(documents), function)
    return masks.packed_sequence_compatibility_function(function, positions, documents)


def dense(function, batch, length):
    return masks.sdpa_mask(batch, length, length, mask_function=function, allow_is_causal_skip=False)


NOTHING_LEFT_OUT = torch.zeros(2, dtype=torch.long)
RECOGNISED = {
    "causal": (masks.causal_mask_function, None),
    "window": (masks.sliding_window_causal_mask_function(4), 4),
    "window of one": (masks.sliding_window_causal_mask_function(1), 1),
    "chunks": (masks.chunked_causal_mask_function(6, NOTHING_LEFT_OUT), 6),
    "packed": (packed(masks.causal_mask_function), None),
    "packed, window": (packed(masks.sliding_window_causal_mask_function(4)), 4),
    "packed, wide window": (packed(masks.sliding_window_causal_mask_function(99)), 99),
    "packed, chunks": (packed(masks.chunked_causal_mask_function(6, NOTHING_LEFT_OUT)), 6),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_documents_are_recognised_in_the_mask_functions_of_transformers(name):
    function, local = RECOGNISED[name]
    found = from_mask_function(function, 2, 20, local, CPU)
    assert found is not None
    assert torch.equal(found.dense(), dense(function, 2, 20))
    if name == "packed":
        assert found.lengths == tuple(LENGTHS)
        assert found.longest == 15
    if name == "packed, wide window":
        assert found.window is None


IMAGE = torch.full((2, 20), -1)
IMAGE[:, 5:9] = 0
OTHER = {
    "both directions": masks.bidirectional_mask_function,
    "window in both directions": masks.sliding_window_bidirectional_mask_function(4),
    "an image in both directions": masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(IMAGE)),
    "a prefix for all": masks.or_masks(masks.causal_mask_function, lambda b, h, q, k: k < 3),
    "a hole": masks.and_masks(masks.causal_mask_function, lambda b, h, q, k: (k != 4) | (q == 4)),
    "no tokens of oneself": lambda b, h, q, k: k < q,
    "packed around an image": masks.or_masks(packed(masks.causal_mask_function), masks.blockwise_overlay(IMAGE)),
    "a window where none is told": masks.sliding_window_causal_mask_function(4),
}


@pytest.mark.parametrize("name", OTHER)
def test_anything_else_is_not_taken_for_documents(name):
    assert from_mask_function(OTHER[name], 2, 20, None, CPU) is None


def test_a_narrower_window_than_told_is_not_taken_for_documents():
    assert from_mask_function(masks.sliding_window_causal_mask_function(4), 2, 20, 6, CPU) is None
    assert from_mask_function(masks.sliding_window_causal_mask_function(8), 2, 20, 6, CPU) is None


# ---- the reference


def truth(q, k, v, documents, **options):
    """Attention with the whole mask, in fp64."""
    mask = documents.dense()
    return exact.attention(q.double(), k.double(), v.double(), mask, **options).transpose(1, 2)


def inputs(documents, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, device="cpu", value_dim=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim or head_dim)]
    made = [
        torch.randn(documents.batch, documents.length, *shape, generator=generator).transpose(1, 2) for shape in shapes
    ]
    sinks = torch.randn(heads, generator=generator)
    return [x.to(device, dtype).requires_grad_() for x in (*made, sinks)]


def out_and_gradients(function, leaves, weight):
    for leaf in leaves:
        leaf.grad = None
    out = function()
    (out.double() * weight.to(out.device)).sum().backward()
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


FEATURES = {
    "plain": {},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "both": {"softcap": 1.5, "sinks": True},
}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("window", [None, 5])
def test_the_reference_computes_documents_as_the_mask_says(window, features):
    documents = from_lengths(LENGTHS, 2, 20, window, CPU)
    q, k, v, sinks = inputs(documents, value_dim=16)
    options = {"scale": 0.3, **FEATURES[features]}
    if "sinks" in options:
        options["sinks"] = sinks
    weight = torch.randn(2, 20, 4, 16, dtype=torch.float64)
    leaves = [q, k, v, sinks]
    expected = out_and_gradients(lambda: truth(q, k, v, documents, **options), leaves, weight)
    got = out_and_gradients(lambda: exact.documents_attention(q, k, v, documents, **options), leaves, weight)
    assert len(got) == len(expected) == (5 if "sinks" in options else 4)
    for result, due in zip(got, expected):
        torch.testing.assert_close(result, due, rtol=1e-10, atol=1e-12)


def test_dropout_reaches_the_reference():
    documents = from_lengths(LENGTHS, 2, 20, None, CPU)
    q, k, v, sinks = inputs(documents)
    for options in ({}, {"sinks": sinks}):
        outs = [exact.documents_attention(q, k, v, documents, scale=1.0, dropout=p, **options) for p in (0.0, 0.5)]
        assert (outs[0] - outs[1]).abs().max() > 0.1


# ---- what we add to the kernels, on kernels of plain torch


@pytest.fixture
def emulated():
    """The operators of FlashAttention and of memory-efficient attention on a CPU, as their kernels define them."""

    def scores(q, k, cumulative, left, scale):
        groups = q.shape[1] // k.shape[1]
        documents = from_lengths(cumulative.diff().tolist(), 1, q.shape[0], None if left < 0 else left + 1, CPU)
        s = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(groups, 1)) * scale
        return s.masked_fill(~documents.dense()[0], -math.inf), groups

    def forward(
        q, k, v, cum_q, cum_k, max_q, max_k, p, causal, debug, *, scale, window_size_left, window_size_right, **_
    ):
        assert (p, window_size_right, causal) == (0.0, 0, window_size_left < 0)
        assert q.shape[-1] % 8 == 0
        assert max_q >= cum_q.diff().max()
        s, groups = scores(q, k, cum_q, window_size_left, scale)
        out = torch.einsum("hqk,khd->qhd", s.softmax(-1), v.repeat_interleave(groups, 1))
        empty = q.new_empty(0)
        return out, s.logsumexp(-1), empty, empty, empty

    def backward(
        grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, p, causal, rng, unused, *, scale, window_size_left, **_
    ):
        s, groups = scores(q, k, cum_q, window_size_left, scale)
        probabilities = (s - lse[..., None]).exp()
        dp = torch.einsum("qhd,khd->hqk", grad, v.repeat_interleave(groups, 1))
        ds = probabilities * (dp - (grad * out).sum(-1).T[..., None]) * scale
        dq = torch.einsum("hqk,khd->qhd", ds, k.repeat_interleave(groups, 1))
        dk = torch.einsum("hqk,qhd->khd", ds, q).unflatten(1, (-1, groups)).sum(2)
        dv = torch.einsum("hqk,qhd->khd", probabilities, grad).unflatten(1, (-1, groups)).sum(2)
        return dq, dk, dv

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_is_told_documents_windows_and_sinks(window, with_sinks, emulated):
    documents = from_lengths(LENGTHS, 2, 20, window, CPU)
    q, k, v, sinks = inputs(documents, head_dim=12)
    given = {"scale": 0.3, "sinks": sinks if with_sinks else None}
    weight = torch.randn(2, 20, 4, 12, dtype=torch.float64)
    leaves = [q, k, v, sinks]
    expected = out_and_gradients(lambda: truth(q, k, v, documents, **given), leaves, weight)
    got = out_and_gradients(lambda: flash.varlen(q, k, v, documents, **given), leaves, weight)
    assert len(got) == len(expected) == 4 + with_sinks
    for result, due in zip(got, expected):
        # The log-sum-exp of a sink is taken in fp32.
        torch.testing.assert_close(result, due, rtol=1e-5, atol=1e-6)


def test_few_lengths_are_compiled():
    lengths = range(1, 65_537)
    assert all(0 <= flex.filled(length) - length < max(flex.BLOCK, length / 8) for length in lengths)
    assert all(flex.filled(length) % flex.BLOCK == 0 for length in lengths)
    assert len({flex.filled(length) for length in lengths}) <= 8 * 8


@pytest.mark.parametrize("window", [None, 100, 200])
@pytest.mark.parametrize("lengths", [[[300]], [[1, 127, 129, 43], [260, 39, 1, 0]], [[128, 128], [256, 0]]])
def test_block_masks_made_of_bounds_say_what_the_mask_says(lengths, window, monkeypatch):
    rows = [[n for n in row if n] for row in lengths]
    batch, length = len(rows), sum(rows[0])
    documents = from_lengths([n for row in rows for n in row], batch, length, window, CPU)
    made = flex.block_mask(documents)
    full = flex.filled(length)
    # What fills the row up sees itself alone.
    whole = torch.eye(full, dtype=torch.bool).repeat(batch, 1, 1)
    whole[:, length:, length:] = torch.ones(full - length, full - length).tril().bool()
    whole[:, :length, :length] = documents.dense()[:, 0]
    due = flex_attention.create_block_mask(
        lambda b, h, q, k: whole[b, q, k], batch, None, full, full, device="cpu", BLOCK_SIZE=flex.BLOCK
    )
    assert flex.block_mask(documents) is made
    assert torch.equal(made.to_dense(), due.to_dense())
    assert torch.equal(made.full_kv_num_blocks, due.full_kv_num_blocks)
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention.flex_attention)
    q, k, v, _ = (x.detach().float() for x in inputs(documents, head_dim=16))
    out = flex.flex(q, k, v, documents, scale=0.3)
    assert out.shape == (batch, length, 4, 16)
    torch.testing.assert_close(out.double(), truth(q, k, v, documents, scale=0.3), rtol=1e-4, atol=1e-5)


# ---- the kernels themselves

KERNELS = {
    "varlen": (flash.varlen, ("sinks",)),
    "efficient": (efficient.efficient, ()),
    "xformers": (efficient.xformers, ()),
    "flex": (flex.flex, ("sinks", "softcap")),
}
SHAPES = {
    "head_dim 64": (32, 8, 64, [[1000, 1, 37, 1010]]),
    "head_dim 80": (8, 8, 80, [[1000, 1, 37, 1010]]),
    "head_dim 128": (32, 8, 128, [[4096], [2000, 2096]]),
    "head_dim 256": (8, 4, 256, [[513, 511]]),
}


def test_documents_of_one_length_become_rows():
    documents = from_lengths([12] * 6, 2, 36, None, CPU)
    assert documents.are_equally_long
    assert not from_lengths([12, 11, 13], 1, 36, None, CPU).are_equally_long
    leaves = inputs(documents, 4, 2, 8, torch.float64, CPU)[:3]
    weight = torch.randn(2, 36, 4, 8, dtype=torch.float64)

    def run(attention, **options):
        cast = [x.detach().requires_grad_() for x in leaves]
        return out_and_gradients(lambda: attention(*cast, documents, scale=0.3, **options), cast, weight)

    due = run(exact.documents_attention)
    for result, expected in zip(run(equal_documents, order=("math",)), due):
        torch.testing.assert_close(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("feature", ["plain", "sinks", "softcap"])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_as_near_to_the_truth_as_plain_torch_in_bf16(kernel, shape, window, feature):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    function, can = KERNELS[kernel]
    if feature != "plain" and feature not in can:
        pytest.skip(f"{kernel} has no {feature}")
    call = table.Call("documents", 64, torch.float16)
    if kernel == "xformers" and (refused := table.REFUSALS["xformers"](call, get_device())):
        pytest.skip(f"xformers {refused}")
    if kernel == "varlen" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    heads, kv_heads, head_dim, rows = SHAPES[shape]
    documents = from_lengths([n for row in rows for n in row], len(rows), sum(rows[0]), window, torch.device("cuda"))
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    leaves = inputs(documents, heads, kv_heads, head_dim, dtype, "cuda")
    options = {"scale": head_dim**-0.5}
    if feature == "softcap":
        options["softcap"] = 2.0

    def run(attention, dtype):
        q, k, v, sinks = cast = [x.detach().to(dtype).requires_grad_() for x in leaves]
        extra = {"sinks": sinks} if feature == "sinks" else {}
        return out_and_gradients(lambda: attention(q, k, v, documents, **options, **extra), cast, weight)

    torch.manual_seed(0)
    weight = torch.randn(documents.batch, documents.length, heads, head_dim, device="cuda", dtype=torch.float64)
    due = run(exact.documents_attention, torch.float32)
    plain = run(exact.documents_attention, dtype)
    got = run(function, dtype)
    assert len(got) == len(due)
    for result, reference, expected in zip(got, plain, due):
        # Of few numbers, as the gradients of sinks, plain torch may have rounded each to the nearer side.
        rounding = (1e-3 + torch.finfo(dtype).eps / 2) * expected.abs().max()
        assert (result - expected).abs().max() <= 2 * (reference - expected).abs().max() + rounding


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_packed_documents_in_bf16_give_what_they_give_alone(family):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    from conftest import make_tiny

    from pantheraml.models import attention
    from pantheraml.models.adapt import adapt

    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    model = make_tiny(family, max_position_embeddings=2048, **sizes).to("cuda", torch.bfloat16)
    truth = make_tiny(family, max_position_embeddings=2048, **sizes).to("cuda")
    truth.load_state_dict(model.state_dict())
    stock = copy.deepcopy(model)
    assert attention.prefer(model)
    adapt(model)
    for lengths in ([700, 1, 300, 23], [900, 400], [1300, 5]):
        compare_packed(model, truth, stock, lengths)


def compare_packed(model, truth, stock, lengths):
    ids = torch.randint(3, 384, (1, sum(lengths)), device="cuda")
    alone = [truth(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)]
    rounded = [stock(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone, rounded = torch.cat(alone, 1), torch.cat(rounded, 1)
    assert (logits - alone).abs().max() <= 2 * (rounded - alone).abs().max()


def test_whole_rows_and_moving():
    documents = whole_rows(2, 5, None, CPU)
    assert documents.is_whole_rows
    assert documents.lengths == (5, 5)
    assert documents.to("cpu") is documents
    assert documents.to(torch.bfloat16) is documents
    assert isinstance(documents.to("meta"), Documents)
    assert documents.to("meta").device.type == "meta"
