"""The commands, one a file; each has ``run(args) -> exit code``."""
