"""Where a model's files are and what they say: folder, repository or adapter, and its configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import log
from ..device import require
from ..errors import (
    ArgumentError,
    ConfigError,
    ModelNotFoundError,
    UnknownArchitectureError,
    UnsupportedError,
    nearest,
)
from . import safety


@dataclass(frozen=True, slots=True)
class Hub:
    """How files of one repository are reached."""

    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""
    proxies: dict[str, str] | None = field(default=None, repr=False)

    def options(self) -> dict[str, Any]:
        """The keyword arguments that transformers and PEFT take, without those left at their defaults."""
        values = {
            "revision": self.revision,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
            "force_download": self.force_download,
            "subfolder": self.subfolder,
            "proxies": self.proxies,
        }
        return {name: value for name, value in values.items() if value}


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or "\\" in name or name[1:2] == ":"


def local_folder(name: str) -> Path | None:
    """Return the folder that ``name`` is, or None when it is a hub id.

    Raises:
        ModelNotFoundError: it is a path, and no folder is there.
        ConfigError: it is a file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ConfigError(
            f"{name} is a file; a model is loaded from its folder",
            hint=f"pass {str(path.parent)!r}" + (f" and gguf_file={path.name!r}" if path.suffix == ".gguf" else ""),
        )
    if _looks_like_path(name):
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        raise ModelNotFoundError(
            f"there is no folder {name}",
            why=None if path.parent.is_dir() else f"{path.parent} does not exist either",
            hint=f"did you mean {path.parent / close}?" if close else "give a folder, or a hub id such as org/name",
        )
    return None


def find_file(name: str, filename: str, hub: Hub) -> Path | None:
    """Return the local path of one file of a folder or repository (downloaded if need be), or None if it has none."""
    folder = local_folder(name)
    if folder is not None:
        path = folder / hub.subfolder / filename
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        name,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=True,
        **hub.options(),
    )
    return Path(found) if found else None


