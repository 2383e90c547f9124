"""Version shims, each in its own file with the condition under which it goes."""

from __future__ import annotations

from .. import env


def install_import_hooks() -> None:
    """Register the hooks that act when TRL is imported; nothing is imported here."""
    if env.trl_shim():
        from .trl import register

        register()
