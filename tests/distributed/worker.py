"""What two ranks do in one launch: every scenario writes what it found into OUT/rankN.json and rankN.safetensors."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from runs import losses_of, train, trained_weights
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from training_support import panthera_model
from transformers import TrainerCallback

from pantheraml import distributed, errors
from pantheraml.device import get_device
from pantheraml.distributed import MultiGPUConfig

torch.set_num_threads(1)

OUT = Path(sys.argv[1])
RANKS = 2
# Adam would blow rounding errors of tiny gradients up to whole steps.
ALL_WEIGHTS = {"max_steps": 3, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0}
WEIGHTS: dict[str, torch.Tensor] = {}


def helpers() -> dict:
    """The names, before anything else joined the group."""
    before = torch.distributed.is_initialized()
    config = MultiGPUConfig(timeout_minutes=5, num_gpus=RANKS, strategy="ddp")
    same = distributed.setup_distributed_training(config) is config and distributed.setup_multi_gpu(config) is config
    with distributed.distributed_context() as inner:
        kept = isinstance(inner, MultiGPUConfig)
    rank = distributed.get_rank()
    found = {
        "joined before": before,
        "joined": torch.distributed.is_initialized() and same and kept,
        "backend": torch.distributed.get_backend(),
        "rank": rank,
        "local rank": distributed.get_local_rank(),
        "world size": distributed.get_world_size(),
        "main": distributed.is_main_process(),
        "broadcast": distributed.broadcast_object({"from": rank}, src=1),
        "mean": distributed.all_reduce_scalar(rank + 1),
        "sum": distributed.all_reduce_scalar(torch.tensor(rank + 1.0), average=False),
    }
    distributed.barrier()
    refused = []
    for wrong in ({"num_gpus": 3}, {"strategy": "device_map"}, {"backend": "mpi"}, {"init_method": "file:///other"}):
        try:
            distributed.setup_distributed_training(MultiGPUConfig(**wrong))
        except errors.PantheraMLError as error:
            refused.append(type(error).__name__)
    sampler = distributed.get_sampler_for_distributed(list(range(6)), shuffle=False)
    wrapped = distributed.wrap_model_for_distributed(panthera_model().to(get_device().torch_device))
    return found | {
        "refused": refused,
        "sampled": list(sampler),
        "wrapped": type(wrapped) is DistributedDataParallel,
        "wrapped twice": distributed.wrap_model_for_distributed(wrapped) is wrapped,
    }


def run(name: str, **keywords) -> dict:
    """One training; its weights go to the file of weights."""
    trainer, seen = train(OUT / name, ranks=RANKS, **keywords)
    wrapped = trainer.model_wrapped
    facts = {
        "losses": losses_of(trainer),
        "epochs": seen.epochs,
        "eval": trainer.evaluate()["eval_loss"],
        "steps": trainer.state.global_step,
        "wrapped once": type(wrapped) is DistributedDataParallel and wrapped.module is trainer.model,
        "find unused": wrapped.find_unused_parameters,
    }
    WEIGHTS.update({f"{name}/{key}": value for key, value in trained_weights(trainer.model).items()})
    if hasattr(trainer, "get_model_memory_usage"):
        facts["memory"] = trainer.get_model_memory_usage()
        trainer.print_memory_stats()
    return facts


def nonfinite() -> dict:
    """A loss that is NaN on rank 1 alone."""
    model = panthera_model()
    steps = {"count": 0}

    def poison(module, inputs, output):
        steps["count"] += 1
        if steps["count"] == 2 and distributed.get_rank() == 1:
            return output * float("nan")
        return output

    handle = model.get_base_model().model.norm.register_forward_hook(poison)
    before = None

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            nonlocal before
            before = trained_weights(model)

    try:
        train(OUT / "nonfinite", ranks=RANKS, model=model, callbacks=(Keep(),))
    except errors.NonFiniteError as error:
        after = trained_weights(model)
        message = str(error)
        kept = all(torch.equal(before[name], after[name]) for name in before)
        return {"raised": message, "weights kept": kept}
    finally:
        handle.remove()
    return {"raised": None}


def slow_tokenising() -> dict:
    """Rank 0 prepares for longer than the collectives' timeout, and the others wait all the same."""
    distributed.setup_distributed_training(MultiGPUConfig(timeout_minutes=2 / 60))
    rows = Dataset.from_dict({"text": [f"number {i}" for i in range(16)]})

    def text(row):
        if distributed.is_main_process() and row["text"] == "number 3":
            time.sleep(2)
        return f"{row['text']}."

    start = time.monotonic()
    trainer, _ = train(
        OUT / "slow",
        ranks=RANKS,
        rows=rows,
        trainer_options={"formatting_func": text},
        options={"max_steps": 1},
        watched=False,
    )
    waited = time.monotonic() - start
    distributed.setup_distributed_training(MultiGPUConfig(timeout_minutes=5))
    return {"steps": trainer.state.global_step, "waited": waited}


def main() -> None:
    started = time.monotonic()
    found = {"helpers": helpers()}
    found["accumulation 1"] = run("accumulation 1")
    found["accumulation 2"] = run("accumulation 2", accumulation=2, checkpointing=True)
    found["full"] = run("full", lora=False, kind="PantheraMLTrainer", options=ALL_WEIGHTS)
    found["distributed"] = run(
        "distributed",
        kind="PantheraMLDistributedTrainer",
        trainer_options={
            "multi_gpu_config": MultiGPUConfig(find_unused_parameters=True, use_gradient_checkpointing=False)
        },
        options={"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "auto_scale_lr": True},
    )
    stopped = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "lr_scheduler_type": "constant"}
    whole = {"lr_scheduler_type": "constant", "save_strategy": "no"}
    run("resumed", options=stopped)
    found["resumed"] = run("resumed", options=stopped | {"max_steps": 6}, resume=True)
    found["uninterrupted"] = run("uninterrupted", options=whole)
    found["nonfinite"] = nonfinite()
    if not get_device().is_gpu:
        found["slow tokenising"] = slow_tokenising()
    rank = distributed.get_rank()
    (OUT / f"rank{rank}.json").write_text(json.dumps(found | {"seconds": time.monotonic() - started}))
    save_file(WEIGHTS, OUT / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main()
