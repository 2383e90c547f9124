"""Whether a written model is the trained one: reload it with plain transformers, and compare what it holds and does."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..checkpoint.safetensors_io import SafetensorsFolder, checksum
from ..errors import CheckpointError
from ..models.qat import exact

_TOKENS = 24  # long enough for positions and windows to matter, short enough to cost nothing
_ID_LIMIT = 1000  # token ids are drawn below this; image and other placeholder tokens lie at the end of vocabularies
# Relative RMS deviation of the logits that two correct computations in a dtype may show. The roundings of some hundred
# layers' sums add up like a random walk: about sqrt(100) * eps, with room of ten for fp32 and two for the others.
_LOGIT_BUDGET = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
# Merging onto the 16-bit base takes the quantisation error (10 % of each weight for nf4) out of the model, so that its
# logits rightly differ from those seen in training. What a wrong model shows is 1.0 and more.
_QUANTIZED_LOGIT_BUDGET = 0.8
_GREEDY = 16  # tokens that are appended to the sequence
# Another token is as good while the trained model's own is ahead by at most this times the deviation that is allowed:
# roundings of two logits among thousands, of which the largest count.
_CLOSE_CHOICE = 4.0
_MEMORY_FACTOR = 1.2
ROUNDING = "rounding to the format"
_PLACEHOLDER = re.compile(r"(image|video|audio|vision)\w*_token_(id|index)")


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared, and how far apart it was.

    Attributes:
        method: ``"reload"`` (loaded by transformers; weights and logits compared) or ``"files"`` (read back from the
            disk and compared with what was to be written, because a second copy of the model does not fit).
        tensors: Tensors that were compared bit by bit.
        deviation: Relative RMS deviation of the logits from the trained model's, None without a reload.
        tokens: How many greedy tokens were compared, and how many are the same before one differs; None without a
            reload, or for models that do not generate.
        budget: The largest deviation allowed.
        note: What the budget allows for.
    """

    method: str
    tensors: int
    deviation: float | None = None
    budget: float | None = None
    note: str = ""
    tokens: tuple[int, int] | None = None


def greedy_tokens(tokens: tuple[int, int] | None) -> str:
    """What a summary says of the tokens compared; see ``Verification``."""
    return f", the first {tokens[1]} of {tokens[0]} greedy tokens are the same" if tokens is not None else ""


