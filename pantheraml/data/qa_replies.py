"""What a model replied when asked for questions, answers or ratings in JSON, taken for nothing it is not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

LOWEST_RATING, HIGHEST_RATING = 1.0, 10.0

# NUL, and halves of surrogate pairs, which JSON escapes can spell and files cannot hold.
_DAMAGE = re.compile("[\x00\ud800-\udfff]")

Pair = dict[str, str]


def _objects(reply: str, dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    """Every complete JSON object of a reply, whatever stands around it; what is broken counts as dropped."""
    decoder = json.JSONDecoder()
    position = reply.find("{")
    if position < 0:
        dropped["no json"] += 1
    while position >= 0:
        try:
            value, position = decoder.raw_decode(reply, position)
        except (ValueError, RecursionError):
            dropped["broken json"] += 1
            position = reply.find("{", position + 1)
            continue
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(value) == 1 and len(lists) == 1:
            yield from (item for item in lists[0] if isinstance(item, dict))
        else:
            yield value
        position = reply.find("{", position)


def parse_pairs(reply: str, dropped: Counter[str], known: Sequence[Pair] = ()) -> list[Pair]:
    """Read the questions and answers of a model's reply.

    Args:
        reply: The reply. Text around the JSON is passed over.
        dropped: Counts what is not kept, by reason: ``no json``, ``broken json``, ``wrong form`` (another key, or a
            value that is no text), ``empty``, ``damaged text``, ``repeated``.
        known: Pairs whose questions are not to come again.

    Returns:
        The pairs that hold a question and an answer, stripped.
    """
    seen = {pair["question"].casefold() for pair in known}
    pairs: list[Pair] = []
    for item in _objects(reply, dropped):
        question, answer = item.get("question"), item.get("answer")
        if set(item) != {"question", "answer"} or not isinstance(question, str) or not isinstance(answer, str):
            dropped["wrong form"] += 1
            continue
        pair = {"question": question.strip(), "answer": answer.strip()}
        if not all(pair.values()):
            dropped["empty"] += 1
        elif _DAMAGE.search(question + answer):
            dropped["damaged text"] += 1
        elif pair["question"].casefold() in seen:
            dropped["repeated"] += 1
        else:
            seen.add(pair["question"].casefold())
            pairs.append(pair)
    return pairs


def parse_ratings(reply: str, count: int) -> dict[int, float]:
    """Read the ratings of a model's reply: of each id from 0 to below ``count`` the first one between 1 and 10."""
    ratings: dict[int, float] = {}
    for item in _objects(reply, Counter()):
        index, rating = item.get("id"), item.get("rating")
        if (
            isinstance(index, int)
            and not isinstance(index, bool)
            and 0 <= index < count
            and isinstance(rating, int | float)
            and not isinstance(rating, bool)
            and LOWEST_RATING <= rating <= HIGHEST_RATING
        ):
            ratings.setdefault(index, float(rating))
    return ratings
