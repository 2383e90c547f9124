"""SentencePiece's greedy merging, as llama.cpp does it: an independent reading of what a GGUF file says."""

from __future__ import annotations

import re
from collections.abc import Sequence

import gguf

_WHOLE = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)


def greedy_ids(
    text: str, tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], *, space_prefix: bool
) -> list[int]:
    """Encode a short text.

    Args:
        text: The text; the time grows with the square of its length.
        tokens: Tokens by id.
        types: Their kinds.
        scores: Their scores: of two neighbouring pieces that make a token, the pair with the highest is joined first.
        space_prefix: Whether the text gets a space in front.

    Returns:
        Ids, without bos and eos.
    """
    unused = int(gguf.TokenType.UNUSED)
    index = {token: i for i, token in enumerate(tokens) if types[i] != unused}
    whole = sorted((token for i, token in enumerate(tokens) if types[i] in _WHOLE), key=len, reverse=True)
    fragments = re.split("(" + "|".join(map(re.escape, whole)) + ")", text) if whole else [text]
    ids: list[int] = []
    for position, fragment in enumerate(fragments):
        if position % 2:
            ids.append(index[fragment])
        elif fragment:
            raw = (" " if space_prefix else "") + fragment
            ids += _merged(list(raw.replace(" ", "\u2581")), index, scores)
    return ids


def _merged(pieces: list[str], index: dict[str, int], scores: Sequence[float]) -> list[int]:
    while True:
        pairs = [
            (-scores[index[joined]], place)
            for place in range(len(pieces) - 1)
            if (joined := pieces[place] + pieces[place + 1]) in index
        ]
        if not pairs:
            break
        place = min(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    ids: list[int] = []
    for piece in pieces:
        ids += [index[piece]] if piece in index else [index[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return ids
