"""The command line trains from a stream in several processes; each writes which rows its batches held.

torchrun stream_worker.py OUT MODEL FILE [FLAG ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from trl import SFTTrainer

from pantheraml.cli import main

OUT, MODEL, FILE, *FLAGS = sys.argv[1:]
seen: list[list[int]] = []
original = SFTTrainer.training_step


def training_step(self, model, inputs, *args, **kwargs):
    ids, places = inputs["input_ids"], inputs.get("position_ids")
    rows = [ids[0, place:].tolist() for place in (places[0] == 0).nonzero().flatten()] if places is not None else ids
    # The third token of each row is the row's number.
    seen.append([int(row[2]) for row in rows])
    return original(self, model, inputs, *args, **kwargs)


if __name__ == "__main__":
    SFTTrainer.training_step = training_step
    argv = ["--model_name", MODEL, "--dataset", FILE, "--output_dir", str(Path(OUT) / "run"), "--streaming"]
    argv += ["--shuffle_buffer", "0", "--max_steps", "3", "--gradient_accumulation_steps", "2", *FLAGS]
    code = main(argv)
    (Path(OUT) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
    sys.exit(code)
