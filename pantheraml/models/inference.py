"""Generation and the switch between training and inference."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, ConfigError
from .checkpointing import configured_mode, inner_model, set_checkpointing
from .decoding import recorded_steps
from .layers.step import weights_unchanged
from .tokenizers import set_padding_side

_GENERATE_MARK = "_pantheraml_generate"


def _check_model(model: Any, where: str) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{where} takes a model, got {type(model).__name__}", where=where)


def for_inference(model: Any) -> Any:
    """Put a model into inference: eval mode, no checkpointing, cache on, tokenizer padding on the left.

    Args:
        model: A transformers model or a PEFT wrapper of one.

    Returns:
        The same model.

    Raises:
        ArgumentError: ``model`` is no model.
    """
    _check_model(model, "for_inference")
    model.eval()
    set_checkpointing(model, False)
    inner = inner_model(model)
    if hasattr(inner, "disable_input_require_grads") and getattr(inner, "_require_grads_hooks", None):
        inner.disable_input_require_grads()  # type: ignore[operator]
    set_padding_side(model, "left")
    return model


def for_training(model: Any, use_gradient_checkpointing: bool | str = True) -> Any:
    """Put a model into training: train mode, the checkpointing it was configured with, padding on the right.

    Args:
        model: A transformers model or a PEFT wrapper of one.
        use_gradient_checkpointing: False switches checkpointing off for now; otherwise the mode given to
            ``from_pretrained`` or ``get_peft_model`` applies.

    Returns:
        The same model.

    Raises:
        ArgumentError: ``model`` is no model.
    """
    _check_model(model, "for_training")
    model.train()
    set_checkpointing(model, configured_mode(model) if use_gradient_checkpointing else False)
    set_padding_side(model, "right")
    return model


@contextmanager
def inference_state(model: nn.Module) -> Iterator[None]:
    """Generate in inference state and put back exactly what was there: each module's mode."""
    training = [module for module in model.modules() if module.training]
    if not training:
        yield
        return
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _unpack_encoding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Spread a tokenizer's whole output, given as the input, over keyword arguments."""
    if args and isinstance(args[0], Mapping):
        return args[1:], {**args[0], **kwargs}
    for name in ("input_ids", "inputs"):
        if isinstance(kwargs.get(name), Mapping):
            encoding = kwargs.pop(name)
            return args, {**encoding, **kwargs}
    return args, kwargs


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(type(model).forward).parameters


def _check_padding(model: nn.Module, prompt: torch.Tensor, mask: torch.Tensor | None, pad: int | None) -> None:
    if prompt.dim() != 2 or prompt.shape[0] < 1 or prompt.shape[1] < 1 or model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return
    if mask is None:
        if pad is None:
            return
        mask = prompt != pad
    if mask.dim() != 2 or mask.shape != prompt.shape:
        return
    ends_in_padding = (mask[:, -1] == 0) & (mask != 0).any(dim=1)
    if bool(ends_in_padding.any()):
        raise ConfigError(
            f"{int(ends_in_padding.sum())} of {prompt.shape[0]} prompts end in padding: generation would continue it",
            where="generate",
            hint="set tokenizer.padding_side = 'left' (for_inference(model) does) and tokenize the prompts again",
        )


def _maximum_length(model: nn.Module) -> int | None:
    config = model.config.get_text_config()  # type: ignore[union-attr]
    own = getattr(config, "max_position_embeddings", None)
    asked = getattr(model, "max_seq_length", None)
    values = [value for value in (own, asked) if isinstance(value, int)]
    return max(values) if isinstance(own, int) and values else None


def _check_length(model: nn.Module, length: int, kwargs: dict[str, Any]) -> None:
    maximum = _maximum_length(model)
    config = kwargs.get("generation_config")
    new = kwargs.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
    if maximum is None or new is None or model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return
    if length + new > maximum:
        raise ConfigError(
            f"{length} prompt tokens + max_new_tokens={new} are more than the {maximum} this model takes",
            where="generate",
            hint=f"load it with max_seq_length={length + new} or more, shorten the prompt, or ask for fewer tokens",
        )


