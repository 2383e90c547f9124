"""Every causal language model of transformers that can be built small: stock and adapted agree, trained and with LoRA.

Families that many people train besides follow twenty steps of the stock run, layer for layer as one node.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pantheraml.models.adapt import adapt
from pantheraml.models.layers import decoder
from pantheraml.models.layers.lazy import LazyLogits
from pantheraml.models.probe import FOREIGN_ERRORS
from pantheraml.models.targets import Scopes, resolve_targets

VOCABULARY = 128
TOKENS = 12
HIDDEN, WIDTH, HEADS, HEAD = 32, 48, 4, 8

# Attribute of a config -> its value in a small model, for whichever of these attributes a config has.
SMALL: dict[str, object] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "attention_hidden_size", "lru_width"), HIDDEN),
    **dict.fromkeys(("backbone_hidden_size", "embedding_dim", "pronunciation_embed_dim", "shape_embed_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dim_ff", "dff", "ffn_hidden_size", "d_inner"), WIDTH),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "intermediate_size_mlp"), WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), WIDTH),
    **dict.fromkeys(("shared_intermediate_size", "dense_intermediate_size", "router_hidden_size"), WIDTH),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_blocks", "num_layers_per_stack"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "d_head", "v_head_dim", "swa_head_dim", "linear_head_dim", "kv_channels"), HEAD
    ),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), HEAD),
    **dict.fromkeys(("rotary_dim", "index_head_dim", "attention_head_dim", "dim_head", "attention_head_size"), HEAD),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank", "hc_lowrank", "gated_norm_rank"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "topk_group", "n_group", "moe_k"), 2),
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions"), 64),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions", "mem_len", "ngram_vocab_size_base"), 64),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "laurel_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("sliding_window", "local_attention", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("first_k_dense_replace", "bos_token_id"), 1),
    **dict.fromkeys(("audio_vocab_size", "encoder_hash_byte_group_vocab", "index_topk", "num_centroids"), 64),
    "num_kv_shared_layers": 0,
    "split_ngram_parts": 2,
    "ple_embed_dim": HIDDEN,
    "make_ngram_vocab_size_divisible_by": 8,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Tried in this order until one gives a model that runs: sizes that have to fit one another differ between families.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
OVERLAYS: tuple[dict[str, object], ...] = (
    {},
    {"num_key_value_heads": HEADS},
    dict.fromkeys(LAYERS, 4),
    {**dict.fromkeys(LAYERS, 4), "num_key_value_heads": HEADS},
    {"head_dim": HEAD, "num_key_value_heads": HEADS, "n_routed_experts": 4, "n_shared_experts": 1},
)

# What a family needs besides.
FAMILY: dict[str, dict[str, object]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "head_dim": 8},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "hrm_text": {"num_hidden_layers": 4, "num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [3, 4], "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
        # It seeds its dropout from the clock.
        "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "xlstm": {"num_heads": 2, "chunk_size": 4, "mode": "train", "embedding_dim": 32},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2,
              "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "mamba_headdim": 16,
               "n_mamba_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16, "num_query_groups": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# These compute their loss from an arrangement of logits that only real ones have.
READS_LOGITS = {"prophetnet"}
GRADIENT_TOLERANCE = 3e-5

# These have to be served: norms or gated MLPs as far as the family has them, and the head.
MUST_BE_ACCELERATED = {
    "llama": {"norm", "glu", "head"},
    "mistral": {"norm", "glu", "head"},
    "ministral3": {"norm", "glu", "attention", "head"},
    "qwen2": {"norm", "glu", "head"},
    "qwen3": {"norm", "glu", "head"},
    "gemma": {"norm", "glu", "head"},
    "gemma2": {"norm", "glu", "head"},
    "gemma3_text": {"norm", "glu", "head"},
    "phi3": {"norm", "glu", "head"},
    "granite": {"norm", "glu", "head"},
    "olmo2": {"norm", "glu", "head"},
    "cohere": {"norm", "glu", "head"},
    "gpt_oss": {"norm", "experts", "head"},
    "qwen3_moe": {"norm", "experts", "head"},
    "mixtral": {"norm", "experts", "head"},
    "deepseek_v3": {"norm", "glu", "experts", "head"},
}

# Layers that no node serves yet.
IN_PARTS = {"gpt_oss", "qwen3_moe", "mixtral", "deepseek_v3"}


def _shrink(config, overlay: dict[str, object]) -> dict[str, object]:
    small = {**SMALL, **overlay}
    arguments: dict[str, object] = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            arguments[name] = _shrink(value, overlay)
        elif name in small and isinstance(value, (int, float)) and not isinstance(value, bool):
            arguments[name] = small[name]
        elif name in overlay and value is None:
            arguments[name] = overlay[name]
    return arguments


def build(model_type: str, overlay: dict[str, object]) -> torch.nn.Module:
    """Build a small random model of an architecture, in float32 and training mode."""
    torch.manual_seed(0)
    default = AutoConfig.for_model(model_type)
    config = AutoConfig.for_model(model_type, **{**_shrink(default, overlay), **FAMILY.get(model_type, {})})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Families start many weights at zero or one, which would hide an error.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def run(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor):
    """Return loss, gradients and logits of one training step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    output = model(input_ids=ids, labels=labels, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), gradients, output.logits


def first_that_runs(model_type: str, ids: torch.Tensor, labels: torch.Tensor):
    """Build the first small form that trains with the stock code; the reasons of all forms when none does."""
    reasons = []
    for overlay in OVERLAYS:
        try:
            model = build(model_type, overlay)
            return model, run(model, ids, labels)
        # Whatever a foreign constructor or forward raises for sizes that do not fit, the next form is tried.
        except (*FOREIGN_ERRORS, StrictDataclassError) as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return None, list(dict.fromkeys(reasons))


