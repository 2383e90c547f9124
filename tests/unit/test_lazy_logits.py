"""Logits that exist only when they are read: everything a caller may do with them agrees with the stock head."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny
from torch.utils._python_dispatch import TorchDispatchMode

from pantheraml.errors import ConflictError, UnsupportedError
from pantheraml.models.adapt import adapt, restore
from pantheraml.models.layers.chain import Op, as_affine
from pantheraml.models.layers.lazy import LazyLogits
from pantheraml.models.loss import token_statistics

VOCABULARY = 384
HIDDEN = 64
SHAPE = (2, 12, VOCABULARY)


class Watch(TorchDispatchMode):
    """Collects the operations that make a tensor of at least so many rows of logits."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.offenders: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or isinstance(tensor, LazyLogits) or tensor.device.type == "meta":
                continue
            # The head's own matrix has the hidden size as its number of rows.
            rows = tensor.numel() // VOCABULARY
            if tensor.shape[-1:] == (VOCABULARY,) and rows >= self.rows and rows != HIDDEN:
                self.offenders.append(f"{func} {tuple(tensor.shape)}")
        return result


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, SHAPE[:2], generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def pair(model_type: str = "llama", **overrides):
    """A stock model and an adapted copy."""
    stock = make_tiny(model_type, **overrides)
    adapted = copy.deepcopy(stock)
    adapt(adapted)
    return stock, adapted


def pending(logits) -> bool:
    return isinstance(logits, LazyLogits) and logits.is_pending()


def assert_same_gradients(stock, adapted):
    for (name, left), (_, right) in zip(stock.named_parameters(), adapted.named_parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        if left.grad is not None:
            torch.testing.assert_close(right.grad, left.grad, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------- nobody reads: nothing is materialised


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "cohere"])
def test_no_tensor_of_tokens_times_vocabulary_is_made_when_only_the_loss_is_read(model_type, monkeypatch):
    import pantheraml.kernels.reference.linear_cross_entropy as reference

    # One chunk of the kernel holds 128 rows; the batch has four times as many.
    monkeypatch.setattr(reference, "CHUNK_BYTES_ELSEWHERE", 128 * VOCABULARY * 4)
    model = make_tiny(model_type)
    ids = torch.randint(3, VOCABULARY, (4, 128), generator=torch.Generator().manual_seed(0))
    stock = copy.deepcopy(model)
    adapt(model)
    with Watch(ids.numel() // 2) as seen:
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
    assert not seen.offenders
    assert pending(output.logits)
    with Watch(ids.numel() // 2) as seen:
        stock(input_ids=ids, labels=ids).loss.backward()
    assert seen.offenders, "the watch does not see what stock makes"
    assert_same_gradients(stock, model)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.shape,
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to("cpu"),
        lambda x: (x / 3.0) * 2,
        lambda x: 2.0 * torch.tanh(x / 2.0),
        lambda x: x[..., :-1, :].contiguous(),
        lambda x: x[:, -1, :],
        lambda x: x[:, :-1].reshape(-1, VOCABULARY),
        lambda x: x.view(-1, x.size(-1)),
        lambda x: x.flatten(0, 1),
        lambda x: x.detach(),
        lambda x: x[torch.ones(SHAPE[:2], dtype=torch.bool)],
        lambda x: x[..., :VOCABULARY],
        lambda x: (x.dtype, x.device, x.dim(), x.ndim, x.numel(), len(x), x.requires_grad, x.grad_fn),
    ],
    ids=[
        "shape", "float", "to_dtype", "to_device", "scale", "cap", "shift", "last", "slice_reshape", "view", "flatten",
        "detach", "mask", "whole_vocabulary", "metadata",
    ],
)  # fmt: skip
def test_uses_that_need_no_logits(batch, use):
    stock, adapted = pair()
    logits = adapted(**batch).logits
    result = use(logits)
    assert pending(logits)
    expected = use(stock(**batch).logits)
    if isinstance(expected, torch.Tensor):
        assert pending(result)
        assert (result.shape, result.dtype, result.requires_grad) == (
            expected.shape,
            expected.dtype,
            expected.requires_grad,
        )
        torch.testing.assert_close(result.clone().contiguous() + 0.0, expected, rtol=1e-6, atol=1e-6)
    elif isinstance(expected, torch.Size):
        assert result == expected
    else:
        assert result[:-1] == expected[:-1]
        assert result[-1] is not None


