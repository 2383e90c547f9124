"""Gemma 1 to 4."""

from __future__ import annotations

from .parts import NEEDS_USER_FIRST, NO_SUCH_ROLE, NO_TOOLS, SPLIT_SYSTEM, TEXT, text_macro
from .registry import ChatTemplate

# The first three generations have no system role; the instructions go in front of the first user text.
_TURNS = (
    NO_TOOLS
    + SPLIT_SYSTEM
    + NEEDS_USER_FIRST
    + r"""
{{- bos_token }}
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{{- '<start_of_turn>user\n' + (system + '\n\n' if loop.first and system else '') }}
{{- text(message['content']) | trim + '<end_of_turn>\n' }}
{%- elif message['role'] == 'assistant' %}
{{- '<start_of_turn>model\n' }}
{%- generation %}
{{- text(message['content']) | trim + '<end_of_turn>' }}
{%- endgeneration %}
{{- '\n' }}"""
    + NO_SUCH_ROLE
    + r"""
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\n' }}
{%- endif %}"""
)

# Thoughts of turns before the last question are left out, as the model card asks for.
_TURNS_4 = (
    NO_TOOLS
    + SPLIT_SYSTEM
    + r"""
{%- set thinking = enable_thinking if enable_thinking is defined else THINKING %}
{%- set last = namespace(question=-1) %}
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{%- set last.question = loop.index0 %}
{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- if thinking or system %}
{{- '<|turn>system\n' + ('<|think|>\n' if thinking else '') + system | trim + '<turn|>\n' }}
{%- endif %}
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{{- '<|turn>user\n' + text(message['content']) | trim + '<turn|>\n' }}
{%- elif message['role'] == 'assistant' %}
{%- set thought = message['reasoning_content'] if thinking and loop.index0 > last.question else '' %}
{{- '<|turn>model\n' }}
{%- generation %}
{{- '<|channel>thought\n' + thought | trim + '\n<channel|>' if thought else '' }}
{{- text(message['content']) | trim + '<turn|>' }}
{%- endgeneration %}
{{- '\n' }}"""
    + NO_SUCH_ROLE
    + r"""
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|turn>model\n' }}
{%- endif %}"""
)
_TEXT_4 = text_macro({"image": "<|image|>", "audio": "<|audio|>", "video": "<|video|>"})
_FORMAT = "https://ai.google.dev/gemma/docs/core/prompt-structure"
_FORMAT_4 = "https://ai.google.dev/gemma/docs/core/prompt-formatting-gemma4"
_START = ("<start_of_turn>",)


def _first(name: str) -> ChatTemplate:
    return ChatTemplate(name, TEXT + _TURNS, turn_end="<end_of_turn>", becomes_eos=True, tokens=_START, source=_FORMAT)


TEMPLATES = (
    _first("gemma"),
    _first("gemma2"),
    ChatTemplate(
        "gemma-3",
        text_macro({"image": "<start_of_image>"}) + _TURNS,
        aliases=("gemma3",),
        turn_end="<end_of_turn>",
        tokens=_START,
        source=_FORMAT,
    ),
    ChatTemplate(
        "gemma-3n",
        text_macro({"image": "<image_soft_token>", "audio": "<audio_soft_token>"}) + _TURNS,
        aliases=("gemma3n",),
        turn_end="<end_of_turn>",
        tokens=_START,
        source=_FORMAT,
    ),
    ChatTemplate(
        "gemma-4",
        _TEXT_4 + _TURNS_4.replace("THINKING", "false"),
        aliases=("gemma4",),
        turn_end="<turn|>",
        tokens=("<|turn>",),
        source=_FORMAT_4,
    ),
    ChatTemplate(
        "gemma-4-thinking",
        _TEXT_4 + _TURNS_4.replace("THINKING", "true"),
        aliases=("gemma4-thinking",),
        turn_end="<turn|>",
        tokens=("<|turn>", "<|think|>", "<|channel>", "<channel|>"),
        source=_FORMAT_4,
    ),
)