def sample_inputs(base: PreTrainedModel) -> dict[str, Any]:
    """One short fixed sequence of token ids, the same on every machine; arguments of the model's forward."""
    vocabulary = base.config.get_text_config().vocab_size
    limit = max(2, min(_ID_LIMIT, vocabulary))
    ids = torch.tensor([[(7 * i * i + 3 * i + 1) % limit for i in range(_TOKENS)]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.can_generate():
        # Where every layer keeps a state, transformers' cache cannot tell its length.
        inputs["use_cache"] = False
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : _TOKENS // 2]
    return inputs


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]


def _at_home(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs on the device where ``model`` takes them."""
    device = next(parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def logits_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits (fp32, on the CPU) of ``model`` in evaluation mode; its training state stays as it was."""
    with _evaluation(model):
        outputs: Any = model(**_at_home(model, inputs))
    logits = getattr(outputs, "logits", None)
    return (outputs[0] if logits is None else logits).float().cpu()


def deviation(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS of the difference, relative to the RMS of ``reference`` about its mean; inf when either is not finite."""
    if candidate.shape != reference.shape or not bool(torch.isfinite(candidate).all()):
        return math.inf
    scale = (reference - reference.mean(dim=-1, keepdim=True)).norm() if reference.shape[-1] > 1 else reference.norm()
    result = float((candidate - reference).norm() / scale.clamp_min(1e-12))
    return result if math.isfinite(result) else math.inf


def _placeholders(base: PreTrainedModel) -> list[int]:
    """Ids that are no choice: they stand for images and sounds that are not there."""
    settings = base.config.to_dict() | base.config.get_text_config().to_dict()
    return [token for name, token in settings.items() if _PLACEHOLDER.fullmatch(name) and isinstance(token, int)]


def _choices(logits: torch.Tensor, banned: list[int]) -> torch.Tensor:
    """Tokens chosen greedily, from logits [..., vocabulary]."""
    logits = logits.clone()
    logits[..., [token for token in banned if token < logits.shape[-1]]] = -math.inf
    return logits.argmax(-1)


def continued(model: nn.Module, base: PreTrainedModel) -> dict[str, Any]:
    """The fixed sequence, continued greedily by ``model``.

    Args:
        model: A model that generates.
        base: The transformers model that is meant, or another of its kind.
    """
    inputs, banned = _at_home(model, sample_inputs(base)), _placeholders(base)
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    with _evaluation(model):
        for _ in range(_GREEDY):
            outputs: Any = model(**inputs)
            inputs[name] = torch.cat([inputs[name], _choices(outputs.logits[:, -1:], banned)], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near a model comes to another.

    Attributes:
        deviation: Relative RMS deviation of its logits.
        tokens: How many greedy tokens were compared, and how many are the same before one differs; None for models
            that do not generate.
        problem: What is further off than it may be; None where all is well.
    """

    deviation: float
    tokens: tuple[int, int] | None = None
    problem: str | None = None


def agreement(
    candidate: nn.Module, reference: nn.Module, base: PreTrainedModel, *, budget: float, note: str
) -> Agreement:
    """Compare logits and greedy tokens: the candidate continues a fixed sequence, and both are asked about each step.

    Another token is right where the two were as good as equally likely.

    Args:
        candidate: The model to judge.
        reference: What it should be.
        base: The transformers model inside the reference.
        budget: Largest relative RMS deviation of the logits.
        note: What the budget allows for.
    """
    inputs = continued(candidate, base) if base.can_generate() else sample_inputs(base)
    logits, due = logits_of(candidate, inputs), logits_of(reference, inputs)
    found = deviation(logits, due)
    if not found <= budget:
        return Agreement(
            found, None, f"its logits deviate by {found:.3g} (relative RMS); {budget:.3g} is allowed for {note}"
        )
    if not base.can_generate():
        return Agreement(found)
    banned, steps = _placeholders(base), slice(-1 - _GREEDY, -1)
    got, best = _choices(logits[0, steps], banned), _choices(due[0, steps], banned)
    spread = float((due - due.mean(-1, keepdim=True)).square().mean().sqrt())
    lead = (due[0, steps].gather(1, best[:, None]) - due[0, steps].gather(1, got[:, None]))[:, 0] / max(spread, 1e-12)
    differs = (best != got).nonzero()[:, 0].tolist()
    tokens = (_GREEDY, differs[0] if differs else _GREEDY)
    worst, allowed = int(lead.argmax()), _CLOSE_CHOICE * budget
    if float(lead[worst]) <= allowed:
        return Agreement(found, tokens)
    why = (
        f"after the same {worst} tokens it chooses {int(got[worst])}, and the trained model {int(best[worst])}, "
        f"which is ahead by {float(lead[worst]):.3g} of the spread of its logits; {allowed:.3g} is allowed for {note}"
    )
    return Agreement(found, tokens, why)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from writing bars and messages about a reload that the user did not ask for."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # The bars of some loaders have no switch of their own.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _reload(directory: Path, base: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    kind: Any = getattr(transformers, type(base).__name__, type(base))
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                str(directory), dtype="auto", local_files_only=True, output_loading_info=True, use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError("transformers cannot load what was written", why=str(error)) from error
    faults = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
    if faults:
        why = "; ".join(f"{key}: {', '.join(sorted(map(str, names))[:3])}" for key, names in faults.items())
        raise CheckpointError("what was written does not fit the model", where=str(directory), why=why)
    return model.to(device)


def _fits(size: int, device: torch.device) -> bool:
    needed = size * _MEMORY_FACTOR
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] >= needed
    return device.type == "cpu" and psutil.virtual_memory().available >= needed


def verify_files(directory: Path, checksums: dict[str, int]) -> Verification:
    """Read every tensor back and compare its CRC-32 with the one computed while writing.

    Raises:
        CheckpointError: a tensor is missing, too many, or not the same.
    """
    folder = SafetensorsFolder(directory)
    if set(folder.names()) != set(checksums):
        raise CheckpointError("the written files do not hold the tensors that were due", where=str(directory))
    for name, tensor in folder:
        if checksum(tensor) != checksums[name]:
            raise CheckpointError(
                "a tensor read back is not the one that was written", where=name, hint="check the disk and save again"
            )
    return Verification("files", len(checksums), note="a second copy of the model does not fit into memory")


def verify_merged(
    directory: Path,
    model: nn.Module,
    base: PreTrainedModel,
    *,
    checksums: dict[str, int],
    in_memory: dict[str, int],
    nbytes: int,
    dtype: torch.dtype,
    changed_base: bool,
    rounding: float | None = None,
) -> Verification:
    """Check a written folder against the trained model.

    Args:
        directory: What was written, perhaps still under a temporary name.
        model: The trained model, with its adapters.
        base: The transformers model inside it.
        checksums: CRC-32 of each tensor by its name on disk.
        in_memory: CRC-32 of each merged parameter by its name in memory.
        nbytes: Size of the weights.
        dtype: Dtype that was written.
        changed_base: Whether the merge went onto weights other than those the trained model computes with.
        rounding: Deviation of the logits that a quantised format may cause; None for an unquantised one.

    Raises:
        CheckpointError: the folder does not load, or is another model than the trained one.
    """
    home = next(parameter.device for parameter in base.parameters())
    device = next((d for d in (home, torch.device("cpu")) if _fits(nbytes, d)), None)
    if device is None:
        return verify_files(directory, checksums)
    reloaded = _reload(directory, base, device)
    state = reloaded.state_dict()
    different = [name for name, crc in in_memory.items() if name not in state or checksum(state[name]) != crc]
    if different:
        raise CheckpointError(
            f"{len(different)} weights are not the merged ones after reloading",
            where=", ".join(different[:3]),
            why="names or layout on disk do not lead back to the model in memory",
        )
    computed = [dtype, next(base.parameters()).dtype]
    if "_original_forward" in vars(model):
        # Accelerate has wrapped the model's forward, which computes in 16 bits since.
        computed.append(torch.bfloat16)
    coarsest = max(computed, key=lambda d: _LOGIT_BUDGET.get(d, 0.0))
    budget = _QUANTIZED_LOGIT_BUDGET if changed_base else _LOGIT_BUDGET.get(coarsest, _LOGIT_BUDGET[torch.bfloat16])
    note = "the quantisation error that the 16-bit base does not have" if changed_base else f"rounding in {coarsest}"
    if rounding is not None:
        budget, note = max(budget, rounding), ROUNDING + (f", and {note}" if changed_base else "")
    with exact(base):
        return verify_behaviour(directory, model, base, reloaded, compared=len(in_memory), budget=budget, note=note)


def verify_behaviour(
    directory: Path,
    model: nn.Module,
    base: PreTrainedModel,
    reloaded: nn.Module,
    *,
    compared: int,
    budget: float,
    note: str,
) -> Verification:
    """Compare the logits and greedy tokens of a reloaded model with those of the trained one.

    Args:
        directory: Where it was loaded from, for messages.
        model: The trained model, with its adapters.
        base: The transformers model inside it.
        reloaded: What was written.
        compared: Tensors that were compared already.
        budget: Largest relative RMS deviation of the logits.
        note: What the budget allows for.

    Raises:
        CheckpointError: they are further apart.
    """
    with quiet_transformers():  # some formats are unpacked in the first forward, with bars
        found = agreement(reloaded, model, base, budget=budget, note=note)
    if found.problem is not None:
        raise CheckpointError(
            "the reloaded model computes something else than the trained one", where=str(directory), why=found.problem
        )
    return Verification("reload", compared, found.deviation, budget, note, found.tokens)
