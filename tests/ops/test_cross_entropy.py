"""Cross entropy over logits against float64 truth.

Vocabularies: 1 and 2 (smallest), 97 (prime), 8,197 and 16,389 (one block and a bit, for the loss and the fused kernel).
"""

from __future__ import annotations

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError, ConflictError, UnsupportedError
from pantheraml.kernels import cross_entropy
from pantheraml.kernels.cross_entropy import cross_entropy_rows
from pantheraml.kernels.reference.cross_entropy import cross_entropy as reference
from pantheraml.kernels.reference.rows import RowOptions, eager_rows

from .support import DTYPES, assert_matches, random

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
SHAPES = {"1x1": (1, 1), "3x2": (3, 2), "7x97": (7, 97), "3x8197": (3, 8197)}
FORMS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"soft_cap": 2.0, "logit_scale": 1.5},
    "z-loss": {"z_loss": 0.05},
    "all": {"label_smoothing": 0.1, "soft_cap": 3.0, "logit_scale": 0.7, "z_loss": 0.01},
}
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def labels_for(shape, ignored=True):
    generator = torch.Generator().manual_seed(sum(shape))
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    if ignored and labels.numel() > 2:
        labels.view(-1)[1] = -100
    return labels


def both(*, reduction="mean", ignore_index=-100, token_weights=None, **form):
    """The kernel and the reference with the same options, as functions of logits and labels."""
    rest = {"reduction": reduction, "ignore_index": ignore_index}

    def move(logits):
        return None if token_weights is None else token_weights.to(logits.device)

    def ours(logits, labels):
        loss = cross_entropy(logits, labels, token_weights=move(logits), **form, **rest, backend="triton")
        return loss.reshape(-1)

    def expected(logits, labels):
        options = RowOptions(
            form.get("label_smoothing", 0.0),
            form.get("soft_cap"),
            form.get("logit_scale", 1.0),
            1.0,
            form.get("z_loss", 0.0),
        )
        return reference(logits, labels, options, token_weights=move(logits), **rest).reshape(-1)

    return ours, expected


@DTYPE
@FORM
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_loss_and_gradient(shape, form, dtype, device):
    inputs = {"logits": random(*shape, scale=3.0), "labels": labels_for(shape)}
    assert_matches(*both(**form), inputs, dtype=dtype, device=device, grad=("logits",))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_reductions(reduction, weighted, device):
    weights = torch.rand(7, generator=torch.Generator().manual_seed(0)) if weighted else None
    inputs = {"logits": random(7, 97), "labels": labels_for((7, 97))}
    ops = both(reduction=reduction, token_weights=weights)
    assert_matches(*ops, inputs, dtype=torch.bfloat16, device=device, grad=("logits",))


def test_agrees_with_torch(device):
    logits, labels = random(11, 97).float().to(device).requires_grad_(), labels_for((11, 97)).to(device)
    ours = cross_entropy(logits, labels, label_smoothing=0.2, backend="triton")
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(expected, logits))


