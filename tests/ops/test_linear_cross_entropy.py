"""Linear cross entropy and log-probabilities against float64 truth of the plain formula (``F.linear`` and softmax)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pantheraml.errors import ArgumentError, ConfigError, ConflictError, UnsupportedError
from pantheraml.kernels import linear_cross_entropy, linear_log_probs
from pantheraml.kernels.reference import linear_cross_entropy as module
from pantheraml.kernels.reference.cross_entropy import cross_entropy as logits_cross_entropy
from pantheraml.kernels.reference.linear_cross_entropy import chunk_rows
from pantheraml.kernels.reference.rows import RowOptions

from .support import DTYPES, assert_matches, random

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
TOKENS, WIDTH, VOCABULARY = 13, 24, 301
FORMS = {
    "plain": {},
    "capped": {"soft_cap": 1.5, "logit_scale": 1.3},
    "all": {"label_smoothing": 0.1, "soft_cap": 3.0, "logit_scale": 0.7, "z_loss": 0.01},
}
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
HEADS = {
    "frozen": ("hidden",),
    "trained": ("hidden", "weight", "bias"),
    "head only": ("weight",),
    "bias only": ("bias",),
}
HEAD = pytest.mark.parametrize("grad", HEADS.values(), ids=HEADS.keys())
COMPACT = pytest.mark.parametrize("compact", [True, False], ids=["compacted", "in place"])


def labels_for(tokens=TOKENS, vocabulary=VOCABULARY, ignored=(2, 5, 6)):
    labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens))
    labels[[i for i in ignored if i < tokens]] = -100
    return labels


def tensors(tokens=TOKENS, width=WIDTH, vocabulary=VOCABULARY, ignored=(2, 5, 6)):
    return {
        "hidden": random(tokens, width),
        "weight": random(vocabulary, width, seed=1, scale=0.3),
        "bias": random(vocabulary, seed=2),
        "labels": labels_for(tokens, vocabulary, ignored),
    }


def eager_loss(hidden, weight, bias, labels, *, num_items=None, token_weights=None, reduction="mean", **form):
    options = RowOptions(
        form.get("label_smoothing", 0.0),
        form.get("soft_cap"),
        form.get("logit_scale", 1.0),
        1.0,
        form.get("z_loss", 0.0),
    )
    reduction = "sum" if num_items is not None else reduction
    loss = logits_cross_entropy(
        functional.linear(hidden, weight, bias), labels, options, token_weights=token_weights, reduction=reduction
    )
    return loss if num_items is None else loss / num_items


def eager_log_probs(hidden, weight, bias, labels, *, soft_cap=None, logit_scale=1.0, temperature=1.0):
    z = functional.linear(hidden, weight, bias)
    z = (z.double() if z.dtype == torch.float64 else z.float()) * logit_scale
    if soft_cap is not None:
        z = soft_cap * torch.tanh(z / soft_cap)
    log_probs = (z / temperature).log_softmax(1)
    valid = labels != -100
    entropy = torch.where(valid, -(log_probs.exp() * log_probs).sum(1), 0.0).detach()
    picked = log_probs.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(valid, picked, 0.0), entropy


@DTYPE
@FORM
@HEAD
@COMPACT
def test_loss_and_gradients(compact, grad, form, dtype, device):
    def kernel(hidden, weight, bias, labels):
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, chunk_tokens=4, compact=compact, backend="triton", **form
        ).reshape(1)

    eager = lambda **leaves: eager_loss(**leaves, **form).reshape(1)  # noqa: E731
    assert_matches(kernel, eager, tensors(), dtype=dtype, device=device, grad=grad)


@DTYPE
@HEAD
@COMPACT
def test_log_probs_and_gradients(compact, grad, dtype, device):
    form = {"soft_cap": 3.0, "logit_scale": 0.7, "temperature": 0.9}

    def kernel(hidden, weight, bias, labels):
        result = linear_log_probs(
            hidden, weight, labels, bias=bias, entropy=True, chunk_tokens=4, compact=compact, backend="triton", **form
        )
        return result.log_probs, result.entropy

    eager = lambda **leaves: eager_log_probs(**leaves, **form)  # noqa: E731
    assert_matches(kernel, eager, tensors(), dtype=dtype, device=device, grad=grad)


SIZES = {
    "one row": (1, 8, 5, ()),
    "one token of many": (9, 8, 11, range(8)),
    "odd": (7, 13, 97, (0, 6)),
    "one word": (4, 8, 1, ()),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_sizes(size, device):
    kernel = lambda hidden, weight, bias, labels: linear_cross_entropy(  # noqa: E731
        hidden, weight, labels, bias=bias, backend="triton"
    ).reshape(1)
    eager = lambda **leaves: eager_loss(**leaves).reshape(1)  # noqa: E731
    assert_matches(kernel, eager, tensors(*size), dtype=torch.float32, device=device, grad=("hidden", "weight", "bias"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("num_items", [None, 5, "tensor"], ids=["own count", "int", "tensor"])
def test_normalisation(reduction, num_items):
    leaves = {name: t.clone() for name, t in tensors().items()}
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3)).double()
    num_items = torch.tensor(5) if num_items == "tensor" else num_items
    if reduction == "sum" and num_items is not None:
        with pytest.raises(ConflictError, match="num_items"):
            linear_cross_entropy(
                leaves["hidden"], leaves["weight"], leaves["labels"], reduction=reduction, num_items=num_items
            )
        return
    for token_weights in (None, weights):
        options = {"reduction": reduction, "num_items": num_items, "token_weights": token_weights}
        ours = linear_cross_entropy(
            leaves["hidden"], leaves["weight"], leaves["labels"], bias=leaves["bias"], **options
        )
        torch.testing.assert_close(ours, eager_loss(**leaves, **options))


def test_accumulation_window_has_one_mean():
    leaves = tensors()
    whole = linear_cross_entropy(leaves["hidden"], leaves["weight"], leaves["labels"])
    count = int((leaves["labels"] != -100).sum())
    parts = [
        linear_cross_entropy(leaves["hidden"][part], leaves["weight"], leaves["labels"][part], num_items=count)
        for part in (slice(0, 3), slice(3, None))
    ]
    torch.testing.assert_close(sum(parts), whole)


@HEAD
def test_rows_that_are_known_are_not_looked_for(grad):
    leaves = tensors()
    labels = leaves["labels"].view(1, -1)
    kept = (labels.flatten() != -100).nonzero().squeeze(1)

    def run(**options):
        inputs = {name: leaves[name].clone().requires_grad_(name in grad) for name in ("hidden", "weight", "bias")}
        hidden = inputs["hidden"].view(*labels.shape, -1)
        result = linear_log_probs(
            hidden, inputs["weight"], labels, bias=inputs["bias"], entropy=True, top1=True, chunk_tokens=4, **options
        )
        upstream = torch.linspace(0.5, 1.5, labels.numel()).view(labels.shape)
        return [*result, *torch.autograd.grad(result.log_probs, [inputs[name] for name in grad], upstream)]

    with Searches() as searches:
        ours = run(kept=kept)
    assert searches.count == 0
    with Searches() as searches:
        assert all(map(torch.equal, ours, run()))
    assert searches.count == 1


class Searches(TorchDispatchMode):
    """Counts searches for what is not zero, whose number of results the host waits for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kept", [torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2), torch.zeros(2).long().to("meta")]
)
def test_known_rows_that_are_none(kept):
    with pytest.raises(ConfigError, match="kept"):
        linear_log_probs(HIDDEN, WEIGHT, LABELS, kept=kept)


