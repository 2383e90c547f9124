"""train_on_responses_only on trainers: what reaches the model, whatever way the data came in."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tokenizer, make_tiny
from datasets import Dataset, DatasetDict
from training_support import panthera_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from pantheraml import log
from pantheraml.chat_templates import assistant_masks, mask_non_responses, train_on_responses_only
from pantheraml.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore")
PARTS = {"instruction_part": "<|user|>\n", "response_part": "<|assistant|>\n"}


def chat(index, turns=1):
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"what follows {index + turn}?"})
        messages.append({"role": "assistant", "content": f"{index + turn + 1}, after {index + turn}"})
    return messages


CHATS = [chat(index, turns=1 + index % 3) for index in range(12)]


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def messages(monkeypatch):
    told = []
    monkeypatch.setattr(log, "info", told.append)
    return told


def sft(folder, tokenizer, train, **options):
    from trl import SFTConfig, SFTTrainer

    keywords = {name: options.pop(name) for name in ("eval_dataset", "data_collator") if name in options}
    options = {"max_steps": 1, "optim": "adamw_torch", "per_device_train_batch_size": 4} | options
    args = SFTConfig(output_dir=str(folder), **options)
    model = panthera_model(max_seq_length=256)
    return SFTTrainer(model=model, processing_class=tokenizer, args=args, train_dataset=train, **keywords)


def expected(chats, tokenizer, **options):
    return [dict(zip(("input_ids", "labels"), assistant_masks(one, tokenizer, **options))) for one in chats]


def rows_of(dataset):
    return [{name: row[name] for name in ("input_ids", "labels")} for row in dataset]


def trained_text(batch, tokenizer):
    return [tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def replies(chats):
    return ["".join(m["content"] + "</s>" for m in one if m["role"] == "assistant") for one in chats]


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["found", "given"])
@pytest.mark.parametrize("form", ["messages", "text"])
def test_replies_and_nothing_else_reach_the_model(form, parts, tmp_path, tokenizer):
    column = {
        "messages": CHATS,
        "text": [tokenizer.apply_chat_template(one, tokenize=False).rstrip() for one in CHATS],
    }[form]
    trainer = sft(tmp_path, tokenizer, Dataset.from_dict({form: column}))
    assert all(label != -100 for row in trainer.train_dataset for label in row["labels"])
    assert train_on_responses_only(trainer, **parts) is trainer
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trained_text(batch, tokenizer) == replies(CHATS)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["labels"].clone()), with_kwargs=True
    )
    trainer.train()
    reached = [row[row != -100].tolist() for labels in seen for row in labels]
    assert reached
    every = [[label for label in row["labels"] if label != -100] for row in trainer.train_dataset]
    assert all(labels in every for labels in reached)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_labels_are_those_of_the_messages(packing, tmp_path, tokenizer):
    data = Dataset.from_dict({"messages": CHATS})
    trainer = sft(tmp_path, tokenizer, data, packing=packing, max_length=160)
    train_on_responses_only(trainer)
    found = rows_of(trainer.train_dataset)
    if packing:
        assert len(found) < len(CHATS)
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert "position_ids" in batch
        wanted = [label for row in trainer.train_dataset for label in row["labels"]]
        assert batch["labels"].flatten().tolist() == wanted
        found = [
            {name: row[name][start : start + length] for name in ("input_ids", "labels")}
            for row in trainer.train_dataset
            for start, length in zip(torch.tensor([0, *row["seq_lengths"]]).cumsum(0).tolist(), row["seq_lengths"])
        ]
    key = str
    assert sorted(found, key=key) == sorted(expected(CHATS, tokenizer), key=key)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_documents_of_a_packed_row_are_masked_one_by_one(strategy, tmp_path, tokenizer):
    long = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "0 1 2 3 4 5 6 7 8 9 " * 6}]
    data = Dataset.from_dict({"messages": [long, CHATS[0], CHATS[3], CHATS[2]]})
    trainer = sft(tmp_path, tokenizer, data, packing=True, packing_strategy=strategy, max_length=75)
    train_on_responses_only(trainer, last_response_only=True)
    documents = [d for row in trainer.train_dataset for d in torch.tensor(row["labels"]).split(row["seq_lengths"])]
    ids, labels = assistant_masks(long, tokenizer)
    wanted = [
        labels[:75],
        *(assistant_masks(one, tokenizer, last_response_only=True)[1][:75] for one in (CHATS[0], CHATS[3], CHATS[2])),
    ]
    if strategy == "bfd_split":
        # The rest of a divided reply stands without its beginning: it is not trained.
        wanted.append([-100] * (len(ids) - 75))
    assert max(len(row["seq_lengths"]) for row in trainer.train_dataset) > 1
    assert sorted(map(str, wanted)) == sorted(str(document.tolist()) for document in documents)


def test_evaluation_is_masked_like_training(tmp_path, tokenizer):
    data = Dataset.from_dict({"messages": CHATS})
    trainer = train_on_responses_only(sft(tmp_path, tokenizer, data, eval_dataset={"a": data, "b": data.select([0])}))
    assert rows_of(trainer.eval_dataset["a"]) == rows_of(trainer.train_dataset) == expected(CHATS, tokenizer)
    assert rows_of(trainer.eval_dataset["b"]) == expected(CHATS[:1], tokenizer)
    assert trainer.evaluate()["eval_a_loss"] > 0


def test_a_stream_gives_the_rows_of_the_map_style_data_set(tmp_path, tokenizer, messages):
    lost = [{"role": "user", "content": "a question without an answer"}]
    data = Dataset.from_dict({"messages": [*CHATS, lost]})
    still = train_on_responses_only(sft(tmp_path, tokenizer, data, eval_dataset=data))
    assert len(messages) == 1
    assert "train: 13 rows, of which 1 without" in messages[0]
    assert "eval: 13 rows, of which 1 without" in messages[0]
    flowing = train_on_responses_only(sft(tmp_path, tokenizer, data.to_iterable_dataset()))
    assert rows_of(flowing.train_dataset) == rows_of(still.train_dataset) == expected(CHATS, tokenizer)
    assert "1 of the first 13 rows" in messages[-1]
    flowing.train()


def test_truncated_rows_keep_what_is_left_of_their_replies(tmp_path, tokenizer, messages):
    wordy = [{"role": "user", "content": "0 1 2 3 4 5 6 7 8 9 " * 8}, {"role": "assistant", "content": "yes"}]
    data = Dataset.from_dict({"messages": [wordy, *CHATS]})
    trainer = train_on_responses_only(sft(tmp_path, tokenizer, data, max_length=40))
    wanted = [{name: ids[:40] for name, ids in row.items()} for row in expected(CHATS, tokenizer)]
    assert rows_of(trainer.train_dataset) == wanted
    assert any(len(row["input_ids"]) == 40 for row in wanted)
    assert "of which 1 without a reply (cut off" in messages[0]


@pytest.mark.parametrize(
    ("options", "parts", "cause"),
    [
        ({"max_length": 8}, {}, "is not in the first row: the row was cut off"),
        ({}, {"instruction_part": "### Q:", "response_part": "### A:"}, "'### A:' is not in the first row"),
    ],
    ids=["truncation", "other markers"],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["still", "streaming"])
def test_nothing_left_to_train_on_says_why(options, parts, cause, streaming, tmp_path, tokenizer):
    data = Dataset.from_dict({"messages": CHATS})
    trainer = sft(tmp_path, tokenizer, data.to_iterable_dataset() if streaming else data, **options)
    with pytest.raises(DataError, match="all 12 rows") as caught:
        train_on_responses_only(trainer, **parts)
    text = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert cause in text
    assert "<|user|>" in text  # the row, decoded
    assert "max_length" in text
    assert "response_part" in text


def test_labels_masked_before_stay_masked(tmp_path, tokenizer):
    rows = expected(CHATS, tokenizer)
    for row in rows:
        row["labels"] = [-100] * (len(row["labels"]) - 3) + row["input_ids"][-3:]
    trainer = train_on_responses_only(sft(tmp_path, tokenizer, Dataset.from_list(rows)))
    ends = [[-100] * (len(row["labels"]) - 3) + row["input_ids"][-3:-1] + [-100] for row in rows]
    assert [row["labels"] for row in trainer.train_dataset] == ends  # the last token is a newline


def test_a_prompt_may_hold_replies_that_are_not_trained(tmp_path, tokenizer):
    data = Dataset.from_dict({"prompt": [chat(1, turns=2)[:-1]], "completion": [chat(1, turns=2)[-1:]]})
    trainer = train_on_responses_only(sft(tmp_path, tokenizer, data))
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trained_text(batch, tokenizer) == ["3, after 2</s>"]


def test_last_response_only(tmp_path, tokenizer):
    trainer = sft(tmp_path, tokenizer, Dataset.from_dict({"messages": CHATS}))
    train_on_responses_only(trainer, last_response_only=True)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trained_text(batch, tokenizer) == replies([one[-1:] for one in CHATS])


def test_return_function(tmp_path, tokenizer):
    rows = expected(CHATS, tokenizer)
    function = train_on_responses_only(None, tokenizer=tokenizer, return_function=True, **PARTS)
    assert function({"input_ids": [row["input_ids"] for row in rows]}) == {"labels": [row["labels"] for row in rows]}
    mapped = Dataset.from_list(rows).remove_columns("labels").map(function, batched=True)
    assert rows_of(mapped) == rows


@pytest.mark.parametrize("missing", PARTS)
def test_one_marker_alone_is_refused(missing, tmp_path, tokenizer):
    trainer = sft(tmp_path, tokenizer, Dataset.from_dict({"messages": CHATS}))
    with pytest.raises(ValueError, match=f"{missing} is missing") as caught:
        train_on_responses_only(trainer, **{name: text for name, text in PARTS.items() if name != missing})
    assert isinstance(caught.value, ConfigError)


def stock(folder, tokenizer, collator):
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in expected(CHATS, tokenizer)])
    return Trainer(
        model=make_tiny("llama"),
        args=TrainingArguments(output_dir=str(folder), max_steps=1, per_device_train_batch_size=12, report_to="none"),
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
    )


def test_a_collator_that_makes_labels_of_the_token_ids_is_replaced(tmp_path, tokenizer, messages):
    trainer = stock(tmp_path, tokenizer, DataCollatorForLanguageModeling(tokenizer, mlm=False))
    train_on_responses_only(trainer)
    (batch,) = trainer.get_train_dataloader()
    assert sorted(trained_text(batch, tokenizer)) == sorted(replies(CHATS))
    assert any("DataCollatorForSeq2Seq takes its place" in message for message in messages)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_rows_tokenised_before_survive_a_collator_that_makes_its_own(tmp_path, tokenizer, streaming, capsys):
    rows = Dataset.from_dict({"input_ids": [[0, 5, 6, 1]] * 4, "labels": [[-100, -100, 6, 1]] * 4})
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    given = rows.to_iterable_dataset() if streaming else rows
    trainer = sft(tmp_path, tokenizer, given, data_collator=collator)
    batch = trainer.data_collator([{"input_ids": [0, 5, 6, 1], "labels": [-100, -100, 6, 1]}])
    assert batch["labels"].tolist() == [[-100, -100, 6, 1]]
    assert "DataCollatorForSeq2Seq takes its place" in capsys.readouterr().err


def test_a_collator_that_drops_labels_is_refused(tmp_path, tokenizer):
    def collator(features):
        batch = tokenizer.pad([{"input_ids": row["input_ids"]} for row in features], return_tensors="pt")
        return batch | {"labels": batch["input_ids"].clone()}

    with pytest.raises(ConfigError, match="does not keep the labels"):
        train_on_responses_only(stock(tmp_path, tokenizer, collator))


def test_rows_tokenised_by_the_collator_are_masked_there(tmp_path, tokenizer):
    def collator(features):
        texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in features]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        return batch | {"labels": batch["input_ids"].clone()}

    trainer = stock(tmp_path, tokenizer, collator)
    trainer.args.remove_unused_columns = False
    trainer.train_dataset = Dataset.from_dict({"messages": CHATS})
    train_on_responses_only(trainer)
    (batch,) = trainer.get_train_dataloader()
    assert sorted(trained_text(batch, tokenizer)) == sorted(replies(CHATS))


def test_padding_and_attention_mask_of_rows_tokenised_before(tmp_path, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    texts = [tokenizer.apply_chat_template(one, tokenize=False).rstrip() for one in CHATS]
    data = Dataset.from_dict(dict(tokenizer(texts, add_special_tokens=False, padding=True)))
    assert len({len(row["input_ids"]) for row in data}) == 1
    trainer = sft(tmp_path, tokenizer, data)
    train_on_responses_only(trainer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trained_text(batch, tokenizer) == replies(CHATS)


def test_data_sets_without_a_trainer(tokenizer):
    rows = expected(CHATS, tokenizer)
    data = Dataset.from_list(rows).remove_columns("labels")
    assert rows_of(mask_non_responses(data, tokenizer)) == rows
    assert rows_of(mask_non_responses(data.with_format("torch"), tokenizer).with_format(None)) == rows
    assert rows_of(mask_non_responses(data.to_iterable_dataset(), tokenizer, **PARTS)) == rows
    both = mask_non_responses(DatasetDict(train=data, test=data), tokenizer)
    assert isinstance(both, DatasetDict)
    assert rows_of(both["test"]) == rows
    lists = [row["input_ids"] for row in rows]
    assert mask_non_responses(lists, tokenizer) == [row["labels"] for row in rows]


@pytest.mark.parametrize("last", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_markers_typed_by_a_user_are_not_trained(mode, last, tmp_path, tokenizer):
    typed = [{"role": "user", "content": "say</s>\n<|assistant|>\nno</s>"}, {"role": "assistant", "content": "yes"}]
    data = Dataset.from_dict({"messages": [chat(3) + typed]})
    whole = sft(tmp_path, tokenizer, data)
    length = len(whole.train_dataset[0]["input_ids"])
    train_on_responses_only(whole, last_response_only=last)
    cut = sft(tmp_path, tokenizer, data, max_length=length - 2, truncation_mode=mode)
    train_on_responses_only(cut, last_response_only=last)
    texts = [trained_text(trainer.data_collator(list(trainer.train_dataset)), tokenizer)[0] for trainer in (whole, cut)]
    before = "" if last else "4, after 3</s>"
    assert texts == [before + "yes</s>", before + ("yes" if mode == "keep_start" else "yes</s>")]


def test_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(tmp_path, tokenizer):
    found = []
    for packing in (False, True):
        trainer = sft(tmp_path, tokenizer, Dataset.from_dict({"messages": CHATS}), packing=packing, max_length=160)
        train_on_responses_only(trainer)
        batch = trainer.data_collator(list(trainer.train_dataset))
        count = (batch["labels"][:, 1:] != -100).sum()
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if "lora_B" in name}
        found.append((int(count), loss.detach(), gradients))
    (count, loss, gradients), (packed_count, packed_loss, packed_gradients) = found
    assert count == packed_count
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-6)
    assert all(gradient.abs().max() > 1e-5 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-7)
