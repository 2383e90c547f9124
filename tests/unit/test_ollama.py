"""Modelfiles: chat templates that Ollama can state, and texts that must not break out of the file."""

from __future__ import annotations

import re

import pytest
from conftest import build_tokenizer

from pantheraml.errors import ConfigError
from pantheraml.export import ollama
from pantheraml.export.ollama import TurnFormat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN25 = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NUMBERED = "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}"
KNOWN = {
    "chatml": CHATML,
    "qwen2.5": QWEN25,
    "llama-3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "thinking": THINKING,
}


def with_template(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def go_render(template: str, messages: list[dict[str, str]], default_system: str) -> str:
    """The part of Go's templates that is used, one turn after the other, as Ollama renders a chat."""

    def turn(system: str, prompt: str, response: str | None) -> str:
        text = template
        if response is None:
            text = text[: text.index("{{ .Response }}")]
        branch = re.compile(r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", re.DOTALL)
        text = branch.sub(lambda m: m.group(1 if system else 2), text)
        choice = re.compile(r"\{\{ if \.Response \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", re.DOTALL)
        text = choice.sub(lambda m: m.group(1 if response else 2), text)
        values = {".System": system, ".Prompt": prompt, ".Response": response or ""}

        def action(match: re.Match[str]) -> str:
            inside = match.group(1)
            return inside[1:-1].encode().decode("unicode_escape") if inside[0] == '"' else values[inside]

        return re.sub(r"\{\{ (.*?) \}\}", action, text)

    system, prompt, text = default_system, "", ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"]
        elif message["role"] == "user":
            prompt = message["content"]
        else:
            text += turn(system, prompt, message["content"])
            system, prompt = "", ""
    return text + turn(system, prompt, None)


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates_render_the_same_in_ollama(name, tmp_path):
    tokenizer = with_template(KNOWN[name])
    path = ollama.write_modelfile(tmp_path, "model.Q8_0.gguf", tokenizer, adds_bos=True)
    assert path is not None
    commands = ollama.parse_modelfile(path.read_text())
    values = dict(commands)
    assert commands[0] == ("from", "./model.Q8_0.gguf")
    assert ("stop", "</s>") in commands
    assert values.get("system", "") == ("You are Qwen." if name == "qwen2.5" else "")
    chat = [("user", "What is {{ this }}?"), ("assistant", 'A "quote".'), ("user", "And\nthat?")]
    messages = [{"role": role, "content": content} for role, content in chat]
    for given in (messages, messages[:1], [{"role": "system", "content": "Be brief."}, *messages]):
        if name == "mistral" and given[0]["role"] == "system":
            continue
        expected = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        rendered = go_render(values["template"], given, values.get("system", ""))
        assert rendered == expected.removeprefix("<s>")


@pytest.mark.parametrize("name", ["chatml", "llama-3"])
def test_turn_end_is_a_stop(name, tmp_path):
    path = ollama.write_modelfile(tmp_path, "m.gguf", with_template(KNOWN[name]), adds_bos=True)
    stops = [value for command, value in ollama.parse_modelfile(path.read_text()) if command == "stop"]
    assert stops == ["</s>", {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}[name]]


@pytest.mark.parametrize("template", [NUMBERED, None, "{{ raise_exception('no') }}", "{{ messages[9].content }}"])
def test_other_templates_give_a_notice_and_no_file(template, tmp_path, capsys):
    assert ollama.write_modelfile(tmp_path, "m.gguf", with_template(template), adds_bos=True) is None
    assert "no Modelfile" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bos_stays_in_the_template_unless_the_runtime_adds_it():
    # A template that begins with a bos, on every turn: Ollama would repeat it, so there is no Modelfile.
    assert ollama.turn_format(with_template(LLAMA3), adds_bos=True) is not None
    assert ollama.turn_format(with_template(LLAMA3), adds_bos=False) is None


HOSTILE = ['a"""b', '"""', 'ends with "', "{{ .System }}", "}}{{", "{", 'x"""\nSYSTEM """evil', "\r\nFROM /etc\n"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_markers_stay_in_the_template(text):
    turns = TurnFormat(f"<s {text}>", f"</s {text}>", f"<u {text}>", text, text, f"<r {text}>", f"<g {text}>")
    written = ollama.modelfile(turns, "m.gguf", stops=[])
    assert written is not None
    commands = ollama.parse_modelfile(written)
    assert [command for command, _ in commands] == ["from", "template"]
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    assert go_render(commands[1][1], messages, "") == turns.render(messages)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_system_message_reads_back_or_gives_no_file(text):
    turns = TurnFormat("<s>", "</s>", "<u>", "<a>", "<e>")
    written = ollama.modelfile(turns, "m.gguf", stops=["<e>"], system=text)
    if written is None:
        assert '"' in text or "\r" in text
    else:
        commands = ollama.parse_modelfile(written)
        assert [command for command, _ in commands] == ["from", "template", "stop", "system"]
        assert commands[-1] == ("system", text)


def test_a_modelfile_of_the_tokenizer_wins(tmp_path):
    tokenizer = with_template(CHATML)
    tokenizer._ollama_modelfile = 'FROM {__FILE_LOCATION__}\nTEMPLATE """{{ .Prompt }}{__EOS_TOKEN__}"""\n'
    path = ollama.write_modelfile(tmp_path, "m.gguf", tokenizer, adds_bos=True)
    assert ollama.parse_modelfile(path.read_text()) == [("from", "./m.gguf"), ("template", "{{ .Prompt }}</s>")]


def test_unterminated_value_is_an_error():
    with pytest.raises(ConfigError, match="no end"):
        ollama.parse_modelfile('FROM x\nSYSTEM """never\nends\n')
