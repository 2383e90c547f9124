"""What ranks do that share each sequence: each writes what it found into OUT/rankN.json and rankN.safetensors.

    torchrun context_worker.py OUT

The scenarios are also what one process trains, to be compared with.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from runs import gathered_weights, losses_of, ragged_rows, save_tiny, tiny_qlora, train
from safetensors.torch import save_file
from training_support import panthera_model
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pantheraml import distributed, errors
from pantheraml.device import get_device
from pantheraml.distributed import MultiGPUConfig
from pantheraml.models import activations
from pantheraml.models.attention import prefer
from pantheraml.models.layers import decoder
from pantheraml.models.layers.levels import Keep, Level
from pantheraml.models.record import record_of

STEPS, FEW = 20, 6
# Adam would blow rounding errors of tiny gradients up to whole steps.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
PADDED = {"padding_free": False}
UNBALANCED, BALANCED = {"router_aux_loss_coef": 0.0}, {"router_aux_loss_coef": 1.0}
WEIGHTS: dict[str, torch.Tensor] = {}
SEEN = {"node": 0, "longest": 0}

_node = decoder.decoder_layer


def _watched(h: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
    SEEN["node"] += 1
    SEEN["longest"] = max(SEEN["longest"], h.shape[1])
    return _node(h, *args, **keywords)


decoder.decoder_layer = _watched


def tiny(kind: str = "llama", *, lora: bool = True, **config: Any) -> Any:
    """A model with the attention that loading gives it."""
    model = panthera_model(kind, lora=lora, targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), **config)
    assert prefer(model.get_base_model() if lora else model)
    return model


def windowed(kind: str, **config: Any) -> Any:
    """One whose layers look back 8 tokens, or some of them."""
    return tiny(kind, config={"sliding_window": 8, "head_dim": 16} | config)


def turning(kind: str, **factors: Any) -> Any:
    """One whose angles depend on whether the longest row has more than 24 tokens."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 24}
    return tiny(config={"rope_parameters": rope | factors, "max_position_embeddings": 24 if kind == "dynamic" else 48})


def loaded(folder: Path, config: MultiGPUConfig | None = None) -> Any:
    """A model in 4 bits, of which the loader is told how it will train."""
    if distributed.is_main_process():
        save_tiny(folder / "tiny")
    distributed.barrier()
    return tiny_qlora(folder / "tiny", config)


class OfTheRank(DataCollatorForLanguageModeling):
    """A collator that gives every rank tokens of its own, of as many or of its own number, from some batch on."""

    def __init__(self, *, lengths: bool, first: int) -> None:
        super().__init__(pad_token_id=2)
        self.lengths, self.first = lengths, first

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch, rank = super().torch_call(examples), distributed.get_rank()
        self.first -= 1
        if self.first >= 0:
            return batch
        if self.lengths:
            return {name: value[:, 5 * rank :] for name, value in batch.items()}
        return batch | {"input_ids": batch["input_ids"] + rank}


