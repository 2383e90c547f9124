"""Make the demo's tokenizer, base model and data set from nothing but the word lists of this folder.

Run ``python -m pantheraml.assets.build.make_demo --out DIR``. The data files depend on their seed only. The weights
also depend on the processor's arithmetic, so another machine gets a model that behaves alike and is not equal bit for
bit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pantheraml.assets.build import demo_data, skills
from pantheraml.assets.build.words import Source

SCRIPT_VERSION = 1

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

# A user's or system's turn is its text and a line break; an assistant's turn ends with the end-of-sequence token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the base model becomes.

    Args:
        seed: Seed of the exercises, of the initial weights and of nothing else.
        vocab_size: Number of tokens, the 256 bytes and three special ones included.
        tokenizer_rows: Exercises from which the byte-pair merges are learned.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        layers: Number of decoder layers.
        heads: Number of query heads; keys and values have half as many.
        context: Tokens in one pretraining row, and the longest input of the model.
        batch: Rows in one step.
        steps: Optimizer steps.
        matrix_rate: Peak learning rate of the matrices inside the layers (Muon).
        other_rate: Peak learning rate of embeddings and norms (AdamW).
        prompt_weight: Weight of a prompt's token in the loss; an answer's token has 1.
    """

    seed: int = 3407
    vocab_size: int = 1280
    tokenizer_rows: int = 20_000
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    context: int = 128
    batch: int = 16
    steps: int = 1800
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    prompt_weight: float = 0.2


def make_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on exercises and on the demo's training rows."""
    source = Source(settings.seed)
    texts = ["\n".join(skills.exercise(source)) for _ in range(settings.tokenizer_rows)]
    texts += [row["prompt"] + row["completion"] for row in demo_data.split("train")]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=settings.vocab_size,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=2 * settings.context
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(settings: Settings) -> LlamaForCausalLM:
    """A Llama with random weights; queries, keys and values have an even number of heads."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads // 2,
            max_position_embeddings=2 * settings.context,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            tie_word_embeddings=True,
        )
    )


def batches(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless pretraining batches: token ids and loss weights, both ``[batch, context]``.

    A row is a conversation of as many exercises as fit, in the tokenizer's chat template.
    """
    source = Source(settings.seed + 1)
    core = tokenizer.backend_tokenizer

    def pieces() -> Iterator[tuple[list[int], list[float]]]:
        while True:
            drawn = [skills.exercise(source) for _ in range(256)]
            asked = core.encode_batch([f"{prompt}\n" for prompt, _ in drawn], add_special_tokens=False)
            answered = core.encode_batch([f"{answer}{EOS}\n" for _, answer in drawn], add_special_tokens=False)
            for ask, answer in zip(asked, answered):
                weights = [settings.prompt_weight] * len(ask.ids) + [1.0] * (len(answer.ids) - 1) + [0.0]
                yield ask.ids + answer.ids, weights

    stream = pieces()
    ids, weights = next(stream)
    while True:
        rows, row_weights = [], []
        while len(rows) < settings.batch:
            row, weight = [0], [0.0]
            while len(row) + len(ids) <= settings.context:
                row, weight = row + ids, weight + weights
                ids, weights = next(stream)
            if len(row) == 1:  # longer than the context: leave it out
                ids, weights = next(stream)
                continue
            missing = settings.context - len(row)
            rows.append(row + [2] * missing)
            row_weights.append(weight + [0.0] * missing)
        yield torch.tensor(rows), torch.tensor(row_weights)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> float:
    """Train ``model`` in place and return the last mean loss.

    Muon (https://kellerjordan.github.io/posts/muon/) serves the matrices inside the layers, AdamW all the rest.
    """
    inside = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    rest = [p for p in model.parameters() if all(p is not q for q in inside)]
    optimizers = [
        torch.optim.Muon(inside, lr=settings.matrix_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=settings.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    warmup = settings.steps // 25
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / warmup, 1.02 - step / settings.steps)
        )
        for optimizer in optimizers
    ]
    model.train()
    start, running = time.monotonic(), float("nan")
    for step, (ids, weights) in zip(range(settings.steps), batches(settings, tokenizer)):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            answers = weight == 1.0
            value = losses[answers].mean().item()
        running = value if step == 0 else 0.95 * running + 0.05 * value
        if step % 50 == 0 or step == settings.steps - 1:
            print(f"step {step:5d}  answer loss {running:.4f}  {time.monotonic() - start:.0f} s", flush=True)
    return running


def main() -> None:
    """Make everything below ``--out``."""
    parser = argparse.ArgumentParser(description="Make the demo's model, tokenizer and data.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist yet")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="pretraining steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: %(default)s)")
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True)
    print(json.dumps({"script_version": SCRIPT_VERSION, **asdict(settings)}, indent=2), flush=True)

    demo_data.write(arguments.out)
    tokenizer = make_tokenizer(settings)
    model = make_model(settings)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    loss = pretrain(model, tokenizer, settings)
    folder = arguments.out / "model"
    model.to(dtype=torch.bfloat16)  # pyrefly: ignore[missing-argument]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"answer loss {loss:.4f}; written to {arguments.out}")


if __name__ == "__main__":
    main()
