"""Rank 1 fails in the third step: it raises, hangs, or is told by SIGTERM to end and goes on after a restart.

torchrun failing_worker.py OUT raise|hang|terminate
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from runs import train, trained_weights
from safetensors.torch import save_file
from transformers import TrainerCallback

from pantheraml import env
from pantheraml.distributed import MultiGPUConfig, setup_distributed_training

OUT, HOW = Path(sys.argv[1]), sys.argv[2]


class FailOnRankOne(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != 2 or env.restarts():
            return
        if HOW == "hang":
            # Not before: the ranks may take long to start.
            setup_distributed_training(MultiGPUConfig(timeout_minutes=4 / 60))
        if args.process_index != 1:
            return
        if HOW == "raise":
            raise LookupError("the fault of rank one")
        if HOW == "hang":
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    setup_distributed_training()
    # Rank 0 is inside a collective when rank 1 fails.
    trainer, _ = train(OUT, ranks=2, callbacks=(FailOnRankOne(),), options={"lr_scheduler_type": "constant"})
    save_file(trained_weights(trainer.model), OUT / f"rank{env.rank()}.safetensors")
