"""The AdamW of bitsandbytes with the 8-bit update of ``pantheraml.kernels``.

State and its layout are those of bitsandbytes: a checkpoint of either continues in the other. Transformers knows an
optimizer of bitsandbytes, whose embeddings keep 32 bits, by that word in the name of its class or module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import bitsandbytes
import torch
from bitsandbytes.utils import sync_gpu

from .. import env
from ..kernels import dispatch
from ..kernels.adamw_8bit import Codebook, Scalars, Table, Update, adamw_8bit_steps, codebook

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_Books = tuple[Codebook, Codebook]


class _Kind(NamedTuple):
    """What parameters of one launch have in common, beside the options. Odd sizes would make all loads narrow."""

    device: torch.device
    dtype: torch.dtype
    gradient: torch.dtype
    moment: int
    square: int
    even: bool
    group: int


class _Options(NamedTuple):
    """Arguments of ``Scalars.of``."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def _fits(p: torch.Tensor, state: dict[str, Any]) -> bool:
    """Whether a parameter, its gradient and its state are what the kernel takes."""
    assert p.grad is not None
    kinds = {type(p), type(p.grad)} <= _PLAIN and {p.dtype, p.grad.dtype} <= _DTYPES
    states = state["state1"], state["state2"]
    return kinds and all(s.dtype == torch.uint8 and s.is_contiguous() for s in states)


def _update_of(p: torch.Tensor, state: dict[str, Any]) -> Update:
    assert p.grad is not None
    if not p.is_contiguous():
        p.data = p.data.contiguous()
    states, absmax = ((state[f"{name}1"], state[f"{name}2"]) for name in ("state", "absmax"))
    return Update(p, p.grad.contiguous(), states, absmax)


class AdamW(bitsandbytes.optim.AdamW):
    """``bitsandbytes.optim.AdamW`` whose 8-bit states are updated by a Triton kernel where Triton serves the parameter.

    Every other update is that of bitsandbytes: states in 32 bits, states on a CPU, maps of the user's own, and
    everything under ``PANTHERAML_KERNELS=reference``.

    Args:
        arguments: Those of ``bitsandbytes.optim.AdamW``.
        backend: ``"auto"`` (default), or as in ``pantheraml.kernels.dispatch.resolve``.
        options: Keyword arguments of ``bitsandbytes.optim.AdamW``.
    """

    def __init__(self, *arguments: Any, backend: dispatch.Backend = "auto", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._backend: dispatch.Backend = backend
        # By the identity of the map, which the entry keeps alive.
        self._books: dict[int, tuple[torch.Tensor, Codebook | None]] = {}
        self._tables: dict[_Kind, Table | None] = {}
        self._counted: list[dict[str, Any]] = []
        self._left_to_others = True

    @property
    def takes_found_inf(self) -> bool:
        """Whether a step can be left out on the device, by setting ``found_inf``, float32, to 1: see ``uncount``.

        It can when the kernel made the whole of the step before. torch's own name for this promises a gradient scaler
        more.
        """
        return not self._left_to_others

    def uncount(self) -> None:
        """Forget that the last step was made: ``found_inf`` has left it out."""
        for state in self._counted:
            state["step"] -= 1
        self._counted = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Does not wait for the device, as bitsandbytes does after every parameter; paged states are waited for once.

        Args:
            closure: Computes the loss and the gradients again, default None.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        batches: dict[tuple[_Kind, _Options], tuple[_Books, list[Update]]] = {}
        served: dict[tuple[torch.device, torch.dtype], bool] = {}
        discard: dict[torch.device, torch.Tensor] = {}
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        left_out: bool | None = None
        last, self._counted, self._left_to_others = None, [], False
        for i_group, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                last, state = p, self.state[p]
                if not state:
                    self.init_state(group, p, i_group, i)
                self.prefetch_state(p)
                config = self.get_config(i_group, i, group)
                found = None
                if _fits(p, state) and not config["skip_zeros"]:
                    where = p.device, p.dtype
                    if where not in served:
                        served[where] = self._serves(p)
                    found = self._codebooks(state) if served[where] else None
                if found is None:
                    self._left_to_others = True
                    if found_inf is not None and left_out is None:
                        # Such an update cannot be told on the device: a parameter that had none in the step before.
                        left_out = bool(found_inf)
                    if not left_out:
                        self.update_step(group, p, i_group, i)
                    continue
                state["step"] += 1
                self._counted.append(state)
                beta1, beta2 = config["betas"][:2]
                options = _Options(state["step"], config["lr"], beta1, beta2, config["eps"], config["weight_decay"])
                even = p.numel() % 16 == 0
                kind = _Kind(p.device, p.dtype, p.grad.dtype, id(found[0]), id(found[1]), even, i_group)
                batches.setdefault((kind, options), (found, []))[1].append(_update_of(p, state))
        tables = {}
        for (kind, options), (books, updates) in batches.items():
            scalars = Scalars.of(**options._asdict())
            if found_inf is not None and kind.device not in discard:
                discard[kind.device] = found_inf.to(kind.device, non_blocking=True)
            tables[kind] = adamw_8bit_steps(updates, books, scalars, self._tables.get(kind), discard.get(kind.device))
        self._tables = tables
        if self.is_paged and last is not None:
            sync_gpu(last)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load a state of this optimizer or of ``bitsandbytes.optim.AdamW``."""
        super().load_state_dict(state_dict, move_to_device)
        self._books.clear()
        self._tables.clear()
        self._counted, self._left_to_others = [], True

    def _serves(self, p: torch.Tensor) -> bool:
        """Whether the kernel runs for parameters of this device and dtype."""
        if self._backend == "auto" and env.kernels() == "auto" and dispatch.obstacle(p) is not None:
            return False  # without the message that eager torch runs: the update of bitsandbytes does
        return dispatch.resolve("adamw_8bit", p, self._backend) == "triton"

    def _codebooks(self, state: dict[str, Any]) -> _Books | None:
        """The codebooks of a state, or None where its maps are not those that the kernel knows."""
        moment, square = (self._book(state[name], signed=name == "qmap1") for name in ("qmap1", "qmap2"))
        return None if moment is None or square is None else (moment, square)

    def _book(self, values: torch.Tensor, *, signed: bool) -> Codebook | None:
        """The codebook of a map. A loaded state brings a copy of the map for each parameter: all share one."""
        found = self._books.get(id(values))
        if found is None:
            shared = (book for _, book in self._books.values() if book is not None)
            alike = (b for b in shared if b.values.device == values.device and torch.equal(b.values, values))
            found = self._books[id(values)] = values, next(alike, None) or codebook(values, signed=signed)
        return found[1]
