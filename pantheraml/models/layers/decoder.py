"""Decoder layers that run as one node of the autograd graph: how they are recognised, and when a call can take it.

What a layer does with its norms, its attention and its MLP is learnt from its own forward: the probe runs it in float64
with simple functions in their places. Everything else about a call (adapters, hooks, caches, dtypes) is looked at each
time, and a call that the node does not cover runs the layer's own forward, with its fused parts.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...kernels.projections import flatten
from ...parallel.context import ContextGroup
from ..attention.documents import PACKING, Divided
from ..probe import FOREIGN_ERRORS, copy_child, regime_of, stand_in
from ..roles import decoder_children, looks_like_experts, plain_tensor
from .attention import POSITION_IDS, AttentionPlan, attention_function
from .block import Spec, decoder_layer
from .levels import Keep, Level
from .lora import compute_dtype, projections_of, untouched
from .mlp import GluPlan
from .pieces import Norm, Turn
from .slots import Swap, is_installed, plan_of, stock_forward, swap_of, unhooked

WIDTH = 6
TOLERANCE = 1e-12
# Names under which layers receive what attention needs; the last is unknown to all of them.
_HIDDEN, _POSITIONS, _MASK, _CACHE = "hidden_states", "position_embeddings", "attention_mask", "past_key_values"
_UNKNOWN = "_pantheraml_keyword"
# Ask for something besides the output.
_MORE_OUTPUT = ("output_attentions", "output_router_logits")


@dataclass(frozen=True)
class DecoderPlan:
    """What a layer does.

    Attributes:
        attention: Name of the child.
        mlp: Name of the child.
        norms: Names of the norms before attention, after it, before the MLP and after it, or None.
        scale: Factor of each branch.
        parallel: Whether the MLP reads the residual that attention reads.
        names: Parameters of the layer's forward after self.
        routes: Keyword of the attention module -> parameter of the layer.
        passes: Whether unknown keywords reach the attention module.
    """

    attention: str
    mlp: str
    norms: tuple[str | None, str | None, str | None, str | None]
    scale: float
    parallel: bool
    names: tuple[str, ...]
    routes: tuple[tuple[str, str], ...] = ()
    passes: bool = True

    def compute(self, h: torch.Tensor, run: Callable[[str], Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
        """Apply the formula; ``run`` gives each child's function."""

        def apply(name: str | None, x: torch.Tensor) -> torch.Tensor:
            return x if name is None else run(name)(x)

        before, after, before_mlp, after_mlp = self.norms
        added = h + self.scale * apply(after, run(self.attention)(apply(before, h)))
        read = h if self.parallel else added
        return added + self.scale * apply(after_mlp, run(self.mlp)(apply(before_mlp, read)))


# ---------------------------------------------------------------- probing


class _Stub(nn.Module):
    """Stands for a child: an odd function of its own, and a note of how it was called."""

    def __init__(self, index: int, pair: bool) -> None:
        super().__init__()
        self.index, self.pair = index, pair
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def function(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * (0.7 + 0.13 * self.index) + 0.1 * (self.index + 1)) + 0.3 * x

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        x = args[0] if args else kwargs[_HIDDEN]
        return (self.function(x), None) if self.pair else self.function(x)


def _arrangements(norms: list[str]) -> Iterator[tuple[tuple[str | None, ...], bool]]:
    """Places of the norms, every norm somewhere; at last one norm before both branches of a parallel layer."""
    for places in itertools.permutations((*norms, *(None,) * (4 - len(norms)))):
        yield places, False
        yield places, True
    if len(norms) == 1:
        yield (norms[0], None, norms[0], None), True


