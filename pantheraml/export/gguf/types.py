"""Names of GGUF weight types: which are written here, which need ``llama-quantize``, and what the aliases mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ArgumentError, ConfigError, UnsupportedError, nearest


@dataclass(frozen=True, slots=True)
class FileType:
    """A type of GGUF file.

    Attributes:
        name: Lower-case name, as users write it.
        about: What it is, for people.
        external: Name that ``llama-quantize`` knows it by; None for those written here.
        options: Further arguments of ``llama-quantize``.
        needs_imatrix: Whether ``llama-quantize`` refuses it without an importance matrix, or gives nonsense.
        budget: Largest RMS error of a tensor, relative to its RMS; what a correct file stays well below.
        logits: Largest RMS deviation of the logits, relative to their spread; a wrong model shows 1 and more.
    """

    name: str
    about: str
    external: str | None = None
    options: tuple[str, ...] = ()
    needs_imatrix: bool = False
    budget: float = 1.0
    logits: float = 1.0


_HEAD_Q8 = ("--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0")

# Errors measured on normally distributed weights: q8_0 0.006, q5_1 0.04, q5_0 0.05, q4_1 0.09, q4_0 0.1, mxfp4
# 0.12 (0 for weights that were in it before). The budgets
# leave room of two to three for weights with outliers.
FILE_TYPES: dict[str, FileType] = {
    entry.name: entry
    for entry in (
        FileType("f32", "32-bit floats: exact, four bytes a weight", budget=1e-7, logits=1e-4),
        FileType("bf16", "bfloat16: exact for models trained in bfloat16", budget=0.004, logits=0.02),
        FileType("f16", "16-bit floats", budget=0.001, logits=0.01),
        FileType("q8_0", "8 bits: nearly exact, half of f16", budget=0.02, logits=0.1),
        FileType("q5_1", "5 bits with an offset a block", budget=0.1, logits=0.5),
        FileType("q5_0", "5 bits", budget=0.12, logits=0.5),
        FileType("q4_1", "4 bits with an offset a block", budget=0.2, logits=0.8),
        FileType("q4_0", "4 bits", budget=0.25, logits=0.8),
        FileType("mxfp4", "4 bits for experts as gpt-oss has them, q8_0 for the rest", budget=0.25, logits=0.8),
        FileType("q6_k", "6 bits", "Q6_K", budget=0.06, logits=0.3),
        FileType("q5_k_m", "5 bits, more for the parts that matter", "Q5_K_M", budget=0.1, logits=0.5),
        FileType("q5_k_s", "5 bits", "Q5_K_S", budget=0.1, logits=0.5),
        FileType("q5_k", "the same as q5_k_m", "Q5_K_M", budget=0.1, logits=0.5),
        FileType(
            "q4_k_m", "4 bits, more for the parts that matter: the usual choice", "Q4_K_M", budget=0.2, logits=0.8
        ),
        FileType("q4_k_s", "4 bits", "Q4_K_S", budget=0.2, logits=0.8),
        FileType("q4_k", "the same as q4_k_m", "Q4_K_M", budget=0.2, logits=0.8),
        FileType("q3_k_l", "3 bits, the largest form", "Q3_K_L", budget=0.4),
        FileType("q3_k_m", "3 bits, more for the parts that matter", "Q3_K_M", budget=0.4),
        FileType("q3_k_s", "3 bits", "Q3_K_S", budget=0.4),
        FileType("q2_k", "2 bits", "Q2_K", budget=0.6),
        FileType("q2_k_l", "2 bits, 8 for the embeddings and the head", "Q2_K", _HEAD_Q8, budget=0.6),
        *(
            FileType(name, f"importance-weighted, about {bits} bits", name.upper(), (), needs_imatrix=True)
            for name, bits in (
                *(("iq1_s", 1.6), ("iq1_m", 1.8), ("iq2_xxs", 2.1), ("iq2_xs", 2.3), ("iq2_s", 2.5), ("iq2_m", 2.7)),
                *(("iq3_xxs", 3.1), ("iq3_s", 3.4), ("iq3_m", 3.7), ("iq4_nl", 4.5), ("iq4_xs", 4.3)),
            )
        ),
    )
}
ADAPTER_TYPES = ("f32", "f16", "bf16", "q8_0")  # in which adapters alone are written
ALIASES = {"not_quantized": None, "fast_quantized": "q8_0", "quantized": "q4_k_m"}
_GONE = {"q3_k_xs": "llama.cpp dropped it; use 'q3_k_s'"}


def resolve_types(value: str | Sequence[str] | None, *, unquantized: str = "f16") -> tuple[FileType, ...]:
    """Return the file types that are meant, each once.

    Args:
        value: A name, several names, or None for the default; case does not matter.
        unquantized: What ``"not_quantized"`` stands for: the type that holds the model's dtype.

    Raises:
        ArgumentError: neither text nor a list of texts.
        ConfigError: no such type, or an empty list.
    """
    names = [value] if value is None or isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(n is None or isinstance(n, str) for n in names):
        raise ArgumentError(
            f"{value!r} is neither the name of a type nor a list of names",
            where="argument quantization_method",
            hint="use for example 'q8_0' or ['q4_k_m', 'q8_0']",
        )
    if not names:
        raise ConfigError("the list is empty", where="argument quantization_method", hint="name a type")
    return tuple(dict.fromkeys(_one(name, unquantized) for name in names))


def _one(name: str | None, unquantized: str) -> FileType:
    key = "fast_quantized" if name is None else name.strip().lower()
    key = ALIASES.get(key, key) or unquantized
    if key in FILE_TYPES:
        return FILE_TYPES[key]
    known = [*ALIASES, *FILE_TYPES]
    if key in _GONE:
        raise UnsupportedError(
            f"{name!r} cannot be written", where="argument quantization_method", why=_GONE[key], hint=", ".join(known)
        )
    close = nearest(key, known)
    raise ConfigError(
        f"unknown GGUF type {name!r}" + (f"; did you mean {close!r}?" if close else ""),
        where="argument quantization_method",
        hint=f"the types are {', '.join(known)}",
    )
