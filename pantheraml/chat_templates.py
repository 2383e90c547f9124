"""Chat data helpers at the path that Unsloth scripts import them from."""

from __future__ import annotations

from .data.example_template import apply_chat_template, construct_chat_template
from .data.masking import mask_non_responses
from .data.replies import assistant_masks
from .data.responses import train_on_responses_only
from .data.sharegpt import remove_special_tokens, standardize_data_formats, standardize_sharegpt, to_sharegpt
from .data.stopping import create_stopping_criteria, get_ollama_eos_tokens
from .data.templates.apply import get_chat_template, stop_token_ids

__all__ = [
    "apply_chat_template",
    "assistant_masks",
    "construct_chat_template",
    "create_stopping_criteria",
    "get_chat_template",
    "get_ollama_eos_tokens",
    "mask_non_responses",
    "remove_special_tokens",
    "standardize_data_formats",
    "standardize_sharegpt",
    "stop_token_ids",
    "to_sharegpt",
    "train_on_responses_only",
]
