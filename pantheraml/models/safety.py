"""What a model folder or repository may not do while it is loaded: run code, reach outside itself, or fetch kernels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..device import is_installed
from ..errors import CheckpointError, ConfigError, MissingDependencyError, ModelNotFoundError, UnsupportedError

# Fields of config.json that select code instead of describing a model. transformers acted on some of them in the past
# (CVE-2026-4372, CVE-2026-5241), and none of them belongs in a published configuration.
_INTERNAL_FIELDS = frozenset(
    {
        "_attn_implementation_internal",
        "_experts_implementation_internal",
        "trust_remote_code",
        "use_kernels",
        "kernel_config",
        "allow_all_kernels",
    }
)
_IMPLEMENTATION_FIELDS = frozenset(
    {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
)
# Implementations that are part of torch or transformers, so that choosing one fetches and imports nothing.
_BUILT_IN = frozenset(
    {"eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm", "batched_mm_lora", "paged|eager", "paged|sdpa"}
)
_ATTENTION_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}

SAFE_WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model.bin"
_CONVERT = (
    'convert it once with `python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('FOLDER').save_pretrained('NEW')\"` where you trust it, or pass use_safetensors=False, "
    "which reads tensors only (torch.load with weights_only=True)"
)


def _is_built_in(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, dict):
        return all(_is_built_in(item) for item in value.values())
    return value in _BUILT_IN


def clean_config(config: dict[str, Any], *, trust_remote_code: bool) -> tuple[dict[str, Any], list[str]]:
    """Return ``config`` without the fields that select code, and the dotted names of what was taken out.

    Args:
        config: The parsed config.json; left unchanged. Nested configurations are cleaned too.
        trust_remote_code: Keeps ``auto_map``, which names the repository's own Python classes.
    """
    removed: list[str] = []

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, list):
            return [walk(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        kept = {}
        for key, item in value.items():
            name = f"{path}.{key}" if path else str(key)
            dangerous = key in _INTERNAL_FIELDS or (key in _IMPLEMENTATION_FIELDS and not _is_built_in(item))
            if dangerous or (key == "auto_map" and not trust_remote_code):
                removed.append(name)
            else:
                kept[key] = walk(item, name)
        return kept

    return walk(config, ""), removed


def check_adapter(config: dict[str, Any], *, where: str) -> None:
    """Refuse an adapter_config.json that names a Python module, which PEFT would import.

    Raises:
        UnsupportedError: ``megatron_config`` is set, which makes PEFT import ``megatron_core``.
    """
    if config.get("megatron_config"):
        raise UnsupportedError(
            f"the adapter asks for the Python module {config.get('megatron_core')!r} to be imported (megatron_config)",
            where=where,
            hint="set megatron_config to null if the adapter is plain LoRA",
        )


def check_attention(value: Any) -> None:
    """Refuse an ``attn_implementation`` argument that would download a kernel from a hub.

    Raises:
        UnsupportedError: it names a repository (``"org/name"``).
        MissingDependencyError: it names an attention whose package is not installed.
    """
    for name in value.values() if isinstance(value, dict) else [value]:
        if not isinstance(name, str):
            continue
        plain = name.removeprefix("paged|")
        if "/" in plain:
            raise UnsupportedError(
                f"attn_implementation={name!r} would download and run a kernel from a hub",
                where="argument attn_implementation",
                hint="use 'sdpa', 'eager' or 'flex_attention', or install flash_attn and use 'flash_attention_2'",
            )
        package = _ATTENTION_PACKAGES.get(plain)
        if package is not None and not is_installed(package.partition(".")[0]):
            raise MissingDependencyError(
                f"attn_implementation={name!r} needs the package {package!r}, which is not installed",
                where="argument attn_implementation",
                hint="leave attn_implementation out, or pass 'sdpa'",
            )


def _number(entry: dict[str, Any]) -> Any:
    """Infinities and NaN, which JSON does not have, in the form that transformers writes them."""
    tag = entry.get("__float__")
    return float(tag) if len(entry) == 1 and tag in ("Infinity", "-Infinity", "NaN") else entry


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from ``path``; ``{"__float__": "Infinity"}`` in it is a number, as transformers writes it.

    Raises:
        CheckpointError: the file is no JSON object; line and column are named.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path.name} is not UTF-8 text", where=str(path), why=str(error)) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path.name} is not valid JSON",
            where=f"{path}, line {error.lineno}, column {error.colno}",
            why=error.msg,
            hint="the file may be cut short: copy or download the folder again",
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds {type(value).__name__}, not a JSON object", where=str(path))
    return value


def _allowed_roots(folder: Path) -> Iterator[Path]:
    yield folder.resolve()
    # A snapshot in the hub cache is a folder of links into its own repository's blobs.
    if folder.resolve().parent.name == "snapshots":
        yield folder.resolve().parent.parent / "blobs"


def check_inside(folder: Path, names: Iterable[str], *, where: str) -> None:
    """Refuse file names that lead out of ``folder``: absolute, with ``..``, a drive, a NUL byte, or through a link.

    Raises:
        CheckpointError: naming the entry.
    """
    roots = list(_allowed_roots(folder))
    for name in names:
        problem = None
        if not isinstance(name, str) or not name or "\x00" in name:
            problem = "it is not a file name"
        elif PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("\\"):
            problem = "it is an absolute path"
        elif ".." in re.split(r"[/\\]", name):
            problem = "it climbs out of the folder"
        elif not any((folder / name).resolve().is_relative_to(root) for root in roots):
            problem = "it is a link that leads out of the folder"
        if problem is not None:
            raise CheckpointError(
                f"the model names the weights file {name!r}, which is refused",
                where=where,
                why=problem,
                hint="weights must lie inside the model's own folder",
            )


def _with_variant(filename: str, variant: str | None) -> str:
    if not variant:
        return filename
    stem, _, suffix = filename.partition(".")
    return f"{stem}.{variant}.{suffix}"


def check_index(path: Path, *, folder: Path | None = None) -> list[str]:
    """Check the ``weight_map`` of a sharded checkpoint's index file and return its shard names.

    Args:
        path: The index file.
        folder: Folder in which the shards lie; None when they are still to be downloaded.

    Raises:
        CheckpointError: an entry leads out of the folder, or the index has no ``weight_map``.
        ModelNotFoundError: shards are missing.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index of the weights has no weight_map", where=str(path))
    names = sorted({str(name) for name in weight_map.values()})
    check_inside(folder or path.parent, names, where=str(path))
    if folder is not None:
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelNotFoundError(
                f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:4])}",
                where=str(folder),
                hint="copy or download the folder again",
            )
    return names


