"""A Hugging Face tokenizer as GGUF metadata."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import gguf
from tokenizers import AddedToken

from ...errors import CheckpointError, ConfigError
from .families import unsupported
from .pretokenizers import PRE_TOKENIZERS, SAMPLE, as_llama_cpp

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
_NO_SCORE = -1e6  # of tokens that no merge makes; llama.cpp looks at scores of merged tokens only
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "<end_of_utterance>")


@dataclass(slots=True)
class GGUFTokenizer:
    """What a GGUF file says about its tokenizer.

    Attributes:
        model: ``"gpt2"`` (byte-level BPE) or ``"llama"`` (SentencePiece).
        pre: Name of the splitting rule; ``"default"`` for ``"llama"``.
        tokens: Texts by id.
        types: Kinds by id.
        merges: For ``"gpt2"``, pairs joined by a space.
        scores: For ``"llama"``, by id.
        special: Ids of bos, eos, unk, pad and eot, as far as there are any.
        add_bos: Whether encoding puts a bos in front.
        add_eos: Whether encoding puts an eos at the end.
        space_prefix: For ``"llama"``, whether encoding puts a space in front.
        chat_templates: By name; the nameless one is ``"default"``.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool = False
    chat_templates: dict[str, str] = field(default_factory=dict)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        for name, value in self.special.items():
            writer.add_uint32(_ID_KEYS[name], value)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        for name, template in self.chat_templates.items():
            if name == "default":
                writer.add_chat_template(template)
            else:
                key = re.sub(r"[^a-z0-9_]", "_", name.lower())
                writer.add_string(f"tokenizer.chat_template.{key}", template)


_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
}


def text_tokenizer(tokenizer: Any) -> Any:
    """Return the fast tokenizer, out of a processor if need be.

    Raises:
        ConfigError: there is none.
    """
    if tokenizer is None:
        raise ConfigError(
            "a GGUF file holds its tokenizer, and none was given",
            where="argument tokenizer",
            hint="pass the tokenizer that the model was trained with",
        )
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if getattr(inner, "backend_tokenizer", None) is None:
        raise unsupported(
            "this kind of tokenizer cannot be written", where=type(inner).__name__, why="it is not a fast one"
        )
    return inner


def read_tokenizer(tokenizer: Any, vocab_size: int) -> GGUFTokenizer:
    """Return what a GGUF file says about a tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        vocab_size: Rows of the model's embeddings; ids without a token get placeholders.

    Raises:
        UnsupportedError: llama.cpp has no tokenizer that gives the same ids.
        CheckpointError: the tokenizer has more tokens than the model.
    """
    inner = text_tokenizer(tokenizer)
    state = json.loads(inner.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise unsupported(f"{model['type']} tokenizers are not written here", where="tokenizer")
    vocabulary: dict[str, int] = dict(model["vocab"])
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    by_id = {index: token for token, index in vocabulary.items()}
    by_id |= {index: entry["content"] for index, entry in added.items()}
    if max(by_id) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer has ids up to {max(by_id)}, the model {vocab_size} embeddings",
            where="tokenizer",
            hint="pass the tokenizer that the model was trained with",
        )
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    byte_level = _mentions(state, "ByteLevel")
    result = GGUFTokenizer("gpt2" if byte_level else "llama", "default", [], [])
    result.special = _special_ids(inner, by_id)
    unknown = result.special.get("unk")
    for index in range(vocab_size):
        token = by_id.get(index)
        kind = _kind(token, added.get(index), spm=not byte_level, unknown=index == unknown)
        if kind == gguf.TokenType.USER_DEFINED and not byte_level:
            token = str(token).replace(_SPACE, " ")  # found in the raw text, before spaces are replaced
        result.tokens.append(f"[PAD{index}]" if token is None else token)
        result.types.append(int(kind))
    if byte_level:
        result.merges = [" ".join(pair) for pair in merges]
        result.pre = _pre_tokenizer(inner, vocabulary, merges, list(added.values()), bool(model.get("ignore_merges")))
    else:
        if not model.get("byte_fallback"):
            raise unsupported("a BPE without bytes is not written here", where="tokenizer")
        result.scores = _scores(result.tokens, vocabulary, merges)
        result.space_prefix = _has_space_prefix(state)
    result.add_bos, result.add_eos = _added_ends(inner)
    templates = inner.chat_template
    if templates is not None:
        result.chat_templates = dict(templates) if isinstance(templates, dict) else {"default": templates}
    return result