VIEWS = {
    "padded rows": lambda x: x.view(6, 64)[:, :61],
    "every other row": lambda x: x.view(12, 32)[::2],
    "column-major": lambda x: x.view(64, 6).t(),
    "three dimensions": lambda x: x.view(2, 3, 64),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strided_logits(view, device):
    labels = labels_for(tuple(view(torch.empty(384)).shape))
    ours, expected = both()
    kernel = lambda x, labels: ours(view(x), labels)  # noqa: E731
    eager = lambda x, labels: expected(view(x).reshape(-1, view(x).shape[-1]), labels.reshape(-1))  # noqa: E731
    assert_matches(kernel, eager, {"x": random(384), "labels": labels}, dtype=torch.float32, device=device, grad=("x",))


@pytest.mark.parametrize("labels", [[], [-100, -100]], ids=["no rows", "all ignored"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_nothing_to_learn_is_zero_and_connected(labels, backend, device):
    logits = torch.full((len(labels), 5), float("nan"), device=device).requires_grad_()
    loss = cross_entropy(logits, torch.tensor(labels, dtype=torch.int64, device=device), backend=backend)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_masked_vocabulary(device):
    logits = random(3, 9000).float()
    logits[:, :8500] = -float("inf")
    labels = torch.tensor([8600, 8999, 8500])
    inputs = {"logits": logits.double(), "labels": labels}
    assert_matches(*both(), inputs, dtype=torch.float32, device=device, grad=("logits",))


def test_label_outside_the_vocabulary_shows(device):
    logits = random(2, 7).float().to(device)
    loss = cross_entropy(logits, torch.tensor([3, 7], device=device), reduction="none", backend="triton")
    assert torch.isfinite(loss[0])
    assert torch.isnan(loss[1])


def test_inplace_backward(device):
    values, labels = random(5, 97).bfloat16().to(device), labels_for((5, 97)).to(device)
    apart = values.clone().requires_grad_()
    cross_entropy(apart, labels, backend="triton").backward()
    leaf = values.clone().requires_grad_()
    given_up = leaf * 1
    loss = cross_entropy(given_up, labels, inplace_backward=True, backend="triton")
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, apart.grad)
    assert torch.equal(given_up.detach(), apart.grad)
    with pytest.raises(ConflictError, match="overwritten"):
        loss.backward()


@DTYPE
@FORM
def test_rows_with_gradient_in_place(form, dtype, device):
    logits = random(4, 16389, scale=2.0).to(dtype).to(device)
    labels = labels_for((4, 16389), ignored=False).to(device)
    coefficients = torch.tensor([1.0, -0.5, 0.0, 2.0], device=device)
    options = RowOptions(temperature=0.8, **form)
    expected = eager_rows(logits, labels, coefficients, options, gradient=True, entropy=True, top1=True)
    buffer = logits.clone()
    loss, _, entropy, top1 = cross_entropy_rows(
        buffer, labels, coefficients, options, gradient=buffer, entropy=True, top1=True
    )
    torch.testing.assert_close(loss, expected.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(top1, expected.is_top1)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(
        buffer, expected.gradient, rtol=max(ulp, 2e-5), atol=1e-9 if dtype != torch.float16 else 6e-8
    )


def test_top1(device):
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]], device=device)
    _, _, _, top1 = cross_entropy_rows(
        logits, torch.tensor([1, 2], device=device), None, RowOptions(), gradient=None, top1=True
    )
    assert top1.tolist() == [True, False]


def test_is_deterministic(device):
    logits, labels = random(4, 9000).bfloat16().to(device), labels_for((4, 9000)).to(device)
    first, second = (cross_entropy(logits, labels, reduction="none", backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_gradcheck():
    logits = random(4, 6).requires_grad_()
    labels = torch.tensor([0, -100, 5, 2])
    options = {"label_smoothing": 0.1, "soft_cap": 2.0, "z_loss": 0.1}
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, **options), (logits,))


LOGITS, LABELS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
WRONG = {
    "labels of another shape": (ConfigError, {"labels": LABELS[:1]}),
    "float labels": (ArgumentError, {"labels": LABELS.float()}),
    "integer logits": (ArgumentError, {"logits": LOGITS.int()}),
    "reduction": (ConfigError, {"reduction": "max"}),
    "smoothing": (ConfigError, {"label_smoothing": 1.0}),
    "cap": (ConfigError, {"soft_cap": 0.0}),
    "z-loss": (ConfigError, {"z_loss": -1.0}),
    "weights of another shape": (ConfigError, {"token_weights": torch.ones(3)}),
    "weights with gradient": (UnsupportedError, {"token_weights": torch.ones(2).requires_grad_()}),
    "float64 kernel": (UnsupportedError, {"logits": LOGITS.double(), "backend": "triton"}),
}


@pytest.mark.parametrize(("error", "change"), WRONG.values(), ids=WRONG.keys())
def test_what_it_cannot_take(error, change):
    with pytest.raises(error):
        cross_entropy(**({"logits": LOGITS, "labels": LABELS} | change))


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [128_256, 152_064, 262_144])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_real_vocabularies(vocabulary, dtype, gpu):
    shape = (65, vocabulary)
    inputs = {"logits": random(*shape, scale=3.0), "labels": labels_for(shape)}
    assert_matches(*both(**FORMS["all"]), inputs, dtype=dtype, device=gpu, grad=("logits",))


@pytest.mark.gpu
def test_more_elements_than_int32_counts(gpu):
    rows, vocabulary = 16_500, 131_072
    assert rows * vocabulary > 2**31
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device=gpu)
    labels = torch.randint(0, vocabulary, (rows,), device=gpu)
    tail = logits[-3:].clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(tail.float(), labels[-3:], reduction="none")
    expected.sum().backward()
    logits.requires_grad_()
    loss = cross_entropy(logits * 1, labels, reduction="none", inplace_backward=True, backend="triton")
    torch.testing.assert_close(loss[-3:], expected)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad[-3:], tail.grad, rtol=1e-2, atol=1e-8)
    fused = logits.detach().clone()
    ones = torch.ones(rows, device=gpu)
    cross_entropy_rows(fused, labels, ones, RowOptions(), gradient=fused)
    torch.testing.assert_close(fused[-3:], tail.grad, rtol=1e-2, atol=1e-8)
