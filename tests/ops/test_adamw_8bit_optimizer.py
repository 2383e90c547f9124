"""The optimizer class around the kernel: it trains as that of bitsandbytes does, and shares its checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes")
pytest.importorskip("triton")

from pantheraml.errors import UnsupportedError  # noqa: E402
from pantheraml.training import bitsandbytes_adamw  # noqa: E402
from pantheraml.training.bitsandbytes_adamw import AdamW  # noqa: E402

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05, "optim_bits": 8}


@pytest.fixture(autouse=True)
def _no_exceptions_of_other_optimizers(monkeypatch):
    """In bitsandbytes, those for weights of one optimizer hold for weights at the same places of every later one."""
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", None)


def network(device, dtype=torch.float32) -> torch.nn.Module:
    """Weights of 8-bit states, of whole blocks and of others, and biases of 32-bit states."""
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(67, 96),
        torch.nn.Tanh(),
        torch.nn.Linear(96, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 8),
    ]
    return torch.nn.Sequential(*layers).to(device, dtype)


def train(model, optimizer, steps, *, start=0):
    """Losses of steps whose batches depend on nothing but their number; two micro-batches a step, clipped."""
    device, dtype = model[0].weight.device, model[0].weight.dtype
    losses = []
    for step in range(start, start + steps):
        for part in range(2):
            generator = torch.Generator().manual_seed(2 * step + part)
            x = torch.randn(32, 67, generator=generator)
            loss = (model(x.to(device, dtype)).float() - x[:, :8].to(device)).square().mean() / 2
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture
def counted(monkeypatch):
    """Sizes of the parameters that the kernel updated."""
    sizes = []

    def steps(updates, *arguments):
        sizes.extend(update.p.numel() for update in updates)
        return original(updates, *arguments)

    original = bitsandbytes_adamw.adamw_8bit_steps
    monkeypatch.setattr(bitsandbytes_adamw, "adamw_8bit_steps", steps)
    return sizes


def options_for(dtype):
    """Decay is a rounding of its own in some of bitsandbytes' updates, which moves 16-bit weights more than it does."""
    return OPTIONS if dtype is torch.float32 else OPTIONS | {"weight_decay": 0.0}