class WithTypes(DataCollatorForLanguageModeling):
    """A collator of another kind of batch."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        return batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}


SCENARIOS: dict[str, dict[str, Any]] = {
    "lora": {"model": tiny, "steps": STEPS},
    "full": {"model": lambda: tiny(lora=False), "options": SGD, "steps": STEPS},
    "evaluated first": {"model": tiny, "evaluated": True},
    "padded, accumulated": {"model": tiny, "accumulation": 2, "options": PADDED, "steps": STEPS},
    "packed, accumulated": {
        "model": tiny,
        "accumulation": 2,
        "options": {"packing": True, "max_length": 61},
        "steps": STEPS,
    },
    "normed heads": {"model": lambda: tiny("qwen3", config={"head_dim": 16})},
    "windows": {"model": lambda: windowed("mistral")},
    "windows, padded, full": {
        "model": lambda: panthera_with_attention("mistral", sliding_window=8),
        "options": SGD | PADDED,
    },
    "windows and caps": {"model": lambda: windowed("gemma2")},
    "experts": {
        "model": lambda: panthera_with_attention(
            "qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        "options": SGD | UNBALANCED,
    },
    "balanced experts": {
        "model": lambda: panthera_with_attention(
            "qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        "options": SGD | BALANCED,
        "accumulation": 2,
    },
    "balanced experts, padded": {
        "model": lambda: panthera_with_attention("mixtral", num_local_experts=4, num_experts_per_tok=2),
        "options": SGD | BALANCED | PADDED,
    },
    "sinks": {
        "model": lambda: panthera_with_attention(
            "gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
        ),
        "options": SGD | UNBALANCED,
    },
    "long rows turn otherwise": {
        "model": lambda: turning("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8),
        "options": PADDED,
    },
    "longer rows turn less": {"model": lambda: turning("dynamic"), "options": PADDED},
    "recomputed": {"model": tiny, "checkpointing": True},
    "recomputed around attention": {"model": tiny, "checkpointing": True, "level": Level(Keep.ATTENTION)},
    "recomputed inner part": {"model": tiny, "checkpointing": True, "level": Level(Keep.RESIDUAL)},
    "sharded": {"model": tiny, "options": {"fsdp": True}, "accumulation": 2},
    "sharded full": {"model": lambda: tiny(lora=False), "options": SGD | {"fsdp": True}, "checkpointing": True},
    "4 bits": {"model": loaded},
    "4 bits, sharded": {"model": loaded, "options": {"fsdp": True}},
    "4 bits, loaded in shards": {"model": loaded, "strategy": "fsdp", "kind": "SFTTrainer"},
}

# On GPUs alone: thousands of tokens in half precision, through the kernels, with activations planned by measuring.
OF_GPUS: dict[str, dict[str, Any]] = {
    "bf16": {"model": lambda: in_half_precision(), "rows": lambda: long_rows(), "steps": STEPS},
    "bf16, sharded": {"model": lambda: in_half_precision(), "rows": lambda: long_rows(), "options": {"fsdp": True}},
}
# What GPUs run besides: the ways to train. Kinds of layers and of batches divide there as on a CPU.
WAYS = ("lora", "full", "packed, accumulated", "recomputed around attention", "sharded", "4 bits, loaded in shards")
OF_CPUS = tuple(name for name in SCENARIOS if name not in WAYS)
# Four ranks, in groups of two and as one, which has fewer heads of keys than ranks.
OF_FOUR = {2: ["lora", "packed, accumulated", "sharded full"], 4: ["lora", "full", "windows", "normed heads"]}


# What is refused, and a part of what is told; the last five when the first batch is there.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "attention of another kind": ({"model": panthera_model}, "attn_implementation='sdpa'"),
    "heads": (
        {"model": lambda: tiny(config={"num_attention_heads": 1, "num_key_value_heads": 1})},
        "attention heads, 1, is not a multiple of 2",
    ),
    "other layers": ({"model": lambda: with_layer("linear_attention")}, "layers of linear_attention"),
    "noise": ({"options": {"neftune_noise_alpha": 5.0}}, "NEFTune"),
    "smoothed labels": ({"options": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor"),
    "tokens weighed alone": ({"options": {"average_tokens_across_devices": False}}, "average_tokens_across_devices"),
    "a stream": ({"rows": lambda: ragged_rows().to_iterable_dataset()}, "train_dataset is a stream"),
    "metrics": ({"trainer_options": {"compute_metrics": lambda prediction: {}}}, "compute_metrics"),
    "dropped rows": ({"options": {"dataloader_drop_last": True}}, "a loader that drops the last"),
    "other tensors": ({"trainer_options": {"data_collator": WithTypes(pad_token_id=2)}}, "a batch with token_type_ids"),
    "other lengths": ({"trainer_options": {"data_collator": OfTheRank(lengths=True, first=0)}}, "different rows"),
    "other rows": ({"trainer_options": {"data_collator": OfTheRank(lengths=False, first=1)}}, "different rows"),
    "mixed tokens": ({"model": lambda: mixing(tiny())}, "gives something else when its sequences are divided"),
}


def with_layer(kind: str) -> Any:
    """A model that says that its last layer is of another kind."""
    model = tiny()
    model.config.layer_types = ["full_attention", kind]
    return model


def mixing(model: Any) -> Any:
    """One whose embeddings depend on the token before."""
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output + output.roll(1, 1))
    return model


def refused(name: str, out: Path) -> str | None:
    """What is told of something that is refused."""
    given, _ = REFUSED[name]
    given = given | {key: given[key]() for key in ("model", "rows") if key in given}
    options = {"max_steps": 2} | given.pop("options", {})
    choices = {"multi_gpu_config": MultiGPUConfig(context_parallel=2)} | given.pop("trainer_options", {})
    given = {"model": tiny()} | given
    try:
        train(
            out / "refused",
            ranks=1,
            kind="PantheraMLDistributedTrainer",
            options=options,
            trainer_options=choices,
            watched=False,
            **given,
        )
    except errors.PantheraMLError as error:
        return str(error)
    return None


def in_half_precision() -> Any:
    """A model whose heads the kernels take, in bf16."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = tiny("qwen3", config=sizes | {"head_dim": 64, "max_position_embeddings": 8192}, max_seq_length=8192)
    record_of(model).dtype = torch.bfloat16
    return model.to(torch.bfloat16)


