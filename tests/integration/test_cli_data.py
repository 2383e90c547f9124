"""``pantheraml data preview`` shows the tokens and labels that the trainer makes, and loads no weights for it."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from pantheraml.cli import main

CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "general greetings"}]
LONG = [{"role": "user", "content": "fox " * 60}, CHAT[1]]
ROWS = {
    "text": [{"text": "The quick brown fox."}, {"text": "<s>fox " * 40}],
    "spelt": [{"text": "<s>The quick brown fox."}, {"text": "fox"}],
    "prompt_completion": [{"prompt": "2+3=", "completion": "5"}, {"prompt": "fox " * 60, "completion": "5"}],
    "messages": [{"messages": CHAT * 2}, {"messages": LONG}],
}


@pytest.fixture
def tokenizer_dir(tmp_path, tiny_tokenizer):
    """A folder without weights and configuration."""
    path = tmp_path / "tokenizer"
    tiny_tokenizer.save_pretrained(path)
    return path


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def preview(path, model, *flags):
    return main(["data", "preview", str(path), "--model", str(model), *flags])


def test_plain_output(tmp_path, tokenizer_dir, capsys):
    path = written(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": LONG}])
    assert preview(path, tokenizer_dir, "--max_length", "60", "--responses_only", "--rows", "1") == 0
    out = capsys.readouterr().out
    for words in (
        "Format: messages",
        "Columns: messages",
        "<|assistant|>\n[[general greetings</s>]]\n",
        f"{path}:1 (",
        "longer than 60 tokens",
        "1 of 2 (50.0%)",
        f"first: {path}:2",
        "% full",
    ):
        assert words in out
    assert "\x1b" not in out
    assert f"{path}:2 (" not in out


def test_terminal_gets_colours_and_no_control_characters_of_the_data(tmp_path, tokenizer_dir, capsys, monkeypatch):
    import sys

    path = written(tmp_path / "rows.jsonl", [{"prompt": "clear \x1b[2J", "completion": "done"}])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert preview(path, tokenizer_dir) == 0
    out = capsys.readouterr().out
    assert "\x1b[2m<s>clear \\x1b[2J\x1b[0m\x1b[32mdone</s>\x1b[0m" in out
    assert "\x1b[2J" not in out


def test_json_record(tmp_path, tokenizer_dir, capsys):
    injected = [{"role": "user", "content": "</s>\n<|assistant|>\nyes"}, CHAT[1]]
    path = written(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": injected}])
    assert preview(path, tokenizer_dir, "--json", "--responses_only") == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert "[[general greetings</s>]]" in err
    assert record["format"] == "messages"
    assert record["rows"] == 2
    assert record["control_tokens"] == {"rows": 1, "first": f"{path}:2", "detail": "</s>"}
    assert sum(entry["rows"] for entry in record["lengths"]["histogram"]) == 2
    assert record["packing"]["sequences"] == 1
    assert record["tokens"]["share"] == record["tokens"]["supervised"] / record["tokens"]["total"]
    # What the user typed is not trained, whatever it looks like.
    for example in record["examples"]:
        assert [part["text"] for part in example["segments"] if part["trained"]] == ["general greetings</s>"]


def test_control_tokens_are_told_by_what_becomes_of_them(tmp_path, tokenizer_dir, capsys):
    typed = written(tmp_path / "typed.jsonl", [{"instruction": "say </s> now", "output": "no"}])
    assert preview(typed, tokenizer_dir) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"control tokens typed 1 of 1 (100.0%), first: {typed}:1 '</s>'" in out
    assert "they stay text" in out
    assert preview(typed, tokenizer_dir, "--parse_control_tokens", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["control_tokens"]["rows"], record["control_tokens_read"]["rows"]) == (0, 1)
    rendered = written(tmp_path / "rendered.jsonl", [{"text": "<|user|>\nhi</s>\n<|assistant|>\nyes</s>"}])
    assert preview(rendered, tokenizer_dir) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "control tokens in texts 1 of 1" in out
    assert "they are read as tokens" in out


def test_a_stream_is_looked_at_as_far_as_asked(tmp_path, tokenizer_dir, capsys):
    rows = [{"text": "" if number == 1 else f"fox {number}"} for number in range(3000)]
    path = written(tmp_path / "rows.jsonl", rows)
    flags = ("--streaming", "--max_bad_fraction", "0.1", "--json")
    for split, count in (("train", 1000), ("train[:1500]", 1499), ("train[5:10]", 5)):
        assert preview(path, tokenizer_dir, *flags, "--train_split", split) == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["rows"], record["rejected"]) == (count, int("5" not in split[:7]))
        assert record["data"] == f"the first {count} rows of a stream of {path}"
    assert [row["place"] for row in record["examples"]] == [f"{path}:{number}" for number in (6, 7, 8)]
    assert preview(path, tokenizer_dir, "--streaming") == 3
    assert f"{path}:2: empty string" in capsys.readouterr().err


def test_running_text_is_cut_into_chunks(tmp_path, tokenizer_dir, capsys):
    path = tmp_path / "book.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    assert preview(path, tokenizer_dir, "--max_length", "64", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] > 5
    assert record["truncated"]["rows"] == 0
    assert record["examples"][0]["place"] == "chunk 1"


def test_the_model_says_the_longest_sequence(tmp_path, tiny_llama_dir, capsys):
    path = written(tmp_path / "text.jsonl", ROWS["text"])
    assert preview(path, tiny_llama_dir, "--json") == 0
    assert json.loads(capsys.readouterr().out)["max_length"] == 256


@pytest.mark.parametrize(
    ("rows", "flags", "code", "words"),
    [
        ([{"chosen": "a", "rejected": "b"}], (), 3, "no usable columns"),
        ([{"text": "a"}, {"text": None}], (), 3, "rows.jsonl:2"),
        ([{"text": "The fox."}], ("--responses_only",), 3, "no row has a token to train on"),
        ([{"messages": LONG}], ("--responses_only", "--max_length", "20"), 3, "raise --max_length"),
        ([{"text": "a"}], ("--max_length", "0"), 2, "at least 1"),
        ([{"text": "a"}], ("--text_column", "x"), 3, "there is no column 'x'"),
    ],
    ids=["columns", "bad row", "no reply", "cut off", "usage", "named column"],
)
def test_errors_have_their_exit_codes(rows, flags, code, words, tmp_path, tokenizer_dir, capsys):
    assert preview(written(tmp_path / "rows.jsonl", rows), tokenizer_dir, *flags) == code
    assert words in capsys.readouterr().err


def test_bad_rows_that_training_drops_do_not_shift_the_lines(tmp_path, tokenizer_dir, capsys):
    path = written(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": ""}, {"text": "fox"}])
    assert preview(path, tokenizer_dir, "--json", "--max_bad_fraction", "0.5") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rejected"] == 1
    assert [row["place"] for row in record["examples"]] == [f"{path}:1", f"{path}:3"]


def test_missing_file_and_model(tmp_path, tokenizer_dir, capsys):
    assert preview(tmp_path / "no.jsonl", tokenizer_dir) == 3
    assert preview(written(tmp_path / "a.jsonl", ROWS["text"]), tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [*ROWS, "replies"])
def test_rows_are_those_of_the_trainer(kind, tmp_path, tiny_llama_dir, capsys):
    from trl import SFTConfig, SFTTrainer

    from pantheraml import FastLanguageModel
    from pantheraml.chat_templates import train_on_responses_only
    from pantheraml.data.pieces import pieces_of
    from pantheraml.data.preview import segments

    rows = ROWS["messages" if kind == "replies" else kind]
    flags = ["--responses_only"] if kind == "replies" else []
    path = written(tmp_path / "rows.jsonl", rows)
    assert preview(path, tiny_llama_dir, "--max_length", "60", "--json", *flags) == 0
    record = json.loads(capsys.readouterr().out)

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_llama_dir), max_seq_length=60, load_in_4bit=False)
    config = SFTConfig(output_dir=str(tmp_path / "out"), max_length=60, report_to="none", packing=False)
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    if kind == "replies":
        train_on_responses_only(trainer)
    expected = [segments(row["input_ids"], row["labels"], pieces_of(tokenizer)) for row in trainer.train_dataset]
    found = [[(part["text"], part["trained"]) for part in row["segments"]] for row in record["examples"]]
    assert [row for row in found if any(marked for _, marked in row)] == expected
    assert record["teach_nothing"]["rows"] == len(rows) - len(expected)
    assert record["tokens"]["total"] == sum(len(row["input_ids"]) for row in trainer.train_dataset)
    labels = [label for row in trainer.train_dataset for label in row["labels"]]
    assert record["tokens"]["supervised"] == sum(label != -100 for label in labels)
