"""What a save did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.disk import human
from .verify import Verification, greedy_tokens


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written.

    Attributes:
        directory: Where.
        save_method: ``"merged_16bit"`` or ``"lora"``.
        merged_modules: Adapter modules that were merged (0 for ``"lora"``).
        onto: What they were merged onto: ``"memory"``, ``"dequantized"``, or the folder of the 16-bit base.
        dtype: Dtype of the weights; None for ``"lora"``.
        files: Names of the weight files.
        nbytes: Bytes of weights.
        untied: Whether the output head had to be separated from the input embeddings.
        verification: What was checked, or None when ``verify=False``.
        seconds: Wall time.
    """

    directory: Path
    save_method: str
    merged_modules: int
    onto: str
    dtype: torch.dtype | None
    files: tuple[str, ...]
    nbytes: int
    untied: bool
    verification: Verification | None
    seconds: float

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{self.merged_modules} adapter modules merged onto {self.onto}"] if self.merged_modules else []
        parts.append(f"{human(self.nbytes)} in {len(self.files)} file{'s' if len(self.files) != 1 else ''}")
        check = self.verification
        if check is not None and check.deviation is not None:
            parts.append(
                f"reloaded: logits deviate by {check.deviation:.2g} (at most {check.budget:.2g}: {check.note})"
                + greedy_tokens(check.tokens)
            )
        elif check is not None:
            parts.append(f"{check.tensors} tensors read back and compared ({check.note})")
        return f"saved {self.directory}: {', '.join(parts)}"