def plan(module: Any) -> Swap | str:
    """Find out how a layer joins its attention, its MLP and its norms.

    Args:
        module: A candidate for the decoder layer role.

    Returns:
        What to install, or why the module keeps its forward.
    """
    found = decoder_children(module)
    if found is None and any(looks_like_experts(child) for child in module.modules()):
        return "its MLP is a mixture of experts: its parts are served one by one"
    if found is None:
        return "it holds something besides attention, a gated MLP and norms"
    attention, mlp, norms = found
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if not names or names[0] != _HIDDEN:
        return "its forward takes other arguments"
    stubs: dict[str, Any] = {name: _Stub(i, name == attention) for i, name in enumerate((attention, mlp, *norms))}
    others = {name: copy_child(child) for name, child in module.named_children() if name not in stubs}
    clone: Any = stand_in(module, {}, {**others, **stubs})
    clone.gradient_checkpointing = False
    # In training, so that what drops something shows.
    clone.train()
    h = torch.randn(1, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    given: dict[str, Any] = {name: object() for name in (*names[1:], _UNKNOWN)}
    # What layers look into.
    plain = {name: None for name in given if name in (_MASK, _CACHE)} | {n: False for n in given if n in _MORE_OUTPUT}
    given |= plain
    kinds = inspect.signature(type(module).forward).parameters
    variadic = [name for name, p in kinds.items() if p.kind is p.VAR_KEYWORD]
    call = {name: value for name, value in given.items() if name not in variadic and (name != _UNKNOWN or variadic)}
    try:
        with torch.no_grad():
            output = type(module).forward(clone, h, **call)
    except FOREIGN_ERRORS as error:
        return f"its forward cannot be probed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if not isinstance(output, torch.Tensor):
        return "its forward returns more than the hidden states"
    scales = [1.0, *(v for v in vars(module).values() if isinstance(v, float))]
    for scale, (places, parallel) in itertools.product(dict.fromkeys(scales), _arrangements(norms)):
        candidate = DecoderPlan(attention, mlp, places, scale, parallel, names)  # type: ignore[arg-type]
        expected = candidate.compute(h, lambda name: stubs[name].function)
        if bool(((output - expected).abs() <= TOLERANCE * expected.abs()).all()):
            break
    else:
        return "its forward computes something else"
    ((_, keywords),) = stubs[attention].calls
    routes = []
    for name, value in keywords.items():
        source = next((n for n, v in call.items() if v is value and n not in plain), None)
        if name in (_HIDDEN, _UNKNOWN) or (value is None and name in (_MASK, _CACHE)):
            continue
        if source is None and name not in plain:
            return f"it gives its attention {name!r}, which is none of its own arguments"
        if source is not None:
            routes.append((name, source))
    if (_POSITIONS, _POSITIONS) not in routes:
        return "it does not hand its position embeddings on"
    routes += [(name, name) for name in (_MASK, _CACHE) if name in keywords and name in names]
    final = DecoderPlan(
        attention,
        mlp,
        places,  # type: ignore[arg-type]
        scale,
        parallel,
        tuple(n for n in names if n not in variadic),
        tuple(routes),
        _UNKNOWN in keywords,
    )
    return Swap("layer", "decoder_layer", final, forward)


# ---------------------------------------------------------------- calling


@dataclass(slots=True)
class _Parts:
    """The modules of a layer that a call has to look at, found once.

    Attributes:
        attention: The attention module.
        mlp: The MLP.
        norms: As in ``Spec``.
        head_norms: As in ``Spec``.
        every: All norms, each once.
        linears: Children that project, in the order of ``decoder_layer``.
        places: Of each of these modules its parent's, its name there, and itself, to notice that it was replaced.
        quiet: Modules whose own forward is passed over, so that no hook of theirs may be.
        dropouts: Modules that the node leaves out, because they drop nothing.
    """

    attention: Any
    mlp: Any
    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]
    head_norms: tuple[Norm, Norm] | None
    every: tuple[Norm, ...]
    linears: list[Any]
    places: list[tuple[Any, str, Any]]
    quiet: list[Any] = field(default_factory=list)
    dropouts: list[Any] = field(default_factory=list)

    def current(self) -> bool:
        """Whether the layer still holds these modules, with what ``adapt`` put into them and no hooks of others."""
        return (
            all(modules[name] is module for modules, name, module in self.places)
            and all(_quiet(module) for module in self.quiet)
            and all(not dropout.p for dropout in self.dropouts)
        )


def _quiet(module: Any) -> bool:
    return unhooked(module) and (is_installed(module) if swap_of(module) is not None else untouched(module))


_PARTS = "_pantheraml_parts"


