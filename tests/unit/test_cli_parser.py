"""The flags of the command line are those that users know, and mistakes are named."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pantheraml.cli import main
from pantheraml.cli.boundary import EXIT_CODES, Boundary
from pantheraml.cli.commands.train import tell_idle_flags
from pantheraml.cli.output import printable
from pantheraml.cli.parser import COMMANDS, build_parser
from pantheraml.errors import (
    ArgumentError,
    CheckpointError,
    CommunicationError,
    ConfigError,
    DataError,
    DeviceMemoryError,
    NonFiniteError,
    UnsupportedError,
)

ROOT = Path(__file__).parents[2]

# What Unsloth's and the earlier PantheraML's command lines take, with their defaults.
KNOWN = {
    "model_name": "unsloth/llama-3-8b",
    "max_seq_length": 2048,
    "dtype": None,
    "load_in_4bit": False,
    "dataset": "yahma/alpaca-cleaned",
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "bias": "none",
    "use_gradient_checkpointing": "unsloth",
    "random_state": 3407,
    "use_rslora": False,
    "loftq_config": None,
    "use_dora": False,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 5,
    "max_steps": 400,
    "learning_rate": 2e-4,
    "optim": "adamw_8bit",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "seed": 3407,
    "packing": False,
    "report_to": "tensorboard",
    "logging_steps": 1,
    "output_dir": "outputs",
    "save_model": False,
    "save_method": "merged_16bit",
    "save_gguf": False,
    "save_path": "model",
    "quantization": "q8_0",
    "push_model": False,
    "push_gguf": False,
    "hub_path": "hf/model",
    "hub_token": None,
    "raw_text_file": None,
    "chunk_size": 2048,
    "stride": 512,
    "benchmark": False,
    "benchmark_type": ["mmlu"],
    "max_samples": None,
    "export": False,
}
# Flags of this project.
ADDED = {
    "full_finetuning": False,
    "trust_remote_code": False,
    "dataset_config": None,
    "train_split": "train",
    "eval_dataset": None,
    "eval_split": None,
    "format": "auto",
    "text_column": None,
    "prompt_column": None,
    "completion_column": None,
    "messages_column": None,
    "instruction_column": None,
    "input_column": None,
    "output_column": None,
    "max_bad_fraction": 0.0,
    "parse_control_tokens": False,
    "responses_only": False,
    "streaming": False,
    "shuffle_buffer": 1000,
    "mix": None,
    "mix_stop": "first_exhausted",
    "num_train_epochs": None,
    "save_steps": 500,
    "resume": None,
    "json": False,
    "debug": False,
    "gpus": 1,
    "max_restarts": 0,
    "strategy": "auto",
    "context_parallel": 1,
    "use_tpu": False,
    "mesh_shape": None,
}


def test_flags_and_defaults_are_exactly_the_table():
    args = vars(build_parser().parse([]))
    assert args.pop("explicit") == frozenset()
    assert args == {**KNOWN, **ADDED}


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--report_to", "wandb"], "report_to", "wandb"),
        (["--quantization", "q4_k_m", "f16"], "quantization", ["q4_k_m", "f16"]),
        (["--quantization_method", "f16"], "quantization", ["f16"]),
        (["--benchmark_type", "arc", "all"], "benchmark_type", ["arc", "all"]),
        (["--learning_rate=1e-4"], "learning_rate", 1e-4),
        (["--max_steps", "400"], "max_steps", 400),
        (["--load_in_4bit"], "load_in_4bit", True),
    ],
)
def test_given_flags_are_known_as_given(argv, name, value):
    args = build_parser().parse(argv)
    assert getattr(args, name) == value
    assert args.explicit == {name}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lerning_rate", "1"], "'--lerning_rate' (did you mean '--learning_rate'?)"),
        (["--max-steps", "1"], "'--max-steps' (did you mean '--max_steps'?)"),
        (["--max_step", "1"], "did you mean '--max_steps'?"),
        (["demmo"], "'demmo' (did you mean 'demo'?)"),
        (["doctor", "--strickt"], "did you mean '--strict'?"),
        (["--r", "0"], "--r: 0 is not at least 1"),
        (["--r", "x"], "--r"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--max_bad_fraction", "1"], "--max_bad_fraction"),
        (["--save_method", "merged"], "merged_16bit"),
        (["--report_to", "x"], "tensorboard"),
        (["chat"], "MODEL"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_nearest(argv, words, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert "--help" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--benchmark"], "benchmarks come in a later release"),
        (["--benchmark_type", "arc"], "--benchmark_type cannot be honoured"),
        (["--gpus", "2"], "2 GPUs were asked for"),
        (["--use_tpu"], "TPU"),
        (["--use_tpu", "--strategy", "fsdp"], "contradict"),
        (["--strategy", "fsdp"], "is for several processes"),
        (["--context_parallel", "2"], "is for several processes"),
        (["--full_finetuning", "--r", "8"], "contradict"),
        (["--full_finetuning", "--load_in_4bit"], "contradict"),
        (["--num_train_epochs", "1", "--max_steps", "5"], "contradict"),
        (["--raw_text_file", "a.txt", "--dataset", "b"], "contradict"),
        (["--push_gguf"], "--hub_path is needed"),
        (["--push_model"], "--hub_path is needed"),
        (["--num_train_epochs", "0"], "train nothing"),
    ],
)
def test_what_cannot_be_honoured_is_refused(argv, words, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "  next:" in err or "  why:" in err


def test_flags_without_effect_are_told(capsys):
    argv = ["--stride", "5", "--per_device_eval_batch_size", "5", "--quantization_method", "f16", "--save_path", "x"]
    tell_idle_flags(build_parser().parse(argv))
    err = capsys.readouterr().err
    for words in (
        "--stride has no effect without --raw_text_file",
        "--per_device_eval_batch_size has no effect without --eval_dataset",
        "--quantization has no effect without --save_gguf",
        "--save_path has no effect without --save_model",
    ):
        assert words in err
    tell_idle_flags(build_parser().parse(["--eval_split", "test", *argv[2:4], "--save_model", *argv[-2:]]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argv", [["--help"], ["-h"], *[[command, "--help"] for command in COMMANDS]])
def test_help_is_complete(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "https://github.com/unslothai/unsloth" in out
    for code, meaning in EXIT_CODES:
        assert f"  {code:<4} {meaning}" in out
    parser = build_parser(argv[0] if argv[0] in COMMANDS else "train")
    for action in parser._actions:
        assert action.help
        for option in action.option_strings:
            assert option in out


def test_no_arguments_show_the_help_and_train_nothing(capsys):
    assert main([]) == 0
    assert "--model_name" in capsys.readouterr().out


def test_help_is_fast_light_and_the_same_from_the_checkout():
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "100", "HOME": "/nonexistent"}
    probe = (
        "import sys; from pantheraml.cli import main; code = main(['--help']);"
        "print(sorted({'torch', 'transformers', 'datasets', 'trl', 'rich'} & set(sys.modules)), file=sys.stderr);"
        "sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    module = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = subprocess.run(
        [sys.executable, "pantheraml-cli.py", "--help"], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert (module.returncode, script.returncode) == (0, 0)
    assert module.stderr.strip() == "[]"
    assert script.stderr == ""
    assert module.stdout == script.stdout
    # Processor time, so that a busy machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (ArgumentError("x"), 2),
        (UnsupportedError("x"), 2),
        (DataError("x"), 3),
        (DeviceMemoryError("x"), 4),
        (MemoryError("x"), 4),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), 4),
        (CheckpointError("x"), 5),
        (NonFiniteError("x"), 6),
        (CommunicationError("x"), 7),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("x"), 1),
        (SystemExit(2), 2),
        (SystemExit(None), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
@pytest.mark.parametrize("debug", [False, True])
def test_every_error_has_its_exit_code_and_no_traceback(error, code, debug, capsys):
    with Boundary(debug=debug) as boundary:
        raise error
    assert boundary.exit_code == code
    assert code in dict(EXIT_CODES)
    err = capsys.readouterr().err
    assert ("Traceback" in err) == (debug and not isinstance(error, SystemExit))


def test_torch_out_of_memory(capsys):
    import torch

    with Boundary() as boundary:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    assert boundary.exit_code == 4
    assert "--load_in_4bit" in capsys.readouterr().err


def test_message_has_what_where_why_next_and_no_control_characters(capsys):
    with Boundary():
        raise DataError("what \x1b[31m", where="file:1", why="because", hint="do this")
    assert capsys.readouterr().err == ("error: what \\x1b[31m\n  where: file:1\n  why:   because\n  next:  do this\n")


def test_printable_keeps_text_and_shows_controls():
    assert printable("a\tb\né [/red] \U0001f600") == "a\tb\né [/red] \U0001f600"
    assert printable("\x1b]0;x\x07\r\x9b\u202e\x7f") == "\\x1b]0;x\\x07\\x0d\\x9b\\u202e\\x7f"


@pytest.mark.parametrize(
    ("started", "found", "expected"),
    [
        ("/env/bin/pantheraml", "/env/bin/pantheraml", "pantheraml"),
        ("/my env/bin/pantheraml", None, "'/my env/bin/pantheraml'"),
        ("./pantheraml-cli.py", None, "python pantheraml-cli.py"),
        ("/src/pantheraml/cli/__main__.py", None, "python -m pantheraml.cli"),
        ("/src/pantheraml/cli/__main__.py", "/env/bin/pantheraml", "pantheraml"),
        ("/usr/bin/pytest", None, "pantheraml"),
    ],
    ids=["on the path", "not on the path", "script of the checkout", "a rank", "a rank of one on the path", "another"],
)
def test_commands_that_are_suggested_can_be_typed(monkeypatch, started, found, expected):
    from pantheraml.cli import output

    monkeypatch.setattr(output.sys, "argv", [started])
    monkeypatch.setattr(output.shutil, "which", lambda name: found)
    assert output.program() == expected
