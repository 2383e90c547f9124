"""The figures that TRL logs, read once a log: the same values, and no read before the backward."""

from __future__ import annotations

import traceback

import pytest
import torch
from datasets import Dataset
from torch._C import _len_torch_function_stack
from torch.utils._python_dispatch import TorchDispatchMode
from training_support import panthera_model

from pantheraml.training import attach, deferred

pytestmark = pytest.mark.filterwarnings("ignore")

FIGURES = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")


NOTED = {
    torch.ops.aten._local_scalar_dense.default: "read",
    torch.ops.aten.nonzero.default: "searched",
    torch.ops.aten.embedding.default: "forward",
}


class Waits(TorchDispatchMode):
    """Notes readings from the device and searches on it, and where the model's forward begins.

    Without those of transformers' question whether a mask hides anything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = NOTED.get(func)
        if name is not None and not any("masking_utils" in frame.filename for frame in traceback.extract_stack()):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def rows() -> Dataset:
    """Twelve rows of different lengths."""
    ids = [[5 + (i * j) % 40 for j in range(1, 5 + i)] for i in range(12)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(row) for row in ids]})


def trainer_of(folder, tokenizer, *, kind=None, model_type="llama", **options):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=6,
        learning_rate=1e-2,
        train_sampling_strategy="sequential",
        packing=False,
        **{"optim": "adamw_torch", "padding_free": False} | options,
    )
    data = rows()
    model = panthera_model(model_type)
    kind = kind or SFTTrainer
    trainer = kind(model=model, processing_class=tokenizer, args=args, train_dataset=data, eval_dataset=data)
    collate = trainer.data_collator

    def second_batch_without_labels(examples):
        batch = collate(examples)
        if batch["input_ids"][0].tolist()[:3] == ids_of_third[:3]:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch

    ids_of_third = data[2]["input_ids"]
    trainer.data_collator = second_batch_without_labels
    return trainer


def logged(trainer) -> list[dict]:
    trainer.train()
    trainer.evaluate()
    names = {*FIGURES, *(f"eval_{name}" for name in FIGURES)}
    return [{k: v for k, v in entry.items() if k in names} for entry in trainer.state.log_history]


@pytest.mark.parametrize(("model_type", "steps"), [("llama", 1), ("llama", 3), ("qwen2_moe", 2)])
def test_every_logged_figure_is_that_of_stock(model_type, steps, tmp_path, tiny_tokenizer, monkeypatch):
    ours = logged(trainer_of(tmp_path / "a", tiny_tokenizer, model_type=model_type, logging_steps=steps))
    monkeypatch.setattr(attach, "defer_figures", lambda trainer: False)
    stock = logged(trainer_of(tmp_path / "b", tiny_tokenizer, model_type=model_type, logging_steps=steps))
    assert ours == stock
    if steps == 1:
        assert [entry["entropy"] == 0.0 for entry in ours[:6]] == [False, True, False, False, False, False]
    numbers = [value for entry in ours for value in entry.values()]
    assert {type(value) for value in numbers} <= {int, float}


def test_a_micro_batch_is_asked_once_before_its_forward(tmp_path, tiny_tokenizer):
    trainer = trainer_of(tmp_path, tiny_tokenizer, logging_steps=2)
    waits = []
    step = trainer.training_step

    def watching(*args, **kwargs):
        with Waits() as micro_batch:
            result = step(*args, **kwargs)
        waits.append(micro_batch.seen)
        return result

    trainer.training_step = watching
    trainer.train()
    # Which labels count.
    assert waits == [["searched", "forward"]] * 6
    assert isinstance(trainer._total_train_tokens, int)


class Written(TorchDispatchMode):
    """Notes how tensors of one element come to be."""

    def __init__(self) -> None:
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.full.default, torch.ops.aten._to_copy.default, torch.ops.aten.lift_fresh.default):
            self.made.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("number", [3, 2.5, True])
def test_a_number_is_written_on_the_device_and_not_copied_there(number):
    # "meta" stands for a GPU.
    with deferred._Written(), Written() as written:
        tensors = [torch.tensor(number, device=device) for device in ("meta", torch.device("meta"))]
    assert written.made == [torch.ops.aten.full.default] * 2
    assert {(t.dtype, t.dim()) for t in tensors} == {(torch.tensor(number).dtype, 0)}
    with deferred._Written(), Written() as written:
        assert torch.equal(torch.tensor(number, device="cpu"), torch.tensor(number))
        assert torch.equal(torch.tensor(number, device=None), torch.tensor(data=number))
        assert torch.tensor([number], device="meta").shape == (1,)
    assert torch.ops.aten.full.default not in written.made


@pytest.mark.parametrize("padding_free", [True, False])
def test_numbers_are_written_only_while_figures_are_made(padding_free, tmp_path, tiny_tokenizer, monkeypatch):
    trainer = trainer_of(tmp_path, tiny_tokenizer, padding_free=padding_free, logging_steps=2)
    seen = []
    forward = trainer.model.forward
    monkeypatch.setattr(
        trainer.model, "forward", lambda *a, **k: seen.append(_len_torch_function_stack()) or forward(*a, **k)
    )
    gather = trainer.accelerator.gather_for_metrics
    monkeypatch.setattr(
        trainer.accelerator,
        "gather_for_metrics",
        lambda *a, **k: seen.append(_len_torch_function_stack()) or gather(*a, **k),
    )
    trainer.train()
    # Entropy's, the right tokens' and all tokens' sums, and their number.
    assert seen == [0, 1, 1, 1, 1] * 6
    assert _len_torch_function_stack() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only torch.cuda tells of what waits")
@pytest.mark.parametrize("padding_free", [True, False])
def test_from_the_first_layer_on_a_step_does_not_wait_for_the_gpu(padding_free, tmp_path, tiny_tokenizer):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    options = {"padding_free": padding_free, "logging_steps": 1, "optim": "adamw_torch_fused"}
    trainer = trainer_of(tmp_path, tiny_tokenizer, **options)
    trainer.add_callback(Watch())
    watched = []

    def watch(*_):
        # The first steps compile, and measure for the activation plan.
        if trainer.state.global_step > 2 and trainer.model.training:
            watched.append(trainer.state.global_step)
            torch.cuda.set_sync_debug_mode("error")

    trainer.model.get_submodule("base_model.model.model.layers.0").register_forward_pre_hook(watch)
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sorted(set(watched)) == [3, 4, 5]


def test_figures_do_not_pile_up(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(deferred, "_MOST_PENDING", 2)
    trainer = trainer_of(tmp_path, tiny_tokenizer, logging_steps=6)
    most = []
    loss = trainer.compute_loss

    def watching(*args, **kwargs):
        result = loss(*args, **kwargs)
        values = trainer._metrics["train"]["entropy"]
        most.append(sum(isinstance(value, deferred.Deferred) for value in values))
        return result

    trainer.compute_loss = watching
    trainer.train()
    assert max(most) < 2
    assert "entropy" in trainer.state.log_history[0]


def test_a_loss_of_the_users_own_is_left_alone(tmp_path, tiny_tokenizer):
    from trl import SFTTrainer

    class Own(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            count = self.accelerator.gather_for_metrics(torch.ones((), dtype=torch.int64)).sum()
            assert isinstance(count.item(), int)
            return super().compute_loss(*args, **kwargs)

    trainer = trainer_of(tmp_path, tiny_tokenizer, kind=Own, logging_steps=1)
    assert "compute_loss" not in vars(trainer)
    trainer.train()


def test_a_deferred_number_can_be_used_at_once():
    number = deferred.Deferred(torch.tensor(3))
    assert (int(number), float(number), f"{number:>3}") == (3, 3.0, "  3")
    assert number > 2
    assert not number > 3
    assert deferred.read([deferred.Deferred(torch.zeros(())) / deferred.Deferred(torch.tensor(0))]) == [0.0]
    assert deferred.read([2 + number, number // 2, 1.5]) == [5, 1, 1.5]
