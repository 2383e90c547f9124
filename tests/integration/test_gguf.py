"""GGUF files of tiny models of every family, read back by transformers' own loader."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CORPUS, build_tokenizer, make_tiny
from peft import LoraConfig, get_peft_model

from pantheraml import save as facade
from pantheraml.errors import CheckpointError, ConfigError, UnsupportedError

gguf = pytest.importorskip("gguf")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

from pantheraml.export import verify  # noqa: E402
from pantheraml.export.gguf import check, convert, tensors, writer  # noqa: E402
from pantheraml.export.gguf.families import FAMILIES  # noqa: E402
from pantheraml.export.gguf.metadata import rope_tensors  # noqa: E402
from pantheraml.export.gguf.pretokenizers import PRE_TOKENIZERS, SAMPLE, as_llama_cpp  # noqa: E402
from pantheraml.export.gguf.tokenizer import read_tokenizer  # noqa: E402

GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
MODELS = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {**GEMMA, "layer_types": None},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6},
    "phi3": {},
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0},
    "olmo2": {},
    "gpt_oss": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def tiny(family: str, **overrides):
    """A tiny model whose norms and biases matter."""
    model = make_tiny(family, **MODELS[family], **overrides)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def logits(model):
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def reload(path: Path, model):
    """The file as transformers loads it; settings that its loader does not read come from the model."""
    config = model.config
    if config.model_type == "mistral":
        config = AutoConfig.for_model("llama", **{k: v for k, v in config.to_dict().items() if k != "model_type"})
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)


NAMES = {
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate_inp": "mlp.router",
}


def rebuild(path: Path, model):
    """The model that a file holds, for families that transformers does not load: read anew, by what llama.cpp means."""
    config, state = model.config, {}
    tensors = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(
            [int(n) for n in reversed(tensor.shape)]
        )
        for tensor in gguf.GGUFReader(path).tensors
    }
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if stem in top:
            state[f"{top[stem]}.{leaf}"] = tensor
            continue
        _, layer, kind = stem.split(".")
        prefix = f"model.layers.{layer}."
        if kind == "attn_sinks":
            state[f"{prefix}self_attn.sinks"] = tensor
        elif kind == "ffn_down_exps":
            suffix = "" if leaf == "weight" else "_bias"
            state[f"{prefix}mlp.experts.down_proj{suffix}"] = tensor.mT if leaf == "weight" else tensor
        elif kind == "ffn_gate_exps":
            pair = torch.stack([tensor, tensors[name.replace("gate", "up")]], dim=2 if leaf == "weight" else -1)
            suffix = "" if leaf == "weight" else "_bias"
            pair = pair.flatten(1, 2)
            state[f"{prefix}mlp.experts.gate_up_proj{suffix}"] = pair.mT if leaf == "weight" else pair
        elif kind != "ffn_up_exps":
            if kind in ("attn_q", "attn_k") and config.model_type == "granite":
                heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
                tensor = tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
            state[f"{prefix}{NAMES[kind]}.{leaf}"] = tensor
    if config.model_type == "gemma":
        state = {name: tensor - 1 if "norm" in name else tensor for name, tensor in state.items()}
    rebuilt = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = rebuilt.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return rebuilt.eval()


def spread(candidate, reference):
    return float((candidate - reference).norm() / (reference - reference.mean(-1, keepdim=True)).norm())


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def sentencepiece_like():
    """A BPE with bytes to fall back on and a space in front, as Llama 2's tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    space = "\u2581"
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    trained.train_from_iterator([space + line.replace(" ", space) for line in CORPUS * 4], trainer)
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocabulary = {name: index for index, name in enumerate([*names, *pieces])}
    merges = [tuple(pair) for pair in model["merges"]]
    options = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("family", MODELS)
