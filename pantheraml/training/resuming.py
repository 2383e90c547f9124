"""Which checkpoint a run goes on from: the newest one that was written to its end."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import env, log
from ..errors import CheckpointError
from ..parallel.process_group import broadcast_object, gather_objects
from ..parallel.ranks import get_rank, get_world_size

# What transformers writes last into a checkpoint.
_LAST = "trainer_state.json"


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of an output folder, None without one.

    A process that is killed while it writes a checkpoint leaves a part of it, which is passed over.
    """
    numbered = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdecimal() and path.is_dir():
            numbered[int(number)] = path
    for _, path in sorted(numbered.items(), reverse=True):
        if _is_complete(path):
            return str(path)
        log.warning(f"{path} was not written to its end, and is passed over")
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _LAST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def _agreed(folder: str | Path) -> str | None:
    """The main process's newest checkpoint, from which all ranks go on.

    Raises:
        CheckpointError: a rank does not see it.
    """
    found = broadcast_object(newest_checkpoint(folder) if get_rank() == 0 else None)
    if found is None:
        return None
    # Of other hosts' ranks there may be their own parts.
    blind = [rank for rank, there in enumerate(gather_objects(_is_complete(Path(found)))) if not there]
    if blind:
        raise CheckpointError(
            f"rank {', '.join(map(str, blind))} of {get_world_size()} does not see the checkpoint",
            where=found,
            why="the main process has it, and all ranks have to go on from the same",
            hint="let output_dir be on a disk that all hosts share, or copy the checkpoint to every host",
        )
    return found


def install(trainer: Any) -> None:
    """Let ``train(resume_from_checkpoint=True)``, and any ``train()`` after a restart of the launch, go on from it."""
    original = trainer.train

    @functools.wraps(original)
    def train(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        restarted = resume_from_checkpoint is None and env.restarts() > 0
        if restarted or resume_from_checkpoint is True:
            found = _agreed(trainer.args.output_dir)
            if restarted:
                told = f"going on from {found}" if found else "no checkpoint: from the start"
                log.info(f"restart {env.restarts()} of the launch: {told}")
            # Without any, transformers says so.
            resume_from_checkpoint = found or resume_from_checkpoint
        return original(resume_from_checkpoint, *args, **kwargs)

    trainer.train = train
