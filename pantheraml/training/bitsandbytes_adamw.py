"""The AdamW of bitsandbytes with the 8-bit update of ``pantheraml.kernels``.

State and its layout are those of bitsandbytes: a checkpoint of either continues in the other. Transformers knows an
optimizer of bitsandbytes, whose embeddings keep 32 bits, by that word in the name of its class or module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.utils import sync_gpu

from .. import env
from ..kernels import dispatch
from ..kernels.adamw_8bit import Codebook, Scalars, adamw_8bit_step, codebook

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
        last = None
        for i_group, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.init_state(group, p, i_group, i)
                self.prefetch_state(p)
                self.update_step(group, p, i_group, i)
                last = p
        if self.is_paged and last is not None:
            sync_gpu(last)
        return loss

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Update one parameter; see ``bitsandbytes.optim.optimizer.Optimizer8bit``."""
        state, config = self.state[p], self.get_config(gindex, pindex, group)
        books = None if config["skip_zeros"] else self._codebooks(p, state)
        if books is None:
            super().update_step(group, p, gindex, pindex)
            return
        p.data = p.data.contiguous()
        assert p.grad is not None
        state["step"] += 1
        scalars = Scalars.of(
            step=state["step"],
            lr=config["lr"],
            beta1=config["betas"][0],
            beta2=config["betas"][1],
            eps=config["eps"],
            weight_decay=config["weight_decay"],
        )
        states, absmax = ((state[f"{name}1"], state[f"{name}2"]) for name in ("state", "absmax"))
        adamw_8bit_step(p, p.grad.contiguous(), states, absmax, books, scalars)

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load a state of this optimizer or of ``bitsandbytes.optim.AdamW``."""
        super().load_state_dict(state_dict, move_to_device)
        self._books.clear()

    def _codebooks(self, p: torch.Tensor, state: dict[str, Any]) -> tuple[Codebook, Codebook] | None:
        """The codebooks of the parameter's states, or None where its update is that of bitsandbytes."""
        first = state["state1"]
        if first.dtype != torch.uint8 or type(p) not in _PLAIN or p.dtype not in _DTYPES:
            return None
        if not (first.is_contiguous() and state["state2"].is_contiguous()):
            return None
        if self._backend == "auto" and env.kernels() == "auto" and dispatch.obstacle(p) is not None:
            return None
        if dispatch.resolve("adamw_8bit", p, self._backend) == "reference":
            return None
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
