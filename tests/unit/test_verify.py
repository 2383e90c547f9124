"""What a model chooses greedily, and when another one's choices are as good."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from transformers import AutoModelForSeq2SeqLM, T5Config

from pantheraml.export import verify
from pantheraml.export.verify import agreement, continued, sample_inputs


def t5():
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 300}
    return AutoModelForSeq2SeqLM.from_config(T5Config(decoder_start_token_id=0, **shape)).eval()


@pytest.mark.parametrize(
    ("family", "overrides"), [("llama", {}), ("gemma2", {"head_dim": 16, "sliding_window": 8}), ("mamba", {})]
)
def test_the_end_of_the_sequence_is_what_generate_appends(family, overrides):
    model = make_tiny(family, **overrides)
    start = sample_inputs(model)
    found = continued(model, model)
    tokens = model.eval().generate(**start, max_new_tokens=16, min_new_tokens=16, eos_token_id=999, do_sample=False)
    assert torch.equal(found["input_ids"], tokens)
    assert found["attention_mask"].shape == tokens.shape


def test_encoder_decoders_continue_the_decoders_sequence():
    model = t5()
    start = sample_inputs(model)
    found = continued(model, model)
    assert torch.equal(found["input_ids"], start["input_ids"])
    ids = start["decoder_input_ids"]
    for _ in range(16):
        with torch.no_grad():
            logits = model(**{**start, "decoder_input_ids": ids}).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found["decoder_input_ids"], ids)
    assert agreement(model, model, model, budget=1e-4, note="nothing").tokens == (16, 16)


def test_ids_that_stand_for_images_are_no_choice():
    model = make_tiny("llama")
    favourite = int(continued(model, model)["input_ids"][0, 24])
    model.config.image_token_id = favourite
    model.config.video_token_id = 10**6  # beyond the head's rows, as in some models
    assert favourite not in continued(model, model)["input_ids"][0, 24:].tolist()


def test_another_token_is_right_only_where_it_was_as_likely(monkeypatch):
    model, other = make_tiny("llama"), make_tiny("llama")
    due = verify.logits_of(model, continued(model, model))
    best, second = due[0, -17 + 7].topk(2).indices.tolist()
    rival = due.clone()
    rival[0, -17 + 7, second] = due[0, -17 + 7, best] + 1e-4
    monkeypatch.setattr(verify, "logits_of", lambda which, inputs: rival if which is other else due)
    spread = (due - due.mean(-1, keepdim=True)).square().mean().sqrt()
    lead = float((due[0, -17 + 7, best] - due[0, -17 + 7, second]) / spread)
    assert lead > 0.01
    near = agreement(other, model, model, budget=lead / 3, note="x")
    assert (near.problem, near.tokens) == (None, (16, 7))
    far = agreement(other, model, model, budget=lead / 5, note="x")
    assert f"after the same 7 tokens it chooses {second}, and the trained model {best}" in str(far.problem)
