"""The harmony format of gpt-oss: channels, a developer message, and functions described in TypeScript."""

from __future__ import annotations

from .parts import NO_SUCH_ROLE, TEXT
from .registry import ChatTemplate

_TYPES = r"""
{%- macro type_of(schema) %}
{%- if schema['enum'] %}
{%- for value in schema['enum'] %}
{{- value | tojson + (' | ' if not loop.last else '') }}
{%- endfor %}
{%- elif schema['type'] == 'array' %}
{{- (type_of(schema['items']) if schema['items'] else 'any') + '[]' }}
{%- elif schema['type'] in ['number', 'integer'] %}
{{- 'number' }}
{%- elif schema['type'] in ['string', 'boolean', 'null'] %}
{{- schema['type'] }}
{%- elif schema['type'] == 'object' and schema['properties'] %}
{{- '{\n' + fields(schema) + '}' }}
{%- elif schema['type'] == 'object' %}
{{- 'object' }}
{%- else %}
{{- 'any' }}
{%- endif %}
{%- endmacro %}
{%- macro fields(schema) %}
{%- for name, field in schema['properties'].items() %}
{{- '// ' + field['description'] + '\n' if field['description'] else '' }}
{{- name + ('' if name in (schema['required'] or []) else '?') + ': ' + type_of(field) + ',' }}
{%- if field['default'] is defined %}
{{- ' // default: ' + (field['default'] if field['default'] is string else field['default'] | tojson) }}
{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- endmacro %}
{%- macro functions(tools) %}
{{- '# Tools\n\n## functions\n\nnamespace functions {\n\n' }}
{%- for tool in tools %}
{%- set tool = tool['function'] if tool['function'] else tool %}
{{- '// ' + tool['description'] + '\n' if tool['description'] else '' }}
{%- if tool['parameters'] and tool['parameters']['properties'] %}
{{- 'type ' + tool['name'] + ' = (_: {\n' + fields(tool['parameters']) + '}) => any;\n\n' }}
{%- else %}
{{- 'type ' + tool['name'] + ' = () => any;\n\n' }}
{%- endif %}
{%- endfor %}
{{- '} // namespace functions' }}
{%- endmacro %}"""

_SYSTEM = r"""
{{- '<|start|>system<|message|>' }}
{{- model_identity if model_identity else 'You are ChatGPT, a large language model trained by OpenAI.' }}
{{- '\nKnowledge cutoff: 2024-06\nCurrent date: ' }}
{{- date_string if date_string else strftime_now('%Y-%m-%d') }}
{{- '\n\nReasoning: ' + (reasoning_effort if reasoning_effort else 'medium') }}
{{- '\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.' }}
{{- "\nCalls to these tools must go to the commentary channel: 'functions'." if tools else '' }}
{{- '<|end|>' }}
{%- if messages[0]['role'] in ['system', 'developer'] %}
{%- set instructions = text(messages[0]['content']) %}
{%- set chat = messages[1:] %}
{%- else %}
{%- set instructions = '' %}
{%- set chat = messages %}
{%- endif %}
{%- if instructions or tools %}
{{- '<|start|>developer<|message|>' + ('# Instructions\n\n' + instructions if instructions else '') }}
{{- ('\n\n' if instructions and tools else '') + (functions(tools) if tools else '') + '<|end|>' }}
{%- endif %}"""

# Thoughts are kept after the last question only. The last message ends what the model writes, earlier ones a message.
_TURNS = (
    r"""
{%- set last = namespace(question=-1, call='') %}
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{%- set last.question = loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{{- '<|start|>user<|message|>' + text(message['content']) + '<|end|>' }}
{%- elif message['role'] == 'assistant' %}
{%- set thought = (message['reasoning_content'] or message['thinking']) if loop.index0 > last.question else '' %}
{%- set calls = message['tool_calls'] or [] %}
{%- if calls | length > 1 %}
{{- raise_exception('this chat template writes one tool call in a message') }}
{%- endif %}
{%- set call = (calls[0]['function'] if calls[0]['function'] else calls[0]) if calls else none %}
{%- set last.call = call['name'] if call else '' %}
{%- set answer = text(message['content']) %}
{{- '<|start|>assistant' }}
{%- generation %}
{{- '<|channel|>analysis<|message|>' + thought + '<|end|><|start|>assistant' if thought else '' }}
{%- if call %}
{{- '<|channel|>commentary<|message|>' + answer + '<|end|><|start|>assistant' if answer else '' }}
{{- '<|channel|>commentary to=functions.' + call['name'] + ' <|constrain|>json<|message|>' }}
{{- (call['arguments'] if call['arguments'] is string else call['arguments'] | tojson) + '<|call|>' }}
{%- else %}
{{- '<|channel|>final<|message|>' + answer }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- endif %}
{%- endgeneration %}
{%- elif message['role'] == 'tool' %}
{{- '<|start|>functions.' + (message['name'] or last.call) + ' to=assistant<|channel|>commentary<|message|>' }}
{{- text(message['content']) + '<|end|>' }}"""
    + NO_SUCH_ROLE
    + r"""
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start|>assistant' }}
{%- endif %}"""
)

TEMPLATES = (
    ChatTemplate(
        "gpt-oss",
        TEXT + _TYPES + _SYSTEM + _TURNS,
        aliases=("gptoss",),
        turn_end="<|return|>",
        stops=("<|call|>",),
        tokens=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|call|>"),
        source="https://cookbook.openai.com/articles/openai-harmony",
    ),
)
