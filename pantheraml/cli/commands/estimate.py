"""``pantheraml estimate``: what a training step needs on TPU chips, from the TPU compiler, without a TPU."""

from __future__ import annotations

import argparse
import dataclasses

from ...errors import ConflictError
from ...training import tpu_estimate
from ..output import Output

_GIB = 1024**3
_TOO_LARGE_CODE = 4


def run(args: argparse.Namespace) -> int:
    """Print the figures; return 4 where the step does not fit."""
    if args.full_finetuning and "r" in args.explicit:
        raise ConflictError(
            "--r makes no difference to --full_finetuning", where="pantheraml estimate", hint="leave one of them out"
        )
    output = Output(json=args.json)
    output.say(f"Compiling a training step for {args.tpu}, which takes minutes ...")
    [estimate] = tpu_estimate.estimate_tpu_step(
        args.model,
        args.tpu,
        max_seq_length=args.max_seq_length,
        per_device_train_batch_size=args.per_device_train_batch_size,
        mesh_shape=args.mesh_shape,
        lora_r=None if args.full_finetuning else args.r,
        use_gradient_checkpointing=not args.no_checkpointing,
    )
    verdict = "fits," if estimate.fits else "does not fit, at least"
    figures = f"{estimate.needed / _GIB:.2f} of {estimate.hbm / _GIB:.2f} GiB of each chip"
    output.say(f"\n{estimate.tpu} ({estimate.topology}): {verdict} {figures}")
    sizes = {
        "weights, states, batch": estimate.arguments,
        "temporaries": estimate.temporaries,
        "outputs": estimate.outputs,
        "of them updated in place": estimate.updated,
        "program": estimate.code,
    }
    rows = [(name, f"{size / _GIB:.3f} GiB") for name, size in sizes.items() if size is not None]
    rows.append(("parameters", f"{estimate.parameters:,}, {estimate.trainable:,} of them trained"))
    rows.append(("batch", f"{estimate.rows} rows of {estimate.seq_length} tokens"))
    if estimate.kernels:
        rows.append(("kernels", f"{estimate.kernels} calls, of attention"))
    if estimate.fits:
        found = ", ".join(f"{count} {kind}" for kind, count in estimate.collectives.items())
        rows.append(("communication", found or "none"))
    rows.append(("took", f"{estimate.trace_seconds:.0f} s to trace, {estimate.compile_seconds:.0f} s to compile"))
    output.table(rows)
    output.note(**dataclasses.asdict(estimate))
    output.finish()
    return 0 if estimate.fits else _TOO_LARGE_CODE
