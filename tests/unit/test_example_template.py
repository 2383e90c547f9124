"""Chat templates made from an example with two turns give the example back, and every longer or shorter chat."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from conftest import build_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from pantheraml.chat_templates import apply_chat_template, construct_chat_template
from pantheraml.data.encoding import Encoder
from pantheraml.data.example_template import DEFAULT_SYSTEM_MESSAGE, LLAMA_3_EXAMPLE
from pantheraml.errors import ArgumentError, ConfigError, DataError

ALPACA = (
    "Instructions follow.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}"
    "\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}"
)
VICUNA = "{SYSTEM}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}\n"
LLAMA_2 = (
    "<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{INPUT} [/INST] {OUTPUT} </s><s>[INST] {INPUT} [/INST] {OUTPUT} </s>"
)
CHATML = "<|im_start|>system\n{SYSTEM}<|im_end|>\n" + (
    "<|im_start|>user\n{INPUT}<|im_end|>\n<|im_start|>assistant\n{OUTPUT}<|im_end|>\n" * 2
)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


THREE = [user("a"), bot("b"), user("c {INPUT} 'q' \\n"), bot("ü🦊"), user("e\r\nf"), bot("{{ g }}{% h %}")]


@pytest.fixture
def tokenizer():
    return build_tokenizer()


def rendered(tokenizer, template, messages, **options):
    return tokenizer.apply_chat_template(messages, chat_template=template.jinja_template, tokenize=False, **options)


def test_llama_3_layout(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    template = construct_chat_template(tokenizer, extra_eos_tokens=["<|eot_id|>"])
    start = "<s><|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    user_part = "<|start_header_id|>user<|end_header_id|>\n\n"
    bot_part = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert (template.input_part, template.output_part) == (user_part, bot_part)
    expected = f"{start}Be brief.<|eot_id|>{user_part}hi<|eot_id|>{bot_part}yes<|eot_id|>"
    chat = [system("Be brief."), user("hi"), bot("yes")]
    assert rendered(tokenizer, template, chat) == expected
    prompt = rendered(tokenizer, template, chat[:2], add_generation_prompt=True)
    assert prompt == f"{start}Be brief.<|eot_id|>{user_part}hi<|eot_id|>{bot_part}"
    assert rendered(tokenizer, template, chat[1:]).startswith(start + DEFAULT_SYSTEM_MESSAGE + "<|eot_id|>")


def test_alpaca_layout_ends_answers_with_the_end_token(tokenizer):
    template = construct_chat_template(tokenizer, ALPACA)
    assert rendered(tokenizer, template, THREE) == (
        "<s>Instructions follow.\n\n### Instruction:\na\n\n### Response:\nb</s>"
        "\n\n### Instruction:\nc {INPUT} 'q' \\n\n\n### Response:\nü🦊</s>"
        "\n\n### Instruction:\ne\r\nf\n\n### Response:\n{{ g }}{% h %}</s>"
    )
    assert template.input_part == "\n\n### Instruction:\n"
    assert template.output_part == "\n\n### Response:\n"
    with pytest.raises(TemplateError, match="no place for a system message"):
        rendered(tokenizer, template, [system("s"), *THREE])


def test_vicuna_layout(tokenizer):
    template = construct_chat_template(tokenizer, VICUNA, default_system_message="S.")
    assert (template.input_part, template.output_part) == ("USER: ", "ASSISTANT: ")
    assert rendered(tokenizer, template, THREE[:4]) == (
        "<s>S.\nUSER: a\nASSISTANT: b</s>\nUSER: c {INPUT} 'q' \\n\nASSISTANT: ü🦊</s>\n"
    )


def test_system_part_is_left_out_without_a_message(tokenizer):
    template = construct_chat_template(tokenizer, CHATML, default_system_message=None, extra_eos_tokens=None)
    assert rendered(tokenizer, template, THREE[:2]) == (
        "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb</s><|im_end|>\n"
    )
    assert rendered(tokenizer, template, [system("x"), *THREE[:1]]) == (
        "<s><|im_start|>system\nx<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
    )


def test_first_turn_that_needs_its_system_message(tokenizer):
    template = construct_chat_template(tokenizer, LLAMA_2, default_system_message="")
    chat = [system("x"), user("a"), bot("b"), user("c"), bot("d")]
    assert rendered(tokenizer, template, chat) == (
        "<s>[INST] <<SYS>>\nx\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s>"
    )
    with pytest.raises(TemplateError, match="needs a system message"):
        rendered(tokenizer, template, chat[1:])


def test_without_a_tokenizer_the_example_stands_as_it_is():
    template = construct_chat_template()
    assert "bos_token" not in template.jinja_template
    assert "<|begin_of_text|>" in template.jinja_template
    for example, options in ((ALPACA, {}), (LLAMA_3_EXAMPLE, {"default_system_message": None})):
        with pytest.raises(ConfigError, match="tokenizer"):
            construct_chat_template(None, example, **options)
    assert "<end>" in construct_chat_template(None, ALPACA, extra_eos_tokens=["<end>"]).jinja_template


def test_end_token_missing_after_the_second_answer_only(tokenizer):
    example = "U {INPUT} A {OUTPUT}</s>U {INPUT} A {OUTPUT}"
    assert rendered(tokenizer, construct_chat_template(tokenizer, example), THREE[:2]) == "<s>U a A b</s>"
    trailing = "U {INPUT} A {OUTPUT}</s>U {INPUT} A {OUTPUT}</s>\n"
    assert rendered(tokenizer, construct_chat_template(tokenizer, trailing), THREE[:2]) == "<s>U a A b</s>"


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ("", "no placeholder"),
        ("U {INPUT} A {OUTPUT}</s>", "does not show two turns(.|\n)*order: {INPUT}, {OUTPUT}"),
        ("U {INPUT} A {OUTPUT} U {INPUT} A ", "does not show two turns"),
        ("U {OUTPUT} A {INPUT} U {OUTPUT} A {INPUT}", "does not show two turns"),
        ("U {INPUT} A {OUTPUT}</s>" * 3, "does not show two turns"),
        ("U {INPUT} A {OUTPUT}</s>U {INPUT} B {OUTPUT}</s>", "first ' A ', then ' B '"),
        ("U {INPUT}{OUTPUT}</s>" * 2, "nothing stands between"),
        ("U {INPUT} A {OUTPUT}</s>U {INPUT} A {OUTPUT} the end", "second turn does not end"),
        ("{SYSTEM}{SYSTEM}" + "U {INPUT} A {OUTPUT}</s>" * 2, "stands twice"),
        ("U {INPUT} A {OUTPUT}</s>" * 2 + "{SYSTEM}", "after the first"),
    ],
)
def test_examples_that_cannot_be_used(tokenizer, example, words):
    with pytest.raises(ConfigError, match=words):
        construct_chat_template(tokenizer, example)


def test_options_that_cannot_be_honoured(tokenizer):
    with pytest.raises(ConfigError, match="no place for the default system message"):
        construct_chat_template(tokenizer, ALPACA, default_system_message="Be brief.")
    with pytest.raises(ConfigError, match=re.escape("'<|eot_id|>' is no token")):
        construct_chat_template(tokenizer, extra_eos_tokens=["<|eot_id|>"])
    with pytest.raises(ArgumentError, match="list of tokens"):
        construct_chat_template(tokenizer, extra_eos_tokens="</s>")
    with pytest.raises(ArgumentError, match="not text"):
        construct_chat_template(tokenizer, None)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}"), max_size=6)
marks = st.text("<|>#:\n\r 'u\\%é🦊", min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    head=texts, after=marks, user_mark=marks, bot_mark=marks, end=st.sampled_from(["</s>", "\n", ""]), data=st.data()
)
def test_any_layout_comes_back_at_any_number_of_turns(tiny_tokenizer, head, after, user_mark, bot_mark, end, data):
    turn = user_mark + "{INPUT}" + bot_mark + "{OUTPUT}" + end
    template = construct_chat_template(tiny_tokenizer, head + "{SYSTEM}" + after + turn + turn)
    said = data.draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
    stop = end if end == "</s>" else "</s>" + end
    expected = f"<s>{head}sys{after}" + "".join(f"{user_mark}{u}{bot_mark}{b}{stop}" for u, b in said)
    messages = [system("sys"), *(message for u, b in said for message in (user(u), bot(b)))]
    assert rendered(tiny_tokenizer, template, messages) == expected
    prompt = rendered(tiny_tokenizer, template, messages[:-1], add_generation_prompt=True)
    assert expected.startswith(prompt)
    assert expected == prompt + said[-1][1] + stop
    assert prompt.endswith(template.output_part)


def test_data_sets_are_rendered_and_the_tokenizer_keeps_the_template(tokenizer):
    chats = [
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}],
    ]
    dataset = Dataset.from_dict({"conversations": chats, "id": [1, 2]})
    found = apply_chat_template(dataset, tokenizer, ALPACA)
    assert set(found.column_names) == {"id", "conversations", "text"}
    start = "<s>Instructions follow.\n\n### Instruction:\n"
    assert found["text"][:] == [f"{start}a\n\n### Response:\nb</s>", f"{start}c\n\n### Response:\nd</s>"]
    assert (
        tokenizer.apply_chat_template([user("x")], tokenize=False, add_generation_prompt=True)
        == f"{start}x\n\n### Response:\n"
    )
    streamed = apply_chat_template(dataset.to_iterable_dataset(), tokenizer=tokenizer, chat_template=ALPACA)
    assert [row["text"] for row in streamed] == found["text"][:]


@pytest.mark.parametrize("streaming", [False, True])
def test_control_tokens_in_conversations_stay_text_in_training(tokenizer, streaming):
    typed = "say </s> and <|user|></s>"
    dataset = Dataset.from_dict({"conversations": [[user("a"), bot("b")], [user(typed), bot("b</s>c")]]})
    given = dataset.to_iterable_dataset() if streaming else dataset
    rows = list(apply_chat_template(given, tokenizer, ALPACA))
    assert rows[1]["text"].count(typed) == 1
    spans = rows[1]["typed_control_tokens"]
    found = [rows[1]["text"][start:end] for start, end in zip(spans[::2], spans[1::2])]
    assert found == ["</s>", "<|user|>", "</s>", "</s>"]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    encoded = Encoder(tokenizer)(columns)
    assert [ids.count(tokenizer.eos_token_id) for ids in encoded.ids] == [1, 1]
    assert encoded.typed == [None, "</s>"]
    assert tokenizer.decode(encoded.ids[1]) == rows[1]["text"]


def test_processors_get_the_template_too(tokenizer):
    processor = SimpleNamespace(tokenizer=tokenizer, apply_chat_template=tokenizer.apply_chat_template)
    dataset = Dataset.from_list([{"conversations": [user("a"), bot("b")]}])
    assert apply_chat_template(dataset, processor, ALPACA)["text"][0].endswith("b</s>")
    assert processor.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([user("a"), user("b")], "take turns"),
        ([bot("b")], "take turns"),
        ([system("s"), user("a"), bot("b")], "no place for a system message"),
    ],
)
def test_chats_that_do_not_fit_name_their_row(tokenizer, chat, words):
    dataset = Dataset.from_list([{"conversations": [user("a"), bot("b")]}, {"conversations": chat}])
    with pytest.raises(DataError, match=f"row 2(.|\n)*{words}"):
        apply_chat_template(dataset, tokenizer, ALPACA)


def test_what_data_sets_need(tokenizer):
    with pytest.raises(ArgumentError, match="tokenizer"):
        apply_chat_template(Dataset.from_list([{"conversations": [user("a")]}]))
    with pytest.raises(ConfigError, match="the columns are: text"):
        apply_chat_template(Dataset.from_list([{"text": "a"}]), tokenizer)
