"""Models that are loaded whole and sharded by the trainer, and the same loaded in shards.

    torchrun loading_worker.py OUT

What is found goes into OUT/rankN.json, the weights after training into OUT/rankN.safetensors.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer, make_tiny
from runs import losses_of, train
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from pantheraml import FastLanguageModel, MultiGPUConfig, add_new_tokens, distributed
from pantheraml.device import get_device
from pantheraml.errors import PantheraMLError
from pantheraml.models import stream
from pantheraml.parallel import fsdp, parts
from pantheraml.training.progress import parameter_counts

torch.set_num_threads(1)

OUT = Path(sys.argv[1])
STEPS = 3
# Adam would blow rounding errors of tiny gradients up to whole steps.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
DEEP = {"num_hidden_layers": 8, "vocab_size": 384}
SHARDS = MultiGPUConfig(strategy="fsdp")
WEIGHTS: dict[str, torch.Tensor] = {}
# A family, how it is made and loaded, and with which adapter; None trains every weight.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"config": DEEP, "load": {"load_in_4bit": False}, "lora": LORA},
    "full": {"config": DEEP, "load": {"full_finetuning": True}, "lora": None},
    "nf4": {"config": DEEP, "load": {"load_in_4bit": True}, "lora": LORA},
    "tied": {"config": {"tie_word_embeddings": True}, "load": {"full_finetuning": True}, "lora": None},
    "nf4 already": {"quantised": True, "load": {"load_in_4bit": True}, "lora": LORA},
    "bf16": {"load": {"load_in_4bit": False, "dtype": torch.bfloat16}, "lora": LORA},
    "odd": {"config": {"vocab_size": 385, "intermediate_size": 129}, "load": {"load_in_4bit": False}, "lora": LORA},
    "embeddings": {
        "load": {"load_in_4bit": False},
        "lora": LORA | {"modules_to_save": ["embed_tokens", "lm_head"], "bias": "all"},
        "config": {"attention_bias": True},
    },
    "new tokens": {"load": {"load_in_4bit": False}, "tokens": ["<new>", "<newer>"], "lora": LORA},
    "experts": {
        "family": "qwen3_moe",
        "config": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
        "load": {"load_in_4bit": True},
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    },
    "experts trained": {
        "family": "qwen3_moe",
        "config": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
        "load": {"load_in_4bit": True},
        "lora": {"r": 4, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    },
    "sinks": {
        "family": "gpt_oss",
        "config": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
        "load": {"load_in_4bit": True},
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    },
    "windows": {
        "family": "gemma3_text",
        "config": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "load": {"load_in_4bit": False},
        "lora": LORA,
    },
    # Stock transformers runs it with eager attention.
    "soft caps": {
        "family": "gemma2",
        "config": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
        "load": {"load_in_4bit": False},
        "lora": LORA,
    },
}
# What GPUs train: the other kinds are read and divided there as on a CPU.
OF_GPUS = ("lora", "full", "nf4", "bf16")


def kinds() -> list[str]:
    """Those that are tried on this device."""
    return [*OF_GPUS] if get_device().is_gpu else [*KINDS]


def write(kind: str) -> None:
    """Write the model of a kind as a folder."""
    about = KINDS[kind]
    folder = OUT / "models" / kind
    make_tiny(about.get("family", "llama"), **about.get("config", {})).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    if about.get("quantised"):
        model, tokenizer = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=True, dtype=torch.float32)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load(kind: str, config: Any, **options: Any) -> tuple[Any, Any]:
    """The model of a kind, whole or in shards."""
    given = {"max_seq_length": 64, "dtype": torch.float32, "multi_gpu_config": config}
    return FastLanguageModel.from_pretrained(str(OUT / "models" / kind), **given | KINDS[kind]["load"] | options)


def prepared(kind: str, config: MultiGPUConfig | None) -> Any:
    """The model with its new tokens and its adapter."""
    model, tokenizer = load(kind, config)
    if "tokens" in KINDS[kind]:
        add_new_tokens(model, tokenizer, KINDS[kind]["tokens"])
    adapter = KINDS[kind]["lora"]
    return model if adapter is None else FastLanguageModel.get_peft_model(model, **adapter)


def trained(name: str, kind: str, config: MultiGPUConfig | None, **options: Any) -> tuple[dict[str, Any], Any]:
    """Train a few steps; all weights, also frozen ones, and all buffers go to the file."""
    settings = {"max_steps": STEPS, "lr_scheduler_type": "constant"} | SGD | ({} if config else {"fsdp": True})
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)  # transformers' arguments leave it with fsdp=True
    model = prepared(kind, config)
    came_in_parts = parts.in_parts(model)
    keywords = {"options": settings | options.pop("options", {}), **options}
    folder = keywords.pop("folder", OUT / "runs" / name)
    trainer, _ = train(folder, ranks=distributed.get_world_size(), watched=False, model=model, **keywords)
    facts = {
        "losses": losses_of(trainer),
        "in parts": came_in_parts,
        "sharded": fsdp.is_sharded(trainer.model) and all(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "environment": [name for name in os.environ if "FSDP" in name],
        "parameters": parameter_counts(trainer.model),
        "attention": trainer.model.config._attn_implementation,
        "adapted": model.adapt_report.summary(),
        "padding-free": trainer.padding_free,
        "eval": trainer.evaluate()["eval_loss"],
        "trained": sorted(n for n, p in trainer.model.named_parameters() if p.requires_grad),
    }
    fsdp.reshard(trainer.model)
    for key, parameter in trainer.model.named_parameters():
        WEIGHTS[f"{name}/{key}"] = parameter.detach().full_tensor().cpu().clone()
    for key, buffer in trainer.model.named_buffers():
        WEIGHTS[f"{name}/buffer {key}"] = buffer.detach().cpu().clone()
    return facts, trainer


def live() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    held = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and not isinstance(one, DTensor)]
    storages = {s.data_ptr(): s.nbytes() for one in held if not one.is_meta for s in [one.untyped_storage()]}
    return sum(storages.values())


def bytes_held(kind: str) -> dict[str, Any]:
    """The most that is held while a model is loaded in shards and sharded, beside what the whole one takes."""
    before, seen = live(), {"load": [], "shard": []}
    divide, gather, read = parts.divide, fsdp.gather, stream.convert_and_load_state_dict_in_model

    def divided(*given: Any) -> None:
        seen["load"].append(live() - before)
        divide(*given)

    def gathered(*given: Any) -> None:
        gather(*given)
        seen["shard"].append(live() - before)

    layers = []

    def reading(**keywords: Any) -> Any:
        layers.append(sum(torch.Size(s.get_shape()).numel() * 4 for s in keywords["state_dict"].values()))
        return read(**keywords)

    parts.divide, fsdp.gather, stream.convert_and_load_state_dict_in_model = divided, gathered, reading
    model, _ = load(kind, SHARDS)
    kept = live() - before
    fsdp.shard(model, stream_layers(model))
    parts.divide, fsdp.gather, stream.convert_and_load_state_dict_in_model = divide, gather, read
    sharded = live() - before
    del model
    before = live()
    model, _ = load(kind, None)
    whole = live() - before
    scales = sum(
        t.nbytes
        for module in model.modules()
        for state in [getattr(getattr(module, "weight", None), "quant_state", None)]
        if state is not None
        for t in (state.absmax, state.code, state.state2.absmax, state.state2.code)
    )
    return {
        "most while loading": max(seen["load"]),
        "most while sharding": max(seen["shard"]),
        "kept": kept,
        "sharded": sharded,
        "whole": whole,
        "scales": scales,
        "largest read": max(layers),
        "read": sum(layers),
    }


def stream_layers(model: Any) -> list[torch.nn.Module]:
    from pantheraml.models.activations import decoder_layers

    return decoder_layers(model)


def refused() -> dict[str, str]:
    """What cannot be done with a model in shards, and what is said."""
    told = {}
    model, tokenizer = load("lora", SHARDS)
    inputs = tokenizer(["hello"], return_tensors="pt")

    def attempt(name: str, call: Any) -> None:
        try:
            call()
        except PantheraMLError as error:
            told[name] = f"{type(error).__name__}: {error}"

    attempt("generate", lambda: model.generate(**inputs, max_new_tokens=2))
    attempt("forward", lambda: model(**inputs))
    attempt("dora", lambda: FastLanguageModel.get_peft_model(model, use_dora=True))
    attempt("pissa", lambda: FastLanguageModel.get_peft_model(model, init_lora_weights="pissa"))
    attempt("device_map", lambda: load("lora", SHARDS, device_map="auto"))
    attempt("a word", lambda: load("lora", "fsdp"))
    attempt("8 bits", lambda: load("lora", SHARDS, load_in_8bit=True))
    attempt("pickles", lambda: load("lora", SHARDS, use_safetensors=False))
    attempt(
        "copies",
        lambda: train(
            OUT / "runs" / "copies",
            ranks=distributed.get_world_size(),
            kind="PantheraMLDistributedTrainer",
            trainer_options={"multi_gpu_config": MultiGPUConfig(strategy="ddp")},
            model=FastLanguageModel.get_peft_model(model, **LORA),
        ),
    )
    return told


def on_two() -> dict[str, Any]:
    """Every kind, saving, resuming and what is refused."""
    found: dict[str, Any] = {}
    for kind in kinds():
        found[f"{kind}, whole"], _ = trained(f"{kind}, whole", kind, None)
        found[kind], trainer = trained(kind, kind, SHARDS)
        if kind in ("lora", "full", "nf4", "new tokens"):
            trainer.save_model(OUT / f"{kind} by trainer")
        if kind in ("lora", "full", "nf4"):
            trainer.model.save_pretrained_merged(
                OUT / f"{kind} merged",
                trainer.processing_class,
                **({"merge_onto": "dequantized"} if kind == "nf4" else {}),
            )
        if kind == "lora":
            trainer.model.save_pretrained_ggml(OUT / "lora ggml")
    half = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for kind in ("lora", "full"):
        trained(f"{kind}, stopped", kind, SHARDS, folder=OUT / f"{kind} stopped", options=half)
        found[f"{kind}, resumed"], _ = trained(
            f"{kind}, resumed", kind, SHARDS, folder=OUT / f"{kind} stopped", resume=True
        )
    # The adapter that was saved, on its base in shards.
    model, _ = FastLanguageModel.from_pretrained(
        str(OUT / "lora by trainer"), dtype=torch.float32, multi_gpu_config=SHARDS, load_in_4bit=False
    )
    found["adapter loaded"] = {"in parts": parts.in_parts(model)}
    WEIGHTS.update({f"adapter loaded/{n}": p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    model, tokenizer = load("full", SHARDS)
    model.save_pretrained_merged(OUT / "full untrained", tokenizer)
    if get_device().is_gpu:
        return found
    found["packed"], _ = trained("packed", "lora", SHARDS, options={"packing": True, "max_length": 64})
    found["refused"] = refused()
    return found


def on_four() -> dict[str, Any]:
    """The three ways to train, copies of shards, and how much is held."""
    found: dict[str, Any] = {}
    for kind in ("lora", "full", "nf4"):
        found[f"{kind}, whole"], _ = trained(f"{kind}, whole", kind, None)
        found[kind], _ = trained(kind, kind, SHARDS)
    found["hybrid"], _ = trained("hybrid", "lora", MultiGPUConfig(strategy="fsdp", shard_size=2))
    for kind in ("lora", "nf4"):
        found[f"bytes, {kind}"] = bytes_held(kind)
    return found


def main() -> None:
    warnings.filterwarnings("always", message=".*returned a view tensor")
    distributed.setup_distributed_training()
    if distributed.is_main_process():
        for kind in kinds():
            write(kind)
    distributed.barrier()
    found = on_four() if distributed.get_world_size() == 4 else on_two()
    rank = distributed.get_rank()
    (OUT / f"rank{rank}.json").write_text(json.dumps(found))
    save_file(WEIGHTS, OUT / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main()
