"""Training on XLA devices gives what plain torch gives, compiles nothing after step 3 and reads when it logs."""

from __future__ import annotations

import pytest
import torch
from trl import SFTTrainer

from pantheraml import xla_runtime

from .support import Recorder, arguments, load, ragged, record_batches, reference, trained


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_twenty_steps_equal_plain_torch(lora, tiny_llama_dir, tmp_path, monkeypatch):
    batches = record_batches(monkeypatch)
    model, tokenizer = load(tiny_llama_dir, lora=lora)
    start = {
        name: value.clone()
        for name, value in zip(model.state_dict(), xla_runtime.read(list(model.state_dict().values())))
    }
    args = arguments(tmp_path, learning_rate=2e-3 if lora else 5e-4)
    trainer = SFTTrainer(model=model, args=args, train_dataset=ragged(), processing_class=tokenizer)
    recorder = Recorder(trainer)
    before = trained(model)
    trainer.train()
    losses, weights = reference(start, batches, args, lora=lora)
    assert len({tuple(batch["input_ids"].shape) for batch in batches}) == 1
    assert recorder.losses[-1] < recorder.losses[0] - 0.1
    torch.testing.assert_close(recorder.losses, losses, rtol=0, atol=1e-5)
    after = trained(model)
    assert after.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-4, msg=name)
        assert not torch.equal(after[name], before[name])
    compilations = [counters.compilations for counters in recorder.counters]
    assert compilations[3:] == [compilations[3]] * 17, compilations
    reads = [counters.host_reads for counters in recorder.counters]
    # The counters of step n are taken before its log.
    assert reads[0] == reads[9], reads
    assert reads[10] - reads[9] <= 1, reads
    assert reads[19] == reads[10], reads
    assert set(recorder.counters[-1].fallbacks) <= {"aten::_local_scalar_dense"}
