"""What a training step needs on TPU chips, from the TPU compiler, on a machine without a TPU.

The step is the trainer's own: in a process of its own, a model with the shapes asked for, and zeros for weights, is
loaded on as many devices of torch_xla's CPU backend as there are chips, and trained up to the point where its first
step would run. The program noted until then is compiled ahead of time by libtpu for the chips' topology, in another
process, and is never run.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import xla_runtime
from ..errors import ConfigError, MissingDependencyError, ModelNotFoundError, UnsupportedError
from ..parallel.xla import MultiTPUConfig, setup_multi_tpu

_GIB = 1024**3
# Generation -> bytes of memory of a chip (https://cloud.google.com/tpu/docs/v5e, /v6e).
HBM = {"v5e": 16 * _GIB, "v6e": 32 * _GIB}
# Chips of a slice -> how they stand.
_GRIDS = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# The kind of a collective, and its channel: one that runs beside other work stands in several fusions.
_COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*?\bchannel_id=(\d+)"
)
_KERNEL = 'custom_call_target="tpu_custom_call"'
# How the compiler says that a program does not fit, with what it needs at least.
_TOO_LARGE = (
    re.compile(r"Used (?P<size>[\d.]+)(?P<unit>[KMG]) of [\d.]+[KMG] hbm"),
    re.compile(r"Allocation \(size=(?P<size>\d+)\)(?P<unit>) would exceed memory"),
)
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": _GIB}
_NOT_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja")
_WHERE = "estimate_tpu_step"


@dataclass(frozen=True)
class TPUEstimate:
    """What the compiler says of one training step. Figures are bytes of each chip.

    Attributes:
        tpu: The slice, as ``"v5e-8"``.
        topology: How its chips stand, as ``"v5e:2x4"``.
        chips: Their number.
        parameters: Weights of the whole model, adapters included.
        trainable: Those that are trained.
        rows: Rows of the whole batch.
        seq_length: Tokens of a row.
        arguments: Weights, optimizer states and the batch; None where the program does not fit.
        temporaries: Activations, gradients and gathered weights; None where the program does not fit.
        outputs: What the step returns; None where the program does not fit.
        updated: Outputs that take the place of arguments, part of both; None where the program does not fit.
        code: The program; None where it does not fit.
        needed: All of it, what is part of both once; at least this where the program does not fit.
        hbm: Memory of a chip.
        fits: Whether the compiler could place the program in the chip's memory.
        kernels: Calls of Pallas kernels in the compiled program, of each layer's attention for long rows.
        collectives: How many communications of each kind the compiled program has.
        trace_seconds: Time that noting the step took.
        compile_seconds: Time that compiling it took.
    """

    tpu: str
    topology: str
    chips: int
    parameters: int
    trainable: int
    rows: int
    seq_length: int
    arguments: int | None
    temporaries: int | None
    outputs: int | None
    updated: int | None
    code: int | None
    needed: int
    hbm: int
    fits: bool
    kernels: int
    collectives: dict[str, int]
    trace_seconds: float
    compile_seconds: float


def slice_of(tpu: str) -> tuple[str, str, int]:
    """Name, topology and chips of a slice.

    Args:
        tpu: ``"v5e-8"`` or ``"v5e:2x4"``.

    Raises:
        ConfigError: another one, or one whose chips' memory is not known here.
    """
    found = re.fullmatch(r"(v\d\w*)(?:-(\d+)|:(\d+)x(\d+))", tpu.strip().lower())
    generation = found[1] if found else ""
    grids = {f"{generation}-{count}": (grid, count) for count, grid in _GRIDS.items()}
    grids |= {f"{generation}:{grid}": (grid, count) for count, grid in _GRIDS.items()}
    if generation not in HBM or tpu.strip().lower() not in grids:
        raise ConfigError(
            f"unknown TPU {tpu!r}",
            where=_WHERE,
            hint=f"use {' or '.join(HBM)} with {', '.join(map(str, _GRIDS))} chips, as 'v5e-8' or 'v5e:2x4'",
        )
    grid, count = grids[tpu.strip().lower()]
    return f"{generation}-{count}", f"{generation}:{grid}", count


def estimate_tpu_step(
    model: str,
    tpu: str | Sequence[str],
    *,
    max_seq_length: int = 2048,
    per_device_train_batch_size: int = 1,
    mesh_shape: Sequence[int] | None = None,
    lora_r: int | None = 16,
    use_gradient_checkpointing: bool = True,
) -> list[TPUEstimate]:
    """Compile a model's training step for TPU slices, without a TPU and without its weights.

    It takes minutes, and memory of this machine: first for the weights, then for the compiler.

    Args:
        model: Folder or hub id. Its config and tokenizer are read, its weights are not.
        tpu: One slice, or several with the same number of chips: ``"v5e-8"``, ``"v6e:2x4"``.
        max_seq_length: Tokens of a row.
        per_device_train_batch_size: Rows of each chip along the mesh's axis ``fsdp``.
        mesh_shape: Chips along ``fsdp`` and ``tensor``; None is all along ``fsdp``.
        lora_r: Rank of LoRA on the default layers; None trains everything.
        use_gradient_checkpointing: Whether activations are computed again.

    Returns:
        An estimate for each slice, in their order.

    Raises:
        MissingDependencyError: torch_xla, libtpu or jax is not installed; the text has the install line.
        ConfigError: an unknown slice, slices of several sizes, or a mesh that is not one of their chips.
        ModelNotFoundError: the folder has no config.
        UnsupportedError: the step could not be traced or compiled.
    """
    slices = [slice_of(name) for name in ([tpu] if isinstance(tpu, str) else tpu)]
    if len({chips for _, _, chips in slices}) != 1:
        raise ConfigError(f"the slices {tpu} differ in their chips", where=_WHERE, hint="estimate them one by one")
    missing = [name for name in ("torch_xla", "libtpu", "jax") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"compiling for a TPU needs what is not installed: {', '.join(missing)}",
            where=_WHERE,
            hint=f"in an environment with torch 2.9: {xla_runtime.INSTALL}",
        )
    chips = slices[0][2]
    mesh = MultiTPUConfig(num_cores=chips, mesh_shape=mesh_shape or (chips, 1)).mesh_shape
    assert mesh is not None
    request = {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "mesh": mesh,
        "length": max_seq_length,
        "rows": per_device_train_batch_size,
        "r": lora_r,
        "checkpointing": use_gradient_checkpointing,
    }
    estimates = []
    with tempfile.TemporaryDirectory(prefix="pantheraml-estimate-") as folder:
        program = Path(folder) / "step.hlo"
        # libtpu would ask the cloud who it is, and would refuse to be loaded while another process has it.
        alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
        environment = alone | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(chips), "PANTHERAML_DEVICE": "xla"}
        traced = _in_process("tracing the step", "trace", request | {"program": str(program)}, environment)
        for name, topology, _ in slices:
            asked = {"program": str(program), "topology": topology}
            compiled = _in_process(f"compiling the step for {topology}", "compile", asked, alone)
            estimates.append(_estimate(name, topology, request, traced, compiled))
    return estimates


def _estimate(
    name: str, topology: str, request: dict[str, Any], traced: dict[str, Any], compiled: dict[str, Any]
) -> TPUEstimate:
    hbm = HBM[topology.partition(":")[0]]
    figures = {key: compiled.get(key) for key in ("arguments", "temporaries", "outputs", "updated", "code")}
    needed = compiled["needed"]
    return TPUEstimate(
        tpu=name,
        topology=topology,
        chips=math.prod(request["mesh"]),
        parameters=traced["parameters"],
        trainable=traced["trainable"],
        rows=request["rows"] * request["mesh"][0],
        seq_length=request["length"],
        **figures,
        needed=needed,
        hbm=hbm,
        fits=compiled["placed"] and needed <= hbm,
        kernels=compiled["kernels"],
        collectives=compiled["collectives"],
        trace_seconds=traced["seconds"],
        compile_seconds=compiled["seconds"],
    )


def _in_process(what: str, job: str, request: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Run a job of this file in a process of its own, which devices and libtpu need, and return its answer."""
    answer = Path(request["program"]).with_suffix(f".{job}.json")
    command = [sys.executable, "-m", __name__, job, json.dumps(request | {"answer": str(answer)})]
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not answer.is_file():
        raise UnsupportedError(
            f"{what} failed",
            where=request.get("model", request.get("topology")),
            why=_error_of(done.stdout) or f"its process ended with {done.returncode}",
            hint="a process that is killed (-9) had too little memory on this machine" if done.returncode < 0 else None,
        )
    return json.loads(answer.read_text())


