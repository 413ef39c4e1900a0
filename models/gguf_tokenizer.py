"""The tokenizer and the chat template of a GGUF file, rebuilt from its metadata.

transformers can rebuild them only if torch is installed. It also splits text by GPT-2's rule if it does not know the
file's rule, such as SmolLM2's single digits.

Sources: llama.cpp's vocabulary code for the meaning of the keys, and the tokenizer.json files that the authors of the
models published for the spelling of the same rules in `tokenizers`.
"""

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

from hshare_jax.errors import CheckpointError
from hshare_jax.models.gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# tokenizers and transformers are imported by the functions that need them, because importing them takes a second.

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_SPACE = "\u2581"  # stands for a space in SentencePiece
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What a name in `tokenizer.ggml.pre` stands for."""

    splits: tuple[str, ...]  # regular expressions; each cuts the pieces of the ones before it
    then_gpt2: bool = False  # whether GPT-2's own expression follows
    has_whole_words: bool = False  # whether a piece that is a token becomes that token, whatever the merges say
    begins: bool = False  # whether a text gets a begin token where the file does not say so
    is_nfc: bool = False  # whether text is brought into Unicode's form NFC first


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_QWEN2 = _WORDS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
# Words end where a capital follows a small letter. Letters of other scripts, and marks, are both.
_CAPITALS, _SMALLS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [r"[^\r\n\p{L}\p{N}]?" + word for word in (f"{_CAPITALS}*{_SMALLS}+", f"{_CAPITALS}+{_SMALLS}*")]
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
_TEKKEN = "|".join(_CASED) + r"|\p{N}" + _SIGNS + _REST
_GPT4O = "|".join(f"{word}{_ENDINGS}?" for word in _CASED) + r"|\p{N}{1,3}" + _SIGNS + _REST
_CJK = "[\u0800-\u9fa5\uac00-\ud7ff]+"
_DEEPSEEK_CODER = r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"
# Small and large letters, but not the small ones of Armenian and Georgian nor those of mathematics: exactly the ranges
# that the published rule lists. It cuts numbers into digits. llama.cpp keeps numbers whole, which gives the same tokens
# with the published merges, because these were learnt from single digits.
_DEEPSEEK_LETTERS = (
    "[[\\p{Lu}\\p{Ll}\\p{Lt}]&&[A-\u0556\u10a0-\u10c5\u13a0-\u13fd\u1c90-\u1cbf\u1d00-\u1fff\u2100-\u218f\u2c00-\u2cff"
    "\ua640-\ua78e\uab70-\uabbf\ufb00-\uff5a\U00010400-\U000104fb\U00010c80-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943]]"
)
_DEEPSEEK_SIGNS = "[!-/:-~\u2018-\u201f\u3000-\u3002\uff01-\uff0f\uff1a-\uff5e]"
_DEEPSEEK_LLM = r"[\r\n]", rf"\s?{_DEEPSEEK_LETTERS}+", rf"\s?{_DEEPSEEK_SIGNS}+", r"\s+$", _CJK, r"\p{N}"
_RULES = {
    **dict.fromkeys(("gpt-2", "gpt2", "default"), _Rule((), then_gpt2=True)),
    "smollm": _Rule((r"\p{N}",), then_gpt2=True),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _Rule((_LLAMA3,), has_whole_words=True, begins=True)
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _Rule((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Rule((_QWEN2,), is_nfc=True)),
    "tekken": _Rule((_TEKKEN,), has_whole_words=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Rule((_GPT4O,))),
    "deepseek-coder": _Rule(_DEEPSEEK_CODER),
    "deepseek-llm": _Rule(_DEEPSEEK_LLM),
}


def tokenizer_from_gguf(file: GGUFFile) -> "PreTrainedTokenizerFast | None":
    """Rebuilds the tokenizer of a GGUF file, with its chat template. None if the file holds no tokenizer.

    Raises:
        ValueError: the kind of tokenizer or pre-tokenizer is not known.
        CheckpointError: entries contradict each other.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind == "gpt2" and "tokenizer.ggml.pre" not in file.metadata:
        warnings.warn(
            f"{file.path} does not say how text is cut into words (tokenizer.ggml.pre), so GPT-2's rule is taken; if "
            "the model was made with another rule, its answers are worse: convert the model to GGUF anew",
            stacklevel=2,
        )
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{file.path}: tokenizer.ggml.model={kind!r} is not supported; supported: gpt2, llama")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens must be a list of texts")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens names a token twice")
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens)
    kinds = _list(file, "tokenizer.ggml.token_type", len(tokens)) or [1] * len(tokens)
    added = [
        (token, kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    for is_special in (True, False):
        chosen = [
            AddedToken(token, normalized=False, special=is_special) for token, special in added if special == is_special
        ]
        (backend.add_special_tokens if is_special else backend.add_tokens)(chosen)
    names = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    special = {role: _token(file, tokens, key) for role, key in names.items()}
    _add_ends(file, backend, tokens, kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{role: token for role, token in special.items() if token is not None},
    )


def end_tokens_of_gguf(file: GGUFFile) -> tuple[int, ...]:
    """The ids that end a generation, according to a GGUF file."""
    ids = (file.metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS)
    return tuple(dict.fromkeys(token for token in ids if isinstance(token, int)))


def _byte_level(file: GGUFFile, tokens: list[str]) -> "Tokenizer":
    """Byte-level BPE, as in GPT-2. `tokenizer.ggml.pre` names the rule by which text is first cut into words."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    rule = _rule(file)
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge[1:] for merge in merges):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges must be a list of pairs of tokens")
    pairs = [(merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :]) for merge in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    if broken := [
        pair for pair in pairs if pair[0] not in vocab or pair[1] not in vocab or pair[0] + pair[1] not in vocab
    ]:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges joins {broken[0]}, which are not tokens")
    backend = Tokenizer(BPE(vocab, pairs, ignore_merges=rule.has_whole_words))
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in rule.splits]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.then_gpt2)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    if rule.is_nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _rule(file: GGUFFile) -> _Rule:
    """The rule that the file names, or GPT-2's. Raises ValueError for a name that is not known."""
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _RULES:
        raise ValueError(f"{file.path}: tokenizer.ggml.pre={pre!r} is not known; known: {', '.join(_RULES)}")
    return _RULES[pre]


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> "Tokenizer":
    """SentencePiece BPE with byte fallback (LLaMA 1 and 2, Mistral).

    SentencePiece joins the two neighbours whose union is the token with the best score. So the merges are all ways to
    cut a token in two, the best token first.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    scores = _list(file, "tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise CheckpointError(f"{file.path}: metadata tokenizer.ggml.scores is missing")
    vocab = {token: index for index, token in enumerate(tokens)}
    cuts = [
        (-score, vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    unknown = _token(file, tokens, "unknown_token_id")
    backend = Tokenizer(
        BPE(vocab, [cut[3:] for cut in sorted(cuts)], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    has_prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if has_prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _add_ends(file: GGUFFile, backend: "Tokenizer", tokens: list[str], kind: str) -> None:
    """Lets the tokenizer add a begin and an end token to every text, if the file or llama.cpp's default says so."""
    begins_by_default = kind == "llama" or _rule(file).begins
    ends = {
        "bos": ("bos_token_id", file.metadata.get("tokenizer.ggml.add_bos_token", begins_by_default)),
        "eos": ("eos_token_id", file.metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
    chosen = {end: _token(file, tokens, key) for end, (key, is_wanted) in ends.items() if is_wanted}
    chosen = {end: token for end, token in chosen.items() if token is not None}
    if chosen:
        from tokenizers import processors

        before, after = ([chosen[end]] if end in chosen else [] for end in ("bos", "eos"))
        first, second = [*before, "$A", *after], [*before, "$B", *after]
        backend.post_processor = processors.TemplateProcessing(
            single=first,
            pair=[*first, *(f"{part}:1" for part in second)],
            special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(chosen.values())],
        )


def _token(file: GGUFFile, tokens: list[str], key: str) -> str | None:
    """The token whose id the metadata entry `key` gives. None if there is no such entry."""
    index = file.metadata.get(f"tokenizer.ggml.{key}")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{key}={index!r} is not one of {len(tokens)} tokens")
    return tokens[index]


def _list(file: GGUFFile, key: str, length: int) -> list[Any] | None:
    """The metadata entry `key`, a list with one value for each token. None if there is no such entry."""
    values = file.metadata.get(key)
    if values is not None and (not isinstance(values, list) or len(values) != length):
        raise CheckpointError(f"{file.path}: {key} must hold one entry for each of {length} tokens")
    return values
