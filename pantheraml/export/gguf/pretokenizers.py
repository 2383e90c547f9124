"""How llama.cpp splits text before it applies merges: the names it knows, and which of them a tokenizer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

# Scripts, digits, contractions, spaces at both ends, line breaks, code, emoji: what splitting rules differ in. In NFC,
# since llama.cpp normalises nothing.
SAMPLE = (
    "Hello World! I've 12345 apples, they'LL cost $1,234.56.\n\n  def f(x):\n\treturn x**2 # done...\r\n"
    "Ünïcödé façade — Größe; Привет, мир! 你好,世界。こんにちは 안녕하세요 नमस्ते مرحبا שלום ελληνικά "
    "🙂👩‍💻 e=mc² ½ ① CamelCase snake_case HTTPServer a/b/c   x  \n \n"
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_OF_THREE_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A value of ``tokenizer.ggml.pre``.

    Attributes:
        name: The value.
        splits: Regular expressions that llama.cpp splits by, one after the other.
        whole_words: Whether a word that is a token is one, whatever the merges say.
    """

    name: str
    splits: tuple[str, ...]
    whole_words: bool = False


PRE_TOKENIZERS = (
    PreTokenizer("llama-bpe", (_WORDS_OF_THREE_DIGITS,), whole_words=True),
    PreTokenizer("dbrx", (_WORDS_OF_THREE_DIGITS,)),
    PreTokenizer("qwen2", (_WORDS_OF_THREE_DIGITS.replace(r"\p{N}{1,3}", r"\p{N}"),)),
    PreTokenizer("tekken", (_CASED % ("", "") + r"|\p{N}" + _REST,), whole_words=True),
    PreTokenizer("gpt-4o", (_CASED % (_SUFFIX, _SUFFIX) + r"|\p{N}{1,3}" + _REST,)),
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("refact", (r"\p{N}", _GPT2)),
)


def as_llama_cpp(
    pre: PreTokenizer, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], added: Sequence[AddedToken]
) -> Tokenizer:
    """Build a byte-level BPE tokenizer that splits as llama.cpp does for a name.

    Args:
        pre: The name.
        vocabulary: Ids by token, in the byte alphabet.
        merges: In the order in which they apply.
        added: Tokens that are found in the text before it is split.
    """
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=pre.whole_words))
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The stubs of tokenizers name neither attribute settable.
    backend: Any = tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.add_tokens(list(added))
    return tokenizer
