"""Two ranks share the rows of a stream: each row goes to one of them, and bad rows are written once."""

from __future__ import annotations

import json

import pytest
from conftest import build_tokenizer, make_tiny
from launching import HERE, torchrun


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--packing", "--max_seq_length", "32"]], ids=["rows", "packed"])
def test_two_ranks_share_a_stream(flags, tmp_path):
    tokenizer = build_tokenizer()
    make_tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    # The third token of each row, behind the BOS, is a letter of its own.
    letters = [token for token in tokenizer.get_vocab() if len(token) == 1 and token.isalnum() and token.isascii()]
    rows = [f"~{letter}~ " + "~ " * (number % 4) for number, letter in enumerate(letters[:40])]
    wanted = [tokenizer(row)["input_ids"][2] for row in rows]
    assert len(set(wanted)) == len(rows) == 40
    lines = [json.dumps({"text": row}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:5], "{", *lines[5:]]))
    done = torchrun(
        HERE / "stream_worker.py",
        tmp_path,
        tmp_path / "model",
        tmp_path / "rows.jsonl",
        "--max_bad_fraction",
        "0.1",
        *flags,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    # Batches of the ranks in turns hold the rows in the order of the file, each once.
    held = [row for pair in zip(*ranks, strict=True) for batch in pair for row in batch]
    if flags:
        assert set(held) <= set(wanted)
        first = [row for batches in ranks for row in batches[0]]
        assert len(set(first)) == len(first) > 4
    else:
        assert held == wanted[:24]
    [line] = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["where"].endswith("rows.jsonl:6")