def test_known_rows_are_not_for_all_rows_in_place():
    with pytest.raises(ConflictError, match="kept"):
        linear_log_probs(HIDDEN, WEIGHT, LABELS, kept=torch.arange(2), compact=False)


@COMPACT
@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_to_learn_is_zero_and_connected(tokens, compact):
    hidden = torch.full((tokens, 8), float("nan")).requires_grad_()
    weight = torch.randn(11, 8).requires_grad_()
    labels = torch.full((tokens,), -100)
    loss = linear_cross_entropy(hidden, weight, labels, compact=compact)
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    result = linear_log_probs(hidden, weight, labels, entropy=True, top1=True, compact=compact)
    result.log_probs.sum().backward()
    assert not result.log_probs.any()
    assert not result.entropy.any()
    assert not result.is_top1.any()


@COMPACT
def test_ignored_rows_may_hold_anything(compact):
    leaves = tensors()
    hidden = leaves["hidden"].clone()
    hidden[leaves["labels"] == -100] = float("nan")
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, leaves["weight"], leaves["labels"], compact=compact)
    loss.backward()
    torch.testing.assert_close(loss, eager_loss(leaves["hidden"], leaves["weight"], None, leaves["labels"]))
    assert torch.isfinite(hidden.grad).all()


@pytest.fixture
def recorded(monkeypatch):
    """Every call of the row step: rows in the chunk and whether a gradient was computed."""
    calls = []

    def rows(logits, *arguments, gradient, **rest):
        calls.append((logits.shape[0], gradient))
        return original(logits, *arguments, gradient=gradient, **rest)

    original = module.eager_rows
    monkeypatch.setattr(module, "eager_rows", rows)
    return calls


