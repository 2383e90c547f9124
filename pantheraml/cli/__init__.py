"""Command line: ``pantheraml`` with flags fine-tunes; ``pantheraml COMMAND`` does one of the other things.

Nothing here or in ``parser`` imports torch, so that ``--help`` answers at once; commands import what they need to run.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Sequence

from .boundary import Boundary
from .parser import COMMANDS, build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name. Default: those of the process.

    Returns:
        The exit code; ``pantheraml --help`` lists them.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # The flags may be given their command's name.
        arguments = arguments[1:]
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "train"
    parser = build_parser(command)
    if command == "train" and not arguments:
        parser.print_help()
        return 0
    debug = "--debug" in arguments
    with Boundary(debug=debug) as boundary, warnings.catch_warnings():
        if not debug:
            # Deprecations inside the libraries are for their developers.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # It warns of optional accelerators as it is imported; `pantheraml doctor` tells which of them matter.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        args = parser.parse(arguments)
        args.argv = arguments
        module = importlib.import_module(f".commands.{command}", __name__)
        boundary.exit_code = module.run(args)
    return boundary.exit_code
