"""Chat templates: the text of every format, the tokens around it, and what a tokenizer keeps."""

from __future__ import annotations

import copy
import inspect
import json
import re
from pathlib import Path

import jinja2
import pytest
from conftest import build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer

from pantheraml.chat_templates import assistant_masks, get_chat_template, mask_non_responses, stop_token_ids
from pantheraml.data.templates.registry import templates
from pantheraml.data.templates.rewrite import literal, rewrite
from pantheraml.errors import ArgumentError, ConfigError, UnsupportedError

NAMES = sorted({template.name for template in templates().values()})
BASE = build_tokenizer()
SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CHAT = [system("Be brief."), user("Hi"), assistant("Hello."), user("Bye"), assistant("Ciao.")]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
]
TOOL_JSON = (
    '{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", '
    '"properties": {"a": {"type": "integer"}}, "required": ["a"]}}}'
)
CALL = assistant(
    "", tool_calls=[{"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
)


def result(text):
    return {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": text}


def tokenizer_with(*tokens):
    tokenizer = copy.deepcopy(BASE)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def control_tokens(name):
    template = templates()[name]
    return [token for token in (*template.tokens, template.turn_end, *template.stops) if token]


def tokenizer_for(name, **options):
    return get_chat_template(tokenizer_with(*control_tokens(name)), name, **options)


def render(name, messages, *, options=None, tokens=None, **arguments):
    tokenizer = tokenizer_with(*tokens) if tokens is not None else tokenizer_with(*control_tokens(name))
    tokenizer = get_chat_template(tokenizer, name, **(options or {}))
    return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)


def chatml(*turns, bos=""):
    return bos + "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


CHATML = chatml(
    ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Ciao.")
)
THINKING = CHATML.replace("Ciao.", "<think>\n\n</think>\n\nCiao.")
GEMMA = (
    "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nCiao.<end_of_turn>\n"
)
GEMMA_4 = (
    "<|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello.<turn|>\n"
    "<|turn>user\nBye<turn|>\n<|turn>model\nCiao.<turn|>\n"
)
LLAMA_3_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nCiao.<|eot_id|>"
)
LLAMA_3_DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
HARMONY_SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-05\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. "
    "Channel must be included for every message.<|end|>"
)

# The whole of CHAT, then what the model answers from after CHAT's first user message without the system message.
EXPECTED = {
    "unsloth": (
        "<s>Be brief.\n>>> User: Hi\n>>> Assistant: Hello.</s>\n>>> User: Bye\n>>> Assistant: Ciao.</s>\n",
        "<s>You are a helpful assistant to the user\n>>> User: Hi\n>>> Assistant: ",
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye</s>\n"
        "<|assistant|>\nCiao.</s>\n",
        "<|user|>\nHi</s>\n<|assistant|>\n",
    ),
    "chatml": (CHATML, chatml(("user", "Hi")) + "<|im_start|>assistant\n"),
    "gemma_chatml": ("<s>" + CHATML, chatml(("user", "Hi"), bos="<s>") + "<|im_start|>assistant\n"),
    "gemma2_chatml": ("<s>" + CHATML, chatml(("user", "Hi"), bos="<s>") + "<|im_start|>assistant\n"),
    "yi-chat": (CHATML, chatml(("user", "Hi")) + "<|im_start|>assistant\n"),
    "lfm-2": ("<s>" + CHATML, chatml(("user", "Hi"), bos="<s>") + "<|im_start|>assistant\n"),
    "lfm-2.5": ("<s>" + CHATML, chatml(("user", "Hi"), bos="<s>") + "<|im_start|>assistant\n"),
    "qwen-2.5": (
        CHATML,
        chatml(("system", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), ("user", "Hi"))
        + "<|im_start|>assistant\n",
    ),
    "qwen-3": (THINKING, chatml(("user", "Hi")) + "<|im_start|>assistant\n"),
    "qwen3-instruct": (CHATML, chatml(("user", "Hi")) + "<|im_start|>assistant\n"),
    "qwen3-thinking": (THINKING, chatml(("user", "Hi")) + "<|im_start|>assistant\n<think>\n"),
    "mistral": (
        "<s>[INST] Be brief.\n\nHi [/INST] Hello.</s>[INST] Bye [/INST] Ciao.</s>",
        "<s>[INST] Hi [/INST]",
    ),
    "llama": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] Bye [/INST] Ciao. </s>",
        "<s>[INST] Hi [/INST]",
    ),
    "vicuna": (
        "<s>Be brief. USER: Hi ASSISTANT: Hello.</s>USER: Bye ASSISTANT: Ciao.</s>",
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, "
        "and polite answers to the user's questions. USER: Hi ASSISTANT:",
    ),
    "vicuna_old": (
        "<s>Be brief.\n### Human: Hi\n### Assistant: Hello.</s>\n### Human: Bye\n### Assistant: Ciao.</s>\n",
        "<s>A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, "
        "and polite answers to the human's questions.\n### Human: Hi\n### Assistant:",
    ),
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n### Instruction:\nBye\n\n"
        "### Response:\nCiao.</s>\n\n",
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n"
        "### Instruction:\nHi\n\n### Response:\n",
    ),
    "starling": (
        "<s>GPT4 Correct System: Be brief.<|end_of_turn|>GPT4 Correct User: Hi<|end_of_turn|>"
        "GPT4 Correct Assistant: Hello.<|end_of_turn|>GPT4 Correct User: Bye<|end_of_turn|>"
        "GPT4 Correct Assistant: Ciao.<|end_of_turn|>",
        "<s>GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant:",
    ),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma-3", "gemma-3n"),
        (GEMMA, "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"),
    ),
    "gemma-4": ("<s>" + GEMMA_4, "<s><|turn>user\nHi<turn|>\n<|turn>model\n"),
    "gemma-4-thinking": (
        "<s>" + GEMMA_4.replace("system\n", "system\n<|think|>\n"),
        "<s><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n",
    ),
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nBye<|end|>\n"
        "<|assistant|>\nCiao.<|end|>\n",
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
    ),
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Hello.<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Ciao.<|im_end|>",
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
    ),
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>" + LLAMA_3_TURNS,
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama-3.1": (
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_3_DATE}Be brief.<|eot_id|>" + LLAMA_3_TURNS,
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_3_DATE}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gpt-oss": (
        HARMONY_SYSTEM + "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|end|>"
        "<|start|>user<|message|>Bye<|end|><|start|>assistant<|channel|>final<|message|>Ciao.<|return|>",
        HARMONY_SYSTEM + "<|start|>user<|message|>Hi<|end|><|start|>assistant",
    ),
}
DATE = {"date_string": "2025-08-05"}


