"""Pieces of Jinja that several templates share.

Every line of a template starts with ``{%-`` or ``{{-``, so that the text does not depend on an engine's settings for
white space. The string literals ``'role'``, ``'content'``, ``'user'`` and ``'assistant'`` name keys and roles of the
data and nothing else: a mapping to other names replaces exactly these. ``'{system_message}'`` is the default system
message.
"""

from __future__ import annotations

from collections.abc import Mapping


def text_macro(media: Mapping[str, str] | None = None) -> str:
    """A macro ``text(content)`` that gives the text of a string or of a list of parts.

    Args:
        media: Text that stands for a part of another type, such as ``{"image": "<image>"}``. Other types raise.
    """
    branches = "".join(
        f"\n{{%- elif part['type'] == '{kind}' %}}\n{{{{- '{marker}' }}}}" for kind, marker in (media or {}).items()
    )
    return (
        r"""
{%- macro text(content) %}
{%- if content is string %}
{{- content }}
{%- elif content %}
{%- for part in content %}
{%- if part is string %}
{{- part }}
{%- elif part['type'] == 'text' %}
{{- part['text'] }}"""
        + branches
        + r"""
{%- else %}
{{- raise_exception('this chat template has no place for a part of type ' + part['type'] | string) }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- endmacro %}"""
    )


TEXT = text_macro()

# The system message apart from the rest: `system` and `chat`.
SPLIT_SYSTEM = r"""
{%- if messages[0]['role'] == 'system' %}
{%- set system = text(messages[0]['content']) %}
{%- set chat = messages[1:] %}
{%- else %}
{%- set system = '{system_message}' %}
{%- set chat = messages %}
{%- endif %}"""

# For formats that write the system message inside a user turn.
NEEDS_USER_FIRST = r"""
{%- if system and (not chat or chat[0]['role'] != 'user') %}
{{- raise_exception('this chat template writes the system message into a user turn, which must come next') }}
{%- endif %}"""

NO_SUCH_ROLE = r"""
{%- else %}
{{- raise_exception('this chat template has no role ' + message['role'] | string) }}"""

# Leaving them out without a word would teach a model answers to questions that it did not see.
NO_TOOLS = r"""
{%- for message in messages %}
{%- if tools or message['tool_calls'] %}
{{- raise_exception('this chat template does not write tools') }}
{%- endif %}
{%- endfor %}"""


def simple_turns(
    user: str, assistant: str, *, user_end: str, end: str, after: str = "", system: str | None = None, lead: str = ""
) -> str:
    r"""The loop over ``chat`` of a format whose turns are a label, the text and an end.

    Args:
        user: Label before a user's text.
        assistant: Label before an assistant's text; also the generation prompt.
        user_end: What follows a user's text.
        end: Jinja expression of the end of an assistant's turn, such as ``eos_token``.
        after: What follows the end and is not trained on.
        system: Label before a system text within the chat; None refuses the role. Ends like a user's turn.
        lead: White space between the assistant's label and text, left out of the generation prompt.
    """
    system_turn = ""
    if system is not None:
        system_turn = f"""
{{%- elif message['role'] == 'system' %}}
{{{{- '{system}' + text(message['content']) + '{user_end}' }}}}"""
    return (
        f"""
{{%- for message in chat %}}
{{%- if message['role'] == 'user' %}}
{{{{- '{user}' + text(message['content']) + '{user_end}' }}}}
{{%- elif message['role'] == 'assistant' %}}
{{{{- '{assistant}' }}}}
{{%- generation %}}
{{{{- '{lead}' + text(message['content']) + {end} }}}}
{{%- endgeneration %}}
{{{{- '{after}' }}}}"""
        + system_turn
        + NO_SUCH_ROLE
        + f"""
{{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
{{{{- '{assistant}' }}}}
{{%- endif %}}"""
    )
