"""The keyword shim of TRL's constructors: what it touches, and how it translates."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
import textwrap

import pytest
from training_support import texts

import pantheraml
from pantheraml._compat import trl as shim
from pantheraml.errors import ArgumentError, ConfigError, ConflictError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    assert pantheraml.__version__
    shim.register()


def run(script: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPARE = """
import importlib, json, sys
import transformers.training_args, transformers.trainer
from pantheraml_names import modules
for name in modules():
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):
        pass  # needs an optional package
loaded = [sys.modules[name] for name in modules() if name in sys.modules]
loaded += [transformers.training_args, transformers.trainer]

def picture():
    found = {}
    for module in loaded:
        for name, value in vars(module).items():
            found[f"{module.__name__}.{name}"] = value
            if isinstance(value, type) and value.__module__.startswith(("trl.", "transformers.train")):
                for attribute, member in vars(value).items():
                    found[f"{value.__module__}.{value.__qualname__}:{attribute}"] = member
    return found

before = picture()
import pantheraml
after = picture()
changed = sorted(key for key in before.keys() | after.keys() if before.get(key) is not after.get(key))
from pantheraml._compat import trl
public = sorted(
    f"{value.__module__}.{value.__qualname__}"
    for module in loaded
    for name, value in vars(module).items()
    if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
    and module.__name__.startswith("trl.") and "__init__" in vars(value)
    and issubclass(value, (transformers.training_args.TrainingArguments, transformers.trainer.Trainer))
)
print(json.dumps({"changed": changed, "touched": trl.touched(), "public": public}))
"""


def test_only_constructors_of_trainers_and_configs_are_touched(tmp_path):
    names = "import importlib.util, pathlib\ndef modules():\n    return " + repr(shim.trl_modules())
    (tmp_path / "pantheraml_names.py").write_text(names)
    found = json.loads(run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + COMPARE).splitlines()[-1])
    arguments = "transformers.training_args.TrainingArguments"
    assert found["touched"] == sorted([*found["public"], arguments])
    assert found["changed"] == sorted(f"{name}:__init__" for name in found["touched"])
    expected = ("SFT", "DPO", "KTO", "GRPO", "Reward", "RLOO")
    for name in expected:
        assert f"trl.trainer.{name.lower()}_trainer.{name}Trainer" in found["touched"]
        assert f"trl.trainer.{name.lower()}_config.{name}Config" in found["touched"]


def test_it_can_be_turned_off():
    script = """
    import pantheraml
    from trl import SFTConfig
    print(hasattr(SFTConfig.__init__, "__pantheraml_shim__"))
    """
    assert run(script, PANTHERAML_TRL_SHIM="0").split() == ["False"]


def test_a_second_registration_wraps_nothing_twice():
    from trl import SFTConfig

    first = SFTConfig.__init__
    shim.register()
    shim.wrap(SFTConfig)
    assert SFTConfig.__init__ is first


def test_signatures_are_kept():
    from trl import SFTConfig, SFTTrainer

    assert "processing_class" in inspect.signature(SFTTrainer.__init__).parameters
    assert "max_length" in inspect.signature(SFTConfig).parameters
    assert SFTConfig.__init__.__name__ == "__init__"


# ---- configs


def config(tmp_path, **options):
    from trl import SFTConfig

    return SFTConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("old", "value", "new", "expected"),
    [
        ("max_seq_length", 77, "max_length", 77),
        ("warmup_ratio", 0.2, "warmup_steps", 0.2),
        ("evaluation_strategy", "epoch", "eval_strategy", "epoch"),
        ("per_gpu_train_batch_size", 3, "per_device_train_batch_size", 3),
        ("no_cuda", True, "use_cpu", True),
        ("group_by_length", True, "train_sampling_strategy", "group_by_length"),
    ],
    ids=lambda value: str(value),
)
def test_renamed_options_are_translated(old, value, new, expected, tmp_path):
    args = config(tmp_path, **{old: value})
    assert getattr(args, new) == expected
    assert new in shim.explicit_names(args)


def test_an_old_name_without_a_value_says_nothing(tmp_path):
    args = config(tmp_path, max_seq_length=None)
    assert args.max_length == 1024
    assert "max_length" not in shim.explicit_names(args)


def test_both_names_with_different_values_disagree(tmp_path):
    with pytest.raises(ConflictError, match="max_seq_length=5 and max_length=6"):
        config(tmp_path, max_seq_length=5, max_length=6)
    assert config(tmp_path, max_seq_length=5, max_length=5).max_length == 5


def test_warmup_steps_win_over_the_ratio(tmp_path):
    assert config(tmp_path, warmup_steps=5, warmup_ratio=0.1).warmup_steps == 5
    assert config(tmp_path, warmup_steps=0, warmup_ratio=0.1).warmup_steps == 0.1
    with pytest.raises(ConfigError, match="warmup_ratio"):
        config(tmp_path, warmup_ratio=3)


def test_options_without_successor_are_told(tmp_path, capsys):
    config(tmp_path, overwrite_output_dir=True)
    assert "overwrite_output_dir" in capsys.readouterr().err


def test_unknown_options_name_the_nearest(tmp_path):
    with pytest.raises(TypeError, match="did you mean 'learning_rate'"):
        config(tmp_path, learning_rat=1e-4)


def test_precision_is_settled_where_the_device_has_no_bf16(tmp_path, monkeypatch, capsys):
    args = config(tmp_path)
    assert not args.bf16
    assert not args.fp16
    assert "bf16" not in shim.explicit_names(args)
    assert config(tmp_path, bf16=True).bf16, "a CPU computes bf16 when it is told to"
    half = config(tmp_path, fp16=True, bf16=False)
    assert (half.fp16, half.bf16, half.mixed_precision) == (False, False, "no")
    assert "fp32 instead" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"bf16": None}, True),
        ({"fp16": False}, True),
        ({"bf16": False}, False),
        ({"fp16": True}, None),
        ({"use_cpu": True}, False),
    ],
    ids=str,
)
def test_precision_on_a_gpu_with_bf16(given, expected, monkeypatch):
    gpu = shim.get_device().__class__("cuda", "cuda", 0, 1, "a GPU", (9, 0), 1, True, True, True)
    monkeypatch.setattr(shim, "get_device", lambda: gpu)
    given = dict(given)
    shim._settle_precision(given, where="SFTConfig")
    assert given.get("bf16") is expected


def test_what_the_user_chose_is_remembered(tmp_path):
    args = config(tmp_path, learning_rate=2e-5)
    assert shim.explicit_names(args) == {"output_dir", "learning_rate"}
    args.weight_decay = 0.3
    assert "weight_decay" in shim.explicit_names(args)


def test_a_config_not_seen_at_construction_counts_as_chosen(tmp_path):
    import dataclasses

    from trl import SFTConfig

    @dataclasses.dataclass
    class Own(SFTConfig):
        extra: int = 0

    args = Own(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert {"seed", "optim"} <= shim.explicit_names(args)


# ---- trainers (of a model that PantheraML did not load: translation and nothing else)


def stock_trainer(tmp_path, tokenizer, **options):
    from conftest import make_tiny
    from trl import SFTTrainer

    options.setdefault("args", config(tmp_path))
    return SFTTrainer(model=make_tiny(), train_dataset=texts(4), **{"tokenizer": tokenizer, **options})


def test_old_trainer_keywords(tmp_path, tiny_tokenizer):
    given = config(tmp_path)
    trainer = stock_trainer(
        tmp_path,
        tiny_tokenizer,
        args=given,
        dataset_text_field="text",
        max_seq_length=9,
        packing=False,
        dataset_num_proc=1,
    )
    assert trainer.processing_class is tiny_tokenizer
    assert (trainer.args.max_length, trainer.args.packing, trainer.args.dataset_num_proc) == (9, False, 1)
    assert max(map(len, trainer.train_dataset["input_ids"])) <= 9
    assert given.max_length == 1024, "the caller's own config is left as it was"
    assert trainer.args.seed == 42, "no default of ours for a stock model"
    assert not hasattr(trainer, "tokenizer")


def test_positional_arguments_and_no_config(tmp_path, tiny_tokenizer, monkeypatch):
    from conftest import make_tiny
    from trl import SFTTrainer

    monkeypatch.chdir(tmp_path)
    trainer = SFTTrainer(make_tiny(), None, None, texts(4), tokenizer=tiny_tokenizer, max_seq_length=12)
    assert trainer.args.max_length == 12


def test_plain_training_arguments_keep_what_was_chosen(tmp_path, tiny_tokenizer):
    from transformers import TrainingArguments
    from trl import SFTConfig

    given = TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-4)
    trainer = stock_trainer(tmp_path, tiny_tokenizer, args=given, max_seq_length=20)
    assert type(trainer.args) is SFTConfig
    assert (trainer.args.learning_rate, trainer.args.max_length, trainer.args.logging_steps) == (3e-4, 20, 500)
    assert shim.explicit_names(trainer.args) == {"output_dir", "learning_rate", "max_length"}


def test_two_tokenizers_disagree(tmp_path, tiny_tokenizer):
    from conftest import build_tokenizer

    with pytest.raises(ConflictError, match="tokenizer and processing_class"):
        stock_trainer(tmp_path, tiny_tokenizer, processing_class=build_tokenizer())
    assert stock_trainer(tmp_path, tiny_tokenizer, processing_class=tiny_tokenizer).processing_class is tiny_tokenizer


def test_trainer_and_config_disagree(tmp_path, tiny_tokenizer):
    with pytest.raises(ConflictError, match="max_length is 8 here and 16 in args"):
        stock_trainer(tmp_path, tiny_tokenizer, args=config(tmp_path, max_length=16), max_seq_length=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_txt_field": "text"}, "did you mean 'dataset_text_field'"),
        ({"learning_rate": 1e-4}, "cannot be given to the trainer itself"),
    ],
    ids=["misspelt", "an option of the config"],
)
def test_unknown_trainer_keywords(options, message, tmp_path, tiny_tokenizer):
    with pytest.raises(ArgumentError, match=message):
        stock_trainer(tmp_path, tiny_tokenizer, **options)


def test_subclasses_with_their_own_constructor(tmp_path, tiny_tokenizer):
    from conftest import make_tiny
    from trl import SFTTrainer

    class Mine(SFTTrainer):
        def __init__(self, *args, extra, **kwargs):
            self.extra = extra
            super().__init__(*args, **kwargs)

    trainer = Mine(
        model=make_tiny(),
        args=config(tmp_path),
        train_dataset=texts(4),
        tokenizer=tiny_tokenizer,
        extra=1,
        packing=False,
    )
    assert trainer.extra == 1
    assert not [name for name in vars(trainer) if name.startswith("_pantheraml")]


def test_other_trainers_take_them_too(tmp_path, tiny_tokenizer):
    from conftest import make_tiny
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = Dataset.from_dict({"prompt": ["two plus two"] * 2, "chosen": [" four"] * 2, "rejected": [" five"] * 2})
    trainer = DPOTrainer(
        model=make_tiny(),
        ref_model=make_tiny(seed=1),
        args=DPOConfig(output_dir=str(tmp_path)),
        beta=0.3,
        train_dataset=pairs,
        tokenizer=tiny_tokenizer,
        max_length=32,
        max_prompt_length=16,
    )
    assert (trainer.args.beta, trainer.args.max_length) == (0.3, 32)


def test_the_modules_of_trl_are_found_without_importing_it():
    names = shim.trl_modules()
    assert "trl.trainer.sft_trainer" in names
    assert "trl.trainer.sft_config" in names
    assert any(name.startswith("trl.experimental.") for name in names)
    assert all(importlib.util.find_spec(name) for name in ("trl.trainer.sft_trainer", "trl.trainer.grpo_config"))
