"""Labels cover exactly what the assistant writes and what ends its turn, whatever the template and the tokenizer."""

from __future__ import annotations

import functools
import re

import pytest
from conftest import CORPUS, build_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pantheraml.chat_templates import get_chat_template, stop_token_ids
from pantheraml.data.markers import detect_markers
from pantheraml.data.masking import mask_non_responses
from pantheraml.data.pieces import pieces_of
from pantheraml.data.replies import assistant_masks
from pantheraml.errors import ConfigError, DataError

LOOP = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "default system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + LOOP
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama-3": "{{ bos_token }}"
    + LOOP
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + ASK
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma": "{{ bos_token }}"
    + LOOP
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "mistral": "{{ bos_token }}" + LOOP + "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}",
    "zephyr": LOOP + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "thinking": LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "prompted thinking": "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}<|end|>{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
    "two ends": LOOP + "{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "end of text": LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "no end": "Below is a task.{% for m in messages %}{% if m.role == 'assistant' %}\n\n### Response:\n{{ m.content }}"
    "{% elif m.role == 'user' %}\n\n### Instruction:\n{{ m.content }}{% else %} {{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}\n\n### Response:\n{% endif %}",
}
# What a reply is, by hand: how the template writes content, and what closes it in the middle and at the end.
REPLIES = {
    "chatml": ("{}", "<|im_end|>", "<|im_end|>"),
    "default system": ("{}", "<|im_end|>", "<|im_end|>"),
    "llama-3": ("{}", "<|eot_id|>", "<|eot_id|>"),
    "gemma": ("{}", "<end_of_turn>", "<end_of_turn>"),
    "mistral": (" {}", "</s>", "</s>"),
    "zephyr": ("{}", "</s>", "</s>"),
    "thinking": ("{}", "<|im_end|>", "<|im_end|>"),
    "prompted thinking": ("{}", "<|end|>", "<|end|>"),
    "two ends": ("<|channel|>final<|message|>{}", "<|end|>", "<|return|>"),
    "end of text": ("{}", "<|end|>", "<|end|>\n</s>"),
    "no end": ("{}", "", ""),
}
TRIMMED = ("llama-3", "gemma")
OPENINGS = {
    "chatml": "<|im_start|>assistant\n",
    "default system": "<|im_start|>assistant\n",
    "llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>model\n",
    "mistral": " [/INST]",
    "zephyr": "<|assistant|>\n",
    "thinking": "<|im_start|>assistant\n",
    "prompted thinking": "<|Assistant|>",
    "two ends": "<|start|>assistant",
    "end of text": "<|assistant|>\n",
    "no end": "### Response:\n",
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|User|>"]


def sentencepiece_like():
    """A BPE with spaces as letters, bytes for unknown letters, and a space put before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=pieces + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, *TEMPLATES.values()] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def merging():
    """A byte-level BPE whose tokens run across the markers: it knows no pre-tokenisation and no special marker."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{opening}{word}" for opening in OPENINGS.values() for word in ("a", "1", "The", " it", "\n\nNow")] * 9
    texts += [f"{word}{end}" for _, end, _ in REPLIES.values() for word in ("a", "s.", "it")] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def plain():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def names_of_templates():
    from pantheraml.data.templates.registry import templates

    return sorted({template.name for template in templates().values()})


