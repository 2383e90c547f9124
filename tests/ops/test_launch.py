"""Launches that bypass Triton's bookkeeping are kept apart wherever Triton would compile another form."""

from __future__ import annotations

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import jit as runtime  # noqa: E402

from pantheraml.kernels._launch import KNOWN, Kernel, Launch  # noqa: E402

MEMORY = torch.zeros(64, dtype=torch.uint8)
VALUES = {
    "x": [MEMORY[at : at + 16].view(dtype) for at in (0, 4, 16) for dtype in (torch.float32, torch.uint8)] + [None],
    "size": [0, 1, 2, 16, 17, 48, 2**31 - 16, 2**31, 2**31 + 1, 2**40, -1, -16, -(2**31) - 16, 2**63, True, 1.0],
    "scale": [0.5, 1.0, 2, 16],
    "plain": [1, 16, 17, 2**31, 2**63],
    "TILE": [1, 16, 32, None],
    "num_warps": [1, 4],
}


def source(x, size, scale, plain, TILE: triton.language.constexpr):
    pass


def pair(x, y, size, scale, plain, TILE: triton.language.constexpr):
    pass


def kernel():
    return Kernel(source, do_not_specialize=["plain"])


def specialisation(function, arguments):
    """What Triton tells forms apart by."""
    backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
    binder = runtime.create_function_from_signature(function.signature, function.params, backend)
    bound, specialised, options = binder(**arguments)
    constants = [value for value, kind in zip(bound.values(), specialised) if kind[0] == "constexpr"]
    return str(specialised), str(constants), str(options)


def test_launches_that_triton_tells_apart_are_told_apart():
    function = kernel()
    first = {name: values[0] for name, values in VALUES.items()}
    for name, values in VALUES.items():
        cases = [first | {name: value} for value in values]
        for a, b in itertools.combinations(cases, 2):
            if function.key(a) == function.key(b):
                assert specialisation(function, a) == specialisation(function, b), (name, a[name], b[name])


def test_sizes_of_one_kind_share_a_form():
    """Else every new length of a batch would go the slow way, and be remembered for ever."""
    function = kernel()
    case = {name: values[0] for name, values in VALUES.items()}
    assert function.key(case | {"size": 48}) == function.key(case | {"size": 160})
    assert function.key(case | {"size": 17}) == function.key(case | {"size": 2049})
    assert function.key(case | {"plain": 3}) == function.key(case | {"plain": 16})
    assert function.key(case | {"scale": 0.25}) == function.key(case | {"scale": 0.5})


@pytest.fixture
def launched(monkeypatch):
    """What reaches the compiled form, and how often Triton itself was asked."""
    seen, asked = [], []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        @staticmethod
        def run(*arguments):
            seen.append(arguments)

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: "stream")

    monkeypatch.setattr(runtime.JITFunction, "run", lambda self, **kwargs: asked.append(kwargs) or Compiled)
    monkeypatch.setattr("pantheraml.kernels._launch.driver", type("Drivers", (), {"active": Driver}))
    return seen, asked


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) not in KNOWN, reason="launched by Triton alone in this release"
)
def test_the_second_launch_goes_straight_to_the_compiled_form(launched):
    seen, asked = launched
    function = kernel()
    arguments = {"plain": 3, "x": MEMORY, "size": 5, "scale": 0.5, "TILE": 16, "num_warps": 4}
    function[(2,)](**arguments)
    assert (len(seen), len(asked)) == (0, 1)
    for _ in range(2):
        function[(7, 3)](**arguments | {"size": 6})
    assert len(asked) == 1
    assert seen == [(7, 3, 1, "stream", "function", "metadata", None, None, None, MEMORY, 6, 0.5, 3, 16)] * 2
    function[(2,)](**arguments | {"size": 32})
    assert (len(seen), len(asked)) == (2, 2)
    # 1 and 1.0 are equal, and are passed to the kernel as different types.
    for size in (1, 1.0, True):
        function[(2,)](**arguments | {"size": size})
    assert (len(seen), len(asked)) == (2, 5)


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) not in KNOWN, reason="launched by Triton alone in this release"
)
def test_a_launch_at_given_sizes_takes_tensors_of_each_form(launched):
    seen, asked = launched
    sizes = {"size": 6, "scale": 0.5, "plain": 3, "TILE": 16, "num_warps": 4}
    launch = Launch(Kernel(pair, do_not_specialize=["plain"]), (7, 3), ("x", "y"), **sizes)
    other = MEMORY[16:32]
    launch(MEMORY, MEMORY)
    assert (len(seen), len(asked)) == (0, 1)
    for x in (MEMORY, other):
        launch(x, MEMORY)
    tail = (MEMORY, 6, 0.5, 3, 16)
    head = (7, 3, 1, "stream", "function", "metadata", None, None, None)
    assert seen == [(*head, MEMORY, *tail), (*head, other, *tail)]
    # Another alignment, another dtype, no tensor: each asks Triton once.
    for y in (MEMORY[4:20], MEMORY.view(torch.float32), None):
        for _ in range(2):
            launch(MEMORY, y)
    assert (len(seen), len(asked)) == (5, 4)
    # Sizes of one kind share what Triton compiled.
    same = Launch(launch._kernel, (1,), ("x", "y"), **sizes | {"size": 7, "scale": 0.25, "plain": 5})
    same(MEMORY, MEMORY)
    assert (len(seen), len(asked)) == (6, 4)
    assert seen[-1][9:] == (MEMORY, MEMORY, 7, 0.25, 5, 16)


def test_tensors_of_other_classes_go_through_triton(launched):
    seen, asked = launched
    function = kernel()
    arguments = {name: values[0] for name, values in VALUES.items()}
    other = MEMORY.as_subclass(type("Other", (torch.Tensor,), {}))
    launch = Launch(function, (1,), ("x",), **{name: value for name, value in arguments.items() if name != "x"})
    for _ in range(2):
        function[(1,)](**arguments | {"x": other})
        launch(other)
    assert (len(seen), len(asked)) == (0, 4)


def test_hooks_of_triton_see_every_launch(launched, monkeypatch):
    seen, asked = launched
    function = kernel()
    arguments = {name: values[0] for name, values in VALUES.items()}
    hook = runtime.knobs.runtime.launch_enter_hook
    if hasattr(hook, "calls"):
        monkeypatch.setattr(hook, "calls", [print])
    else:
        monkeypatch.setattr(runtime.knobs.runtime, "launch_enter_hook", print)
    launch = Launch(function, (1,), ("x",), **{name: value for name, value in arguments.items() if name != "x"})
    for _ in range(2):
        function[(1,)](**arguments)
        launch(arguments["x"])
    assert (len(seen), len(asked)) == (0, 4)
