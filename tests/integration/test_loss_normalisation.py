"""The loss is the sum over the supervised tokens of a whole accumulation window divided by their number."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from training_support import panthera_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

LENGTHS = (3, 17, 5, 29, 8, 2, 23, 11)
SPLITS = [pytest.param(8, 1, id="8x1"), pytest.param(4, 2, id="4x2"), pytest.param(1, 8, id="1x8")]


class Gradients(TrainerCallback):
    """Keeps the gradients of the step that is about to be made."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def ragged_rows() -> Dataset:
    """Eight rows of different lengths, the first third of each without labels."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 384, (length,), generator=generator).tolist() for length in LENGTHS]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def one_step(kind: str, batch: int, accumulation: int, folder, tokenizer):
    """Loss and gradients of one optimizer step over all eight rows."""
    from trl import SFTConfig, SFTTrainer

    from pantheraml.trainer import PantheraMLTrainer, PantheraMLTrainingArguments

    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    model = panthera_model(lora=False)
    gradients = Gradients()
    shared = {"model": model, "train_dataset": ragged_rows(), "callbacks": [gradients], "processing_class": tokenizer}
    if kind == "Trainer":
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        trainer = Trainer(args=TrainingArguments(**options), data_collator=collator, **shared)
    elif kind == "SFTTrainer":
        trainer = SFTTrainer(args=SFTConfig(**options), **shared)
    else:
        trainer = PantheraMLTrainer(args=PantheraMLTrainingArguments(**options), **shared)
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.found


@pytest.fixture(scope="module")
def truth():
    """The same, computed one row at a time in plain torch on a stock model."""
    model = panthera_model(lora=False, adapted=False)
    total, count = 0.0, 0
    for row in ragged_rows():
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        count += int((labels != -100).sum())
    loss = total / count
    loss.backward()
    return float(loss), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["SFTTrainer", "PantheraMLTrainer", "Trainer"])
@pytest.mark.parametrize(("batch", "accumulation"), SPLITS)
def test_every_split_of_a_batch_gives_the_loss_and_gradients_of_the_whole(
    kind, batch, accumulation, truth, tmp_path, tiny_tokenizer
):
    loss, gradients = one_step(kind, batch, accumulation, tmp_path, tiny_tokenizer)
    assert loss == pytest.approx(truth[0], abs=1e-6)
    assert gradients.keys() == truth[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, truth[1][name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