@functools.cache
def tokenizer_for(kind, template):
    tokenizer = {"special": plain, "merging": merging, "sentencepiece": sentencepiece_like}[kind]()
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def oracle(messages, template, tokenizer, *, last_only=False):
    """Token ids and labels, from the replies written down by hand."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    form, end, final = REPLIES[template]
    trained = [False] * len(text)
    cursor, spans = 0, []
    for index, message in enumerate(messages):
        content = message["content"].strip() if template in TRIMMED else message["content"]
        last = index == len(messages) - 1
        if message["role"] != "assistant":
            cursor = text.index(content, cursor) + len(content)
            continue
        if template == "thinking":
            content = "<think>\n\n</think>\n\n" + content if last else content.lstrip("\n")
        reply = form.format(content) + (final if last else end)
        opening = OPENINGS[template]
        cursor = text.index(opening, cursor) + len(opening)
        assert text.startswith(reply, cursor)
        spans.append((cursor, cursor + len(reply.rstrip() if template == "no end" else reply)))
        cursor += len(reply)
    for start, stop in spans[-1:] if last_only else spans:
        trained[start:stop] = [True] * (stop - start)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    return ids, [
        token if any(trained[start:stop]) else -100 for token, (start, stop) in zip(ids, encoded["offset_mapping"])
    ]


MARKER_LIKE = re.compile(r"[<\[]|#|\|>")
WORDS = st.text(alphabet="aet Tq1.,:/>]\n éß漢😀", min_size=1, max_size=12).filter(
    lambda text: text.strip() and not MARKER_LIKE.search(text)
)


@st.composite
def conversations(draw):
    chat = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        chat += [{"role": "user", "content": draw(WORDS)}, {"role": "assistant", "content": draw(WORDS)}]
    return chat


def shown(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != -100])


CASES = [(kind, name) for name in TEMPLATES for kind in ("special", "merging", "sentencepiece")]
# Without special tokens nothing tells where its two different ends begin.
CASES = [case for case in CASES if case[1] != "two ends" or case[0] == "special"]


@pytest.mark.parametrize(("kind", "template"), CASES, ids=lambda value: value)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chat=conversations(), last_only=st.booleans())
def test_labels_are_the_replies_and_their_ends(kind, template, chat, last_only):
    tokenizer = tokenizer_for(kind, template)
    ids, wanted = oracle(chat, template, tokenizer, last_only=last_only)
    assert assistant_masks(chat, tokenizer, last_response_only=last_only) == (ids, wanted)
    assert mask_non_responses(ids, tokenizer, last_response_only=last_only) == wanted


@pytest.mark.parametrize(("kind", "template"), CASES, ids=lambda value: value)
def test_markers_of_templates(kind, template):
    _, end, final = REPLIES[template]
    markers = detect_markers(tokenizer_for(kind, template))
    assert markers.response == OPENINGS[template]
    assert set(markers.ends) == {end, final.split("\n")[0]} - {""}
    assert markers.instruction


def with_template(template, base=plain, **changes):
    tokenizer = base()
    tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def trained(chat, tokenizer, **options):
    """What is trained, by the messages and by the token ids, which must be the same."""
    ids, labels = assistant_masks(chat, tokenizer, **options)
    assert len(ids) == len(labels)
    assert labels == mask_non_responses(ids, tokenizer)
    return shown(tokenizer, labels)


def user(text):
    return {"role": "user", "content": text}


def bot(text, **extra):
    return {"role": "assistant", "content": text, **extra}


def test_by_hand():
    tokenizer = tokenizer_for("special", "chatml")
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = mask_non_responses(ids, tokenizer)
    reply = tokenizer("yo<|im_end|>", add_special_tokens=False)["input_ids"]
    assert labels == [-100] * (len(ids) - len(reply) - 1) + reply + [-100]


def test_turns_of_tools_and_two_replies_in_a_row():
    chat = [user("what time?"), bot("<tool>clock</tool>"), {"role": "tool", "content": "12:00"}, bot("noon")]
    chat += [bot("exactly"), user("thanks"), bot("welcome")]
    assert trained(chat, tokenizer_for("special", "chatml")) == (
        "<tool>clock</tool><|im_end|>noon<|im_end|>exactly<|im_end|>welcome<|im_end|>"
    )


@pytest.mark.parametrize("name", names_of_templates())
def test_every_template_by_name(name):
    """Both ways agree, every reply is trained whole, and what stops generation ends it."""
    tokenizer = plain()
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, "<|im_sep|>", "<|end_of_turn|>"]})
    tokenizer = get_chat_template(tokenizer, name)
    chat = [{"role": "system", "content": "Be kind."}, user("howdy"), bot("hello there"), user("more?"), bot("the end")]
    text = trained(chat, tokenizer)
    closing = detect_markers(tokenizer).ends
    _, _, rest = text.partition("hello there")
    assert rest.lstrip(" ").startswith(closing)
    stops = tuple(tokenizer.decode([token]) for token in {*stop_token_ids(tokenizer), tokenizer.eos_token_id})
    assert text.endswith(stops)
    assert "the end" in rest
    assert not any(word in text for word in ("howdy", "more", "kind", "user", "assistant", "User"))


def test_a_reply_that_is_a_tool_call_only():
    template = TEMPLATES["chatml"].replace("{{ m.content }}", "{{ m.content or '' }}{{ m.tool_calls or '' }}")
    chat = [user("what time?"), bot(None, tool_calls="clock()"), {"role": "tool", "content": "12:00"}, bot("noon")]
    assert trained(chat, with_template(template)) == "clock()<|im_end|>noon<|im_end|>"


def test_thinking_is_trained_where_the_template_keeps_it():
    chat = [user("a"), bot("<think>\nx\n</think>\n\nb"), user("c"), bot("<think>\ny\n</think>\n\nd")]
    tokenizer = tokenizer_for("special", "thinking")
    assert trained(chat, tokenizer) == "b<|im_end|><think>\ny\n</think>\n\nd<|im_end|>"
    tokenizer = tokenizer_for("special", "prompted thinking")
    # The prompt ends with "<think>\n" there, so the model is not to write it.
    assert trained(chat, tokenizer) == "x\n</think>\n\nb<|end|>y\n</think>\n\nd<|end|>"


def test_a_reply_that_begins_with_the_letters_of_a_prefill():
    """The prompt goes on with "Thought:", which earlier replies have not; theirs begin alike by chance."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|bot|>"
        "{{ 'Thought: ' if loop.last }}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>Thought: {% endif %}"
    )
    tokenizer = with_template(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>", "<|end|>"]})
    chat = [user("hi"), bot("Though small"), user("more"), bot("The end")]
    assert trained(chat, tokenizer) == "Though small<|end|>The end<|end|>"


def test_a_template_that_rewrites_what_came_before():
    """The system message stands in the last user turn, as in some of Mistral's."""
    template = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]"
        "{{ messages[0].content + ' ' if m == messages[-2] and messages[0].role == 'system' }}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "system", "content": "Be kind."}, user("a"), bot("b"), user("c"), bot("d")]
    assert trained(chat, with_template(template)) == " b</s> d</s>"


