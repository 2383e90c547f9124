"""Mistral's instruction formats, chosen by the control tokens that the tokenizer has.

Mistral numbers them: v1 writes ``[INST]`` as ordinary text; v3 has it as a token and knows tools; v7 has a system
prompt of its own; v11 writes each call with ``[ARGS]`` instead of a list in JSON; v13 leaves the ids of calls out,
writes tools before the first question instead of the last, and may have thoughts. What v15 adds, settings of the
model, is not written. Tokenizers made with sentencepiece put a space after a control token, those made with tekken do
not.
"""

from __future__ import annotations

from collections.abc import Mapping
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
_SYSTEM_IN_TURN = "(system + '\\n\\n' if loop.index0 == place.last and system else '') + "
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

_RESULT_V13 = r"""
{{- '[TOOL_RESULTS]_' + text(message['content']) + '[/TOOL_RESULTS]' }}"""

_ARGUMENTS = "function['arguments'] if function['arguments'] is string else function['arguments'] | tojson"
_CALLS_V3 = r"""
{{- '[TOOL_CALLS]_[' }}
{%- for call in message['tool_calls'] %}
{%- set function = call['function'] if call['function'] else call %}
{{- '{"name": "' + function['name'] + '", "arguments": ' }}
{{- ARGUMENTS }}
{{- ', "id": "' + call['id'] + '"}' + (', ' if not loop.last else '') }}
{%- endfor %}
{{- ']' }}"""
_CALLS = r"""
{%- for call in message['tool_calls'] %}
{%- set function = call['function'] if call['function'] else call %}
{{- '[TOOL_CALLS]_' + function['name'] }}THE_ID
{{- '[ARGS]_' }}
{{- ARGUMENTS }}
{%- endfor %}"""
_CALL_ID = r"""
{{- '[CALL_ID]_' + call['id'] }}"""
_THOUGHT = r"""
{%- if message['reasoning_content'] %}
{{- '[THINK]_' + message['reasoning_content'] + '[/THINK]' }}
{%- endif %}"""

_TURNS = (
    r"""
{%- set place = namespace(last=-1, tools=-1) %}
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{%- set place.last = loop.index0 %}
{%- if TOOLS_HERE %}
{%- set place.tools = loop.index0 %}
{%- endif %}
{%- endif %}
{%- endfor %}
{{- bos_token }}SYSTEM_TURN
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{%- if tools and loop.index0 == place.tools %}
{{- '[AVAILABLE_TOOLS]_' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST]_' + SYSTEM_IN_TURN text(message['content']) + '[/INST]' }}
{%- elif message['role'] == 'assistant' %}
{%- generation %}THOUGHT
{%- if text(message['content']) %}
{{- '_' + text(message['content']) }}
{%- endif %}
{%- if message['tool_calls'] %}CALLS
{%- endif %}
{{- eos_token }}
{%- endgeneration %}
{%- elif message['role'] == 'tool' %}RESULT_TURN"""
    + NO_SUCH_ROLE
    + r"""
{%- endif %}
{%- endfor %}"""
)


def _compose(version: int, *, space: bool, tools: bool, thoughts: bool) -> str:
    gap = " " if space else ""
    own_system = version >= 7
    head = TEXT + ("" if tools else NO_TOOLS) + SPLIT_SYSTEM + ("" if own_system else NEEDS_USER_FIRST)
    parts = {
        "SYSTEM_TURN": _SYSTEM_TURN if own_system else "",
        "SYSTEM_IN_TURN ": "" if own_system else _SYSTEM_IN_TURN,
        "RESULT_TURN": _RESULT_V13 if version >= 13 else _RESULT_V7 if own_system else _RESULT_V3,
        "THOUGHT": _THOUGHT if thoughts else "",
        "CALLS\n": (_CALLS if version >= 11 else _CALLS_V3) + "\n",
        "ARGUMENTS": _ARGUMENTS,
        "THE_ID": _CALL_ID if version < 13 else "",
        "TOOLS_HERE": "place.tools < 0" if version >= 13 else "true",
    }
    turns = _TURNS
    for name, part in parts.items():
        turns = turns.replace(name, part)
    for mark in ("]_", "'_'"):
        turns = turns.replace(mark, mark.replace("_", gap))
    return head + turns


def _choose(tokenizer: Any) -> str:
    vocabulary = tokenizer.get_vocab()
    if "[INST]" not in vocabulary:
        return _V1
    return _compose(
        _version(tokenizer, vocabulary),
        space=any(token.startswith("▁") for token in vocabulary),
        tools="[AVAILABLE_TOOLS]" in vocabulary,
        thoughts="[THINK]" in vocabulary,
    )


def _version(tokenizer: Any, vocabulary: Mapping[str, int]) -> int:
    if "[ARGS]" not in vocabulary:
        return 7 if "[SYSTEM_PROMPT]" in vocabulary else 3
    # All tokenizers since v11 have both tokens; what the own template writes tells which of them is used.
    own = str(getattr(tokenizer, "chat_template", None) or "")
    if "[ARGS]" in own:
        return 11 if "[CALL_ID]" in own else 13
    return 13 if "[THINK]" in vocabulary or "[CALL_ID]" not in vocabulary else 11


TEMPLATES = (
    ChatTemplate(
        "mistral", _choose, source="https://docs.mistral.ai/cookbooks/concept-deep-dive-tokenization-chat_templates"
    ),
)