def _error_of(output: str) -> str:
    """The text of the exception that a Python process ended with, else its last lines."""
    lines = output.strip().rpartition("Traceback (most recent call last):")[2].strip("\n").splitlines()
    frames = next((index for index, line in enumerate(lines) if line and not line.startswith(" ")), 0)
    return "\n".join(lines[frames:][-8:])


# ---------------------------------------------------------------- tracing, in its own process


def _trace(request: dict[str, Any]) -> dict[str, Any]:
    """Note one step of the trainer, past the first ones, as a program."""
    from datasets import Dataset
    from trl import SFTTrainer

    from ..models.loader import FastLanguageModel
    from .trainer import PantheraMLTrainingArguments

    start, full = time.monotonic(), request["r"] is None
    chips = math.prod(request["mesh"])
    xla_runtime.note_for_tpu()
    setup_multi_tpu(MultiTPUConfig(mesh_shape=request["mesh"]))
    with tempfile.TemporaryDirectory(prefix="pantheraml-model-") as folder:
        without_weights(request["model"], Path(folder))
        model, tokenizer = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=request["length"],
            load_in_4bit=False,
            full_finetuning=full,
            use_tpu=True,
            tpu_cores=chips,
            use_gradient_checkpointing=request["checkpointing"],
        )
    if not full:
        model = FastLanguageModel.get_peft_model(
            model, r=request["r"], lora_alpha=request["r"], use_gradient_checkpointing=request["checkpointing"]
        )
    rows = [[1] * request["length"]] * (request["rows"] * chips)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        args=PantheraMLTrainingArguments(
            output_dir=str(Path(request["program"]).parent / "run"),
            per_device_train_batch_size=request["rows"],
            gradient_accumulation_steps=1,
            max_length=request["length"],
            max_steps=10,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _make_states(trainer.create_optimizer(), trained)
    program = _note_step(trainer)
    Path(request["program"]).write_bytes(program)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in trained),
        "seconds": round(time.monotonic() - start, 1),
    }


