"""Each document of a packed row has the logits and the gradients that it has alone, in fp32 on the trainer's path."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from training_support import panthera_model
from trl import SFTConfig, SFTTrainer

from pantheraml.chat_templates import train_on_responses_only
from pantheraml.errors import UnsupportedError
from pantheraml.models import attention
from pantheraml.training import isolation

# The loss that balances experts is of all tokens of a batch, whichever documents they belong to.
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gpt_oss": {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"router_aux_loss_coef": 0.0},
}
WORDS = ["fox", "dog", "quick", "brown", "lazy", "over", "jumps", "the"]
CHATS = [
    [
        {"role": "user", "content": " ".join(WORDS[n % 8 :] + WORDS[: n % 3])},
        {"role": "assistant", "content": " ".join(WORDS[: 2 + n % 5])},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": WORDS[n % 8]},
    ][: 4 if n % 3 else 2]
    for n in range(9)
]
ROWS = {
    "replies": [{"messages": chat} for chat in CHATS],
    "texts": [{"text": f"{' '.join(WORDS[n % 8 :])} {n}"} for n in range(9)],
}


def trainer_of(folder, tokenizer, model, rows, **options):
    settings = {"per_device_train_batch_size": 3, "max_length": 96, "shuffle_dataset": False, **options}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), report_to=[], use_cpu=True, **settings),
        train_dataset=Dataset.from_list(ROWS[rows]),
        processing_class=tokenizer,
    )
    return train_on_responses_only(trainer) if rows == "replies" else trainer


def model_of(family):
    model = panthera_model(family, lora=False, max_seq_length=96, config=FAMILIES[family])
    assert attention.prefer(model)
    return model


def documents_of(row):
    """Where each document of a packed row begins and ends."""
    ends = torch.tensor(row["seq_lengths"]).cumsum(0).tolist()
    return list(zip([0, *ends], ends))


def gradients(trainer, batch):
    """The gradients of the loss that the trainer computes of a batch, and how many tokens it is of."""
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.train()
    count = (batch["labels"][:, 1:] != -100).sum()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count).backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return found, int(count)


def logits(model, batch):
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits[0]


def close(found, expected):
    """Equal up to the rounding of sums in another order."""
    scale = 200 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    return bool((found - expected).abs().max() <= scale)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_document_has_its_own_logits_and_gradients(family, rows, tmp_path, tiny_tokenizer):
    model = model_of(family)
    packed = trainer_of(tmp_path, tiny_tokenizer, model, rows, packing=True)
    padded = trainer_of(tmp_path, tiny_tokenizer, model, rows, padding_free=False)
    assert packed.data_collator.padding_free
    assert not padded.data_collator.padding_free
    alone = {tuple(row["input_ids"]): row for row in padded.train_dataset}
    assert len(alone) == len(padded.train_dataset) == 9
    for row in packed.train_dataset:
        several = documents_of(row)
        if len(several) == 1:
            continue
        batch = packed.data_collator([dict(row)])
        joined = logits(model, batch)
        for start, end in several:
            single = alone.pop(tuple(row["input_ids"][start:end]))
            own = padded.data_collator([{name: single[name] for name in ("input_ids", "labels")}])
            assert close(joined[start:end], logits(model, own))
            only = batch["labels"].clone()
            only[:, :start], only[:, end:] = -100, -100
            found, count = gradients(packed, batch | {"labels": only})
            expected, due = gradients(padded, own)
            assert count == due > 0
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                assert gradient.abs().max() > 0 or "expert" in name, name
                assert close(found[name], gradient), name
        # Without the places in their documents, tokens would see other documents.
        mixed = logits(model, {name: value for name, value in batch.items() if name == "input_ids"})
        assert not close(mixed[several[1][0] :], joined[several[1][0] :])
    assert len(alone) <= 1


def test_the_loss_of_a_packed_data_set_is_that_of_its_documents(tmp_path, tiny_tokenizer):
    """All packed rows at once, against all documents at once, padded."""
    model = model_of("llama")
    packed = trainer_of(tmp_path, tiny_tokenizer, model, "replies", packing=True)
    padded = trainer_of(tmp_path, tiny_tokenizer, model, "replies", padding_free=False)
    found, count = gradients(packed, packed.data_collator([dict(row) for row in packed.train_dataset]))
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in padded.train_dataset]
    expected, due = gradients(padded, padded.data_collator(rows))
    assert count == due
    for name, gradient in expected.items():
        assert close(found[name], gradient), name


@pytest.mark.parametrize(("family", "refused"), [("llama", True), ("gpt_oss", False)])
def test_rounding_is_allowed_to_experts_only(family, refused, monkeypatch):
    """Whatever else moves the next document by more than its last digit is read from the one before."""
    outputs = iter([torch.ones(6, 9), torch.ones(6, 9) + 1e-5])
    monkeypatch.setattr(isolation, "_last_document", lambda *_: next(outputs))
    # As for models in shards, of which outputs are compared.
    monkeypatch.setattr(isolation, "_gradient_of_first", lambda _: None)
    trainer = SimpleNamespace(
        model=panthera_model(family, lora=False, config=FAMILIES[family]), args=SimpleNamespace(packing=True)
    )
    with pytest.raises(UnsupportedError, match="does not keep packed documents apart") if refused else nullcontext():
        isolation.check_isolation(trainer)
