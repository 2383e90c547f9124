"""``python -m pantheraml.cli``: what the processes of ``--gpus`` run."""

import sys

from . import main

sys.exit(main())
