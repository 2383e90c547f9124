"""Quantisation-aware training: what is trained is what torchao writes."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pantheraml import save as facade
from pantheraml.errors import ArgumentError, ConfigError, ConflictError, UnsupportedError
from pantheraml.export.merge import save_merged
from pantheraml.models import qat
from pantheraml.models.loader import FastLanguageModel

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao, about itself
IDS = torch.arange(3, 35)[None]
PORTABLE = ("int4", "int8", "int8-int4")  # what torchao quantises to on a CPU


def adapted(scheme, *, base=None, **options):
    base = make_tiny("llama", dtype=torch.bfloat16) if base is None else base
    model = FastLanguageModel.get_peft_model(base, r=4, lora_alpha=8, qat_scheme=scheme, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def spread(candidate, reference):
    return float((candidate - reference).norm() / (reference - reference.mean(-1, keepdim=True)).norm())


@pytest.mark.parametrize("scheme", qat.SCHEMES)
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"], ids=str)
def test_the_forward_is_that_of_the_quantised_merged_model(scheme, targets, tmp_path):
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    shape = {"hidden_size": 128, "intermediate_size": 256}
    model = adapted(scheme, base=make_tiny("llama", dtype=torch.bfloat16, **shape), target_modules=targets)
    save_merged(model, tmp_path / "merged")  # and its check compares without rounding
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    exact = logits(merged)
    quantize_(
        merged,
        QATConfig(qat.torchao_config(scheme), step="prepare"),
        filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head",
    )
    assert spread(logits(model), logits(merged)) < 0.02  # roundings of bfloat16
    assert spread(logits(model), exact) > (0.05 if "4" in scheme else 0.003)
    with qat.exact(model):
        assert spread(logits(model), exact) < 0.02
    assert spread(logits(model), exact) > 0.003


@pytest.mark.parametrize("scheme", PORTABLE)
def test_what_is_written_is_what_was_trained(scheme, tmp_path, tiny_tokenizer):
    model = adapted(scheme)
    assert qat.scheme_of(model) == scheme
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    due = torch.nn.functional.cross_entropy(logits(model)[0, :-1], IDS[0, 1:])
    model.train()
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(float(due), rel=0.01)  # no fused layer goes past the rounding
    assert losses[-1] < 0.9 * losses[0]
    report = facade.save_pretrained_torchao(model, tmp_path / "out", tiny_tokenizer)
    assert report.merged_modules == 14
    assert report.verification.deviation < 0.02
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(written.model.layers[0].mlp.up_proj.weight.data) is not torch.Tensor
    with torch.no_grad():
        found = written(input_ids=IDS, labels=IDS).loss
        model.eval()
        assert abs(float(found) - float(model(input_ids=IDS, labels=IDS).loss)) < 0.02 * losses[0]


def test_all_weights_are_trained(tiny_llama_dir, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny_llama_dir), max_seq_length=64, dtype=torch.float32, full_finetuning=True, qat_scheme="INT8"
    )
    names = set(model.state_dict())
    assert names == set(make_tiny("llama").state_dict())
    rounded = logits(model)
    due = torch.nn.functional.cross_entropy(rounded[0, :-1], IDS[0, 1:])
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss.detach(), due, rtol=1e-6, atol=1e-6)  # no fused layer goes past the rounding
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert 1e-4 < spread(rounded, logits(plain)) < 0.1
    report = facade.save_pretrained_torchao(model, tmp_path / "out", tokenizer)
    assert report.verification.deviation < 1e-4
    assert spread(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), rounded) < 1e-4


def test_names():
    assert qat.check_scheme(" Int8-INT4 ") == "int8-int4"
    assert qat.check_scheme("phone-deployment", "llama") == "int8-int4"
    assert qat.check_scheme("phone-deployment", "gemma3_text") == "int4"
    for scheme, error in (("cactus", UnsupportedError), ("int5", ConfigError)):
        with pytest.raises(error) as caught:
            qat.check_scheme(scheme)
        assert all(f"'{name}'" in str(caught.value) for name in [*qat.SCHEMES, "phone-deployment"])


REFUSED = {
    "dora": ({}, {"use_dora": True}, ConflictError, "plain LoRA"),
    "dropout": ({}, {"lora_dropout": 0.1}, ConflictError, "plain LoRA"),
    "rows": ({"intermediate_size": 80}, {}, UnsupportedError, "rows of 80"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_is_refused_and_left_alone(case):
    shape, options, error, message = case
    base = make_tiny("llama", **shape)
    before = repr(base)
    with pytest.raises(error, match=message):
        FastLanguageModel.get_peft_model(base, r=4, qat_scheme="int4", **options)
    assert repr(base) == before
    assert qat.scheme_of(base) is None


def test_experts_and_quantised_weights_are_refused(tiny_llama_dir):
    experts = make_tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    with pytest.raises(UnsupportedError, match="experts"):
        FastLanguageModel.get_peft_model(experts, r=4, target_modules=["q_proj"], qat_scheme="int8")
    pytest.importorskip("bitsandbytes")
    model, _ = FastLanguageModel.from_pretrained(str(tiny_llama_dir), max_seq_length=64, load_in_4bit=True)
    with pytest.raises(ConflictError, match="load_in_4bit=False"):
        FastLanguageModel.get_peft_model(model, r=4, qat_scheme="int8")


def test_an_adapter_that_is_there_is_trained_on_with_the_scheme():
    base = make_tiny("llama")
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    model = FastLanguageModel.get_peft_model(plain, **options, qat_scheme="int8")
    assert qat.scheme_of(model) == "int8"
    assert FastLanguageModel.get_peft_model(model, **options, qat_scheme="int8") is model
    with pytest.raises(ArgumentError, match="qat_scheme is 'int8', not None"):
        FastLanguageModel.get_peft_model(model, **options)
