"""A process that measures some contenders; ``run.py`` starts and commands it.

Peers get processes of their own because importing some of them changes torch and transformers for the whole process.
One JSON object a line comes in (``case``: number of the case, ``milliseconds``: for timed calls, null to call once)
and one goes out. Only one process is given something to time at a time; meanwhile the others wait for input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Contenders of each process; "native" takes all that no other names.
GROUPS = {"native": None, "unsloth": ("unsloth",), "torch.compile": ("torch.compile",)}


def names_of(group: str, case: Any) -> list[str]:
    """Contenders of the group for a case."""
    wanted = GROUPS[group]
    if wanted is None:
        others = {name for names in GROUPS.values() if names for name in names}
        # ours before eager, so that they can be compared
        return sorted(
            (n for n in case.workload.contenders if n not in others), key=lambda n: (n != "ours", n != "eager")
        )
    if group == "torch.compile":
        return list(wanted) if case.compiled else []
    return [name for name in wanted if name in case.workload.contenders]


def main() -> None:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", required=True)
    parser.add_argument("--ops", required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    # Whatever a package prints goes to the error stream.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
    ready: dict[str, Any] = {"ready": True}
    if options.group == "unsloth":
        try:
            import unsloth  # noqa: F401 - before torch and transformers, as its users do
        except Exception as error:  # noqa: BLE001 - recorded in the report
            ready["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    import cases
    import timing
    import torch

    if options.group == "torch.compile":
        from torch._functorch import config

        # The backward is timed several times over one forward.
        config.donated_buffer = False
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    everything = cases.all_cases(options.ops.split(","), tiny=options.dry_run)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer(ready)
    for line in sys.stdin:
        command = json.loads(line)
        if command["case"] is None:
            answer({"copy_bytes_per_second": timing.copy_bandwidth(device)})
            continue
        case = everything[command["case"]]
        names = names_of(options.group, case)
        milliseconds = command["milliseconds"]
        if milliseconds is None:
            # eager and the yardsticks have nothing to compile
            names = [name for name in names if name in ("ours", "liger", "unsloth", "torch.compile")]
        try:
            answer(timing.measure(case.workload, names, device, milliseconds=milliseconds))
        except Exception as error:  # noqa: BLE001 - such as inputs that do not fit; recorded for every contender
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            answer({name: {"error": text} for name in names})
        if options.group == "torch.compile":
            torch.compiler.reset()


if __name__ == "__main__":
    main()