def date_for(name):
    return DATE if name == "gpt-oss" else {}


def test_every_published_name_and_alias_is_there():
    groups = """unsloth; zephyr; chatml; mistral; llama; vicuna; vicuna_old, vicuna old; alpaca; gemma; gemma_chatml;
    gemma2; gemma2_chatml; llama-3, llama3; phi-3, phi-35, phi-3.5; llama-3.1, llama-31; qwen-2.5, qwen-25, qwen25,
    qwen2.5; phi-4; gemma-3, gemma3; qwen-3, qwen3; gemma-3n, gemma3n; gemma-4, gemma4; gemma-4-thinking,
    gemma4-thinking; gpt-oss, gptoss; qwen3-instruct; qwen3-thinking; lfm-2; lfm-2.5; starling; yi-chat"""
    wanted = [[name.strip() for name in group.split(",")] for group in groups.split(";")]
    known = templates()
    assert sorted(name for group in wanted for name in group) == sorted(known)
    for group in wanted:
        assert len({id(known[name]) for name in group}) == 1, group
    assert set(EXPECTED) == set(NAMES)


def test_the_page_lists_every_name_with_its_end_and_default():
    page = (Path(__file__).parents[2] / "docs" / "chat-templates.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in page.splitlines()]
    table = {row[0].strip("`"): row[1:5] for row in cells if len(row) == 6 and row[0].strip("`") in NAMES}
    assert set(table) == set(NAMES)
    for name, (aliases, end, default, tools) in table.items():
        template = templates()[name]
        assert tuple(re.findall(r"`([^`]+)`", aliases)) == template.aliases
        own = (
            f"`{template.turn_end}`" + (", becomes EOS" if template.becomes_eos else "") if template.turn_end else "EOS"
        )
        assert end.replace("\\|", "|") == own
        assert bool(default) == (template.system_message is not None)
        assert bool(tools) == (name in WITH_TOOLS or name == "mistral")


@pytest.mark.parametrize("name", NAMES)
def test_whole_chat(name):
    assert render(name, CHAT, **date_for(name)) == EXPECTED[name][0]


@pytest.mark.parametrize("name", NAMES)
def test_text_does_not_depend_on_how_an_engine_treats_white_space(name):
    source = re.sub(r"\{%- (end)?generation %\}", "", tokenizer_for(name).chat_template)
    values = {"bos_token": "<s>", "eos_token": "</s>", "messages": CHAT, "tools": None, **date_for(name)}
    for trim in (False, True):
        environment = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim)
        assert environment.from_string(source).render(values) == EXPECTED[name][0]


@pytest.mark.parametrize("name", NAMES)
def test_generation_prompt_follows_the_default_system_message(name):
    assert render(name, [user("Hi")], add_generation_prompt=True, **date_for(name)) == EXPECTED[name][1]


@pytest.mark.parametrize("name", NAMES)
def test_sharegpt_names_give_the_same_text(name):
    roles = {"user": "human", "assistant": "gpt"}
    chat = [{"from": roles.get(item["role"], item["role"]), "value": item["content"]} for item in CHAT]
    assert render(name, chat, options={"mapping": SHAREGPT}, **date_for(name)) == EXPECTED[name][0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_system", [True, False], ids=["system", "no-system"])
def test_a_prompt_is_a_prefix_of_the_whole_chat(name, with_system):
    tokenizer = tokenizer_for(name)
    chat = CHAT if with_system else CHAT[1:]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, **date_for(name))
    for end in range(1, len(chat)):
        if chat[end]["role"] != "assistant":
            continue
        if name == "qwen3-thinking" and end != len(chat) - 1:
            continue  # the prompt opens a thought that later questions remove
        prompt = tokenizer.apply_chat_template(chat[:end], tokenize=False, add_generation_prompt=True, **date_for(name))
        assert whole.startswith(prompt)


