"""``pantheraml export``: a model, merged model or adapter in another format, verified before it gets its name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ... import save
from ...errors import ConfigError, ConflictError
from ...export.gguf.api import check_adapter_types
from ...export.gguf.types import resolve_types
from ...export.hub import HubTarget, create_repo, upload
from ...export.methods import check_save_method
from ..finetune import quiet_unless_terminal
from ..output import Output, program

_GGUF = ("gguf", "gguf_lora")


def _format(args: argparse.Namespace) -> str:
    """The format that is meant; everything that can be refused is, before the model loads."""
    name = args.format.lower().replace("-", "_")
    if name not in _GGUF:
        name = check_save_method(name)
        if "quantization" in args.explicit:
            raise ConflictError(
                f"--quantization makes no difference to {name}", hint="leave it out, or give --format gguf"
            )
    elif name == "gguf":
        resolve_types(args.quantization)
    else:
        check_adapter_types(args.quantization)
    idle = [flag for flag in ("repo_id", "private", "revision") if flag in args.explicit and not args.push_to_hub]
    if idle:
        raise ConflictError(f"--{idle[0]} needs --push_to_hub", hint="give both, or neither")
    if args.push_to_hub and not args.repo_id:
        raise ConfigError("--repo_id is needed to push", hint="give the repository as --repo_id owner/name")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", where="OUT", hint="name a folder")
    return name


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    from ...models.loader import FastLanguageModel

    return FastLanguageModel.from_pretrained(
        model_name=args.model,
        max_seq_length=None,
        dtype=None if str(args.dtype).lower() == "none" else args.dtype,
        load_in_4bit=args.load_in_4bit,
        token=args.hub_token,
        trust_remote_code=args.trust_remote_code,
    )


def _write(args: argparse.Namespace, name: str, model: Any, tokenizer: Any, tags: list[str]) -> tuple[Path, list[str]]:
    """Write the format, and return its folder and its files."""
    if name not in _GGUF:
        report = save.save_pretrained_merged(
            model,
            args.out,
            tokenizer,
            name,
            max_shard_size=args.max_shard_size,
            tags=tags,
            datasets=args.datasets,
            verify=not args.no_verify,
        )
        assert report is not None
        return report.directory, list(report.files)
    result = save.save_pretrained_gguf(
        model,
        args.out,
        tokenizer,
        args.quantization,
        tags=tags,
        save_method="lora" if name == "gguf_lora" else None,
        imatrix_file=args.imatrix_file,
        llama_quantize=args.llama_quantize,
        converter=args.converter,
        verify=not args.no_verify,
    )
    assert result is not None
    return Path(result["gguf_directory"]), [Path(path).name for path in result["gguf_files"]]


def run(args: argparse.Namespace) -> int:
    """Load, write, verify, and upload if that was asked for."""
    output = Output(json=args.json)
    quiet_unless_terminal()
    name = _format(args)
    target = None
    if args.push_to_hub:
        target = HubTarget(args.repo_id, args.hub_token, args.private or None, revision=args.revision)
        create_repo(target)  # before the work, so that a bad name or token costs nothing
    tags = args.tags or (["pantheraml"] if target is not None else [])  # a card is written when there are any
    model, tokenizer = _load(args)
    folder, files = _write(args, name, model, tokenizer, tags)
    output.say(f"{name} is in {folder}: {', '.join(files)}")
    output.note(format=name, folder=folder, files=files, verified=not args.no_verify)
    if target is not None:
        repository = upload(folder, target)
        output.say(f"Pushed to {repository}")
        output.note(repository=repository)
    elif name not in _GGUF:
        output.say(f"Talk to it: {program()} chat {folder}")
    output.finish()
    return 0
