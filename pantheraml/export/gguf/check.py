"""Whether a GGUF file holds the model: its tensors, settings and tokenizer are read back, and its logits computed."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ...errors import CheckpointError
from ..verify import Agreement, agreement, greedy_tokens, quiet_transformers
from .families import Family, rope
from .greedy import greedy_ids
from .metadata import hyper_parameters
from .pretokenizers import PRE_TOKENIZERS, SAMPLE, as_llama_cpp
from .tensors import PlannedTensor
from .tokenizer import GGUFTokenizer
from .types import FILE_TYPES, FileType

HELD = 2.5  # copies of the model that loading a file takes, with room
# What transformers' loader reads of the settings; it leaves the rest at defaults, so the model is given its own config.
_READ_BY_LOADER = (
    *("max_position_embeddings", "num_hidden_layers", "intermediate_size", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "vocab_size", "tie_word_embeddings"),
)


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What was compared.

    Attributes:
        method: ``"reload"`` (transformers loaded the file, logits compared), ``"tensors"`` (every tensor and setting
            read back and compared) or ``"opened"`` (another program's file, of which no more is known).
        tensors: Number of tensors compared.
        worst: Largest relative RMS error of a tensor.
        deviation: Relative RMS deviation of the logits; None without a reload.
        tokens: How many greedy tokens were compared, and how many were the same before one differed.
        note: Why there was no reload.
    """

    method: str
    tensors: int
    worst: float
    deviation: float | None = None
    tokens: tuple[int, int] | None = None
    note: str = ""

    def summary(self) -> str:
        """A few words for people."""
        if self.deviation is not None:
            return f"reloaded by transformers: logits deviate by {self.deviation:.2g}{greedy_tokens(self.tokens)}"
        if self.method == "opened":
            return f"{self.tensors} tensors, not compared with the model ({self.note})"
        return f"{self.tensors} tensors and the settings read back and compared ({self.note})"