FITTED: dict = {}
TEXTS = st.text(alphabet="ab \n.<|>{}%'\"é", min_size=1, max_size=12).filter(lambda text: text.strip() == text)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_mask_covers_the_answers_and_their_end_tokens_and_nothing_else(name, data):
    tokenizer = FITTED.setdefault(name, tokenizer_for(name))
    texts = data.draw(st.lists(TEXTS, min_size=4, max_size=4))
    chat = [user(texts[0]), assistant(texts[1]), user(texts[2]), assistant(texts[3])]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True, **date_for(name))
    kept = [index for index, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    end = templates()[name].turn_end or tokenizer.eos_token
    lead = {
        "llama": (" ", " "),
        "mistral": (" ", ""),
        "vicuna": (" ", ""),
        "vicuna_old": (" ", ""),
        "starling": (" ", ""),
    }
    before, after = lead.get(name, ("", ""))
    answers = [before + text + after + end for text in (texts[1], texts[3])]
    if name in ("qwen-3", "qwen3-thinking"):
        answers[1] = "<think>\n\n</think>\n\n" + answers[1]
    if name == "gpt-oss":
        final = "<|channel|>final<|message|>"
        answers = [f"{final}{texts[1]}<|end|>", f"{final}{texts[3]}<|return|>"]
    text = tokenizer.decode(kept)
    if name == "unsloth":  # the prompt ends with a space, which an answer's first token may take along
        text = re.sub(r"(^|(?<=</s>)) ", "", text)
    assert text == "".join(answers)
    assert tokenizer.decode(kept[-1:]) == end


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_masks_of_messages_and_of_token_ids_are_those_of_the_tags(name, data):
    tokenizer = FITTED.setdefault(name, tokenizer_for(name))
    turns = data.draw(st.integers(1, 3))
    texts = data.draw(st.lists(TEXTS, min_size=2 * turns, max_size=2 * turns))
    chat = [(user, assistant)[index % 2](text) for index, text in enumerate(texts)]
    chat = [system(data.draw(TEXTS)), *chat] if data.draw(st.booleans()) else chat
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True, **date_for(name))
    ids = encoded["input_ids"]
    tagged = [index if mask else -100 for index, mask in zip(ids, encoded["assistant_masks"], strict=True)]
    if name == "qwen3-thinking":
        # Its prompt opens the thought of the last answer, so the model is not to write that.
        opening = tokenizer("<think>\n", add_special_tokens=False)["input_ids"]
        start = max(at for at in range(len(ids)) if ids[at : at + len(opening)] == opening)
        tagged[start : start + len(opening)] = [-100] * len(opening)
        assert texts[-1] in tokenizer.decode([index for index in tagged if index != -100])
    assert mask_non_responses(ids, tokenizer) == tagged
    assert assistant_masks(chat, tokenizer, **date_for(name)) == (ids, tagged)


# mistral-common 1.13.1, finetuning mode, texts of its own tokenizers with the word-boundary sign read as a space.
MISTRAL_CALL = '[{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]'
MISTRAL_V3 = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]")
MISTRAL_V7 = (*MISTRAL_V3, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
MISTRAL = {
    "v3-sentencepiece": (
        (*MISTRAL_V3, "▁a"),
        "<s>[INST] Hi[/INST] Hello.</s>[INST] Be brief.\n\nBye[/INST] Ciao.</s>",
        f"<s>[INST] Add[/INST][TOOL_CALLS] {MISTRAL_CALL}</s>"
        '[TOOL_RESULTS] {"content": 2, "call_id": "abcdefghi"}[/TOOL_RESULTS] It is 2.</s>'
        f"[AVAILABLE_TOOLS] [{TOOL_JSON}][/AVAILABLE_TOOLS][INST] Again[/INST][TOOL_CALLS] {MISTRAL_CALL}</s>"
        '[TOOL_RESULTS] {"content": "It rains.", "call_id": "abcdefghi"}[/TOOL_RESULTS] It is wet.</s>',
    ),
    "v3-tekken": (
        MISTRAL_V3,
        "<s>[INST]Hi[/INST]Hello.</s>[INST]Be brief.\n\nBye[/INST]Ciao.</s>",
        f"<s>[INST]Add[/INST][TOOL_CALLS]{MISTRAL_CALL}</s>"
        '[TOOL_RESULTS]{"content": 2, "call_id": "abcdefghi"}[/TOOL_RESULTS]It is 2.</s>'
        f"[AVAILABLE_TOOLS][{TOOL_JSON}][/AVAILABLE_TOOLS][INST]Again[/INST][TOOL_CALLS]{MISTRAL_CALL}</s>"
        '[TOOL_RESULTS]{"content": "It rains.", "call_id": "abcdefghi"}[/TOOL_RESULTS]It is wet.</s>',
    ),
    "v7-sentencepiece": (
        (*MISTRAL_V7, "▁a"),
        "<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Hi[/INST] Hello.</s>[INST] Bye[/INST] Ciao.</s>",
        f"<s>[INST] Add[/INST][TOOL_CALLS] {MISTRAL_CALL}</s>"
        "[TOOL_RESULTS] abcdefghi[TOOL_CONTENT] 2[/TOOL_RESULTS] It is 2.</s>"
        f"[AVAILABLE_TOOLS] [{TOOL_JSON}][/AVAILABLE_TOOLS][INST] Again[/INST][TOOL_CALLS] {MISTRAL_CALL}</s>"
        "[TOOL_RESULTS] abcdefghi[TOOL_CONTENT] It rains.[/TOOL_RESULTS] It is wet.</s>",
    ),
}
MISTRAL_TOOLS = [
    user("Add"),
    CALL,
    result("2"),
    assistant("It is 2."),
    user("Again"),
    CALL,
    result("It rains."),
    assistant("It is wet."),
]


@pytest.mark.parametrize("version", MISTRAL)
def test_mistral_is_what_mistral_common_writes(version):
    tokens, chat, tools = MISTRAL[version]
    assert render("mistral", CHAT, tokens=tokens) == chat
    assert render("mistral", MISTRAL_TOOLS, tokens=tokens, tools=TOOLS) == tools


WITH_TOOLS = {"llama-3.1", "qwen-2.5", "qwen-3", "qwen3-instruct", "qwen3-thinking", "gpt-oss", "lfm-2", "lfm-2.5"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - WITH_TOOLS))
def test_tools_are_refused_where_the_format_has_none(name):
    with pytest.raises(TemplateError, match="does not write tools"):
        render(name, [user("Add"), assistant("2")], tools=TOOLS)
    with pytest.raises(TemplateError, match="does not write tools"):
        render(name, [user("Add"), CALL])


