"""What ranks do with sharded models: every scenario writes what it found into OUT/rankN.json and rankN.safetensors.

    torchrun sharded_worker.py OUT [FOLDER of the same scenarios of more ranks, whose checkpoints are gone on with]

Four ranks stop in the middle, and two go on with what they wrote.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from runs import GLOBAL_BATCH, gathered_weights, losses_of, save_tiny, tiny_qlora, train
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from training_support import panthera_model
from transformers import TrainerCallback

from pantheraml import distributed
from pantheraml.device import get_device
from pantheraml.distributed import MultiGPUConfig
from pantheraml.models.layers import decoder
from pantheraml.parallel.fsdp import is_sharded
from pantheraml.save import save_pretrained_merged

torch.set_num_threads(1)

OUT = Path(sys.argv[1])
EARLIER = Path(sys.argv[2]) if len(sys.argv) > 2 else None
STEPS, MIDDLE = 20, 10
SHARDED = {"fsdp": True}
# Adam would blow rounding errors of tiny gradients up to whole steps.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
FULL = {"lora": False, "options": SGD}
STOPPED = {"save_strategy": "steps", "save_steps": MIDDLE}
ACCUMULATED = {"accumulation": GLOBAL_BATCH // 2}
WEIGHTS: dict[str, torch.Tensor] = {}
CALLS = {"node": 0}

_node = decoder.decoder_layer


def _counted(*args, **keywords):
    CALLS["node"] += 1
    return _node(*args, **keywords)


decoder.decoder_layer = _counted


class Counted(TrainerCallback):
    """Counts the calls of training alone."""

    def on_train_begin(self, args, state, control, **kwargs):
        CALLS["node"] = 0


def run(name: str, *, fsdp: bool = True, folder: Path | None = None, **keywords) -> tuple[dict, object]:
    """One training; its gathered weights go to the file of weights."""
    options = {"max_steps": STEPS, "lr_scheduler_type": "constant"} | (SHARDED if fsdp else {})
    ranks = distributed.get_world_size()
    keywords["callbacks"] = (*keywords.get("callbacks", ()), Counted())
    keywords["options"] = options | keywords.get("options", {})
    trainer, _ = train(folder or OUT / name, ranks=ranks, watched=False, **keywords)
    model, steps = trainer.model, trainer.state.global_step
    facts = {
        "losses": losses_of(trainer),
        "steps": steps,
        "node calls": CALLS["node"],
        "sharded": is_sharded(model) and all(isinstance(p, DTensor) for p in model.parameters()),
        "state sharded": all(
            isinstance(value, DTensor)
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim() > 0
        ),
        "eval": trainer.evaluate()["eval_loss"],
    }
    WEIGHTS.update({f"{name}/{key}": value for key, value in gathered_weights(model).items()})
    return facts, trainer


def on_four() -> dict:
    """Checkpoints in the middle, of adapters and of all weights, sharded and copied."""
    stopped, short = STOPPED | {"max_steps": MIDDLE}, {"max_steps": MIDDLE}
    # Four batches of one row for each rank are twice as many rows.
    twice = {"accumulation": 4, "options": short | {"per_device_train_batch_size": 1}}
    found = {
        "lora": run("lora", options=stopped)[0],
        "full": run("full", lora=False, options=SGD | stopped)[0],
        "copied": run("copied", fsdp=False, options=stopped)[0],
        "hybrid": run("hybrid", options=short | {"fsdp_config": {"shard_size": 2}})[0],
    }
    if get_device().is_gpu:
        return found
    return found | {
        "qlora": run("qlora", model=tiny_qlora(OUT / "tiny"), options=short)[0],
        "twice, accumulated": run("twice, accumulated", **twice)[0],
        "copied full": run("copied full", fsdp=False, lora=False, options=SGD | short)[0],
        "copied qlora": run("copied qlora", fsdp=False, model=tiny_qlora(OUT / "tiny"), options=short)[0],
        "copied twice, accumulated": run("copied twice, accumulated", fsdp=False, **twice)[0],
    }


def on_two() -> dict:
    """Everything else."""
    found = {}
    found["lora"], trainer = run("lora")
    trainer.model.save_pretrained(OUT / "lora saved")
    save_pretrained_merged(trainer.model, OUT / "lora merged", trainer.processing_class)
    trainer.save_model(OUT / "lora by trainer")
    found["lora"]["eval after saving"] = trainer.evaluate()["eval_loss"]
    found["qlora, accumulated"], trainer = run("qlora, accumulated", model=tiny_qlora(OUT / "tiny"), **ACCUMULATED)
    trainer.model.save_pretrained_merged(OUT / "qlora merged", trainer.processing_class, merge_onto="dequantized")
    found["qlora, accumulated"]["eval after saving"] = trainer.evaluate()["eval_loss"]
    found["full"], trainer = run(
        "full",
        fsdp=False,
        kind="PantheraMLDistributedTrainer",
        trainer_options={"multi_gpu_config": MultiGPUConfig(strategy="fsdp")},
        lora=False,
        options=SGD | STOPPED,
    )
    trainer.save_model(OUT / "full by trainer")
    save_pretrained_merged(trainer.model, OUT / "full merged", trainer.processing_class)
    # What was written in the middle is gone on with, by as many ranks and by fewer.
    for path in (OUT / "full").glob("checkpoint-*"):
        if path.name != f"checkpoint-{MIDDLE}" and distributed.is_main_process():
            path.rename(path.with_name("done"))
    distributed.barrier()
    found["full, resumed"], _ = run("full, resumed", folder=OUT / "full", resume=True, **FULL)
    if EARLIER is not None:
        found["full, fewer"], _ = run("full, fewer", folder=EARLIER / "full", resume=True, **FULL)
        found["lora, fewer"], _ = run("lora, fewer", folder=EARLIER / "lora", resume=True)
        found["copied, fewer"], _ = run("copied, fewer", fsdp=False, folder=EARLIER / "copied", resume=True)
    if not get_device().is_gpu:
        found |= on_two_cpus()
    return found


def on_two_cpus() -> dict:
    """What GPUs would not do otherwise: the rest of the ways to train, sharded and copied, accumulated and not."""
    found = {}
    found["lora, accumulated"], _ = run("lora, accumulated", checkpointing=True, **ACCUMULATED)
    found["qlora"], _ = run("qlora", model=tiny_qlora(OUT / "tiny"))
    found["full, accumulated"], _ = run("full, accumulated", **FULL, **ACCUMULATED)
    tied = panthera_model(lora=False, tied=True)
    found["tied"], _ = run("tied", model=tied, options=SGD | {"max_steps": MIDDLE})
    for how, accumulation in (("", {}), (", accumulated", ACCUMULATED)):
        found[f"copied{how}"], _ = run(f"copied{how}", fsdp=False, **accumulation)
        found[f"copied full{how}"], _ = run(f"copied full{how}", fsdp=False, **FULL, **accumulation)
        model = tiny_qlora(OUT / "tiny")
        found[f"copied qlora{how}"], _ = run(f"copied qlora{how}", fsdp=False, model=model, **accumulation)
    return found


def main() -> None:
    started = time.monotonic()
    distributed.setup_distributed_training()
    ranks = distributed.get_world_size()
    assert GLOBAL_BATCH % ranks == 0
    if distributed.is_main_process():
        save_tiny(OUT / "tiny")
    distributed.barrier()
    found = on_four() if ranks == 4 else on_two()
    rank = distributed.get_rank()
    (OUT / f"rank{rank}.json").write_text(json.dumps(found | {"seconds": time.monotonic() - started}))
    save_file(WEIGHTS, OUT / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main()
