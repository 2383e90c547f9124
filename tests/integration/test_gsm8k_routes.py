"""Questions and answers give the same supervised text as alpaca rows, as chats and as prompt with completion.

With the variable PANTHERAML_TEST_GSM8K naming a folder of jsonl files (``question``, ``answer``), also for those.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, build_tokenizer, make_tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from pantheraml.chat_templates import train_on_responses_only
from pantheraml.data import sources
from pantheraml.data.formats import alpaca_prompt, detect, to_training_rows

FOLDER = os.environ.get("PANTHERAML_TEST_GSM8K")
SAMPLE = [
    ("A box holds 6 eggs. How many eggs are in 7 boxes?", "7 boxes hold 7*6 = <<7*6=42>>42 eggs.\n#### 42"),
    ("Ines reads 12 pages a day. How long for 84 pages?", "She needs 84/12 = <<84/12=7>>7 days.\n#### 7"),
    ("Tea costs $3 and cake $4.50. What do both cost?", "$3 + $4.50 = $<<3+4.5=7.5>>7.50.\n#### 7.5"),
    (
        "Half of 30 birds fly off. How many stay?",
        "30/2 = <<30/2=15>>15 fly off.\n30-15 = <<30-15=15>>15 stay.\n#### 15",
    ),
    ("A train goes 90 km in an hour.\nHow far in 2.5 hours?", "It goes 90*2.5 = <<90*2.5=225>>225 km.\n#### 225"),
    ("Søren has 5 € and spends 20%. What is left?", "He spends 5*.2 = <<5*.2=1>>1 €.\n5-1 = <<5-1=4>>4 €.\n#### 4"),
    ("What is 3 + 4?", "7"),
    ("How much is ten less ten?", "0\n\n#### 0"),
    ("'Twelve' has how many letters?", '"twelve" has <<6=6>>6 letters: t, w, e, l, v, e\n#### 6'),
    ("Explain the word Response: in a form.", "It is where the reply stands, after ### and a word.\n#### none"),
    ("  Two spaces first: how many?  ", "There are two  of them.\n#### 2"),
    ("Count to three 🙂", "1 🙂\n2 🙂\n3 🙂\n#### 3"),
]
QUESTION, _, AFTER = alpaca_prompt("@").partition("@")
# A chat template that writes the very prompt of the other two routes.
EQUAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ QUESTION + m['content'] + AFTER }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
).replace("QUESTION + m['content'] + AFTER", f"{QUESTION!r} + m['content'] + {AFTER!r}")
ROUTES = {
    "alpaca": lambda question, answer: {"instruction": question, "input": "", "output": answer},
    "messages": lambda question, answer: {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    },
    "prompt_completion": lambda question, answer: {"prompt": alpaca_prompt(question), "completion": answer},
}


@pytest.fixture(scope="module")
def model():
    return make_tiny()


def load(path):
    return [(row["question"], row["answer"]) for row in sources.load(path).dataset]


def trained_rows(kind, pairs, tokenizer, model, tmp_path):
    """Token ids and labels of each row, in order, as the trainer holds them."""
    dataset = Dataset.from_list([ROUTES[kind](question, answer) for question, answer in pairs])
    format = detect(dataset)
    assert format.kind == kind
    rows = to_training_rows(dataset, format, tokenizer)
    config = SFTConfig(output_dir=str(tmp_path), max_length=None, report_to=[], use_cpu=True, shuffle_dataset=False)
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    if kind == "alpaca":
        marks = {"instruction_part": "### Instruction:\n", "response_part": "### Response:\n"}
        trainer = train_on_responses_only(trainer, **marks)
    elif kind == "messages":
        trainer = train_on_responses_only(trainer)
    return trainer.train_dataset["input_ids"], trainer.train_dataset["labels"]


def check_routes(pairs, template, model, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    wanted = [answer + tokenizer.eos_token for _, answer in pairs]
    ids = {}
    for kind in ROUTES:
        ids[kind], labels = trained_rows(kind, pairs, tokenizer, model, tmp_path)
        supervised = [tokenizer.decode([label for label in row if label != -100]) for row in labels]
        assert supervised == wanted, kind
    assert ids["alpaca"] == ids["prompt_completion"]
    assert (ids["messages"] == ids["alpaca"]) == (template == EQUAL_TEMPLATE)


@pytest.mark.parametrize("template", [EQUAL_TEMPLATE, CHAT_TEMPLATE], ids=["same-prompt", "chat-markers"])
def test_three_routes_train_on_the_answers(template, model, tmp_path):
    check_routes(SAMPLE, template, model, tmp_path)


@pytest.mark.skipif(not FOLDER, reason="PANTHERAML_TEST_GSM8K names no folder")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("template", [EQUAL_TEMPLATE, CHAT_TEMPLATE], ids=["same-prompt", "chat-markers"])
def test_three_routes_train_on_the_answers_of_gsm8k(template, model, tmp_path):
    files = sorted(Path(FOLDER or "").glob("*.jsonl"))
    assert files
    check_routes([pair for file in files for pair in load(file)], template, model, tmp_path)
