"""What ``run.py`` measures: workloads, and in each the rows of its table, beginning with the ones that matter most."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# hf is transformers, PEFT and TRL as they are; liger is the same with Liger's kernels.
CONTENDERS = ("pantheraml", "unsloth", "hf", "liger")
DEFAULT = "default"


@dataclass(frozen=True)
class Bar:
    """What a row should reach, relative to the peer of the same call.

    Attributes:
        least: Tokens a second as a multiple of the peer's, at least.
        aim: The multiple that is aimed at.
        peak: Largest peak memory as a multiple of the peer's, or None.
    """

    least: float
    aim: float
    peak: float | None = None


@dataclass(frozen=True)
class Row:
    """One contender with one choice of options.

    Attributes:
        contender: One of ``CONTENDERS``.
        variant: Name of the choice; ``"default"`` is what a user gets who chooses nothing.
        checkpointing: ``use_gradient_checkpointing`` of the loaders' API, or whether plain TRL checkpoints.
        load: Further keywords of ``from_pretrained``.
        adapt: Further keywords of ``get_peft_model``.
        exact: Whether losses must follow plain transformers: not with fp8.
        bar: What to reach, if that is fixed.
        environment: Variables that the process gets beside those of this one.
    """

    contender: str
    variant: str = DEFAULT
    checkpointing: bool | str = "unsloth"
    load: Mapping[str, Any] = field(default_factory=dict)
    adapt: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True
    bar: Bar | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``contender/variant``."""
        return f"{self.contender}/{self.variant}"


@dataclass(frozen=True)
class Workload:
    """A model, a mode and a size of batch; its rows are compared with each other.

    Attributes:
        title: Heading in the report.
        shape: A name in ``shapes.SHAPES``.
        mode: ``"lora"``, ``"qlora"`` or ``"full"``.
        rows: What is measured, the most important first.
        length: Tokens of a sequence.
        batch: Sequences of a step.
        steps: Optimizer steps.
        rank: LoRA rank.
        repeats: Processes for each row; only the start-up needs more than one.
        limit_s: Seconds after which a row is given up.
    """

    title: str
    shape: str
    mode: str
    rows: tuple[Row, ...]
    length: int = 2048
    batch: int = 4
    steps: int = 20
    rank: int = 16
    repeats: int = 1
    limit_s: int = 240

    def tiny(self) -> Workload:
        """The same rows at a size for a CPU, to see that everything works."""
        return dataclasses.replace(self, shape="tiny", length=min(64, self.length), batch=2, steps=min(5, self.steps))


FP8 = {"load_in_fp8": True}
NF4_FP8 = {"load_in_4bit": True, "load_in_fp8": True}

_UNSLOTH = Row("unsloth")
_HF = Row("hf", checkpointing=True)
_LIGER = Row("liger", checkpointing=True)
# What Unsloth's default compiles for Gemma 2 fails inside this torch's compiler, and told not to compile it still does,
# for longer than 160 s on an H100.
_EAGER = Row("unsloth", "eager", environment={"TORCHDYNAMO_DISABLE": "1"})
# The peers with all activations kept: what they can do where memory is plenty.
_KEEPING = (Row("unsloth", "keep", checkpointing=False), Row("liger", "keep", checkpointing=False))


def _defaults(least: float, aim: float) -> Row:
    return Row("pantheraml", bar=Bar(least, aim))


