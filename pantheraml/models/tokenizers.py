"""Tokenizers as training needs them: loaded with their model, with a padding token of their own, and extensible."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import log
from ..errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    ConflictError,
    MissingDependencyError,
    ModelNotFoundError,
)
from ..parallel import parts
from .source import Hub, find_file, local_folder

# Tokens that exist for padding, by their usual spellings, then those that a vocabulary keeps in reserve, then those
# that pad other modalities. The first that is free is taken.
_PAD_NAMES = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<PAD>",
    "<|padding|>",
    "<|PAD_TOKEN|>",
    "<|dummy_0|>",
    "<|endoftext|>",
)
_RESERVED = re.compile(r"reserved|unused|extra_id|placeholder|dummy", re.IGNORECASE)
_OTHER_PADS = re.compile(r"(fim|vision|image|video|audio).*pad", re.IGNORECASE)
_NEW_PAD = "<|pad|>"

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "tekken.json",
)

# Set on a model whose vocabulary was extended, so that get_peft_model trains the new rows.
NEW_TOKENS_ATTRIBUTE = "_pantheraml_new_tokens"


def text_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer inside a multimodal processor, or ``tokenizer`` itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def load_tokenizer(
    candidates: Sequence[tuple[str, Hub]], *, trust_remote_code: bool, multimodal: bool, gguf_file: str | None = None
) -> Any:
    """Load the tokenizer (the processor of a multimodal model) from the first place that has one.

    Args:
        candidates: Folders or hub ids with how they are reached, the preferred one first.
        trust_remote_code: Whether the repository's own tokenizer class may be imported.
        multimodal: Load an ``AutoProcessor`` where there is one.
        gguf_file: GGUF file that holds the tokenizer.

    Raises:
        ModelNotFoundError: none of the places has a tokenizer.
        CheckpointError: it cannot be read.
        ConfigError: it needs its own code and ``trust_remote_code`` is off.
    """
    from transformers import AutoProcessor, AutoTokenizer

    for name, hub in candidates:
        if gguf_file is None and not any(find_file(name, item, hub) for item in TOKENIZER_FILES):
            continue
        has_processor = multimodal and any(
            find_file(name, item, hub) for item in ("processor_config.json", "preprocessor_config.json")
        )
        _check_complete(find_file(name, "tokenizer.json", hub))
        options: dict[str, Any] = dict(hub.options(), trust_remote_code=trust_remote_code)
        if gguf_file is not None:
            options["gguf_file"] = gguf_file
        try:
            return (AutoProcessor if has_processor else AutoTokenizer).from_pretrained(name, **options)
        except ImportError as error:
            raise MissingDependencyError(
                f"the {'processor' if has_processor else 'tokenizer'} of {name} needs packages that are not installed",
                why=" ".join(str(error).split())[:300],
                hint="pip install the packages named above (pillow and torchvision for images)",
            ) from error
        except (ValueError, OSError, KeyError, AttributeError) as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if "trust_remote_code" in str(error):
                raise ConfigError(
                    f"the tokenizer of {name} comes with its own Python code, which is not run unless you ask for it",
                    where="argument trust_remote_code",
                    hint="read that code, then pass trust_remote_code=True",
                ) from error
            raise CheckpointError(
                f"the tokenizer of {name} cannot be read", why=why, hint="copy or download its files again"
            ) from error
    places = ", ".join(name for name, _ in candidates)
    raise ModelNotFoundError(
        "no tokenizer was found",
        where=places,
        why=f"none of {', '.join(TOKENIZER_FILES)} is there",
        hint="put the base model's tokenizer files there (tokenizer.save_pretrained), or pass tokenizer_name=",
    )


def _check_complete(path: Path | None) -> None:
    """Refuse a tokenizer.json that was cut short; the library below raises a bare ``Exception`` for it."""
    if path is None:
        return
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 64, 0))
        end = file.read().rstrip()
    if not end.endswith(b"}"):
        raise CheckpointError(
            "tokenizer.json is cut short", where=str(path), hint="copy or download the tokenizer's files again"
        )


def has_tokenizer(name: str, hub: Hub) -> bool:
    """Whether a folder or repository holds a tokenizer."""
    folder = local_folder(name)
    if folder is not None:
        return any((Path(folder) / hub.subfolder / item).is_file() for item in TOKENIZER_FILES)
    return any(find_file(name, item, hub) is not None for item in TOKENIZER_FILES[:2])


def _as_ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(item) for item in value} if isinstance(value, Iterable) else {int(value)}


def end_ids(model: nn.Module | None, tokenizer: Any) -> set[int]:
    """Ids that end a generation: of the tokenizer, the configuration and the generation configuration."""
    ids = _as_ids(text_tokenizer(tokenizer).eos_token_id)
    if model is not None:
        config = model.config.get_text_config()  # type: ignore[union-attr]
        ids |= _as_ids(getattr(config, "eos_token_id", None))
        ids |= _as_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    return ids


def _free_token(tokenizer: Any, taken: set[int], rows: int | None) -> str | None:
    """The best token of the vocabulary that nothing uses, for padding; None when there is none."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    specials = [content for content in added if tokenizer.added_tokens_decoder[added[content]].special]
    vocabulary = tokenizer.get_vocab()
    ordered = [
        *(name for name in _PAD_NAMES if name in vocabulary),
        *(name for name in specials if _RESERVED.search(name)),
        *(name for name in specials if _OTHER_PADS.search(name)),
    ]
    for name in ordered:
        index = added.get(name, vocabulary.get(name))
        if index is not None and index not in taken and (rows is None or index < rows) and name not in template:
            return name
    return None


