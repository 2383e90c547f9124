"""Rows joined instead of padded train the same step, and are joined by default only where nothing else changes."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from training_support import panthera_model, texts
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from pantheraml.errors import ConfigError, ConflictError, UnsupportedError
from pantheraml.models import attention

FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gpt_oss": {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}


class Gradients(TrainerCallback):
    """Keeps the gradients of the step that is about to be made."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def model_of(family="llama", *, ours=True, **config):
    model = panthera_model(family, lora=False, max_seq_length=128, config=config)
    if ours:
        assert attention.prefer(model)
    return model


def trainer_of(folder, tokenizer, model=None, *, dataset=None, options=None, **given):
    from trl import SFTConfig, SFTTrainer

    settings = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 1}
    settings |= {"max_grad_norm": 0.0, "optim": "sgd", "save_strategy": "no", **(options or {})}
    return SFTTrainer(
        model=model if model is not None else model_of(),
        args=SFTConfig(output_dir=str(folder), **settings),
        train_dataset=texts(16) if dataset is None else dataset,
        processing_class=tokenizer,
        **given,
    )


def one_step(folder, tokenizer, family, **options):
    gradients = Gradients()
    model = model_of(family, **FAMILIES[family])
    trainer = trainer_of(folder, tokenizer, model, options=options, callbacks=[gradients])
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.found, batch


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_and_packed_rows_train_the_step_of_padded_ones(family, tmp_path, tiny_tokenizer):
    due, expected, padded = one_step(tmp_path, tiny_tokenizer, family, padding_free=False)
    assert padded["input_ids"].shape[0] == 16
    assert (padded["attention_mask"] == 0).any()
    tokens = int(padded["attention_mask"].sum())
    asked = [{"padding_free": True}, {"packing": True, "padding_free": True}] if family == "llama" else []
    for options in ({}, {"packing": True}, *asked):
        loss, gradients, batch = one_step(tmp_path, tiny_tokenizer, family, **options)
        assert batch["input_ids"].shape == (1, tokens)
        assert "attention_mask" not in batch
        assert loss == pytest.approx(due, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            allowed = 200 * torch.finfo(torch.float32).eps * float(expected[name].abs().max())
            torch.testing.assert_close(
                gradient, expected[name], rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("padding_free", [None, False], ids=["joined", "padded"])
def test_lengths_can_be_whole_multiples(padding_free, tmp_path, tiny_tokenizer):
    """Few shapes instead of as many as batches, at the same loss and gradients."""
    options = {} if padding_free is None else {"padding_free": padding_free}
    due, expected, _ = one_step(tmp_path, tiny_tokenizer, "llama", **options)
    loss, gradients, batch = one_step(tmp_path, tiny_tokenizer, "llama", pad_to_multiple_of=64, **options)
    assert batch["input_ids"].shape[1] % 64 == 0
    assert batch["input_ids"].shape[0] == (1 if padding_free is None else 16)
    assert loss == pytest.approx(due, rel=1e-6)
    for name, gradient in gradients.items():
        allowed = 200 * torch.finfo(torch.float32).eps * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=allowed)


def test_it_is_told_and_reported(tmp_path, tiny_tokenizer, capsys):
    trainer = trainer_of(tmp_path, tiny_tokenizer)
    assert trainer.padding_free is True
    assert capsys.readouterr().err.count("joined instead of padded (padding_free=False pads them)") == 1


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"padding_free": False}, {}),
        ({"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}, {}),
        ({"neftune_noise_alpha": 5}, {}),
        ({}, {"compute_metrics": lambda outputs: {}}),
        ({}, {"model": "sdpa"}),
        ({}, {"model": "counts positions"}),
    ],
    ids=["opted out", "single rows", "NEFTune", "metrics", "sdpa", "own positions"],
)
def test_rows_stay_padded_where_joining_would_change_something(options, given, tmp_path, tiny_tokenizer, capsys):
    kind = given.pop("model", None)
    model = model_of(ours=kind != "sdpa")
    if kind == "counts positions":
        model.model.embed_tokens.register_forward_hook(
            lambda module, inputs, output: output + torch.arange(output.shape[1])[:, None] / 100
        )
    trainer = trainer_of(tmp_path, tiny_tokenizer, model, options=options, **given)
    assert not trainer.padding_free
    assert "attention_mask" in trainer.data_collator([dict(row) for row in trainer.train_dataset.select(range(2))])
    told = capsys.readouterr().err
    assert "joined instead" not in told
    # What the user chose, or the collator cannot do, needs no word; what was measured does.
    assert told.count("rows of a batch are padded") == (kind == "counts positions")


def test_a_collator_of_the_users_decides_alone(tmp_path, tiny_tokenizer):
    collator = DataCollatorForSeq2Seq(tiny_tokenizer)
    assert trainer_of(tmp_path, tiny_tokenizer, data_collator=collator).data_collator is collator
    with pytest.raises(ConflictError, match="padding_free=True and data_collator"):
        trainer_of(tmp_path, tiny_tokenizer, data_collator=collator, options={"padding_free": True})


def test_joining_on_request_is_refused_where_documents_would_mix(tmp_path, tiny_tokenizer):
    model = model_of()
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output + output.cumsum(1) / 100)
    assert not trainer_of(tmp_path, tiny_tokenizer, model).padding_free
    with pytest.raises(UnsupportedError, match="does not keep packed documents apart"):
        trainer_of(tmp_path, tiny_tokenizer, model, options={"padding_free": True})


def test_an_error_of_ours_while_it_is_measured_is_no_reason_to_pad(tmp_path, tiny_tokenizer):
    def fail(module, inputs, output):
        raise ConfigError("a kernel is asked for what it cannot do")

    model = model_of()
    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(ConfigError, match="a kernel is asked"):
        trainer_of(tmp_path, tiny_tokenizer, model)


def test_rows_are_cut_to_the_length_before_they_are_joined(tmp_path, tiny_tokenizer):
    long = Dataset.from_dict({"text": ["a long text " * 30, "short"]})
    for options in ({}, {"padding_free": True}):
        trainer = trainer_of(tmp_path, tiny_tokenizer, dataset=long, options={"max_length": 20, **options})
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["max_length_q"] == 20
        assert trainer.padding_free


def test_evaluation_gives_the_loss_of_padded_rows(tmp_path, tiny_tokenizer):
    losses = []
    for options in ({}, {"padding_free": False}):
        trainer = trainer_of(tmp_path, tiny_tokenizer, eval_dataset=texts(6), options=options)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_arguments_may_be_used_again(tmp_path, tiny_tokenizer):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path), max_steps=1)
    for ours in (True, False):
        trainer = SFTTrainer(
            model=model_of(ours=ours), args=args, train_dataset=texts(8), processing_class=tiny_tokenizer
        )
        assert bool(trainer.padding_free) is ours


def test_responses_only_keeps_labels_of_joined_rows(tmp_path, tiny_tokenizer):
    from pantheraml.chat_templates import train_on_responses_only

    chats = [[{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two " * n}] for n in (1, 5, 9, 3)]
    trainer = trainer_of(tmp_path, tiny_tokenizer, dataset=Dataset.from_dict({"messages": chats}))
    trainer = train_on_responses_only(trainer, instruction_part="<|user|>\n", response_part="<|assistant|>\n")
    batch = next(iter(trainer.get_train_dataloader()))
    trained = batch["input_ids"][batch["labels"] != -100]
    assert batch["input_ids"].shape[0] == 1
    assert "one" not in tiny_tokenizer.decode(trained)
    assert tiny_tokenizer.decode(trained).count("two") == 18
