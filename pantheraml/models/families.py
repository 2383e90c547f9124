"""Exceptions to what structure and a probe say about a module, by class name.

Structure proposes a role and a probe decides on its formula, so this table stays short: it lists only what a probe on a
lone module cannot see. Each row says why it is here.
"""

from __future__ import annotations

# Class name of a module -> why it keeps its own forward although it looks and computes like a known role.
KEEP_STOCK: dict[str, str] = {}