def assert_close(ours, theirs, start, share=0.05):
    """Weights that moved the same way, but for rounding."""
    for a, b, c in zip(ours.parameters(), theirs.parameters(), start.parameters()):
        moved = (b - c).float().norm()
        assert (a - b).float().norm() <= share * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_trains_as_bitsandbytes_does(dtype, device, counted):
    start, ours, theirs = (network(device, dtype) for _ in range(3))
    options = options_for(dtype)
    fused = AdamW(ours.parameters(), backend="triton", **options)
    plain = bitsandbytes.optim.AdamW(theirs.parameters(), **options)
    losses = train(ours, fused, 8), train(theirs, plain, 8)
    assert counted == [67 * 96, 96 * 64] * 8
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0][-1] < losses[0][0]
    assert_close(ours, theirs, start)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        mine, other = fused.state[p], plain.state[q]
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert (value.shape, value.dtype) == (other[name].shape, other[name].dtype)
            else:
                assert value == other[name] == 8


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_checkpoint_of_either_continues_in_the_other(first, device, tmp_path, counted):
    def make(kind, model):
        if kind == "ours":
            return AdamW(model.parameters(), backend="triton", **OPTIONS)
        return bitsandbytes.optim.AdamW(model.parameters(), **OPTIONS)

    second = "theirs" if first == "ours" else "ours"
    model = network(device)
    optimizer = make(first, model)
    train(model, optimizer, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    at = copy.deepcopy(model)

    resumed = network(device)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    continued = make(second, resumed)
    continued.load_state_dict(saved["optimizer"])
    before = len(counted)
    train(model, optimizer, 4, start=4)
    train(resumed, continued, 4, start=4)
    assert len(counted) == before + 8
    assert_close(resumed, model, at)
    assert {state["step"] for state in continued.state.values()} == {8}


def test_a_checkpoint_of_its_own_continues_bit_for_bit(device):
    model = network(device)
    optimizer = AdamW(model.parameters(), backend="triton", **OPTIONS)
    train(model, optimizer, 3)
    resumed = copy.deepcopy(model)
    continued = AdamW(resumed.parameters(), backend="triton", **OPTIONS)
    saved = optimizer.state_dict()
    for state in saved["state"].values():  # as from a file, where each parameter's state has its own
        for held in (value for value in state.values() if isinstance(value, dict)):
            held.update({name: value.clone() for name, value in held.items() if name.startswith("qmap")})
    continued.load_state_dict(saved)
    train(model, optimizer, 2, start=3)
    train(resumed, continued, 2, start=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
    # To the kernel they are one, which leaves it one launch.
    assert len(continued._books) == 4
    assert len({id(book) for _, book in continued._books.values()}) == 2
    assert len(continued._tables) == 1


def test_what_the_kernel_does_not_serve_is_bitsandbytes_update(device, counted):
    model, other = network(device), network(device)
    optimizer = AdamW(model.parameters(), backend="triton", **OPTIONS)
    plain = bitsandbytes.optim.AdamW(other.parameters(), **OPTIONS)
    for one in (optimizer, plain):  # a map of the user's own
        one.name2qmap["dynamic"] = bitsandbytes.functional.create_linear_map(signed=True)
    train(model, optimizer, 2), train(other, plain, 2)
    assert not counted
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_sparse_updates_are_left_to_bitsandbytes(device, counted):
    model = network(device)
    optimizer = AdamW(model.parameters(), backend="triton", **OPTIONS)
    optimizer.args.skip_zeros = True
    train(model, optimizer, 1)
    assert not counted


def test_the_switch_of_the_kernels_is_respected(device, counted, monkeypatch):
    monkeypatch.setenv("PANTHERAML_KERNELS", "reference")
    model = network(device)
    train(model, AdamW(model.parameters(), **OPTIONS), 1)
    assert not counted
    train(model, AdamW(model.parameters(), backend="triton", **OPTIONS), 1)
    assert len(counted) == 2
    monkeypatch.setenv("PANTHERAML_KERNELS", "auto")
    train(model, AdamW(model.parameters(), **OPTIONS), 1)
    assert len(counted) == (2 if device.type == "cpu" else 4)


def test_a_request_that_cannot_be_served_raises(monkeypatch):
    monkeypatch.setattr(bitsandbytes_adamw.dispatch, "obstacle", lambda tensor, fp8=False: "a reason")
    model = network("cpu")
    optimizer = AdamW(model.parameters(), backend="triton", **OPTIONS)
    with pytest.raises(UnsupportedError, match="adamw_8bit"):
        train(model, optimizer, 1)


def test_groups_hooks_closures_and_absent_gradients(device):
    model = network(device)
    groups = [{"params": [model[0].weight], "lr": 0.0}, {"params": [model[2].weight], "weight_decay": 0.0}]
    optimizer = AdamW([*groups, {"params": [model[4].weight]}], backend="triton", **OPTIONS)
    before = copy.deepcopy(model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = model[2](model[0](torch.ones(2, 67, device=device))).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert seen == ["pre", "post"]
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)
    assert torch.equal(model[4].weight, before[4].weight)


def test_layouts_that_are_not_contiguous(device):
    torch.manual_seed(0)
    weight, gradient = torch.randn(96, 80, device=device), torch.randn(96, 80, device=device)
    results = []
    for transposed in (False, True):
        p = torch.nn.Parameter(weight.t().clone().t() if transposed else weight.clone())
        p.grad = gradient.t().clone().t() if transposed else gradient.clone()
        AdamW([p], backend="triton", **OPTIONS).step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("paged", [False, True], ids=["plain", "paged"])
def test_large_parameters_on_a_gpu(paged, dtype, gpu, counted):
    """Sizes of 100,000 and more are paged."""
    sizes = [(2048, 512), (511, 257), (4096,), (100,)]
    generator = torch.Generator(gpu).manual_seed(0)
    start = [torch.randn(size, device=gpu, generator=generator).to(dtype) for size in sizes]
    kinds = {"ours": AdamW, "theirs": bitsandbytes.optim.AdamW}
    weights = {kind: [torch.nn.Parameter(p.clone()) for p in start] for kind in kinds}
    optimizers = {kind: made(weights[kind], is_paged=paged, **options_for(dtype)) for kind, made in kinds.items()}
    for _ in range(20):
        gradients = [torch.randn(size, device=gpu, generator=generator).to(dtype) for size in sizes]
        for kind, optimizer in optimizers.items():
            for p, gradient in zip(weights[kind], gradients):
                p.grad = gradient.clone()
            optimizer.step()
    assert len(counted) == 3 * 20
    for a, b, c in zip(weights["ours"], weights["theirs"], start):
        assert (a - b).float().norm() <= 0.02 * (b - c).float().norm()


def without_biases(device):
    """Weights of 8-bit states alone."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(67, 96, bias=False), torch.nn.Tanh(), torch.nn.Linear(96, 64, bias=False)]
    return torch.nn.Sequential(*layers).to(device)


def one_step(model, optimizer, number, *, left_out=None):
    """A step on a batch of this number; ``left_out`` is told on the device."""
    generator = torch.Generator().manual_seed(number)
    device = model[0].weight.device
    model(torch.randn(32, 67, generator=generator).to(device)).square().mean().backward()
    if left_out is not None:
        optimizer.found_inf = torch.tensor(float(left_out), device=device)
    optimizer.step()
    if left_out is not None:
        del optimizer.found_inf
        if left_out:
            optimizer.uncount()
    optimizer.zero_grad()


def test_a_step_that_is_left_out_on_the_device_has_not_been(device):
    ours, other = without_biases(device), without_biases(device)
    fused, plain = (AdamW(m.parameters(), backend="triton", **OPTIONS) for m in (ours, other))
    assert not fused.takes_found_inf  # nobody knows yet who makes the updates
    for number, left_out in ((0, None), (1, False), (2, True), (3, False)):
        one_step(ours, fused, number, left_out=left_out)
        assert fused.takes_found_inf
        if not left_out:
            one_step(other, plain, number)
    for p, q in zip(ours.parameters(), other.parameters()):
        assert torch.equal(p, q)
        assert fused.state[p]["step"] == plain.state[q]["step"] == 3
        for name in ("state1", "state2", "absmax1", "absmax2"):
            assert torch.equal(fused.state[p][name], plain.state[q][name])


def test_updates_of_others_are_left_out_too_and_not_told_again(device):
    model = network(device)
    for layer in (model[0], model[2], model[4]):
        layer.bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    optimizer = AdamW(model.parameters(), backend="triton", **OPTIONS)
    one_step(model, optimizer, 0)
    assert optimizer.takes_found_inf
    # 32-bit states, from now on.
    model[4].weight.requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    one_step(model, optimizer, 1, left_out=True)
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer.takes_found_inf
    one_step(model, optimizer, 1)
    assert not torch.equal(model[4].weight, before[4])
    assert not torch.equal(model[0].weight, before[0])
