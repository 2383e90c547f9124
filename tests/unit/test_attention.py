"""The registered attention gives the numbers of the stock pair, and those of single documents where rows are packed."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny

from pantheraml.device import Device
from pantheraml.errors import UnsupportedError
from pantheraml.models import attention
from pantheraml.models.adapt import adapt
from pantheraml.models.attention import choose, interface
from pantheraml.models.attention.table import Call, order

IDS = torch.arange(3, 43).view(4, 10)
RIGHT = torch.tensor([[1] * 10, [1] * 7 + [0] * 3, [1] * 10, [1] + [0] * 9])
LEFT = RIGHT.flip(1)
# Windows, soft caps, norms of queries and keys, and sinks.
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 0.5},
    "gpt_oss": {"head_dim": 16, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Lengths of documents; each row as long as the others.
PACKED = {"two rows": [[7, 1, 12], [3, 17]], "padded row": [[9, 5, 1, 1, 1, 3]]}


def tiny(family, **overrides):
    model = make_tiny(family, **{**FAMILIES[family], **overrides})
    if family == "gpt_oss":
        # At their initial size nothing would show that they are left out.
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def loss_and_gradients(model, mask):
    model.zero_grad()
    loss = model(input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100)).loss
    loss.backward()
    return loss, gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, due in expected.items():
        # Sums of a few hundred products in another order.
        allowed = 100 * torch.finfo(due.dtype).eps * float(due.abs().max())
        torch.testing.assert_close(got[name], due, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mask", [torch.ones_like(RIGHT), RIGHT, LEFT], ids=["full", "right padded", "left padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_stock(family, mask):
    torch.manual_seed(0)
    model = tiny(family)
    expected_loss, expected = loss_and_gradients(model, mask)
    assert attention.prefer(model)
    loss, got = loss_and_gradients(model, mask)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert_gradients(got, expected)


@pytest.mark.parametrize(
    ("family", "layout"), [*((family, "two rows") for family in FAMILIES), ("gemma2", "padded row")]
)
def test_packed_documents_give_what_they_give_alone(family, layout):
    """Logits and the gradient of every weight, against the stock model on one document at a time."""
    rows = PACKED[layout]
    torch.manual_seed(0)
    model, stock = tiny(family), tiny(family)
    stock.load_state_dict(model.state_dict())
    ids = torch.randint(3, 384, (len(rows), sum(rows[0])))
    weight = torch.randn(*ids.shape, 384)
    alone = []
    for row, lengths in enumerate(rows):
        parts = zip(ids[row].split(lengths), weight[row].split(lengths))
        for part, factor in parts:
            logits = stock(input_ids=part[None], use_cache=False).logits[0]
            (logits * factor).sum().backward()
            alone.append(logits.detach())
    assert attention.prefer(model)
    adapt(model)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    (logits * weight).sum().backward()
    torch.testing.assert_close(logits.detach().flatten(0, 1), torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert_gradients(gradients(model), gradients(stock))


@pytest.mark.parametrize("told_by", ["positions", "bounds", "positions beside a mask of ones"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_documents_stay_apart_however_they_are_told(family, told_by):
    """With a key-value cache, or a mask beside them, transformers' masks know nothing of packing."""
    model = tiny(family)
    attention.prefer(model)
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    told = {"position_ids": positions}
    if told_by == "bounds":
        bounds = torch.tensor([0, 6, 10], dtype=torch.int32)
        told |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    if told_by == "positions beside a mask of ones":
        told["attention_mask"] = torch.ones(1, 10, dtype=torch.long)
    first, second = (
        model(input_ids=torch.cat([a, IDS[1:2, :4]], 1), **told).logits for a in (IDS[:1, :6], IDS[2:3, :6])
    )
    # Experts add up in an order that depends on all tokens of a batch.
    torch.testing.assert_close(first[:, 6:], second[:, 6:], rtol=1e-5, atol=1e-6)
    assert (first[:, :6] - second[:, :6]).abs().max() > 0.01


def test_no_mask_is_made_for_packed_rows_and_windows(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a mask of T x T was made")

    monkeypatch.setattr(interface, "sdpa_mask", refused)
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    for family in ("mistral", "gemma2"):
        model = tiny(family)
        attention.prefer(model)
        model(input_ids=IDS[:1], position_ids=positions, use_cache=False)
        model(input_ids=IDS, attention_mask=RIGHT, use_cache=False)
        with pytest.raises(AssertionError, match="T x T"):
            model(input_ids=IDS, attention_mask=LEFT, use_cache=False)


def test_the_device_is_read_as_often_for_many_layers_as_for_two(monkeypatch):
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, _original=original, _name=name: reads.append(_name) or _original(self)
        )
    counts = {}
    for layers in (2, 6):
        for cache in (False, True):
            positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
            model = make_tiny("llama", num_hidden_layers=layers)
            attention.prefer(model)
            reads.clear()
            model(input_ids=IDS[:1], position_ids=positions, use_cache=cache)
            counts[layers, cache] = len(reads)
    assert counts[2, False] == counts[6, False] > 0
    assert counts[2, True] == counts[6, True] > 0


