"""Mistral's instruction formats, chosen by the control tokens that the tokenizer has.

Mistral numbers them: v1 writes ``[INST]`` as ordinary text; v3 has it as a token and knows tools; v7 has a system
prompt of its own. Tokenizers made with sentencepiece put a space after a control token, those made with tekken do not.
"""

from __future__ import annotations

from typing import Any

from .parts import NEEDS_USER_FIRST, NO_SUCH_ROLE, NO_TOOLS, SPLIT_SYSTEM, TEXT
from .registry import ChatTemplate

_V1 = (
    TEXT
    + NO_TOOLS
    + SPLIT_SYSTEM
    + NEEDS_USER_FIRST
    + r"""
{{- bos_token }}
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + (system + '\n\n' if loop.first and system else '') + text(message['content']) + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{%- generation %}
{{- ' ' + text(message['content']) + eos_token }}
{%- endgeneration %}"""
    + NO_SUCH_ROLE
    + r"""
{%- endif %}
{%- endfor %}"""
)

# v3 writes the system message into the last user turn; both write the tools in front of it.
_SYSTEM_IN_TURN = "(system + '\\n\\n' if loop.index0 == last.question and system else '') + "
_SYSTEM_TURN = r"""
{%- if system %}
{{- '[SYSTEM_PROMPT]_' + system + '[/SYSTEM_PROMPT]' }}
{%- endif %}"""

# JSON results stay JSON, other text becomes a JSON string.
_RESULT_V3 = r"""
{%- set result = text(message['content']) | trim %}
{%- set is_number = result | int | string == result or result | float | string == result %}
{%- set is_json = is_number or result in ['true', 'false', 'null'] or (result and result[0] in '{["') %}
{{- '[TOOL_RESULTS]_{"content": ' + (result if is_json else result | tojson) }}
{{- ', "call_id": "' + message['tool_call_id'] + '"}[/TOOL_RESULTS]' }}"""
_RESULT_V7 = r"""
{{- '[TOOL_RESULTS]_' + message['tool_call_id'] + '[TOOL_CONTENT]_' + text(message['content']) + '[/TOOL_RESULTS]' }}"""

_TURNS = (
    r"""
{%- set last = namespace(question=-1) %}
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{%- set last.question = loop.index0 %}
{%- endif %}
{%- endfor %}
{{- bos_token }}SYSTEM_TURN
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{%- if tools and loop.index0 == last.question %}
{{- '[AVAILABLE_TOOLS]_' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST]_' + SYSTEM_IN_TURN text(message['content']) + '[/INST]' }}
{%- elif message['role'] == 'assistant' %}
{%- generation %}
{%- if text(message['content']) %}
{{- '_' + text(message['content']) }}
{%- endif %}
{%- if message['tool_calls'] %}
{{- '[TOOL_CALLS]_[' }}
{%- for call in message['tool_calls'] %}
{%- set function = call['function'] if call['function'] else call %}
{{- '{"name": "' + function['name'] + '", "arguments": ' }}
{{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson }}
{{- ', "id": "' + call['id'] + '"}' + (', ' if not loop.last else '') }}
{%- endfor %}
{{- ']' }}
{%- endif %}
{{- eos_token }}
{%- endgeneration %}
{%- elif message['role'] == 'tool' %}RESULT_TURN"""
    + NO_SUCH_ROLE
    + r"""
{%- endif %}
{%- endfor %}"""
)


def _compose(*, own_system: bool, space: bool, tools: bool) -> str:
    gap = " " if space else ""
    head = TEXT + ("" if tools else NO_TOOLS) + SPLIT_SYSTEM + ("" if own_system else NEEDS_USER_FIRST)
    turns = (
        _TURNS.replace("SYSTEM_TURN", _SYSTEM_TURN if own_system else "")
        .replace("SYSTEM_IN_TURN ", "" if own_system else _SYSTEM_IN_TURN)
        .replace("RESULT_TURN", _RESULT_V7 if own_system else _RESULT_V3, 1)
    )
    for mark in ("]_", "'_'"):
        turns = turns.replace(mark, mark.replace("_", gap))
    return head + turns


def _choose(tokenizer: Any) -> str:
    vocabulary = tokenizer.get_vocab()
    if "[INST]" not in vocabulary:
        return _V1
    return _compose(
        own_system="[SYSTEM_PROMPT]" in vocabulary,
        space=any(token.startswith("▁") for token in vocabulary),
        # Later formats write calls with [ARGS], which is not covered here.
        tools="[ARGS]" not in vocabulary and "[AVAILABLE_TOOLS]" in vocabulary,
    )


TEMPLATES = (
    ChatTemplate(
        "mistral", _choose, source="https://docs.mistral.ai/cookbooks/concept-deep-dive-tokenization-chat_templates"
    ),
)
