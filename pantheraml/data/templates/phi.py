"""Phi-3, Phi-3.5 and Phi-4."""

from __future__ import annotations

from .parts import NO_TOOLS, TEXT, simple_turns
from .registry import ChatTemplate

_PHI_3 = (
    TEXT
    + NO_TOOLS
    + "\n{%- set chat = messages %}"
    + simple_turns(
        r"<|user|>\n",
        r"<|assistant|>\n",
        user_end=r"<|end|>\n",
        end="'<|end|>'",
        after=r"\n",
        system=r"<|system|>\n",
    )
)
_PHI_4 = (
    TEXT
    + NO_TOOLS
    + "\n{%- set chat = messages %}"
    + simple_turns(
        "<|im_start|>user<|im_sep|>",
        "<|im_start|>assistant<|im_sep|>",
        user_end="<|im_end|>",
        end="'<|im_end|>'",
        system="<|im_start|>system<|im_sep|>",
    )
)

TEMPLATES = (
    ChatTemplate(
        "phi-3",
        _PHI_3,
        aliases=("phi-35", "phi-3.5"),
        turn_end="<|end|>",
        tokens=("<|user|>", "<|assistant|>", "<|system|>"),
        source="https://huggingface.co/microsoft/Phi-3.5-mini-instruct#input-formats",
    ),
    ChatTemplate(
        "phi-4",
        _PHI_4,
        turn_end="<|im_end|>",
        tokens=("<|im_start|>", "<|im_sep|>"),
        source="https://huggingface.co/microsoft/phi-4#input-formats",
    ),
)
