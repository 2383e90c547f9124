"""Uploading a saved folder to the Hugging Face hub."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from .. import log
from ..errors import CheckpointError, ConfigError
from ..models.record import ModelRecord, record_of

_PACKAGES = ("pantheraml", "transformers", "peft", "torch")
_ADAPTER_SETTINGS = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora")
_TAGS = ("text-generation-inference", "transformers", "pantheraml", "trl")


@dataclass(frozen=True, slots=True)
class HubTarget:
    """Where and how to upload.

    Attributes:
        repo_id: ``"owner/name"``, or ``"name"`` under the token's owner.
        token: Hub token; None means the one stored by ``hf auth login``. It reaches no message.
        private: Whether a new repository is private; None means the owner's default.
        commit_message: Title of the commit.
        commit_description: Body of the commit.
        create_pr: Whether to open a pull request in place of committing.
        revision: Branch to commit to, made when it is missing; None means the main one.
    """

    repo_id: str
    token: str | bool | None = None
    private: bool | None = None
    commit_message: str = "Trained with PantheraML"
    commit_description: str = ""
    create_pr: bool = False
    revision: str | None = None

    def __repr__(self) -> str:
        return f"HubTarget(repo_id={self.repo_id!r})"


def create_repo(target: HubTarget) -> str:
    """Make the repository if it is missing, and return its full name.

    Raises:
        ConfigError: the name is no repository name.
        CheckpointError: the hub refuses or cannot be reached.
    """
    try:
        validate_repo_id(target.repo_id)
    except HFValidationError as error:
        raise ConfigError(
            f"{target.repo_id!r} is no repository name", where="argument repo_id", why=str(error)
        ) from error
    try:
        api = HfApi(token=target.token)
        return api.create_repo(target.repo_id, private=target.private, repo_type="model", exist_ok=True).repo_id
    except (HfHubHTTPError, OSError, LocalTokenNotFoundError) as error:
        raise _failure(f"cannot create or open the repository {target.repo_id!r}", error, target) from error


def upload(folder: Path, target: HubTarget) -> str:
    """Create the repository if need be, upload ``folder`` to it, and return the repository's full name.

    Raises:
        ConfigError: the name is no repository name.
        CheckpointError: the hub refuses or cannot be reached.
    """
    repo_id = create_repo(target)
    try:
        api = HfApi(token=target.token)
        if target.revision is not None and not target.create_pr:
            api.create_branch(repo_id, branch=target.revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message=target.commit_message,
            commit_description=target.commit_description or None,
            create_pr=target.create_pr,
            revision=target.revision,
        )
    except (HfHubHTTPError, OSError, LocalTokenNotFoundError) as error:
        raise _failure(f"cannot upload to {repo_id!r}", error, target) from error
    log.info(f"uploaded to https://huggingface.co/{repo_id}")
    return repo_id


def _failure(what: str, error: Exception, target: HubTarget) -> CheckpointError:
    reason = str(error)
    if isinstance(target.token, str) and target.token:
        reason = reason.replace(target.token, "<token>")
    return CheckpointError(what, where="huggingface.co", why=reason, hint="check the name, the token and the network")


def write_card(model: Any, folder: Path, *, tags: Iterable[str] | None, datasets: Iterable[str] | None) -> None:
    """Write ``README.md``: what the hub reads (base model, tags, data sets), the settings, and packages' versions.

    Args:
        model: The trained model.
        folder: Folder that holds the saved model.
        tags: Further tags.
        datasets: Hub ids of the data sets it was trained on.
    """
    record = record_of(model)
    config = getattr(model, "config", None)
    base = record.base if record is not None else None
    if base is not None and Path(base).expanduser().is_dir():
        base = None  # a local path means nothing to others
    model_type = getattr(config, "model_type", None)
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        tags=list(dict.fromkeys([*_TAGS, *([model_type] if model_type else []), *(tags or ())])),
        datasets=list(datasets) if datasets else None,
    )
    facts = {"Base model": base, "Revision of the base model": _base_revision(record, config) if base else None}
    facts |= {"Data set": ", ".join(datasets or ()) or None} | _settings(model, record)
    facts |= {"Versions": ", ".join(f"{package} {_version(package)}" for package in _PACKAGES)}
    text = "\n".join(f"- {name}: `{value}`" for name, value in facts.items() if value is not None)
    body = f"# {folder_title(base)}\n\nFine-tuned with PantheraML.\n\n{text}\n"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def _base_revision(record: ModelRecord | None, config: Any) -> str | None:
    """The commit that was loaded, as transformers notes it, else the revision that was asked for."""
    return getattr(config, "_commit_hash", None) or (record.revision if record is not None else None)


def _settings(model: Any, record: ModelRecord | None) -> dict[str, Any]:
    """How it was trained, as far as the model tells."""
    facts: dict[str, Any] = {}
    if record is not None:
        facts["Loaded as"] = f"{str(record.dtype).removeprefix('torch.')}, {record.quantization}"
        facts["Longest sequence"] = record.max_seq_length
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        shown = {key: getattr(adapter, key, None) for key in _ADAPTER_SETTINGS}
        modules = getattr(adapter, "target_modules", None)
        if isinstance(modules, (set, list, tuple)):
            shown["target_modules"] = " ".join(sorted(modules))
        given = ", ".join(f"{key} {value}" for key, value in shown.items() if value not in (None, False, 0.0, "none"))
        facts[f"Adapter {name}" if name != "default" else "Adapter"] = given
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from source"


def folder_title(base: str | None) -> str:
    """Title of the card."""
    return f"Fine-tune of {base}" if base else "Fine-tuned model"
