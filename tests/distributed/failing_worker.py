"""Rank 1 raises in the middle of the training; rank 0 is inside a collective by then."""

from __future__ import annotations

import sys
from pathlib import Path

from runs import train
from transformers import TrainerCallback


class FailOnRankOne(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            raise LookupError("the fault of rank one")


if __name__ == "__main__":
    train(Path(sys.argv[1]), ranks=2, callbacks=(FailOnRankOne(),))