def test_every_family_is_written_and_verified(family, tmp_path, tokenizer, capsys):
    model = tiny(family)
    types = ["f32", "f16", "bf16", "q8_0", "q4_0"]
    result = facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer, quantization_method=types)
    files = [Path(name) for name in result["gguf_files"]]
    assert [path.name for path in files] == [f"m.{name.upper()}.gguf" for name in types]
    assert sorted(entry.name for entry in (tmp_path / "m_gguf").iterdir()) == sorted(
        ["Modelfile", *(path.name for path in files)]
    )
    reader = gguf.GGUFReader(files[0])
    assert reader.get_field("general.architecture").contents() == FAMILIES[family].arch
    assert reader.get_field("tokenizer.chat_template").contents() == tokenizer.chat_template
    read = reload if FAMILIES[family].reload_as is not None else rebuild
    if read is reload:
        assert capsys.readouterr().err.count("the first 16 of 16 greedy tokens are the same") >= 2  # f32, and the near
    reference = logits(model)
    torch.testing.assert_close(logits(read(files[0], model)), reference, rtol=1e-4, atol=1e-4)
    # Measured: 0.001, 0.009, 0.03 and 0.36 for the six layers of gemma3, less for the others.
    for path, budget in zip(files[1:], (0.01, 0.01, 0.05, 0.5), strict=True):
        assert 0.0 < spread(logits(read(path, model)), reference) < budget, path.name
    if read is rebuild or not check.loader_follows(read_tokenizer(tokenizer, len(tokenizer))):
        return
    loaded = AutoTokenizer.from_pretrained(tmp_path / "m_gguf", gguf_file=files[0].name)
    assert loaded(SAMPLE, add_special_tokens=False).input_ids == tokenizer(SAMPLE, add_special_tokens=False).input_ids
    assert loaded.chat_template == tokenizer.chat_template


def test_mxfp4_holds_experts_and_is_exact_for_weights_that_were_in_it(tmp_path, tokenizer):
    kind = gguf.GGMLQuantizationType.MXFP4
    model = tiny("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):  # blocks run along the inputs
                weight = getattr(layer.mlp.experts, name)
                rows = weight.mT.contiguous().numpy()
                weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(rows, kind), kind)).mT)
    path = Path(facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer, "MXFP4")["gguf_files"][0])
    reader = gguf.GGUFReader(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kinds[f"blk.0.ffn_{x}_exps.weight"] for x in ("gate", "up", "down")} == {"MXFP4"}
    assert {kinds[f"blk.0.attn_{x}.weight"] for x in ("q", "k", "v", "output")} == {"Q8_0"}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert {kinds["blk.0.ffn_gate_inp.weight"], kinds["blk.0.ffn_up_exps.bias"], kinds["blk.0.attn_sinks.weight"]} == {
        "F32"
    }
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    experts = rebuild(path, model).model.layers[1].mlp.experts
    assert torch.equal(experts.gate_up_proj, model.model.layers[1].mlp.experts.gate_up_proj)
    assert torch.equal(experts.down_proj, model.model.layers[1].mlp.experts.down_proj)
    assert spread(logits(rebuild(path, model)), logits(model)) < 0.05
    with pytest.raises(ConfigError, match="llama models are none"):
        facade.save_pretrained_gguf(tiny("llama"), tmp_path / "d", tokenizer, "mxfp4")
    assert not (tmp_path / "d_gguf").exists()


def test_adapters_are_merged_and_the_call_returns_what_users_read(tmp_path, tokenizer):
    base = tiny("llama", dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = facade.save_pretrained_gguf(model, str(tmp_path / "m"), tokenizer, ["not_quantized", "Q8_0", "q5_1"])
    names = [tmp_path / "m_gguf" / f"m.{kind}.gguf" for kind in ("BF16", "Q8_0", "Q5_1")]
    assert result == {
        "save_directory": str(tmp_path / "m"),
        "gguf_directory": str(tmp_path / "m_gguf"),
        "gguf_files": [str(name) for name in names],
        "modelfile_location": str(tmp_path / "m_gguf" / "Modelfile"),
        "want_full_precision": False,
        "is_vlm": False,
        "fix_bos_token": False,
    }
    assert not (tmp_path / "m").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.merge_and_unload()
    assert spread(logits(reload(names[0], base)), logits(base.float())) < 0.02


def test_types_of_tensors(tmp_path, tokenizer, capsys):
    model = tiny("llama", hidden_size=48, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
    path = Path(facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer, "q4_0")["gguf_files"][0])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"  # rows of 96
    assert kinds["blk.0.attn_q.weight"] == kinds["output.weight"] == "F16"  # rows of 48
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    assert "rows of 48 are not made of blocks of 32" in capsys.readouterr().err


def test_values_beyond_f16_stay_in_f32(tmp_path, tokenizer):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    path = Path(facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer, "f16")["gguf_files"][0])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F32"
    assert kinds["blk.1.ffn_down.weight"] == "F16"


