"""Which part of a model is on which GPU, when one process spreads it over several."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..device import get_device
from ..errors import ArgumentError, ConfigError, DeviceMemoryError


def create_device_map(model_config: Any, num_gpus: int) -> dict[str, int]:
    """Spread the decoder layers of a model evenly, in order, by their number alone.

    ``get_optimal_device_map`` knows their sizes and the GPUs' memory too.

    Args:
        model_config: A transformers configuration, or anything with ``num_hidden_layers``.
        num_gpus: How many GPUs, at least 1.

    Returns:
        Module name to GPU index: the embedding and rotary tables on the first, the last norm and the head on the last.

    Raises:
        ConfigError: ``num_gpus`` is under 1 or over the number of layers.
        ArgumentError: the configuration does not say how many layers there are.
    """
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ArgumentError(f"{type(model_config).__name__} has no num_hidden_layers", where="argument model_config")
    if not 1 <= num_gpus <= layers:
        raise ConfigError(f"{layers} layers cannot be spread over {num_gpus} GPUs", where="argument num_gpus")
    share, over = divmod(layers, num_gpus)
    owners = [gpu for gpu in range(num_gpus) for _ in range(share + (gpu < over))]
    return {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        **{f"model.layers.{index}": gpu for index, gpu in enumerate(owners)},
        "model.norm": num_gpus - 1,
        "lm_head": num_gpus - 1,
    }


def get_optimal_device_map(
    model: nn.Module, num_gpus: int | None = None, max_memory: dict[Any, Any] | None = None
) -> dict[str, Any]:
    """Spread a model over GPUs so that each holds about the same number of bytes and none more than it may.

    Sizes are those of the weights as they are (an nf4 weight counts its packed bytes). Decoder layers stay whole.

    Args:
        model: The model, also one on the meta device.
        num_gpus: How many GPUs of this process to use; None for all of them.
        max_memory: Cap for each GPU, as in ``{0: "10GB", 1: "8GiB"}``; None takes what is free. GPUs that it does not
            name are not used.

    Returns:
        Module name to device, for ``device_map=``; ``{"": device}`` where one device is all there is.

    Raises:
        ConfigError: more GPUs are asked for than there are.
        DeviceMemoryError: the model does not fit.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes, get_balanced_memory, get_max_memory

    device = get_device()
    there = device.count if device.is_gpu else 0
    if max_memory is None:
        if num_gpus is not None and num_gpus > max(there, 1):
            raise ConfigError(
                f"num_gpus={num_gpus}, and this process sees {there} GPUs",
                where="argument num_gpus",
                hint="name max_memory to plan for a machine that has them",
            )
        if (num_gpus or there) < 2:
            return {"": device.index if device.is_gpu else device.type}
        max_memory = {key: value for key, value in get_max_memory().items() if isinstance(key, int)}
    if num_gpus is not None and num_gpus > len(max_memory):
        raise ConfigError(
            f"num_gpus={num_gpus}, and max_memory names {len(max_memory)} devices", where="argument max_memory"
        )
    chosen: dict[Any, Any] = dict(sorted(max_memory.items(), key=lambda item: str(item[0]))[:num_gpus])
    whole = list(getattr(model, "_no_split_modules", None) or ())
    limits = get_max_memory(dict(chosen))
    balanced = get_balanced_memory(model, max_memory=dict(limits), no_split_module_classes=whole)
    placed: Any = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=whole)
    if set(placed.values()) - set(chosen):
        # Balancing leaves little slack: fill one device after the other before giving up.
        placed = infer_auto_device_map(model, max_memory=dict(limits), no_split_module_classes=whole)
    outside = sorted({str(place) for place in placed.values()} - {str(place) for place in chosen})
    if outside:
        needed = compute_module_sizes(model)[""]
        caps = ", ".join(f"{place}: {cap}" for place, cap in chosen.items())
        raise DeviceMemoryError(
            f"a model of {needed / 2**20:,.0f} MiB does not fit into {caps}",
            where="argument max_memory",
            why=f"{sum(str(place) in outside for place in placed.values())} of its parts would be on "
            + " and ".join(outside),
            hint="raise max_memory, use more GPUs, or load_in_4bit=True",
        )
    return placed