def test_ignored_rows_are_not_computed_and_chunks_stay_small(recorded):
    leaves = tensors()
    linear_cross_entropy(leaves["hidden"], leaves["weight"], leaves["labels"], chunk_tokens=4, backend="reference")
    assert [rows for rows, _ in recorded] == [4, 4, 2]


def test_no_gradient_work_where_none_is_recorded(recorded):
    leaves = tensors()
    hidden = leaves["hidden"].requires_grad_()
    with torch.no_grad():
        linear_cross_entropy(hidden, leaves["weight"], leaves["labels"], backend="reference")
        linear_log_probs(hidden, leaves["weight"], leaves["labels"], backend="reference")
    linear_cross_entropy(hidden.detach(), leaves["weight"], leaves["labels"], backend="reference")
    assert recorded
    assert not any(gradient for _, gradient in recorded)


def test_frozen_log_probs_make_the_logits_once(recorded):
    leaves = tensors()
    hidden = leaves["hidden"].requires_grad_()
    linear_log_probs(hidden, leaves["weight"], leaves["labels"], backend="reference").log_probs.sum().backward()
    assert len(recorded) == 1


def test_weight_through_a_function():
    leaves = tensors()
    calls = []

    def gather():
        calls.append(1)
        return leaves["weight"]

    expected = linear_cross_entropy(leaves["hidden"].requires_grad_(), leaves["weight"], leaves["labels"])
    ours = linear_cross_entropy(leaves["hidden"], gather, leaves["labels"], chunk_tokens=3)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves["hidden"]) for loss in (ours, expected)))
    assert len(calls) == 1
    shard = leaves["weight"].clone().requires_grad_()
    loss = linear_cross_entropy(leaves["hidden"], lambda: shard * 1.0, leaves["labels"])
    (grad,) = torch.autograd.grad(loss, shard)
    direct = leaves["weight"].clone().requires_grad_()
    torch.testing.assert_close(
        grad, torch.autograd.grad(linear_cross_entropy(leaves["hidden"], direct, leaves["labels"]), direct)[0]
    )


@pytest.mark.parametrize("dtypes", list(itertools.permutations((torch.float32, torch.bfloat16))), ids=str)
def test_mixed_dtypes_follow_autocast(dtypes):
    leaves = tensors()
    hidden = leaves["hidden"].to(dtypes[0]).requires_grad_()
    weight = leaves["weight"].to(dtypes[1]).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, leaves["labels"])
        logits = functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    expected = logits_cross_entropy(logits, leaves["labels"], RowOptions())
    torch.testing.assert_close(ours, expected)
    ours.backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == dtypes
    alone = linear_cross_entropy(hidden, weight, leaves["labels"])
    same = linear_cross_entropy(hidden, weight.to(dtypes[0]), leaves["labels"])
    assert torch.equal(alone, same)


def test_upstream_scale_survives_float16():
    leaves = tensors()
    hidden = leaves["hidden"].half().requires_grad_()
    loss = linear_cross_entropy(hidden, leaves["weight"].half(), leaves["labels"], num_items=10**7)
    (loss * 2.0**20).backward()
    wide = hidden.detach().double().requires_grad_()
    (eager_loss(wide, leaves["weight"].half().double(), None, leaves["labels"], num_items=10**7) * 2.0**20).backward()
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=5e-3, atol=1e-4)


