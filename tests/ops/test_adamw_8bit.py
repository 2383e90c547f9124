"""AdamW with 8-bit states against its specification and against bitsandbytes, which the kernels never import."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch

from pantheraml.errors import ArgumentError, ConfigError
from pantheraml.kernels import adamw_8bit
from pantheraml.kernels._triton import AVAILABLE, interpreted, jit, on_device, tl
from pantheraml.kernels.reference import adamw_8bit as reference

from .support import DTYPES, random

functional = pytest.importorskip("bitsandbytes.functional")
kernel = importlib.import_module("pantheraml.kernels.adamw_8bit")
step = kernel.adamw_8bit_step

SIZES = [1, 255, 256, 1000, 4096, 5 * 256 + 16]
DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
OPTIONS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
# A sum of two products may be rounded once or twice, and a code between two values goes either way.
TIES = 2e-3
# On a CPU, bitsandbytes rounds a number to 16 bits before it looks for its code, and small numbers have many codes.
COARSE = {"coarse": 2.0**-15, "ties": 0.05}


def map_of(*, signed: bool) -> torch.Tensor:
    return functional.create_dynamic_map(signed=signed)


def books_on(device):
    return tuple(reference.codebook(map_of(signed=signed).to(device), signed=signed) for signed in (True, False))


class Run:
    """A parameter with states, and the same gradients for whoever updates it."""

    def __init__(self, count, dtype, device, *, seed=0):
        blocks = -(-count // 256)
        self.p = random(count, seed=seed).to(dtype).to(device)
        self.states = tuple(torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
        self.absmax = tuple(torch.zeros(blocks, device=device) for _ in range(2))
        # Blocks of many magnitudes, and zeros in them.
        spread = (10.0 ** random(blocks, seed=seed + 1)).repeat_interleave(256)[:count]
        gradients = [random(count, seed=seed + 2 + i) * spread * (random(count, seed=50 + i) < 1.5) for i in range(4)]
        self.gradients = [gradient.to(dtype).to(device) for gradient in gradients]
        self.books = books_on(device)

    def step(self, i, update, **options):
        scalars = reference.Scalars.of(step=i + 1, lr=1e-2, **OPTIONS | options)
        update(self.p, self.gradients[i % 4], self.states, self.absmax, self.books, scalars)


def triton_step(*arguments):
    adamw_8bit(*arguments, backend="triton")


def assert_alike(ours: Run, other: Run, *, ties=TIES, rtol=1e-5, atol=1e-7, coarse=0.0):
    """Equal but for rounding, and for codes of numbers that are under ``coarse`` in units of their block's scale."""
    # GPUs take roots and quotients from tables.
    tolerance = max(2 * torch.finfo(ours.p.dtype).eps, 1e-5 if ours.p.is_cuda else 0.0)
    torch.testing.assert_close(ours.p, other.p, rtol=tolerance, atol=atol)
    for mine, theirs, a, b, book in zip(ours.states, other.states, ours.absmax, other.absmax, ours.books):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-30)
        values, others = book.values[mine.long()], book.values[theirs.long()]
        distance = (mine.int() - theirs.int()).abs() * ((values - others).abs() > coarse)
        assert (distance <= 1).all()
        assert (distance > 0).sum() <= max(ties * distance.numel(), 1)


def assert_equal(ours: Run, other: Run) -> None:
    assert torch.equal(ours.p, other.p)
    for mine, theirs in zip((*ours.states, *ours.absmax), (*other.states, *other.absmax)):
        assert torch.equal(mine, theirs)


def same_start(other: Run, ours: Run) -> None:
    """The state of ``ours``, so that a difference does not add up."""
    other.p = ours.p.clone()
    other.states, other.absmax = (tuple(t.clone() for t in ts) for ts in (ours.states, ours.absmax))


@SIGNED
def test_the_map_is_that_of_bitsandbytes(signed):
    values = map_of(signed=signed)
    torch.testing.assert_close(reference.dynamic_map(signed=signed), values, rtol=3e-7, atol=0)
    book = reference.codebook(values, signed=signed)
    assert book is not None
    assert torch.equal(book.values, values)
    assert reference.codebook(functional.create_linear_map(signed=signed), signed=signed) is None
    assert reference.codebook(map_of(signed=not signed), signed=signed) is None


def test_no_negative_number_gets_the_code_of_zero():
    book = reference.codebook(map_of(signed=True), signed=True)
    codes, absmax = reference.encode(torch.tensor([1.0, -1e-9, 1e-9, -0.0, 0.0, -1e-30, -1.0]), book)
    assert absmax == 1
    assert codes.tolist() == [255, 126, 127, 127, 127, 126, 0]