def parts_of(layer: Any) -> _Parts | None:
    """The layer's parts; None when one of them is not served by a plan that the node knows."""
    parts = layer.__dict__.get(_PARTS)
    if parts is not None and parts.current():
        return parts
    plan: DecoderPlan = plan_of(layer)
    attention, mlp = layer._modules[plan.attention], layer._modules[plan.mlp]
    attention_swap, mlp_swap = swap_of(attention), swap_of(mlp)
    if attention_swap is None or mlp_swap is None:
        return None
    heads: AttentionPlan = attention_swap.plan
    glu: GluPlan = mlp_swap.plan
    if not isinstance(heads, AttentionPlan) or not isinstance(glu, GluPlan):
        return None
    if glu.up is None and glu.layout == "interleaved":
        return None
    known: dict[str, Norm] = {}
    norms = tuple(
        None if name is None else known.setdefault(name, Norm.of(layer._modules[name])) for name in plan.norms
    )
    head_norms = None
    if heads.norms is not None:
        head_norms = tuple(Norm.of(attention._modules[name]) for name in heads.norms)
    every = tuple({id(norm): norm for norm in (*norms, *(head_norms or ())) if norm is not None}.values())
    if any(norm.module._modules for norm in every):
        # What PEFT has wrapped since: the wrapper's parameters are those of its children.
        return None
    linears = [(attention._modules, name) for name in (*heads.inputs, heads.output)]
    linears += [(mlp._modules, name) for name in (glu.gate, glu.up, glu.down) if name is not None]
    others = [(layer._modules, name) for name in (plan.attention, plan.mlp, *plan.norms) if name is not None]
    others += [(attention._modules, name) for name in heads.norms or ()]
    parts = _Parts(
        attention,
        mlp,
        norms,  # type: ignore[arg-type]
        head_norms,  # type: ignore[arg-type]
        every,
        [modules[name] for modules, name in linears],
        [(modules, name, modules[name]) for modules, name in (*linears, *others)],
        [attention, mlp, *(norm.module for norm in every)],
        [module for module in layer._modules.values() if isinstance(module, nn.Dropout)],
    )
    if not parts.current():
        return None
    layer.__dict__[_PARTS] = parts
    return parts


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of a swapped decoder layer; a call that the node does not cover goes to the layer's own forward."""
    plan: DecoderPlan = plan_of(self)
    call = {**dict(zip(plan.names, args)), **kwargs}
    prepared = _prepare(self, plan, call) if torch.is_grad_enabled() and len(args) <= len(plan.names) else None
    if prepared is None:
        return _itself(self, args, kwargs)
    h, spec, tensors = prepared
    try:
        return decoder_layer(h, spec, tensors)
    except torch.OutOfMemoryError:
        planner = _planner(self)
        # The ranks that share a sequence have to exchange the same: one alone may not begin again.
        if planner is None or spec.level.keep == Keep.INPUT or spec.over is not None:
            raise
        planner.shrink()
        level, offload = planner.keep(self, h)
        return decoder_layer(h, replace(spec, level=level, offload=offload), tensors)