def test_llama3_rope_factors_are_those_of_transformers():
    settings = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny("llama", rope_parameters=settings)
    factors = torch.from_numpy(rope_tensors(model.config)["rope_freqs.weight"])
    width = model.config.head_dim
    plain = 500000.0 ** -(torch.arange(0, width, 2) / width)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    assert factors.min() == 1.0
    assert factors.max() == 8.0


def test_sentencepiece_kind_round_trips(tmp_path):
    tokenizer = sentencepiece_like()
    model = tiny("llama", vocab_size=len(tokenizer) + 3)
    path = Path(facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer, "f32")["gguf_files"][0])
    written = read_tokenizer(tokenizer, len(tokenizer) + 3)
    assert (written.model, written.space_prefix, written.tokens[-1]) == ("llama", True, f"[PAD{len(tokenizer) + 2}]")
    if not check.loader_follows(written):
        return
    loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (SAMPLE, *CORPUS):
        assert loaded(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=lambda pre: pre.name)
def test_splitting_rules_are_recognised(pre, tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    own = PreTrainedTokenizerFast(tokenizer_object=as_llama_cpp(pre, state["vocab"], merges, []))
    assert read_tokenizer(own, len(own)).pre == pre.name


def test_unknown_splitting_rule_is_refused(tokenizer):
    from tokenizers import pre_tokenizers

    own = build_tokenizer()
    steps = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(use_regex=False)]
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    with pytest.raises(UnsupportedError, match="splits text differently"):
        read_tokenizer(own, len(own))


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("qwen2", {"rope_parameters": DYNAMIC}, "rope type 'dynamic'"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("qwen3", {"attention_bias": True}, "no biases"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 6}, "every layer 6"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llama_cpp_would_compute_differently_is_refused(family, overrides, reason, tmp_path, tokenizer):
    model = make_tiny(family, **{**MODELS[family], **overrides})
    with pytest.raises(UnsupportedError, match=rf"{reason}(.|\n)*convert_hf_to_gguf"):
        facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer)
    assert not list(tmp_path.iterdir())


def test_other_architectures_name_the_converter(tmp_path, tokenizer):
    with pytest.raises(UnsupportedError, match=r"'starcoder2'(.|\n)*convert_hf_to_gguf"):
        facade.save_pretrained_gguf(make_tiny("starcoder2"), tmp_path / "m", tokenizer)


def _spoil_rope(monkeypatch):
    monkeypatch.setitem(tensors.TRANSFORMS, "rope_rows_q", lambda tensor, config: tensor)


def _spoil_weights(monkeypatch):
    quantize = gguf.quantize
    monkeypatch.setattr(gguf, "quantize", lambda data, kind: quantize(data * 1.01, kind))


def _spoil_setting(monkeypatch):
    original = writer.hyper_parameters
    changed = {"llama.rope.freq_base": ("float32", 5e5)}
    monkeypatch.setattr(writer, "hyper_parameters", lambda config, family: original(config, family) | changed)


def _spoil_merges(monkeypatch):
    original = convert.read_tokenizer

    def reversed_merges(tokenizer, size):
        written = original(tokenizer, size)
        written.merges.reverse()
        return written

    monkeypatch.setattr(convert, "read_tokenizer", reversed_merges)


def _spoil_by_crash(monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(check.Checker, "check", fail)


SPOILERS = {
    "rope rows": (_spoil_rope, CheckpointError, "computes something else"),
    "weights": (_spoil_weights, CheckpointError, "tensor read back"),
    "setting": (_spoil_setting, CheckpointError, "setting read back"),
    "merges": (_spoil_merges, CheckpointError, "other ids"),
    "interrupt": (_spoil_by_crash, KeyboardInterrupt, None),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_a_spoiled_file_never_gets_its_name(name, tmp_path, tokenizer, monkeypatch):
    spoil, error, message = SPOILERS[name]
    earlier = tmp_path / "m_gguf"
    earlier.mkdir()
    (earlier / "m.F32.gguf").write_bytes(b"earlier")
    spoil(monkeypatch)
    with pytest.raises(error, match=message):
        facade.save_pretrained_gguf(tiny("llama"), tmp_path / "m", tokenizer, "f32")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m_gguf"]
    assert [entry.name for entry in earlier.iterdir()] == ["m.F32.gguf"]
    assert (earlier / "m.F32.gguf").read_bytes() == b"earlier"


def test_a_wrong_greedy_token_never_gets_its_name(tmp_path, tokenizer, monkeypatch):
    """The loaded file's model alone gets a logit that is nothing to the RMS of all."""
    real, models = verify.logits_of, []

    def changed(model, inputs):
        logits = real(model, inputs)
        if not any(model is one for one in models):
            models.append(model)
        if len(models) == 3:  # after the merged folder's and the trained one
            logits[0, -3, 300] = logits[0, -3].max() + 4 * logits.std()
        return logits

    monkeypatch.setattr(verify, "logits_of", changed)
    with pytest.raises(CheckpointError, match="after the same 14 tokens it chooses 300"):
        facade.save_pretrained_gguf(tiny("llama"), tmp_path / "m", tokenizer, "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_told_before_writing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match="not enough disk space"):
        facade.save_pretrained_gguf(tiny("llama"), tmp_path / "m", tokenizer)
    assert not list(tmp_path.iterdir())


def test_room_for_the_files_is_asked_for_before_the_merge(tmp_path, tokenizer, monkeypatch):
    model = tiny("llama")
    merged = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(convert, "save_merged", None)
    types = ["f32", "q8_0", "f16"]
    free = int(merged * (1 + 1 + 34 / 128 + 0.5)) - 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, free))
    with pytest.raises(CheckpointError, match="the merged model and the GGUF files"):
        facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer, types)
    assert not list(tmp_path.iterdir())
    free += 2000
    with pytest.raises(TypeError, match="not callable"):  # the merge
        facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer, types)