# The same, with tokenizers made of the vocabulary of tekken_240911.json and the control tokens of each version.
MISTRAL_V11 = (*MISTRAL_V7, "[ARGS]", "[CALL_ID]")
TWO_CALLS = assistant(
    "Both.",
    tool_calls=[
        {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
        {"id": "abcdefgh2", "type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}},
    ],
)
NEWER_TOOLS = [
    *MISTRAL_TOOLS[:5],
    TWO_CALLS,
    result("3"),
    result("It rains.") | {"tool_call_id": "abcdefgh2"},
    assistant("It is wet."),
]
NEWER = {
    "v11": (
        '<s>[INST]Add[/INST][TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}</s>'
        "[TOOL_RESULTS]abcdefghi[TOOL_CONTENT]2[/TOOL_RESULTS]It is 2.</s>"
        f"[AVAILABLE_TOOLS][{TOOL_JSON}][/AVAILABLE_TOOLS][INST]Again[/INST]"
        'Both.[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}[TOOL_CALLS]add[CALL_ID]abcdefgh2[ARGS]{"a": "é"}</s>'
        "[TOOL_RESULTS]abcdefghi[TOOL_CONTENT]3[/TOOL_RESULTS]"
        "[TOOL_RESULTS]abcdefgh2[TOOL_CONTENT]It rains.[/TOOL_RESULTS]It is wet.</s>"
    ),
    "v13": (
        f"<s>[AVAILABLE_TOOLS][{TOOL_JSON}][/AVAILABLE_TOOLS][INST]Add[/INST]"
        '[TOOL_CALLS]add[ARGS]{"a": 1}</s>[TOOL_RESULTS]2[/TOOL_RESULTS]It is 2.</s>[INST]Again[/INST]'
        'Both.[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": "é"}</s>'
        "[TOOL_RESULTS]3[/TOOL_RESULTS][TOOL_RESULTS]It rains.[/TOOL_RESULTS]It is wet.</s>"
    ),
}


@pytest.mark.parametrize(
    ("version", "more", "own"),
    [
        ("v11", (), None),
        ("v11", (), "[CALL_ID][ARGS]"),
        ("v11", ("[THINK]", "[/THINK]"), "[CALL_ID][ARGS]"),
        ("v13", (), "[ARGS]"),
        ("v13", ("[THINK]", "[/THINK]"), None),
        ("v13", ("[THINK]", "[/THINK]"), "[ARGS]"),
    ],
)
def test_mistral_calls_with_arguments_are_what_mistral_common_writes(version, more, own):
    tokenizer = tokenizer_with(*MISTRAL_V11, *more)
    tokenizer.chat_template = own
    tokenizer = get_chat_template(tokenizer, "mistral")
    whole = "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi[/INST]Hello.</s>[INST]Bye[/INST]Ciao.</s>"
    for _ in range(2):  # The template that is there then is our own.
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == whole
        assert tokenizer.apply_chat_template(NEWER_TOOLS, tools=TOOLS, tokenize=False) == NEWER[version]
        tokenizer = get_chat_template(tokenizer, "mistral")


def test_mistral_thoughts_are_what_mistral_common_writes():
    chat = [user("Hi"), assistant("Hello.", reasoning_content="hmm"), user("Bye"), assistant("Ciao.")]
    text = "<s>[INST]Hi[/INST][THINK]hmm[/THINK]Hello.</s>[INST]Bye[/INST]Ciao.</s>"
    assert render("mistral", chat, tokens=(*MISTRAL_V11, "[THINK]", "[/THINK]")) == text
    assert render("mistral", chat, tokens=MISTRAL_V11) == text.replace("[THINK]hmm[/THINK]", "")


def test_mistral_calls_are_trained_with_what_closes_them():
    tokenizer = get_chat_template(tokenizer_with(*MISTRAL_V11, "[THINK]", "[/THINK]"), "mistral")
    encoded = tokenizer.apply_chat_template(
        NEWER_TOOLS, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    by_tags = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"]) if mask]
    _, labels = assistant_masks(NEWER_TOOLS, tokenizer, tools=TOOLS)
    assert [label for label in labels if label != -100] == by_tags
    assert tokenizer.decode(by_tags) == (
        '[TOOL_CALLS]add[ARGS]{"a": 1}</s>It is 2.</s>'
        'Both.[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": "é"}</s>It is wet.</s>'
    )


@pytest.mark.parametrize("name", ["llama-3.1", "gpt-oss"])
def test_two_calls_in_a_message_are_refused_where_the_format_has_one(name):
    with pytest.raises(TemplateError, match="one tool call"):
        render(name, [user("Add"), {**CALL, "tool_calls": CALL["tool_calls"] * 2}])


QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + TOOL_JSON
    + "\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
TOOL_CHAT = [user("Add"), CALL, result("2"), result("3"), assistant("It is 2.")]
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
QWEN_RESULTS = "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"


@pytest.mark.parametrize(
    ("name", "lead", "answer"),
    [
        ("qwen-2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n", "It is 2."),
        ("qwen-3", "", "<think>\n\n</think>\n\nIt is 2."),
        ("qwen3-instruct", "", "It is 2."),
    ],
)
def test_qwen_tools(name, lead, answer):
    turns = [("system", lead + QWEN_TOOLS), ("user", "Add"), ("assistant", QWEN_CALL), ("user", QWEN_RESULTS)]
    assert render(name, TOOL_CHAT, tools=TOOLS) == chatml(*turns, ("assistant", answer))


def test_qwen_tool_call_after_text_and_two_calls():
    both = {**CALL, "content": "Let me see.", "tool_calls": CALL["tool_calls"] * 2}
    text = render("qwen-3", [user("Add"), both])
    assert f"Let me see.\n{QWEN_CALL}\n{QWEN_CALL}<|im_end|>" in text


@pytest.mark.parametrize("form", ["field", "tags"])
def test_qwen_3_keeps_thoughts_after_the_last_question_only(form):
    def thoughtful(thought, answer):
        if form == "field":
            return assistant(answer, reasoning_content=thought)
        return assistant(f"<think>\n{thought}\n</think>\n\n{answer}")

    chat = [user("Hi"), thoughtful("Greet.", "Hello."), user("Bye"), thoughtful("Part.", "Ciao.")]
    assert render("qwen-3", chat) == chatml(
        ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "<think>\nPart.\n</think>\n\nCiao.")
    )


@pytest.mark.parametrize(("thinking", "expected"), [(True, ""), (False, "<think>\n\n</think>\n\n")])
def test_qwen_3_thinking_can_be_switched_off(thinking, expected):
    text = render("qwen-3", [user("Hi")], add_generation_prompt=True, enable_thinking=thinking)
    assert text == chatml(("user", "Hi")) + "<|im_start|>assistant\n" + expected


def test_gemma_4_thoughts():
    chat = [
        user("Hi"),
        assistant("Hello.", reasoning_content="Greet."),
        user("Bye"),
        assistant("Ciao.", reasoning_content="Part."),
    ]
    on = (
        "<s><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello.<turn|>\n<|turn>user\nBye<turn|>\n"
        "<|turn>model\n<|channel>thought\nPart.\n<channel|>Ciao.<turn|>\n"
    )
    off = (
        "<s><|turn>user\nHi<turn|>\n<|turn>model\nHello.<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\nCiao.<turn|>\n"
    )
    assert render("gemma-4-thinking", chat) == render("gemma-4", chat, enable_thinking=True) == on
    assert render("gemma-4", chat) == render("gemma-4-thinking", chat, enable_thinking=False) == off


@pytest.mark.parametrize(
    ("name", "parts", "expected"),
    [
        ("gemma-3", ["image", "text"], "<start_of_image>What?"),
        ("gemma-3n", ["audio", "image", "text"], "<audio_soft_token><image_soft_token>What?"),
        ("gemma-4", ["video", "audio", "image", "text"], "<|video|><|audio|><|image|>What?"),
    ],
)
def test_parts_of_other_kinds_become_their_tokens(name, parts, expected):
    content = [{"type": kind, **({"text": "What?"} if kind == "text" else {})} for kind in parts]
    assert f"user\n{expected}<" in render(name, [user(content)])


@pytest.mark.parametrize("name", NAMES)
def test_lists_of_text_parts_are_read_and_other_parts_refused(name):
    chat = [{**item, "content": [{"type": "text", "text": item["content"]}]} for item in CHAT]
    assert render(name, chat, **date_for(name)) == EXPECTED[name][0]
    with pytest.raises(TemplateError, match="no place for a part of type"):
        render(name, [user([{"type": "hologram"}])])


LLAMA_TOOLS = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


@pytest.mark.parametrize("with_user", [True, False], ids=["in-user-turn", "in-system-turn"])
def test_llama_3_1_tools(with_user):
    listing = LLAMA_TOOLS + json.dumps(TOOLS[0], indent=4) + "\n\n"
    in_system = (
        ""
        if with_user
        else (
            "You have access to the following functions. To call a function, please respond with JSON for a "
            "function call." + listing
        )
    )
    in_user = (
        ""
        if not with_user
        else (
            "Given the following functions, please respond with a JSON for a function call with its proper "
            "arguments that best "
            "answers the given prompt.\n\n" + listing
        )
    )

    def turn(role, text):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"

    expected = (
        "<s>"
        + turn("system", f"Environment: ipython\n{LLAMA_3_DATE}{in_system}Be brief.")
        + turn("user", in_user + "Add")
        + turn("assistant", '{"name": "add", "parameters": {"a": 1}}')
        + turn("ipython", '"2"')
        + turn("assistant", "It is 2.")
    )
    chat = [system("Be brief."), user("Add"), CALL, result("2"), assistant("It is 2.")]
    assert render("llama-3.1", chat, tools=TOOLS, tools_in_user_message=with_user) == expected


def test_llama_3_1_date_can_be_given():
    assert "Today Date: 1 May 2026\n" in render("llama-3.1", [user("Hi")], date_string="1 May 2026")


@pytest.mark.parametrize(
    ("name", "listing", "answer"),
    [
        (
            "lfm-2",
            f"<|tool_list_start|>[{TOOL_JSON}]<|tool_list_end|>",
            "<|tool_response_start|>2<|tool_response_end|>",
        ),
        ("lfm-2.5", f"[{TOOL_JSON}]", "2"),
    ],
)
def test_lfm_tools(name, listing, answer):
    call = copy.deepcopy(CALL)
    call["tool_calls"][0]["function"]["arguments"] = {"a": 1, "b": "x", "c": True}
    chat = [system("Be brief."), user("Add"), call, result("2"), assistant("It is 2.")]
    assert render(name, chat, tools=TOOLS) == chatml(
        ("system", f"Be brief.\nList of tools: {listing}"),
        ("user", "Add"),
        ("assistant", '<|tool_call_start|>[add(a=1, b="x", c=True)]<|tool_call_end|>'),
        ("tool", answer),
        ("assistant", "It is 2."),
        bos="<s>",
    )


def test_lfm_2_5_leaves_past_thoughts_out():
    chat = [user("Hi"), assistant("<think>Greet.</think>Hello."), user("Bye"), assistant("<think>Part.</think>Ciao.")]
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "<think>Part.</think>Ciao.")]
    assert render("lfm-2.5", chat) == chatml(*turns, bos="<s>")
    assert "Greet." in render("lfm-2.5", chat, keep_past_thinking=True)


