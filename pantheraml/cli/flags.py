"""Every flag of every command: names, type, default and help."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag or positional argument; ``options`` go to ``add_argument``."""

    names: tuple[str, ...]
    help: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Flags under one title of the help."""

    title: str
    flags: tuple[Flag, ...]


def _flag(*names: str, help: str, **options: Any) -> Flag:
    return Flag(names, help, options)


def _switch(name: str, help: str) -> Flag:
    return Flag((name,), help, {"action": "store_true"})


class Collected(argparse.Action):
    """Gathers the values of a flag that may be repeated; what the parser put there before is no value."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Add the values of one occurrence."""
        found = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*(found if isinstance(found, list) else []), values])


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def device_count(text: str) -> int | str:
    """Parse a whole number of at least 1, or ``auto``."""
    return text if text == "auto" else positive(text)


def not_negative(text: str) -> int:
    """Parse a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return value


def amount(text: str) -> float:
    """Parse a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def share(text: str) -> float:
    """Parse a number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


REPORTERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "mlflow", "neptune"),
    *("tensorboard", "wandb", "all", "none"),
)
BENCHMARKS = ("mmlu", "hellaswag", "arc", "all")
FORMATS = ("auto", "alpaca", "messages", "prompt_completion", "text")
MIX_STOPS = ("first_exhausted", "all_exhausted")
CHECKPOINTING = ("unsloth", "pantheraml", "auto", "true", "false", "offload")

_DEBUG = _switch("--debug", "show the traceback of an error")


def _mesh_shape() -> Flag:
    return _flag(
        "--mesh_shape",
        type=positive,
        nargs=2,
        default=None,
        metavar=("FSDP", "TENSOR"),
        help="TPU cores along each axis of the mesh; unset puts all along the first",
    )


_JSON = _switch("--json", "print one json record on standard output, and everything else on standard error")
_HUB_TOKEN = _flag("--hub_token", default=None, help="hub token; `hf auth login` keeps it out of the process list")
_PARTS = ("text", "prompt", "completion", "messages", "instruction", "input", "output")

TRAIN: tuple[Group, ...] = (
    Group(
        "model",
        (
            _flag("--model_name", default="unsloth/llama-3-8b", help="hub id, model folder or adapter folder"),
            _flag("--max_seq_length", type=positive, default=2048, help="longest sequence in tokens"),
            _flag("--dtype", default=None, help="float16, bfloat16 or float32; unset takes what the device does best"),
            _switch("--load_in_4bit", "quantise the frozen weights to 4 bits (QLoRA)"),
            _switch("--full_finetuning", "train every weight instead of LoRA"),
            _switch("--trust_remote_code", "run Python code that comes with the model"),
        ),
    ),
    Group(
        "data",
        (
            _flag(
                "--dataset",
                default="yahma/alpaca-cleaned",
                help="hub data set, or a json, jsonl, csv, tsv, parquet or txt file, or a folder of them",
            ),
            _flag(
                "--mix",
                nargs=2,
                action=Collected,
                default=None,
                metavar=("DATA", "WEIGHT"),
                help="mix in another data set, with its share of the rows where --dataset has 1; may be repeated",
            ),
            _flag(
                "--mix_stop",
                choices=MIX_STOPS,
                default="first_exhausted",
                help="end the mixture when one data set is used up, or when all are and earlier ones were repeated",
            ),
            _switch("--streaming", "read rows while training instead of beforehand; nothing is stored"),
            _flag(
                "--shuffle_buffer",
                type=not_negative,
                default=1000,
                help="with --streaming: rows that are held and drawn from at random; 0 keeps their order",
            ),
            _flag("--dataset_config", default=None, help="configuration of a hub data set that has several"),
            _flag("--train_split", default="train", help="split to train on; slices such as train[:1000] work"),
            _flag("--eval_dataset", default=None, help="data set whose loss is measured after training"),
            _flag("--eval_split", default=None, help="split to measure the loss on; of --dataset if no --eval_dataset"),
            _flag("--format", choices=FORMATS, default="auto", help="how rows are read; auto looks at the columns"),
            _flag("--text_column", default=None, help="column that holds the text"),
            _flag("--prompt_column", default=None, help="column that holds the prompt"),
            _flag("--completion_column", default=None, help="column that holds the completion"),
            _flag("--messages_column", default=None, help="column that holds the conversation"),
            _flag("--instruction_column", default=None, help="column that holds alpaca's instruction"),
            _flag("--input_column", default=None, help="column that holds alpaca's input"),
            _flag("--output_column", default=None, help="column that holds alpaca's output"),
            _switch("--responses_only", "train on what the assistant writes only, as train_on_responses_only does"),
            _switch("--parse_control_tokens", "have control tokens that people typed read as tokens, not as text"),
            _flag(
                "--max_bad_fraction",
                type=share,
                default=0.0,
                help="share of bad rows that is dropped and written to rejected.jsonl instead of stopping",
            ),
        ),
    ),
    Group(
        "raw text",
        (
            _flag("--raw_text_file", default=None, help="train on the running text of this file instead of --dataset"),
            _flag("--chunk_size", type=positive, default=2048, help="tokens in a chunk of running text"),
            _flag("--stride", type=not_negative, default=512, help="tokens that neighbouring chunks share"),
        ),
    ),
    Group(
        "LoRA",
        (
            _flag("--r", type=positive, default=16, help="rank of the adapters"),
            _flag("--lora_alpha", type=positive, default=16, help="scale of the adapters, divided by the rank"),
            _flag("--lora_dropout", type=share, default=0.0, help="dropout before the adapters"),
            _flag("--bias", default="none", help="biases to train: none, all or lora_only"),
            _flag(
                "--use_gradient_checkpointing",
                choices=CHECKPOINTING,
                default="unsloth",
                help="unsloth, pantheraml and auto keep the activations that fit in memory; false keeps all",
            ),
            _flag("--random_state", type=int, default=3407, help="seed of the adapters' first weights"),
            _switch("--use_rslora", "scale by the square root of the rank"),
            _flag("--loftq_config", default=None, help='LoftQ settings as json, such as {"loftq_bits": 4}'),
            _switch("--use_dora", "train magnitude and direction apart (DoRA)"),
        ),
    ),
    Group(
        "training",
        (
            _flag("--per_device_train_batch_size", type=positive, default=2, help="rows in a batch"),
            _flag("--per_device_eval_batch_size", type=positive, default=4, help="rows in a batch when evaluating"),
            _flag("--gradient_accumulation_steps", type=positive, default=4, help="batches in an optimizer step"),
            _flag("--warmup_steps", type=not_negative, default=5, help="steps of linear warm-up"),
            _flag("--max_steps", type=positive, default=400, help="optimizer steps"),
            _flag("--num_train_epochs", type=amount, default=None, help="passes over the data, instead of --max_steps"),
            _flag("--learning_rate", type=amount, default=2e-4, help="peak learning rate"),
            _flag("--optim", default="adamw_8bit", help="optimizer, by its name in transformers"),
            _flag("--weight_decay", type=amount, default=0.01, help="decoupled weight decay"),
            _flag("--lr_scheduler_type", default="linear", help="learning-rate schedule, by its name in transformers"),
            _flag("--seed", type=int, default=3407, help="seed of shuffling and dropout"),
            _switch("--packing", "put several rows into one sequence"),
            _flag("--save_steps", type=positive, default=500, help="steps between checkpoints in --output_dir"),
            _flag("--resume", default=None, help="go on from a checkpoint folder, or 'auto' for the newest one"),
        ),
    ),
    Group(
        "report",
        (
            _flag("--report_to", choices=REPORTERS, default="tensorboard", help="where metrics go besides output_dir"),
            _flag("--logging_steps", type=positive, default=1, help="steps between metrics"),
            _JSON,
            _DEBUG,
        ),
    ),
    Group(
        "save",
        (
            _flag("--output_dir", default="outputs", help="folder of the adapter, checkpoints, metrics and report"),
            _switch("--save_model", "also save the merged model to --save_path"),
            _flag(
                "--save_method",
                choices=("merged_16bit", "merged_4bit", "lora"),
                default="merged_16bit",
                help="what --save_model and --push_model write",
            ),
            _switch("--save_gguf", "also save GGUF files, to <save_path>_gguf"),
            _flag("--save_path", default="model", help="folder for --save_model; GGUF files go to <save_path>_gguf"),
            _flag(
                "--quantization",
                "--quantization_method",
                nargs="+",
                default="q8_0",
                help="GGUF quantisation, one or several; for --save_gguf and --push_gguf",
            ),
        ),
    ),
    Group(
        "push",
        (
            _switch("--push_model", "push the saved model to --hub_path"),
            _switch("--push_gguf", "push GGUF files to --hub_path"),
            _flag("--hub_path", default="hf/model", help="owner/name on the hub"),
            _HUB_TOKEN,
        ),
    ),
    Group(
        "benchmarks (not in this release: refused)",
        (
            _switch("--benchmark", "measure the trained model"),
            _flag("--benchmark_type", nargs="+", choices=BENCHMARKS, default=["mmlu"], help="which benchmarks"),
            _flag("--max_samples", type=positive, default=None, help="most questions of a benchmark"),
            _switch("--export", "write the results to --output_dir"),
        ),
    ),
    Group(
        "several devices",
        (
            _flag(
                "--gpus",
                type=device_count,
                default=1,
                metavar="N",
                help="train on this many GPUs of this host, one process each; auto takes all",
            ),
            _flag(
                "--max_restarts",
                "--max-restarts",
                type=not_negative,
                default=0,
                metavar="N",
                help="with --gpus: start all processes again up to N times when one fails, from the newest checkpoint",
            ),
            _flag(
                "--strategy",
                choices=("auto", "ddp", "fsdp"),
                default="auto",
                help="with several processes: fsdp divides the model among them, from loading on; otherwise copies",
            ),
            _flag(
                "--context_parallel",
                type=positive,
                default=1,
                metavar="N",
                help="with several processes: this many share each row, for rows too long for one GPU",
            ),
            _switch("--use_tpu", "train on all cores of this TPU host, in 16 bit (experimental: docs/TPU-Guide.md)"),
            _mesh_shape(),
        ),
    ),
)

DEMO: tuple[Group, ...] = (
    Group(
        "demo",
        (
            _flag("--output_dir", default="pantheraml-demo", help="folder of everything the demo writes"),
            _JSON,
            _DEBUG,
        ),
    ),
)

DOCTOR: tuple[Group, ...] = (
    Group(
        "doctor",
        (
            _switch("--strict", "exit with code 2 when something needed is missing or has a known vulnerability"),
            _JSON,
            _DEBUG,
        ),
    ),
)

ESTIMATE: tuple[Group, ...] = (
    Group(
        "step",
        (
            _flag("model", metavar="MODEL", help="model folder or hub id; its weights are not read"),
            _flag("--tpu", required=True, help="the chips, as v5e-8 or v6e:2x4"),
            _flag("--max_seq_length", type=positive, default=2048, help="tokens of a row"),
            _flag("--per_device_train_batch_size", type=positive, default=1, help="rows of each chip"),
            _mesh_shape(),
            _flag("--r", type=positive, default=16, help="rank of the adapters"),
            _switch("--full_finetuning", "train every weight instead of LoRA"),
            _switch("--no_checkpointing", "keep all activations instead of computing them again"),
            _JSON,
            _DEBUG,
        ),
    ),
)

CHAT: tuple[Group, ...] = (
    Group(
        "model",
        (
            _flag("model", metavar="MODEL", help="model folder, merged model, adapter folder or hub id"),
            _switch("--load_in_4bit", "quantise the weights to 4 bits"),
            _flag("--dtype", default=None, help="float16, bfloat16 or float32; unset takes what the device does best"),
            _flag("--max_seq_length", type=positive, default=None, help="longest sequence; unset takes the model's"),
        ),
    ),
    Group(
        "conversation",
        (
            _flag("--prompt", default=None, help="answer this one prompt and end"),
            _flag("--system", default=None, help="system message"),
            _switch("--plain", "continue the text as it is, even when the model has a chat template"),
        ),
    ),
    Group(
        "generation",
        (
            _flag("--max_new_tokens", type=positive, default=256, help="longest answer in tokens"),
            _flag("--temperature", type=amount, default=0.7, help="0 always takes the likeliest token"),
            _flag("--top_p", type=amount, default=0.95, help="share of probability that is sampled from"),
            _flag("--seed", type=int, default=None, help="seed of the sampling"),
            _DEBUG,
        ),
    ),
)

# How rows are read is said with the flags that training has for it.
_READING = frozenset(
    {
        "--dataset_config",
        "--train_split",
        "--format",
        "--max_bad_fraction",
        "--parse_control_tokens",
        *(f"--{part}_column" for part in _PARTS),
    }
)

DATA: tuple[Group, ...] = (
    Group(
        "what to do",
        (
            _flag("action", choices=("preview",), help="preview: rows as they are trained, lengths, what is lost"),
            _flag("file", metavar="FILE", help="data file, folder of them, or hub data set"),
        ),
    ),
    Group(
        "tokens and labels",
        (
            _flag("--model", required=True, help="model folder, adapter folder or hub id; only its tokenizer is read"),
            _flag(
                "--max_length",
                type=positive,
                default=None,
                help="longest sequence in tokens; unset takes 2048, or what the model has if that is less",
            ),
            _switch("--responses_only", "train on replies only, as train_on_responses_only does"),
            _switch("--packing", "put several rows into one sequence"),
            _switch("--streaming", "read the first 1000 rows only, or those of a slice such as train[:5000]"),
            _switch("--trust_remote_code", "run Python code that comes with the tokenizer"),
            _HUB_TOKEN,
        ),
    ),
    Group("data", tuple(flag for group in TRAIN for flag in group.flags if flag.names[0] in _READING)),
    Group("report", (_flag("--rows", type=not_negative, default=3, help="rows that are shown"), _JSON, _DEBUG)),
)

EXPORT: tuple[Group, ...] = (
    Group(
        "what to write",
        (
            _flag("model", metavar="MODEL", help="adapter folder, model folder or hub id"),
            _flag("out", metavar="OUT", help="folder to write; GGUF files go to OUT_gguf"),
            _flag(
                "--format",
                default="merged_16bit",
                help="merged_16bit, merged_4bit_forced, lora, gguf, gguf_lora, fp8, fp8_block, int8, int4, "
                "torchao_int8, ...; dashes are read as underscores, and the error for an unknown one lists them all",
            ),
            _flag(
                "-q",
                "--quantization",
                nargs="+",
                default="q8_0",
                help="types of GGUF files, one or several",
            ),
            _flag("--llama_quantize", default=None, help="llama.cpp's llama-quantize, or its folder, for K-quants"),
            _flag("--converter", default=None, help="your checkout of llama.cpp, for models not written here"),
            _flag("--imatrix_file", default=None, help="importance matrix for IQ types"),
            _flag("--max_shard_size", default="5GB", help="largest file of a model folder"),
            _switch("--no_verify", "do not reload what was written and compare it with the model"),
        ),
    ),
    Group(
        "model",
        (
            _switch("--load_in_4bit", "hold the model in 4 bits; the merge still goes onto the 16-bit weights"),
            _flag("--dtype", default=None, help="float16, bfloat16 or float32; unset takes what the device does best"),
            _switch("--trust_remote_code", "run Python code that comes with the model"),
        ),
    ),
    Group(
        "push",
        (
            Flag(("--push_to_hub", "--push-to-hub"), "upload what was written", {"action": "store_true"}),
            _flag("--repo_id", "--repo-id", default=None, help="owner/name on the hub"),
            _switch("--private", "make a new repository private"),
            _flag("--revision", default=None, help="branch to commit to"),
            _flag("--tags", nargs="+", default=None, help="tags for the model card"),
            _flag("--datasets", nargs="+", default=None, help="hub ids of data sets for the model card"),
            _HUB_TOKEN,
        ),
    ),
    Group("report", (_JSON, _DEBUG)),
)