# --------------------------------------------------------------------------------------- somebody reads: same as stock


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.argmax(-1),
        lambda x: x.softmax(-1),
        lambda x: F.log_softmax(x, dim=-1),
        lambda x: x[:, :, 5],
        lambda x: x[..., :7],
        lambda x: x[0, 3, 2].item(),
        lambda x: x.cpu().clone(),
        lambda x: x.detach().numpy().copy(),
        lambda x: x.tolist(),
        lambda x: list(x)[1],
        lambda x: torch.stack(list(iter(x))),
        lambda x: torch.cat([x, x]),
        lambda x: torch.topk(x, 3).indices,
        lambda x: x.gather(-1, torch.zeros(*SHAPE[:2], 1, dtype=torch.long)),
        lambda x: x.logsumexp(-1),
        lambda x: x == x.max(),
        lambda x: repr(x)[:40],
        lambda x: f"{x.sum():.5f}",
        lambda x: x.transpose(1, 2),
        lambda x: x + 1,
        lambda x: 1 / x,
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.unbind(0)[1],
        lambda x: pickle.loads(pickle.dumps(x.detach())),
        lambda x: copy.deepcopy(x.detach()),
        lambda x: torch.utils._pytree.tree_map(lambda t: t * 2, {"a": [x]})["a"][0] + 0,
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_reading_gives_what_stock_gives(batch, read, model_type):
    stock, adapted = pair(model_type)
    expected, result = read(stock(**batch).logits), read(adapted(**batch).logits)
    if isinstance(expected, torch.Tensor):
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        assert result.requires_grad == expected.requires_grad
    elif hasattr(expected, "dtype"):
        assert (result == expected).all()
    else:
        assert result == expected


def test_logits_are_computed_once(batch):
    _, adapted = pair()
    logits = adapted(**batch).logits
    first = logits.argmax(-1)
    assert not pending(logits)
    assert logits.read() is logits.read()
    assert torch.equal(logits[:, -1].argmax(-1), first[:, -1])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
def test_gradients_through_logits_are_those_of_stock(batch, model_type):
    stock, adapted = pair(model_type)
    for model in (stock, adapted):
        output = model(**batch)
        (output.loss + output.logits.square().mean() + output.logits[:, -1].log_softmax(-1)[:, 7].sum()).backward()
    assert_same_gradients(stock, adapted)


def test_writing_in_place_shows_through_views(batch):
    stock, adapted = pair()
    results = []
    for model in (stock, adapted):
        with torch.no_grad():
            logits = model(**batch).logits
            last = logits[:, -1]
            flat = logits.view(-1, VOCABULARY)
            logits[:, :, 3] = 5.0
            last.mul_(2.0)
            logits /= 4.0
            results.append((logits + 0, last + 0, flat + 0))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(right, left, rtol=0, atol=0)


