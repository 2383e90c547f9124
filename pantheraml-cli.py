"""Run PantheraML's command line from a checkout: ``python pantheraml-cli.py --help``."""

import sys

from pantheraml.cli import main

if __name__ == "__main__":
    sys.exit(main())