def _mentions(state: dict[str, Any], kind: str) -> bool:
    return f'"type": "{kind}"' in json.dumps({key: state[key] for key in ("pre_tokenizer", "decoder")})


def _kind(token: str | None, added: dict[str, Any] | None, *, spm: bool, unknown: bool) -> gguf.TokenType:
    if token is None:
        return gguf.TokenType.UNUSED
    if spm and unknown:
        return gguf.TokenType.UNKNOWN
    if added is not None:
        return gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.BYTE if spm and _BYTE.fullmatch(token) else gguf.TokenType.NORMAL


def _special_ids(inner: Any, by_id: dict[int, str]) -> dict[str, int]:
    ids = {name: getattr(inner, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    turn_end = next((index for index, token in by_id.items() if token in _END_OF_TURN), None)
    ids["eot"] = turn_end
    return {name: int(value) for name, value in ids.items() if value is not None}


def _scores(tokens: list[str], vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores that make SentencePiece's greedy merging follow the order of the merges: the earliest is the highest."""
    scores = [_NO_SCORE] * len(tokens)
    for rank, pair in enumerate(merges):
        index = vocabulary.get("".join(pair))
        if index is not None and scores[index] == _NO_SCORE:
            scores[index] = float(-rank)
    return scores


def _has_space_prefix(state: dict[str, Any]) -> bool:
    text = json.dumps([state["normalizer"], state["pre_tokenizer"]])
    return '"type": "Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _added_ends(inner: Any) -> tuple[bool, bool]:
    ids = inner("a").input_ids
    bare = inner("a", add_special_tokens=False).input_ids
    extra = len(ids) - len(bare)
    bos, eos = inner.bos_token_id, inner.eos_token_id
    return (
        extra > 0 and bos is not None and ids[0] == bos,
        extra > 0 and eos is not None and ids[-1] == eos and ids != [bos, *bare],
    )


def _pre_tokenizer(
    inner: Any,
    vocabulary: dict[str, int],
    merges: list[tuple[str, ...]],
    added: list[dict[str, Any]],
    whole_words: bool,
) -> str:
    """Name of the rule by which llama.cpp gives the ids that the tokenizer gives for the sample text."""
    extra = [
        AddedToken(entry["content"], special=entry["special"], normalized=False)
        for entry in sorted(added, key=lambda entry: entry["id"])
    ]
    expected = inner(SAMPLE, add_special_tokens=False, verbose=False).input_ids
    pairs = [(first, second) for first, second in merges]
    full = vocabulary | {entry["content"]: entry["id"] for entry in added}
    for pre in sorted(PRE_TOKENIZERS, key=lambda entry: entry.whole_words != whole_words):
        built = as_llama_cpp(pre, full, pairs, extra)
        if built.encode(SAMPLE, add_special_tokens=False).ids == expected and _same_splits(inner, built):
            return pre.name
    raise unsupported(
        "llama.cpp splits text differently from this tokenizer",
        where="tokenizer",
        why=f"none of its rules known here ({', '.join(p.name for p in PRE_TOKENIZERS)}) gives the same ids",
    )


def _same_splits(inner: Any, built: Any) -> bool:
    """Whether the sample is cut at the same places; a small vocabulary can hide differences in its ids."""
    own = inner.backend_tokenizer
    if own.pre_tokenizer is None:
        return False
    text = SAMPLE if own.normalizer is None else own.normalizer.normalize_str(SAMPLE)
    theirs = [span for _, span in own.pre_tokenizer.pre_tokenize_str(text)]
    return theirs == [span for _, span in built.pre_tokenizer.pre_tokenize_str(SAMPLE)]