def test_a_model_in_shards_is_refused_on_every_rank(tmp_path, tokenizer, monkeypatch):
    from pantheraml.export.gguf import api

    monkeypatch.setattr(api, "is_sharded", lambda model: True)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UnsupportedError, match=r"save_to_gguf\(folder\)"):
        facade.save_pretrained_gguf(tiny("llama"), tmp_path / "m", tokenizer)


def test_k_quants_without_the_tool_give_q8_0_and_the_command(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = facade.save_pretrained_gguf(tiny("llama"), tmp_path / "a b", tokenizer, ["quantized", "f16"])
    folder = tmp_path / "a b_gguf"
    assert result["gguf_files"] == [str(folder / "a b.F16.gguf"), str(folder / "a b.Q8_0.gguf")]
    command = f"llama-quantize --allow-requantize '{folder}/a b.Q8_0.gguf' '{folder}/a b.Q4_K_M.gguf' Q4_K_M"
    assert command in capsys.readouterr().err


def test_k_quants_through_the_tool(tmp_path, tokenizer):
    tool, record = tmp_path / "bin" / "llama-quantize", tmp_path / "argv.json"
    tool.parent.mkdir()
    script = (
        f"#!{sys.executable}\nimport json, pathlib, shutil, sys\n"
        f"pathlib.Path({str(record)!r}).write_text(json.dumps(sys.argv))\nshutil.copyfile(sys.argv[-3], sys.argv[-2])\n"
    )
    tool.write_text(script)
    tool.chmod(0o755)
    options = {"llama_quantize": tool.parent, "first_conversion": "f16"}
    result = facade.save_pretrained_gguf(tiny("llama"), tmp_path / "-m; rm", tokenizer, ["q4_k_m", "q8_0"], **options)
    assert [Path(name).name for name in result["gguf_files"]] == ["-m; rm.Q4_K_M.gguf", "-m; rm.Q8_0.gguf"]
    assert sorted(entry.name for entry in (tmp_path / "-m; rm_gguf").glob("*.gguf")) == [
        "-m; rm.Q4_K_M.gguf",
        "-m; rm.Q8_0.gguf",
    ]
    argv = json.loads(record.read_text())
    assert len(argv) == 4
    assert argv[2].startswith("/")
    assert argv[3] == "Q4_K_M"


# Stands in for llama.cpp's script: writes a Starcoder 2 model in 32-bit floats, whatever type is asked for.
CONVERTER = """
import json, os, sys
from pathlib import Path
import gguf
from safetensors.numpy import load_file
folder, out, target, outtype, kind = sys.argv[1:]
assert (out, outtype) == ("--outfile", "--outtype") and kind in ("f32", "q8_0"), sys.argv
config = json.loads(Path(folder, "config.json").read_text())
writer = gguf.GGUFWriter(target, "starcoder2")
for add, name in (("block_count", "num_hidden_layers"), ("context_length", "max_position_embeddings"),
                  ("embedding_length", "hidden_size"), ("feed_forward_length", "intermediate_size"),
                  ("head_count", "num_attention_heads"), ("head_count_kv", "num_key_value_heads"),
                  ("layer_norm_eps", "norm_epsilon"), ("vocab_size", "vocab_size")):
    getattr(writer, f"add_{add}")(config[name])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STARCODER2, config["num_hidden_layers"])
for name, tensor in load_file(Path(folder, "model.safetensors")).items():
    stem, _, leaf = name.rpartition(".")
    writer.add_tensor(f"{names.get_name(stem)}.{leaf}", tensor * float(os.environ.get("SPOIL", 1)))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return folder


def starcoder(**overrides):
    return make_tiny("starcoder2", use_bias=True, norm_epsilon=1e-5, sliding_window=None, **overrides)


def test_other_architectures_by_the_users_converter(tmp_path, tokenizer, checkout, capsys):
    model = get_peft_model(starcoder(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    result = facade.save_pretrained_gguf(model, tmp_path / "a b", tokenizer, ["F32", "q8_0"], converter=checkout)
    assert [Path(name).name for name in result["gguf_files"]] == ["a b.F32.gguf", "a b.Q8_0.gguf"]
    assert sorted(entry.name for entry in (tmp_path / "a b_gguf").glob("*.gguf")) == ["a b.F32.gguf", "a b.Q8_0.gguf"]
    assert capsys.readouterr().err.count("the first 16 of 16 greedy tokens are the same") >= 2
    path = Path(result["gguf_files"][0])
    loaded = reload(path, model.get_base_model())
    torch.testing.assert_close(logits(loaded), logits(model.merge_and_unload()), rtol=1e-4, atol=1e-4)


def test_what_the_converter_spoils_never_gets_its_name(tmp_path, tokenizer, checkout, monkeypatch):
    script = checkout / "convert_hf_to_gguf.py"
    save = partial(facade.save_pretrained_gguf, starcoder(), tmp_path / "m", tokenizer, converter=script)
    for kinds, error, message in (
        ("q4_0", ConfigError, "does not write 'q4_0'"),
        ("mxfp4", ConfigError, "does not write 'mxfp4'"),
        ("f16", CheckpointError, r"(?s)failed with exit code 1.*convert_hf_to_gguf.py.*AssertionError"),
    ):
        with pytest.raises(error, match=message):
            save(kinds)
    monkeypatch.setenv("SPOIL", "1.3")
    with pytest.raises(CheckpointError, match="computes something else"):
        save("f32")
    script.write_text("import sys; open(sys.argv[3], 'w').write('no file')")
    with pytest.raises(CheckpointError, match="cannot be read"):
        save("f32")
    with pytest.raises(ConfigError, match=r"there is no convert_hf_to_gguf\.py"):
        facade.save_pretrained_gguf(starcoder(), tmp_path / "m", tokenizer, converter=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["llama.cpp"]


def test_families_that_are_written_here_need_no_converter(tmp_path, tokenizer, checkout):
    (checkout / "convert_hf_to_gguf.py").write_text("raise SystemExit(1)")
    facade.save_pretrained_gguf(tiny("llama"), tmp_path / "m", tokenizer, "f32", converter=checkout)
    assert (tmp_path / "m_gguf" / "m.F32.gguf").is_file()


def test_arguments_that_cannot_be_honoured(tmp_path, tokenizer):
    model = tiny("llama")
    with pytest.raises(ValueError, match="tokenizer"):
        facade.save_pretrained_gguf(model, tmp_path / "m")
    for options, error, message in (
        ({"push_to_hub": True}, ConfigError, "push_to_hub_gguf"),
        ({"save_method": "merged_4bit"}, UnsupportedError, "save_method"),
        ({"state_dict": {}}, UnsupportedError, "state_dict"),
        ({"safe_serialization": False}, UnsupportedError, "safe_serialization"),
        ({"quantization_method": "iq2_xs"}, ConfigError, "importance matrix"),
        ({"first_conversion": "q4_k_m"}, ConfigError, "first conversion"),
        ({"imatrix_file": "x", "quantization_method": "f16"}, ConfigError, "makes no difference"),
        ({"quantization_method": 8}, TypeError, "neither the name"),
    ):
        with pytest.raises(error, match=message):
            facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer, **options)
    with pytest.raises(CheckpointError, match="has ids up to"):
        facade.save_pretrained_gguf(make_tiny("llama", vocab_size=64), tmp_path / "m", tokenizer)
    assert facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer, is_main_process=False) is None
    assert not list(tmp_path.iterdir())


def test_a_merged_folder_is_converted_and_other_files_stay(tmp_path, tokenizer):
    model = tiny("qwen3")
    result = facade.save_pretrained_gguf(model, tmp_path / "m", tokenizer, "f32", merge_is_disposable=False)
    assert (tmp_path / "m" / "model.safetensors").exists()
    second = facade.save_to_gguf(tmp_path / "m", quantization_method="q8_0")
    assert second["gguf_directory"] == result["gguf_directory"]
    kept = sorted(entry.name for entry in (tmp_path / "m_gguf").glob("*.gguf"))
    assert kept == ["m.F32.gguf", "m.Q8_0.gguf"]


def test_push_uploads_files_and_card(tmp_path, tokenizer, monkeypatch):
    from pantheraml.export.gguf import api

    seen = {}

    def upload(folder, target):
        seen.update({path.name: path.read_bytes() for path in folder.iterdir()})
        return target.repo_id

    monkeypatch.setattr(api, "create_repo", lambda target: target.repo_id)
    monkeypatch.setattr(api, "upload", upload)
    assert facade.push_to_hub_gguf(tiny("llama"), "me/mine", tokenizer, "q8_0", datasets=["d/e"]) == "me/mine"
    assert set(seen) == {"mine.Q8_0.gguf", "Modelfile", "README.md"}
    assert b"- gguf" in seen["README.md"]
    assert b"d/e" in seen["README.md"]
    with pytest.raises(ConfigError, match="tokenizer"):
        facade.push_to_hub_gguf(tiny("llama"), "me/mine")


def test_models_carry_the_methods(tiny_llama_dir, tmp_path):
    from pantheraml.models.loader import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_llama_dir), max_seq_length=64, dtype=torch.float32)
    model = FastLanguageModel.get_peft_model(model, r=4)
    result = model.save_pretrained_gguf(str(tmp_path / "m"), tokenizer, quantization_method="q8_0")
    assert Path(result["gguf_files"][0]).stat().st_size > 0


def cli_argv(model: Path, tmp_path: Path, *flags: str) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "The quick brown fox."}\n' * 4)
    argv = [
        "--model_name",
        str(model),
        "--dataset",
        str(rows),
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "1",
    ]
    return [*argv, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", *flags]


def test_the_command_line_saves_and_pushes(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    from pantheraml.cli import main
    from pantheraml.export.gguf import api

    pushed = []
    monkeypatch.setattr(api, "create_repo", lambda target: target.repo_id)
    monkeypatch.setattr(api, "upload", lambda folder, target: pushed.extend(path.name for path in folder.iterdir()))
    flags = ["--save_gguf", "--save_path", str(tmp_path / "mine"), "--push_gguf", "--hub_path", "me/pushed"]
    assert main(cli_argv(tiny_llama_dir, tmp_path, *flags, "--quantization", "q8_0", "F16")) == 0
    files = sorted(entry.name for entry in (tmp_path / "mine_gguf").glob("*.gguf"))
    assert files == ["mine.F16.gguf", "mine.Q8_0.gguf"]
    assert {"pushed.F16.gguf", "pushed.Q8_0.gguf", "README.md"} <= set(pushed)
    assert "GGUF files: " in capsys.readouterr().out


def test_the_command_line_refuses_unknown_types_before_training(tiny_llama_dir, tmp_path, capsys):
    from pantheraml.cli import main

    assert main(cli_argv(tiny_llama_dir, tmp_path, "--save_gguf", "--quantization", "q9_9")) == 2
    assert "unknown GGUF type 'q9_9'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
import gguf
from pantheraml import save
folder, target = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
written = gguf.GGUFWriter.write_tensor_data
count = 0
def die(self, *args, **kwargs):
    global count
    count += 1
    if count == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return written(self, *args, **kwargs)
gguf.GGUFWriter.write_tensor_data = die
save.save_pretrained_gguf(model, target, tokenizer)
"""


def test_a_killed_process_leaves_no_final_name(tiny_llama_dir, tmp_path, tokenizer):
    (tmp_path / "kill.py").write_text(KILLED)
    target = tmp_path / "m"
    done = subprocess.run([sys.executable, "kill.py", tiny_llama_dir, target], cwd=tmp_path, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    left = [entry.name for entry in tmp_path.iterdir() if entry.name != "kill.py"]
    assert len(left) == 1
    assert left[0].startswith(".tmp-m_gguf")
    facade.save_pretrained_gguf(tiny("llama"), target, tokenizer)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["kill.py", "m_gguf"]