def check_weights(folder: Path, *, variant: str | None, use_safetensors: bool | None, explicit: str | None) -> int:
    """Check that a local folder holds weights that may be read, before anything reads them.

    Args:
        folder: The folder with the weight files.
        variant: The ``variant`` in the file names, or None.
        use_safetensors: False allows ``pytorch_model.bin``.
        explicit: The weights file that config.json names in ``transformers_weights``, or None.

    Returns:
        The bytes of the weights.

    Raises:
        ModelNotFoundError: no weights, or shards are missing.
        ConfigError: pickled weights only.
        CheckpointError: a file name leads out of the folder.
    """
    candidates = [explicit] if explicit else [_with_variant(SAFE_WEIGHTS, variant)]
    if use_safetensors is False and not explicit:
        candidates = [_with_variant(TORCH_WEIGHTS, variant)]
    check_inside(folder, candidates, where=str(folder / "config.json"))
    for name in candidates:
        index = folder / (name if name.endswith(".index.json") else f"{name}.index.json")
        if (folder / name).is_file() and not name.endswith(".index.json"):
            return (folder / name).stat().st_size
        if index.is_file():
            return sum((folder / shard).stat().st_size for shard in check_index(index, folder=folder))
    pickled = any((folder / f"{_with_variant(TORCH_WEIGHTS, variant)}{end}").is_file() for end in ("", ".index.json"))
    if use_safetensors is not False and pickled:
        raise ConfigError(
            "the folder holds its weights only as pytorch_model.bin, a pickle, which is not read by default",
            where=str(folder),
            hint=_CONVERT,
        )
    found = sorted(path.name for path in folder.iterdir())
    raise ModelNotFoundError(
        f"the folder holds no model weights ({' or '.join(candidates)})",
        where=str(folder),
        why=f"it holds: {', '.join(found[:12])}" + (" ..." if len(found) > 12 else ""),
        hint="point to the folder that save_pretrained wrote",
    )
