"""Two ranks keep gathered weights as a stand-in for their devices' memory allows; each writes what it found.

torchrun gathering_worker.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from runs import gathered_weights, train
from safetensors.torch import save_file
from training_support import panthera_model
from transformers import TrainerCallback

from pantheraml import distributed
from pantheraml.models import activations
from pantheraml.models.layers import decoder
from pantheraml.parallel import fsdp
from pantheraml.parallel.ranks import get_rank

torch.set_num_threads(1)

OUT = Path(sys.argv[1])
LAYERS, STEPS = 4, 12
BASE = 1_000
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": STEPS, "lr_scheduler_type": "constant"}
WEIGHTS: dict[str, torch.Tensor] = {}
# Rooms on each rank, in gathered layers.
ROOMY, FULLEST = (1e6, 1e6), (1e6, 2.5)

fsdp._rate_of_gathering = lambda *_, **__: 1e3  # so slow that nothing else is worth as much
_NAME = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
_gather = getattr(torch.distributed, _NAME)
_node = decoder.decoder_layer
COUNTS = {"gathers": 0, "nodes": 0}


def counted(*args: Any, **keywords: Any) -> Any:
    """A gathering that is counted."""
    COUNTS["gathers"] += 1
    return _gather(*args, **keywords)


setattr(torch.distributed, _NAME, counted)


class Device:
    """Stands in for a device with room for some layers' gathered weights beside what every step takes."""

    def __init__(self, room: float, model: torch.nn.Module) -> None:
        self.room, self.model = room, model

    def __call__(self, _: torch.device) -> activations.Memory | None:
        gathering = fsdp.gathering_of(self.model)
        if gathering is None:
            return None
        layers = activations.decoder_layers(self.model)
        size = gathering.bytes_of(layers[0])
        kept = sum(unit.keeps for unit in map(Unit, layers)) * size
        # What the plan sets aside for the allocator is added again.
        free = int((BASE + self.room * size / (1 - activations._SLACK)) / 0.9) + 1
        return activations.Memory(0, BASE, free, BASE + kept)


class Unit:
    """What torch knows of a layer."""

    def __init__(self, layer: Any) -> None:
        state = layer._get_fsdp_state()
        (group,) = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        self.keeps = group.post_forward_mesh_info is None
        self.gathered = group.is_unsharded


class Steps(TrainerCallback):
    """Notes, step by step, gatherings and which layers kept their weights; and what an evaluation leaves gathered."""

    def __init__(self) -> None:
        self.gathers: list[int] = []
        self.kept: list[list[bool]] = []
        self.left: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs):
        COUNTS["gathers"] = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.gathers.append(COUNTS["gathers"])
        layers = activations.decoder_layers(kwargs["model"])
        self.kept.append([Unit(layer).keeps for layer in layers])
        assert not any(Unit(layer).gathered for layer in layers)

    def on_evaluate(self, args, state, control, **kwargs):
        layers = activations.decoder_layers(kwargs["model"])
        self.left.append(sum(Unit(layer).gathered for layer in layers))


def run(
    name: str,
    room: tuple[float, float],
    options: dict[str, Any] | None = None,
    *,
    checkpointing: bool | str = "auto",
    dtype: torch.dtype = torch.float32,
    **keywords: Any,
) -> dict[str, Any]:
    """One training."""
    model = panthera_model(lora=False, checkpointing=checkpointing, config={"num_hidden_layers": LAYERS}).to(dtype)
    steps = Steps()
    made = activations.ActivationPlan

    def plan(*args: Any, **given: Any) -> Any:
        return made(*args, **given, memory=Device(room[get_rank()], model))

    activations.ActivationPlan = plan  # type: ignore[misc, assignment]
    try:
        callbacks = (steps, *keywords.pop("callbacks", ()))
        given = SGD | {"fsdp": True} | (options or {})
        train(OUT / name, ranks=2, model=model, watched=False, callbacks=callbacks, options=given, **keywords)
    finally:
        activations.ActivationPlan = made  # type: ignore[misc]
    WEIGHTS.update({f"{name}/{key}": value for key, value in gathered_weights(model).items()})
    report = OUT / name / "report.html"
    return {
        "gathers": steps.gathers,
        "kept": steps.kept,
        "left": steps.left,
        "reported": report.is_file() and "gathered weights of 4 kept for the backward" in report.read_text(),
    }


class OutOfMemory(TrainerCallback):
    """In one step rank 1 alone has no memory for its first layer."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != STEPS // 2 or args.process_index == 0:
            return
        armed = True

        def node(*given: Any) -> Any:
            nonlocal armed
            if armed and given[1].level.keep:
                armed = False
                raise torch.OutOfMemoryError("no memory")
            return _node(*given)

        decoder.decoder_layer = node


class Unused(TrainerCallback):
    """Before a step a forward of which nothing comes."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        kwargs["model"](input_ids=torch.arange(10, 20)[None])


def main() -> None:
    distributed.setup_distributed_training()
    evaluated = {"eval_strategy": "steps", "eval_steps": 4}
    found = {
        "resharded": run("resharded", ROOMY, {"fsdp_config": {"reshard_after_forward": True}}),
        "kept": run("kept", ROOMY, evaluated),
        "fullest": run("fullest", FULLEST),
        "unused": run("unused", ROOMY, callbacks=(Unused(),)),
        "ran out": run("ran out", ROOMY, callbacks=(OutOfMemory(),)),
        "recomputed": run("recomputed", ROOMY, checkpointing=True),
        "narrow": run("narrow", ROOMY, dtype=torch.bfloat16),
    }
    fsdp._sum_dtype = lambda *_: torch.float32
    found["narrow, summed in float32"] = run("narrow, summed in float32", ROOMY, dtype=torch.bfloat16)
    rank = distributed.get_rank()
    (OUT / f"rank{rank}.json").write_text(json.dumps(found))
    save_file(WEIGHTS, OUT / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main()
