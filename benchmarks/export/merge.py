"""Merging a model beside copying its files, and the embedded demo model to q8_0, on this machine's disk.

    python benchmarks/export/merge.py --layers 8 --folder /path/on/the/disk --out benchmarks/reports

The model has the widths of Llama 3.1 8B (random weights, bf16) and `--layers` of its 32 layers; LoRA of rank 16 is on
all linear layers. "copy" copies the files of its folder and flushes them to the disk, as a save does. "merge" is
`save_pretrained_merged` without its check, "merge and verify" with it. Each is timed in turn, and from the same start:
the disk's queue is empty, the base's files are in the page cache, and as much memory as will be written has just been
touched and given back. The last is for virtual machines, which take several times as long to write into memory that
their host must find first. Before each it is waited, up to 90 seconds, for other processes to leave the cores alone;
what these took all the same is told as CPU seconds of others. CPU seconds are those of this process, whatever else the
machine does. Memory is the peak of the process while it merges, less what it held before.
"""

from __future__ import annotations

import argparse
import datetime
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

WIDTHS = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SHARD = 5 * 10**9
ROOM = 1 << 30  # bytes of memory touched beyond what will be written
QUIET, PATIENCE = 6.0, 90.0  # per cent of the cores that others may use, and seconds to wait for that


def build(layers: int, folder: Path) -> Any:
    """The adapted model, and its base saved in ``folder``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=layers, **WIDTHS))
    torch.set_default_dtype(torch.float32)
    base.to_empty(device="cpu")
    with torch.no_grad():
        # Numbers that are cheap to make; compression of the disk, if any, must not see zeros.
        noise = torch.randn(1 << 24).bfloat16() * 0.02
        for parameter in base.parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), noise.numel()):
                part = flat[start : start + noise.numel()]
                part.copy_(noise[: part.numel()])
    base.model.rotary_emb = type(base.model.rotary_emb)(base.config)
    base.save_pretrained(folder, max_shard_size=SHARD)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model


def copy(source: Path, target: Path) -> None:
    """Copy a folder's files, and flush them to the disk."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb+") as file:
            os.fsync(file.fileno())


def settle(folder: Path) -> None:
    """Give each path the same start; see the top."""
    os.sync()
    end = time.monotonic() + PATIENCE
    while psutil.cpu_percent(1.0) > QUIET and time.monotonic() < end:
        pass
    buffer = bytearray(1 << 20)
    size = 0
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    with mmap.mmap(-1, size + ROOM) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, len(memory), mmap.PAGESIZE):
            memory[start] = 1


Timing = tuple[float, float, float]  # seconds, CPU seconds of this process, and of others


def busy() -> float:
    """CPU seconds that all processes have taken since the machine started."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def timed(action: Callable[[], Any]) -> Timing:
    """Time one call."""
    start, used, everything = time.perf_counter(), time.process_time(), busy()
    action()
    used = time.process_time() - used
    return time.perf_counter() - start, used, max(0.0, busy() - everything - used)


class PeakMemory:
    """Largest anonymous memory of this process above what it held at the start, sampled in a thread."""

    def __enter__(self) -> PeakMemory:
        self._start = self._held()
        self.growth = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @staticmethod
    def _held() -> int:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.growth = max(self.growth, self._held() - self._start)


def demo_seconds(folder: Path) -> Timing:
    """Seconds of the demo model's export to q8_0, verified, once it is loaded."""
    import torch

    from pantheraml import FastLanguageModel
    from pantheraml.assets import demo_model_dir

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(demo_model_dir()), max_seq_length=None, dtype=torch.float32, load_in_4bit=False
    )
    return timed(lambda: model.save_pretrained_gguf(folder / "demo", tokenizer, quantization_method="q8_0"))