class Checker:
    """Compares files of one model; that is loaded once, when a file is first reloaded.

    Args:
        folder: The merged model.
        config: Its config.
        family: Its row.
        tensors: What the files are to hold.
        tokenizer: The Hugging Face tokenizer.
        written: What the files are to say about it.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        family: Family,
        tensors: list[PlannedTensor],
        tokenizer: Any,
        written: GGUFTokenizer,
    ) -> None:
        self._folder, self._config, self._family = folder, config, family
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._tokenizer, self._written = tokenizer, written
        self._reference: PreTrainedModel | None = None

    def check(self, path: Path, wanted: FileType) -> FileCheck:
        """Check one file.

        Raises:
            CheckpointError: the file is not what it should be.
        """
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise CheckpointError("the written file cannot be read", where=path.name, why=str(error)) from error
        worst = check_tensors(reader, self._tensors, path)
        self._check_settings(reader, path)
        self._check_tokenizer(reader, path)
        count = len(self._tensors)
        if self._family.reload_as is None:
            return FileCheck("tensors", count, worst, note=f"transformers does not load {self._family.arch} files")
        self._check_loaded_tokenizer(path)
        size = 4 * sum(math.prod(tensor.shape) for tensor in self._tensors.values())
        if psutil.virtual_memory().available < HELD * size:
            return FileCheck("tensors", count, worst, note="there is not enough memory to load it")
        found = self._check_behaviour(path, wanted)
        return FileCheck("reload", count, worst, found.deviation, found.tokens)

    def _check_settings(self, reader: gguf.GGUFReader, path: Path) -> None:
        for key, (_, value) in hyper_parameters(self._config, self._family).items():
            found = _value(reader, key)
            same = math.isclose(found, value, rel_tol=1e-6) if isinstance(value, float) and found else found == value
            if not same:
                raise CheckpointError(
                    "a setting read back is not the model's",
                    where=f"{path.name}: {key}",
                    why=f"{found!r}, not {value!r}",
                )

    def _check_tokenizer(self, reader: gguf.GGUFReader, path: Path) -> None:
        """Encode with what the file says, as llama.cpp would."""
        template = _value(reader, "tokenizer.chat_template")
        if template != self._written.chat_templates.get("default"):
            raise CheckpointError("the chat template read back is not the tokenizer's", where=path.name)
        tokens, types = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
        if self._written.model != "gpt2":
            scores = _value(reader, "tokenizer.ggml.scores")
            found = greedy_ids(SAMPLE, tokens, types, scores, space_prefix=self._written.space_prefix)
            self._compare_ids(found, path, "read back", SAMPLE)
            return
        name = _value(reader, "tokenizer.ggml.pre")
        pre = next(entry for entry in PRE_TOKENIZERS if entry.name == name)
        merges = [tuple(merge.split(" ", 1)) for merge in _value(reader, "tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != int(gguf.TokenType.UNUSED)}
        whole = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
        added = [
            AddedToken(token, special=kind == gguf.TokenType.CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in whole
        ]
        built = as_llama_cpp(pre, vocabulary, [(first, second) for first, second in merges], added)
        self._compare_ids(built.encode(self._sample(), add_special_tokens=False).ids, path, "read back")

    def _sample(self) -> str:
        """The fixed text, with the tokenizer's own special tokens in it."""
        special = [token for token in (self._tokenizer.bos_token, self._tokenizer.eos_token) if token]
        return SAMPLE + "".join(f"{token}and" for token in special)

    def _check_loaded_tokenizer(self, path: Path) -> None:
        """Encode with the tokenizer that transformers builds from the file, where it follows the file's rule."""
        if not loader_follows(self._written):
            return
        with quiet_transformers():
            loaded: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
        if loaded.chat_template != self._written.chat_templates.get("default"):
            raise CheckpointError("the chat template that transformers reads is not the tokenizer's", where=path.name)
        ids = loaded(SAMPLE, add_special_tokens=False, verbose=False).input_ids
        self._compare_ids(ids, path, "loaded by transformers", SAMPLE)

    def _compare_ids(self, found: list[int], path: Path, how: str, text: str | None = None) -> None:
        text = text or self._sample()
        expected = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if found != expected:
            place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
            place = min(len(found), len(expected)) if place is None else place
            raise CheckpointError(
                f"the tokenizer {how} gives other ids than the model's",
                where=path.name,
                why=f"from token {place}: {found[place : place + 5]}, not {expected[place : place + 5]}",
            )

    def _check_behaviour(self, path: Path, wanted: FileType) -> Agreement:
        with quiet_transformers():
            try:
                config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
                self._compare_config(config, path)
                model = AutoModelForCausalLM.from_pretrained(
                    str(path.parent),
                    gguf_file=path.name,
                    config=self._loadable_config(),
                    dtype=torch.float32,
                    local_files_only=True,
                )
            except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError("transformers cannot load the file", where=path.name, why=str(error)) from error
        reference = self._load_reference()
        found = agreement(model, reference, reference, budget=wanted.logits, note=wanted.name)
        if found.problem is not None:
            raise CheckpointError("the model in the file computes something else", where=path.name, why=found.problem)
        return found

    def _load_reference(self) -> PreTrainedModel:
        if self._reference is None:
            with quiet_transformers():
                self._reference = AutoModelForCausalLM.from_pretrained(
                    str(self._folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
                )
        return self._reference

    def _compare_config(self, found: Any, path: Path) -> None:
        pairs = {name: (getattr(found, name, None), getattr(self._config, name, None)) for name in _READ_BY_LOADER}
        pairs["rope_theta"] = (rope(found).get("rope_theta"), rope(self._config).get("rope_theta"))
        for name, (value, expected) in pairs.items():
            numbers = isinstance(value, (int, float)) and isinstance(expected, (int, float))
            if value != expected and not (numbers and math.isclose(value, expected, rel_tol=1e-6)):
                raise CheckpointError(
                    "transformers reads another setting",
                    where=f"{path.name}: {name}",
                    why=f"{value!r}, not {expected!r}",
                )

    def _loadable_config(self) -> Any:
        if self._config.model_type == self._family.reload_as:
            return copy.deepcopy(self._config)
        settings = {k: v for k, v in self._config.to_dict().items() if k not in ("model_type", "architectures")}
        return AutoConfig.for_model(str(self._family.reload_as), **settings)


def check_tensors(reader: gguf.GGUFReader, due: dict[str, PlannedTensor], path: Path) -> float:
    """Compare the tensors of a file with those that were to be written, and return the largest relative RMS error.

    Args:
        reader: The file, opened.
        due: What it is to hold, by name.
        path: Its path, for messages.

    Raises:
        CheckpointError: a tensor is missing, too many, or further off than its type allows.
    """
    found = {tensor.name: tensor for tensor in reader.tensors}
    if found.keys() != due.keys():
        names = sorted(found.keys() ^ due.keys())
        raise CheckpointError("the file lacks tensors, or has others", where=path.name, why=", ".join(names[:5]))
    worst = 0.0
    for name, tensor in found.items():
        kind = tensor.tensor_type.name.lower()
        error = relative_error(gguf.dequantize(tensor.data, tensor.tensor_type), due[name].make())
        known = FILE_TYPES.get(kind) or FILE_TYPES.get(f"{kind}_m") or FILE_TYPES["q2_k"]
        if not error <= known.budget:
            raise CheckpointError(
                "a tensor read back is not the model's",
                where=f"{path.name}: {name}",
                why=f"relative error {error:.3g}; {known.budget:.3g} is allowed for {kind}",
            )
        worst = max(worst, error)
    return worst


def relative_error(values: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the difference over the RMS of ``expected``; inf for another number of elements."""
    if values.size != expected.size:
        return math.inf
    difference = np.linalg.norm((values.reshape(expected.shape) - expected).ravel().astype(np.float64))
    return float(difference / max(float(np.linalg.norm(expected.ravel().astype(np.float64))), 1e-20))


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    entry = reader.get_field(key)
    return None if entry is None else entry.contents()


def loader_follows(written: GGUFTokenizer) -> bool:
    """Whether the installed transformers splits text as the file says; recent ones do, for a part of the rules."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return False
    if written.model != "gpt2":
        return True
    rule = next(entry for entry in PRE_TOKENIZERS if entry.name == written.pre)
    return not rule.whole_words and (rule.name == "gpt-2" or rule.name in GGUF_PRE_TOKENIZER_SPLITS)
