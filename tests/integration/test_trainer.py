"""TRL's trainers given one of our models, and PantheraMLTrainer."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from conftest import make_tiny
from datasets import Dataset
from peft import LoraConfig
from training_support import panthera_model, texts
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pantheraml.errors import ConfigError, DataError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore")

FAST = {"optim": "adamw_torch", "learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 3}


def sft(folder, tokenizer, model=None, *, dataset=None, kind="SFTTrainer", options=None, **keywords):
    from trl import SFTConfig, SFTTrainer

    from pantheraml.trainer import PantheraMLTrainer, PantheraMLTrainingArguments

    trainer, config = {
        "SFTTrainer": (SFTTrainer, SFTConfig),
        "PantheraMLTrainer": (PantheraMLTrainer, PantheraMLTrainingArguments),
    }[kind]
    args = config(output_dir=str(folder), **FAST | (options or {}))
    return trainer(
        model=model if model is not None else panthera_model(),
        tokenizer=tokenizer,
        args=args,
        train_dataset=texts() if dataset is None else dataset,
        **keywords,
    )


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["SFTTrainer", "PantheraMLTrainer"])
def test_the_losses_are_those_of_a_stock_model_and_trainer(kind, tmp_path, tiny_tokenizer):
    ours = sft(tmp_path / "ours", tiny_tokenizer, kind=kind)
    ours.train()
    same = {"seed": 3407, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.001}
    stock = Trainer(
        model=panthera_model(adapted=False),
        args=TrainingArguments(output_dir=str(tmp_path / "stock"), logging_steps=1, **FAST | same),
        train_dataset=ours.train_dataset,
        data_collator=ours.data_collator,
    )
    stock.train()
    assert losses_of(ours) == pytest.approx(losses_of(stock), abs=1e-5)
    assert losses_of(ours)[-1] < losses_of(ours)[0]


def test_an_adapter_on_the_output_layer_is_trained(tmp_path, tiny_tokenizer):
    """TRL refuses it; ours must give the gradients of a plain forward and backward."""
    targets = ("q_proj", "lm_head")
    seen = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    model = panthera_model(targets=targets)
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    trainer = sft(tmp_path, tiny_tokenizer, model, options=options, callbacks=[Gradients()])
    assert "get_output_embeddings" not in vars(model.get_base_model())
    trainer.train()

    plain = panthera_model(targets=targets, adapted=False)
    total, count = 0.0, 0
    for row in trainer.train_dataset:
        logits = plain(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
    (total / count).backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert seen.keys() == wanted.keys()
    assert any("lm_head" in name and wanted[name].abs().max() > 0 for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(seen[name], gradient, rtol=0, atol=1e-5)


def test_model_state_around_training(tmp_path, tiny_tokenizer):
    inside = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            inside.append((model.training, model.config.use_cache, tiny_tokenizer.padding_side))

    tiny_tokenizer.padding_side = "left"
    trainer = sft(tmp_path, tiny_tokenizer, callbacks=[Look()])
    model = trainer.model
    assert not model.training
    assert tiny_tokenizer.padding_side == "right"
    trainer.train()
    assert inside == [(True, False, "right")] * 3
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert "gradient_checkpointing_enable" not in vars(model)


@pytest.mark.parametrize(
    ("own", "given", "recomputes"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
    ids=["model on", "model off", "user off", "user on"],
)
def test_who_decides_about_checkpointing(own, given, recomputes, tmp_path, tiny_tokenizer, monkeypatch):
    from pantheraml.models.layers import decoder
    from pantheraml.models.layers.levels import Keep

    kept = []
    original = decoder.decoder_layer
    monkeypatch.setattr(
        decoder, "decoder_layer", lambda h, spec, *a: kept.append(spec.level.keep) or original(h, spec, *a)
    )
    options = {} if given is None else {"gradient_checkpointing": given}
    model = panthera_model(checkpointing=own)
    trainer = sft(tmp_path, tiny_tokenizer, model, options={"max_steps": 1, **options})
    trainer.train()
    assert {level < Keep.ALL for level in kept} == {recomputes}
    assert trainer.args.gradient_checkpointing == recomputes


def test_checkpointing_changes_no_loss(tmp_path, tiny_tokenizer):
    results = []
    for mode in (True, False):
        trainer = sft(tmp_path / str(mode), tiny_tokenizer, panthera_model(checkpointing=mode))
        trainer.train()
        results.append(losses_of(trainer))
    assert results[0] == pytest.approx(results[1], abs=1e-6)


def test_lora_of_a_quantised_model_stays_fp32(tmp_path, tiny_tokenizer):
    model = panthera_model()
    object.__setattr__(model, "is_loaded_in_4bit", True)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = sft(tmp_path, tiny_tokenizer, model)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype is torch.float32
            assert torch.equal(parameter, before[name]), "not rounded on the way either"


def test_peft_config_given_to_the_trainer(tmp_path, tiny_tokenizer):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    trainer = sft(tmp_path, tiny_tokenizer, panthera_model(lora=False), peft_config=config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if p.requires_grad and not p.equal(before[name])}
    assert any("lm_head" in name for name in changed)
    assert any("q_proj" in name for name in changed)
    assert hasattr(trainer.model, "save_pretrained_merged")


def test_nothing_is_reported_to_trl(tmp_path, tiny_tokenizer, monkeypatch):
    import trl.trainer.base_trainer as base

    sent = []
    monkeypatch.setattr(base, "send_telemetry", lambda **kwargs: sent.append(kwargs))
    monkeypatch.delenv("CI", raising=False)
    sft(tmp_path, tiny_tokenizer)
    assert not sent


# ---- packing


def test_packed_documents_give_the_loss_of_single_ones(tmp_path, tiny_tokenizer):
    results = {}
    for packing in (True, False):
        batch = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
        trainer = sft(
            tmp_path / str(packing),
            tiny_tokenizer,
            panthera_model(max_seq_length=128),
            packing=packing,
            options={"max_steps": 1, **batch},
        )
        results[packing] = len(trainer.train_dataset)
        trainer.train()
        results[f"loss {packing}"] = losses_of(trainer)[0]
    assert results[True] < results[False]
    assert results["loss True"] == pytest.approx(results["loss False"], abs=1e-5)


def test_a_model_that_mixes_packed_documents_is_refused(tmp_path, tiny_tokenizer):
    model = panthera_model()
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output + output.cumsum(1) / 100)
    with pytest.raises(UnsupportedError, match="does not keep packed documents apart"):
        sft(tmp_path, tiny_tokenizer, model, packing=True)


# ---- data


def test_no_usable_column(tmp_path, tiny_tokenizer):
    with pytest.raises(DataError, match="'question'"):
        sft(tmp_path, tiny_tokenizer, dataset=Dataset.from_dict({"question": ["a"]}))


def test_prompts_that_fill_the_length_leave_nothing(tmp_path, tiny_tokenizer):
    dataset = Dataset.from_dict({"prompt": ["a long prompt " * 20] * 4, "completion": ["x"] * 4})
    with pytest.raises(DataError, match="no row is left"):
        sft(tmp_path, tiny_tokenizer, dataset=dataset, max_seq_length=8)


def test_labels_masked_after_construction_stop_train(tmp_path, tiny_tokenizer):
    trainer = sft(tmp_path, tiny_tokenizer)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(DataError, match="every label is masked"):
        trainer.train()


def test_evaluation_on_new_rows_and_formatting(tmp_path, tiny_tokenizer):
    rows = Dataset.from_dict({"q": ["one", "two"], "a": ["uno", "dos"]})
    trainer = sft(
        tmp_path,
        tiny_tokenizer,
        dataset=rows,
        eval_dataset=rows,
        formatting_func=lambda several: [f"{q} is {a}" for q, a in zip(several["q"], several["a"])],
    )
    assert tiny_tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == "<s>one is uno</s>"
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    assert trainer.evaluate(Dataset.from_dict({"text": ["<s>one is uno"]}))["eval_loss"] > 0


# What a function of one row makes of two or three rows at once may be as many strings, by accident.
ONE_ROW = {
    "cut": lambda row: row["text"][:2],
    "chosen": lambda row: row["good"] if row["flag"] else row["bad"],
    "compared": lambda row: row["good"] if row["flag"] == 1 else row["bad"],
    "joined": lambda row: row["text"] + row["bad"],
}


@pytest.mark.parametrize("kind", ONE_ROW)
def test_a_formatting_function_of_one_row_gets_one_row(kind, tmp_path, tiny_tokenizer):
    columns = {
        "text": [f"text {i}" for i in range(6)],
        "good": [f"good {i}" for i in range(6)],
        "bad": [f"bad {i}" for i in range(6)],
        "flag": [1, 0, 1, 0, 0, 1],
    }
    rows = Dataset.from_dict(columns)
    trainer = sft(tmp_path, tiny_tokenizer, dataset=rows, formatting_func=ONE_ROW[kind])
    texts = [tiny_tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in trainer.train_dataset]
    assert sorted(texts) == sorted(map(ONE_ROW[kind], rows))


def test_a_formatting_function_that_drops_rows_of_a_batch_is_refused(tmp_path, tiny_tokenizer):
    rows = Dataset.from_dict({"q": ["one", "two", "three", "skip"]})

    def formatted(several):
        return [f"say {q}" for q in several["q"] if q != "skip" or len(several["q"]) < 4]

    with pytest.raises(DataError, match="3 texts for 4 rows"):
        sft(tmp_path, tiny_tokenizer, dataset=rows, formatting_func=formatted)


# ---- PantheraMLTrainer


@pytest.mark.parametrize("copies", [["embed_tokens", "lm_head"], ["lm_head"]], ids=["both", "head"])
def test_embeddings_have_a_learning_rate_of_their_own(copies, tmp_path, tiny_tokenizer, capsys):
    model = panthera_model(modules_to_save=copies)
    trainer = sft(
        tmp_path,
        tiny_tokenizer,
        model,
        kind="PantheraMLTrainer",
        options={"embedding_learning_rate": 1e-3, "max_steps": 1},
    )
    trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (1e-3 if "modules_to_save" in name else 1e-2)
    assert len(rates) == sum(parameter.requires_grad for parameter in model.parameters())
    assert capsys.readouterr().err.count("learning rate 0.001") == 1


def test_the_embedding_learning_rate_is_what_moves_them(tmp_path, tiny_tokenizer):
    model = panthera_model(modules_to_save=["embed_tokens"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = sft(tmp_path, tiny_tokenizer, model, kind="PantheraMLTrainer", options={"embedding_learning_rate": 0.0})
    trainer.train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("modules_to_save" in name or "lora_B" in name):
            assert torch.equal(parameter, before[name]) == ("modules_to_save" in name)


def test_an_embedding_learning_rate_without_embeddings(tmp_path, tiny_tokenizer):
    trainer = sft(tmp_path, tiny_tokenizer, kind="PantheraMLTrainer", options={"embedding_learning_rate": 1e-3})
    with pytest.raises(ConfigError, match="no embedding or output layer is trained"):
        trainer.train()


def test_constructors_that_call_one_another_attach_once(tmp_path, tiny_tokenizer):
    trainer = sft(tmp_path, tiny_tokenizer, kind="PantheraMLTrainer")
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert len(kinds) == len(set(kinds))
    train, wrappers = trainer.train, []
    while not inspect.ismethod(train):
        wrappers.append(train.__code__)
        train = train.__wrapped__
    assert len(wrappers) == len(set(wrappers)) == 2
    assert train.__func__ is type(trainer).train


def test_options_of_pantheraml_training_arguments(tmp_path):
    from pantheraml.trainer import UnslothTrainingArguments

    with pytest.raises(UnsupportedError, match="Q-GaLore"):
        UnslothTrainingArguments(output_dir=str(tmp_path), q_galore_config=object())
    with pytest.raises(ConfigError, match="on_nonfinite"):
        UnslothTrainingArguments(output_dir=str(tmp_path), on_nonfinite="ignore")
    with pytest.raises(TypeError, match="did you mean 'embedding_learning_rate'"):
        UnslothTrainingArguments(output_dir=str(tmp_path), embeding_learning_rate=1e-5)
    assert UnslothTrainingArguments(output_dir=str(tmp_path), max_seq_length=12).max_length == 12


def test_names_of_the_facade(tmp_path, tiny_tokenizer):
    from trl import SFTTrainer

    from pantheraml import trainer as facade

    assert facade.UnslothTrainer is facade.PantheraMLTrainer
    assert issubclass(facade.PantheraMLTrainer, SFTTrainer)
    assert facade._patch_trl_trainer() is None
    trainer = sft(tmp_path, tiny_tokenizer, options={"max_steps": 1})
    assert facade.unsloth_train(trainer).global_step == 1
    assert trainer.tokenizer is tiny_tokenizer
    with pytest.raises(TypeError, match="no trainer"):
        facade.pantheraml_train(object())


# ---- what is left behind


def test_metrics_and_report(tmp_path, tiny_tokenizer):
    secret = "hf_canaryCANARYcanary1234567890"
    trainer = sft(tmp_path, tiny_tokenizer, options={"hub_token": secret, "max_steps": 2})
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, PrinterCallback)]
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert {"loss", "grad_norm", "lr", "tokens", "tokens_per_second", "memory_gib", "time"} <= line.keys()
    lengths = sum(map(len, trainer.train_dataset["input_ids"]))
    assert lines[-1]["tokens"] == lengths, "two steps of eight rows see each of the sixteen once"
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert "finished after 2 steps" in page
    assert secret not in page
    assert secret not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path, tiny_tokenizer):
    options = {"save_steps": 2, "save_strategy": "steps", "max_steps": 2}
    sft(tmp_path, tiny_tokenizer, options=options).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    trainer = sft(tmp_path, tiny_tokenizer, options={**options, "max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_user_callback_that_fails_ends_the_run_with_its_own_error(tmp_path, tiny_tokenizer):
    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise LookupError("mine")

    trainer = sft(tmp_path, tiny_tokenizer, callbacks=[Broken()])
    with pytest.raises(LookupError, match="mine"):
        trainer.train()
    assert "stopped by LookupError after 1 steps" in (tmp_path / "report.html").read_text()
    assert not trainer.model.training


def test_a_logger_that_fails_does_not(tmp_path, tiny_tokenizer, capsys):
    class Failing(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            raise ConnectionError("no network")

    Failing.__module__ = "transformers.integrations.fake"
    trainer = sft(tmp_path, tiny_tokenizer, callbacks=[Failing()])
    assert trainer.train().global_step == 3
    assert capsys.readouterr().err.count("Failing failed") == 1


def test_an_output_folder_that_cannot_be_written_costs_no_training(tmp_path, tiny_tokenizer, capsys):
    trainer = sft(tmp_path / "out", tiny_tokenizer, options={"save_strategy": "no"})
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("in the way")
    assert trainer.train().global_step == 3
    told = capsys.readouterr().err
    assert told.count("metrics.jsonl could not be written") == 1
    assert told.count("the report could not be written") == 1


def test_the_users_choice_of_display_stays(tmp_path, tiny_tokenizer):
    trainer = sft(tmp_path, tiny_tokenizer, options={"disable_tqdm": True})
    assert [c for c in trainer.callback_handler.callbacks if type(c) is PrinterCallback]


def test_preference_training_takes_our_models(tmp_path, tiny_tokenizer):
    from trl import DPOConfig, DPOTrainer

    pairs = Dataset.from_dict({"prompt": ["two plus two"] * 4, "chosen": [" four"] * 4, "rejected": [" five"] * 4})
    args = DPOConfig(output_dir=str(tmp_path), **FAST)
    trainer = DPOTrainer(model=panthera_model(), args=args, train_dataset=pairs, tokenizer=tiny_tokenizer)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


def test_a_stock_model_is_left_to_trl(tmp_path, tiny_tokenizer):
    trainer = sft(tmp_path, tiny_tokenizer, make_tiny())
    assert "train" not in vars(trainer)
    assert not [c for c in trainer.callback_handler.callbacks if type(c).__module__.startswith("pantheraml")]