def test_in_place_scalar_operations_are_recorded(batch):
    stock, adapted = pair()
    results = []
    for model in (stock, adapted):
        logits = model(input_ids=batch["input_ids"]).logits
        logits.div_(3.0)
        logits *= 0.5
        logits = logits.tanh_() * 3.0
        results.append(F.cross_entropy(logits.view(-1, VOCABULARY), batch["labels"].view(-1)))
        results[-1].backward()
    assert pending(logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    assert_same_gradients(stock, adapted)


def test_logits_read_after_the_head_changed_are_refused(batch):
    _, adapted = pair()
    logits = adapted(**batch).logits
    with torch.no_grad():
        adapted.lm_head.weight.add_(1.0)
    with pytest.raises(ConflictError, match="weights changed"):
        logits.argmax(-1)


def test_the_gradient_of_fused_logits_is_refused_and_that_of_read_ones_is_there(batch):
    stock, adapted = pair()
    output = adapted(**batch)
    with pytest.raises(UnsupportedError, match="does not exist"):
        output.logits.retain_grad()
    gradients = []
    for model in (stock, adapted):
        logits = model(input_ids=batch["input_ids"]).logits
        logits.retain_grad()
        logits.square().sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ loss functions


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(9)},
        {"ignore_index": 5},
        {"shift_labels": torch.arange(24).view(2, 12) + 3},
    ],
    ids=["items_int", "items_tensor", "ignore_index", "shift_labels"],
)
def test_loss_keywords(batch, keywords):
    stock, adapted = pair()
    if "ignore_index" in keywords:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][0, 2] = keywords["ignore_index"]
    left, right = stock(**batch, **keywords), adapted(**batch, **keywords)
    torch.testing.assert_close(right.loss, left.loss, rtol=1e-6, atol=1e-6)
    assert pending(right.logits)
    left.loss.backward()
    right.loss.backward()
    assert_same_gradients(stock, adapted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_callers_own_cross_entropy(batch, reduction, smoothing):
    stock, adapted = pair("gemma2")
    losses = []
    for model in (stock, adapted):
        logits = model(input_ids=batch["input_ids"]).logits[..., :-1, :].contiguous()
        loss = F.cross_entropy(
            logits.view(-1, VOCABULARY),
            batch["labels"][..., 1:].reshape(-1),
            reduction=reduction,
            label_smoothing=smoothing,
        )
        loss.sum().backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for name, parameter in adapted.named_parameters():
        reference = stock.get_parameter(name).grad
        torch.testing.assert_close(
            parameter.grad, reference, rtol=1e-5, atol=1e-6 * reference.abs().max().item() + 1e-6
        )


def test_label_smoother_reads_logits(batch):
    from transformers.trainer_pt_utils import LabelSmoother

    stock, adapted = pair()
    smoother = LabelSmoother(epsilon=0.1)
    inputs = {"input_ids": batch["input_ids"]}
    left, right = (smoother(model(**inputs), batch["labels"], shift_labels=True) for model in (stock, adapted))
    torch.testing.assert_close(right, left, rtol=0, atol=0)


def test_head_with_bias_and_frozen_or_trained_tied_head(batch):
    for tied in (False, True):
        for trained in (False, True):
            stock = make_tiny("llama", tie_word_embeddings=tied)
            stock.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
            stock.get_input_embeddings().weight.requires_grad_(trained)
            stock.lm_head.weight.requires_grad_(trained)
            adapted = copy.deepcopy(stock)
            adapt(adapted)
            assert (adapted.lm_head.weight is adapted.get_input_embeddings().weight) == tied
            for model in (stock, adapted):
                model(**batch).loss.backward()
            assert_same_gradients(stock, adapted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32_autocast"])
def test_low_precision_stays_within_the_error_of_stock(batch, dtype):
    truth = make_tiny("llama")
    if dtype == torch.bfloat16:
        truth = truth.to(torch.bfloat16).float()
    expected = truth(**batch).loss
    stock = copy.deepcopy(truth).to(dtype)
    adapted = copy.deepcopy(stock)
    adapt(adapted)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        left, right = stock(**batch), adapted(**batch)
        assert right.logits.dtype == left.logits.dtype == torch.bfloat16
        assert right.loss.dtype == left.loss.dtype
    assert abs(right.loss - expected) <= 1.5 * abs(left.loss - expected) + 1e-4
    # Read outside autocast: still what the head computed inside.
    torch.testing.assert_close(right.logits + 0, left.logits, rtol=0, atol=0)


def test_an_unknown_chain_and_a_head_that_is_more_than_a_product_go_chunk_by_chunk(batch, monkeypatch):
    import pantheraml.models.loss as loss_module

    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * VOCABULARY * 5)
    stock, adapted = pair()
    losses = []
    for model in (stock, adapted):
        model.train()
        ids = batch["input_ids"]
        with Watch(10) as seen:
            logits = torch.tanh(torch.tanh(model(input_ids=ids).logits * 3))
            losses.append(F.cross_entropy(logits.view(-1, VOCABULARY), batch["labels"].view(-1)))
            losses[-1].backward()
    assert not seen.offenders
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    assert_same_gradients(stock, adapted)


def test_chains_reduce_to_scale_and_cap():
    assert as_affine([Op("div", 30.0), Op("tanh"), Op("mul", 30.0)]) == as_affine(
        [Op("to", torch.float32), Op("mul", 1 / 30.0), Op("tanh"), Op("div", 1 / 30.0)]
    )
    capped = as_affine([Op("mul", 0.5), Op("div", 30.0), Op("tanh"), Op("mul", 30.0)])
    assert capped is not None
    assert (capped.logit_scale, capped.soft_cap) == (0.5, 30.0)
    assert as_affine([Op("to", torch.bfloat16)]) is None
    assert as_affine([Op("tanh"), Op("tanh")]) is None
    assert as_affine([Op("tanh"), Op("mul", -1.0)]) is None


# ------------------------------------------------------------------------------------------ containers and frameworks


def test_tuple_outputs(batch):
    stock, adapted = pair()
    left, right = stock(**batch, return_dict=False), adapted(**batch, return_dict=False)
    torch.testing.assert_close(right[0], left[0], rtol=1e-6, atol=1e-6)
    assert pending(right[1])
    torch.testing.assert_close(right[1] + 0, left[1], rtol=0, atol=0)


def test_accelerate_converts_outputs_without_reading(batch):
    from accelerate.utils.operations import convert_outputs_to_fp32

    stock = make_tiny("llama", dtype=torch.bfloat16)
    adapted = copy.deepcopy(stock)
    adapt(adapted)
    left = convert_outputs_to_fp32(stock.forward)(**batch).logits
    right = convert_outputs_to_fp32(adapted.forward)(**batch).logits
    assert pending(right)
    assert right.dtype == torch.float32
    torch.testing.assert_close(right + 0, left, rtol=0, atol=0)


class _Sink(torch.autograd.Function):
    """What DDP does to outputs when it looks for unused parameters."""

    @staticmethod
    def forward(ctx, clone, *tensors):
        ctx.set_materialize_grads(False)
        return tuple(t.clone() for t in tensors) if clone else tensors

    @staticmethod
    def backward(ctx, *gradients):
        return (None, *gradients)


@pytest.mark.parametrize("clone", [True, False], ids=["clone", "pass"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_logits_through_an_autograd_function(batch, clone, model_type):
    """DDP passes outputs through an autograd function; gradients of loss and of logits have to arrive."""
    stock, adapted = pair(model_type)
    for model in (stock, adapted):
        output = model(**batch)
        assert output.logits.grad_fn is not None
        loss, logits = _Sink.apply(clone, output.loss, output.logits)
        (loss + logits.square().mean()).backward()
    assert_same_gradients(stock, adapted)
    adapted.zero_grad()
    with Watch(24) as seen:
        output = adapted(**batch)
        before = len(seen.offenders)
        loss, logits = _Sink.apply(True, output.loss, output.logits)
        loss.backward()
    assert len(seen.offenders) == before


def test_distributed_data_parallel_finds_unused_parameters(batch):
    import torch.distributed as dist

    stock, adapted = pair()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for model in (stock, adapted):
            wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            for _ in range(2):
                model.zero_grad()
                # The loss is the caller's, from the logits alone.
                logits = wrapped(input_ids=batch["input_ids"]).logits
                F.cross_entropy(logits.view(-1, VOCABULARY), batch["labels"].view(-1)).backward()
    finally:
        dist.destroy_process_group()
    assert_same_gradients(stock, adapted)


def test_trainer_predicts_and_trains_as_with_stock(batch, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": batch["input_ids"][i], "labels": batch["labels"][i]} for i in range(2)]
    results = []
    for model in pair():
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            report_to=[], use_cpu=True, save_strategy="no", seed=1, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        training = trainer.train()
        prediction = trainer.predict(rows)
        results.append((training.training_loss, prediction.predictions, prediction.metrics["test_loss"]))
    (left_loss, left, left_eval), (right_loss, right, right_eval) = results
    assert right_loss == pytest.approx(left_loss, rel=1e-5)
    assert right_eval == pytest.approx(left_eval, rel=1e-5)
    assert left.shape == right.shape
    torch.testing.assert_close(torch.from_numpy(right), torch.from_numpy(left), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate(batch, use_cache):
    stock, adapted = pair("gemma2")
    arguments = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache, "output_logits": True,
                 "return_dict_in_generate": True}  # fmt: skip
    left = stock.generate(batch["input_ids"], **arguments)
    right = adapted.generate(batch["input_ids"], **arguments)
    assert torch.equal(left.sequences, right.sequences)
    for a, b in zip(left.logits, right.logits, strict=True):
        torch.testing.assert_close(b + 0, a, rtol=1e-5, atol=1e-5)


def test_a_decoding_step_is_not_lazy(batch):
    _, adapted = pair()
    with torch.no_grad():
        assert type(adapted(input_ids=batch["input_ids"], logits_to_keep=1).logits) is torch.Tensor
        assert pending(adapted(input_ids=batch["input_ids"]).logits)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_modes(batch, context):
    stock, adapted = pair()
    with context():
        left, right = stock(**batch), adapted(**batch)
        torch.testing.assert_close(right.loss, left.loss, rtol=1e-6, atol=1e-6)
        assert pending(right.logits)
    torch.testing.assert_close((right.logits + 0).clone(), left.logits.clone(), rtol=0, atol=0)
    assert not right.logits.requires_grad


def test_gradient_checkpointing(batch):
    stock, adapted = pair()
    for model in (stock, adapted):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**batch).loss.backward()
    assert_same_gradients(stock, adapted)


def test_compiled_model_falls_back_to_real_logits(batch):
    stock, adapted = pair()
    compiled = torch.compile(adapted, backend="eager")
    with torch.no_grad():
        result = compiled(**batch)
    assert type(result.logits) is torch.Tensor
    torch.testing.assert_close(result.loss, stock(**batch).loss.detach(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- token statistics


def _reference_statistics(logits, labels, temperature):
    logits = logits.float() / temperature
    mask = labels != -100
    log_p = logits.log_softmax(-1)
    values = {
        "log_probs": log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "is_top1": logits.argmax(-1) == labels,
        "mean_logits": logits.mean(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
    }
    return {name: value * mask for name, value in values.items()}


@pytest.mark.parametrize("head", ["plain", "capped", "wrapped", "real"])
def test_token_statistics(batch, head, monkeypatch):
    import pantheraml.models.loss as loss_module

    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * VOCABULARY * 5)
    stock, adapted = pair("gemma2" if head == "capped" else "llama")
    names = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
    values = []
    for model in (stock, adapted):
        logits = model(input_ids=batch["input_ids"]).logits
        if model is stock:
            got = _reference_statistics(logits, batch["labels"], 0.7)
        else:
            if head == "wrapped":
                logits = torch.tanh(torch.atanh(torch.tanh(logits) * 0 + 0.5)) * 0 + logits
            if head == "real":
                logits = logits + 0
            got = vars(token_statistics(logits, batch["labels"], outputs=names, temperature=0.7))
        (got["log_probs"].sum() + 0.3 * got["entropy"].square().sum()).backward()
        values.append(got)
    for name in ("log_probs", *names):
        torch.testing.assert_close(values[1][name], values[0][name], rtol=2e-5, atol=2e-5, msg=name)
    for name, parameter in adapted.named_parameters():
        reference = stock.get_parameter(name).grad
        torch.testing.assert_close(
            parameter.grad, reference, rtol=1e-4, atol=2e-6 * reference.abs().max().item() + 1e-6
        )


def test_everything_masked_gives_zero_and_stays_connected(batch):
    _, adapted = pair()
    labels = torch.full_like(batch["labels"], -100)
    got = token_statistics(adapted(input_ids=batch["input_ids"]).logits, labels, outputs=("entropy",))
    assert got.log_probs.sum() == 0
    got.log_probs.sum().backward()
    restore(adapted)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_loss_of_16_bit_logits_has_the_dtype_of_stock(autocast):
    """Autocast takes it in float32, and it is not rounded to 16 bits afterwards."""
    model = make_tiny("llama").bfloat16()
    ids = torch.arange(12).view(1, 12)

    def loss(model):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])

    expected = loss(model)
    adapt(model)
    got = loss(model)
    assert got.dtype == expected.dtype == (torch.float32 if autocast else torch.bfloat16)
    torch.testing.assert_close(got, expected, rtol=1e-4 if autocast else 1e-2, atol=0)
