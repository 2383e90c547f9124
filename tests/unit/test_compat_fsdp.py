"""FSDP2 of torch before 2.13 and parameters of integers."""

import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param

from pantheraml._compat import fsdp


def test_integers_become_parameters_while_a_unit_is_sharded(monkeypatch):
    monkeypatch.setattr(fsdp, "FIXED_IN", (99, 0))
    codes, weight = torch.zeros(2, dtype=torch.uint8), torch.zeros(2)
    with fsdp.integers_allowed():
        made = _fsdp_param.nn.Parameter(codes)
        assert isinstance(made, nn.Parameter)
        assert not made.requires_grad
        assert _fsdp_param.nn.Parameter(weight).requires_grad
        assert not _fsdp_param.nn.Parameter(weight, requires_grad=False).requires_grad
        assert _fsdp_param.nn.Module is nn.Module
    assert _fsdp_param.nn is nn


def test_a_torch_that_takes_them_is_left_alone(monkeypatch):
    monkeypatch.setattr(fsdp, "FIXED_IN", (2, 0))
    with fsdp.integers_allowed():
        assert _fsdp_param.nn is nn
