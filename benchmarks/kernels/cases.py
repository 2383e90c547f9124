"""The list of everything that is timed, the most telling first."""

from __future__ import annotations

from collections.abc import Iterable

import ops_elementwise
import ops_lora
import ops_losses
import ops_norms
import ops_weights
from workload import LLAMA, MODELS, TINY_MODELS, TINY_TOKENS, TOKENS, Case

TABLES = (ops_norms, ops_elementwise, ops_losses, ops_lora, ops_weights)
OPS = {name: make for table in TABLES for name, make in table.OPS.items()}
# Their inputs do not depend on the number of tokens.
OF_WEIGHTS = ("nf4_dequantize", "nf4_matvec", "fp8_transpose", "fp8_quantize_blocks")
# Seconds a row: at these lengths for one model only.
ONE_MODEL = ("linear_cross_entropy", "linear_cross_entropy_trained", "lora_mlp", "lora_q", "lora_k", "lora_qkv")
ONE_MODEL_TOKENS = (32768,)

# Eager reads the groups' sizes back, which is nothing to compile.
NOT_COMPILED = ("grouped_gemm", "experts_mlp")


def _rank(model: str, tokens: int) -> int:
    """One shape of all ops first, then the other models at that length, then the other lengths."""
    return TOKENS.index(tokens) * 2 + (model != LLAMA.name)


def all_cases(ops: Iterable[str], *, tiny: bool = False) -> list[Case]:
    """Every case of the ops in the order in which they are timed."""
    cases = []
    for op in ops:
        for model in TINY_MODELS if tiny else MODELS:
            for tokens in TINY_TOKENS if tiny else TOKENS:
                if op in OF_WEIGHTS and tokens != TOKENS[0] and not tiny:
                    continue
                if op in ONE_MODEL and tokens in ONE_MODEL_TOKENS and model is not LLAMA:
                    continue
                rank = 0 if tiny else _rank(model.name, tokens)
                cases.append(
                    Case(
                        op,
                        model.name,
                        tokens,
                        OPS[op](model, tokens),
                        rank,
                        compiled=rank == 0 and op not in NOT_COMPILED,
                    )
                )
    return sorted(cases, key=lambda case: case.rank)
