"""llama.cpp computes from GGUF files what transformers computes from the model. Run by ``make test-llamacpp``."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from build import source
from conftest import CORPUS, build_tokenizer, make_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pantheraml import save as facade
from pantheraml.assets import demo_data, demo_model_dir
from pantheraml.data import sources

gguf = pytest.importorskip("gguf")

from pantheraml.export.gguf.pretokenizers import SAMPLE  # noqa: E402

BUILT = Path(__file__).resolve().parents[2] / ".work" / "llamacpp"
GREEDY = BUILT / "greedy"
TOKENS = 16
pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(not GREEDY.is_file(), reason="llama.cpp is not built; run `make test-llamacpp`"),
]

GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("llama", {"attention_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32, **EXPERTS}),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**GEMMA, "sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {**GEMMA, "num_hidden_layers": 6, "sliding_window": 8}),
    "phi3": ("phi3", {}),
    "granite": ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 3.0}),
    "olmo2": ("olmo2", {}),
    "gpt_oss": ("gpt_oss", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
}
# llama.cpp looks the GELU of Gemma up in a table of 16-bit floats, and rounds the ends of yarn's ramp for gpt-oss.
COARSE = ("gemma", "gemma2", "gemma3_text", "gpt_oss")
PROMPT = [0, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 33]


def trained(family: str, **overrides):
    """A tiny model that learnt to count in steps by heart, so that its choices are clear ones."""
    model = make_tiny(family, **overrides)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.tensor([[*PROMPT, *range(40, 40 + 7 * TOKENS, 7)]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def llama_cpp(*arguments: object) -> list[str]:
    command = [str(GREEDY), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def computed(path: Path, prompt: list[int], *adapter: Path) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens after a prompt, and the logits of the first."""
    ids, logits = llama_cpp(path, "generate", TOKENS, ",".join(map(str, prompt)), *adapter)
    return [int(value) for value in ids.split(",")], torch.tensor([float(value) for value in logits.split(",")])


@torch.no_grad()
def expected(model, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    logits = []
    ids = torch.tensor([prompt])
    for _ in range(TOKENS):
        logits.append(model(input_ids=ids).logits[0, -1].float())
        ids = torch.cat([ids, logits[-1].argmax()[None, None]], dim=1)
    return ids[0, len(prompt) :].tolist(), logits[0]


def spread(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    return float((candidate - reference).norm() / (reference - reference.mean()).norm())


def write(model, folder: Path, tokenizer, *types: str) -> list[Path]:
    result = facade.save_pretrained_gguf(model, folder / "m", tokenizer, list(types))
    return [Path(name) for name in result["gguf_files"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_families(name, tmp_path):
    family, overrides = FAMILIES[name]
    model = trained(family, **overrides)
    tokens, logits = expected(model, PROMPT)
    exact, quantised = write(model, tmp_path, build_tokenizer(), "f32", "q8_0")
    found, first = computed(exact, PROMPT)
    assert found == tokens
    assert spread(first, logits) < (1e-3 if family in COARSE else 1e-5)
    found, first = computed(quantised, PROMPT)
    assert found == tokens
    assert spread(first, logits) < 0.1


def test_demo_model(tmp_path):
    folder = demo_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = write(model, tmp_path, tokenizer, "f32", "q8_0")
    exact, quantised = files
    rows = sources.load(demo_data("train")).dataset.select(range(3))
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        tokens, _ = expected(model, prompt)
        assert computed(exact, prompt)[0] == tokens
        assert_close_choices(model, prompt, computed(quantised, prompt)[0], tokens)


@torch.no_grad()
def assert_close_choices(model, prompt: list[int], found: list[int], tokens: list[int]) -> None:
    """The same tokens, or other ones from a step on at which the two were as good as equally likely."""
    place = next((i for i, (a, b) in enumerate(zip(found, tokens, strict=True)) if a != b), None)
    if place is not None:
        logits = model(input_ids=torch.tensor([[*prompt, *tokens[:place]]])).logits[0, -1]
        # q8_0 moves logits by about 0.01 of their spread.
        assert logits[tokens[place]] - logits[found[place]] < 0.03 * logits.std(), (place, found, tokens)


def test_demo_tokenizer(tmp_path):
    folder = demo_model_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (path,) = write(model, tmp_path, tokenizer, "f32")
    for text in (SAMPLE, *CORPUS):
        (tmp_path / "text").write_bytes(text.encode())
        ids = [int(value) for value in llama_cpp(path, "tokenize", tmp_path / "text")[0].split(",")]
        assert ids == tokenizer(text).input_ids


def test_experts_in_mxfp4(tmp_path):
    family, overrides = FAMILIES["gpt_oss"]
    model = trained(family, **overrides)
    kind = gguf.GGMLQuantizationType.MXFP4
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(layer.mlp.experts, name)
                rows = weight.detach().mT.contiguous().numpy()
                weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(rows, kind), kind)).mT)
    tokens, logits = expected(model, PROMPT)
    (path,) = write(model, tmp_path, build_tokenizer(), "mxfp4")
    found, first = computed(path, PROMPT)
    assert found == tokens
    assert spread(first, logits) < 0.1


# llama.cpp's own script, told what it cannot know: how the tiny tokenizer splits text.
CONVERTER = """
import runpy, sys
sys.path[:0] = [{folder!r}, {folder!r} + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path({folder!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def test_another_family_by_llama_cpps_converter(tmp_path):
    checkout = source(BUILT)
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER.format(folder=str(checkout)))
    model = trained("starcoder2", use_bias=True, norm_epsilon=1e-5, sliding_window=None)
    tokens, logits = expected(model, PROMPT)
    result = facade.save_pretrained_gguf(model, tmp_path / "m", build_tokenizer(), ["f32", "q8_0"], converter=tmp_path)
    for name, budget in zip(result["gguf_files"], (1e-3, 0.1), strict=True):
        found, first = computed(Path(name), PROMPT)
        assert found == tokens, name
        assert spread(first, logits) < budget, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_adapter_on_the_base_models_file(family, tmp_path):
    name, overrides = FAMILIES[family]
    base = trained(name, **overrides)
    (path,) = write(base, tmp_path, build_tokenizer(), "f32")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", use_rslora=True)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    tokens, logits = expected(model, PROMPT)
    assert spread(computed(path, PROMPT)[1], logits) > 0.05
    adapter = Path(facade.save_pretrained_ggml(model, tmp_path / "a", outtype="f32")["gguf_files"][0])
    found, first = computed(path, PROMPT, adapter)
    assert found == tokens
    assert spread(first, logits) < (1e-3 if family in COARSE else 1e-5)


@pytest.mark.skipif(not (BUILT / "build" / "bin" / "llama-quantize").is_file(), reason="llama-quantize is not built")
def test_k_quants(tmp_path):
    """Rows of 256, the block of K-quants; q4_k_m and q6_k keep what a clear choice is."""
    model = trained("llama", hidden_size=256, intermediate_size=512)
    tokens, logits = expected(model, PROMPT)
    result = facade.save_pretrained_gguf(
        model, tmp_path / "m", build_tokenizer(), ["q4_k_m", "q6_k"], llama_quantize=BUILT / "build" / "bin"
    )
    for name, budget in zip(result["gguf_files"], (0.3, 0.1), strict=True):
        found, first = computed(Path(name), PROMPT)
        assert found == tokens, name
        assert spread(first, logits) < budget, name
