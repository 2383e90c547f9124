"""Attention whose queries and keys are rotated by one kernel, between the module's own projections and its own norms.

What a family's attention does around that (norms of queries and keys over the head or over all heads, partial or
interleaved rotation, a softmax scale, windows, soft caps, sinks) is learnt from its own forward: the probe runs it with
an attention function that notes what it is given, and the same is given from then on.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ... import kernels
from ..probe import FOREIGN_ERRORS, Formula, choose, copy_child, regime_of, stand_in
from ..roles import QKV, base_layer, is_linear, linear_children, plain_tensor, qkv_children
from .lora import compute_dtype, projection_of
from .norm import NormPlan
from .slots import Swap, is_installed, plan_of, stock_forward, unhooked
from .step import is_bound_by_host, is_step

# Norms of queries and keys, as the families call them.
NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
# Input features of the stand-in's projections; their outputs keep their size, which the head count decides.
HIDDEN = 24
TOKENS = 5
_PROBE = "pantheraml_probe"
_NAMED = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
# Some take these by name too, for what depends on how far a token is into its row.
POSITION_IDS = "position_ids"


@dataclass(frozen=True)
class Rotation:
    """How a family rotates queries and keys.

    Attributes:
        layout: Which elements make a pair: ``"half"`` (i and i + D/2) or ``"interleaved"`` (2i and 2i + 1).
        angles: How cosines and sines arrive: ``"halves"`` repeats D/2 angles one after the other, ``"pairs"`` repeats
            each at once, ``"single"`` gives every angle once.
    """

    layout: Literal["half", "interleaved"]
    angles: Literal["halves", "pairs", "single"]

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """Bring cosines or sines [B, T, *] into the order that ``kernels.rotary`` takes for the layout."""
        wanted = "halves" if self.layout == "half" else "pairs"
        if self.angles == wanted:
            return values
        once = values[..., : values.shape[-1] // 2] if self.angles == "halves" else values
        return torch.cat([once, once], -1) if wanted == "halves" else once.repeat_interleave(2, -1)


# Llama and most others; Cohere; gpt-oss; GLM and Helium.
ROTATIONS = (
    Rotation("half", "halves"),
    Rotation("interleaved", "pairs"),
    Rotation("half", "single"),
    Rotation("interleaved", "halves"),
)


@dataclass(frozen=True)
class QueryScale:
    """A factor of queries that grows with their position: ``1 + beta * log(1 + floor(position / length))``.

    Attributes:
        beta: As in the formula.
        length: As in the formula.
    """

    beta: float
    length: int

    @classmethod
    def of(cls, module: Any) -> QueryScale | None:
        """What a module's configuration says, as Llama 4's and Ministral 3's do."""
        parameters = getattr(module.config, "rope_parameters", None)
        if not isinstance(parameters, dict):
            return None
        beta, length = parameters.get("llama_4_scaling_beta"), parameters.get("original_max_position_embeddings")
        return None if beta is None or not length else cls(float(beta), int(length))

    def factor(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[B or 1, 1, T, 1] for position ids [B or 1, T]."""
        factor = 1 + self.beta * torch.log(1 + torch.floor(position_ids / self.length))
        return factor[:, None, :, None].to(dtype)


@dataclass(frozen=True)
class AttentionPlan:
    """How a module prepares queries and keys, and what it tells the attention function.

    Attributes:
        head_dim: Size of a head.
        inputs: Names of the children that make queries, keys and values, or of the one that makes all three.
        widths: Columns of queries, keys and values of the one; None of three.
        output: Name of the child that projects back.
        norms: Names of the children that norm queries and keys, or None.
        norm_heads: Whether each head is normed alone (otherwise all heads together).
        rotation: How the angles arrive and which elements of a head are rotated together.
        training: Keyword arguments of the attention function in training; values by name of an attribute are resolved
            at each call.
        evaluation: The same in evaluation.
        forwards_keywords: Whether keyword arguments of the module reach the attention function.
        query_scale: What turned queries are multiplied by, or None.
    """

    head_dim: int
    inputs: tuple[str, ...]
    widths: tuple[int, int, int] | None
    output: str
    norms: tuple[str, str] | None
    norm_heads: bool
    rotation: Rotation
    training: tuple[tuple[str, Any], ...] = ()
    evaluation: tuple[tuple[str, Any], ...] = ()
    forwards_keywords: bool = True
    query_scale: QueryScale | None = None

    def queries_keys_values(
        self,
        module: nn.Module,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project ``x`` [B, T, H] and rotate; each result is [B, heads, T, head_dim]."""
        q, k, v = self._turned(module, x, cos, sin)
        if self.query_scale is not None and position_ids is not None:
            q = q * self.query_scale.factor(position_ids, q.dtype)
        return q, k, v

    def _turned(
        self, module: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        children = module._modules
        heads = (*x.shape[:-1], -1, self.head_dim)
        if self.widths is None:
            q, k, v = _project(children, x)
        else:
            q, k, v = children[self.inputs[0]](x).split(self.widths, -1)  # type: ignore[misc]
        if self.norms is not None and not self.norm_heads:
            q, k = children[self.norms[0]](q), children[self.norms[1]](k)  # type: ignore[misc]
        q, k, v = q.view(heads), k.view(heads), v.view(heads)
        arrange = self.rotation.arrange
        joint = self._joint_norms(children, q)
        if joint is not None:
            turned = {"layout": self.rotation.layout, "head_axis": 2, "eps": joint.eps, "offset": joint.offset}
            weights = [children[name]._parameters["weight"] for name in self.norms or ()]  # type: ignore[union-attr]
            q, k = kernels.qk_norm_rotary(q, k, *weights, arrange(cos), arrange(sin), **turned)  # type: ignore[arg-type]
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.norms is not None and self.norm_heads:
            q, k = children[self.norms[0]](q), children[self.norms[1]](k)  # type: ignore[misc]
        q, k = kernels.rotary(q, k, arrange(cos), arrange(sin), layout=self.rotation.layout, head_axis=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _joint_norms(self, children: Any, q: torch.Tensor) -> NormPlan | None:
        """What the norms of single heads compute, where one kernel makes both and the rotation after them."""
        if self.norms is None or not self.norm_heads or kernels.resolve("qk_norm_rotary", q) != "triton":
            return None
        found = [children[name] for name in self.norms]
        first, second = (plan_of(norm) if is_installed(norm) and unhooked(norm) else None for norm in found)
        if not (isinstance(first, NormPlan) and isinstance(second, NormPlan)) or first.op != "rms_norm":
            return None
        weights = [norm._parameters.get("weight") for norm in found]
        if (first.op, first.eps, first.offset) != (second.op, second.eps, second.offset):
            return None
        known = all(w is not None and plain_tensor(w) and regime_of(q, w) in first.regimes for w in weights)
        return first if known and all(w.dtype == q.dtype for w in weights if w is not None) else None

    def keywords(self, module: nn.Module) -> dict[str, Any]:
        """Keyword arguments that the module itself gives to the attention function."""
        return {
            name: getattr(module, value.name) if isinstance(value, _Attribute) else value
            for name, value in (self.training if module.training else self.evaluation)
        }


@dataclass(frozen=True)
class _Attribute:
    """A value that lies in the module, such as gpt-oss's sinks."""

    name: str


def _project(children: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values: together where all three are LoRA layers or frozen, else each by its own forward."""
    if is_step(x):
        return tuple(children[name](x) for name in QKV)
    q, k, v = (projection_of(children[name], x) for name in QKV)
    if q and k and v and (q.adapters or k.adapters or v.adapters):
        return kernels.lora_qkv(x.to(compute_dtype(x)), q, k, v)
    return tuple(children[name](x) for name in QKV)


def _finish(plan: AttentionPlan, module: nn.Module, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    return module._modules[plan.output](attended.reshape(*x.shape[:-1], -1).contiguous())  # type: ignore[misc]


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of a swapped attention; a call that the plan does not cover goes to the stock forward."""
    plan: AttentionPlan = plan_of(self)
    if torch.is_tensor(x := args[0] if args else kwargs.get("hidden_states")) and is_bound_by_host(x):
        return stock_forward(self, *args, **kwargs)
    call = {**dict(zip(_NAMED, args)), **kwargs}
    x, positions = call.get("hidden_states"), call.get("position_embeddings")
    attend = attention_function(self)
    if (
        len(args) > len(_NAMED)
        or not isinstance(x, torch.Tensor)
        or not isinstance(positions, tuple)
        or attend is None
        or (plan.query_scale is not None and not isinstance(call.get(POSITION_IDS), torch.Tensor))
        # Autocast changes nothing but the projections, unless it leaves them in another dtype than the angles.
        or not compute_dtype(x) == x.dtype == positions[0].dtype
    ):
        return stock_forward(self, *args, **kwargs)
    cos, sin = positions
    q, k, v = plan.queries_keys_values(self, x, cos, sin, call.get(POSITION_IDS))
    cache = call.get("past_key_values")
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    passed = {name: value for name, value in call.items() if name not in _NAMED} if plan.forwards_keywords else {}
    attended, weights = attend(self, q, k, v, call.get("attention_mask"), **{**plan.keywords(self), **passed})
    return _finish(plan, self, x, attended), weights


def attention_function(module: Any) -> Callable[..., Any] | None:
    """The function the model's configuration names; eager attention is each modelling file's own."""
    name = module.config._attn_implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    module_globals = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    return module_globals.get("eager_attention_forward") if name == "eager" else None


def _note(calls: list[dict[str, Any]]) -> Callable[..., tuple[torch.Tensor, None]]:
    def attend(
        module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        calls.append({"q": q, "k": k, "v": v, "mask": mask, "keywords": kwargs})
        # Anything that depends on all three and has the right shape.
        summary = (k.mean(1, keepdim=True) + v.mean(1, keepdim=True)).to(q.dtype)
        return (q + summary).transpose(1, 2), None

    return attend


@contextmanager
def _probing(calls: list[dict[str, Any]]) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS[_PROBE] = _note(calls)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_PROBE]


class _Harness(nn.Module):
    """Calls an attention module on hidden states alone and returns all that it computes, last dimension joined."""

    def __init__(self, module: nn.Module, rotary_dim: int, rotation: Rotation) -> None:
        super().__init__()
        self.module = module
        self.rotary_dim = rotary_dim
        self.rotation = rotation

    def positions(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device="cpu").manual_seed(5)
        angles = torch.randn(1, x.shape[1], self.rotary_dim // 2, generator=generator, device="cpu")
        if self.rotation.angles == "halves":
            angles = torch.cat([angles, angles], -1)
        elif self.rotation.angles == "pairs":
            angles = angles.repeat_interleave(2, -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def position_ids(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Far from one another, for a module that has to be given them."""
        taken = inspect.signature(type(self.module).forward).parameters.get(POSITION_IDS)
        if taken is None or taken.default is not taken.empty:
            return {}
        scale = QueryScale.of(self.module)
        return {POSITION_IDS: torch.arange(x.shape[1], device="cpu")[None] * (1 if scale is None else scale.length)}

    def join(self, call: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        return torch.cat([*(call[name].transpose(1, 2).flatten(2) for name in "qkv"), output], dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        calls: list[dict[str, Any]] = []
        with _probing(calls):
            output, _ = type(self.module).forward(
                self.module,
                hidden_states=x,
                position_embeddings=self.positions(x),
                attention_mask=None,
                **self.position_ids(x),
            )
        return self.join(calls[-1], output)


def _compute(plan: AttentionPlan) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    def compute(harness: Any, x: torch.Tensor) -> torch.Tensor:
        calls: list[dict[str, Any]] = []
        position_ids = harness.position_ids(x).get(POSITION_IDS)
        cos, sin = harness.positions(x)
        q, k, v = plan.queries_keys_values(harness.module, x, cos, sin, position_ids)
        attended, _ = _note(calls)(harness.module, q, k, v, None)
        return harness.join(calls[-1], _finish(plan, harness.module, x, attended))

    return compute


def _build(module: Any, rotary_dim: int, rotation: Rotation, dtype: torch.dtype) -> _Harness:
    generator = torch.Generator(device="cpu").manual_seed(3)
    children: dict[str, Any] = {}
    inputs = qkv_children(module) or ()
    for name, child in module._modules.items():
        if not is_linear(child):
            children[name] = child if child is None else copy_child(child).to(dtype)
            continue
        bias = getattr(base_layer(child), "bias", None) is not None
        columns, rows = (HIDDEN, child.out_features) if name in inputs else (child.in_features, HIDDEN)
        small = nn.utils.skip_init(nn.Linear, columns, rows, bias=bias, device="cpu", dtype=torch.float32)
        for parameter in small.parameters():
            parameter.data.normal_(0.0, 0.3, generator=generator)
        children[name] = small.to(dtype)
    own = {n: None if p is None else torch.zeros_like(p, device="cpu") for n, p in module._parameters.items()}
    clone: Any = stand_in(module, own, children)
    clone.config = copy.copy(module.config)
    clone.config._attn_implementation_internal = _PROBE
    return _Harness(clone, rotary_dim, rotation)


def _rotary_dims(module: Any) -> list[int]:
    """Sizes that the rotated part of a head may have, the likeliest first."""
    parameters = getattr(module.config, "rope_parameters", None) or {}
    factor = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    factor = factor or getattr(module.config, "partial_rotary_factor", None) or 1.0
    return list(dict.fromkeys((int(module.head_dim * factor), module.head_dim)))


def _learn_keywords(harness: Any, *, training: bool) -> tuple[tuple[tuple[str, Any], ...], bool] | str:
    """What the stock forward tells the attention function, and whether it passes its own keyword arguments on."""
    calls: list[dict[str, Any]] = []
    sentinel = object()
    harness.module.train(training)
    x = torch.randn(1, TOKENS, HIDDEN, device="cpu", generator=torch.Generator(device="cpu").manual_seed(6))
    with _probing(calls), torch.no_grad():
        type(harness.module).forward(
            harness.module,
            hidden_states=x,
            position_embeddings=harness.positions(x),
            attention_mask=None,
            _pantheraml_keyword=sentinel,
            **(given := harness.position_ids(x)),
        )
    keywords = dict(calls[-1]["keywords"])
    if any(keywords.pop(name, None) is not value for name, value in given.items()):
        # The swapped forward hands on what it is given.
        return "it keeps its position ids to itself"
    passes = keywords.pop("_pantheraml_keyword", None) is sentinel
    learnt: list[tuple[str, Any]] = []
    for name, value in keywords.items():
        if value is None or isinstance(value, bool | int | float | str):
            learnt.append((name, value))
            continue
        owner = next((n for n, p in harness.module._parameters.items() if p is value), None)
        if owner is None:
            return f"it gives its attention function a {type(value).__name__} as {name!r}"
        learnt.append((name, _Attribute(owner)))
    return tuple(learnt), passes


def plan(module: Any) -> Swap | str:
    """Find out how a module prepares its queries and keys.

    Args:
        module: A candidate for the attention role.

    Returns:
        What to install, or why the module keeps its forward.
    """
    parameters = inspect.signature(type(module).forward).parameters
    if any(name not in parameters for name in _NAMED):
        return "its forward takes other arguments"
    norms = next((pair for pair in NORMS if all(name in module._modules for name in pair)), None)
    linears, inputs = linear_children(module), qkv_children(module)
    if inputs is None:
        return "its projections have other names"
    output = next(name for name in linears if name not in inputs)
    widths = None
    if len(inputs) == 1:
        queries = linears[output].in_features
        keys, odd = divmod(linears[inputs[0]].out_features - queries, 2)
        if odd or keys <= 0:
            return "its joint projection has other parts than queries, keys and values"
        widths = queries, keys, keys
    reason = "its forward computes something else"
    for rotation, rotary_dim in itertools.product(ROTATIONS, _rotary_dims(module)):

        def build(dtype: torch.dtype, rotary_dim: int = rotary_dim, rotation: Rotation = rotation) -> nn.Module:
            return _build(module, rotary_dim, rotation, dtype)

        plans = [
            AttentionPlan(module.head_dim, inputs, widths, output, norms, heads, rotation, query_scale=scale)
            for heads in ((True, False) if norms else (False,))
            for scale in dict.fromkeys((QueryScale.of(module), None))
        ]
        chosen = choose(build, HIDDEN, [Formula(p, _compute(p)) for p in plans])
        if isinstance(chosen, str):
            reason = chosen
            continue
        formula, _ = chosen
        try:
            learnt = [_learn_keywords(build(torch.float32), training=training) for training in (True, False)]
        except FOREIGN_ERRORS as error:
            return f"its forward cannot be probed ({type(error).__name__}: {error})"
        for result in learnt:
            if isinstance(result, str):
                return result
        (training, passes), (evaluation, _) = learnt  # type: ignore[misc]
        final = replace(formula.plan, training=training, evaluation=evaluation, forwards_keywords=passes)
        return Swap("attention", f"rotary[{rotation.layout}]", final, forward)
    return reason
