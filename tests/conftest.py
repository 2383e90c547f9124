"""Fixtures shared by all tests: tiny models and tokenizers made here, and no network."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Question: what is two plus three? Answer: five.",
    "<|user|>\nhello there<|assistant|>\ngeneral greetings",
    "0 1 2 3 4 5 6 7 8 9 instruction input response",
    "Below is an instruction that describes a task. Write a response that completes the request.",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _gpu_memory_for_the_others(request):
    """Tests of huge tensors leave no cached memory behind: other workers' tests share the card."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        if torch.cuda.is_available() and torch.cuda.memory_reserved() > 1 << 30:
            gc.collect()
            torch.cuda.empty_cache()


def build_tokenizer(vocab_size: int = 384):
    """A byte-level BPE tokenizer with bos, eos, pad and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


TINY = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


def make_tiny(model_type: str = "llama", *, seed: int = 0, dtype=None, **overrides):
    """A tiny random causal LM of an architecture that takes Llama-like config names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**TINY, **overrides})
    return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with a tiny llama in fp32 and its tokenizer, as a hub download would look. Read only."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tiny("llama").save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def pytest_ignore_collect(collection_path, config):
    """The tests of llama.cpp need a build and minutes: they are collected only when asked for, ``-m llamacpp``."""
    inside = "llamacpp" in (collection_path.name, collection_path.parent.name)
    return True if inside and "llamacpp" not in (config.option.markexpr or "") else None
