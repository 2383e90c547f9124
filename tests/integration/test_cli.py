"""The commands on tiny local models: they train, save, reload and talk, and mistakes end with a message and a code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pantheraml.cli import main
from pantheraml.cli.commands import doctor
from pantheraml.cli.commands.demo import MARKER, exact_match, prepare
from pantheraml.errors import ConfigError

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "general greetings"}]
FILES = {
    "alpaca.json": json.dumps([{"instruction": "Add.", "input": "two three", "output": "five"}] * 8),
    "chat.jsonl": "\n".join([json.dumps({"messages": CHAT})] * 8),
    "sharegpt.jsonl": "\n".join(
        [json.dumps({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]})] * 8
    ),
    "qa.csv": "question,answer\n" + "what is two plus three?,five\n" * 8,
    "text.jsonl": "\n".join([json.dumps({"text": "The quick brown fox."})] * 8),
    "book.txt": "The quick brown fox jumps over the lazy dog. " * 60,
}


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(content)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["2+3="] * 8, "completion": ["5"] * 8}), folder / "rows.parquet")
    return folder


def train(model, dataset, out, *flags, source="--dataset"):
    argv = ["--model_name", str(model), source, str(dataset), "--output_dir", str(out), "--max_steps", "2"]
    argv += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--warmup_steps", "0"]
    return main([*argv, "--learning_rate", "1e-2", "--r", "4", "--lora_alpha", "8", *flags])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("alpaca.json", "alpaca"),
        ("chat.jsonl", "messages"),
        ("sharegpt.jsonl", "messages"),
        ("qa.csv", "prompt_completion"),
        ("text.jsonl", "text"),
        ("rows.parquet", "prompt_completion"),
        ("book.txt", "text"),
    ],
)
def test_one_shot_fine_tune(tiny_llama_dir, files, tmp_path, capsys, name, kind):
    out = tmp_path / "out"
    assert train(tiny_llama_dir, files / name, out) == 0
    printed, logged = capsys.readouterr()
    assert f"Format: {kind}" in printed
    assert str(files / name) in printed
    assert f"The adapter is in {out}" in printed
    assert not set(map(chr, range(32))) - {"\n", "\t"} & set(printed + logged)

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model = PeftModel.from_pretrained(base, out)
    lora_b = {key: value for key, value in model.state_dict().items() if "lora_B" in key}
    assert len(lora_b) == 14
    assert all(value.abs().max() > 0 for value in lora_b.values())
    assert all(value.shape[1] == 4 for value in lora_b.values())
    run = json.loads((out / "pantheraml-run.json").read_text())
    assert run["flags"]["r"] == {"value": 4, "given": True}
    assert run["flags"]["seed"] == {"value": 3407, "given": False}
    assert "hub_token" not in run["flags"]


def test_data_sets_are_mixed_by_their_weights(tiny_llama_dir, files, tmp_path, capsys):
    bad = files / "bad.jsonl"
    bad.write_text((files / "chat.jsonl").read_text() + "\n{\n")
    out = tmp_path / "out"
    flags = ["--mix", str(files / "sharegpt.jsonl"), "3", "--mix", str(bad), "1", "--max_bad_fraction", "0.2"]
    assert train(tiny_llama_dir, files / "chat.jsonl", out, *flags, "--mix_stop", "all_exhausted", "--json") == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert (record["rows"], record["rejected"], record["format"]) == (24, 1, "messages")
    assert f"20% of {files / 'chat.jsonl'}, 60% of {files / 'sharegpt.jsonl'}, 20% of {bad}" in printed.err
    assert json.loads((out / "rejected.jsonl").read_text())["where"] == f"{bad}:9"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--mix", "chat.jsonl", "0"], 2, "number above 0"),
        (["--mix", "chat.jsonl", "much"], 2, "number above 0"),
        (["--mix", "text.jsonl", "1"], 3, "different columns"),
    ],
)
def test_mixtures_that_cannot_be_made(flags, code, words, tiny_llama_dir, files, tmp_path, capsys):
    flags[1] = str(files / flags[1])
    assert train(tiny_llama_dir, files / "chat.jsonl", tmp_path / "out", *flags) == code
    assert words in capsys.readouterr().err


def test_merged_model_and_json_record(tiny_llama_dir, files, tmp_path, capsys):
    merged = tmp_path / "merged"
    flags = ("--save_model", "--save_path", str(merged), "--json", "--eval_dataset", str(files / "alpaca.json"))
    assert train(tiny_llama_dir, files / "alpaca.json", tmp_path / "out", *flags) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] == 2
    assert record["rows"] == 8
    assert record["metrics"]["eval_loss"] > 0
    assert record["saved"]["merged_16bit"] == str(merged)

    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tuned = AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.arange(12)[None]
    assert (stock(ids).logits - tuned(ids).logits).abs().max() > 1e-3
    assert not (merged / "adapter_config.json").exists()


def test_push_gets_repository_method_and_token_and_writes_no_token(tiny_llama_dir, files, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "pantheraml.save.push_to_hub_merged", lambda model, *args, **kwargs: calls.append((args, kwargs))
    )
    flags = ("--push_model", "--hub_path", "me/mine", "--hub_token", "hf_secret", "--save_method", "lora")
    assert train(tiny_llama_dir, files / "text.jsonl", tmp_path / "out", *flags) == 0
    [((repository, tokenizer), options)] = calls
    assert repository == "me/mine"
    assert hasattr(tokenizer, "eos_token")
    assert options == {"save_method": "lora", "token": "hf_secret"}
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path


def test_full_fine_tuning(tiny_llama_dir, files, tmp_path):
    argv = ["--model_name", str(tiny_llama_dir), "--dataset", str(files / "text.jsonl"), "--max_steps", "1"]
    argv += ["--warmup_steps", "0", "--full_finetuning"]
    assert main([*argv, "--output_dir", str(tmp_path / "out")]) == 0

    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


def test_going_on_from_a_checkpoint(tiny_llama_dir, files, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(tiny_llama_dir, files / "text.jsonl", out, "--save_steps", "1", "--resume", "auto") == 0
    assert (out / "checkpoint-2").is_dir()
    assert "starting anew" in capsys.readouterr().err
    argv = ("--max_steps", "3", "--save_steps", "1", "--resume", "auto", "--json")
    assert train(tiny_llama_dir, files / "text.jsonl", out, *argv) == 0
    out_text, err = capsys.readouterr()
    assert "checkpoint-2" in err
    assert json.loads(out_text)["steps"] == 3
    assert train(tiny_llama_dir, files / "text.jsonl", out, "--resume", str(files)) == 2


def test_an_adapter_is_trained_further_with_its_own_settings(tiny_llama_dir, files, tmp_path, capsys):
    from safetensors.torch import load_file

    first, second = tmp_path / "first", tmp_path / "second"
    assert train(tiny_llama_dir, files / "text.jsonl", first) == 0
    argv = ["--dataset", str(files / "text.jsonl"), "--max_steps", "1", "--warmup_steps", "0"]
    assert main(["--model_name", str(first), "--output_dir", str(second), *argv, "--r", "4"]) == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}
    assert any(not torch.equal(before[key], after[key]) for key in before)
    capsys.readouterr()
    for flags, words in ((["--r", "8"], "--r 8 does not fit"), (["--random_state", "1"], "its trained weights")):
        assert main(["--model_name", str(first), "--output_dir", str(tmp_path / "third"), *argv, *flags]) == 2
        assert words in capsys.readouterr().err


def test_text_with_markup_and_escapes_is_only_text(tiny_llama_dir, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps({"text": "\x1b[31m [/] [link=x]y <|user|>"})] * 4))
    assert train(tiny_llama_dir, path, tmp_path / "out") == 0
    assert "\x1b" not in "".join(capsys.readouterr())


@pytest.mark.slow
def test_demo_keeps_its_promise_and_its_model_talks(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--output_dir", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["exact_match_before"] < 0.1
    assert record["exact_match_after"] > 0.9
    assert all(Path(path).exists() for path in record["files"].values())
    assert f"pantheraml chat {folder / 'merged'}" in err
    prompt = "Order: Sander from Auckland wants 8 blue guitars by Saturday."
    for name in ("merged", "adapter"):
        assert main(["chat", str(folder / name), "--prompt", prompt, "--temperature", "0"]) == 0
        assert '"city": "Auckland"' in capsys.readouterr().out


def test_raw_text_file(tiny_llama_dir, files, tmp_path, capsys):
    flags = ("--chunk_size", "64", "--stride", "16")
    assert train(tiny_llama_dir, files / "book.txt", tmp_path / "out", *flags, source="--raw_text_file") == 0
    assert "chunks of up to 64 tokens, 16 shared" in capsys.readouterr().out
    flags = ("--chunk_size", "512")
    assert train(tiny_llama_dir, files / "book.txt", tmp_path / "o2", *flags, source="--raw_text_file") == 2
    assert "--chunk_size 512 is more than" in capsys.readouterr().err


def test_tolerated_rows_are_written_beside_the_output(tiny_llama_dir, files, tmp_path, capsys):
    path = files / "bad.jsonl"
    path.write_text(FILES["text.jsonl"] + '\n{"text": \n')
    assert train(tiny_llama_dir, path, tmp_path / "out", "--max_bad_fraction", "0.2") == 0
    assert "Dropped 1 of 9 rows" in capsys.readouterr().out
    [line] = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == f"{path}:9"


@pytest.mark.parametrize(
    "name", ["alpaca.json", "chat.jsonl", "sharegpt.jsonl", "qa.csv", "text.jsonl", "rows.parquet"]
)
def test_streams_are_trained_on(tiny_llama_dir, files, tmp_path, capsys, name):
    """The losses are those of the same rows read beforehand, which are all alike."""
    losses = []
    for number, flags in enumerate(([], ["--streaming", "--shuffle_buffer", "3"], ["--streaming", "--packing"])):
        out = tmp_path / f"out{number}"
        assert train(tiny_llama_dir, files / name, out, "--json", *flags) == 0
        record = json.loads(capsys.readouterr().out)
        losses.append(record["metrics"]["train_loss"])
        assert record["rows"] == (None if flags else 8)
        assert record["steps"] == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=0.1)


def test_bad_rows_of_a_stream(tiny_llama_dir, files, tmp_path, capsys):
    path, out = files / "bad.jsonl", tmp_path / "out"
    path.write_text(FILES["text.jsonl"] + '\n{"text": \n{"text": " "}\n' + FILES["text.jsonl"])
    assert train(tiny_llama_dir, path, out, "--streaming", "--max_bad_fraction", "0.2", "--max_steps", "20") == 0
    assert f"Dropped 2 rows, see {out / 'rejected.jsonl'}" in capsys.readouterr().out
    lines = (out / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"] for line in lines] == [f"{path}:9", f"{path}:10"]
    assert train(tiny_llama_dir, path, tmp_path / "out2", "--streaming") == 3
    assert f"{path}:9: broken json" in capsys.readouterr().err
    # A row beyond those that are looked at first stops the training that has begun.
    path.write_text((FILES["text.jsonl"] + "\n") * 126 + "{\n")
    flags = ["--streaming", "--shuffle_buffer", "0", "--max_steps", "600"]
    assert train(tiny_llama_dir, path, tmp_path / "out3", *flags) == 3
    assert f"{path}:1009: broken json" in capsys.readouterr().err


def test_streams_are_mixed_and_evaluated(tiny_llama_dir, files, tmp_path, capsys):
    flags = ["--mix", str(files / "sharegpt.jsonl"), "3", "--eval_dataset", str(files / "chat.jsonl"), "--json"]
    assert train(tiny_llama_dir, files / "chat.jsonl", tmp_path / "out", "--streaming", *flags) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["metrics"]["eval_loss"] > 0
    assert f"rows are drawn: 25% of {files / 'chat.jsonl'}, 75% of" in printed.err


MISTAKES = {
    "stream of text": ({"bad.jsonl": "", "a.txt": "x"}, ["--streaming", "--raw_text_file", "a.txt"], 2, "contradict"),
    "epochs of a stream": ({"bad.jsonl": "{}"}, ["--streaming", "--num_train_epochs", "1"], 2, "contradict"),
    "stream cut off": (
        {"bad.jsonl": json.dumps({"prompt": "fox " * 300, "completion": "x"})},
        ["--streaming"],
        3,
        "no row has a token to train",
    ),
    "broken-line": ({"bad.jsonl": '{"text": "a"}\n{"text": \n'}, [], 3, "bad.jsonl:2: broken json"),
    "no-columns": ({"bad.jsonl": '{"a": "x", "b": "y"}'}, [], 3, "found: a, b"),
    "empty": ({"bad.jsonl": ""}, [], 3, "the data set is empty"),
    "no-column": ({"bad.jsonl": '{"a": "x"}'}, ["--text_column", "b"], 3, "there is no column 'b'"),
    "no-file": ({}, [], 3, "there is no data file"),
    "dtype": ({"bad.jsonl": '{"text": "x"}'}, ["--dtype", "float17"], 2, "float17"),
    "reporter": ({"bad.jsonl": '{"text": "x"}'}, ["--report_to", "dagshub"], 2, "dagshub"),
    "optimizer": ({"bad.jsonl": '{"text": "x"}'}, ["--optim", "adamw_torsh"], 2, "did you mean 'adamw_torch'"),
    "schedule": ({"bad.jsonl": '{"text": "x"}'}, ["--lr_scheduler_type", "cosin"], 2, "did you mean 'cosine'"),
    "loftq": ({"bad.jsonl": '{"text": "x"}'}, ["--loftq_config", "{"], 2, "loftq_config"),
    "escapes": ({"bad.jsonl": '{"\\u001b[31m": "x", "[/red]": "y"}'}, [], 3, "found: \\x1b[31m, [/red]"),
    "output": ({"bad.jsonl": '{"text": "x"}'}, ["--output_dir", __file__], 2, "is a file"),
    "merged_4bit": ({"bad.jsonl": '{"text": "x"}'}, ["--save_model", "--save_method", "merged_4bit"], 2, "merged_4bit"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_a_message_and_a_code(tiny_llama_dir, tmp_path, capsys, mistake):
    contents, flags, code, words = MISTAKES[mistake]
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    assert train(tiny_llama_dir, tmp_path / "bad.jsonl", tmp_path / "out", *flags) == code
    err = capsys.readouterr().err
    assert words in err
    assert "  next:" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


LONG = json.dumps({"prompt": "fox " * 300, "completion": "x"})
REPLYLESS = json.dumps({"text": "The quick brown fox."})


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ("", [], "the data set is empty"),
        ('{"text": ""}', ["--max_bad_fraction", "0.9"], "1 of 1 rows cannot be used"),
        (f"{LONG}\n{LONG}", [], "no row has a token to train on"),
        (f"{LONG}\n{LONG}", ["--packing"], "no row has a token to train on"),
        (f"{REPLYLESS}\n{REPLYLESS}", ["--responses_only"], "no row has a token to train on"),
        (json.dumps({"messages": [CHAT[0], {**CHAT[1], "content": " "}]}), [], "empty string"),
    ],
    ids=["no row", "all bad", "all cut off", "all cut off, packed", "no reply", "empty reply"],
)
def test_data_that_teach_nothing_stop_before_weights_are_loaded(
    content, flags, words, streaming, tiny_llama_dir, tmp_path, capsys, monkeypatch
):
    from pantheraml.models.loader import FastLanguageModel

    monkeypatch.setattr(FastLanguageModel, "from_pretrained", None)
    (tmp_path / "rows.jsonl").write_text(content)
    flags = [*flags, *(["--streaming"] if streaming else [])]
    assert train(tiny_llama_dir, tmp_path / "rows.jsonl", tmp_path / "out", *flags) == 3
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
@pytest.mark.parametrize(("name", "expected"), [("chat.jsonl", "general greetings</s>"), ("qa.csv", "five</s>")])
def test_only_replies_are_trained_where_asked(
    name, expected, streaming, tiny_llama_dir, files, tmp_path, capsys, monkeypatch
):
    from trl import SFTTrainer

    seen = []

    def stop(self, *args, **options):
        seen.append(next(iter(self.train_dataset)))
        raise KeyError

    monkeypatch.setattr(SFTTrainer, "train", stop)
    flags = ["--responses_only", *(["--streaming"] if streaming else [])]
    assert train(tiny_llama_dir, files / name, tmp_path / "out", *flags) == 1
    from transformers import AutoTokenizer

    labels = [label for label in seen[0]["labels"] if label != -100]
    assert AutoTokenizer.from_pretrained(tiny_llama_dir).decode(labels) == expected


def test_chats_without_a_template(tiny_llama_dir, files, tmp_path, capsys):
    import shutil

    model = tmp_path / "base"
    shutil.copytree(tiny_llama_dir, model)
    (model / "chat_template.jinja").unlink()
    assert train(model, files / "chat.jsonl", tmp_path / "out") == 3
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["missing", "empty", "no-weights"])
def test_bad_model_folder(tiny_llama_dir, files, tmp_path, capsys, what):
    model = tmp_path / "model"
    if what != "missing":
        model.mkdir()
    if what == "no-weights":
        (model / "config.json").write_text((tiny_llama_dir / "config.json").read_text())
    for argv in (["--model_name", str(model), "--dataset", str(files / "text.jsonl")], ["chat", str(model)]):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert str(model) in err
        assert "Traceback" not in err


def test_chat_one_shot_is_greedy_generation(tiny_llama_dir, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = ["--prompt", "hello there", "--temperature", "0", "--max_new_tokens", "12"]
    assert main(["chat", str(tiny_llama_dir), *flags]) == 0
    printed = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    inputs = tokenizer.apply_chat_template(
        CHAT[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    from pantheraml.cli.output import printable

    assert printed == printable(tokenizer.decode(ids, skip_special_tokens=True)) + "\n"


def test_chat_reads_typed_control_tokens_as_text(tiny_llama_dir, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    seen, generate = [], LlamaForCausalLM.generate

    def recorded(self, *args, **inputs):
        seen.append(inputs["input_ids"][0].tolist())
        return generate(self, *args, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", recorded)
    for prompt in ("hello there", "hello</s>\n<|assistant|>\nyes<s>"):
        assert main(["chat", str(tiny_llama_dir), "--prompt", prompt, "--max_new_tokens", "4"]) == 0
    plain, typed = ([token for token in ids if token < 6] for ids in seen)
    assert plain == typed == [0, 3, 1, 4]


def piped(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_chat_reads_lines_and_prints_no_control_characters(tiny_llama_dir, capsys, monkeypatch):
    flags = ["--temperature", "0", "--max_new_tokens", "8", "--system", "be kind"]
    printed = []
    for text in ("hello\n", "hello\n\nagain\n/clear\nhello\n/exit\nnever\n"):
        piped(monkeypatch, text)
        assert main(["chat", str(tiny_llama_dir), *flags]) == 0
        printed.append(capsys.readouterr().out)
    first, conversation = printed
    assert not {character for character in conversation if ord(character) < 32} - {"\n", "\t"}
    assert conversation.startswith(first)
    assert conversation.endswith(first)
    assert len(conversation) > 2 * len(first)


def test_chat_remembers_and_forgets(tiny_llama_dir, tiny_tokenizer, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    from pantheraml.cli.commands.chat import Conversation
    from pantheraml.cli.parser import build_parser

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    args = build_parser("chat").parse(["x", "--system", "s", "--temperature", "0", "--max_new_tokens", "40"])
    conversation = Conversation(model, tiny_tokenizer, args)
    for _ in range(8):
        conversation.answer("hello there, how are you today?")
    roles = [message["role"] for message in conversation.messages]
    assert roles[0] == "system"
    assert roles[1:] == ["user", "assistant"] * ((len(roles) - 1) // 2)
    assert 3 <= len(roles) < 17
    length = len(tiny_tokenizer.apply_chat_template(conversation.messages[:-1], tokenize=True)["input_ids"])
    assert length + 40 <= model.config.max_position_embeddings
    with pytest.raises(ConfigError, match="leaves no room"):
        conversation.answer("word " * 300)
    assert len(conversation.messages) == len(roles)
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "s"}]


def test_chat_without_template_continues_text(tiny_llama_dir, capsys):
    assert main(["chat", str(tiny_llama_dir), "--plain", "--system", "s", "--prompt", "x"]) == 2
    assert "--system needs a chat template" in capsys.readouterr().err
    assert main(["chat", str(tiny_llama_dir), "--plain", "--prompt", "The quick", "--max_new_tokens", "4"]) == 0
    assert main(["chat", str(tiny_llama_dir), "--top_p", "2"]) == 2


def test_doctor_reports_and_json_agree(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"]["type"] in text
    for package in record["versions"]:
        assert package in text
    for entry in record["missing"]:
        assert entry["install"] in text
        assert entry["cost"] in text


def test_doctor_warns_of_vulnerable_and_missing_packages(capsys, monkeypatch):
    versions = {"torch": "2.9.1+cu130", "transformers": "5.2.9", "peft": None}
    real = doctor.installed_version
    monkeypatch.setattr(
        doctor, "installed_version", lambda name: versions.get(name, real(name)) if name in versions else real(name)
    )
    assert main(["doctor"]) == 0
    assert main(["doctor", "--strict"]) == 2
    text = capsys.readouterr().out
    for words in ("CVE-2026-4372", "CVE-2026-24747", "transformers>=5.3", "no LoRA", "pip install pantheraml"):
        assert words in text
    assert doctor.vulnerable({"torch": "2.10.0+cpu", "transformers": "5.3.0"}) == []


def test_console_script_and_checkout_script(tmp_path):
    for command in ([str(Path(sys.executable).with_name("pantheraml"))], [sys.executable, "pantheraml-cli.py"]):
        done = subprocess.run([*command, "--verzion"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert "did you mean '--version'?" in done.stderr


def test_demo_folder_is_replaced_only_if_the_demo_made_it(tmp_path):
    folder = tmp_path / "demo"
    prepare(folder)
    (folder / "old").write_text("x")
    prepare(folder)
    assert [path.name for path in folder.iterdir()] == [MARKER]
    (folder / MARKER).unlink()
    (folder / "mine").write_text("x")
    with pytest.raises(ConfigError, match="did not make"):
        prepare(folder)
    assert (folder / "mine").read_text() == "x"
    with pytest.raises(ConfigError, match="is no folder"):
        prepare(folder / "mine")
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(ConfigError, match="is no folder"):
        prepare(link)


def test_exact_match_ignores_outer_space_only():
    rows = [{"completion": "a b"}, {"completion": "c"}]
    assert exact_match([" a b\n", "c"], rows) == 1.0
    assert exact_match(["a  b", "c"], rows) == 0.5
