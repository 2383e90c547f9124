"""Rate and memory of preparing files of many rows, from the file to a trainer that is ready.

    python benchmarks/data/large.py --rows 100000 1000000 --out benchmarks/reports

Each number of rows gets a process of its own, which reads and checks a file of short chats and constructs an
`SFTTrainer` (rendering, token ids, labels), as `pantheraml --dataset FILE` does. Its memory and that of its children
is read from
`/proc` every 50 ms and added up: "anonymous" is what the processes hold themselves, "resident" counts mapped files as
well, which the system takes back when it needs the memory. The chats and the tokenizer are those of `tokenise.py`.
Nothing is read from a cache. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tokenise import ROOT, VERSIONS, VOCABULARY, cpu_name, draw_chats, make_model, make_tokenizer, prepare

FORMS = ("messages", "sharegpt", "alpaca")


def write_rows(path: Path, rows: int, form: str) -> None:
    """A json lines file of chats in one of the forms."""
    with path.open("w", encoding="utf-8") as file:
        for chat in draw_chats(rows):
            if form == "alpaca":
                row: dict[str, object] = {"instruction": chat[0]["content"], "input": "", "output": chat[1]["content"]}
            elif form == "sharegpt":
                turns = [{"from": m["role"].replace("user", "human"), "value": m["content"]} for m in chat]
                row = {"conversations": turns}
            else:
                row = {"messages": chat}
            file.write(json.dumps(row) + "\n")


def work(path: Path, directory: Path) -> None:
    """The measured process: says on standard output when each part begins, and at last how many rows and tokens."""
    import datasets

    from pantheraml.data import formats, sources

    print("loading the model", flush=True)
    model, tokenizer = make_model(directory, make_tokenizer(list(draw_chats(20_000))))
    print("reading and checking", flush=True)
    loaded = sources.load(path)
    format = formats.detect(loaded.dataset)
    checked = formats.check(loaded.dataset, format, rejections=loaded.rejections, origin=loaded.origin)
    print("preparing", flush=True)
    trainer = prepare(checked, model, tokenizer, directory)
    print("counting", flush=True)
    batches = trainer.train_dataset.with_format("arrow").iter(1000)
    tokens = sum(len(batch.column("input_ids").combine_chunks().flatten()) for batch in batches)
    print(json.dumps({"rows": len(trainer.train_dataset), "tokens": tokens, "datasets": datasets.__version__}))


def memory(process: psutil.Process) -> tuple[int, int, int]:
    """Anonymous and resident bytes of a process and its children, and how many they are."""
    anonymous = resident = count = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
        except OSError:
            continue
        found = dict(re.findall(r"^(RssAnon|VmRSS):\s+(\d+) kB", status, re.M))
        anonymous += 1024 * int(found.get("RssAnon", 0))
        resident += 1024 * int(found.get("VmRSS", 0))
        count += 1
    return anonymous, resident, count


def measure(rows: int, form: str) -> dict[str, object]:
    """Run the work on a new file, in a new process with a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows, form)
        environment = os.environ | {"HF_DATASETS_CACHE": str(Path(folder) / "cache"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--work", str(path), str(Path(folder) / "model")]
        told = Path(folder) / "told.txt"
        with told.open("w") as output:
            process = subprocess.Popen(command, stdout=output, env=environment)
        watched, parts, lines = psutil.Process(process.pid), {}, ["starting"]
        began = time.perf_counter()
        while process.poll() is None:
            now, found = time.perf_counter(), told.read_text().splitlines()
            parts.setdefault(lines[-1], [0.0, 0, 0, 0])[0] = now - began
            if found and found != lines:
                began, lines = now, found
            part = parts.setdefault(lines[-1], [0.0, 0, 0, 0])
            part[1:] = map(max, part[1:], memory(watched))
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(f"the measured process ended with code {process.returncode}")
        return {
            "form": form,
            "bytes": path.stat().st_size,
            "parts": parts,
            **json.loads(told.read_text().splitlines()[-1]),
        }


def report(results: list[dict], rows: list[int], forms: list[str]) -> str:
    """The figures as markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"# Preparing files of many rows on {cpu_name()}, {cores} cores",
        "",
        f"{datetime.date.today()}; Python {platform.python_version()}, {versions}.",
        f"Short chats in json lines files, vocabulary {VOCABULARY:,}.",
        f"Command: `python benchmarks/data/large.py --rows {' '.join(map(str, rows))} --forms {' '.join(forms)}`.",
        "",
        "| rows | file, MB | part | seconds | rows/s | peak anonymous, MB | peak resident, MB | processes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for part in ("loading the model", "reading and checking", "preparing"):
            seconds, anonymous, resident, count = result["parts"][part]
            rate = f"{result['rows'] / seconds:,.0f}" if part != "loading the model" else ""
            name = f"{result['rows']:,} ({result['form']}) | {result['bytes'] / 1e6:,.0f}"
            sizes = f"{anonymous / 1e6:,.0f} | {resident / 1e6:,.0f} | {count}"
            lines.append(f"| {name} | {part} | {seconds:.1f} | {rate} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--forms", choices=FORMS, nargs="+", default=["messages"])
    parser.add_argument("--out", type=Path, default=None, help="folder for the report; without it, only printed")
    parser.add_argument("--work", type=Path, nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    results = [measure(rows, form) for form in args.forms for rows in args.rows]
    text = report(results, args.rows, args.forms)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "_", cpu_name().lower()).strip("_")
        (args.out / f"data-large_{name}_{datetime.date.today()}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