def _default_pad(model: nn.Module) -> int | None:
    generation = getattr(model, "generation_config", None)
    pad = getattr(generation, "pad_token_id", None)
    if pad is None:
        pad = getattr(generation, "eos_token_id", None)
        pad = pad[0] if isinstance(pad, list) and pad else pad
    return pad if isinstance(pad, int) else None


@contextmanager
def _length_by_new_tokens(generation: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Set the model's default ``max_length`` aside for a call with ``max_new_tokens``; transformers warns of both."""
    if generation is None or kwargs.get("max_new_tokens") is None or kwargs.get("max_length") is not None:
        yield
        return
    length, generation.max_length = generation.max_length, None
    try:
        yield
    finally:
        generation.max_length = length


def _searchable_pad(model: nn.Module) -> int | None:
    """The pad id if finding it in a prompt means padding; a pad id that also ends texts means nothing."""
    generation = getattr(model, "generation_config", None)
    pad, end = getattr(generation, "pad_token_id", None), getattr(generation, "eos_token_id", None)
    return None if pad == end or (isinstance(end, list) and pad in end) else pad


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate token ids, as ``transformers.GenerationMixin.generate``, with the inputs checked first.

    A whole tokenizer output may be given as the input; ``token_type_ids`` that the model does not take are left out;
    a batch padded on the right, and a prompt too long for what is asked, raise. Training state is put back afterwards.

    Raises:
        ConfigError: a prompt ends in padding, or prompt and new tokens do not fit the model.
    """
    args, kwargs = _unpack_encoding(args, kwargs)
    if "token_type_ids" in kwargs and not _takes(self, "token_type_ids"):
        del kwargs["token_type_ids"]
    pad = kwargs.get("pad_token_id", _default_pad(self))
    generation = getattr(self, "generation_config", None)
    if (
        pad is not None
        and getattr(generation, "pad_token_id", None) is None
        and kwargs.get("generation_config") is None
    ):
        kwargs["pad_token_id"] = pad
    prompt = next((kwargs[name] for name in ("input_ids", "inputs") if kwargs.get(name) is not None), None)
    if prompt is None and args:
        prompt = args[0]
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], str)):
        raise ArgumentError(
            "generate takes token ids, got text",
            where="generate",
            hint="model.generate(**tokenizer(text, return_tensors='pt'))",
        )
    if isinstance(prompt, torch.Tensor) and not prompt.is_floating_point() and prompt.dim() == 2:
        _check_padding(self, prompt, kwargs.get("attention_mask"), _searchable_pad(self))
        _check_length(self, prompt.shape[1], kwargs)
    with inference_state(self), weights_unchanged(), _length_by_new_tokens(generation, kwargs):
        prompt = prompt if isinstance(prompt, torch.Tensor) else None
        with recorded_steps(self, prompt, kwargs) as given:
            return type(self).generate(self, *args, **given)


def attach_generate(model: nn.Module) -> None:
    """Give the transformers model inside ``model`` the checked ``generate``; PEFT wrappers reach it through theirs."""
    inner: Any = inner_model(model)
    if hasattr(type(inner), "generate") and _GENERATE_MARK not in vars(inner):
        object.__setattr__(inner, "generate", types.MethodType(generate, inner))
        object.__setattr__(inner, _GENERATE_MARK, True)


def fast_generate(
    model: Any, prompts: Any = None, sampling_params: Any = None, lora_request: Any = None, **kwargs: Any
) -> Any:
    """Generate without an inference engine: the same as ``model.generate``.

    Args:
        model: The model.
        prompts: Token ids or a tokenizer's output.
        sampling_params: Needs an engine; raises.
        lora_request: Needs an engine; raises.
        **kwargs: As for ``generate``.

    Raises:
        ConfigError: an argument that only an inference engine (``fast_inference=True``) can honour.
    """
    is_text = isinstance(prompts, str) or (
        isinstance(prompts, list | tuple) and any(isinstance(p, str) for p in prompts)
    )
    for name, given in (
        ("sampling_params", sampling_params),
        ("lora_request", lora_request),
        ("text prompts", is_text),
    ):
        if given:
            raise ConfigError(
                f"fast_generate takes {name} only with an inference engine (fast_inference=True)",
                where="fast_generate",
                hint="tokenize the prompts and pass max_new_tokens, temperature, ... as for model.generate",
            )
    return model.generate(**kwargs) if prompts is None else model.generate(prompts, **kwargs)