def compare(model_type: str, stock, adapted) -> None:
    """Loss and every gradient within the eager error of float32, logits equal."""
    (loss, gradients, logits), (our_loss, our_gradients, our_logits) = stock, adapted
    torch.testing.assert_close(our_loss, loss, rtol=2e-6, atol=2e-6)
    assert our_gradients.keys() == gradients.keys()
    overall = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # Sums of many terms: an element's error goes with the largest, not with itself.
        tolerance = GRADIENT_TOLERANCE * gradient.abs().max().item() + 1e-6 * overall
        difference = (our_gradients[name] - gradient).abs().max().item()
        assert difference <= tolerance, (
            f"{model_type}: gradient of {name} differs by {difference:.2e} > {tolerance:.2e}"
        )
    torch.testing.assert_close(our_logits + 0, logits, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def results_folder(tmp_path_factory) -> Path:
    """One folder for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "architecture-sweep"
    folder.mkdir(exist_ok=True)
    return folder


def record(folder: Path, model_type: str, entry: dict[str, object]) -> None:
    """Keep a result; whoever brings the last one tells the totals."""
    partial = folder / f"{model_type}.partial"
    partial.write_text(json.dumps(entry))
    partial.rename(folder / f"{model_type}.json")
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if results.keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys():
        warnings.warn(summary(results), UserWarning, stacklevel=2)


def summary(results: dict[str, dict[str, object]]) -> str:
    """Totals and the reasons of the rest."""
    trained = [name for name, entry in results.items() if entry["trains"]]
    layers = [name for name in trained if set(results[name]["roles"]) & {"norm", "glu"}]
    heads = [name for name in trained if "head" in results[name]["roles"]]
    lines = [
        f"{len(results)} causal language models: {len(trained)} train and agree with stock, "
        f"{len(layers)} of them with fused layers, {len(heads)} with a fused head"
    ]
    lines += [f"  head only: {', '.join(sorted(set(trained) - set(layers)))}"]
    lines += [
        f"  not built small: {name} ({entry['reason']})" for name, entry in results.items() if not entry["trains"]
    ]
    return "\n".join(lines)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels."""
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, labels


@pytest.mark.parametrize("model_type", list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_stock_and_adapted_agree(model_type, results_folder):
    ids, labels = batch()
    model, stock = first_that_runs(model_type, ids, labels)
    if model is None:
        assert model_type not in MUST_BE_ACCELERATED, stock
        record(results_folder, model_type, {"trains": False, "reason": "; ".join(stock)})
        pytest.skip(f"{model_type} cannot be built small: {'; '.join(stock)}")
    report = adapt(model)
    adapted = run(model, ids, labels)
    assert isinstance(adapted[2], LazyLogits)
    if model_type not in READS_LOGITS:
        assert adapted[2].is_pending(), f"{model_type} computes its loss through the logits"
    compare(model_type, stock, adapted)
    roles = {entry.role for entry in report.swapped}
    assert MUST_BE_ACCELERATED.get(model_type, {"head"}) <= roles, report.summary()
    print(f"{model_type}: {report.summary()}")
    record(results_folder, model_type, {"trains": True, "roles": sorted(roles)})


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    """LoRA on every linear layer and every stack of experts, none of it at zero."""
    targets = resolve_targets(model, None, scopes=Scopes())
    torch.manual_seed(2)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        init_lora_weights=False,
    )
    return get_peft_model(model, config).train()


@pytest.fixture
def nodes(monkeypatch) -> list[object]:
    """The layers that ran as one node."""
    seen: list[object] = []
    original = decoder.decoder_layer
    monkeypatch.setattr(decoder, "decoder_layer", lambda *args: seen.append(args) or original(*args))
    return seen


@pytest.mark.parametrize("model_type", list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_stock_and_adapted_agree_with_lora(model_type, nodes):
    ids, labels = batch()
    model, reasons = first_that_runs(model_type, ids, labels)
    if model is None:
        pytest.skip(f"{model_type} cannot be built small: {'; '.join(reasons)}")
    tuned = with_lora(model)
    stock = run(tuned, ids, labels)
    report = adapt(tuned)
    nodes.clear()
    compare(model_type, stock, run(tuned, ids, labels))
    if model_type in MUST_BE_ACCELERATED:
        assert {"lora"} <= {entry.role for entry in report.swapped}, report.summary()
        assert not [entry for entry in report.left if entry.role != "layer"], report.summary()
        assert model_type in IN_PARTS or len(nodes) == model.config.num_hidden_layers


@pytest.mark.parametrize("model_type", MUST_BE_ACCELERATED)
def test_twenty_steps_follow_the_stock_run(model_type, nodes):
    """AdamW on LoRA in float32: losses within 2e-5 of the stock run's, and norms of gradients, which move on, 2e-3."""
    ids, labels = batch()
    model, _ = first_that_runs(model_type, ids, labels)
    tuned = with_lora(model)
    twin = copy.deepcopy(tuned)
    adapt(tuned)

    def trained(model: torch.nn.Module) -> torch.Tensor:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        figures = []
        for _ in range(20):
            loss, _, _ = run(model, ids, labels)
            figures.append(torch.stack([loss, torch.nn.utils.clip_grad_norm_(parameters, 1.0)]))
            optimizer.step()
        return torch.stack(figures)

    ours, theirs = trained(tuned), trained(twin)
    assert theirs[-1, 0] < theirs[0, 0] - 2e-3, "the run learns nothing that could differ"
    assert ((ours - theirs).abs() <= torch.tensor([2e-5, 2e-3]) * theirs).all(), (ours, theirs)
    assert model_type in IN_PARTS or len(nodes) == 20 * model.config.num_hidden_layers
