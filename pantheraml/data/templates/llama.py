"""Llama 3 and 3.1. (Llama 2 is among the plain formats: it has no tokens of its own.)"""

from __future__ import annotations

from .parts import NO_TOOLS, TEXT
from .registry import ChatTemplate

_TOKENS = ("<|start_header_id|>", "<|end_header_id|>")

_PROMPT = r"""
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

_LLAMA_3 = (
    TEXT
    + NO_TOOLS
    + r"""
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- generation %}
{{- text(message['content']) | trim + '<|eot_id|>' }}
{%- endgeneration %}
{%- elif message['role'] == 'user' %}
{{- '<|start_header_id|>user<|end_header_id|>\n\n' + text(message['content']) | trim + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- text(message['content']) | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}"""
    + _PROMPT
)

_LLAMA_3_1 = (
    TEXT
    + r"""
{%- macro describe(tools) %}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{{- 'Do not use variables.\n\n' }}
{%- for tool in tools %}
{{- tool | tojson(indent=4) + '\n\n' }}
{%- endfor %}
{%- endmacro %}
{%- if messages[0]['role'] == 'system' %}
{%- set system = text(messages[0]['content']) | trim %}
{%- set chat = messages[1:] %}
{%- else %}
{%- set system = '{system_message}' %}
{%- set chat = messages %}
{%- endif %}
{%- set with_user = tools_in_user_message if tools_in_user_message is defined else true %}
{{- bos_token }}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}
{{- 'Environment: ipython\n' }}
{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + (date_string if date_string is defined else '26 Jul 2024') + '\n\n' }}
{%- if tools and not with_user %}
{{- 'You have access to the following functions. To call a function, please respond with JSON for a function call.' }}
{{- describe(tools) }}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- if tools and with_user and (not chat or chat[0]['role'] != 'user') %}
{{- raise_exception('the tools are written into the first user message, and there is none') }}
{%- endif %}
{%- for message in chat %}
{%- if message['role'] == 'assistant' %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- generation %}
{%- if message['tool_calls'] %}
{%- if message['tool_calls'] | length != 1 %}
{{- raise_exception('this chat template writes one tool call in a message') }}
{%- endif %}
{%- set call = message['tool_calls'][0] %}
{%- set call = call['function'] if call['function'] else call %}
{{- '{"name": "' + call['name'] + '", "parameters": ' }}
{{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}
{{- '}<|eot_id|>' }}
{%- else %}
{{- text(message['content']) | trim + '<|eot_id|>' }}
{%- endif %}
{%- endgeneration %}
{%- elif message['role'] in ['tool', 'ipython'] %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message['content'] | tojson + '<|eot_id|>' }}
{%- elif message['role'] == 'user' %}
{{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
{%- if loop.first and tools and with_user %}
{{- 'Given the following functions, please respond with a JSON for a function call ' }}
{{- 'with its proper arguments that best answers the given prompt.\n\n' + describe(tools) }}
{%- endif %}
{{- text(message['content']) | trim + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- text(message['content']) | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}"""
    + _PROMPT
)

_SOURCE = "https://www.llama.com/docs/model-cards-and-prompt-formats/"

TEMPLATES = (
    ChatTemplate(
        "llama-3",
        _LLAMA_3,
        aliases=("llama3",),
        turn_end="<|eot_id|>",
        tokens=_TOKENS,
        source=_SOURCE + "meta-llama-3",
    ),
    ChatTemplate(
        "llama-3.1",
        _LLAMA_3_1,
        aliases=("llama-31",),
        turn_end="<|eot_id|>",
        stops=("<|eom_id|>",),
        system_message="",
        tokens=_TOKENS,
        source=_SOURCE + "llama3_1",
    ),
)
