"""Two ranks that nobody stops when one has failed, as torchrun would.

unattended_worker.py OUT prepare|step|resume
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from runs import train
from transformers import TrainerCallback

from pantheraml import env
from pantheraml.distributed import setup_distributed_training
from pantheraml.training import preemption

OUT, HOW = Path(sys.argv[1]), sys.argv[2]
preemption._LOOK_S, preemption._GRACE_S = 0.2, 1.0
SHORT = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}


class FailOnRankOne(TrainerCallback):
    """Rank 1 raises while rank 0 is busy with something that does not end."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            if args.process_index == 1:
                raise LookupError("the fault of rank one")
            time.sleep(600)


def text(row: dict[str, Any]) -> str:
    """A formatting function with which rank 0 fails."""
    if env.rank() == 0:
        raise LookupError("the fault of rank zero")
    return row["text"]


def main() -> None:
    setup_distributed_training()
    if HOW == "prepare":
        rows = Dataset.from_dict({"text": ["one", "two"]})
        # The main process is first where results are left on a disk.
        rows.save_to_disk(OUT / f"rows{env.rank()}")
        rows = Dataset.load_from_disk(OUT / f"rows{env.rank()}")
        train(OUT, ranks=2, rows=rows, watched=False, trainer_options={"formatting_func": text})
    elif HOW == "step":
        train(OUT, ranks=2, watched=False, callbacks=(FailOnRankOne(),))
    else:
        # As on two hosts without a common disk: only the main process has what was saved.
        host = OUT / f"host{env.rank()}"
        host.mkdir()
        os.chdir(host)
        train(Path("run"), ranks=2, watched=False, options=SHORT)
        train(Path("run"), ranks=2, watched=False, options=SHORT | {"max_steps": 4}, resume=True)


if __name__ == "__main__":
    main()