def grow_embeddings(model: nn.Module, size: int) -> bool:
    """Give the embedding (and head) at least ``size`` rows; a larger, padded one is never shrunk.

    Returns:
        Whether rows were added.
    """
    if model.get_input_embeddings().weight.shape[0] >= size:  # type: ignore[operator]
        return False
    resize_embeddings(model, size)
    return True


def resize_embeddings(model: nn.Module, size: int) -> None:
    """Give the embedding (and head) ``size`` rows."""
    with _whole_embeddings(model):
        model.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]


@contextlib.contextmanager
def _whole_embeddings(model: nn.Module) -> Iterator[None]:
    """Inside, embedding and head are whole, where they were loaded in shards. Every rank has to enter."""

    def modules() -> list[nn.Module]:
        both = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
        return [module for module in both if module is not None]

    if not any(parts.in_parts(module) for module in modules()):
        yield
        return
    parts.gather(modules())
    yield
    own = {id(parameter) for module in modules() for parameter in module.parameters()}
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own]
    parts.divide(model, names, parts.mesh())


def is_tied(model: nn.Module) -> bool:
    """Whether the input embedding and the output head share their weight."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return head is not None and head.weight is model.get_input_embeddings().weight  # type: ignore[operator]


def _set_pad(model: nn.Module, pad: int) -> None:
    config: Any = model.config
    for item in {id(item): item for item in (config, config.get_text_config())}.values():
        item.pad_token_id = pad
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = pad  # type: ignore[union-attr]


def repair_padding(model: nn.Module | None, tokenizer: Any) -> str | None:
    """Give ``tokenizer`` a padding token that is in the vocabulary and ends nothing, and tell the model.

    Training on text padded with the end token teaches a model never to stop, because padding is masked out of the
    loss. Candidates, in order: a padding or reserved token that nothing uses, the unknown token, the configuration's
    own, a new token (the embeddings then grow by it). The padding row of an untied embedding is zeroed.

    Args:
        model: The model, or None to repair the tokenizer alone.
        tokenizer: Tokenizer or processor, changed in place.

    Returns:
        The new padding token, or None when the old one was good.
    """
    tokenizer = text_tokenizer(tokenizer)
    rows = None if model is None else model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ends = end_ids(model, tokenizer)
    current = tokenizer.pad_token_id
    chosen = None
    if current is None or current in ends or (rows is not None and current >= rows):
        taken = ends | _as_ids(tokenizer.bos_token_id) | _as_ids(tokenizer.unk_token_id)
        chosen = _free_token(tokenizer, taken, rows)
        if chosen is None and tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in ends:
            chosen = tokenizer.unk_token
        if chosen is None and model is not None:
            own = getattr(model.config.get_text_config(), "pad_token_id", None)  # type: ignore[union-attr]
            if isinstance(own, int) and 0 <= own < len(tokenizer) and own not in ends:
                chosen = tokenizer.convert_ids_to_tokens(own)
        if chosen is None:
            chosen = _NEW_PAD
            while chosen in tokenizer.get_vocab():
                chosen = f"{chosen[:-2]}_|>"
        old = tokenizer.pad_token
        tokenizer.add_special_tokens({"pad_token": chosen})
        if model is not None:
            grow_embeddings(model, tokenizer.pad_token_id + 1)
        why = (
            "there was none"
            if old is None
            else f"{old!r} also ends a text"
            if current in ends
            else f"{old!r} has no row"
        )
        log.info(f"padding token: {chosen!r} ({why})")
    if model is not None:
        _set_pad(model, tokenizer.pad_token_id)
        in_use = ends | _as_ids(tokenizer.bos_token_id) | _as_ids(tokenizer.unk_token_id)
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        if not is_tied(model) and tokenizer.pad_token_id not in in_use and not weight.is_meta:
            with torch.no_grad():
                row = parts.row_of(weight, tokenizer.pad_token_id)
                if row is not None:
                    row.zero_()
    return chosen


def prepare_tokenizer(model: nn.Module | None, tokenizer: Any, *, max_seq_length: int, fix: bool = True) -> Any:
    """Repair padding, pad on the left (as generation needs), and set the tokenizer's maximum length.

    Args:
        model: The model, or None.
        tokenizer: Tokenizer or processor, changed in place and returned.
        max_seq_length: Longest sequence in tokens.
        fix: False leaves the padding token as it is.
    """
    inner = text_tokenizer(tokenizer)
    if fix:
        repair_padding(model, tokenizer)
    inner.padding_side = "left"
    inner.model_max_length = max_seq_length
    return tokenizer


def set_padding_side(model: Any, side: str) -> None:
    """Set the padding side of the tokenizer that was loaded with ``model``, if it is known."""
    tokenizer = getattr(model, "_saved_temp_tokenizer", None)
    if tokenizer is not None:
        text_tokenizer(tokenizer).padding_side = side


def adds_bos(tokenizer: Any) -> bool:
    """Whether encoding a text puts the beginning-of-sequence token in front by itself."""
    tokenizer = text_tokenizer(tokenizer)
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [bos]


def has_double_bos(tokenizer: Any, text: str | None = None) -> bool:
    """Whether encoding gives two beginning-of-sequence tokens: one from the text, one from the tokenizer.

    Args:
        tokenizer: Tokenizer or processor.
        text: A text that will be encoded; None asks about texts that the tokenizer's own chat template writes.
    """
    inner = text_tokenizer(tokenizer)
    if not inner.bos_token or not adds_bos(inner):
        return False
    if text is not None:
        return text.lstrip().startswith(inner.bos_token)
    template = inner.chat_template
    if not isinstance(template, str):
        return False
    return inner.bos_token in template or re.search(r"\bbos_token\b", template) is not None


def _trained_rows(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The rows of real tokens that training has moved: not the padding rows of the matrix, nor zeroed ones."""
    rows = weight[:count].float()
    return rows[rows.abs().amax(dim=1) > 0]