def long_rows() -> Dataset:
    """Rows of 500 to 4,000 tokens."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(500, 4000, (16,), generator=generator).tolist()
    rows = [torch.randint(50, 384, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def panthera_with_attention(kind: str, **config: Any) -> Any:
    """All weights of a model with the attention that loading gives it."""
    return tiny(kind, lora=False, config=config)


def trained(name: str, folder: Path, size: int = 1) -> Any:
    """A trainer that has trained a scenario, in groups of ``size`` ranks."""
    defaults = {"options": {}, "accumulation": 1, "checkpointing": "auto", "steps": FEW, "rows": lambda: None}
    scenario = defaults | (SCENARIOS | OF_GPUS)[name]
    model, folder = scenario["model"], folder / f"{name} by {size}"
    options = {"max_steps": scenario["steps"], "lr_scheduler_type": "constant"} | scenario["options"]
    keywords: dict[str, Any] = {"kind": "PantheraMLDistributedTrainer"}
    config = None
    if size == 1:
        options.pop("fsdp", None)
    elif "strategy" in scenario:
        config = MultiGPUConfig(context_parallel=size, strategy=scenario["strategy"])
        keywords["kind"] = scenario["kind"]
    else:
        keywords["trainer_options"] = {"multi_gpu_config": MultiGPUConfig(context_parallel=size)}
    fixed = dict(activations._FIXED)
    if "level" in scenario:
        activations._FIXED["recompute"] = scenario["level"]
    made = loaded(folder, config) if model is loaded else model()
    record_of(made).gradient_checkpointing = scenario["checkpointing"]
    try:
        trainer, _ = train(
            folder,
            ranks=distributed.get_world_size() // size,
            accumulation=scenario["accumulation"],
            model=made,
            options=options,
            rows=scenario["rows"](),
            watched=False,
            evaluated=scenario.get("evaluated", False),
            **keywords,
        )
    finally:
        activations._FIXED.update(fixed)
    return trainer


def run(name: str, out: Path, size: int) -> dict[str, Any]:
    """What a scenario gives; its weights go to the file of weights."""
    SEEN.update(node=0, longest=0)
    trainer = trained(name, out, size)
    run = f"{name} by {size}"
    WEIGHTS.update({f"{run}/{key}": value for key, value in gathered_weights(trainer.model).items()})
    return {
        "losses": losses_of(trainer),
        "node": SEEN["node"],
        "longest": SEEN["longest"],
        "eval": trainer.evaluate()["eval_loss"],
        "tokens": [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry],
    }


def resumed(out: Path) -> list[float]:
    """A run that is stopped in the middle of an epoch and goes on."""
    scenario = SCENARIOS["lora"]
    stop = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    for steps, resume in ((4, False), (8, True)):
        trainer, _ = train(
            out / "resumed",
            ranks=1,
            kind="PantheraMLTrainer",
            model=scenario["model"](),
            options=stop | {"max_steps": steps, "context_parallel": 2},
            watched=False,
            resume=resume,
        )
    return losses_of(trainer)


def main() -> None:
    started = time.monotonic()
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    distributed.setup_distributed_training()
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    on_gpus = get_device().is_gpu
    on_two = [*WAYS, *OF_GPUS] if on_gpus else [*SCENARIOS]
    wanted = {2: on_two} if ranks == 2 else OF_FOUR
    found: dict[str, Any] = {
        f"{name} by {size}": run(name, out, size) for size, names in wanted.items() for name in names
    }
    if ranks == 2 and not on_gpus:
        found["resumed"] = resumed(out)
        found["refused"] = {name: refused(name, out) for name in REFUSED}
    distributed.cleanup_distributed_training()
    for _ in range(2):
        with distributed.distributed_context():
            found["rejoined"] = distributed.all_reduce_scalar(rank, average=False)
    (out / f"rank{rank}.json").write_text(json.dumps(found | {"seconds": time.monotonic() - started}))
    save_file(WEIGHTS, out / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main()
