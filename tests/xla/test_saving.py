"""What is saved is what was trained, loads without torch_xla, and a resumed run goes on as if it had not stopped."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from pantheraml import FastLanguageModel, xla_runtime

from .support import arguments, load, ragged, trained

STEPS = {"max_steps": 6, "logging_steps": 3, "save_strategy": "steps", "save_steps": 3}
TOKENS = torch.arange(3, 19)[None]


def logits(model):
    FastLanguageModel.for_inference(model)
    with torch.no_grad():
        out = model(input_ids=TOKENS.to(xla_runtime.device()), use_cache=False).logits
    return out.cpu()


def plain(path, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def train(path, folder, *, lora, resume=None, **options):
    model, tokenizer = load(path, lora=lora, **({"lora_dropout": 0.1} if lora else {}))
    trainer = SFTTrainer(
        model=model, args=arguments(folder, **STEPS, **options), train_dataset=ragged(), processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, tokenizer


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_saved_weights_are_the_trained_ones_and_a_run_resumes(lora, tiny_llama_dir, tmp_path):
    trainer, tokenizer = train(tiny_llama_dir, tmp_path / "a", lora=lora)
    model, base = trainer.model, plain(tiny_llama_dir)
    expected = logits(model)
    assert (expected - base).abs().max() > 1e-3
    before = xla_runtime.counters().compilations
    model.save_pretrained(str(tmp_path / "saved"))
    trainer.save_model(str(tmp_path / "model"))
    assert xla_runtime.counters().compilations == before
    for folder in ("saved", "model", "a/checkpoint-6"):
        where = (tiny_llama_dir, tmp_path / folder) if lora else (tmp_path / folder,)
        torch.testing.assert_close(plain(*where), expected, rtol=0, atol=2e-5, msg=folder)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    torch.testing.assert_close(plain(tmp_path / "merged"), expected, rtol=0, atol=2e-5)

    straight = trained(model)
    resumed, _ = train(tiny_llama_dir, tmp_path / "a", lora=lora, resume=str(tmp_path / "a" / "checkpoint-3"))
    for name, weight in trained(resumed.model).items():
        torch.testing.assert_close(weight, straight[name], rtol=0, atol=1e-6, msg=name)
    if xla_runtime.device_count() > 1 and not lora:
        weight = resumed.model.model.embed_tokens.weight
        moment = resumed.optimizer.optimizer.state[weight]["exp_avg"]
        assert xla_runtime.sharding(moment) == xla_runtime.sharding(weight) != ""