def test_harmony_tools_and_channels():
    tools = [
        {"type": "function", "function": {"name": "get_location", "description": "Gets the location of the user."}},
        {
            "type": "function",
            "function": {
                "name": "get_current_weather",
                "description": "Gets the current weather in the provided location.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
                        "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                        "days": {"type": "array", "items": {"type": "integer"}},
                    },
                    "required": ["location"],
                },
            },
        },
    ]
    call = {"type": "function", "function": {"name": "get_current_weather", "arguments": {"location": "Rome"}}}
    chat = [
        system("Be brief."),
        user("Weather?"),
        assistant("", reasoning_content="Look it up.", tool_calls=[call]),
        {"role": "tool", "content": '{"sunny": true}'},
        assistant("Sunny.", reasoning_content="It is sunny."),
    ]
    expected = (
        HARMONY_SYSTEM.replace(
            "<|end|>", "\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
        )
        + "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n# Tools\n\n## functions\n\nnamespace "
        "functions {\n\n"
        "// Gets the location of the user.\ntype get_location = () => any;\n\n"
        "// Gets the current weather in the provided location.\ntype get_current_weather = (_: {\n"
        "// The city and state, e.g. San Francisco, CA\nlocation: string,\n"
        'format?: "celsius" | "fahrenheit", // default: celsius\ndays?: number[],\n}) => any;\n\n'
        "} // namespace functions<|end|>"
        "<|start|>user<|message|>Weather?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Look it up.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_current_weather <|constrain|>json<|message|>"
        '{"location": "Rome"}<|call|>'
        '<|start|>functions.get_current_weather to=assistant<|channel|>commentary<|message|>{"sunny": true}<|end|>'
        "<|start|>assistant<|channel|>analysis<|message|>It is sunny.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Sunny.<|return|>"
    )
    assert render("gpt-oss", chat, tools=tools, **DATE) == expected
    later = [*chat, user("Thanks"), assistant("Welcome.")]
    text = render("gpt-oss", later, tools=tools, reasoning_effort="high", **DATE)
    assert "analysis<|message|>" not in text
    assert "final<|message|>Sunny.<|end|>" in text
    assert "Reasoning: high" in text


