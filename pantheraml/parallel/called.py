"""``python -m pantheraml.parallel.called FOLDER``: what each rank of ``launch(function)`` runs."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

# Files in the folder: the call, the result of rank 0, and the error of the first rank that failed.
CALL, RESULT, FAILURE = "call", "result", "failure"


def main(folder: Path) -> None:
    """Run the call of a folder; rank 0 leaves its result there."""
    import dill

    from .process_group import fail, join_after_restart, leave_at_exit
    from .ranks import get_rank

    with (folder / CALL).open("rb") as file:
        function, args, kwargs = dill.load(file)  # noqa: S301  (the launching process wrote it)
    join_after_restart()
    leave_at_exit()
    try:
        result = function(*args, **kwargs)
        if get_rank() == 0:
            with (folder / RESULT).open("wb") as file:
                dill.dump(result, file, recurse=True)
    except Exception as error:
        fail()
        with contextlib.suppress(FileExistsError), (folder / FAILURE).open("x") as file:
            file.write(f"rank {get_rank()}: {type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
