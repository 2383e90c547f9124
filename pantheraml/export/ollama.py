"""Ollama's ``Modelfile``: the chat template in Ollama's form, stop texts and system message.

Ollama fills one Go template a turn, from a system message, a prompt and a response. The texts between these are read
off the tokenizer's chat template, by rendering conversations with it; and the result is used only when it renders other
conversations to the same text. Format: https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from .. import log
from ..errors import ConfigError

_FILE, _END = "{__FILE_LOCATION__}", "{__EOS_TOKEN__}"  # in a Modelfile that a tokenizer brings along
_QUOTES = '"""'
# Texts that no template writes; they are not blank at their ends, since templates may strip.
_S, _U1, _A1, _U2, _A2, _U3 = ("Xs0X", "Xu1X", "Xa1X", "Xu2X", "Xa2X", "Xu3X")


@dataclass(frozen=True, slots=True)
class TurnFormat:
    """The texts around the messages of a chat.

    Attributes:
        system_start: Before the system message, which stands first.
        system_end: Between the system message and the first prompt.
        prompt_start: Before a prompt, where no system message is before it.
        prompt_end: After a prompt.
        response_end: After a response.
        response_start: Before a response that is there.
        generation: Before a response that is to come.
        default_system: System message of chats that give none.
    """

    system_start: str
    system_end: str
    prompt_start: str
    prompt_end: str
    response_end: str
    response_start: str = ""
    generation: str = ""
    default_system: str = ""

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return a chat as the Go template renders it, ready for the next response."""
        system, text, pending = self.default_system, "", ""
        for message in messages:
            if message["role"] == "system":
                system = message["content"]
            elif message["role"] == "user":
                text += f"{self.system_start}{system}{self.system_end}" if system else self.prompt_start
                text += message["content"] + self.prompt_end
                system, pending = "", self.generation
            else:
                text += self.response_start + message["content"] + self.response_end
                pending = ""
        return text + pending

    def template(self) -> str:
        """Return the Go template."""
        start = ""
        if self.response_start or self.generation:
            # Ollama cuts the template off at the first field named Response, and leaves conditions out of that search.
            parts = _literal(self.response_start), _literal(self.generation)
            start = f"{{{{ if .Response }}}}{parts[0]}{{{{ else }}}}{parts[1]}{{{{ end }}}}"
        return (
            f"{{{{ if .System }}}}{_literal(self.system_start)}{{{{ .System }}}}{_literal(self.system_end)}"
            f"{{{{ else }}}}{_literal(self.prompt_start)}{{{{ end }}}}"
            f"{{{{ .Prompt }}}}{_literal(self.prompt_end)}{start}{{{{ .Response }}}}{_literal(self.response_end)}"
        )


def _literal(text: str) -> str:
    """Text in a Go template. Braces and quotes become string constants: they would end the template or its text."""

    def constant(match: re.Match[str]) -> str:
        codes = "".join(f"\\u{ord(character):04x}" for character in match.group())
        return f'{{{{ "{codes}" }}}}'

    return re.sub(r'[{}"\r]+', constant, text)


def _chats() -> list[list[dict[str, str]]]:
    def chat(*contents: str) -> list[dict[str, str]]:
        roles = {"s": "system", "u": "user", "a": "assistant"}
        return [{"role": roles[content[1]], "content": content} for content in contents]

    return [chat(_U1), chat(_U1, _A1, _U2, _A2, _U3), chat(_S, _U1), chat(_S, _U1, _A1, _U2)]


def turn_format(tokenizer: Any, *, adds_bos: bool) -> TurnFormat | None:
    """Read the turn format off a tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
        adds_bos: Whether the GGUF file makes the runtime put a bos in front; it is then no part of the format.

    Returns:
        The format; None when there is no template, or Ollama's form cannot state what it does.
    """
    if not isinstance(tokenizer.chat_template, (str, dict)) or not tokenizer.chat_template:
        return None
    bos = tokenizer.bos_token or ""

    def render(messages: list[dict[str, str]]) -> str | None:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError):
            return None
        return text.removeprefix(bos) if adds_bos and bos else text

    rendered = [render(messages) for messages in _chats()]
    if rendered[1] is None:
        return None
    found = _read_off(rendered[1], rendered[2], rendered[0])
    if found is None:
        return None
    for messages, text in zip(_chats(), rendered, strict=True):
        if text is not None and found.render(messages) != text:
            return None
    return found


def _read_off(turns: str, with_system: str | None, single: str | None) -> TurnFormat | None:
    cut = re.fullmatch(f"(.*){_U1}(.*){_A1}(.*){_U2}(.*){_A2}(.*){_U3}(.*)", turns, re.DOTALL)
    if cut is None or single is None:
        return None
    first, after, between, final = cut.group(1), cut.group(2), cut.group(3), cut.group(6)
    prompt_end = _shared_ending(after[::-1], final[::-1])[::-1]
    response_start, generation = after[len(prompt_end) :], final[len(prompt_end) :]
    system = re.fullmatch(f"(.*){_S}(.*){_U1}.*", with_system or "", re.DOTALL)
    start, end = (system.group(1), system.group(2)) if system else ("", "")
    default = ""
    opening = first
    if start and first.startswith(start) and first.endswith(end) and len(first) > len(start) + len(end):
        default = first[len(start) : len(first) - len(end)]
        # The later prompts have no system message before them; where one ends and the next starts, the text that
        # follows a system message shows.
        opening = _shared_ending(between, end)
    if not between.endswith(opening):
        return None
    response_end = between[: len(between) - len(opening)]
    if not system:
        start, end = opening, "\n\n" if opening else ""
    return TurnFormat(start, end, opening, prompt_end, response_end, response_start, generation, default)


def _shared_ending(first: str, second: str) -> str:
    """The longest text that both end with."""
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return first[len(first) - length :] if length else ""


def _stops(tokenizer: Any, turns: TurnFormat | None) -> list[str]:
    """Texts that end a response: the eos, and what the template puts after a response."""
    candidates = [tokenizer.eos_token or "", turns.response_end.strip() if turns is not None else ""]
    return [stop for stop in dict.fromkeys(candidates) if stop and not re.search(r'[\r\n"\\]', stop)]


def modelfile(turns: TurnFormat, file_name: str, *, stops: list[str], system: str = "") -> str | None:
    """Return the text of a Modelfile.

    Args:
        turns: The chat format.
        file_name: The GGUF file, in the same folder.
        stops: Texts that end a response.
        system: System message; it takes the place of the template's default one.

    Returns:
        The text; None when Ollama's parser would read it as something else.
    """
    system = system or turns.default_system
    template = turns.template()
    lines = [f"FROM ./{file_name}", f"TEMPLATE {_QUOTES}{template}{_QUOTES}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    if system:
        lines.append(f"SYSTEM {_QUOTES}{system}{_QUOTES}")
    text = "\n".join(lines) + "\n"
    due = [("from", f"./{file_name}"), ("template", template), *(("stop", stop) for stop in stops)]
    due += [("system", system)] if system else []
    try:
        return text if parse_modelfile(text) == due else None
    except ConfigError:
        return None


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile as Ollama does.

    Args:
        text: What the file holds.

    Returns:
        Commands (in lower case; the name of the parameter in place of ``parameter``) with their values.

    Raises:
        ConfigError: a value has no end.
    """
    commands: list[tuple[str, str]] = []
    lines = iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        command, _, value = line.strip().partition(" ")
        command = command.lower()
        if command == "parameter":
            command, _, value = value.strip().partition(" ")
        if command == "message":
            role, _, value = value.strip().partition(" ")
            command = f"message {role}"
        value = value.lstrip()
        while (content := _unquoted(value.strip())) is None:
            following = next(lines, None)
            if following is None:
                raise ConfigError(f"the value of {command} has no end", where="Modelfile")
            value += "\n" + following
        commands.append((command, content))
    return commands


