"""ChatML and the formats that extend it: Qwen, LFM, Yi, and Gemma with ChatML's names."""

from __future__ import annotations

from .parts import NO_TOOLS, SPLIT_SYSTEM, TEXT
from .registry import ChatTemplate

_PROMPT = r"""
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""

_TURNS = r"""
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- generation %}
{{- text(message['content']) + '<|im_end|>' }}
{%- endgeneration %}
{{- '\n' }}
{%- elif message['role'] == 'user' %}
{{- '<|im_start|>user\n' + text(message['content']) + '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\n' + text(message['content']) + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}"""

_CHATML = TEXT + NO_TOOLS + _TURNS + _PROMPT
_BOS_CHATML = TEXT + NO_TOOLS + "\n{{- bos_token }}" + _TURNS + _PROMPT

_QWEN_SYSTEM = r"""
{%- if tools %}
{{- '<|im_start|>system\n' + (system + '\n\n' if system else '') }}
{{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
{%- for tool in tools %}
{{- '\n' + tool | tojson }}
{%- endfor %}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif system %}
{{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}"""

# Answers to tool calls that follow one another share a user turn.
_QWEN_TURNS = r"""
{%- for message in chat %}
{%- if message['role'] == 'assistant' %}THOUGHTS
{{- '<|im_start|>assistant\n' }}
{%- generation %}
{{- answer }}
{%- for call in message['tool_calls'] or [] %}
{%- set function = call['function'] if call['function'] else call %}
{{- ('\n' if answer or not loop.first else '') + '<tool_call>\n{"name": "' + function['name'] + '", "arguments": ' }}
{{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\n' }}
{%- elif message['role'] == 'user' %}
{{- '<|im_start|>user\n' + text(message['content']) + '<|im_end|>\n' }}
{%- elif message['role'] == 'tool' %}
{{- '<|im_start|>user' if loop.first or chat[loop.index0 - 1]['role'] != 'tool' else '' }}
{{- '\n<tool_response>\n' + text(message['content']) + '\n</tool_response>' }}
{{- '<|im_end|>\n' if loop.last or chat[loop.index0 + 1]['role'] != 'tool' else '' }}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\n' + text(message['content']) + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}"""

_NO_THOUGHTS = r"""
{%- set answer = text(message['content']) %}"""

# Thoughts are kept after the last question only, where the last message always has a place for them.
_LAST_QUESTION = r"""
{%- set last = namespace(question=chat | length - 1) %}
{%- for message in chat | reverse %}
{%- set content = text(message['content']) %}
{%- if last.question == chat | length - 1 and message['role'] == 'user'
    and not (content.startswith('<tool_response>') and content.endswith('</tool_response>')) %}
{%- set last.question = chat | length - 1 - loop.index0 %}
{%- endif %}
{%- endfor %}"""
_THOUGHTS = r"""
{%- set answer = text(message['content']) %}
{%- set thought = message['reasoning_content'] or '' %}
{%- if not thought and '</think>' in answer %}
{%- set thought = answer.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set answer = answer.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.index0 > last.question and (loop.last or thought) %}
{%- set answer = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + answer.lstrip('\n') %}
{%- endif %}"""

_QWEN_PLAIN = TEXT + SPLIT_SYSTEM + _QWEN_SYSTEM + _QWEN_TURNS.replace("THOUGHTS", _NO_THOUGHTS) + _PROMPT
_QWEN_THOUGHTS = TEXT + SPLIT_SYSTEM + _QWEN_SYSTEM + _LAST_QUESTION + _QWEN_TURNS.replace("THOUGHTS", _THOUGHTS)
_QWEN_3_PROMPT = r"""
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}"""
_THINKING_PROMPT = r"""
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}"""

_LFM_SYSTEM = r"""
{{- bos_token }}
{%- if tools %}
{%- set list = namespace(text='') %}
{%- for tool in tools %}
{%- set list.text = list.text + (tool if tool is string else tool | tojson) + (', ' if not loop.last else '') %}
{%- endfor %}
{%- set system = system + ('\n' if system else '') + 'List of tools: LIST_START[' + list.text + ']LIST_END' %}
{%- endif %}
{%- if system %}
{{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}"""

# Calls are written as a list of Python calls.
_LFM_TURNS = r"""
{%- for message in chat %}
{%- if message['role'] == 'assistant' %}
{%- set answer = text(message['content']) %}PAST_THOUGHTS
{{- '<|im_start|>assistant\n' }}
{%- generation %}
{%- if message['tool_calls'] %}
{{- '<|tool_call_start|>[' }}
{%- for call in message['tool_calls'] %}
{%- set function = call['function'] if call['function'] else call %}
{%- if function['arguments'] is string %}
{{- raise_exception('this chat template needs the arguments of a tool call as an object, not as JSON text') }}
{%- endif %}
{{- function['name'] + '(' }}
{%- for name, value in function['arguments'].items() %}
{{- name + '=' + (value | tojson if value is string else value | string) + (', ' if not loop.last else '') }}
{%- endfor %}
{{- ')' + (', ' if not loop.last else '') }}
{%- endfor %}
{{- ']<|tool_call_end|>' }}
{%- endif %}
{{- answer + '<|im_end|>' }}
{%- endgeneration %}
{{- '\n' }}
{%- elif message['role'] == 'user' %}
{{- '<|im_start|>user\n' + text(message['content']) + '<|im_end|>\n' }}
{%- elif message['role'] == 'tool' %}
{{- '<|im_start|>tool\nRESULT_START' + text(message['content']) + 'RESULT_END<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\n' + text(message['content']) + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}"""
_PAST_THOUGHTS = r"""
{%- if not loop.last and not keep_past_thinking and '</think>' in answer %}
{%- set answer = answer.split('</think>')[-1] | trim %}
{%- endif %}"""


def _lfm(*, tags: bool) -> str:
    marks = {
        "LIST_START": "<|tool_list_start|>",
        "LIST_END": "<|tool_list_end|>",
        "RESULT_START": "<|tool_response_start|>",
        "RESULT_END": "<|tool_response_end|>",
    }
    text = TEXT + SPLIT_SYSTEM + _LFM_SYSTEM + _LFM_TURNS.replace("PAST_THOUGHTS", "" if tags else _PAST_THOUGHTS)
    for name, token in marks.items():
        text = text.replace(name, token if tags else "")
    return text + _PROMPT


_END = "<|im_end|>"
_START = ("<|im_start|>",)
_SOURCE = "https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md"
_QWEN = "https://qwen.readthedocs.io/en/latest/getting_started/concepts.html"
_GEMMA_NAMES = {"<start_of_turn>": "<|im_start|>", "<end_of_turn>": "<|im_end|>"}


def _gemma(name: str) -> ChatTemplate:
    return ChatTemplate(
        name, _BOS_CHATML, turn_end=_END, becomes_eos=True, tokens=_START, renames=_GEMMA_NAMES, source=_SOURCE
    )


TEMPLATES = (
    ChatTemplate("chatml", _CHATML, turn_end=_END, becomes_eos=True, tokens=_START, source=_SOURCE),
    _gemma("gemma_chatml"),
    _gemma("gemma2_chatml"),
    ChatTemplate(
        "qwen-2.5",
        _QWEN_PLAIN,
        aliases=("qwen-25", "qwen25", "qwen2.5"),
        turn_end=_END,
        system_message="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        tokens=_START,
        source=_QWEN,
    ),
    ChatTemplate(
        "qwen-3",
        _QWEN_THOUGHTS + _QWEN_3_PROMPT,
        aliases=("qwen3",),
        turn_end=_END,
        tokens=_START,
        source="https://huggingface.co/Qwen/Qwen3-8B",
    ),
    ChatTemplate(
        "qwen3-instruct",
        _QWEN_PLAIN,
        turn_end=_END,
        tokens=_START,
        source="https://huggingface.co/Qwen/Qwen3-4B-Instruct-2507",
    ),
    ChatTemplate(
        "qwen3-thinking",
        _QWEN_THOUGHTS + _THINKING_PROMPT,
        turn_end=_END,
        tokens=_START,
        source="https://huggingface.co/Qwen/Qwen3-4B-Thinking-2507",
    ),
    ChatTemplate(
        "lfm-2", _lfm(tags=True), turn_end=_END, tokens=_START, source="https://huggingface.co/LiquidAI/LFM2-1.2B"
    ),
    ChatTemplate(
        "lfm-2.5",
        _lfm(tags=False),
        turn_end=_END,
        tokens=_START,
        source="https://docs.liquid.ai/lfm/key-concepts/chat-template",
    ),
    ChatTemplate("yi-chat", _CHATML, turn_end=_END, tokens=_START, source="https://huggingface.co/01-ai/Yi-6B-Chat"),
)
