"""The generic exercises on which the demo's base model is pretrained.

They teach it to copy, look up, reorder and describe what a short English text says. None of them has the instruction or
the answer format of the demo's own task, which is what the fine-tune has to add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pantheraml.assets.build.words import CITIES, COLORS, DAYS, FIRST_NUMBER, ITEMS, NAMES, NUMBERS, Source

Exercise = tuple[str, str]

SENTENCES = (
    "{name} lives in {city}.",
    "{name} has {count} {color} {items}.",
    "{name} bought {count} {items} in {city}.",
    "{name} will travel to {city} on {day}.",
    "There are {count} {color} {items} in {city}.",
    "The {color} {item} belongs to {name}.",
    "On {day} {name} sold {count} {color} {items}.",
    "{name}, who works in {city}, likes {color} {items}.",
    "Last {day} a {color} {item} was found in {city}.",
    "{count} {items} were sent to {name} on {day}.",
    "We met {name} in {city} on {day} and saw {count} {color} {items}.",
    "In {city}, {name} gave away {count} {color} {items} last {day}.",
    "{name} paid for {count} {color} {items}. The shop is in {city} and opens on {day}.",
    "Every {day} the market of {city} shows {count} {color} {items}, says {name}.",
    "{color} {items} are cheap in {city}: {name} took {count} on {day}.",
    "Dear {name}, your {count} {color} {items} arrive in {city} on {day}.",
)

FIELDS = ("name", "city", "count", "color", "item", "day")

# What a field is called in questions and in records.
LABELS = {
    "name": ("name", "person", "who"),
    "city": ("city", "place", "where"),
    "count": ("count", "number", "how many"),
    "color": ("color", "colour", "shade"),
    "item": ("item", "thing", "what"),
    "day": ("day", "date", "when"),
}

INVENTED_SHARE = 0.3


def _value(source: Source, words: Sequence[str]) -> str:
    return source.invented().capitalize() if source.unit() < INVENTED_SHARE else source.pick(words)


def described(source: Source) -> tuple[str, dict[str, str]]:
    """A text of one sentence, and the value of each field that it states."""
    number = source.below(len(NUMBERS))
    digits = str(number + FIRST_NUMBER)
    item = source.invented() if source.unit() < INVENTED_SHARE else source.pick(ITEMS)
    values = {
        "name": _value(source, NAMES),
        "city": _value(source, CITIES),
        "count": digits,
        "color": source.pick(COLORS),
        "item": item,
        "day": source.pick(DAYS),
    }
    template = source.pick(SENTENCES)
    written = {**values, "items": f"{item}s", "count": digits if source.unit() < 0.5 else NUMBERS[number]}
    text = template.format(**written)
    stated = {field: values[field] for field in FIELDS if f"{{{field}" in template}
    return text[0].upper() + text[1:], stated


def question(source: Source) -> Exercise:
    """Ask for one field of a sentence."""
    text, values = described(source)
    field = source.pick(list(values))
    label = source.pick(LABELS[field])
    wording = source.pick(("Text: {0}\nTell me the {1}.", "{0} {1}?", "Read: {0}\n{1}?", "Find the {1}: {0}"))
    return wording.format(text, label), values[field]


def record(source: Source) -> Exercise:
    """Ask for several fields of a sentence in a given order and layout."""
    text, values = described(source)
    fields = source.sample(list(values), 1 + source.below(len(values)))
    labels = [source.pick(LABELS[field]) for field in fields]
    found = [values[field] for field in fields]
    layout = source.below(7)
    if layout == 0:
        answer = "\n".join(f"{label}: {value}" for label, value in zip(labels, found))
        style = "List"
    elif layout == 1:
        answer = " | ".join(found)
        style = "Row"
    elif layout == 2:
        answer = "; ".join(f"{label} = {value}" for label, value in zip(labels, found))
        style = "Pairs"
    elif layout == 3:
        answer = "".join(f"<{label}>{value}</{label}>" for label, value in zip(labels, found))
        style = "Tags"
    elif layout == 4:
        answer = ", ".join(f'"{value}"' for value in found)
        style = "Quote"
    elif layout == 5:
        answer = "[" + ", ".join(f'{label} "{value}"' for label, value in zip(labels, found)) + "]"
        style = "Box"
    else:
        answer = ",".join(f"{label}:{value}" for label, value in zip(labels, found))
        style = "Pack"
    return f"{style} the {', '.join(labels)} in this text: {text}", answer


def _words(source: Source, low: int, high: int) -> list[str]:
    pools: tuple[Sequence[str], ...] = (NAMES, CITIES, ITEMS, COLORS, DAYS, NUMBERS)
    count = low + source.below(high - low + 1)
    if source.unit() < 0.4:
        pool = source.pick(pools)
        return source.sample(pool, min(count, len(pool)))
    return [source.invented() if source.unit() < 0.5 else source.pick(source.pick(pools)) for _ in range(count)]


def copy(source: Source) -> Exercise:
    """Repeat a list of words."""
    words = " ".join(_words(source, 2, 9))
    return source.pick(("Repeat: {0}", "Say this again: {0}", "Copy the words {0}")).format(words), words


def backwards(source: Source) -> Exercise:
    """Give a list of words in reverse order."""
    words = _words(source, 2, 6)
    wording = source.pick(("Reverse: {0}", "Backwards please: {0}"))
    return wording.format(", ".join(words)), ", ".join(reversed(words))


def position(source: Source) -> Exercise:
    """Give the first, second, third or last word of a list."""
    words = _words(source, 3, 7)
    name, index = source.pick((("first", 0), ("second", 1), ("third", 2), ("last", -1)))
    return f"Which word is {name}: {', '.join(words)}", words[index]


def lookup(source: Source) -> Exercise:
    """Look a key up in a list of pairs."""
    keys = _words(source, 2, 5)
    pairs = dict(zip(keys, _words(source, 5, 5)))
    key = source.pick(list(pairs))
    if source.unit() < 0.5:
        table = "{" + ", ".join(f'"{k}": "{v}"' for k, v in pairs.items()) + "}"
    else:
        table = "; ".join(f"{k} -> {v}" for k, v in pairs.items())
    return f"Given {table} what is {key}?", pairs[key]


def digits(source: Source) -> Exercise:
    """Write number words in digits, or the other way round."""
    chosen = [source.below(len(NUMBERS)) for _ in range(1 + source.below(4))]
    words, figures = " ".join(NUMBERS[i] for i in chosen), " ".join(str(i + FIRST_NUMBER) for i in chosen)
    return (f"In digits: {words}", figures) if source.unit() < 0.7 else (f"In words: {figures}", words)


def singular(source: Source) -> Exercise:
    """Take the plural s from words."""
    words = [source.invented() if source.unit() < 0.5 else source.pick(ITEMS) for _ in range(1 + source.below(4))]
    return "Just one of each: " + " ".join(f"{word}s" for word in words), " ".join(words)


# Each exercise with its share of the pretraining mix.
MIX: tuple[tuple[Callable[[Source], Exercise], float], ...] = (
    (question, 0.2),
    (record, 0.4),
    (copy, 0.13),
    (backwards, 0.05),
    (position, 0.05),
    (lookup, 0.09),
    (digits, 0.04),
    (singular, 0.04),
)


def exercise(source: Source) -> Exercise:
    """One exercise of the mix: what the user says and what the assistant answers."""
    point = source.unit() * sum(share for _, share in MIX)
    for make, share in MIX:
        point -= share
        if point < 0:
            return make(source)
    return MIX[-1][0](source)
