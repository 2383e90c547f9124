"""Names and shapes that a checkpoint has on disk, for the parameters that a model has in memory.

Transformers renames and converts weights while it loads (mixture-of-experts layers, for example, hold all experts in
one parameter and store each expert by itself) and reverts that when it saves. The reversal works on whole state dicts.
Here it runs once on meta tensors that remember where they come from; that gives, for every tensor on disk, the
parameters it is made of, and so the reversal can be done on a few parameters at a time.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, revert_weight_conversion

from ..checkpoint.safetensors_io import TensorSpec
from ..errors import CheckpointError
from ..models.stacks import DENSE_CONVERSIONS


class _Traced(torch.Tensor):
    """A meta tensor that knows from which parameters it was computed."""

    sources: frozenset[str]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        sources: frozenset[str] = frozenset().union(*(_sources(leaf) for leaf in _leaves([args, kwargs])))
        for leaf in _leaves(result):
            if isinstance(leaf, _Traced):
                leaf.sources = sources
        return result


def _sources(value: Any) -> frozenset[str]:
    return vars(value).get("sources", frozenset()) if isinstance(value, _Traced) else frozenset()


def _leaves(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        yield tree
        return
    for branch in tree:
        yield from _leaves(branch)


def _traced(spec: TensorSpec) -> _Traced:
    tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta").as_subclass(_Traced)
    tensor.sources = frozenset([spec.name])
    return tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that become tensors on disk together.

    Attributes:
        inputs: Names in memory.
        outputs: What they become on disk.
        renamed: True when it is one parameter that only changes its name (or not even that).
    """

    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    renamed: bool


class CheckpointLayout:
    """The way from a model's parameters to its checkpoint.

    Args:
        model: The transformers model, with or without adapters in it.
        specs: Its parameters as they are to be saved: stock names in memory, shapes and dtypes.

    Attributes:
        groups: Which parameters become which tensors, in the order of ``specs``.
    """

    def __init__(self, model: PreTrainedModel, specs: Sequence[TensorSpec]) -> None:
        self._conversions = _conversions(model)
        self._config = model.config
        inputs = {spec.name: _traced(spec) for spec in specs}
        self.groups = _grouped(inputs, self._revert(inputs))
        self._group_of = {name: group for group in self.groups for name in group.inputs}

    def _revert(self, state: dict[str, Any]) -> dict[str, Any]:
        if not self._conversions:
            return state
        # All that the reversal reads of a model; the real one may carry a quantiser's conversions.
        model: Any = types.SimpleNamespace(config=self._config, _weight_conversions=self._conversions)
        return revert_weight_conversion(model, state)

    def convert(self, group: Group, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a group's tensors on disk, given its parameters.

        Args:
            group: One of ``groups``.
            tensors: A tensor for each of ``group.inputs``.
        """
        if group.renamed:
            return {group.outputs[0].name: tensors[group.inputs[0]]}
        result = self._revert(tensors)
        wanted = {spec.name for spec in group.outputs}
        if result.keys() != wanted:
            raise CheckpointError(
                "transformers converts these parameters differently when they are converted together",
                where=", ".join(group.inputs[:3]),
                why=f"expected {sorted(wanted)[:3]}, got {sorted(result)[:3]}",
            )
        return result

    def stored(self, name: str) -> tuple[TensorSpec, ...]:
        """The tensors on disk from which the parameter ``name`` is made; those on disk may have other dtypes."""
        return self._group_of[name].outputs

    def assembled(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Make a parameter from a checkpoint, as loading does.

        Args:
            name: Its name in memory.
            read: Gives a tensor of the checkpoint by its name on disk.
        """
        group = self._group_of[name]
        if group.renamed:
            return read(group.outputs[0].name)
        transforms: dict[str, Any] = {}
        for stored in sorted((spec.name for spec in group.outputs), key=dot_natural_key):
            target, converter, pattern = self._forward(stored)
            transform = transforms.setdefault(target, copy.deepcopy(converter))
            transform.add_tensor(target, stored, pattern, read(stored))
        made: dict[str, Any] = {}
        for target, transform in transforms.items():
            made |= transform.convert(target, config=self._config)
        (tensor,) = made.values() if len(made) == 1 else [made[name]]
        return tensor[0] if isinstance(tensor, list) else tensor

    def _forward(self, stored: str) -> tuple[str, Any, str]:
        """The name in memory of a tensor on disk, the conversion that leads there, and by which of its patterns."""
        name = stored
        for renaming in self._conversions:
            if not isinstance(renaming, WeightConverter):
                name = renaming.rename_source_key(name)[0]
        for converter in self._conversions:
            if isinstance(converter, WeightConverter):
                target, pattern = converter.rename_source_key(name)
                if pattern is not None:
                    return target, converter, pattern
        raise CheckpointError("no conversion of transformers reads this tensor", where=stored)


def _conversions(model: PreTrainedModel) -> list[Any]:
    """The conversions that loading applied, or those that the architecture's checkpoints have.

    What a quantiser added does not belong to the checkpoint of the dense model. Without a load there is no knowing
    whether a prefix was there, so prefixes stay as they are in memory.
    """
    # A model with experts in 4 bits saves these as they are.
    loaded = getattr(model, DENSE_CONVERSIONS, None)
    loaded = getattr(model, "_weight_conversions", None) if loaded is None else loaded
    if loaded is None:
        default = get_model_conversion_mapping(model, add_legacy=False)
        kept = [entry for entry in default if type(entry).__name__ != "PrefixChange"]
    else:
        kept = [entry for entry in loaded if not _belongs_to_quantizer(entry)]
    return kept


def _belongs_to_quantizer(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or []
    return any(type(operation).__module__.startswith("transformers.integrations") for operation in operations)


def _grouped(inputs: dict[str, _Traced], outputs: dict[str, Any]) -> list[Group]:
    by_identity = {id(tensor): name for name, tensor in inputs.items()}
    order = {name: position for position, name in enumerate(inputs)}
    groups: list[Group] = []
    converted: list[tuple[set[str], list[TensorSpec]]] = []
    untraced: list[TensorSpec] = []
    for name, tensor in outputs.items():
        spec = TensorSpec(name, tuple(tensor.shape), tensor.dtype)
        source = by_identity.get(id(tensor))
        if source is not None:
            groups.append(Group((source,), (spec,), renamed=True))
            continue
        sources = set(_sources(tensor))
        if not sources:
            untraced.append(spec)
            continue
        overlapping = [entry for entry in converted if entry[0] & sources]
        merged = (sources.union(*(entry[0] for entry in overlapping)), [s for e in overlapping for s in e[1]] + [spec])
        converted = [entry for entry in converted if entry not in overlapping] + [merged]
    if untraced:
        # An operation that hid where its result comes from: everything that is converted stays together.
        renamed = {group.inputs[0] for group in groups}
        specs = [spec for entry in converted for spec in entry[1]]
        converted = [(set(inputs) - renamed, specs + untraced)]
    groups += [
        Group(tuple(sorted(names, key=order.__getitem__)), tuple(specs), renamed=False) for names, specs in converted
    ]
    covered = {name for group in groups for name in group.inputs}
    if covered != set(inputs):
        raise CheckpointError(
            "transformers drops parameters when it saves this model",
            where=", ".join(sorted(set(inputs) - covered)[:5]),
            why="the reverse of its weight conversion does not lead to them",
        )
    return sorted(groups, key=lambda group: order[group.inputs[0]])