def test_a_reply_that_the_template_rewrites_and_a_later_turn_quotes():
    template = TEMPLATES["two ends"].replace(
        "final<|message|>{{ m.content }}", "final<|message|>{{ m.content | replace('yes', 'no') }}"
    )
    chat = [user("a"), bot("yes"), user("why yes?"), bot("so")]
    end = "<|channel|>final<|message|>"
    assert trained(chat, with_template(template)) == f"{end}no<|end|>{end}so<|return|>"


def test_a_template_without_a_generation_prompt():
    template = TEMPLATES["chatml"].partition("{% if add_generation_prompt")[0]
    assert trained([user("a"), bot("b"), user("c"), bot("d")], with_template(template)) == "b<|im_end|>d<|im_end|>"


def test_a_template_that_refuses_to_begin_with_the_assistant():
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATES["chatml"]
    assert trained([user("a"), bot("b")], with_template(template)) == "b<|im_end|>"


def test_a_conversation_that_the_assistant_begins():
    assert trained([bot("a"), user("b"), bot("c")], tokenizer_for("special", "zephyr")) == "a</s>c</s>"


def test_a_reply_may_quote_a_marker():
    template = "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content }}"
    template += (
        "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"
    )
    chat = [user("a"), bot("it says USER: b"), user("c"), bot("or ASSISTANT: d")]
    assert trained(chat, with_template(template)) == " it says USER: b</s> or ASSISTANT: d</s>"


def test_contents_in_parts():
    template = TEMPLATES["chatml"].replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (user("a"), bot("b"))]
    assert trained(chat, with_template(template)) == "b<|im_end|>"


def test_markers_that_a_user_types_open_no_reply():
    tokenizer = tokenizer_for("special", "chatml")
    chat = [user("x<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>"), bot("true")]
    ids, labels = assistant_masks(chat, tokenizer)
    assert shown(tokenizer, labels) == "true<|im_end|>"
    typed = tokenizer("<|im_start|>assistant\nfake<|im_end|>", add_special_tokens=False, split_special_tokens=True)
    typed = typed["input_ids"]
    assert not set(typed) & set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    assert set(mask_non_responses(typed + ids[:1] + typed, tokenizer)) == {-100}


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_padding_after_a_reply_is_not_trained(pad):
    tokenizer = with_template(TEMPLATES["zephyr"], pad_token=pad)
    ids, _ = assistant_masks([user("a"), bot("b")], tokenizer)
    cut = ids[:-2]  # without what ends the reply
    assert shown(tokenizer, mask_non_responses(ids + [tokenizer.pad_token_id] * 3, tokenizer)) == "b</s>"
    assert shown(tokenizer, mask_non_responses([*cut, tokenizer.pad_token_id], tokenizer)) == (
        "b" if pad == "<pad>" else "b</s>"
    )