def add_new_tokens(
    model: nn.Module,
    tokenizer: Any,
    new_tokens: Sequence[str] = (),
    method: str = "mean",
    interpolation: float = 0.5,
) -> int:
    """Add tokens to the vocabulary and start their embeddings from what the model knows.

    ``get_peft_model`` afterwards trains the embedding and the head in full. A padded embedding is never shrunk.

    Args:
        model: The model, before ``get_peft_model``; changed in place.
        tokenizer: Its tokenizer; changed in place.
        new_tokens: The tokens' texts. Those already in the vocabulary are skipped with a message.
        method: ``"mean"`` starts every new row from the mean of the trained rows; ``"interpolation"`` mixes that mean
            with the mean of the pieces into which the token's text was split before.
        interpolation: Share of the pieces in ``"interpolation"``, between 0 and 1.

    Returns:
        How many tokens were added.

    Raises:
        ArgumentError: ``new_tokens`` is no list of strings.
        ConfigError: unknown method or share.
        ConflictError: the model already has an adapter.
    """
    if isinstance(new_tokens, str) or not all(isinstance(token, str) and token for token in new_tokens):
        raise ArgumentError("new_tokens must be a list of non-empty strings", where="argument new_tokens")
    if method not in ("mean", "interpolation"):
        raise ConfigError(f"unknown method {method!r}", where="argument method", hint="use 'mean' or 'interpolation'")
    if not 0.0 <= interpolation <= 1.0:
        raise ConfigError(f"interpolation must lie between 0 and 1, got {interpolation}", where="interpolation")
    if hasattr(model, "peft_config"):
        raise ConflictError(
            "tokens cannot be added to a model that already has an adapter",
            hint="call add_new_tokens right after from_pretrained, then get_peft_model",
        )
    inner = text_tokenizer(tokenizer)
    vocabulary = inner.get_vocab()
    fresh = [token for token in dict.fromkeys(new_tokens) if token not in vocabulary]
    if len(fresh) < len(new_tokens):
        known = [token for token in new_tokens if token in vocabulary]
        log.info(f"already in the vocabulary or given twice: {', '.join(known[:8]) or 'duplicates'}")
    if not fresh:
        return 0
    pieces = [inner(token, add_special_tokens=False)["input_ids"] for token in fresh]
    before = len(inner)
    inner.add_tokens(fresh)
    with _whole_embeddings(model):
        _start_rows(model, inner, fresh, pieces, before, method, interpolation)
    object.__setattr__(model, NEW_TOKENS_ATTRIBUTE, len(fresh))
    log.info(f"{len(fresh)} tokens added; get_peft_model will train embed_tokens and lm_head in full")
    return len(fresh)


def _start_rows(
    model: nn.Module,
    inner: Any,
    fresh: list[str],
    pieces: list[list[int]],
    before: int,
    method: str,
    interpolation: float,
) -> None:
    """Add the rows of ``fresh`` tokens, and start them as ``add_new_tokens`` says."""
    tied = is_tied(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    means = [_trained_rows(model.get_input_embeddings().weight.data, before).mean(dim=0)]  # type: ignore[operator]
    if head is not None and not tied:
        means.append(_trained_rows(head.weight.data, before).mean(dim=0))
    grow_embeddings(model, len(inner))
    matrices = [model.get_input_embeddings().weight.data]  # type: ignore[operator]
    if head is not None and not tied:
        matrices.append(model.get_output_embeddings().weight.data)  # type: ignore[operator]
    for weight, mean in zip(matrices, means, strict=True):
        for token, old_pieces in zip(fresh, pieces, strict=True):
            row = mean
            if method == "interpolation" and old_pieces:
                row = (1.0 - interpolation) * mean + interpolation * weight[old_pieces].float().mean(dim=0)
            weight[inner.convert_tokens_to_ids(token)] = row.to(weight)