def _itself(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's own forward, under the activation plan that it would have without the node."""
    planner = _planner(layer) if torch.is_grad_enabled() else None
    if planner is None or checkpoints_itself(type(layer)):
        return stock_forward(layer, *args, **kwargs)
    call = {**dict(zip(plan_of(layer).names, args)), **kwargs}
    return planner.run(
        functools.partial(stock_forward, layer, **{n: v for n, v in call.items() if n != _HIDDEN}), call[_HIDDEN]
    )


def _prepare(
    layer: Any, plan: DecoderPlan, call: dict[str, Any]
) -> tuple[torch.Tensor, Spec, list[torch.Tensor | None]] | None:
    """The residual, the layer's description and the node's other tensors; None for a call that is not for the node."""
    h, positions = call.get(_HIDDEN), call.get(_POSITIONS)
    if (
        not isinstance(h, torch.Tensor)
        or h.dim() != 3
        or not plain_tensor(h)
        or not isinstance(positions, tuple)
        or call.get(_CACHE) is not None
        or any(call.get(name) for name in _MORE_OUTPUT)
        or compute_dtype(h) != h.dtype
        or positions[0].dtype not in (h.dtype, torch.float32)
        or torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(h)
    ):
        return None
    parts = parts_of(layer)
    if parts is None:
        return None
    level, offload = _keep(layer, h)
    if level is None:
        return None
    heads: AttentionPlan = plan_of(parts.attention)
    glu: GluPlan = plan_of(parts.mlp)
    if regime_of(h, None) not in glu.regimes:
        return None
    projections = [p for p in projections_of(parts.linears, h, trained=True) if p is not None]
    if len(projections) < len(parts.linears):
        return None
    parameters = [p for norm in parts.every for p in norm.parameters()]
    for norm in parts.every:
        weight = norm.module._parameters.get("weight")
        if norm.plan is not None and regime_of(h, weight) not in norm.plan.regimes:
            return None
    if any(p.dtype != h.dtype for p in parameters):
        return None
    attend, over = _attend(parts.attention, plan, heads, call)
    if attend is None:
        return None
    statics, tensors = flatten(projections, "auto")
    if not h.requires_grad and not any(x is not None and x.requires_grad for x in (*parameters, *tensors)):
        return None
    arrange = heads.rotation.arrange
    spec = Spec(
        norms=parts.norms,
        head_norms=parts.head_norms,
        norm_heads=heads.norm_heads,
        every=parts.every,
        statics=statics,
        turn=Turn(arrange(positions[0]), arrange(positions[1]), heads.rotation.layout),
        head_dim=heads.head_dim,
        widths=heads.widths,
        attend=attend,
        over=over,
        activation=glu.activation,
        packed=glu.layout if glu.up is None else None,
        scale=plan.scale,
        parallel=plan.parallel,
        level=level,
        offload=offload,
    )
    return h, spec, [*parameters, *tensors]


def _attend(
    attention: Any, plan: DecoderPlan, heads: AttentionPlan, call: dict[str, Any]
) -> tuple[Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None, ContextGroup | None]:
    """Attention as the layer's own forward would call it, None where the node cannot; and who shares the sequences."""
    function = attention_function(attention)
    if function is None:
        return None, None
    routed = {name: call[source] for name, source in plan.routes if source in call}
    mask = routed.pop(_MASK, None)
    passed = {n: v for n, v in routed.items() if n not in (_POSITIONS, _CACHE)} if heads.forwards_keywords else {}
    if plan.passes and heads.forwards_keywords:
        passed |= {name: value for name, value in call.items() if name not in plan.names}
    keywords = {**heads.keywords(attention), **passed}
    # Its randomness could not be repeated, and gradients of tensors among the keywords would be lost.
    if keywords.get("dropout") or any(isinstance(v, torch.Tensor) and v.requires_grad for v in keywords.values()):
        return None, None
    scale = None
    if heads.query_scale is not None:
        position_ids = routed.get(POSITION_IDS)
        if not isinstance(position_ids, torch.Tensor) or isinstance(mask, Divided):
            return None, None
        scale = heads.query_scale.factor(position_ids, call[_HIDDEN].dtype)
    over = None
    if isinstance(mask, Divided):
        # The node exchanges by itself, so that it can keep and recompute what comes of it.
        mask, over = mask.documents, mask.group
        keywords = {name: value for name, value in keywords.items() if name not in PACKING}
        if any(isinstance(value, torch.Tensor) for value in keywords.values()):
            return None, None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = q if scale is None else q * scale
        return function(attention, q, k, v, mask, **keywords)[0]

    return attend, over


def checkpoints_itself(cls: type) -> bool:
    """Whether the class's forward calls the checkpointing function; before transformers 5.20 its ``__call__`` does."""
    return hasattr(cls.forward, "__wrapped__")


def is_node(layer: nn.Module) -> bool:
    """Whether ``adapt`` put the forward of this file into a layer."""
    swap = swap_of(layer)
    return swap is not None and isinstance(swap.plan, DecoderPlan) and is_installed(layer)


def _planner(layer: Any) -> Any:
    """The activation plan that runs the layer, or None."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return None
    owner = getattr(layer._gradient_checkpointing_func, "__self__", None)
    return owner if hasattr(owner, "keep") else None


def _keep(layer: Any, h: torch.Tensor) -> tuple[Level | None, Any]:
    """What to keep of the layer; None where another library's checkpointing function asks to run the layer itself."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return Level(Keep.ALL), None
    planner = _planner(layer)
    return (None, None) if planner is None else planner.keep(layer, h)