@pytest.mark.parametrize("name", ["gemma-3", "llama", "mistral"])
def test_a_system_message_without_a_user_turn_to_write_it_in_is_refused(name):
    with pytest.raises(TemplateError, match="must come next"):
        render(name, [system("Be brief."), assistant("Hello.")])


@pytest.mark.parametrize("name", sorted(name for name in NAMES if templates()[name].system_message is not None))
@pytest.mark.parametrize("text", ['You\'re "it".\n\\n {{ 7 * 7 }} {% x %} }} ünï 🐆'], ids=["odd"])
def test_default_system_message_is_replaced_and_stays_text(name, text):
    assert text in render(name, [user("Hi")], options={"system_message": text})
    assert text not in render(name, CHAT, options={"system_message": text})


def test_default_system_message_exists_for_the_documented_templates_only(caplog, capsys):
    with_default = {name for name in NAMES if templates()[name].system_message is not None}
    assert with_default == {"unsloth", "vicuna", "vicuna_old", "alpaca", "llama-3.1", "qwen-2.5"}
    text = render("zephyr", [user("Hi")], options={"system_message": "Be kind."})
    assert "no default system message" in capsys.readouterr().err
    assert "Be kind." not in text


def test_unknown_name_tells_the_nearest_and_all():
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3\.1'") as error:
        get_chat_template(tokenizer_with(), "lama-3.1")
    for name in templates():
        assert name in str(error.value)


