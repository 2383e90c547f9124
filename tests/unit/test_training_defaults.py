"""What the options of a run are when the user said nothing, and that nothing the user said is replaced."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import Dataset
from training_support import panthera_model, texts
from transformers.training_args import OptimizerNames

from pantheraml import device
from pantheraml._compat import trl as shim
from pantheraml.errors import ArgumentError, DataError, MissingDependencyError
from pantheraml.models.record import record_of
from pantheraml.training import defaults, rows

pytestmark = pytest.mark.filterwarnings("ignore")

EXPECTED = {
    "weight_decay": 0.001,
    "seed": 3407,
    "report_to": [],
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 4,
    "eval_accumulation_steps": 2,
    "learning_rate": 5e-5,
    "warmup_steps": 0.1,
    "torch_empty_cache_steps": 250,
    "max_length": 64,
    "output_dir": "pantheraml_training_checkpoints",
}
# A value other than the default, and the default of TRL or transformers itself: both are the user's when named.
GIVEN = {
    "weight_decay": 0.0,
    "seed": 42,
    "optim": "adamw_torch_fused",
    "logging_steps": 10,
    "logging_nan_inf_filter": True,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 8,
    "eval_accumulation_steps": 3,
    "learning_rate": 2e-5,
    "warmup_steps": 0,
    "torch_empty_cache_steps": 7,
    "max_length": 32,
}


def settled(model=None, **options):
    from trl import SFTConfig

    shim.register()
    args = SFTConfig(**options)
    model = model or panthera_model()
    defaults.apply_defaults(args, model, record_of(model), shim.explicit_names(args))
    return args


def test_defaults_when_nothing_was_said():
    args = settled()
    assert {name: getattr(args, name) for name in EXPECTED} == EXPECTED
    assert args.save_strategy == "no"
    assert args.optim == OptimizerNames.ADAMW_8BIT


@pytest.mark.parametrize(("name", "value"), GIVEN.items(), ids=GIVEN)
def test_a_value_given_is_never_replaced(name, value, tmp_path):
    args = settled(output_dir=str(tmp_path), **{name: value})
    assert getattr(args, name) == value
    assert args.output_dir == str(tmp_path)
    assert args.save_strategy == "steps"


def test_a_value_assigned_later_is_not_replaced(tmp_path):
    from trl import SFTConfig

    model = panthera_model()
    args = SFTConfig(output_dir=str(tmp_path))
    args.seed = 7
    defaults.apply_defaults(args, model, record_of(model), shim.explicit_names(args))
    assert args.seed == 7


def test_evaluation_follows_the_training_batch():
    args = settled(per_device_train_batch_size=3, gradient_accumulation_steps=5)
    assert (args.per_device_eval_batch_size, args.eval_accumulation_steps) == (3, 5)


def test_every_default_has_a_reason_and_names_an_option():
    from trl import SFTConfig

    options = {field.name for field in dataclasses.fields(SFTConfig)}
    names = [default.name for default in defaults.DEFAULTS]
    assert len(set(names)) == len(names)
    assert set(names) <= options
    assert all(default.reason for default in defaults.DEFAULTS)


def test_saving_stays_when_it_was_asked_for():
    args = settled(save_steps=5)
    assert args.save_strategy == "steps"


@pytest.mark.parametrize(
    ("given", "expected"), [(None, 64), (32, 32), (64, 64), (1000, 64)], ids=["unset", "smaller", "equal", "larger"]
)
def test_the_smaller_sequence_cap_holds(given, expected, capsys):
    args = settled(**({} if given is None else {"max_length": given}))
    assert args.max_length == expected
    assert ("reduced to 64" in capsys.readouterr().err) == (given == 1000)


def test_no_cap_known(capsys):
    args = settled(panthera_model(max_seq_length=0))
    assert args.max_length == 1024
    assert "1024" in capsys.readouterr().err


def test_bitsandbytes_missing(monkeypatch, capsys):
    defaults.eight_bit_optimizer_runs.cache_clear()
    monkeypatch.setattr(defaults, "is_installed", lambda name: False)
    monkeypatch.setattr(device, "is_installed", lambda name: False)
    try:
        assert settled().optim == OptimizerNames.ADAMW_TORCH
        with pytest.raises(MissingDependencyError, match="bitsandbytes"):
            settled(optim="adamw_8bit")
    finally:
        defaults.eight_bit_optimizer_runs.cache_clear()


GPU = device.Device("cuda", "cuda", 0, 1, "a GPU", (9, 0), 1, True, True, True)
OLD_GPU = dataclasses.replace(GPU, capability=(7, 5), bfloat16=False)


@pytest.mark.parametrize(
    ("gpu", "compute", "trained", "full", "expected"),
    [
        (GPU, torch.bfloat16, torch.float32, False, "bf16"),
        (GPU, torch.float16, torch.float32, False, "fp16"),
        (OLD_GPU, torch.float16, torch.float32, False, "fp16"),
        (GPU, torch.float32, torch.float32, False, "no"),
        (GPU, torch.bfloat16, torch.bfloat16, True, "no"),
        (GPU, torch.float32, torch.float32, True, "bf16"),
        (OLD_GPU, torch.float32, torch.float32, True, "no"),
    ],
    ids=["lora bf16", "lora fp16", "old card", "lora fp32", "full bf16", "full fp32", "full fp32 on an old card"],
)
def test_autocast_follows_the_model(gpu, compute, trained, full, expected, monkeypatch):
    args = settled()
    monkeypatch.setattr(defaults, "get_device", lambda: gpu)
    args.use_cpu = False
    model = panthera_model()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained)
    record = dataclasses.replace(record_of(model), dtype=compute, full_finetuning=full)
    defaults._settle_precision(args, model, record, frozenset())
    assert args.mixed_precision == expected
    assert (args.bf16, args.fp16) == (expected == "bf16", expected == "fp16")


@pytest.mark.parametrize(("flag", "compute"), [("bf16", torch.float16), ("fp16", torch.bfloat16)])
def test_a_precision_that_contradicts_the_model(flag, compute):
    args, model = settled(), panthera_model()
    setattr(args, flag, True)
    record = dataclasses.replace(record_of(model), dtype=compute)
    with pytest.raises(ArgumentError, match=f"{flag}=True does not fit"):
        defaults._settle_precision(args, model, record, frozenset({flag}))


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        ("auto", None, "auto"),
        (False, None, False),
        ("unsloth", True, "unsloth"),
        (False, True, True),
        ("unsloth", False, False),
    ],
)
def test_checkpointing_mode(own, given, expected):
    options = {} if given is None else {"gradient_checkpointing": given}
    model = panthera_model(checkpointing=own)
    args = settled(model, **options)
    assert defaults.checkpointing_mode(args, record_of(model), shim.explicit_names(args)) == expected


# ---- rows


def prepared(dataset, formatting=None, **options):
    return rows.prepare(dataset, settled(**options), formatting, name="train")


def test_usable_columns_are_left_as_they_are():
    dataset = texts()
    assert prepared(dataset) is dataset


def test_no_usable_column_names_those_found():
    with pytest.raises(DataError, match=r"'question', 'answer'"):
        prepared(Dataset.from_dict({"question": ["a"], "answer": ["b"]}))


def test_no_rows():
    with pytest.raises(DataError, match="no rows"):
        prepared(Dataset.from_dict({"text": []}))


FUNCTIONS = {
    "a text": lambda row: f"Q: {row['q']} A: {row['a']}",
    "a list with a text": lambda row: [f"Q: {row['q']} A: {row['a']}"],
    "a batch": lambda several: [f"Q: {q} A: {a}" for q, a in zip(several["q"], several["a"])],
}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_formatting_functions_of_every_kind(name, count):
    dataset = Dataset.from_dict({"q": [f"q{i}" for i in range(count)], "a": [f"a{i}" for i in range(count)]})
    result = prepared(dataset, FUNCTIONS[name])
    assert result["text"][:] == [f"Q: q{i} A: a{i}" for i in range(count)]
    streamed = prepared(dataset.to_iterable_dataset(), FUNCTIONS[name])
    assert [row["text"] for row in streamed] == result["text"][:]


@pytest.mark.parametrize("count", [1, 3])
def test_a_formatting_function_with_two_texts_a_row(count):
    dataset = Dataset.from_dict({"q": [f"q{i}" for i in range(count)], "a": [f"a{i}" for i in range(count)]})
    result = prepared(dataset, lambda row: [f"{row['q']}", f"{row['a']}"])
    assert result["text"][:] == [text for i in range(count) for text in (f"q{i}", f"a{i}")]


def test_a_formatting_function_without_text():
    with pytest.raises(DataError, match="returned dict"):
        prepared(texts(), lambda row: {"text": "a"})


def labelled(masked: int, total: int) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [[1, 2]] * total, "labels": [[-100, -100]] * masked + [[-100, 2]] * (total - masked)}
    )


@pytest.mark.parametrize(("masked", "total"), [(0, 10), (8, 10), (95, 100), (1000, 1100)])
def test_mostly_masked_labels_warn(masked, total, capsys):
    rows.check_labels(labelled(masked, total))
    assert ("have no label" in capsys.readouterr().err) == (masked / total >= 0.9)


@pytest.mark.parametrize("total", [0, 1, 500])
def test_nothing_to_learn(total):
    with pytest.raises(DataError):
        rows.check_labels(labelled(total, total))


def test_workers_only_for_large_data_sets(monkeypatch):
    assert rows.workers_for(texts()) is None
    monkeypatch.setattr(rows, "ROWS_WORTH_WORKERS", 10)
    monkeypatch.setattr(rows, "processors", lambda: 64)
    assert 1 < rows.workers_for(texts()) <= 8
    monkeypatch.setattr(rows, "processors", lambda: 1)
    assert rows.workers_for(texts()) is None
