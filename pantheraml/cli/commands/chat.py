"""``pantheraml chat``: talk to any model folder, merged model or adapter; answers appear as they are generated."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TextStreamer

from ... import log
from ...data.control import prompt_ids
from ...errors import ConfigError, PantheraMLError
from ..output import printable

_HELP = "Write a message and press enter. /clear forgets the conversation, /exit ends it."
Message = dict[str, str]


class _Printer(TextStreamer):
    """Prints tokens as they come, with control characters made visible, and keeps the text."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print one more piece of the answer."""
        self.text += text
        sys.stdout.write(printable(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()


class Conversation:
    """A model, and what was said so far.

    Args:
        model: The model, in inference state.
        tokenizer: Its tokenizer.
        args: The command's flags.
    """

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        self.model = model
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.args = args
        self.chat = not args.plain and bool(getattr(self.tokenizer, "chat_template", None))
        if args.system and not self.chat:
            raise ConfigError(
                "--system needs a chat template",
                why="--plain was given" if args.plain else "the tokenizer has none, so text is continued as it is",
                hint="leave --system out, and put what it says at the start of the prompt",
            )
        self.limit = _context(model, args)
        given = "max_new_tokens" in args.explicit
        self.max_new_tokens = args.max_new_tokens if given else min(args.max_new_tokens, self.limit // 2)
        self.messages: list[Message] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.args.system}] if self.args.system else []

    def _encode(self, messages: list[Message], prompt: str) -> dict[str, Any]:
        if not self.chat:
            return dict(self.tokenizer(prompt, return_tensors="pt", verbose=False))
        # Control tokens in what is typed here stay text.
        ids = torch.tensor([prompt_ids(messages, self.tokenizer)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _fitting(self, prompt: str) -> dict[str, Any]:
        """Encode the conversation, dropping its oldest turns until the answer fits behind it.

        Raises:
            ConfigError: the prompt alone leaves no room.
        """
        room = self.limit - self.max_new_tokens
        messages = list(self.messages)
        first = 1 if messages[0]["role"] == "system" else 0
        while True:
            inputs = self._encode(messages, prompt)
            length = inputs["input_ids"].shape[1]
            if length <= room:
                if len(messages) < len(self.messages):
                    log.once("the conversation is longer than the model takes: its oldest turns are left out")
                self.messages = messages
                return inputs
            if not self.chat or len(messages) - first < 3:
                raise ConfigError(
                    f"the prompt of {length} tokens leaves no room for {self.max_new_tokens} new ones",
                    why=f"the model takes {self.limit} tokens in all",
                    hint="shorten the prompt, or give a smaller --max_new_tokens",
                )
            del messages[first : first + 2]

    def answer(self, prompt: str) -> str:
        """Print the answer to ``prompt`` as it is generated, and remember both."""
        self.messages.append({"role": "user", "content": prompt})
        try:
            inputs = self._fitting(prompt)
        except PantheraMLError:
            self.messages.pop()
            raise
        printer = _Printer(self.tokenizer)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.args.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.args.temperature, "top_p": self.args.top_p}
        inputs = {name: value.to(self.model.device) for name, value in inputs.items() if name != "token_type_ids"}
        try:
            self.model.generate(**inputs, **sampling, max_new_tokens=self.max_new_tokens, streamer=printer)
        except KeyboardInterrupt:
            # The user has read enough; what was said so far stays in the conversation.
            if not sys.stdin.isatty():
                raise
            sys.stdout.write("\n")
        self.messages.append({"role": "assistant", "content": printer.text})
        return printer.text


def _context(model: Any, args: argparse.Namespace) -> int:
    maximum = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return args.max_seq_length or (maximum if isinstance(maximum, int) else sys.maxsize)


def _prompts() -> Iterator[str]:
    """Lines from the keyboard under a prompt, or the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  # gives input() its line editing

    while True:
        try:
            yield input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return


def _talk(conversation: Conversation) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        sys.stdout.write(_HELP + "\n")
    for prompt in _prompts():
        if prompt.strip() == "/exit":
            return
        if prompt.strip() == "/clear":
            conversation.clear()
        elif prompt.strip():
            try:
                conversation.answer(prompt)
            except ConfigError as error:
                if not interactive:
                    raise
                sys.stderr.write(f"{printable(str(error))}\n")


def run(args: argparse.Namespace) -> int:
    """Load the model and answer ``--prompt``, or the lines of standard input."""
    from transformers import set_seed

    from ...models.loader import FastLanguageModel
    from ..finetune import quiet_unless_terminal

    quiet_unless_terminal()
    if args.top_p > 1 or args.top_p == 0:
        raise ConfigError(f"--top_p {args.top_p} is not above 0 and at most 1")
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=args.model, max_seq_length=args.max_seq_length, dtype=args.dtype, load_in_4bit=args.load_in_4bit
    )
    FastLanguageModel.for_inference(model)
    if args.seed is not None:
        set_seed(args.seed)
    conversation = Conversation(model, tokenizer, args)
    if args.prompt is not None:
        conversation.answer(args.prompt)
    else:
        _talk(conversation)
    return 0
