"""Changes to a template's source that go by its Jinja tokens, so that only what is meant is replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jinja2

from ...errors import ConfigError

SYSTEM_PLACEHOLDER = "{system_message}"
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def literal(text: str) -> str:
    """Return the Jinja expression of a text."""
    return f"'{_escaped(text)}'"


def _escaped(text: str) -> str:
    for plain, code in (("\\", r"\\"), ("'", r"\'"), ('"', r"\""), ("\n", r"\n"), ("\r", r"\r"), ("\t", r"\t")):
        text = text.replace(plain, code)
    return text


def check_syntax(source: str) -> None:
    """Raise a ``ConfigError`` with the line when ``source`` is no Jinja template.

    The marks around generated text are an extension of transformers and are left out here.
    """
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))  # noqa: S701
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            "the chat template is not valid Jinja",
            where=f"argument chat_template, line {error.lineno}",
            why=str(error.message),
        ) from error


def rewrite(source: str, names: Mapping[str, str], system_message: str | None) -> str:
    """Replace the names of keys and roles, and fill in the default system message.

    Args:
        source: A valid template.
        names: Old to new content of string literals that are exactly the old name.
        system_message: Text for ``{system_message}``, inside a string literal or in plain text; None leaves it.
    """
    changed = {old: new for old, new in names.items() if old != new}
    if not changed and system_message is None:
        return source
    written = []
    environment = jinja2.Environment(keep_trailing_newline=True)  # noqa: S701 - only splits into tokens
    for _, kind, value in environment.lex(source):
        if kind == "string":
            value = literal(changed[value[1:-1]]) if value[1:-1] in changed else value
            if system_message is not None:
                value = value.replace(SYSTEM_PLACEHOLDER, _escaped(system_message))
        elif kind == "data" and system_message is not None:
            value = value.replace(SYSTEM_PLACEHOLDER, "{{ " + literal(system_message) + " }}")
        written.append(value)
    return "".join(written)
