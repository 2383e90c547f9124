"""Parsers of the command line, made from the tables in ``flags``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import nearest
from .boundary import EXIT_CODES
from .flags import CHAT, DATA, DEMO, DOCTOR, ESTIMATE, EXPORT, TRAIN, Group, amount, not_negative, positive, share

PROGRAM = "pantheraml"

# Command -> what it does, and its flags. Without a command the flags of "train" apply.
COMMANDS: dict[str, tuple[str, tuple[Group, ...]]] = {
    "demo": ("fine-tune the embedded tiny model and watch it get better", DEMO),
    "doctor": ("versions, device, what is missing and what that costs", DOCTOR),
    "chat": ("talk to a model, merged model or adapter", CHAT),
    "export": ("write a model or adapter in another format, and verify it", EXPORT),
    "estimate": ("what a training step needs on TPU chips, compiled for them without one", ESTIMATE),
    "data": ("look at a data set as it will be trained, before training", DATA),
}
_METAVARS = {positive: "N", not_negative: "N", int: "N", amount: "X", share: "X"}
_DESCRIPTION = "Fine-tune a language model: load, add LoRA, train, save. Or run a command: {commands}."
_EXAMPLES = """examples:
  pantheraml demo
  pantheraml --model_name ./my-model --dataset ./chats.jsonl --max_steps 100
  pantheraml --model_name unsloth/llama-3-8b --load_in_4bit --save_model --save_path merged
  pantheraml --model_name ./my-model --raw_text_file book.txt --chunk_size 1024 --stride 256
  pantheraml chat outputs
  pantheraml export outputs merged --format gguf -q q8_0 f16"""
_CREDITS = """credits:
  PantheraML's API, flags and many of its ideas come from Unsloth: https://github.com/unslothai/unsloth"""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the epilog and shows defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Switches that are off and flags without a default say nothing useful there.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that names the flag closest to an unknown one and remembers which flags were given."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse ``argv``; the attribute ``explicit`` of the result is the set of flags that the user gave.

        Raises:
            SystemExit: code 2 for arguments that cannot be understood, 0 after ``--help``.
        """
        unset = object()
        names = [action.dest for action in self._actions if action.dest not in ("help", "version")]
        namespace = argparse.Namespace(**dict.fromkeys(names, unset))
        args, unknown = self.parse_known_args(list(argv), namespace)
        if unknown:
            self.error(self._unknown(unknown))
        args.explicit = frozenset(name for name in names if getattr(args, name) is not unset)
        for name in names:
            if getattr(args, name) is unset:
                setattr(args, name, self.get_default(name))
        return args

    def _unknown(self, unknown: Sequence[str]) -> str:
        flags = [option for action in self._actions for option in action.option_strings]
        described = []
        # A value that follows an unknown flag is unknown too, and not worth a word.
        for word in [word for word in unknown if word.startswith("-")] or unknown:
            name = word.partition("=")[0]
            close = nearest(name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name, flags)
            if not name.startswith("-"):
                close = nearest(name, COMMANDS) or close
            described.append(f"{name!r}" + (f" (did you mean {close!r}?)" if close else ""))
        return f"unknown argument {', '.join(described)}"

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        sys.stderr.write(f"error: {message}\n  next:  see `{self.prog} --help`\n")
        sys.exit(2)


def _epilog(command: str) -> str:
    codes = "exit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES)
    if command != "train":
        return f"{codes}\n\n{_CREDITS}"
    commands = "commands (`pantheraml COMMAND --help`):\n" + "\n".join(
        f"  {name:<8} {summary}" for name, (summary, _) in COMMANDS.items()
    )
    return f"{commands}\n\n{_EXAMPLES}\n\n{codes}\n\n{_CREDITS}"


def build_parser(command: str = "train") -> Parser:
    """Return the parser of a command; ``train`` is the one that serves flags without a command."""
    if command == "train":
        description, groups = _DESCRIPTION.format(commands=", ".join(COMMANDS)), TRAIN
    else:
        summary, groups = COMMANDS[command]
        description = f"{summary[0].upper()}{summary[1:]}."
    parser = Parser(
        prog=PROGRAM if command == "train" else f"{PROGRAM} {command}",
        usage=f"{PROGRAM} [COMMAND] [flags]" if command == "train" else None,
        description=description,
        epilog=_epilog(command),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    if command == "train":
        from .. import __version__

        parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    for group in groups:
        section = parser.add_argument_group(group.title)
        for flag in group.flags:
            options = dict(flag.options)
            if flag.names[0].startswith("-") and not {"action", "choices"} & set(options):
                options.setdefault("metavar", _METAVARS.get(options.get("type", str), "TEXT"))
            section.add_argument(*flag.names, help=flag.help, **options)
    return parser