def _unquoted(value: str) -> str | None:
    """The value without its quotes; None while the closing ones are missing."""
    for quotes in (_QUOTES, '"'):
        if value.startswith(quotes):
            closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value


def write_modelfile(folder: Path, file_name: str, tokenizer: Any, *, adds_bos: bool) -> Path | None:
    """Write ``Modelfile`` beside a GGUF file.

    A tokenizer that brings its own (``_ollama_modelfile``, as chat template helpers leave it) gets that one.

    Args:
        folder: The folder.
        file_name: Name of the GGUF file in it.
        tokenizer: The tokenizer.
        adds_bos: Whether the file makes the runtime put a bos in front.

    Returns:
        The file; None, with a notice, when Ollama cannot state the chat format.
    """
    own = getattr(tokenizer, "_ollama_modelfile", None)
    text: str | None
    if isinstance(own, str) and own:
        text = own.replace(_FILE, f"./{file_name}").replace(_END, tokenizer.eos_token or "")
    else:
        turns = turn_format(tokenizer, adds_bos=adds_bos)
        system = getattr(tokenizer, "_system_message", None)
        text = None
        if turns is not None:
            text = modelfile(turns, file_name, stops=_stops(tokenizer, turns), system=system or "")
    if text is None:
        why = "it does more than put texts around messages" if tokenizer.chat_template else "there is none"
        log.info(f"no Modelfile for Ollama: its form cannot state this chat template ({why}); {json.dumps(file_name)}")
        return None
    path = folder / "Modelfile"
    path.write_text(text, encoding="utf-8")
    return path
