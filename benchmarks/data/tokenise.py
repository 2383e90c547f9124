"""Rate of preparing short chats for training beside `tokenizers` alone in batch, on this CPU.

    python benchmarks/data/tokenise.py --chats 200000 --rounds 3 --out benchmarks/reports

Ours is all that happens between the rows and the first batch: `data.formats` checks and renders them, and `SFTTrainer`
is constructed, which renders and encodes them, makes labels and cuts. It is timed for chats (`messages`, rendered by
the chat template) and for the same chats rendered before (`text`). The peer is one call of `Tokenizer.encode_batch` on
all rendered texts, with its own threads; `encode_batch_fast` is the same without the places of tokens in the text. All
paths take turns, and the best round of each counts, in time on the clock and in time of processors, which other work on
the machine disturbs less. The chats, the tokenizer (byte-level BPE, filled up to 128,256 tokens) and the tiny model are
made here. Nothing is read from a cache.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import pstats
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "true"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

VOCABULARY = 128_256
WORDS = 20_000
SPECIALS = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VERSIONS = ("datasets", "tokenizers", "transformers", "trl", "torch")
Chat = list[dict[str, str]]


def draw_chats(count: int, seed: int = 0) -> Iterator[Chat]:
    """Chats of one question and one answer of 5 to 60 words, common words more often than rare ones."""
    draw = random.Random(seed)
    syllables = [c + v + e for c in "bcdfghjklmnprstvw" for v in "aeiou" for e in ("", "n", "r", "s")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(WORDS)]
    weights = [1 / (rank + 10) for rank in range(WORDS)]
    pool = draw.choices(words, weights, k=1_000_000)

    def text() -> str:
        start = draw.randrange(len(pool) - 60)
        return " ".join(pool[start : start + draw.randint(5, 60)]).capitalize() + "."

    for _ in range(count):
        yield [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]


def make_tokenizer(chats: list[Chat]) -> Any:
    """A byte-level BPE tokenizer trained on the chats; what is missing to the full vocabulary is never produced."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((message["content"] for chat in chats for message in chat), trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<unused {index}>": index for index in range(len(vocabulary), VOCABULARY)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(directory: Path, tokenizer: Any) -> Any:
    """A model as small as the vocabulary allows, loaded as users load one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pantheraml import FastLanguageModel

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return FastLanguageModel.from_pretrained(str(directory), max_seq_length=2048, load_in_4bit=False)


def prepare(rows: Any, model: Any, tokenizer: Any, directory: Path) -> Any:
    """From rows to a trainer that is ready."""
    from trl import SFTConfig, SFTTrainer

    from pantheraml.data import formats

    rendered = formats.to_training_rows(rows, formats.detect(rows), tokenizer)
    config = SFTConfig(output_dir=str(directory / "run"), max_length=2048, report_to=[], use_cpu=True)
    return SFTTrainer(model=model, args=config, train_dataset=rendered, processing_class=tokenizer)


def timed(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds on the clock, seconds of processors, and the result."""
    start, used = time.perf_counter(), time.process_time()
    result = action()
    return time.perf_counter() - start, time.process_time() - used, result


def cpu_name() -> str:
    """The processor, as Linux names it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def report(
    results: dict[str, tuple[float, float]], peer: str, args: argparse.Namespace, tokens: int, cores: int
) -> str:
    """The figures as markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    clock, processors = results[peer]
    chats = args.chats
    lines = [
        f"# Preparing short chats on {cpu_name()}, {cores} cores",
        "",
        f"{datetime.date.today()}; Python {platform.python_version()}, {versions}.",
        f"{chats:,} chats of {tokens / chats:.0f} tokens on average, vocabulary {VOCABULARY:,}.",
        f"Best of {args.rounds} rounds.",
        f"Command: `python benchmarks/data/tokenise.py --chats {chats} --rounds {args.rounds}`.",
        "",
        "| path | seconds | chats/s | rate × tokenizers alone | processor seconds | × tokenizers alone |",
        "|---|---|---|---|---|---|",
    ]
    for name, (seconds, used) in results.items():
        rate = f"{seconds:.2f} | {chats / seconds:,.0f} | {clock / seconds:.2f}"
        lines.append(f"| {name} | {rate} | {used:.2f} | {processors / used:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for the report; without it, only printed")
    parser.add_argument("--profile", type=int, default=0, help="print this many of the costliest functions of ours")
    args = parser.parse_args()

    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    chats = list(draw_chats(args.chats))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        model, tokenizer = make_model(directory, make_tokenizer(chats[:20_000]))
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        sources = {
            "messages": datasets.Dataset.from_dict({"messages": chats}),
            "text": datasets.Dataset.from_dict({"text": texts}),
        }
        backend = tokenizer.backend_tokenizer
        peer = "tokenizers alone"
        paths: dict[str, Callable[[], Any]] = {
            peer: lambda: backend.encode_batch(texts, add_special_tokens=False),
            "tokenizers alone, encode_batch_fast": lambda: backend.encode_batch_fast(texts, add_special_tokens=False),
        }
        for name, rows in sources.items():
            paths[f"ours, {name}"] = functools.partial(prepare, rows, model, tokenizer, directory)
        if args.profile:
            profiler = cProfile.Profile()
            profiler.runcall(paths["ours, messages"])
            pstats.Stats(profiler).sort_stats("cumulative").print_stats(args.profile)
        tokens, results = 0, {}
        for _ in range(args.rounds):
            for name, action in paths.items():
                seconds, used, result = timed(action)
                best = results.get(name, (seconds, used))
                results[name] = (min(best[0], seconds), min(best[1], used))
                tokens = sum(map(len, result)) if name == peer else tokens
                if name == "ours, messages":
                    found = sum(map(len, result.train_dataset["input_ids"]))
                    if found != tokens:
                        raise SystemExit(f"ours made {found:,} tokens of the messages, tokenizers alone {tokens:,}")
                del result
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = report(results, peer, args, tokens, cores)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "_", cpu_name().lower()).strip("_")
        (args.out / f"data_{name}_{datetime.date.today()}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
