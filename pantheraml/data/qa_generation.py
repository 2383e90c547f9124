"""Questions and answers about a text, written by a local model and checked before they are kept."""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from datasets import Dataset

from .. import log
from ..device import clear_gpu_memory
from ..errors import ConfigError, ConflictError, DataError, UnsupportedError
from . import sources
from .control import prompt_ids
from .qa_replies import HIGHEST_RATING, LOWEST_RATING, Pair, parse_pairs, parse_ratings
from .raw_text import text_chunks

# The loader stands above this layer and is looked up when a model is first needed.
_LOADER = "pantheraml.models.loader:FastLanguageModel"
_ASK = (
    "Here is a text between two lines of dashes.\n\n-----\n{text}\n-----\n\n"
    "Write {count} different questions that this text answers, each with its answer. Take every fact from the text, "
    "and word each question so that it makes sense to someone who has not seen the text.\n"
    'Reply with JSON only, in this form: [{{"question": "...", "answer": "..."}}]'
)
_RATE = (
    "Here are questions with answers, in JSON.\n\n{pairs}\n\n"
    "Rate each from 1 (wrong, vague or of no use for teaching) to 10 (correct, clear and useful).\n"
    'Reply with JSON only, in this form: [{{"id": 0, "rating": 5}}]'
)
# Room for one pair in a reply, and how often a chunk is asked again for what is missing.
_TOKENS_A_PAIR = 100
_PATIENCE = 2
# A chunk may come to a few tokens more inside a request, where other tokens stand beside it.
_MARGIN = 16