def test_the_mask_is_skipped_for_right_padding_only():
    def build(mask, **kwargs):
        return attention.attention_mask(4, 10, 10, attention_mask=mask.bool(), **kwargs)

    assert build(RIGHT) is None
    assert isinstance(build(LEFT), torch.Tensor)
    assert isinstance(build(RIGHT, allow_is_causal_skip=False), torch.Tensor)
    assert isinstance(build(torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1, 1]] * 4)), torch.Tensor)


def test_a_compiled_decoding_step_and_generation_equal_stock():
    for family in FAMILIES:
        stock = tiny(family)
        model = tiny(family)
        model.load_state_dict(stock.state_dict())
        attention.prefer(model)
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": LEFT[:2]}
        assert torch.equal(model.generate(IDS[:2], **options), stock.generate(IDS[:2], **options))


# ---- the table


def chip(capability, kind="cuda"):
    return Device(kind, "cuda" if kind == "hip" else kind, 0, 1, "test", capability, 1, True, True, True)


@pytest.mark.parametrize(
    ("call", "device", "best"),
    [
        (Call("causal", 128, torch.bfloat16), chip((9, 0)), "cudnn"),
        (Call("causal", 512, torch.bfloat16), chip((9, 0)), "flash"),
        (Call("causal", 128, torch.bfloat16), chip((8, 0)), "flash"),
        (Call("causal", 128, torch.float32), chip((9, 0)), "efficient"),
        (Call("causal", 128, torch.float16), chip((7, 5)), "efficient"),
        (Call("full", 128, torch.bfloat16), chip((9, 0)), "cudnn"),
        (Call("step", 128, torch.bfloat16), chip((9, 0)), "flash"),
        (Call("step", 128, torch.bfloat16), chip((7, 5)), "efficient"),
        (Call("documents", 128, torch.bfloat16), chip((9, 0)), "varlen"),
        (Call("documents", 64, torch.bfloat16, sinks=True), chip((9, 0)), "varlen"),
        (Call("documents", 192, torch.bfloat16, value_dim=128, dropout=True), chip((9, 0)), "exact"),
        (Call("documents", 128, torch.float32), chip((8, 0)), "flex"),
        (Call("documents", 256, torch.bfloat16, softcap=True), chip((9, 0)), "flex"),
        (Call("documents", 64, torch.float16), chip((7, 5)), "efficient"),
        (Call("documents", 64, torch.bfloat16), chip(None, "hip"), "flex"),
        (Call("documents", 64, torch.float32), chip(None, "cpu"), "exact"),
    ],
)
def test_the_best_kernel_that_can_do_what_is_asked_comes_first(call, device, best, monkeypatch):
    monkeypatch.setattr("pantheraml.models.attention.table.is_installed", lambda package: package == "triton")
    from pantheraml.models.attention import table

    table._order.cache_clear()
    assert order(call, device)[0] == best
    table._order.cache_clear()


def test_decoding_never_waits_for_plans_of_cudnn():
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    for seen in (None, mask):
        for causal in (True, False):
            kind = interface.kind_of_mask(1, seen, causal=causal)
            for capability in ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0)):
                kernels = order(Call(kind, 128, torch.bfloat16), chip(capability))
                assert kernels
                assert "cudnn" not in kernels
    assert [interface.kind_of_mask(8, m, causal=c) for m, c in ((None, True), (None, False), (mask, True))] == [
        "causal",
        "full",
        "dense",
    ]


def test_documents_are_served_on_every_device():
    for kind in ("cuda", "hip", "xpu", "cpu", "mps"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            call = Call("documents", 512, dtype, softcap=True, sinks=True, dropout=True)
            assert order(call, chip((7, 5) if kind == "cuda" else None, kind)) == ("exact",)


# ---- what a model gets


def test_what_was_asked_for_by_name_stays():
    model = make_tiny("llama")
    model.set_attn_implementation("flex_attention")
    assert attention.prefer(model) is False
    assert model.config._attn_implementation == "flex_attention"


def test_a_model_gets_it_and_is_told_once(capsys):
    from pantheraml import log

    log._told.clear()
    for _ in range(2):
        model = make_tiny("gemma2", **FAMILIES["gemma2"])
        assert model.config._attn_implementation == "eager"
        assert attention.prefer(model)
        assert model.config._attn_implementation == attention.NAME
    assert capsys.readouterr().err.count("attention (head_dim 16, float32, soft cap): exact") == 1


def test_an_eager_family_that_computes_something_else_stays_eager(monkeypatch):
    model = make_tiny("gemma2", **FAMILIES["gemma2"])
    module = __import__(type(model).__module__, fromlist=["eager_attention_forward"])
    original = module.eager_attention_forward
    monkeypatch.setattr(module, "eager_attention_forward", lambda *a, **k: (original(*a, **k)[0] * 1.01, None))
    training = model.training
    assert attention.prefer(model) is False
    assert model.config._attn_implementation == "eager"
    assert model.training is training
    assert choose._RECORDER not in choose.ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("device", [chip((7, 5)), chip(None, "cpu")])
def test_flash_attention_is_refused_where_it_cannot_run(device):
    attention.check_request("sdpa", device)
    attention.check_request(None, device)
    attention.check_request("flash_attention_2", chip((8, 0)))
    for asked in ("flash_attention_2", {"": "sdpa", "text_config": "flash_attention_3"}):
        with pytest.raises(UnsupportedError, match=r"compute capability 8\.0"):
            attention.check_request(asked, device)
