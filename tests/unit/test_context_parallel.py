"""Dividing sequences over ranks, as far as one process can tell: shares of batches, loaders, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tokenizer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from training_support import panthera_model, texts
from transformers import AutoModelForCausalLM

from pantheraml.errors import ConfigError, ConflictError, UnsupportedError
from pantheraml.parallel.batches import MISSING, EvenBatches, OrderedBatches, shared
from pantheraml.parallel.context import DIVISION, context_group, divide
from pantheraml.trainer import PantheraMLTrainer, PantheraMLTrainingArguments

IGNORED = -100


def padded() -> dict[str, torch.Tensor]:
    """Rows of 7 and 4 tokens."""
    ids = torch.arange(14).view(2, 7)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, IGNORED), "attention_mask": mask}


def joined() -> dict[str, torch.Tensor]:
    """Documents of 3, 1 and 5 tokens in one row, as TRL's collator tells them."""
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]])
    ids = torch.arange(20, 29)[None]
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(positions == 0, IGNORED),
        "position_ids": positions,
        "cu_seq_lens_q": torch.tensor([0, 3, 4, 9]),
        "max_length_q": 5,  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("batch", [padded(), joined()], ids=["padded", "joined"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_shares_are_the_batch_and_each_token_knows_its_next(batch, ranks):
    shares = [divide(batch, rank, ranks) for rank in range(ranks)]
    rows, length = batch["input_ids"].shape
    whole = {name: torch.cat([share[name] for share in shares], 1) for name in ("input_ids", "position_ids", "labels")}
    assert torch.equal(whole["input_ids"][:, :length], batch["input_ids"])
    assert torch.equal(whole["labels"][:, : length - 1], batch["labels"][:, 1:])
    assert bool((whole["labels"][:, length - 1 :] == IGNORED).all())
    wanted = batch.get("position_ids", torch.arange(length).expand(rows, length))
    assert torch.equal(whole["position_ids"][:, :length], wanted)
    for share in shares:
        assert share[DIVISION] == shares[0][DIVISION]
        assert share["input_ids"].shape == (rows, -(-length // ranks))
        assert torch.equal(share["labels"], share["shift_labels"])
        assert "cu_seq_lens_q" not in share
    counted = sum(int(share["attention_mask"].sum()) for share in shares) if "attention_mask" in batch else None
    assert counted in (None, 11)


def test_documents_of_a_divided_batch_are_those_of_the_whole():
    assert divide(padded(), 0, 2)[DIVISION].lengths == (8, 8)
    division = divide(joined(), 1, 2)[DIVISION]
    assert (division.lengths, division.batch, division.length) == ((3, 1, 6), 1, 10)


def test_batches_that_cannot_be_divided():
    with pytest.raises(UnsupportedError, match="pixel_values"):
        divide(padded() | {"pixel_values": torch.zeros(1)}, 0, 2)
    with pytest.raises(UnsupportedError, match="padded on the left"):
        divide(padded() | {"attention_mask": padded()["attention_mask"].flip(1)}, 0, 2)
    with pytest.raises(UnsupportedError, match="no labels"):
        divide({"input_ids": torch.zeros(1, 4)}, 0, 2)


def loader(rows: int, batch: int, **options) -> DataLoader:
    return DataLoader(list(range(rows)), batch_size=batch, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "batch", "groups", "ranks"), [(9, 2, 2, 2), (8, 2, 2, 2), (5, 1, 1, 4), (3, 4, 2, 2)])
def test_ranks_of_a_group_get_the_same_batches_and_all_rows_come_once(rows, batch, groups, ranks):
    batches = list(EvenBatches(RandomSampler(range(rows)), batch, groups, ranks))
    assert len(batches) == len(EvenBatches(SequentialSampler(range(rows)), batch, groups, ranks))
    assert len(batches) % (groups * ranks) == 0
    of_groups = [batches[i : i + ranks] for i in range(0, len(batches), ranks)]
    assert all(part == [part[0]] * ranks for part in of_groups)
    assert sorted(index for part in of_groups for index in part[0] if index >= 0) == list(range(rows))


def test_evaluations_have_the_batches_of_one_process():
    alone = list(BatchSampler(SequentialSampler(range(7)), 2, drop_last=False))
    for groups in (1, 2, 3):
        batches = list(OrderedBatches(SequentialSampler(range(7)), 2, groups, 2))
        assert len(batches) == len(OrderedBatches(SequentialSampler(range(7)), 2, groups, 2))
        assert all(len(one) == 2 for one in batches)
        real = [[i for i in one if i != MISSING] for one in batches[::2]]
        assert [one for one in real if one[0] >= 0] == alone
        assert batches[::2] == batches[1::2]


def test_loaders_that_ranks_cannot_share():
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    for wrong in (DataLoader(Rows()), loader(4, 2, drop_last=True)):
        with pytest.raises(UnsupportedError, match="context_parallel"):
            shared(wrong, 1, 2, training=True)


def test_one_process_shares_with_nobody(tmp_path):
    arguments = PantheraMLTrainingArguments(output_dir=str(tmp_path), context_parallel=2)
    with pytest.raises(ConflictError, match="--nproc_per_node=2"):
        PantheraMLTrainer(
            model=panthera_model(), args=arguments, train_dataset=texts(4), processing_class=build_tokenizer()
        )
    with pytest.raises(ConfigError, match="1 process cannot be divided into groups of 2"):
        context_group(2)
    with pytest.raises(ConfigError, match="context_parallel"):
        PantheraMLTrainingArguments(output_dir=str(tmp_path), context_parallel=0)


def test_a_model_of_another_loader_is_refused(tiny_llama_dir, tmp_path):
    arguments = PantheraMLTrainingArguments(output_dir=str(tmp_path), context_parallel=2)
    trainer = PantheraMLTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama_dir),
        args=arguments,
        train_dataset=texts(4),
        processing_class=build_tokenizer(),
    )
    with pytest.raises(UnsupportedError, match="did not load"):
        trainer.train()
