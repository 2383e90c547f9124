"""Formats that need no control tokens beyond BOS and EOS, and those with one end token."""

from __future__ import annotations

from .parts import NEEDS_USER_FIRST, NO_SUCH_ROLE, NO_TOOLS, SPLIT_SYSTEM, TEXT, simple_turns
from .registry import ChatTemplate

_HEAD = TEXT + NO_TOOLS + SPLIT_SYSTEM + "\n{{- bos_token }}"


def _with_system(separator: str) -> str:
    return f"\n{{%- if system %}}\n{{{{- system + '{separator}' }}}}\n{{%- endif %}}"


_ALL = TEXT + NO_TOOLS + "\n{%- set chat = messages %}"

_ZEPHYR = _ALL + simple_turns(
    r"<|user|>\n",
    r"<|assistant|>\n",
    user_end="' + eos_token + '\\n",
    end="eos_token",
    after=r"\n",
    system=r"<|system|>\n",
)

_LLAMA_2 = (
    TEXT
    + NO_TOOLS
    + SPLIT_SYSTEM
    + NEEDS_USER_FIRST
    + r"""
{%- for message in chat %}
{%- if message['role'] == 'user' %}
{{- bos_token }}
{{- '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') }}
{{- text(message['content']) | trim + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{%- generation %}
{{- ' ' + text(message['content']) | trim + ' ' + eos_token }}
{%- endgeneration %}"""
    + NO_SUCH_ROLE
    + r"""
{%- endif %}
{%- endfor %}"""
)

TEMPLATES = (
    ChatTemplate(
        "unsloth",
        _HEAD
        + _with_system(r"\n")
        + simple_turns(">>> User: ", ">>> Assistant: ", user_end=r"\n", end="eos_token", after=r"\n"),
        system_message="You are a helpful assistant to the user",
        source="https://github.com/unslothai/unsloth",
    ),
    ChatTemplate("zephyr", _ZEPHYR, source="https://huggingface.co/HuggingFaceH4/zephyr-7b-beta"),
    ChatTemplate("llama", _LLAMA_2, source="https://huggingface.co/blog/llama2#how-to-prompt-llama-2"),
    ChatTemplate(
        "vicuna",
        _HEAD + _with_system(" ") + simple_turns("USER: ", "ASSISTANT:", user_end=" ", end="eos_token", lead=" "),
        system_message=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions."
        ),
        source="https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md",
    ),
    ChatTemplate(
        "vicuna_old",
        _HEAD
        + _with_system(r"\n")
        + simple_turns("### Human: ", "### Assistant:", user_end=r"\n", end="eos_token", after=r"\n", lead=" "),
        aliases=("vicuna old",),
        system_message=(
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions."
        ),
        source="https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md",
    ),
    ChatTemplate(
        "alpaca",
        _HEAD
        + _with_system(r"\n\n")
        + simple_turns(r"### Instruction:\n", r"### Response:\n", user_end=r"\n\n", end="eos_token", after=r"\n\n"),
        system_message=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        ),
        source="https://github.com/tatsu-lab/stanford_alpaca#data-release",
    ),
    ChatTemplate(
        "starling",
        _ALL
        + "\n{{- bos_token }}"
        + simple_turns(
            "GPT4 Correct User: ",
            "GPT4 Correct Assistant:",
            user_end="<|end_of_turn|>",
            end="'<|end_of_turn|>'",
            system="GPT4 Correct System: ",
            lead=" ",
        ),
        turn_end="<|end_of_turn|>",
        source="https://huggingface.co/berkeley-nest/Starling-LM-7B-alpha",
    ),
)
