"""Mixtures whose stacked experts are held in 4 bits, against the same models with these stacks dequantised."""

from __future__ import annotations

import copy
import json
import weakref

import pytest
import torch
from conftest import make_tiny
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from training_support import texts
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pantheraml import FastLanguageModel
from pantheraml.errors import UnsupportedError
from pantheraml.export.layout import CheckpointLayout
from pantheraml.export.parameters import MergedParameters
from pantheraml.models import stacks
from pantheraml.models.activations import set_activation_plan
from pantheraml.models.adapt import restore
from pantheraml.models.roles import base_model, is_parameter_lora, looks_like_experts
from pantheraml.training.progress import parameter_counts
from pantheraml.training.utilisation import flops_per_token

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.arange(3, 60)[None]
CHOICE = {"num_experts_per_tok": 2}
FAMILIES = {
    "qwen3_moe": {**CHOICE, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48},
    "mixtral": {**CHOICE, "num_local_experts": 4},
    # Stacks that lie transposed, biases; rows that are no whole blocks.
    "gpt_oss": {**CHOICE, "head_dim": 16, "num_local_experts": 4, "intermediate_size": 48, "sliding_window": 4},
    "deepseek_v3": {
        **CHOICE, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 64, "n_group": 2,
        "topk_group": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    },
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)
# Experts that run their own forward, and whose stacks transformers takes apart in 4-bit checkpoints.
LLAMA4 = {**CHOICE, "head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 64, "pad_token_id": 0}
LEAVES = ["gate_up_proj", "down_proj"]
LORA = {
    "r": 4,
    "target_modules": ["o_proj"],
    "target_parameters": [f"mlp.experts.{leaf}" for leaf in LEAVES],
    "init_lora_weights": False,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tiny_tokenizer):
    """A folder for each family, made when it is asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            model = make_tiny(family, **{**FAMILIES, "llama4_text": LLAMA4}[family])
            with torch.no_grad():
                for parameter in model.parameters():
                    # Stacks start empty, and 4 bits have to make a difference that a test sees.
                    parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 3 else 0.1))
            model.save_pretrained(made[family])
            tiny_tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


def load(folder, **options):
    return FastLanguageModel.from_pretrained(
        str(folder), **{"load_in_4bit": True, "dtype": torch.float32, "max_seq_length": 64, **options}
    )[0]


def experts_of(model):
    return [module for module in model.modules() if looks_like_experts(module)]


def settings(**more):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "router", ".gate"],
        **more,
    )


def dequantised(folder, model):
    """The same model, with what ``model`` has in 4 bits in its stacks as plain numbers."""
    skipped = settings()
    skipped.llm_int8_skip_modules.append("experts")
    twin = load(folder, quantization_config=skipped)
    for packed, plain in zip(experts_of(model), experts_of(twin), strict=True):
        assert stacks.four_bit(packed)
        assert not stacks.four_bit(plain)
        with torch.no_grad():
            for name in LEAVES:
                getattr(plain, name).copy_(getattr(packed, name))
    return twin


def lora(model, **more):
    torch.manual_seed(3)
    return FastLanguageModel.get_peft_model(model, **{**LORA, **more})


def same_adapter(model, twin):
    state = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    assert state
    assert not twin.load_state_dict(state, strict=False).unexpected_keys
    return twin


def step(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss + 0
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits + 0


def assert_same_step(got, due, tolerance=1e-5):
    assert abs(got[0] - due[0]) <= 1e-6 * due[0]
    assert got[1].keys() == due[1].keys()
    assert any("experts" in name and "lora_B" in name for name in due[1])
    for name, grad in due[1].items():
        assert (got[1][name] - grad).norm() <= tolerance * grad.norm() + 1e-9, name


# ---------------------------------------------------------------- loading


@each_family
def test_experts_are_held_in_4_bits(folders, family, capsys):
    model = load(folders(family))
    mixtures = experts_of(model)
    assert mixtures
    total = 0
    for module in mixtures:
        assert not any(parameter.dim() == 3 for parameter in module.parameters())
        for leaf, shape in stacks.shapes(module).items():
            numbers = torch.Size(shape).numel()
            total += numbers
            entry = stacks.four_bit(module)[leaf]
            assert entry.original.untyped_storage().nbytes() == numbers // 2
            state = entry[0].quant_state
            assert (state.quant_type, state.nested, state.absmax.dtype) == ("nf4", True, torch.uint8)
        assert list(stacks.shapes(module)) == LEAVES
    assert f"nf4 ({total:,} weights of experts too)" in capsys.readouterr().err
    plain = AutoModelForCausalLM.from_pretrained(folders(family))
    assert parameter_counts(model)[1] == sum(p.numel() for p in plain.parameters())
    assert flops_per_token(model.requires_grad_(False)) == flops_per_token(plain.requires_grad_(False))
    assert [entry for entry in model.adapt_report.swapped if entry.role == "experts"]
    assert model.config.quantization_config.quant_method == "bitsandbytes"
    # The stacks are near those of the checkpoint, as nf4 is.
    for packed, dense in zip(mixtures, experts_of(plain), strict=True):
        for leaf in LEAVES:
            error = (getattr(packed, leaf) - getattr(dense, leaf)).norm() / getattr(dense, leaf).norm()
            assert 0.05 < error < 0.13


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_dense_stack_at_a_time_while_loading(folders, family, monkeypatch):
    from pantheraml.models.four_bit import FourBitQuantizer

    seen = []
    hold = FourBitQuantizer.hold

    def watched(self, name, module, stack, *missing):
        assert not any(reference() is not None for reference in seen), name
        hold(self, name, module, stack, *missing)
        seen.append(weakref.ref(stack.untyped_storage()))
        seen.append(weakref.ref(stack))

    monkeypatch.setattr(FourBitQuantizer, "hold", watched)
    load(folders(family))
    assert len(seen) == 2 * 2 * len(LEAVES)


def test_the_configuration_of_bitsandbytes_is_followed(folders, capsys):
    folder = folders("qwen3_moe")
    fp4 = settings()
    fp4.bnb_4bit_quant_type, fp4.bnb_4bit_use_double_quant = "fp4", False
    first = experts_of(load(folder, quantization_config=fp4))[0]
    state = stacks.four_bit(first)["down_proj"][0].quant_state
    assert (state.quant_type, state.nested, state.absmax.dtype) == ("fp4", False, torch.float32)
    skipped = settings()
    skipped.llm_int8_skip_modules.append("layers.1.mlp.experts")
    capsys.readouterr()
    first, second = experts_of(load(folder, quantization_config=skipped))
    assert stacks.four_bit(first)
    assert not stacks.four_bit(second)
    assert second.down_proj.dtype == torch.float32
    size = sum(torch.Size(shape).numel() for shape in stacks.shapes(first).values())
    assert f"nf4 ({size:,} weights of experts too, {size:,} weights of experts are not)" in capsys.readouterr().err


def test_a_stack_too_large_to_count_is_refused(folders, monkeypatch):
    from pantheraml.models import four_bit

    monkeypatch.setattr(four_bit, "_MOST", 1000)
    with pytest.raises(UnsupportedError, match=r"(?s)cannot be held in 4 bits.*experts\..*llm_int8_skip_modules"):
        load(folders("qwen3_moe"))


# ---------------------------------------------------------------- computing


@each_family
def test_the_forward_is_that_of_dequantised_experts(folders, family):
    folder = folders(family)
    model = load(folder)
    twin = dequantised(folder, model)
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-6)
    # A step of generation makes the chosen experts dense and no others.
    few = model(input_ids=IDS[:, :1]).logits + 0
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS[:, :1]).logits + 0, few.detach(), rtol=0, atol=1e-6)
    prompt = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:, :4], **prompt), twin.generate(IDS[:, :4], **prompt))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(plain) - logits(model)).norm() > 0.01 * logits(plain).norm()


@each_family
def test_gradients_of_adapters_are_those_over_dequantised_experts(folders, family):
    folder = folders(family)
    base = load(folder)
    twin = lora(dequantised(folder, base))
    model = same_adapter(twin, lora(base))
    assert not [entry for entry in base_model(model).adapt_report.left if entry.role in ("experts", "lora")]
    due = step(twin)
    assert_same_step(step(model), due)
    set_activation_plan(model, True)
    assert_same_step(step(model), due)
    # PEFT's own forward, which is what runs where the fused one does not; twice, since nothing may stay behind.
    restore(model)
    restore(twin)
    due = step(twin)
    for _ in range(2):
        assert_same_step(step(model), due, tolerance=1e-4)


def test_no_dense_stack_is_kept_for_the_backward(folders):
    model = lora(load(folders("qwen3_moe")))
    sizes = {torch.Size(shape).numel() for module in experts_of(model) for shape in stacks.shapes(module).values()}
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    set_activation_plan(model, False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=IDS[:, :9], labels=IDS[:, :9]).loss + 0
    assert kept
    assert not sizes & set(kept)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_twenty_steps_follow_dequantised_experts(folders, family):
    folder = folders(family)
    base = load(folder)
    twin = lora(dequantised(folder, base))
    model = same_adapter(twin, lora(base))

    def losses(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(20):
            found.append(step(model)[0])
            optimizer.step()
        return torch.stack(found)

    ours, theirs = losses(model), losses(twin)
    assert theirs[-1] < theirs[0] - 0.2
    assert ((ours - theirs).abs() <= 1e-4 * theirs).all(), (ours, theirs)


def test_a_copy_computes_the_same(folders):
    model = lora(load(folders("mixtral"))).eval()
    due = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(twin), due)


def test_stacks_are_read_where_they_have_moved_to(folders):
    model = load(folders("qwen3_moe"))
    module = experts_of(model)[0]
    entry = stacks.four_bit(module)["down_proj"]
    before = stacks.held(module, "down_proj")
    assert stacks.held(module, "down_proj") is before
    entry.original.data = entry.original.data.clone()
    assert stacks.held(module, "down_proj").packed.data_ptr() == entry.original.data_ptr() != before.packed.data_ptr()
    # Another device, of which this machine has none but the one without memory.
    module.to("meta")
    moved = stacks.held(module, "down_proj")
    assert {moved.packed.device.type, moved.absmax.device.type, moved.nested_absmax.device.type} == {"meta"}


# ---------------------------------------------------------------- adapters


@each_family
def test_an_adapter_fits_4_and_16_bit_bases(folders, family, tmp_path):
    folder = folders(family)
    base = load(folder)
    model = lora(base).eval()
    model.save_pretrained(tmp_path / "four")
    lora(load(folder, load_in_4bit=False)).save_pretrained(tmp_path / "sixteen")
    four, sixteen = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("four", "sixteen"))
    assert {name: t.shape for name, t in four.items()} == {name: t.shape for name, t in sixteen.items()}
    again = load(tmp_path / "four").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert sum("experts" in name for name, p in again.named_parameters() if p.requires_grad) == 4 * len(
        experts_of(base)
    )
    # Through plain PEFT on the dequantised model.
    plain = PeftModel.from_pretrained(dequantised(folder, base), tmp_path / "four").eval()
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_a_second_adapter_and_none(folders):
    folder = folders("qwen3_moe")
    base = load(folder)
    bare = logits(base)
    model = lora(base).eval()
    first = logits(model)
    config = copy.deepcopy(model.peft_config["default"])
    torch.manual_seed(8)
    model.add_adapter("other", config)
    assert all("other" in w.lora_A for w in model.modules() if is_parameter_lora(w))
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    twin = lora(dequantised(folder, base)).eval()
    twin.add_adapter("other", config)
    same_adapter(model, twin)
    twin.set_adapter("other")
    torch.testing.assert_close(second, logits(twin), rtol=0, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), bare)


def test_a_second_adapter_reaches_experts_that_the_first_leaves_out(folders):
    folder = folders("qwen3_moe")
    base = load(folder)
    twin = dequantised(folder, base)

    def two(model):
        model = lora(model, target_parameters=None)
        model.add_adapter("second", LoraConfig(**LORA))
        model.set_adapter("second")
        return model

    model, twin = two(base), two(twin)
    same_adapter(model, twin)
    for _ in range(2):
        assert_same_step(step(model), step(twin), tolerance=1e-4)
    with pytest.raises(UnsupportedError, match="save_pretrained_merged"):
        model.merge_adapter()


def test_a_merge_into_4_bits_is_refused_and_changes_nothing(folders):
    model = lora(load(folders("qwen3_moe")), target_modules=["o_proj"]).eval()
    due = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError, match="save_pretrained_merged"):
            merge()
    assert torch.equal(logits(model), due)


# ---------------------------------------------------------------- saving


@each_family
def test_merged_onto_the_base_and_onto_what_is_held(folders, family, tmp_path, tiny_tokenizer):
    folder = folders(family)
    base = load(folder)
    model = lora(base).eval()
    report = model.save_pretrained_merged(tmp_path / "held", tiny_tokenizer, merge_onto="dequantized")
    assert report.verification.deviation < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "held").eval()
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)

    report = model.save_pretrained_merged(tmp_path / "base", tiny_tokenizer, verify=False)
    assert report.onto == str(folder)
    # The truth: the same adapter on the model that was never quantised.
    twin = same_adapter(model, lora(load(folder, load_in_4bit=False)))
    twin.save_pretrained_merged(tmp_path / "twin", tiny_tokenizer, verify=False)
    ours, due = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "twin"))
    assert ours.keys() == due.keys()
    for name, tensor in due.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "base" / "config.json").read_text())


@each_family
def test_what_is_read_from_a_checkpoint_is_what_was_loaded(folders, family):
    model = load(folders(family), load_in_4bit=False)
    entries = MergedParameters(model, torch.float32, lambda name, weight: weight.dequantize()).entries
    layout = CheckpointLayout(model, [entry.spec for entry in entries.values()])
    disk = load_file(folders(family) / "model.safetensors")
    state = model.state_dict()
    assert any("experts" in name for name in entries)
    for name in (name for name in entries if "layers" in name):
        assert torch.equal(layout.assembled(name, disk.__getitem__), state[name]), name


@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text"])
def test_a_4_bit_model_is_saved_and_loaded_again(folders, family, tmp_path, tiny_tokenizer):
    model = load(folders(family))
    due = logits(model)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        model = load(tmp_path / name)
        assert all(len(stacks.four_bit(module)) == 2 for module in experts_of(model))
        assert torch.equal(logits(model), due)
    # Never a model with random experts: transformers by itself does not know the form.
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "first")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_is_skipped_stays_so_when_it_is_saved(folders, family, tmp_path, tiny_tokenizer):
    skipped = settings()
    skipped.llm_int8_skip_modules.append("layers.1.mlp.experts")
    model = load(folders(family), quantization_config=skipped)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert [len(stacks.four_bit(module)) for module in experts_of(again)] == [2, 0]
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_checkpoint_with_each_expert_in_4_bits_by_itself(folders, family, tmp_path, tiny_tokenizer):
    """As they were published for releases of transformers in which experts are linear layers."""
    import bitsandbytes.functional as bnb

    model = load(folders(family))
    stored = {}
    for name, tensor in load_file(folders(family) / "model.safetensors").items():
        if tensor.dim() != 2 or ".layers." not in name or name.endswith(".gate.weight"):
            stored[name] = tensor
            continue
        packed, state = bnb.quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
        stored |= {name: packed} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folders(family) / "config.json").read_text())
    config["quantization_config"] = model.config.quantization_config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny_tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    # Scales are rounded once more.
    for ours, direct in zip(experts_of(again), experts_of(model), strict=True):
        assert len(stacks.four_bit(ours)) == 2
        for leaf in LEAVES:
            assert (getattr(ours, leaf) - getattr(direct, leaf)).norm() < 0.01 * getattr(direct, leaf).norm()
    report = again.save_pretrained_merged(tmp_path / "merged", tiny_tokenizer)
    assert report.verification.deviation < 1e-5
    assert "experts.0." in " ".join(load_file(tmp_path / "merged" / "model.safetensors"))


def test_the_other_formats_say_what_they_do(folders, tmp_path, tiny_tokenizer, capsys):
    model = lora(load(folders("qwen3_moe"))).eval()
    report = model.save_pretrained_merged(
        tmp_path / "four", tiny_tokenizer, save_method="merged_4bit_forced", verify=False
    )
    assert report is not None
    assert "experts are not quantised by this format" in capsys.readouterr().err
    assert all(stacks.four_bit(module) for module in experts_of(load(tmp_path / "four")))
    with pytest.raises(UnsupportedError, match="experts are not written in this format"):
        model.save_pretrained_merged(tmp_path / "fp8", tiny_tokenizer, save_method="fp8")


def test_transformers_dequantizes_experts_too(folders):
    model = load(folders("qwen3_moe"), max_seq_length=64)
    due = logits(model)
    model.dequantize()
    assert not any(stacks.four_bit(module) for module in experts_of(model))
    torch.testing.assert_close(logits(model), due, rtol=0, atol=1e-5)


def test_trained_by_trl_which_puts_the_adapter_on(folders, tmp_path, tiny_tokenizer):
    """The adapter reaches experts, follows ours, and what is trained is saved."""
    from trl import SFTConfig, SFTTrainer

    def trained(folder, model, **options):
        args = SFTConfig(
            output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            report_to=[], save_strategy="no", max_length=64, use_cpu=True, seed=1,
        )  # fmt: skip
        trainer = SFTTrainer(model=model, args=args, train_dataset=texts(), processing_class=tiny_tokenizer, **options)
        trainer.train()
        return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    config = LoraConfig(**{name: value for name, value in LORA.items() if name != "init_lora_weights"}, lora_alpha=16)
    model, losses = trained(tmp_path / "theirs", load(folders("qwen3_moe")), peft_config=config)
    names = [name for name, p in model.named_parameters() if p.requires_grad and "experts" in name]
    assert len(names) == 8
    assert sum(entry.role == "lora" for entry in base_model(model).adapt_report.swapped) == 6
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if name in names)
    assert losses[-1] < losses[0]
    with pytest.raises(UnsupportedError, match="save_pretrained_merged"):
        model.merge_adapter()
    assert model.save_pretrained_merged(tmp_path / "merged", tiny_tokenizer, merge_onto="dequantized")
    _, ours = trained(tmp_path / "ours", lora(load(folders("qwen3_moe")), init_lora_weights=True))
    assert ours[0] == pytest.approx(losses[0], rel=1e-5)
