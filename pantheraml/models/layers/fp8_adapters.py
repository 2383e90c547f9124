"""PEFT's LoRA layer over an fp8 base: merging and undoing it."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear

from ...errors import UnsupportedError
from .fp8 import Fp8Linear


class LoraOnFp8(LoraLinear):
    """LoRA whose base holds its weight in 16 bits for as long as adapters are merged into it."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, into the dequantised weight."""
        base = self.get_base_layer()
        if not isinstance(base, Fp8Linear):
            super().merge(safe_merge, adapter_names)
            return
        base.unpack()
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            if not self.merged:
                base.pack()

    def unmerge(self) -> None:
        """As PEFT's; the fp8 weight is the one from before, bit for bit."""
        super().unmerge()
        base = self.get_base_layer()
        if isinstance(base, Fp8Linear):
            base.pack()


def adopt(layer: Any) -> None:
    """Make a LoRA layer of PEFT one that can be merged when its base is in fp8; any other is left alone.

    Raises:
        UnsupportedError: It is a variant that reads the base's weight (DoRA), which PEFT cannot do in fp8.
    """
    if not isinstance(getattr(layer, "base_layer", None), Fp8Linear):
        return
    if layer.lora_variant:
        raise UnsupportedError(
            f"{type(next(iter(layer.lora_variant.values()))).__name__} reads the base's weight, which is in fp8",
            where="get_peft_model",
            hint="use plain LoRA, or load the model in 16 bit or with load_in_4bit=True",
        )
    if type(layer) is LoraLinear:
        layer.__class__ = LoraOnFp8