@SIGNED
def test_a_code_is_that_of_the_nearest_value(signed):
    book = reference.codebook(map_of(signed=signed), signed=signed)
    values = torch.cat([random(20_000).float().clamp(-1, 1), torch.ones(1)])
    values = values if signed else values.abs()
    codes, _ = reference.encode(values, book)
    error = (book.values[codes.long()] - values).abs()
    assert torch.equal(error, (book.values[None] - values[:, None]).abs().amin(1))
    # Its implementation for devices that have none of their own, which does not round.
    quantize, general = (
        torch.ops.bitsandbytes.quantize_blockwise.default,
        torch._C.DispatchKey.CompositeExplicitAutograd,
    )
    theirs, _ = quantize._op_dk(general, values, book.values, 256)
    theirs[(codes == 126) & (theirs == 127) & signed] = 126
    assert torch.equal(codes, theirs)


def _search(x, floors, out, count, SIGNED: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    found = kernel._nearest(tl.load(x + offsets, mask=mask, other=0.0), floors, SIGNED=SIGNED, TOP=TOP)
    tl.store(out + offsets, found, mask=mask)


@pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
@SIGNED
def test_the_computed_code_is_the_searched_one_for_every_number(signed, device):
    """Both grow with the number, so that equality around every floor is equality between them."""
    book = reference.codebook(map_of(signed=signed), signed=signed)
    edges = torch.cat([book.floors[1:], book.values, 10.0 ** torch.arange(-44.0, 1), 1.0 - torch.arange(5.0) / 300])
    numbers = torch.cat([edges, random(30_000).float(), 10 ** (-8 * torch.rand(30_000))]).abs().clamp(max=1)
    above, below = (torch.nextafter(numbers, torch.tensor(to)) for to in (1.0, 0.0))
    numbers = torch.cat([numbers, above, below, torch.tensor([0.0, -0.0])])
    numbers = torch.cat([numbers, -numbers]) if signed else numbers.abs()
    if device.type != "cpu":
        numbers = numbers[(numbers == 0) | (numbers.abs() >= reference.TINY)]  # a GPU may take these for zero
    numbers = numbers.to(device)
    out = torch.empty(numbers.numel(), dtype=torch.int32, device=device)
    search = jit(_search)
    if interpreted():
        from triton.runtime.interpreter import InterpretedFunction

        search = InterpretedFunction(_search)
    with on_device(numbers):
        search[(-(-numbers.numel() // 4096),)](
            x=numbers,
            floors=book.floors.to(device),
            out=out,
            count=numbers.numel(),
            SIGNED=signed,
            TOP=128 if signed else 256,
            BLOCK=4096,
        )
    expected = torch.bucketize(numbers.cpu(), book.floors[1:], out_int32=True)
    assert torch.equal(out.cpu(), expected)
    assert expected.unique().numel() == 256


@DTYPE
@pytest.mark.parametrize("count", SIZES)
def test_the_kernel_is_the_reference(count, dtype, device):
    ours, other = Run(count, dtype, device), Run(count, dtype, device)
    for i in range(3):
        same_start(other, ours)
        ours.step(i, triton_step)
        other.step(i, reference.adamw_8bit)
        assert_alike(ours, other)
    assert not torch.equal(ours.p, Run(count, dtype, device).p)


@DTYPE
@pytest.mark.parametrize("sizes", [[512, 4096, 16], [1000, 0, 1, 255, 1296]], ids=["aligned", "any"])
@pytest.mark.parametrize("alone", [1 << 23, 1000], ids=["together", "large ones alone"])
def test_many_parameters_in_one_launch(alone, sizes, dtype, device, monkeypatch):
    monkeypatch.setattr(kernel, "ALONE", alone)
    launched = []
    monkeypatch.setattr(
        kernel, "adamw_8bit_step", lambda one, *rest: launched.append(one.p.numel()) or step(one, *rest)
    )
    ours, other = ([Run(count, dtype, device, seed=10 * i) for i, count in enumerate(sizes)] for _ in range(2))
    table, tables = None, []
    for i in range(3):
        scalars = reference.Scalars.of(step=i + 1, lr=1e-2, **OPTIONS)
        updates = [kernel.Update(run.p, run.gradients[i], run.states, run.absmax) for run in ours]
        table = kernel.adamw_8bit_steps(updates, ours[0].books, scalars, table)
        tables.append(table)
        again = kernel.Table.of([update for update in updates if 0 < update.p.numel() < alone], table)
        assert again is table
        for a, b in zip(ours, other):
            b.step(i, lambda *arguments: step(kernel.Update(*arguments[:4]), *arguments[4:]))
            # Another form of the kernel: a GPU's compiler may fuse other products.
            assert_alike(a, b) if device.type != "cpu" else assert_equal(a, b)
            same_start(b, a)
    assert launched == [count for count in sizes if count >= alone] * 3
    assert tables[0].owners is tables[2].owners  # gradients moved, sizes did not
    assert tables[0].rows is not tables[2].rows
    assert tables[0].aligned == all(count % 16 == 0 for count in sizes if 0 < count < alone)


@DTYPE
@pytest.mark.parametrize("alone", [1 << 23, 1000], ids=["together", "large ones alone"])
def test_a_step_is_left_out_on_the_device(alone, dtype, device, monkeypatch):
    monkeypatch.setattr(kernel, "ALONE", alone)
    runs, same = ([Run(count, dtype, device, seed=10 * i) for i, count in enumerate([512, 4096, 16])] for _ in range(2))
    scalars = reference.Scalars.of(step=1, lr=1e-2, **OPTIONS)
    updates = [kernel.Update(run.p, run.gradients[0], run.states, run.absmax) for run in runs]
    kernel.adamw_8bit_steps(updates, runs[0].books, scalars, discard=torch.ones((), device=device))
    for a, b in zip(runs, same):
        assert_equal(a, b)
    kernel.adamw_8bit_steps(updates, runs[0].books, scalars, discard=torch.zeros((), device=device))
    expected = [kernel.Update(run.p, run.gradients[0], run.states, run.absmax) for run in same]
    kernel.adamw_8bit_steps(expected, runs[0].books, scalars)
    for a, b in zip(runs, same):
        assert_equal(a, b)


def test_a_table_is_made_again_where_sizes_or_tiles_differ(device, monkeypatch):
    def table(sizes, last):
        runs = [Run(count, torch.float32, device) for count in sizes]
        kept.append(runs)
        updates = [kernel.Update(run.p, run.gradients[0], run.states, run.absmax) for run in runs]
        return kernel.Table.of(updates, last)

    kept = []
    tile = kernel.ROWS * kernel.BLOCK
    first = table([tile, 3 * tile + 1], None)
    assert first.owners.tolist() == [0, 1, 1, 1, 1]
    assert first.rows[:, 6:].tolist() == [[tile, 0], [3 * tile + 1, 1]]
    assert table([tile + 1, 3 * tile], first).owners.tolist() == [0, 0, 1, 1, 1]
    monkeypatch.setattr(kernel, "ROWS", 2 * kernel.ROWS)
    assert table([tile, 3 * tile + 1], first).owners.tolist() == [0, 1, 1]


def bitsandbytes_update(p, gradient, states, absmax, books, scalars, *, step, lr=1e-2, **options):
    options = OPTIONS | options
    functional.optimizer_update_8bit_blockwise(
        "adam",
        gradient,
        p,
        states[0],
        states[1],
        options["beta1"],
        options["beta2"],
        0.0,
        0.0,
        options["eps"],
        step,
        lr,
        books[0].values,
        books[1].values,
        absmax[0],
        absmax[1],
        options["weight_decay"],
        gnorm_scale=1.0,
    )


@DTYPE
@pytest.mark.parametrize("count", SIZES)
def test_the_reference_is_bitsandbytes(count, dtype):
    ours, other = (Run(count, dtype, torch.device("cpu")) for _ in range(2))
    for i in range(3):
        same_start(other, ours)
        ours.step(i, reference.adamw_8bit)
        other.step(i, functools.partial(bitsandbytes_update, step=i + 1))
        assert_alike(ours, other, **COARSE)


def test_adamw_of_torch_is_close(device):
    """What 8 bits lose is small beside the update."""
    run = Run(4096, torch.float32, device)
    plain = torch.nn.Parameter(run.p.clone())
    optimizer = torch.optim.AdamW([plain], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    before = run.p.clone()
    for i in range(4):
        plain.grad = run.gradients[i]
        optimizer.step()
        run.step(i, triton_step)
    moved = (plain.detach() - before).norm()
    assert (run.p - plain.detach()).norm() < 0.05 * moved


def test_gradients_that_are_not_finite_are_left_out(device):
    for update in (triton_step, reference.adamw_8bit):
        run, clean = Run(600, torch.float32, device), Run(600, torch.float32, device)
        run.step(0, update), clean.step(0, update)
        before = run.p.clone()
        run.gradients[1][[3, 300, 599]] = torch.tensor([math.nan, math.inf, -math.inf], device=device)
        clean.gradients[1][[3, 300, 599]] = 0.0
        run.step(1, update), clean.step(1, update)
        left = torch.zeros(600, dtype=torch.bool, device=device)
        left[[3, 300, 599]] = True
        assert torch.equal(run.p[left], before[left])
        assert torch.equal(run.p[~left], clean.p[~left])
        assert (run.states[0][left] == 127).all()
        assert (run.states[1][left] == 0).all()
        assert all(absmax.isfinite().all() for absmax in run.absmax)


def test_a_block_of_zeros_stays(device):
    run = Run(512, torch.float32, device)
    run.gradients[0][:256] = 0.0
    before = run.p.clone()
    run.step(0, triton_step, weight_decay=0.0)
    assert torch.equal(run.p[:256], before[:256])
    assert [float(absmax[0]) for absmax in run.absmax] == [0.0, 0.0]
    assert (run.states[0][:256] == 127).all()
    assert (run.states[1][:256] == 0).all()
    assert run.p.isfinite().all()


def test_a_step_is_seen_as_a_write(device):
    run = Run(256, torch.float32, device)
    for update in (triton_step, reference.adamw_8bit):
        before = run.p._version
        run.step(0, update)
        assert run.p._version > before


def test_memory_beyond_the_tensors_stays(device):
    run = Run(300, torch.float32, device)
    whole = torch.full((1024,), 7.0, device=device)
    codes = torch.full((2, 1024), 9, dtype=torch.uint8, device=device)
    whole[:300] = run.p
    run.p, run.states = whole[:300], (codes[0, :300], codes[1, :300])
    run.step(0, triton_step)
    assert (whole[300:] == 7).all()
    assert (codes[:, 300:] == 9).all()
    assert (whole[:300] != 7).all()


def test_an_empty_parameter(device):
    Run(0, torch.float32, device).step(0, triton_step)


WRONG = {
    "gradient": (ConfigError, lambda r: setattr(r, "gradients", [g[:-1] for g in r.gradients])),
    "integers": (ArgumentError, lambda r: setattr(r, "gradients", [g.int() for g in r.gradients])),
    "codes": (ArgumentError, lambda r: setattr(r, "states", tuple(s.int() for s in r.states))),
    "scales": (ConfigError, lambda r: setattr(r, "absmax", tuple(a[:-1] for a in r.absmax))),
    "device": (ArgumentError, lambda r: setattr(r, "p", r.p.to("meta"))),
    "strides": (ConfigError, lambda r: setattr(r, "p", torch.zeros(1200)[::2])),
}


@pytest.mark.parametrize(("error", "change"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(error, change):
    run = Run(600, torch.float32, torch.device("cpu"))
    change(run)
    with pytest.raises(error):
        run.step(0, adamw_8bit)


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("count", [4096, 12_345, 1_000_003, 2048 * 8192])
def test_twenty_steps_beside_bitsandbytes(count, dtype, gpu):
    """The update of bitsandbytes for CUDA, which rounds its constants and its quotients differently.

    ``eps`` is large enough that a second moment whose code is zero does not make a step of any size. Decay can be a
    rounding of its own there, which moves a 16-bit parameter more than decay does.
    """
    options = {"eps": 1e-4, "weight_decay": 0.1 if dtype is torch.float32 else 0.0}
    ours, other, start = (Run(count, dtype, gpu) for _ in range(3))
    gradients = [(random(count, seed=9 + i) * 1e-2).to(dtype).to(gpu) for i in range(4)]
    ours.gradients = other.gradients = gradients
    for i in range(20):
        ours.step(i, triton_step, **options)
        other.step(i, functools.partial(bitsandbytes_update, step=i + 1, **options))
    moved = (other.p.float() - start.p.float()).norm()
    assert (ours.p.float() - other.p.float()).norm() < 0.02 * moved
    for a, b in zip(ours.absmax, other.absmax):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-30)
    for mine, theirs in zip(ours.states, other.states):
        assert ((mine.int() - theirs.int()).abs() > 1).float().mean() < 0.02


@pytest.mark.gpu
@DTYPE
def test_one_step_beside_bitsandbytes(dtype, gpu):
    ours = Run(300_000, dtype, gpu)
    for i in range(3):
        ours.step(i, triton_step)
    other = Run(300_000, dtype, gpu)
    same_start(other, ours)
    ours.step(3, triton_step)
    other.step(3, functools.partial(bitsandbytes_update, step=4))
    # Whether decay takes its share before or after the update of at most ten learning rates.
    assert_alike(ours, other, ties=1e-2, rtol=2e-4, atol=10 * 1e-2 * 1e-2 * OPTIONS["weight_decay"])


@pytest.mark.gpu
def test_more_elements_than_int32_counts(gpu):
    count = 2**31 + 256 * 5 + 16
    p, gradient = (torch.ones(count, dtype=torch.bfloat16, device=gpu) for _ in range(2))
    states = tuple(torch.zeros(count, dtype=torch.uint8, device=gpu) for _ in range(2))
    absmax = tuple(torch.zeros(-(-count // 256), device=gpu) for _ in range(2))
    scalars = reference.Scalars.of(step=1, lr=0.5, **OPTIONS | {"weight_decay": 0.0})
    adamw_8bit(p, gradient, states, absmax, books_on(gpu), scalars, backend="triton")
    assert (p == 0.5).all()
    assert all((state == 255).all() for state in states)
