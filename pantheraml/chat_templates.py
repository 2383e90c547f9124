"""Chat data helpers at the path that Unsloth scripts import them from."""

from __future__ import annotations

from .data.sharegpt import remove_special_tokens, standardize_data_formats, standardize_sharegpt

__all__ = ["remove_special_tokens", "standardize_data_formats", "standardize_sharegpt"]