class SyntheticDataKit:
    """Writes training data from documents with a local model, without a server and without a network.

    The model is loaded when it is first needed. ``with`` gives its memory back at the end; so does ``cleanup``.

    Args:
        model_name: Folder or hub name of an instruct model, whose tokenizer has a chat template.
        max_seq_length: Tokens that a request and its reply may have together. Default 2048.
        gpu_memory_utilization: Belongs to a vLLM server, which is not used; has to stay None.
        float8_kv_cache: As ``gpu_memory_utilization``.
        conservativeness: As ``gpu_memory_utilization``.
        token: Hub token.
        timeout: As ``gpu_memory_utilization``.
        **kwargs: Further arguments of ``FastLanguageModel.from_pretrained``.

    Raises:
        UnsupportedError: an argument of the server is given.
    """

    def __init__(
        self,
        model_name: str,
        max_seq_length: int = 2048,
        gpu_memory_utilization: float | None = None,
        float8_kv_cache: bool | None = None,
        conservativeness: float | None = None,
        token: str | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> None:
        server = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "float8_kv_cache": float8_kv_cache,
            "conservativeness": conservativeness,
            "timeout": timeout,
        }
        given = [name for name, value in server.items() if value is not None]
        if given:
            raise UnsupportedError(
                f"{', '.join(given)} cannot be honoured",
                where="SyntheticDataKit",
                why="they are settings of a vLLM server, and the model runs in this process",
                hint="leave them out",
            )
        self.model_name = model_name
        self.max_seq_length = max_seq_length
        self.dropped: Counter[str] = Counter()
        self._load_options = {"token": token, **kwargs}
        self._loaded: tuple[Any, Any] | None = None
        self._folder: Path | None = None
        self._requests = 0

    @classmethod
    def from_pretrained(cls, model_name: str, max_seq_length: int = 2048, **kwargs: Any) -> Self:
        """Make a kit; the arguments are those of the class."""
        return cls(model_name, max_seq_length, **kwargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Let go of the model and free the accelerator's memory; the next request loads it again."""
        if self._loaded is not None:
            self._loaded = None
            clear_gpu_memory()

    def prepare_qa_generation(
        self,
        output_folder: str | Path = "data",
        max_generation_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.95,
        overlap: int = 64,
        default_num_pairs: int = 25,
        cleanup_threshold: float = 1.0,
        cleanup_batch_size: int = 4,
        cleanup_temperature: float = 0.3,
        random_state: int = 3407,
    ) -> None:
        """Set how questions are written; has to come before ``chunk_data`` and ``generate_qa``.

        Args:
            output_folder: Where chunks and pairs are written. Default ``data``.
            max_generation_tokens: Tokens of one reply. Default 512.
            temperature: Of the sampling of questions; 0 takes the likeliest token. Default 0.7.
            top_p: Share of the probability that is sampled from, above 0 and up to 1. Default 0.95.
            overlap: Tokens that neighbouring chunks share. Default 64.
            default_num_pairs: Pairs asked of a chunk where ``generate_qa`` is not told. Default 25.
            cleanup_threshold: Rating from 1 to 10, given by the model, below which a pair is dropped. At the default,
                1.0, none could be, and the model is not asked.
            cleanup_batch_size: Pairs rated in one request. Default 4.
            cleanup_temperature: Of the sampling of ratings. Default 0.3.
            random_state: Seed of the sampling; the process's own random state is left alone. Default 3407.

        Raises:
            ConfigError: a value is out of range, or the reply leaves no room for a text.
        """
        ranges = {
            "max_generation_tokens": (max_generation_tokens, 1, self.max_seq_length),
            "temperature": (temperature, 0, float("inf")),
            "top_p": (top_p, 1e-6, 1),
            "overlap": (overlap, 0, self.max_seq_length),
            "default_num_pairs": (default_num_pairs, 1, float("inf")),
            "cleanup_threshold": (cleanup_threshold, LOWEST_RATING, HIGHEST_RATING),
            "cleanup_batch_size": (cleanup_batch_size, 1, float("inf")),
            "cleanup_temperature": (cleanup_temperature, 0, float("inf")),
        }
        for name, (value, least, most) in ranges.items():
            if not least <= value <= most:
                raise ConfigError(f"{name} is {value}", where=f"argument {name}", hint=f"give {least} to {most}")
        self._folder = Path(output_folder).expanduser()
        self._new_tokens, self._overlap, self._num_pairs = max_generation_tokens, overlap, default_num_pairs
        self._asking = {"temperature": temperature, "top_p": top_p}
        self._rating = {"temperature": cleanup_temperature, "top_p": top_p}
        self._threshold, self._rated_at_once = cleanup_threshold, cleanup_batch_size
        self._seed = random_state

    def chunk_data(self, filename: str | Path) -> list[str]:
        """Cut a document into files that fit a request, in ``output_folder/chunks``.

        Args:
            filename: A text file, or a json, jsonl or csv file whose column ``text`` holds documents.

        Returns:
            Paths of the chunks, in order.

        Raises:
            DataError: the file cannot be read or has no text.
            ConfigError: ``max_seq_length`` leaves no room for a chunk.
            ConflictError: ``prepare_qa_generation`` was not called.
        """
        folder = self._prepared() / "chunks"
        loaded = sources.load_text(filename)
        room = self._room(_ASK.format(text="", count=self._num_pairs)) - _MARGIN
        if room <= self._overlap:
            raise ConfigError(
                f"a request of {self.max_seq_length} tokens leaves {max(room, 0)} for the text",
                where="argument max_seq_length",
                why=f"{self._new_tokens} are for the reply, and {self._overlap} of each chunk are overlap",
                hint="give more max_seq_length, or less max_generation_tokens or overlap",
            )
        chunks: list[str] = []
        for text in loaded.dataset["text"]:
            chunks += text_chunks(text, self._tokenizer, chunk_size=room, stride=self._overlap, with_end=False)
        paths = [folder / f"{Path(filename).stem}_{index}.txt" for index in range(len(chunks))]
        folder.mkdir(parents=True, exist_ok=True)
        for path, chunk in zip(paths, chunks):
            path.write_text(chunk, encoding="utf-8", newline="")
        return [str(path) for path in paths]

    def generate_qa(self, filenames: str | Path | Sequence[str | Path], num_pairs: int | None = None) -> Dataset:
        """Ask the model for questions and answers about each chunk, and write ``output_folder/qa_pairs.jsonl``.

        While this runs, what is done so far is in ``qa_pairs.jsonl.part``. A reply may hold anything: what is not a
        question with an answer is dropped and counted in ``dropped``, by reason. A chunk is asked until it has its
        pairs, at most twice as often as would do.

        Args:
            filenames: Chunks, from ``chunk_data``.
            num_pairs: Pairs asked of each chunk. Default: ``default_num_pairs``.

        Returns:
            A data set with ``question`` and ``answer`` (possibly without rows), and ``source``, the chunk's file.

        Raises:
            ConfigError: ``num_pairs`` is below 1, or the tokenizer has no chat template.
            ConflictError: ``prepare_qa_generation`` was not called.
            DataError: a chunk cannot be read, or is too long for a request.
        """
        folder = self._prepared()
        wanted = self._num_pairs if num_pairs is None else num_pairs
        if wanted < 1:
            raise ConfigError(f"num_pairs is {wanted}", where="argument num_pairs", hint="give 1 or more")
        self.dropped.clear()
        paths = [filenames] if isinstance(filenames, str | Path) else list(filenames)
        texts = [self._chunk(path, wanted) for path in paths]
        kept: list[Pair] = []
        final = folder / "qa_pairs.jsonl"
        final.parent.mkdir(parents=True, exist_ok=True)
        part = final.with_name(final.name + ".part")
        with part.open("w", encoding="utf-8") as file:
            for path, text in zip(paths, texts):
                pairs = [{**pair, "source": str(path)} for pair in self._curated(self._ask(text, wanted, kept))]
                file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
                file.flush()
                kept += pairs
                log.info(f"{path}: {len(pairs)} questions")
        os.replace(part, final)
        if self.dropped:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.dropped.most_common())
            log.warning(f"dropped from the model's replies: {reasons}")
        columns = ("question", "answer", "source")
        return Dataset.from_dict({name: [pair[name] for pair in kept] for name in columns})

    def _prepared(self) -> Path:
        if self._folder is None:
            raise ConflictError("the kit is not prepared", hint="call prepare_qa_generation() first")
        return self._folder

    def _chunk(self, path: str | Path, wanted: int) -> str:
        text = "\n".join(sources.load_text(path).dataset["text"])
        missing = -self._room(_ASK.format(text=text, count=wanted))
        if missing > 0:
            raise DataError(
                f"the chunk is {missing} tokens too long for a request of {self.max_seq_length}",
                where=str(path),
                hint="cut the document with chunk_data",
            )
        return text

    def _ask(self, text: str, wanted: int, kept: list[Pair]) -> list[Pair]:
        at_once = max(1, min(wanted, self._new_tokens // _TOKENS_A_PAIR))
        pairs: list[Pair] = []
        for _ in range(_PATIENCE * -(-wanted // at_once)):
            missing = wanted - len(pairs)
            if missing <= 0:
                break
            reply = self._reply(_ASK.format(text=text, count=min(at_once, missing)), **self._asking)
            pairs += parse_pairs(reply, self.dropped, [*kept, *pairs])
        return pairs[:wanted]

    def _curated(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs that the model rates at the threshold or above; one without a rating is dropped."""
        if self._threshold <= LOWEST_RATING:
            return pairs
        good: list[Pair] = []
        for start in range(0, len(pairs), self._rated_at_once):
            batch = pairs[start : start + self._rated_at_once]
            for pair, rating in zip(batch, self._rate(batch)):
                if rating is not None and rating >= self._threshold:
                    good.append(pair)
                else:
                    self.dropped["not rated" if rating is None else "rated low"] += 1
        return good

    def _rate(self, pairs: list[Pair]) -> list[float | None]:
        listed = json.dumps([{"id": index, **pair} for index, pair in enumerate(pairs)], ensure_ascii=False)
        request = _RATE.format(pairs=listed)
        if self._room(request) >= 0:
            ratings = parse_ratings(self._reply(request, **self._rating), len(pairs))
            return [ratings.get(index) for index in range(len(pairs))]
        if len(pairs) == 1:
            return [None]
        half = len(pairs) // 2
        return [*self._rate(pairs[:half]), *self._rate(pairs[half:])]

    @property
    def _model(self) -> Any:
        return self._load()[0]

    @property
    def _tokenizer(self) -> Any:
        return self._load()[1]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            module, _, name = _LOADER.partition(":")
            loader = getattr(importlib.import_module(module), name)
            model, tokenizer = loader.from_pretrained(
                model_name=self.model_name, max_seq_length=self.max_seq_length, **self._load_options
            )
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
            if not tokenizer.chat_template:
                raise ConfigError(
                    f"the tokenizer of {self.model_name} has no chat template",
                    where="argument model_name",
                    why="a base model does not follow instructions",
                    hint="name the instruct version of the model",
                )
            loader.for_inference(model)
            self._loaded = model, tokenizer
        return self._loaded

    def _inputs(self, request: str) -> Mapping[str, torch.Tensor]:
        # A document may spell control tokens.
        ids = torch.tensor([prompt_ids([{"role": "user", "content": request}], self._tokenizer)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _room(self, request: str) -> int:
        """Tokens that ``request`` leaves beside its reply; below zero where it does not fit."""
        return self.max_seq_length - self._new_tokens - int(self._inputs(request)["input_ids"].shape[1])

    def _reply(self, request: str, *, temperature: float, top_p: float) -> str:
        """One reply of the model; the seed moves on with each request, and the process's random state stays."""
        model, device = self._model, self._model.device
        inputs = {name: value.to(device) for name, value in self._inputs(request).items()}
        length = inputs["input_ids"].shape[1]
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed + self._requests)
            self._requests += 1
            options = sampling or {"do_sample": False}
            output = model.generate(**inputs, max_new_tokens=self._new_tokens, **options)
        return cast("str", self._tokenizer.decode(output[0, length:], skip_special_tokens=True))