def test_the_end_of_sequence_after_the_last_turn_is_trained_as_well():
    """A template's end of turn may be plain text that the model does not stop at."""
    tokenizer = tokenizer_for("merging", "chatml")
    text = tokenizer.apply_chat_template([user("a"), bot("b"), user("c"), bot("d")], tokenize=False) + "</s>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert shown(tokenizer, mask_non_responses(ids, tokenizer)).endswith("d<|im_end|>\n</s>")


ALPACA = {"instruction_part": "### Instruction:\n", "response_part": "### Response:\n"}


@pytest.mark.parametrize("base", [plain, merging, sentencepiece_like], ids=["special", "merging", "sentencepiece"])
@pytest.mark.parametrize("answer", ["five", " five", "\n\nfive\n", "5"])
def test_given_markers(base, answer):
    tokenizer = base()
    text = f"### Instruction:\nadd\n### Response:\n{answer}\n### Instruction:\nmore\n\n### Response:\nsix</s>"
    labels = mask_non_responses(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer, **ALPACA)
    assert shown(tokenizer, labels).strip().startswith(answer.strip())
    assert shown(tokenizer, labels).endswith("six</s>")
    assert "Instruction" not in shown(tokenizer, labels)
    assert "more" not in shown(tokenizer, labels)


def test_force_match_is_about_the_space_around_markers():
    tokenizer = plain()
    ids = tokenizer("### Instruction: add ### Response: five</s>", add_special_tokens=False)["input_ids"]
    assert set(mask_non_responses(ids, tokenizer, **ALPACA)) == {-100}
    assert shown(tokenizer, mask_non_responses(ids, tokenizer, **ALPACA, force_match=False)) == " five</s>"


def test_a_vocabulary_without_spaces():
    """WordPiece writes words only, and in small letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[PAD]", "[SEP]", "#", "user", "assistant", ":", "!", "hello", "how", "are", "you"]
    words += ["fine", "thank", "##s"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[SEP]",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        LOOP + "# {{ m.role | capitalize }}: {{ m.content }}[SEP]{% endfor %}" + ASK + "# Assistant:{% endif %}"
    )
    chat = [user("Hello, how are you?"), bot("Fine!"), user("hello"), bot("thanks")]
    assert trained(chat, fast) == "fine! [SEP] thanks [SEP]"


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, "the tokenizer has no chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", {}, "nothing marks where"),
        ("{{ raise_exception('never') }}", {}, "does not render"),
        (TEMPLATES["chatml"], {"response_part": "x"}, "instruction_part is missing"),
        (TEMPLATES["chatml"], {"instruction_part": "x"}, "response_part is missing"),
        (TEMPLATES["chatml"], {"instruction_part": "x", "response_part": " \n"}, "response_part is blank"),
    ],
)
def test_what_cannot_be_found_is_said(template, options, message):
    with pytest.raises(ConfigError, match=message):
        mask_non_responses([3, 4], with_template(template), **options)


def test_token_ids_of_another_tokenizer():
    with pytest.raises(DataError, match="token id 99999 is not in the vocabulary"):
        mask_non_responses([3, 99999], tokenizer_for("special", "chatml"))


def test_tokens_added_later_are_known():
    tokenizer = with_template(TEMPLATES["chatml"])
    assert trained([user("a"), bot("b")], tokenizer) == "b<|im_end|>"
    tokenizer.add_tokens(["newword"])
    assert trained([user("a"), bot("newword")], tokenizer) == "newword<|im_end|>"


def test_the_order_of_tokens_is_the_same_in_every_process():
    """Caches of mapped rows are found again only if the masker is the same, byte for byte."""
    added = pieces_of(tokenizer_for("special", "chatml")).added
    assert len(added) > 10
    assert list(added) == sorted(added, key=lambda token: (-len(token), token))
