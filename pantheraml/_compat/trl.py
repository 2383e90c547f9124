"""TRL keyword shim (being written)."""


def register() -> None:
    """Register the post-import hooks."""