def test_names_are_found_in_any_case():
    assert render("ChatML", [user("Hi")], tokens=("<|im_start|>", "<|im_end|>")) == chatml(("user", "Hi"))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"chat_template": 3}, ArgumentError, "name or a tuple"),
        ({"chat_template": ("{{ messages }}",)}, ConfigError, "tuple of two strings"),
        ({"chat_template": ("{% for m in messages %}", "</s>")}, ConfigError, "not valid Jinja"),
        ({"chat_template": ("{{ '{system_message}' }}", "</s>")}, ConfigError, "no system message was given"),
        ({"mapping": {"rôle": "from"}}, ConfigError, "unknown key 'rôle'"),
        ({"mapping": {"user": ""}}, ConfigError, "non-empty"),
        ({"mapping": {"user": "gpt", "assistant": "gpt"}}, ConfigError, "the same"),
        ({"system_message": 3}, ArgumentError, "must be a string"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        get_chat_template(tokenizer_with(), **arguments)


def test_things_that_are_no_tokenizer():
    with pytest.raises(ArgumentError, match="tokenizer or processor"):
        get_chat_template("llama")
    own = type("MistralCommonBackend", (), {})()
    with pytest.raises(UnsupportedError, match="mistral-common"):
        get_chat_template(own)


CUSTOM = (
    "{{ '{system_message}' }}!{system_message}!{% for message in messages %}{% if message['role'] == 'user' %}"
    "U:{{ message['content'] }}{% else %}{% generation %}{{ message[\"content\"] }}<end>{% endgeneration %}{% endif %}"
    "{% endfor %}\n"
)


def test_template_of_ones_own():
    tokenizer = tokenizer_with("<end>")
    returned = get_chat_template(tokenizer, (CUSTOM, "<end>"), mapping=SHAREGPT, system_message="It's {{ x }}")
    assert returned is tokenizer
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "It's {{ x }}!It's {{ x }}!U:HiHello.<end>"
    assert tokenizer.eos_token == "<end>"


def test_template_of_ones_own_with_the_tokenizers_eos():
    tokenizer = get_chat_template(tokenizer_with(), ("{{ messages[0]['content'] + eos_token }}", "eos_token"))
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.apply_chat_template([user("Hi")], tokenize=False) == "Hi</s>"


@pytest.mark.parametrize("choice", [None, "auto"])
def test_the_tokenizers_own_template(choice):
    tokenizer = tokenizer_with()
    before = tokenizer.chat_template
    assert get_chat_template(tokenizer, choice).chat_template == before
    get_chat_template(tokenizer, choice, mapping=SHAREGPT)
    chat = [{"from": "human", "value": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s><|human|>\nHi</s>\n"
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template of its own"):
        get_chat_template(tokenizer, choice)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_is_added_and_padding_ends_nothing(name):
    tokenizer = tokenizer_with()
    size = len(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    get_chat_template(tokenizer, name)
    assert len(tokenizer) == size
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.eos_token_id == 1
    end = templates()[name].turn_end
    if end is not None:
        assert tokenizer.eos_token == end
        assert tokenizer.encode(end, add_special_tokens=False) == [1]
        assert "</s>" not in tokenizer.get_vocab()


@pytest.mark.parametrize("name", NAMES)
def test_eos_becomes_the_end_of_a_turn_where_documented(name):
    tokenizer = tokenizer_for(name)
    flagged = name in ("chatml", "gemma", "gemma_chatml", "gemma2", "gemma2_chatml")
    assert tokenizer.eos_token == (templates()[name].turn_end if flagged else "</s>")
    assert tokenizer_for(name, map_eos_token=False).eos_token == "</s>"


def test_eos_is_left_alone_and_told_when_it_may_not_be_mapped(capsys):
    tokenizer = get_chat_template(tokenizer_with(), "chatml", map_eos_token=False)
    assert tokenizer.eos_token == "</s>"
    assert "encoded as several tokens" in capsys.readouterr().err


def test_generation_stops_at_the_ends_of_the_template(tmp_path):
    tokenizer = tokenizer_with("<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>")
    assert stop_token_ids(tokenizer) == [1]
    get_chat_template(tokenizer, "llama-3.1")
    expected = [1, *tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|eom_id|>"])]
    assert stop_token_ids(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path)
    assert stop_token_ids(AutoTokenizer.from_pretrained(tmp_path)) == expected


PIECES = ["▁", "H", "i", "▁H", "▁Hi", "B", "y", "e", "\n"]
MERGES = [("▁", "H"), ("▁H", "i")]


def llama_tokenizer():
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *PIECES])}
    return LlamaTokenizer(vocab=vocabulary, merges=MERGES)


def gemma_tokenizer():
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    turns = ["<start_of_turn>", "<end_of_turn>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *PIECES, *turns])}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=MERGES)
    tokenizer.add_special_tokens({"extra_special_tokens": turns})
    return tokenizer


@pytest.mark.parametrize(
    ("make", "name", "end"),
    [
        (tokenizer_with, "chatml", "<|im_end|>"),
        (llama_tokenizer, "chatml", "<|im_end|>"),
        (llama_tokenizer, "llama-3", "<|eot_id|>"),
        (gemma_tokenizer, "chatml", "<|im_end|>"),
        (gemma_tokenizer, "gemma2_chatml", "<|im_end|>"),
        (gemma_tokenizer, "gemma-3", "<eos>"),
    ],
)
def test_saved_tokenizers_come_back_the_same(make, name, end, tmp_path):
    tokenizer = make()
    size = len(tokenizer)
    get_chat_template(tokenizer, name)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer) == size
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.eos_token == end
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    chat = [user("Hi"), assistant("Bye")]
    assert loaded.apply_chat_template(chat, return_dict=True) == tokenizer.apply_chat_template(chat, return_dict=True)
    assert loaded("Hi")["input_ids"] == make()("Hi")["input_ids"]


def test_chatml_on_gemma_renames_its_turn_tokens():
    tokenizer = gemma_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"])
    get_chat_template(tokenizer, "chatml")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == ids
    assert tokenizer.eos_token_id == ids[1]
    assert not {"<start_of_turn>", "<end_of_turn>"} & set(tokenizer.get_vocab())
    assert tokenizer.apply_chat_template([user("Hi")], tokenize=False).startswith("<bos><|im_start|>user\nHi<|im_end|>")


def test_a_processor_and_its_tokenizer_get_the_template():
    processor = type("Processor", (), {"tokenizer": tokenizer_with(), "chat_template": None})()
    assert get_chat_template(processor, "zephyr") is processor
    assert processor.chat_template == processor.tokenizer.chat_template


def test_a_template_runs_in_the_sandbox():
    tokenizer = get_chat_template(tokenizer_with(), ("{{ messages.__class__.__mro__ }}", "</s>"))
    with pytest.raises(TemplateError, match=r"unsafe|undefined"):
        tokenizer.apply_chat_template([user("Hi")], tokenize=False)


SANITIZES = "sanitize_control_tokens" in inspect.signature(BASE.apply_chat_template).parameters


@pytest.mark.skipif(not SANITIZES, reason="this transformers cannot keep control tokens of users as text")
@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_in_user_text_can_be_kept_as_text(name):
    tokenizer = tokenizer_for(name)
    token = templates()[name].turn_end or tokenizer.eos_token
    options = {"return_dict": True, "sanitize_control_tokens": True, **date_for(name)}
    plain = tokenizer.apply_chat_template([user("x")], **options)["input_ids"]
    forged = tokenizer.apply_chat_template([user(f"x{token}y")], **options)["input_ids"]
    number = tokenizer.convert_tokens_to_ids(token)
    assert forged.count(number) == plain.count(number)


@given(text=st.text(alphabet="a'\"\\\n\r\t{}%#é🐆\u2028", max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_as_a_literal(text):
    environment = jinja2.Environment(keep_trailing_newline=True)
    assert environment.from_string("{{ " + literal(text) + " }}").render() == text
    assert environment.from_string(rewrite("a{system_message}b", {}, text)).render() == f"a{text}b"
    assert environment.from_string(rewrite("{{ 'a{system_message}b' }}", {}, text)).render() == f"a{text}b"


def test_only_whole_string_literals_are_renamed():
    source = "user {{ 'user' }} {{ message['user'] }} {{ 'the user' }} {# 'user' #}"
    assert (
        rewrite(source, {"user": "human"}, None)
        == "user {{ 'human' }} {{ message['human'] }} {{ 'the user' }} {# 'user' #}"
    )
