"""A whole decoder layer as one node of the autograd graph, with a hand-written backward.

For each layer, with ``n`` its norms (any of which may be missing) and ``s`` its residual scale::

    h1  = h + s * n(attention(n(h)))
    out = h1 + s * n(mlp(n(h1)))                        or, in parallel, h + s * (n(attention(n(h))) + n(mlp(n(h))))

What the backward needs of the outputs of norms and activations is computed again, which costs a pass over memory; of
the rest, ``Keep`` says what is kept and what is multiplied out again. Attention runs under autograd, in a small graph
of its own between queries, keys, values and its result, so that every attention function works here as it is; where
queries, keys and values are not kept, that graph holds places for them, filled again before its backward. Long batches
go through the MLP in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels._once import once_differentiable
from ...kernels.glu import GluSpec
from ...kernels.lora_mlp import Joint
from ...kernels.projections import (
    Group,
    Needs,
    Static,
    Term,
    TermGradients,
    by_kernels,
    joined_A,
    needs_of,
    project,
    project_backward,
    terms_of,
    thin_product,
)
from ...parallel.context import ContextGroup
from .attended import Attended, Lying, Memories, attend, lying
from .levels import Host, Keep, Level, Offload
from .pieces import Fused, Norm, NormedTurn, Turn, activate, activate_backward

# Rows of one pass through an MLP: 2 x 14,336 columns of gate and up are 0.5 GB of them in bfloat16. With twice as many
# products are not faster on an H100, and the allocator loses more between the pieces and what is smaller.
MLP_ROWS = 8192


@dataclass(slots=True)
class Spec:
    """One call of a layer, besides its tensors that need gradients.

    Attributes:
        norms: Before attention, after it, before the MLP, after it; None where there is none.
        head_norms: Of queries and keys, or None.
        norm_heads: Whether these take each head alone.
        every: All of the norms, each once, in the order of their parameters among the tensors.
        statics: Of q, k, v (or, packed, qkv), o, then gate, up, down (or, packed, gate_up, down).
        turn: Rotation of queries and keys.
        head_dim: Size of a head D.
        widths: Columns of q, k and v where one projection makes all three, else None.
        attend: Maps q, k, v [B, heads, T, D] to [B, T, heads, D].
        activation: Of the MLP.
        packed: ``"gate_first"`` or ``"up_first"`` where one projection makes both gate and up.
        scale: Residual scale s.
        parallel: Whether MLP and attention read the same residual.
        level: What stays in memory, and where.
        offload: Moves to the host what shall wait there; None where nothing shall.
        over: The ranks that share the sequences, or None. Around ``attend`` they exchange: it gets all tokens, and this
            rank's heads; everything else has all heads, and this rank's tokens.
    """

    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]
    head_norms: tuple[Norm, Norm] | None
    norm_heads: bool
    every: tuple[Norm, ...]
    statics: tuple[Static, ...]
    turn: Turn
    head_dim: int
    widths: tuple[int, int, int] | None
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    activation: str
    packed: str | None
    scale: float
    parallel: bool
    level: Level
    offload: Offload | None = None
    over: ContextGroup | None = None


@dataclass(slots=True)
class _State:
    """What one run of a layer has at hand. What is None was not kept and is computed again."""

    x: torch.Tensor | None = None
    rstd: torch.Tensor | None = None
    skinny: torch.Tensor | None = None
    unnormed: tuple[torch.Tensor, ...] = ()
    head_rstd: tuple[torch.Tensor | None, ...] = (None, None)
    attended: Attended | None = None
    of_tokens: torch.Tensor | None = None
    skinny_o: torch.Tensor | None = None
    branch: torch.Tensor | None = None
    middle: torch.Tensor | None = None
    mlp: list[_MLPState] | None = None
    moved: tuple[Lying | None, Lying | None, tuple[Lying, ...]] | None = None

    def give_up(self, memories: Memories, h: torch.Tensor) -> None:
        """Add to ``memories`` what stays around attention, but for the residual ``h`` itself, and forget it here."""
        middle = None if self.middle is None or self.middle is h else memories.add(self.middle)
        branch = None if self.branch is None else memories.add(self.branch)
        self.moved = middle, branch, tuple(memories.add(x) for x in self.unnormed)
        self.middle, self.branch, self.unnormed = None, None, ()

    def take_back(self, memories: Sequence[torch.Tensor], h: torch.Tensor) -> None:
        """Undo both kinds of ``give_up``."""
        if self.attended is not None and self.attended.moved is not None:
            self.attended.take_back(memories)
        if self.moved is None:
            return
        middle, branch, unnormed = self.moved
        self.middle = h if middle is None else lying(middle, memories)
        self.branch = None if branch is None else lying(branch, memories)
        self.unnormed = tuple(lying(x, memories) for x in unnormed)


@dataclass(slots=True)
class _MLPState:
    """Of the MLP, for some rows."""

    x: torch.Tensor | None = None
    rstd: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    up: torch.Tensor | None = None
    joint: torch.Tensor | None = None
    skinny: torch.Tensor | None = None
    skinny_down: torch.Tensor | None = None
    branch: torch.Tensor | None = None


def _working(
    groups: Sequence[Sequence[Term]], dtype: torch.dtype
) -> tuple[list[list[Term]], list[torch.Tensor | None]]:
    """The terms with adapters in the compute dtype, and for each group all its A below one another.

    All copies are made by one call into one buffer: on a small model the launches of separate casts take longer than
    the layer's products.
    """
    sources = [p for group in groups for p in (*(t.A for t in group), *(t.B for t in group)) if p is not None]
    if not sources:
        return [list(group) for group in groups], [None for _ in groups]
    buffer = torch.empty(sum(p.numel() for p in sources), dtype=dtype, device=sources[0].device)
    views = [part.view(p.shape) for part, p in zip(buffer.split([p.numel() for p in sources]), sources)]
    torch._foreach_copy_(views, [p.detach() for p in sources])
    remaining = iter(views)
    working, joined = [], []
    for group in groups:
        As = [None if term.A is None else next(remaining) for term in group]
        Bs = [None if term.B is None else next(remaining) for term in group]
        working.append(
            [
                term if A is None else term._replace(A=A, B=B, grad_dtype=term.A.dtype)  # type: ignore[union-attr]
                for term, A, B in zip(group, As, Bs)
            ]
        )
        present = [A for A in As if A is not None]
        if present:
            rows = sum(A.shape[0] for A in present)
            joined.append(present[0].as_strided((rows, present[0].shape[1]), (present[0].shape[1], 1)))
        else:
            joined.append(None)
    return working, joined


class _Layer:
    """The arithmetic of one layer; all tensors are matrices [rows, features] unless said."""

    def __init__(self, spec: Spec, h: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> None:
        self.spec = spec
        self.batch, self.length = h.shape[:2]
        self.norm_parameters: dict[int, Sequence[Any]] = {}
        start = 0
        for norm in spec.every:
            count = len(norm.parameters())
            self.norm_parameters[id(norm)] = tensors[start : start + count]
            start += count
        terms = terms_of(spec.statics, tensors[start:])
        # How many projections make queries, keys and values; the next projects back.
        self.inputs = n = 3 if spec.widths is None else 1
        groups = terms[:n], terms[n : n + 1], terms[n + 1 : -1], terms[-1:]
        self.fused = Fused.of(h)
        flat = h.reshape(-1, h.shape[-1])
        kernels = by_kernels(flat, groups)
        if all(served or not any(term.rank for term in group) for served, group in zip(kernels, groups)):
            # The kernels round the adapters as they read them.
            joined = [joined_A(group) for group in groups]
        else:
            groups, joined = _working(groups, h.dtype)
        self.qkv, self.o, self.lift, self.down = (
            Group(group, A, kernels=served) for group, A, served in zip(groups, joined, kernels)
        )
        joins = self.fused.glu
        self.joined = Joint.of(self.lift, self.down, GluSpec(spec.activation), flat, spec.packed) if joins else None
        self.normed_turn = NormedTurn.of(spec.head_norms if spec.norm_heads else None, spec.turn, h)

    # ------------------------------------------------------------ forward

    def _norm(self, which: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        norm = self.spec.norms[which]
        return (x, None) if norm is None else norm.forward(x, self.norm_parameters[id(norm)], self.fused)

    def _head_parameters(self) -> list[Sequence[torch.Tensor]]:
        assert self.spec.head_norms is not None
        return [self.norm_parameters[id(norm)] for norm in self.spec.head_norms]

    def queries(self, state: _State, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v [B, heads, T, D] of the residual h, as ``attend`` takes them."""
        spec = self.spec
        state.x, state.rstd = self._norm(0, h)
        outputs, state.skinny = project(state.x, state.x, self.qkv)
        q, k, v = outputs if spec.widths is None else outputs[0].split(spec.widths, -1)
        heads = (self.batch, self.length, -1, spec.head_dim)
        if self.normed_turn is not None:
            state.unnormed = q.view(heads), k.view(heads)
            q, k = self.normed_turn(*state.unnormed, self._head_parameters())
        elif spec.head_norms is not None:
            shape = heads if spec.norm_heads else (self.batch, self.length, -1)
            state.unnormed = q.view(shape), k.view(shape)
            (q, first), (k, second) = (
                norm.forward(x, self.norm_parameters[id(norm)], self.fused)
                for norm, x in zip(spec.head_norms, state.unnormed)
            )
            state.head_rstd = first, second
        if self.normed_turn is None:
            q, k = spec.turn(q.view(heads), k.view(heads), self.fused, inplace=True)
        q, k, v = (x.view(heads).transpose(1, 2) for x in (q, k, v))
        self.kv_heads = k.shape[1]
        return (q, k, v) if spec.over is None else spec.over.to_heads(q, k, v)

    def _of_tokens(self, attended: torch.Tensor) -> torch.Tensor:
        """The result of attention with all heads of this rank's tokens."""
        return attended if self.spec.over is None else self.spec.over.to_tokens(attended)

    def add_attention(self, state: _State, h: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """``h + s * n(o(attended))``, for ``attended`` with all heads of this rank's tokens."""
        flat = attended.reshape(h.shape[0], -1)
        y, state.skinny_o, state.branch = self._add(1, h, flat, self.o)
        return y

    def _add(
        self,
        which: int,
        h: torch.Tensor,
        x: torch.Tensor,
        group: Group,
        out: torch.Tensor | None = None,
        parts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The residual plus a branch, the thin product and, where a norm follows, the bare projection."""
        if self.spec.norms[which] is None and self.spec.scale == 1.0:
            (y,), skinny = project(x, x, group, residual=h, out=out, parts=parts)
            return y, skinny, None
        (branch,), skinny = project(x, x, group, parts=parts)
        normed, _ = self._norm(which, branch)
        y = torch.add(h, normed, alpha=self.spec.scale, out=out)
        return y, skinny, branch if self.spec.norms[which] is not None else None

    def mlp(self, middle: torch.Tensor, base: torch.Tensor, state: _MLPState, out: torch.Tensor | None) -> torch.Tensor:
        """``base + s * n(mlp(n(middle)))`` for some rows."""
        self._lift(middle, state)
        product, parts = self._activate(state)
        y, state.skinny_down, state.branch = self._add(3, base, product, self.down, out, parts)
        return y

    def _activate(self, state: _MLPState) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The activation and, where a kernel makes it as well, parts of its thin product."""
        assert state.gate is not None
        assert state.up is not None
        if self.joined is not None:
            return self.joined.activate(state.gate, state.up, state.skinny)
        return activate(state.gate, state.up, self.spec.activation, self.fused), None

    def _lift(self, middle: torch.Tensor, state: _MLPState) -> None:
        state.x, state.rstd = self._norm(2, middle)
        joined = self.joined
        outputs, state.skinny = project(state.x, state.x, self.lift) if joined is None else joined.project(state.x)
        if self.spec.packed is None:
            state.gate, state.up = outputs
        else:
            state.joint = outputs[0]
            state.gate, state.up = self._halves(state.joint)

    def _halves(self, joint: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, second = joint.chunk(2, dim=-1)
        return (first, second) if self.spec.packed == "gate_first" else (second, first)

    def _chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, MLP_ROWS):
            yield slice(start, min(start + MLP_ROWS, rows))

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, _State, list[torch.Tensor]]:
        """The layer's output, what is kept of it beside h, and what of that shall wait on the host."""
        level = self.spec.level
        keep, memories = level.keep, Memories()
        state = _State()
        qkv = self.queries(state, h)
        attended = state.attended = attend(self.spec.attend, qkv, level)
        assert attended.result is not None
        added = self.add_attention(state, h, self._of_tokens(attended.result))
        if level.host and keep >= Keep.ATTENTION:
            attended.give_up(memories, qkv, with_qkv=level.host == Host.RESIDUAL)
        del qkv
        # A sequential layer's MLP reads what attention has added to; a parallel one's reads the same residual.
        state.middle = h if self.spec.parallel else added
        out = torch.empty_like(added)
        pieces = []
        for rows in self._chunks(h.shape[0]):
            piece = _MLPState()
            self.mlp(state.middle[rows], added[rows], piece, out[rows])
            if keep == Keep.ALL:
                piece.x = piece.rstd = None
                pieces.append(piece)
        state.mlp = pieces or None
        if keep < Keep.RESIDUAL:
            return out, _State(attended=attended if keep == Keep.ATTENTION else None), memories.all
        # One pass over the residual makes it again.
        state.x = state.rstd = None
        if level.host == Host.RESIDUAL:
            state.give_up(memories, h)
        return out, state, memories.all

    # ------------------------------------------------------------ backward

    def restore(self, state: _State, h: torch.Tensor) -> None:
        """Compute again what was not kept, but gate and up."""
        if state.middle is not None:
            state.x, state.rstd = self._norm(0, h)
            return
        qkv = self.queries(state, h)
        if state.attended is None:
            state.attended = attend(self.spec.attend, qkv, Level(Keep.ALL))
        elif state.attended.places is not None:
            state.attended.places.fill(0, qkv)
        assert state.attended.result is not None
        # It is asked for again soon.
        state.of_tokens = self._of_tokens(state.attended.result)
        added = self.add_attention(state, h, state.of_tokens)
        state.middle = h if self.spec.parallel else added

    def backward(
        self, h: torch.Tensor, state: _State, grad: torch.Tensor, flags: Sequence[bool], need_h: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Gradients of h and of the tensors that ``flags`` names."""
        spec = self.spec
        norms = spec.every
        self.norm_grads: dict[int, list[torch.Tensor | None]] = {}
        self.norm_needs: dict[int, Sequence[bool]] = {}
        start = 0
        for norm in norms:
            count = len(self.norm_parameters[id(norm)])
            self.norm_needs[id(norm)] = flags[start : start + count]
            start += count
        needs = needs_of(flags[start:], len(spec.statics))
        self.restore(state, h)
        d_middle, lifts = self._mlp_backward(state, grad, needs[self.inputs + 1 :])
        if spec.parallel:
            d_added, residual = grad, grad + d_middle
        else:
            d_added = residual = d_middle
        d_h, attention = self._attention_backward(state, h, d_added, needs[: self.inputs + 1], residual, need_h)
        projections = [g for p in (*attention, *lifts) for g in (p.weight, p.bias, p.A, p.B)]
        return d_h, [*(g for norm in norms for g in self.norm_grads[id(norm)]), *projections]

    def _branch_backward(self, which: int, grad: torch.Tensor, branch: torch.Tensor | None) -> torch.Tensor:
        """From the gradient of the residual to that of a branch's projection."""
        scaled = grad if self.spec.scale == 1.0 else grad * self.spec.scale
        norm = self.spec.norms[which]
        if norm is None:
            return scaled
        assert branch is not None
        parameters = self.norm_parameters[id(norm)]
        _, rstd = norm.forward(branch, parameters, self.fused)
        grad_branch, grads = norm.backward(scaled, branch, rstd, parameters, self.norm_needs[id(norm)], self.fused)
        self._collect(norm, grads)
        return grad_branch

    def _collect(self, norm: Norm, grads: list[torch.Tensor | None]) -> None:
        before = self.norm_grads.get(id(norm))
        self.norm_grads[id(norm)] = grads if before is None else [_sum(a, b) for a, b in zip(before, grads)]

    def _norm_backward(
        self,
        which: int,
        dy: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor | None,
        residual: torch.Tensor | None,
        need: bool = True,
    ) -> torch.Tensor | None:
        """Through the norm before a branch, back into the residual."""
        norm = self.spec.norms[which]
        if norm is None:
            return dy if residual is None else dy + residual
        needs = self.norm_needs[id(norm)]
        if not need and not any(needs):
            self._collect(norm, [None for _ in needs])
            return None
        grad, grads = norm.backward(dy, x, rstd, self.norm_parameters[id(norm)], needs, self.fused, residual)
        self._collect(norm, grads)
        return grad

    def _mlp_backward(
        self, state: _State, grad: torch.Tensor, needs: Sequence[Needs]
    ) -> tuple[torch.Tensor, list[TermGradients]]:
        """Gradient of the residual before the MLP (through it too, in a sequential layer), and of its parameters."""
        assert state.middle is not None
        pieces, state.mlp = state.mlp, None
        chunks = list(self._chunks(grad.shape[0]))
        if len(chunks) == 1:
            return self._mlp_rows_backward(state.middle, pieces[0] if pieces else _MLPState(), grad, needs)
        d_middle = torch.empty_like(grad)
        total: list[TermGradients] | None = None
        for i, rows in enumerate(chunks):
            piece = pieces[i] if pieces else _MLPState()
            d_middle[rows], grads = self._mlp_rows_backward(state.middle[rows], piece, grad[rows], needs)
            total = grads if total is None else [TermGradients(*map(_sum, a, b)) for a, b in zip(total, grads)]
        assert total is not None
        return d_middle, total

    def _mlp_rows_backward(
        self, middle: torch.Tensor, state: _MLPState, grad: torch.Tensor, needs: Sequence[Needs]
    ) -> tuple[torch.Tensor, list[TermGradients]]:
        spec = self.spec
        if state.gate is None:
            self._lift(middle, state)
            if spec.norms[3] is not None:
                product, parts = self._activate(state)
                (state.branch,), state.skinny_down = project(product, product, self.down, parts=parts)
            elif self.joined is not None:
                assert state.gate is not None
                assert state.up is not None
                state.skinny_down = self.joined.thin(state.gate, state.up, state.skinny)
            elif self.down.A is not None:
                product, _ = self._activate(state)
                state.skinny_down = thin_product(product, self.down)
        else:
            state.x, state.rstd = self._norm(2, middle)
        dy = self._branch_backward(3, grad, state.branch)
        gate, up, joint = state.gate, state.up, state.joint
        assert gate is not None
        assert up is not None
        state.branch = state.gate = state.up = state.joint = None
        trained = needs[-1].A or needs[-1].weight

        def through(d_product: torch.Tensor | None) -> torch.Tensor:
            """Gate and up become their gradients, and the product's gradient the product, which A or W learns from."""
            assert d_product is not None
            activate_backward(d_product, gate, up, spec.activation, self.fused, again=trained)
            return d_product

        if self.joined is not None:
            last = self.joined.down_backward(dy, gate, up, state.skinny, state.skinny_down, needs[-1:])
        else:
            _, last = _backward([dy], through, state.skinny_down, self.down, needs[-1:])
        lifted = [gate, up] if joint is None else [joint]
        dx, first = _backward(lifted, state.x, state.skinny, self.lift, needs[:-1])
        d_middle = self._norm_backward(2, dx, middle, state.rstd, None if spec.parallel else grad)
        assert d_middle is not None
        return d_middle, [*first, *last]

    def _attention_backward(
        self,
        state: _State,
        h: torch.Tensor,
        grad: torch.Tensor,
        needs: Sequence[Needs],
        residual: torch.Tensor,
        need_h: bool,
    ) -> tuple[torch.Tensor | None, list[TermGradients]]:
        """From the gradient of the residual after attention to that before it, to which ``residual`` is added."""
        spec, rows = self.spec, h.shape[0]
        attended = state.attended
        assert attended is not None
        assert attended.result is not None
        dy = self._branch_backward(1, grad, state.branch)
        needs_o = needs[self.inputs :]
        trained = any(need.A or need.weight for need in needs_o)
        (flat, state.of_tokens) = state.of_tokens, None
        if flat is None and trained:
            flat = self._of_tokens(attended.result)
        flat = flat.reshape(rows, -1) if flat is not None and trained else None
        d_attended, grads_o = _backward([dy], flat, state.skinny_o, self.o, needs_o)
        if spec.over is not None:
            d_attended = spec.over.to_tokens_backward(d_attended.view(self.batch, self.length, -1, spec.head_dim))
        found = attended.backward(d_attended)
        if spec.over is not None:
            found = spec.over.to_heads_backward(found, self.kv_heads)
        dq, dk, dv = (x.transpose(1, 2) for x in found)
        state.attended = None
        del attended, flat, d_attended, found
        dq, dk = self._heads_backward(state, dq, dk)
        grads = [x.reshape(rows, -1) for x in (dq, dk, dv)]
        if spec.widths is not None:
            grads = [torch.cat(grads, -1)]
        dx, grads_qkv = _backward(grads, state.x, state.skinny, self.qkv, needs[: self.inputs])
        return self._norm_backward(0, dx, h, state.rstd, residual, need_h), [*grads_qkv, *grads_o]

    def _heads_backward(self, state: _State, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Through the rotation and the norms of heads, from [B, T, heads, D]."""
        norms = self.spec.head_norms
        if norms is not None and self.normed_turn is not None:
            needs = [self.norm_needs[id(norm)] for norm in norms]
            q, k = state.unnormed
            dq, dk, both = self.normed_turn.backward((dq, dk), q, k, self._head_parameters(), needs)
            for norm, grads in zip(norms, both):
                self._collect(norm, grads)
            return dq, dk
        dq, dk = self.spec.turn(dq, dk, self.fused, backward=True)
        if norms is None:
            return dq, dk
        dq, dk = (self._head_norm_backward(*args) for args in zip(norms, (dq, dk), state.unnormed, state.head_rstd))
        return dq, dk

    def _head_norm_backward(
        self, norm: Norm, dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor | None
    ) -> torch.Tensor:
        needs = self.norm_needs[id(norm)]
        grad, grads = norm.backward(dy.reshape(x.shape), x, rstd, self.norm_parameters[id(norm)], needs, self.fused)
        self._collect(norm, grads)
        return grad


def _backward(
    grads: Sequence[torch.Tensor],
    x: torch.Tensor | Callable[[torch.Tensor | None], torch.Tensor] | None,
    skinny: torch.Tensor | None,
    group: Group,
    needs: Sequence[Needs],
) -> tuple[torch.Tensor, list[TermGradients]]:
    """``project_backward`` where the input always needs a gradient."""
    grad_x, _, found = project_backward(grads, x, skinny, group, needs, need_x=True, need_u=False)
    assert grad_x is not None
    return grad_x, found


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _own_dtypes(x: torch.Tensor) -> AbstractContextManager[Any]:
    """No autocast inside; to enter autocast's own context takes longer than to ask."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, spec: Spec, *tensors: torch.Tensor | None) -> torch.Tensor:
        with _own_dtypes(h):
            layer = _Layer(spec, h, tensors)
            out, state, moved = layer.forward(h.reshape(-1, h.shape[-1]))
        ctx.fetch = spec.offload([h.detach(), *moved]) if spec.offload is not None else None
        ctx.save_for_backward(None if ctx.fetch is not None else h, *tensors)
        ctx.layer, ctx.state = layer, state
        # Detached, it is no view to autograd: a model may write into it.
        return out.view(h.shape).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        # Also refuses a second backward through a freed graph, and parameters that were written to since.
        h, *moved = ctx.saved_tensors[:1] if ctx.fetch is None else ctx.fetch()
        layer, state = ctx.layer, ctx.state
        if torch._C._autograd._get_current_graph_task_keep_graph():
            # What is kept is used up by a backward: where another may follow, this one works on a fresh run.
            state = _State()
        else:
            ctx.layer = ctx.state = ctx.fetch = None
            state.take_back(moved, h.reshape(-1, h.shape[-1]))
        del moved
        flags = ctx.needs_input_grad
        with _own_dtypes(grad):
            d_h, grads = layer.backward(
                h.reshape(-1, h.shape[-1]), state, grad.reshape(-1, grad.shape[-1]), flags[2:], flags[0]
            )
        return None if d_h is None or not flags[0] else d_h.view(h.shape), None, *grads


def decoder_layer(h: torch.Tensor, spec: Spec, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Run a decoder layer as one node.

    Args:
        h: Residual [B, T, H].
        spec: The layer.
        tensors: Parameters of ``spec.every``, then those of the projections that ``flatten`` has made.

    Returns:
        The residual after the layer, [B, T, H].
    """
    return _DecoderLayer.apply(h, spec, *tensors)
