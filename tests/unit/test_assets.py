"""The embedded demo is small, loadable, licensed, and what its build scripts say it is."""

from __future__ import annotations

import json
import string
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

import pantheraml.assets as assets
from pantheraml.assets import DEMO, demo_data, demo_model_dir
from pantheraml.assets.build import demo_data as builder
from pantheraml.assets.build import skills
from pantheraml.assets.build.words import CITIES, NAMES, Source
from pantheraml.errors import ConfigError, ModelNotFoundError

FOLDER = Path(assets.__file__).parent
MEGABYTE = 1_000_000


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in demo_data(split).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_dir())


def test_all_assets_together_are_at_most_four_megabytes():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 4 * MEGABYTE


def test_no_pickle_and_no_link_among_the_assets():
    pickled = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"}
    for path in FOLDER.rglob("*"):
        assert not path.is_symlink()
        assert path.suffix not in pickled, path


def test_licences_and_seed_are_written_down():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    from pantheraml.assets.build import make_demo

    assert "Apache-2.0" in text
    assert "CC0" in text
    assert f"script version {make_demo.SCRIPT_VERSION}" in text
    assert f"seed {make_demo.Settings.seed}" in text
    assert f"seed {builder.SEED}" in text
    assert str(make_demo.Settings.steps) in text


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_generator_reproduces_the_committed_data_bit_for_bit(split, tmp_path):
    builder.write(tmp_path)
    assert (tmp_path / f"{split}.jsonl").read_bytes() == demo_data(split).read_bytes()


def test_train_and_test_share_no_row_person_or_place():
    train, test = rows("train"), rows("test")
    assert (len(train), len(test)) == (builder.TRAIN_ROWS, builder.TEST_ROWS)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for key in ("name", "city"):
        seen = {json.loads(row["completion"])[key] for row in train}
        held_out = {json.loads(row["completion"])[key] for row in test}
        assert len(held_out) > 5
        assert not seen & held_out


def test_every_record_states_what_its_order_says():
    for row in rows("train") + rows("test"):
        record = json.loads(row["completion"])
        words = row["prompt"].lower().translate(str.maketrans("", "", string.punctuation)).split()
        assert list(record) == ["name", "city", "count", "color", "item", "day"]
        assert row["prompt"].endswith("\n")
        for key in ("name", "city", "color", "day"):
            assert record[key].lower() in words, row
        assert record["item"] + "s" in words, row


def test_no_word_is_both_a_person_and_a_place():
    assert not set(NAMES) & set(CITIES)
    assert len(set(NAMES)) == len(NAMES)
    assert len(set(CITIES)) == len(CITIES)


def test_the_pretraining_exercises_hold_nothing_of_the_task():
    source = Source(1)
    for _ in range(3000):
        prompt, answer = skills.exercise(source)
        assert not prompt.startswith("Order:")
        assert "{" not in answer


def test_the_random_source_is_the_same_on_every_machine():
    source = Source(3407)
    assert [source.below(100) for _ in range(6)] == [5, 13, 21, 30, 84, 24]


def test_model_loads_in_plain_transformers_with_finite_weights():
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_dir(), dtype=torch.float32)
    assert model.config.model_type == "llama"
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    names = {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters() if "_proj" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_model_was_pretrained_on_the_exercises(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_dir(), dtype=torch.float32)
    prompt = "Repeat: green Oslo lamp Maria\n"
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True).strip() == "green Oslo lamp Maria"


def test_special_tokens_are_distinct_and_agree_with_the_model(tokenizer):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_model_dir())
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(set(special)) == 3
    assert special == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert len(tokenizer) == config.vocab_size


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("Order: Zoë from Kraków\n", id="accents"),
        pytest.param("naïve café — “quotes”", id="punctuation"),
        pytest.param("日本語のテキスト", id="japanese"),
        pytest.param("🐆🐾", id="emoji"),
        pytest.param("tab\tand  two spaces\r\n", id="space"),
        pytest.param("\x00\x7f", id="control"),
    ],
)
def test_tokenizer_round_trips_unicode(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_chat_template_writes_what_the_data_set_says(tokenizer):
    row = rows("test")[0]
    messages = [
        {"role": "user", "content": row["prompt"].rstrip("\n")},
        {"role": "assistant", "content": row["completion"]},
    ]
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert asked == tokenizer.bos_token + row["prompt"]
    assert whole == asked + row["completion"] + tokenizer.eos_token + "\n"


def test_settings_fit_the_data_and_cannot_be_changed(tokenizer):
    longest = max(len(tokenizer(row["prompt"] + row["completion"]).input_ids) for row in rows("train") + rows("test"))
    answer = max(len(tokenizer(row["completion"]).input_ids) for row in rows("test"))
    assert longest + 1 <= DEMO.max_seq_length  # the end-of-sequence token
    assert answer + 1 <= DEMO.max_new_tokens
    assert all(getattr(DEMO, field.name) for field in fields(DEMO))
    with pytest.raises(FrozenInstanceError):
        DEMO.r = 1  # type: ignore[misc]


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="train, test"):
        demo_data("valid")  # type: ignore[arg-type]


def test_missing_files_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "files", lambda _: tmp_path)
    with pytest.raises(ModelNotFoundError, match="install PantheraML again"):
        demo_model_dir()
