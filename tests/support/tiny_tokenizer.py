"""Two tiny tokenizers: one with a token per byte and a few merged pairs, and one that falls back on bytes."""

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = bytes(range(ord("a"), ord("z") + 1)) + b" .,!?\n" + "éßあ".encode()
MERGES = ("th", "in", "er", "an")
END = "</s>"


def byte_tokenizer(alphabet: bytes = bytes(range(256)), merges: Sequence[str] = MERGES) -> PreTrainedTokenizerFast:
    """A tokenizer with the distinct bytes of `alphabet` in order, then the merged pairs, then the end token."""
    symbols = _byte_symbols()
    names = [symbols[byte] for byte in dict.fromkeys(alphabet)] + list(merges)
    bpe = models.BPE(
        vocab={name: index for index, name in enumerate(names)}, merges=[(pair[0], pair[1]) for pair in merges]
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def byte_fallback_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer like LLaMA 2's. Ids 0 to 255 are bytes, which spell every character that no word holds."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *words]
    bpe = models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[], byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _byte_symbols() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(rest)}
