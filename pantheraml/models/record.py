"""What PantheraML knows about a model it loaded, kept on the instance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..parallel.config import MultiGPUConfig

_ATTRIBUTE = "_pantheraml_record"
# Of the free device memory, what kept activations may fill where nothing else is said.
FRACTION = 0.9


@dataclass
class ModelRecord:
    """The resolved facts of one load.

    Attributes:
        name: What the caller asked for: a hub id or a folder.
        base: Hub id or folder that holds the base weights (differs from ``name`` when that was an adapter).
        revision: Revision asked for, or None.
        dtype: Compute dtype.
        quantization: ``"none"``, ``"nf4"``, ``"fp4"``, ``"int8"``, or the name of another quantisation method.
        full_finetuning: Whether every weight is trained.
        max_seq_length: Longest sequence in tokens the user asked for.
        gradient_checkpointing: ``True``, ``False``, ``"unsloth"``, ``"pantheraml"``, ``"auto"`` or ``"offload"``.
        activation_memory_fraction: Share of the free device memory that kept activations may fill.
        token: Hub token given by the caller; kept out of ``repr`` so that it reaches no log.
        multi_gpu_config: How several GPUs are used, or None where the loader was not told.
        load_kwargs: Keyword arguments that reload the same weights (``subfolder``, ``cache_dir``, ...).
    """

    name: str
    base: str
    revision: str | None
    dtype: torch.dtype
    quantization: str
    full_finetuning: bool
    max_seq_length: int
    gradient_checkpointing: bool | str = "auto"
    activation_memory_fraction: float = FRACTION
    token: str | None = field(default=None, repr=False)
    multi_gpu_config: MultiGPUConfig | None = None
    load_kwargs: dict[str, Any] = field(default_factory=dict)


def _unwrap(model: Any) -> list[Any]:
    """The model and what it wraps: DDP's ``module``, PEFT's ``base_model``, a tuner's ``model``, outermost first."""
    chain = [model]
    for attribute in ("module", "base_model", "model"):
        inner = vars(chain[-1]).get("_modules", {}).get(attribute) if hasattr(chain[-1], "_modules") else None
        if inner is not None:
            chain.append(inner)
    return chain


def attach_record(model: nn.Module, record: ModelRecord) -> None:
    """Keep ``record`` on ``model``; it is no module, parameter or buffer, so checkpoints do not change."""
    object.__setattr__(model, _ATTRIBUTE, record)


def record_of(model: Any) -> ModelRecord | None:
    """Return the record of a model that PantheraML loaded, also through PEFT and DDP wrappers; None for others."""
    for layer in _unwrap(model):
        record = vars(layer).get(_ATTRIBUTE) if hasattr(layer, "__dict__") else None
        if record is not None:
            return record
    return None