def _missing(name: str, hub: Hub) -> ModelNotFoundError:
    folder = local_folder(name)
    if folder is None:
        why = None
        try:
            from transformers.utils import cached_file

            cached_file(name, "config.json", **hub.options())
        except OSError as error:
            why = str(error).strip().splitlines()[0]
        return ModelNotFoundError(
            f"{name} is neither a local folder nor a repository that can be reached",
            why=why,
            hint="check the spelling, the network, and token= for a private or gated repository",
        )
    inside = folder / hub.subfolder
    found = sorted(item.name for item in inside.iterdir()) if inside.is_dir() else []
    checkpoints = sorted((item for item in found if item.startswith("checkpoint-")), key=lambda item: (len(item), item))
    return ModelNotFoundError(
        f"the folder {inside} holds no model: it has neither config.json nor adapter_config.json",
        why=f"it holds: {', '.join(found[:12]) or 'nothing'}",
        hint=f"did you mean {inside / checkpoints[-1]}?"
        if checkpoints
        else "point to a folder that save_pretrained wrote",
    )


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights are.

    Attributes:
        name: What the caller asked for.
        base: Hub id or folder of the base weights.
        hub: How the base's files are reached.
        adapter: adapter_config.json when ``name`` holds an adapter, else None.
    """

    name: str
    base: str
    hub: Hub
    adapter: dict[str, Any] | None = None


def resolve_source(name: Any, hub: Hub, *, use_safetensors: bool | None = None) -> Source:
    """Find out whether ``name`` is a model or an adapter, and where the base weights are.

    Raises:
        ArgumentError: ``name`` is no string or path.
        ModelNotFoundError: nothing is there, or the adapter names no base.
        ConfigError: the adapter is pickled.
    """
    if not isinstance(name, str | os.PathLike) or not str(name):
        raise ArgumentError(f"model_name must be a hub id or a folder, got {name!r}", where="argument model_name")
    name = os.fspath(name)
    folder = local_folder(name)
    adapter_path = find_file(name, "adapter_config.json", hub)
    has_config = find_file(name, "config.json", hub) is not None
    if adapter_path is not None and has_config and folder is not None:
        inside = folder / hub.subfolder
        adapter_weights = any((inside / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin"))
        adapter_path = adapter_path if adapter_weights else None
    if adapter_path is None:
        return Source(name=name, base=str(folder) if folder is not None else name, hub=hub)
    adapter = safety.read_json(adapter_path)
    safety.check_adapter(adapter, where=str(adapter_path))
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelNotFoundError(
            "the adapter does not say which model it belongs to",
            where=str(adapter_path),
            why="adapter_config.json has no base_model_name_or_path",
            hint="write the base's hub id or folder there",
        )
    if find_file(name, "adapter_model.safetensors", hub) is None:
        pickled = find_file(name, "adapter_model.bin", hub) is not None
        if pickled and use_safetensors is not False:
            raise ConfigError(
                "the adapter's weights are stored as adapter_model.bin, a pickle, which is not read by default",
                where=name,
                hint="pass use_safetensors=False, which reads tensors only (torch.load with weights_only=True)",
            )
        if not pickled:
            raise ModelNotFoundError("the adapter has no weights (adapter_model.safetensors)", where=name)
    log.once(f"{name} is an adapter of {base}: loading the base, then the adapter")
    base_hub = Hub(
        revision=adapter.get("revision"),
        token=hub.token,
        cache_dir=hub.cache_dir,
        local_files_only=hub.local_files_only,
        force_download=hub.force_download,
        proxies=hub.proxies,
    )
    try:
        base_folder = local_folder(base)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the base model of the adapter {name} is not there: {base}",
            where=str(adapter_path),
            why=error.why,
            hint="put the base back, or write its new place into base_model_name_or_path",
        ) from error
    return Source(name=name, base=str(base_folder) if base_folder else base, hub=base_hub, adapter=adapter)


def load_config(source: Source, *, trust_remote_code: bool, given: Any = None, gguf_file: str | None = None) -> Any:
    """Build the base model's configuration, without the fields that select code.

    Args:
        source: The resolved source.
        trust_remote_code: Whether the repository's own classes may be imported.
        given: The caller's ``config``: an object, which is copied, or a folder or hub id.
        gguf_file: GGUF file from which the configuration is read.

    Raises:
        ModelNotFoundError: no config.json.
        UnknownArchitectureError: the installed transformers does not know the model.
        ConfigError: the model needs its own code and ``trust_remote_code`` is off.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if isinstance(given, PretrainedConfig):
        return type(given).from_dict(safety.clean_config(given.to_dict(), trust_remote_code=trust_remote_code)[0])
    name = os.fspath(given) if given is not None else source.base
    if gguf_file:
        require("gguf", what="gguf_file")
        if find_file(name, gguf_file, source.hub) is None:
            raise ModelNotFoundError(f"{name} has no file {gguf_file}", where="argument gguf_file")
        raw, _ = PretrainedConfig.get_config_dict(name, gguf_file=gguf_file, **source.hub.options())
    else:
        path = find_file(name, "config.json", source.hub)
        if path is None:
            raise _missing(name, source.hub)
        raw = safety.read_json(path)
    cleaned, removed = safety.clean_config(raw, trust_remote_code=trust_remote_code)
    told = [item for item in removed if not item.endswith("auto_map")]
    if told:
        log.warning(f"{name}: config.json may not set {', '.join(told)}; ignored")
    kind = cleaned.get("model_type")
    own_code = trust_remote_code and "AutoConfig" in (cleaned.get("auto_map") or {})
    if kind in CONFIG_MAPPING and not own_code:
        try:
            config = CONFIG_MAPPING[kind].from_dict(cleaned)
        except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise ConfigError(
                "config.json holds a value that cannot be used", where=name, why=" ".join(str(error).split())
            ) from error
        config.name_or_path = name
        return config
    if "auto_map" not in raw:
        close = nearest(str(kind), CONFIG_MAPPING.keys()) if kind else None
        raise UnknownArchitectureError(
            f"the installed transformers does not know the architecture {kind!r}"
            if kind
            else "config.json names no model_type",
            where=name,
            why=f"the nearest it knows is {close!r}" if close else None,
            hint="pip install --upgrade transformers, or check the folder",
        )
    commit = _commit(name, source.hub)
    if not trust_remote_code:
        raise ConfigError(
            f"{name} comes with its own Python code{commit}, which is not run unless you ask for it",
            where="argument trust_remote_code",
            why=f"its architecture {kind!r} is not part of transformers; config.json names code in auto_map",
            hint="read that code, then pass trust_remote_code=True (and revision= to pin it)",
        )
    if told:
        raise ConfigError(f"config.json may not set {', '.join(told)}", where=name)
    log.warning(f"running the Python code that comes with {name}{commit} (trust_remote_code=True)")
    return AutoConfig.from_pretrained(name, trust_remote_code=True, **source.hub.options())


def _commit(name: str, hub: Hub) -> str:
    """``" (commit ...)"`` of a hub repository whose files are in the cache, or nothing for a local folder."""
    if local_folder(name) is not None:
        return ""
    path = find_file(name, "config.json", hub)
    return f" (commit {path.parent.name})" if path is not None and path.parent.parent.name == "snapshots" else ""


def check_source_weights(
    source: Source, config: Any, *, use_safetensors: bool | None, variant: str | None
) -> int | None:
    """Check the weight files before anything reads them; returns their bytes, or None where only the hub knows.

    Raises:
        ModelNotFoundError: no weights.
        ConfigError: pickled weights only.
        CheckpointError: a shard's name leads out of the folder.
    """
    folder = local_folder(source.base)
    explicit = getattr(config, "transformers_weights", None)
    if folder is not None:
        return safety.check_weights(
            folder / source.hub.subfolder, variant=variant, use_safetensors=use_safetensors, explicit=explicit
        )
    if use_safetensors is False:
        raise UnsupportedError(
            "use_safetensors=False works with local folders only",
            where=source.base,
            hint="download the repository (`hf download NAME --local-dir FOLDER`) and pass the folder",
        )
    weights = safety.SAFE_WEIGHTS if not variant else safety.SAFE_WEIGHTS.replace(".", f".{variant}.", 1)
    index = find_file(source.base, f"{weights}.index.json", source.hub)
    if index is not None:
        safety.check_index(index)
        total = (safety.read_json(index).get("metadata") or {}).get("total_size")
        return total if isinstance(total, int) else None
    return None