def without_weights(model: str, folder: Path) -> None:
    """Make a folder to load a model from: config and tokenizer copied, and zeros for weights, which take no space.

    Args:
        model: Folder or hub id.
        folder: Empty.

    Raises:
        ModelNotFoundError: there is no config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = Path(model)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(model, allow_patterns=list(_NOT_WEIGHTS)))
    if not (source / "config.json").is_file():
        raise ModelNotFoundError(f"{model} has no config.json", where=_WHERE, hint="name a folder or hub id of a model")
    for pattern in _NOT_WEIGHTS:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, folder / file.name)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    header, end, seen = {}, 0, set()
    for name, tensor in shapes.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # Tied weights are there once.
            seen.add(id(tensor))
            size = 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _make_states(optimizer: Any, trained: Sequence[Any]) -> None:
    """Give the optimizer the states that it has after its first step, divided as that step leaves them."""
    for parameter in trained:
        # Not zeros_like: the compiler would see a constant, and leave what is made of it whole on each device.
        parameter.grad = parameter.detach() * 0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    xla_runtime.sync(wait=True)


class _NotedError(Exception):
    """The step is noted and must not run."""


def _note_step(trainer: Any) -> bytes:
    """Train up to the point where the first step would be compiled, and return its program."""
    from transformers import TrainerCallback

    noted: dict[str, Any] = {}

    class Begin(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            sync(wait=True)
            noted["compilations"] = xla_runtime.counters().compilations

    def note(*, wait: bool = False) -> None:
        if "compilations" not in noted:
            return sync(wait=wait)
        if xla_runtime.counters().compilations != noted["compilations"]:
            raise RuntimeError("part of the step has run already, so what is noted is not all of it")
        noted["program"] = xla_runtime.pending_program()
        raise _NotedError

    sync = xla_runtime.sync
    xla_runtime.sync = note  # type: ignore[assignment]
    trainer.add_callback(Begin())
    try:
        with contextlib.suppress(_NotedError):
            trainer.train()
    finally:
        xla_runtime.sync = sync
    return noted["program"]


# ---------------------------------------------------------------- compiling, in its own process


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    """Compile a program for a topology with libtpu, through jax's client that only compiles."""
    import libtpu

    os.environ["TPU_LIBRARY_PATH"] = libtpu.get_library_path()
    import numpy as np
    from jax._src import compiler
    from jax._src.lib import _jax
    from jax.experimental import topologies

    chips = math.prod(int(side) for side in request["topology"].partition(":")[2].split("x"))
    options = {"chips_per_host_bounds": [1, 1, 1]} if chips == 1 else {}
    topology = topologies.get_topology_desc(topology_name=request["topology"], platform="tpu", **options)
    devices = topology.devices
    settings = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=chips,
        device_assignment=np.array([[device.id for device in devices]]),
        use_spmd_partitioning=chips > 1,
    )
    # As torch_xla compiles.
    settings.executable_build_options.allow_spmd_sharding_propagation_to_output = [True]
    module = _jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(Path(request["program"]).read_bytes()))
    start = time.monotonic()
    try:
        built = devices[0].client.compile(_donating(module), _jax.DeviceList(tuple(devices)), settings)
    except Exception as error:
        found = next((match for match in (form.search(str(error)) for form in _TOO_LARGE) if match), None)
        if found is None:
            raise
        needed = int(float(found["size"]) * _UNITS[found["unit"]])
        seconds = round(time.monotonic() - start, 1)
        return {"placed": False, "needed": needed, "kernels": 0, "collectives": {}, "seconds": seconds}
    seconds = round(time.monotonic() - start, 1)
    figures = built.get_compiled_memory_stats()
    sizes = {
        "arguments": figures.argument_size_in_bytes,
        "temporaries": figures.temp_size_in_bytes,
        "outputs": figures.output_size_in_bytes,
        "updated": figures.alias_size_in_bytes,
        "code": figures.generated_code_size_in_bytes,
    }
    needed = sum(sizes.values()) - 2 * sizes["updated"]
    text = built.hlo_modules()[0].to_string()
    channels = sorted(set(_COLLECTIVES.findall(text)))
    collectives = dict(collections.Counter(kind for kind, _ in channels))
    found = {"kernels": text.count(_KERNEL), "collectives": collectives}
    return sizes | found | {"placed": True, "needed": needed, "seconds": seconds}


def _donating(module: Any) -> bytes:
    """The module with the memory of every argument free for an output of its shape: what the step updates in place."""
    text = module.decode() if isinstance(module, bytes) else str(module)
    start = text.index("@main(")
    end = text.index("->", start)
    arguments = re.sub(r"(%arg\d+: tensor<[^>]*>) \{", r"\1 {jax.buffer_donor = true, ", text[start:end])
    arguments = re.sub(r"(%arg\d+: tensor<[^>]*>)(?! \{)", r"\1 {jax.buffer_donor = true}", arguments)
    return (text[:start] + arguments + text[end:]).encode()


def _main(job: str, request: dict[str, Any]) -> None:
    answer = {"trace": _trace, "compile": _compile}[job](request)
    Path(request["answer"]).write_text(json.dumps(answer))
    # Nothing that is noted and pending may run while the interpreter ends.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
