"""Runs that SIGKILL ends and that are gone on with.

    torchrun --max-restarts=1 killed_worker.py OUT

All processes of the first launch are killed while they write a checkpoint of a sharded run. The second goes on with it
and trains the same undisturbed; then it copies the model, and rank 1 is killed between two checkpoints, so that the
launch is started again. The weights go into OUT/RUN-N.safetensors, where N is the rank.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from runs import gathered_weights, train
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from pantheraml import distributed, env

torch.set_num_threads(1)

OUT, AGENT = Path(sys.argv[1]), os.getppid()
KILLED = OUT / "killed"
OPTIONS = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
SHARDED = {"lora": False, "options": OPTIONS | {"fsdp": True}}


def run(name: str, folder: str, **keywords: Any) -> None:
    """Train, and write the weights."""
    trainer, _ = train(OUT / folder, ranks=2, watched=False, **keywords)
    save_file(gathered_weights(trainer.model), OUT / f"{name}-{env.rank()}.safetensors")


class KillRankOne(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1 and not env.restarts():
            os.kill(os.getpid(), signal.SIGKILL)


def kill_in_second_checkpoint() -> None:
    """All processes end when the second checkpoint has its weights and its optimizer."""
    save_rng_state = Trainer._save_rng_state

    def save_or_die(trainer: Any, folder: str) -> None:
        if trainer.state.global_step == 4:
            distributed.barrier()
            if env.rank() == 0:
                KILLED.touch()
                os.kill(AGENT, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        save_rng_state(trainer, folder)

    Trainer._save_rng_state = save_or_die


if __name__ == "__main__":
    distributed.setup_distributed_training()
    if not env.restarts():
        again = KILLED.exists()
        if not again:
            kill_in_second_checkpoint()
        run("resumed", "sharded", resume=again, **SHARDED)
        run("undisturbed", "undisturbed", **SHARDED)
    run("copied", "copied", callbacks=(KillRankOne(),), options=OPTIONS)
