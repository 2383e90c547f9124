"""Families whose layers are state spaces, linear attention or convolutions: alike with stock from loading to saving."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from peft import LoraConfig, get_peft_model
from training_support import texts
from transformers import AutoModelForCausalLM

from pantheraml import FastLanguageModel
from pantheraml.errors import UnsupportedError
from pantheraml.models.quantize import keep_weights_unpacked

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.arange(3, 30)[None]
MOE = {"num_experts_per_tok": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
QWEN_MOE = {**MOE, **LINEAR, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
GRANITE = {**MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 128}
FAMILIES = {
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 128},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 64},
    "granitemoehybrid": {**MOE, **GRANITE, "num_local_experts": 4},
    "granitemoehybrid-dense": {**GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0},
    "jamba": {
        **MOE, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
    },
    "kimi_linear": {
        **MOE, **LATENT, "num_local_experts": 4, "moe_intermediate_size": 64, "linear_head_dim": 32,
        "linear_num_heads": 2, "layer_types": LINEAR["layer_types"], "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {
        **MOE, "layer_types": ["conv", "full_attention"], "num_experts": 4, "moe_intermediate_size": 64,
        "num_dense_layers": 1,
    },
    "mamba": {"state_size": 8, "time_step_rank": 64},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "minimax": {**MOE, "layer_types": LINEAR["layer_types"], "head_dim": 16, "num_local_experts": 4, "block_size": 8},
    "nemotron_h": {
        **MOE, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8,
        "head_dim": 16, "n_routed_experts": 4, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4,
    },
    "olmo_hybrid": LINEAR,
    "qwen3_5_moe_text": QWEN_MOE,
    "qwen3_5_text": LINEAR,
    "qwen3_next": QWEN_MOE,
    "qwen4_exp_text": {
        **QWEN_MOE, "hc_lowrank": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 16, "indexer_compress_ratio": 4, "ple_layer_ids": [], "ple_embed_dim": 64,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2, "mamba_d_state": 8,
        "mamba_dt_rank": 64, "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "mamba_headdim": 32,
        "n_mamba_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8, "attention_hidden_size": 128,
        "attention_head_dim": 32, "num_key_value_heads": 4, "adapter_rank": 64,
    },
}  # fmt: skip
DEEPSEEK_V4 = {
    **MOE, "n_routed_experts": 4, "moe_intermediate_size": 64, "head_dim": 16, "q_lora_rank": 64, "o_lora_rank": 32,
    "o_groups": 2, "qk_rope_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    "sliding_window": 16,
}  # fmt: skip
# No layer of this one attends, so that stock has no cache for it: it trains, and does not generate.
STATES_ALONE = "qwen3_5_text-states"
each_family = pytest.mark.parametrize("family", FAMILIES)


def built(family):
    """A small model of a family, in evaluation."""
    settings = {**FAMILIES, STATES_ALONE: {**LINEAR, "layer_types": ["linear_attention"] * 2}}[family]
    model = make_tiny(family.partition("-")[0], **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            # Families start many weights at zero or one, which would hide an error.
            parameter.add_(torch.randn_like(parameter) * 0.05)
        # As loading leaves it.
        model.get_input_embeddings().weight[model.config.pad_token_id] = 0
    return model.eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tiny_tokenizer):
    """A folder for each family, made when it is asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(family))
            built(family).save_pretrained(made[family])
            tiny_tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load(folder, **options):
    return FastLanguageModel.from_pretrained(
        folder, **{"load_in_4bit": False, "dtype": torch.float32, "max_seq_length": 64, **options}
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits + 0


@each_family
def test_loaded_as_by_transformers(folders, family):
    # Some of these have an infinity in their configuration, for which JSON has no number.
    model, _ = load(folders(family))
    due = stock(folders(family))
    assert model.config.to_dict() == due.config.to_dict()
    torch.testing.assert_close(logits(model), logits(due), rtol=1e-5, atol=1e-5)


def adapted(folder, **options):
    """A loaded model with LoRA on the family's linear layers and experts, none of it at zero, and its tokenizer."""
    model, tokenizer = load(folder, **options)
    model = FastLanguageModel.get_peft_model(
        model, r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, use_gradient_checkpointing=False
    )
    return model, tokenizer


def twin(folder, model):
    """The same model with the same adapter by PEFT alone."""
    config = model.peft_config["default"]
    names = "r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern"
    other = get_peft_model(stock(folder), LoraConfig(**{name: getattr(config, name) for name in names}))
    adapter = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    assert adapter.keys() == {name for name, _ in other.named_parameters() if ".lora_" in name}
    assert not other.load_state_dict(adapter, strict=False).unexpected_keys
    return other


def step(model):
    model.train()
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss + 0
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each_family
def test_a_step_and_tokens_are_those_of_peft_alone(folders, family):
    model, _ = adapted(folders(family))
    other = twin(folders(family), model)
    (loss, gradients), (due_loss, due_gradients) = step(model), step(other)
    torch.testing.assert_close(loss, due_loss, rtol=2e-6, atol=2e-6)
    assert gradients.keys() == due_gradients.keys()
    # Nothing is trained that the family's code leaves out; a choice of tokens has no gradient.
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".indexer." not in n} == gradients.keys()
    for name, due in due_gradients.items():
        assert (gradients[name] - due).norm() <= 1e-4 * due.norm() + 1e-8, name
    FastLanguageModel.for_inference(model)
    other.eval()
    ids = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :1] = 0
    ids[mask == 0] = model.config.pad_token_id
    for rows in slice(1), slice(3):
        request = {"input_ids": ids[rows], "attention_mask": mask[rows], "min_new_tokens": 12, "max_new_tokens": 12}
        request |= {"do_sample": False, "eos_token_id": 1, "pad_token_id": 2}
        assert torch.equal(model.generate(**request), other.generate(**request))


