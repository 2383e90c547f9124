"""Loading under a launch without ever holding the model whole: a layer is read, converted, quantised and divided.

transformers does the reading of each layer as it does that of a whole model, so that every weight is the same to the
last bit. Here is decided how much it reads at a time, and what stays of it on this rank.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import core_model_loading
from transformers.core_model_loading import WeightConverter, convert_and_load_state_dict_in_model
from transformers.utils import logging as transformers_logging

from .. import log
from ..errors import UnsupportedError
from ..parallel import parts

# Without a default before transformers 5.17.
_REQUIRED = {
    name: None for name in ("tp_plan",) if name in inspect.signature(convert_and_load_state_dict_in_model).parameters
}
# Whether transformers reads what a distributed tensor has here: since 5.17.
_READS_ROWS = hasattr(core_model_loading, "DtensorShardOperation")
# A layer of a checkpoint: everything up to the first number in a tensor's name.
_LAYER = re.compile(r"^.*?\.\d+(?=\.)")


def read(auto: Any, name: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model of which every rank of the launch keeps its part. All ranks have to call it.

    Args:
        auto: The class to load with, one of transformers' ``Auto`` classes or a model's own.
        name: Folder or hub id.
        options: Keyword arguments of its ``from_pretrained``, with ``config``.

    Returns:
        The model, and what transformers tells about the load.

    Raises:
        UnsupportedError: the model's class cannot be loaded in this way.
    """
    options = dict(options)
    stock, options["config"] = _class_and_config(auto, options["config"])
    ranks = parts.mesh()

    def load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Sequence[str] | None, load_config: Any, *_: Any, **__: Any
    ) -> tuple[Any, None]:
        if state_dict is not None or not checkpoint_files or not checkpoint_files[0].endswith(".safetensors"):
            raise UnsupportedError("only safetensors can be loaded in shards", where=name)
        return _stream(model, checkpoint_files, load_config, ranks), None

    # A class of its own for this load: the stock one stays as it is.
    streaming = type(
        stock.__name__,
        (stock,),
        {"_load_pretrained_model": staticmethod(load_pretrained_model), "__module__": stock.__module__},
    )
    model, info = streaming.from_pretrained(name, output_loading_info=True, **options)  # type: ignore[attr-defined]
    model.__class__ = stock
    parts.divide(model, [parameter for parameter, _ in model.named_parameters(remove_duplicate=False)], ranks)
    parts.forbid_use(model)
    return model, info


def _class_and_config(auto: Any, config: Any) -> tuple[Any, Any]:
    """The model class that an ``Auto`` class takes for a configuration, and the configuration that it is given."""
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None:
        return auto, config
    if type(config) not in mapping or auto.__name__ in (getattr(config, "auto_map", None) or {}):
        raise UnsupportedError(
            f"{type(config).__name__} is a model with its own Python code, which cannot be loaded in shards",
            where="argument multi_gpu_config",
            hint="leave strategy='fsdp' to the trainer: each GPU then holds the model once while it loads",
        )
    found = mapping[type(config)]
    if isinstance(found, list | tuple):
        named = {model.__name__: model for model in found}
        asked = [name for name in getattr(config, "architectures", None) or () if name in named]
        found = named[asked[0]] if asked else found[0]
    text = getattr(config, "sub_configs", {}).get("text_config")
    if text is not None and getattr(found, "config_class", None) is text:
        whole, config = config, config.get_text_config()
        if getattr(whole, "quantization_config", None) is not None:
            config.quantization_config = whole.quantization_config
    return found, config


def _stream(model: Any, files: Sequence[str], load_config: Any, ranks: DeviceMesh) -> Any:
    """Load a model that is on the meta device, a layer of the checkpoint at a time."""
    started = time.perf_counter()
    total: Any = None
    with contextlib.ExitStack() as opened, _quiet():
        handles = [opened.enter_context(safe_open(file, framework="pt", device="cpu")) for file in files]
        slices = {name: handle.get_slice(name) for handle in handles for name in handle.keys()}  # noqa: SIM118
        undivided = _read_rows_only(model, slices, load_config, ranks)
        expected = model.state_dict()
        opened.enter_context(_fixed_state_dict(model, expected))
        for names in layers_of(slices, expected):
            tensors = {name: slices[name] for name in names}
            info, _ = convert_and_load_state_dict_in_model(
                model=model, state_dict=tensors, load_config=load_config, **_REQUIRED
            )
            parts.divide(model, [name for name in expected if name not in info.missing_keys], ranks)
            total = info if total is None else _joined(total, info)
    for name in undivided.keys() & total.missing_keys:
        # It starts at random, as in a whole model.
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = undivided[name]
    log.info(f"read in shards, one of {ranks.size()} here, in {time.perf_counter() - started:.0f} s")
    return total


def _read_rows_only(model: Any, slices: dict[str, Any], load_config: Any, ranks: DeviceMesh) -> dict[str, nn.Parameter]:
    """Let transformers read no more than this rank's rows, of weights that are loaded as they are in the checkpoint.

    Returns:
        The parameters that were there before, by name.
    """
    quantizer = load_config.hf_quantizer
    if not _READS_ROWS or any(isinstance(change, WeightConverter) for change in load_config.weight_mapping or ()):
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        stored = slices.get(name)
        is_quantised = quantizer is not None and quantizer.param_needs_quantization(model, name)
        if stored is not None and not is_quantised and tuple(stored.get_shape()) == tuple(parameter.shape):
            found[name] = parameter
    parts.divide(model, found, ranks)
    return found


def layers_of(names: Iterable[str], expected: Iterable[str]) -> list[list[str]]:
    """Divide the names of a checkpoint's tensors into what is read at a time.

    Names with a number belong together up to the first one, since experts are merged within a layer. Of the others,
    those that the model knows under the same name stand for themselves, with their quantisation; the rest may have to
    be converted into one another.

    Args:
        names: Of the checkpoint.
        expected: Of the model.
    """
    expected = set(expected)
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = _LAYER.match(name)
        own = re.sub(r"(\.weight)\..*$", r"\1", name)
        groups.setdefault(layer[0] if layer else own if own in expected else "", []).append(name)
    return list(groups.values())


def _joined(total: Any, info: Any) -> Any:
    """What two parts of a load say together: missing is what neither has."""
    total.missing_keys &= info.missing_keys
    total.unexpected_keys |= info.unexpected_keys
    total.mismatched_keys |= info.mismatched_keys
    total.conversion_errors.update(info.conversion_errors)
    total.error_msgs += info.error_msgs
    return total


@contextlib.contextmanager
def _fixed_state_dict(model: Any, state: dict[str, Any]) -> Iterator[None]:
    """The names and dtypes of the weights are asked for again with every layer: give those that were."""
    object.__setattr__(model, "state_dict", lambda: state)
    try:
        yield
    finally:
        vars(model).pop("state_dict", None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for every layer."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
