"""The data set of the demo: free-text orders and the JSON record that each of them states.

People and places of the test split never occur in the training split, so a model that is right on the test split has
learned the task and not the rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pantheraml.assets.build.words import CITIES, COLORS, DAYS, FIRST_NUMBER, ITEMS, NAMES, NUMBERS, Source

SEED = 3407
TRAIN_ROWS = 2000
TEST_ROWS = 96
HELD_OUT = 5  # every fifth name and city belongs to the test split

ORDERS = (
    "{name} from {city} wants {count} {color} {items} by {day}.",
    "Please send {count} {color} {items} to {name} in {city} before {day}.",
    "On {day} {name} needs {count} {color} {items} in {city}.",
    "{count} {color} {items} for {name}, {city}, {day}.",
    "This is {name} calling from {city}. I need {count} {color} {items} on {day}.",
    "Our shop in {city} is out of {color} {items}. Can we get {count} by {day}? Thanks, {name}",
)


def row(source: Source, names: Sequence[str], cities: Sequence[str]) -> dict[str, str]:
    """One order as ``prompt`` and its record, one line of JSON, as ``completion``."""
    number = source.below(len(NUMBERS))
    record = {
        "name": source.pick(names),
        "city": source.pick(cities),
        "count": number + FIRST_NUMBER,
        "color": source.pick(COLORS),
        "item": source.pick(ITEMS),
        "day": source.pick(DAYS),
    }
    written = NUMBERS[number] if source.unit() < 0.5 else str(record["count"])
    order = source.pick(ORDERS).format(**{**record, "items": record["item"] + "s", "count": written})
    return {"prompt": f"Order: {order[0].upper()}{order[1:]}\n", "completion": json.dumps(record)}


def split(name: str) -> list[dict[str, str]]:
    """All rows of a split.

    Args:
        name: ``"train"`` or ``"test"``.

    Returns:
        Rows with ``prompt`` (ends in a newline) and ``completion`` (a JSON object on one line).
    """
    test = name == "test"
    names = [word for i, word in enumerate(NAMES) if (i % HELD_OUT == 0) == test]
    cities = [word for i, word in enumerate(CITIES) if (i % HELD_OUT == 0) == test]
    source = Source(SEED + test)
    return [row(source, names, cities) for _ in range(TEST_ROWS if test else TRAIN_ROWS)]


def write(directory: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` into ``directory``."""
    for name in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in split(name))
        (directory / f"{name}.jsonl").write_bytes(lines.encode())
