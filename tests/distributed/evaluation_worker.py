"""Evaluations and predictions of any number of ranks: each writes the figures into OUT/rankN.json.

torchrun evaluation_worker.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import build_tokenizer
from runs import ragged_rows
from safetensors.torch import save_file
from training_support import panthera_model
from trl import SFTConfig, SFTTrainer

from pantheraml import distributed

torch.set_num_threads(1)

# Of four ranks with two rows each the last has one in the first case, and in the second two have none.
COUNTS = (7, 11)
FIGURES = ("loss", "entropy", "mean_token_accuracy")


def metrics(prediction: Any) -> dict[str, float]:
    """What depends on every row, and on how often it is there."""
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    counted = labels != -100
    right = (logits.argmax(-1) == labels) & counted
    largest = np.where(counted, logits.max(-1), 0.0).astype(np.float64)
    return {
        "rows": len(labels),
        "tokens": int(counted.sum()),
        "right": int(right.sum()),
        "logits": float(largest.sum()),
        "order": float((largest.sum(1) * np.arange(len(labels))).sum()),
    }


def evaluated(
    folder: Path, count: int, *, rows: int = 2, lora: bool = True, outputs: bool = False, **options: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The figures of one evaluation, and what is predicted."""
    data = ragged_rows(count, seed=1)
    trainer = SFTTrainer(
        model=panthera_model(lora=lora),
        args=SFTConfig(
            output_dir=str(folder), per_device_eval_batch_size=rows, eval_accumulation_steps=1, use_cpu=True, **options
        ),
        train_dataset=ragged_rows(8),
        eval_dataset=data,
        processing_class=build_tokenizer(),
        compute_metrics=metrics if outputs else None,
    )
    found = {"joined": trainer.padding_free, "first": trainer.evaluate()}
    logged = trainer.state.log_history[-1]
    found["logged"] = {name: logged[f"eval_{name}"] for name in FIGURES}
    if not outputs:
        return found, {}
    # What an evaluation noted has no part in the next.
    prediction = trainer.predict(data)
    found["predicted"] = prediction.metrics
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    found["logged again"] = {name: logged[f"eval_{name}"] for name in FIGURES}
    labels = torch.from_numpy(prediction.label_ids)
    logits = torch.from_numpy(prediction.predictions)
    counted = labels[:, 1:] != -100
    return found, {"logits": logits[:, :-1][counted].contiguous(), "labels": labels[:, 1:][counted].contiguous()}


# Name -> options; an evaluation of one process may have another number of rows in a batch where it has no outputs.
RUNS: dict[str, dict[str, Any]] = {
    **{f"copied {count}": {"count": count, "padding_free": False} for count in COUNTS},
    "joined 11": {"count": 11, "padding_free": True},
    "sharded 11": {"count": 11, "fsdp": True, "lora": False},
    **{f"outputs {count}": {"count": count, "outputs": True} for count in COUNTS},
    "outputs sharded 7": {"count": 7, "outputs": True, "fsdp": True, "lora": False},
    "joined 7": {"count": 7, "padding_free": True, "rows": 3},
}


def main() -> None:
    out = Path(sys.argv[1])
    distributed.setup_distributed_training()
    found, tensors = {}, {}
    for name, options in RUNS.items():
        found[name], predicted = evaluated(out / name, **options)
        tensors.update({f"{name}/{key}": value for key, value in predicted.items()})
    rank = distributed.get_rank()
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    save_file(tensors, out / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main()