CASES: dict[str, Workload] = {
    "8b-lora": Workload(
        "Llama-3.1-8B, LoRA",
        "llama-3.1-8b",
        "lora",
        (
            _defaults(1.45, 1.65),
            _UNSLOTH,
            _HF,
            Row("pantheraml", "recompute", checkpointing="offload", bar=Bar(1.12, 1.2, peak=1.0)),
            Row("pantheraml", "fp8", load=FP8, exact=False, bar=Bar(1.9, 2.2)),
            _LIGER,
            *_KEEPING,
        ),
    ),
    "8b-qlora": Workload(
        "Llama-3.1-8B, QLoRA (nf4, double quantisation)",
        "llama-3.1-8b",
        "qlora",
        (
            _defaults(1.4, 1.6),
            _UNSLOTH,
            _HF,
            Row("pantheraml", "nf4-fp8", load=NF4_FP8, exact=False),
            _LIGER,
            *_KEEPING,
        ),
    ),
    "8b-qlora-32k": Workload(
        "Llama-3.1-8B, QLoRA, one long sequence",
        "llama-3.1-8b",
        "qlora",
        (
            _defaults(1.35, 1.45),
            _UNSLOTH,
            Row("pantheraml", "capped", checkpointing="offload", bar=Bar(1.2, 1.28, peak=1.1)),
            Row("pantheraml", "nf4-fp8", load=NF4_FP8, exact=False, bar=Bar(1.55, 1.8)),
            _LIGER,
            _HF,
        ),
        length=32768,
        batch=1,
        steps=8,
        limit_s=300,
    ),
    "1b-lora": Workload(
        "Llama-3.2-1B, LoRA", "llama-3.2-1b", "lora", (_defaults(1.5, 1.9), _UNSLOTH, _HF, _LIGER, *_KEEPING)
    ),
    "4b-lora": Workload("Qwen3-4B, LoRA", "qwen3-4b", "lora", (_defaults(1.3, 1.6), _UNSLOTH, _HF, _LIGER, *_KEEPING)),
    "2b-lora": Workload(
        "Gemma-2-2B, LoRA",
        "gemma-2-2b",
        "lora",
        (_defaults(1.3, 1.6), _UNSLOTH, _EAGER, _HF, _LIGER, *_KEEPING),
    ),
    "1b-full": Workload(
        "Llama-3.2-1B, full fine-tuning with 8-bit AdamW",
        "llama-3.2-1b",
        "full",
        (_defaults(1.25, 1.5), _UNSLOTH, _HF, _LIGER),
    ),
    "start-up": Workload(
        "Start-up, Llama-3.1-8B LoRA",
        "llama-3.1-8b",
        "lora",
        (Row("hf", checkpointing=True), Row("pantheraml"), _UNSLOTH),
        steps=4,
        repeats=2,
        limit_s=180,
    ),
    "context-350k": Workload(
        "Longest context, Llama-3.1-8B QLoRA rank 32: 350,000 tokens",
        "llama-3.1-8b",
        "qlora",
        (Row("pantheraml", "offload", checkpointing="offload"),),
        length=350_000,
        batch=1,
        steps=1,
        rank=32,
        limit_s=570,
    ),
    "context-500k": Workload(
        "Longest context, Llama-3.1-8B QLoRA rank 32: 500,000 tokens",
        "llama-3.1-8b",
        "qlora",
        (Row("pantheraml", "offload", checkpointing="offload"),),
        length=500_000,
        batch=1,
        steps=1,
        rank=32,
        limit_s=570,
    ),
}


def select(cases: str, contenders: str) -> dict[str, Workload]:
    """The workloads and rows that two comma-separated lists name.

    Args:
        cases: Names of workloads, or ``"all"``.
        contenders: Names of contenders (every variant) or ``contender/variant``; ``"all"`` takes every row.

    Raises:
        ValueError: a name that is not there.
    """
    names = list(CASES) if cases == "all" else cases.split(",")
    wanted = set(contenders.split(","))
    known = {*CONTENDERS, *(row.name for case in CASES.values() for row in case.rows), "all"}
    unknown = sorted({*(set(names) - set(CASES)), *(wanted - known)})
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; cases: {', '.join(CASES)}; rows: {', '.join(sorted(known))}")
    selected = {}
    for name in names:
        rows = [r for r in CASES[name].rows if "all" in wanted or {r.contender, r.name} & wanted]
        selected[name] = dataclasses.replace(CASES[name], rows=tuple(rows))
    return selected