def test_leading_dimensions():
    leaves = tensors(tokens=12)
    flat = linear_log_probs(leaves["hidden"], leaves["weight"], leaves["labels"], top1=True)
    deep = linear_log_probs(leaves["hidden"].view(3, 4, -1), leaves["weight"], leaves["labels"].view(3, 4), top1=True)
    assert deep.log_probs.shape == deep.is_top1.shape == (3, 4)
    assert deep.entropy is None
    assert torch.equal(deep.log_probs.view(-1), flat.log_probs)


def test_top1_counts():
    leaves = tensors()
    result = linear_log_probs(leaves["hidden"], leaves["weight"], leaves["labels"], top1=True)
    best = (leaves["hidden"] @ leaves["weight"].t()).argmax(1)
    again = linear_log_probs(leaves["hidden"], leaves["weight"], best, top1=True)
    assert torch.equal(result.is_top1, best == leaves["labels"])
    assert again.is_top1.all()


@HEAD
def test_gradcheck(grad):
    leaves = tensors(5, 4, 7, (1,))
    for name in grad:
        leaves[name] = leaves[name].requires_grad_()
    inputs = tuple(leaves[name] for name in ("hidden", "weight", "bias"))
    options = {"soft_cap": 2.0, "chunk_tokens": 2}
    labels = leaves["labels"]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, label_smoothing=0.1, z_loss=0.1, **options), inputs
    )
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_log_probs(h, w, labels, bias=b, temperature=0.7, **options).log_probs, inputs
    )


@pytest.mark.parametrize("of", [torch.square, torch.clone], ids=["square", "loss"])
def test_second_derivative_raises(of):
    """The gradient of a loss comes with no graph of its own, so torch alone would not object."""
    leaves = tensors()
    hidden = leaves["hidden"].requires_grad_()
    loss = linear_cross_entropy(hidden, leaves["weight"], leaves["labels"])
    with pytest.raises(UnsupportedError, match="differentiated once"):
        torch.autograd.grad(of(loss), hidden, create_graph=True)
    torch.autograd.grad(of(loss), hidden)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "expected"),
    [(8192, 128_256, 2048), (100, 128_256, 128), (0, 10, 128), (5000, 262_144, 1024)],
)
def test_chunks_stay_within_budget(rows, vocabulary, expected):
    size = chunk_rows(rows, vocabulary, torch.bfloat16, "cuda")
    assert size == expected
    assert size * vocabulary * 2 <= 512 * 2**20


HIDDEN, WEIGHT, LABELS = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
WRONG = {
    "widths": (ConfigError, {"weight": torch.zeros(5, 4)}),
    "labels": (ConfigError, {"labels": LABELS[:1]}),
    "label dtype": (ArgumentError, {"labels": LABELS.float()}),
    "bias": (ConfigError, {"bias": torch.zeros(3)}),
    "reduction": (ConfigError, {"reduction": "none"}),
    "chunk": (ConfigError, {"chunk_tokens": 0}),
    "weights": (ConfigError, {"token_weights": torch.ones(3)}),
    "weights with gradient": (UnsupportedError, {"token_weights": torch.ones(2).requires_grad_()}),
    "device": (ConfigError, {"weight": torch.zeros(5, 3, device="meta")}),
}


@pytest.mark.parametrize(("error", "change"), WRONG.values(), ids=WRONG.keys())
def test_what_it_cannot_take(error, change):
    with pytest.raises(error):
        linear_cross_entropy(**({"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | change))


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_real_vocabulary(grad, dtype, gpu):
    inputs = tensors(300, 256, 128_256)
    inputs["weight"] *= 0.2
    kernel = lambda hidden, weight, bias, labels: linear_cross_entropy(  # noqa: E731
        hidden, weight, labels, bias=bias, chunk_tokens=128, backend="triton"
    ).reshape(1)
    eager = lambda **leaves: eager_loss(**leaves).reshape(1)  # noqa: E731
    assert_matches(kernel, eager, inputs, dtype=dtype, device=gpu, grad=grad)


@pytest.mark.gpu
def test_extra_memory_of_a_frozen_head(gpu):
    hidden = torch.randn(8192, 4096, dtype=torch.bfloat16, device=gpu).requires_grad_()
    weight = torch.randn(128_256, 4096, dtype=torch.bfloat16, device=gpu) * 0.02
    labels = torch.randint(0, 128_256, (8192,), device=gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.cuda.max_memory_allocated(gpu) - before <= 1e9