@pytest.mark.parametrize("family", [*FAMILIES, STATES_ALONE])
@pytest.mark.parametrize("bits", [16, 4])
def test_merged_as_trained(folders, family, bits, tmp_path):
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    model, tokenizer = adapted(folders(family), load_in_4bit=bits == 4)
    report = model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, save_method="merged_16bit")
    assert report is None or report.verification.method == "reload"
    model.eval()
    due, got = logits(model), logits(load(str(tmp_path / "merged"))[0])
    assert torch.equal(got, logits(stock(tmp_path / "merged")))
    # In 4 bits the merge takes the error of quantisation out of the model.
    assert (got - due).norm() <= (2e-5 if bits == 16 else 0.8) * due.norm()


def test_layers_are_told_whose_weights_the_family_reads_itself(folders, caplog):
    model, _ = adapted(folders("jamba"))
    assert not any("dt_proj" in name for name in model.peft_config["default"].target_modules)
    model, _ = load(folders("jamba"))
    model = FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "dt_proj"])
    assert "dt_proj: JambaForCausalLM reads the weights of these layers itself" in caplog.text
    assert any("dt_proj.lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("family", "read"), [("bamba", {"mamba.out_proj"}), ("mamba", {"mixer.dt_proj", "mixer.out_proj", "mixer.x_proj"})]
)
def test_weights_that_the_family_reads_itself_stay_out_of_4_bits(folders, family, read, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model, tokenizer = load(folders(family), load_in_4bit=True)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert isinstance(module, bnb.nn.Linear4bit) != (".".join(name.split(".")[-2:]) in read), name
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load(str(tmp_path), load_in_4bit=True)[0]), logits(model))
    again = stock(tmp_path)
    keep_weights_unpacked(again)
    assert torch.equal(logits(again), logits(model))


def test_weights_that_the_family_reads_itself_stay_out_of_fp8(folders):
    model, _ = load(folders("mamba"), load_in_fp8=True, dtype=torch.bfloat16)
    due = logits(stock(folders("mamba")))
    assert (logits(model) - due).norm() < 0.1 * due.norm()
    assert "float8" in str(model.backbone.layers[0].mixer.in_proj.weight.dtype)


def test_layers_that_lora_does_not_fit_are_left_out_or_refused():
    # Its output projection has a weight for each group of heads, which PEFT takes for one large layer.
    model = make_tiny("deepseek_v4", **DEEPSEEK_V4)
    with pytest.raises(UnsupportedError, match=r"LoRA does not fit .*o_a_proj"):
        FastLanguageModel.get_peft_model(model, target_modules=["o_a_proj", "o_b_proj"])
    with pytest.raises(UnsupportedError, match=r"LoRA does not fit .*o_a_proj"):
        FastLanguageModel.get_peft_model(model, target_modules=r".*self_attn\.o_[ab]_proj")
    model = FastLanguageModel.get_peft_model(model, target_modules="all-linear", use_gradient_checkpointing=False)
    trained = {name for name in step(model)[1] if "lora_B" in name}
    assert any("o_b_proj" in name for name in trained)
    assert not any("o_a_proj" in name for name in trained)


class Clamped(torch.nn.Linear):
    """A product with the weight whose code needs more than the weight."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("most", torch.tensor(1e3))

    def forward(self, x):
        return torch.minimum(super().forward(x), self.most)


def test_a_linear_layer_with_buffers_of_its_own_takes_lora():
    model = make_tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.o_proj = Clamped(attention.o_proj.in_features, attention.o_proj.out_features, bias=False)
    model = FastLanguageModel.get_peft_model(model, target_modules=["o_proj"], use_gradient_checkpointing=False)
    assert any("layers.0.self_attn.o_proj.lora_B" in name for name in step(model)[1])


@pytest.fixture
def trainer(folders, tmp_path):
    """Makes a trainer of TRL for a family."""
    from trl import SFTConfig, SFTTrainer

    def make(family, *, dtype=torch.float32, **options):
        model, tokenizer = adapted(folders(family), dtype=dtype)
        settings = {"per_device_train_batch_size": 4, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
        args = SFTConfig(output_dir=str(tmp_path), max_length=64, bf16=False, **settings, **options)
        return SFTTrainer(model=model, args=args, train_dataset=texts(8), processing_class=tokenizer)

    return make


def test_a_family_of_mixtures_trains_without_experts(trainer):
    made = trainer("granitemoehybrid-dense")
    made.train()
    assert made.state.log_history[0]["loss"] > 0
    assert trainer("granitemoehybrid").router_aux_loss_coef > 0


@pytest.mark.parametrize("family", ["falcon_h1", "lfm2", "qwen3_5_text", "minimax", "recurrent_gemma", "zamba"])
def test_documents_that_would_share_a_state_are_not_joined(trainer, family):
    """Not even in bfloat16, whose rounding may be more than what is read."""
    assert not trainer(family, dtype=torch.bfloat16).data_collator.padding_free
    for options in {"packing": True}, {"padding_free": True}:
        with pytest.raises(UnsupportedError, match="does not keep packed documents apart") as caught:
            trainer(family, dtype=torch.bfloat16, **options)
        assert ("causal_conv1d" in caught.value.why) == (family in ("falcon_h1", "lfm2", "qwen3_5_text", "zamba"))
