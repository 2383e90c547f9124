"""Checkpoints with random weights in real architectures' shapes: speed and memory need no trained weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

SHAPES: dict[str, dict] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "llama-3.1-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
_FIRST = ".layers.0."
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")


class RepeatedLayer:
    """A file of a checkpoint that holds one decoder layer, opened as if every layer had its tensors.

    A model of 70 billion weights would fill a disk of 128 GB. It is read, converted and moved as if it did.

    Args:
        path: The file, beside the ``config.json`` that says how many layers there are.
        **options: As ``safetensors.safe_open`` takes them.
    """

    def __init__(self, path: str, **options: Any) -> None:
        self._file = safe_open(path, **options)
        self._layers = json.loads((Path(path).parent / "config.json").read_text())["num_hidden_layers"]

    def __enter__(self) -> RepeatedLayer:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        """Names of all tensors, of every layer."""
        names = list(self._file.keys())
        repeated = [name for name in names if _FIRST in name]
        return names + [n.replace(_FIRST, f".layers.{i}.") for i in range(1, self._layers) for n in repeated]

    def get_slice(self, name: str) -> Any:
        """A tensor to be read; of every layer that of the one in the file."""
        return self._file.get_slice(re.sub(r"\.layers\.\d+\.", _FIRST, name))


def write(name: str, folder: Path, *, repeated: bool = False, layers: int | None = None) -> Path:
    """Write the checkpoint of a shape below ``folder`` unless it is there, and return its path.

    The files get their folder's name only when all are written, so that a call that was cut off leaves none half done.

    Args:
        name: A name in ``SHAPES``.
        folder: Where checkpoints are.
        repeated: Whether only the first layer is written, to be read by ``RepeatedLayer``. Default False.
        layers: Number of layers, default the shape's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    shape = dict(SHAPES[name])
    layers = layers or shape["num_hidden_layers"]
    path = folder / (f"{name}-{layers}-layers" if layers != shape["num_hidden_layers"] else name)
    if repeated:
        path = path.with_name(f"{path.name}-repeated")
    if path.exists():
        return path
    partial = path.with_name(f"{path.name}.partial")
    shape["num_hidden_layers"] = 1 if repeated else layers
    config = AutoConfig.for_model(
        shape.pop("model_type"), **shape, bos_token_id=1, eos_token_id=2, pad_token_id=3, dtype="bfloat16"
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(partial, max_shard_size="4GB")
    if repeated:
        about = json.loads((partial / "config.json").read_text()) | {"num_hidden_layers": layers}
        (partial / "config.json").write_text(json.dumps(about))
    # This process lives on beside the contenders, and what it holds would be missing to them.
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    words = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    words |= {f"w{index}": len(words) + index for index in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(partial)
    partial.rename(path)
    return path