def demo_command_seconds(folder: Path) -> Timing:
    """Seconds of the whole command, from the start of Python to its end."""
    from pantheraml.assets import demo_model_dir

    command = [sys.executable, "-m", "pantheraml.cli", "export", str(demo_model_dir()), str(folder / "command")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return timed(
        lambda: subprocess.run(
            [*command, "--format", "gguf", "-q", "q8_0"], check=True, capture_output=True, env=environment
        )
    )


def run(layers: int, repeats: int, folder: Path, *, verified: bool) -> dict[str, Any]:
    """All measurements."""
    results: dict[str, Any] = {"demo": [], "command": [], "copy": [], "merge": [], "verified": []}
    results["demo"] = [demo_seconds(folder) for _ in range(repeats)]
    results["command"] = [demo_command_seconds(folder) for _ in range(repeats)]
    model = build(layers, folder / "base")
    results["bytes"] = sum(path.stat().st_size for path in (folder / "base").iterdir())
    results["growth"] = 0

    def merge(name: str, verify: bool) -> Timing:
        from pantheraml.export.merge import save_merged

        settle(folder / "base")
        with PeakMemory() as memory:
            seconds = timed(
                lambda: save_merged(model, folder / name, max_shard_size=SHARD, verify=verify, announce=False)
            )
        if not verify:
            results["growth"] = max(results["growth"], memory.growth)
        shutil.rmtree(folder / name)
        return seconds

    for _ in range(repeats):
        settle(folder / "base")
        results["copy"].append(timed(lambda: copy(folder / "base", folder / "copy")))
        shutil.rmtree(folder / "copy")
        results["merge"].append(merge("merged", verify=False))
        if verified:
            results["verified"].append(merge("verified", verify=True))
    return results


def report(results: dict[str, Any], layers: int) -> str:
    """The Markdown report."""
    import torch
    import transformers

    size, copied = results["bytes"], min(results["copy"])[0]
    rows = []
    for name, key in (("copy", "copy"), ("merge", "merge"), ("merge and verify", "verified")):
        if not results[key]:
            continue
        seconds = [entry[0] for entry in results[key]]
        cpu = min(entry[1] for entry in results[key])
        shown = ", ".join(f"{value:.1f}" for value in seconds)
        others = ", ".join(f"{entry[2]:.1f}" for entry in results[key])
        fastest = min(seconds)
        rows.append(
            f"| {name} | {shown} | {cpu:.1f} | {others} | {size / fastest / 1e6:,.0f} | {fastest / copied:.2f} |"
        )
    walls = {key: ", ".join(f"{entry[0]:.1f}" for entry in results[key]) for key in ("demo", "command")}
    demo_cpu = min(entry[1] for entry in results["demo"])
    return "\n".join(
        [
            f"# Merging beside copying, {platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "",
            f"{datetime.date.today()}; Python {platform.python_version()}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, {torch.get_num_threads()} threads; load average {os.getloadavg()[0]:.1f}.",
            f"Llama of the widths of 8B with {layers} of 32 layers, {size / 1e9:.1f} GB in bf16, shards of 5 GB, LoRA "
            "of rank 16 on all linear layers.",
            "",
            "| path | seconds | CPU seconds (fewest) | of others | MB/s (fastest) | x copy (fastest) |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"While merging, the process held {results['growth'] / 1e9:.2f} GB more than before "
            f"({results['growth'] / SHARD:.2f} shards).",
            "",
            f"The demo model to q8_0, verified: {walls['demo']} s ({demo_cpu:.1f} s of CPU); the whole command "
            f"`pantheraml export`, from the start of Python: {walls['command']} s.",
            "",
        ]
    )


def main() -> None:
    """Parse the command line, measure, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="layers; 32 is the whole 8B")
    parser.add_argument("--repeats", type=int, default=3, help="how often each path is timed")
    parser.add_argument("--unverified", action="store_true", help="leave out the check, which takes a second model")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    parser.add_argument("--out", type=Path, default=None, help="folder for the report; default: print it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measured = run(arguments.layers, arguments.repeats, Path(folder), verified=not arguments.unverified)
        text = report(measured, arguments.layers)
    if arguments.out is None:
        print(text)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"export_{os.cpu_count()}-cores_{datetime.date.today()}.md"
    path.write_text(text, encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
