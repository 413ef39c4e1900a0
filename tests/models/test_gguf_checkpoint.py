"""GGUF files: configuration, weights and tokenizer are read as they were written, and damage is an error."""

import dataclasses
import itertools
import json
from argparse import Namespace
from typing import Any

import gguf
import numpy as np
import pytest
import regex
from comparing import assert_equal_trees, flipped
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import fused, state_of, tiny_model, write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import set_split_regex

from hshare_jax.errors import CheckpointError
from hshare_jax.files.checksums import write_checksums
from hshare_jax.kernels.block_weights import BlockWeights, floats_of
from hshare_jax.models.config import RopeConfig, config_from_hf
from hshare_jax.models.gguf_checkpoint import GGUFTensors, config_from_gguf
from hshare_jax.models.gguf_file import read_gguf
from hshare_jax.models.pretrained import load_model
from hshare_jax.models.weights import stream_parameters


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def sound(tmp_path_factory, model):
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "sound.gguf", model, tokenizer={"ggml.eos_token_id": 2})
    return path.read_bytes()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
        ("smollm3", {"num_hidden_layers": 4}),
        ("phi3", {"sliding_window": 32}),
    ],
)
def test_float32_parameters_and_configuration_are_the_ones_written(tmp_path, architecture, changes):
    model = tiny_model(architecture, **changes)
    window = {"attention.sliding_window": 32} if architecture == "phi3" else {}
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model, metadata=window))
    assert loaded.config == config_from_hf(model.config.to_dict())
    sizes = model.config
    groups = sizes.num_key_value_heads, sizes.num_attention_heads // sizes.num_key_value_heads
    assert_equal_trees(loaded.params, fused(state_of(model), sizes.num_hidden_layers, *groups))


def test_a_mistral_written_as_llama_is_read_as_llama(tmp_path):
    model = tiny_model("mistral", sliding_window=None)
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model))
    assert loaded.config.architecture == "llama"
    assert_equal_trees(loaded.params, fused(state_of(model)))


@pytest.mark.parametrize(
    ("kind", "step"),
    # How far rounding moves numbers of up to about 5: a unit in the last place, or a step of a block's scale.
    [(Kind.F16, 2**-9), (Kind.BF16, 2**-6), (Kind.Q8_0, 5 / 127), (Kind.Q4_0, 5 / 7), (Kind.Q4_1, 10 / 15)],
)
def test_quantised_parameters_are_near_the_ones_written(tmp_path, model, kind, step):
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model, kind), quantize="none")
    assert_equal_trees(loaded.params, fused(state_of(model)), atol=step)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # whose rows of q and k are permuted, or not
def test_weights_kept_in_their_bits_are_the_floats_that_gguf_reads(tmp_path, architecture, kind):
    path = write_gguf(tmp_path / "model.gguf", tiny_model(architecture), kind)
    kept, floats = (load_model(path, quantize=quantize) for quantize in ("stored", "none"))
    assert isinstance(kept.params["layers_0"]["qkv"]["weight"], BlockWeights)
    assert kept.params["embedding"].qvalue.dtype == (np.int8 if kind == Kind.Q8_0 else np.uint8)
    assert_equal_trees(floats_of(kept.params), floats.params)
    assert kept.identity == floats.identity
    assert (kept.dtype, load_model(path, quantize="stored", dtype="bfloat16").dtype) == ("float32", "bfloat16")


def test_tensors_of_several_types_in_one_parameter_become_floats(tmp_path, model):
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0)
    names = [name for name in read_gguf(path).tensors if "attn_v" in name]
    file = GGUFTensors(read_gguf(path), load_model(path).config)
    others = {f"model.layers.{name.split('.')[1]}.self_attn.v_proj.weight" for name in names}
    codes = file.codes
    file.codes = lambda name: None if name in others else codes(name)
    found = dict(stream_parameters(load_model(path).config, file, "float32", "stored"))
    assert isinstance(found["layers_0/qkv/weight"], np.ndarray)
    assert isinstance(found["layers_0/out/weight"], BlockWeights)


def test_a_scale_that_is_not_finite_is_named(tmp_path, model):
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0)
    offset = read_gguf(path).tensors["blk.1.ffn_up.weight"].offset
    damaged = bytearray(path.read_bytes())
    damaged[offset : offset + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(damaged)
    for quantize in ("stored", "none"):
        with pytest.raises(CheckpointError, match=r"mlp.up_proj.weight holds infinities or NaNs"):
            load_model(path, quantize=quantize)


@pytest.mark.parametrize(
    ("metadata", "divisors", "rope", "positions"),
    [
        ({}, None, {}, 128),
        ({"rope.scaling.type": "none"}, None, {}, 128),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, None, {"kind": "linear", "factor": 4.0}, 512),
        ({"rope.scale_linear": 2.0}, None, {"kind": "linear", "factor": 2.0}, 256),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 32},
            None,
            {"kind": "yarn", "factor": 8.0, "original_max_positions": 32},
            256,
        ),
        ({}, [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0], {"divisors": (1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0)}, 128),
    ],
)
def test_rotary_scaling_is_read(tmp_path, model, metadata, divisors, rope, positions):
    config = load_model(write_gguf(tmp_path / "model.gguf", model, metadata=metadata, rope_divisors=divisors)).config
    assert config.rope == RopeConfig(**{"original_max_positions": 128, **rope})
    assert config.max_positions == positions


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"rope.scaling.type": "longrope"}, ValueError, "rope scaling 'longrope' is not supported; supported: none"),
        ({"attention.key_length": 8}, CheckpointError, "rope.dimension_count=16 must equal the head size 8"),
        ({"block_count": 4 * 10**9}, CheckpointError, "block_count=4000000000 must be at most 10000"),
        ({"attention.value_length": 8}, CheckpointError, "attention.value_length=8 must equal the head size 16"),
    ],
)
def test_metadata_that_is_not_supported_is_refused(tmp_path, model, metadata, error, message):
    with pytest.raises(error, match=message):
        load_model(write_gguf(tmp_path / "model.gguf", model, metadata=metadata))


def test_a_phi3_with_longrope_or_without_a_window_is_refused(tmp_path):
    model = tiny_model("phi3")
    path = write_gguf(tmp_path / "model.gguf", model)
    with pytest.raises(CheckpointError, match=r"metadata phi3.attention.sliding_window is missing"):
        load_model(path)
    file = read_gguf(write_gguf(path, model, metadata={"attention.sliding_window": 0}))
    assert config_from_gguf(file).windows == (None, None)
    tensors = {**file.tensors, "rope_factors_long.weight": file.tensors["output_norm.weight"]}
    with pytest.raises(ValueError, match=r"rope_factors_long.weight: rope scaling 'longrope' is not supported"):
        config_from_gguf(dataclasses.replace(file, tensors=tensors))


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general.architecture='gemma' is not supported; known: llama, qwen2"):
        load_model(tmp_path / "model.gguf")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" * 9)
    with pytest.raises(CheckpointError, match=r"model.gguf is not a GGUF file"):
        load_model(tmp_path / "model.gguf")


@pytest.fixture
def parts(tmp_path, model):
    """The files of one model in several parts."""
    write_gguf(tmp_path / "tiny.gguf", model, Kind.Q8_0, tensors_in_part=9)
    return sorted(tmp_path.iterdir())


def test_a_split_file_is_read_whole_from_any_of_its_parts(parts, model, tmp_path):
    whole = load_model(write_gguf(tmp_path / "whole.gguf", model, Kind.Q8_0), quantize="stored")
    assert [part.name for part in parts] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        loaded = load_model(part, quantize="stored")
        assert (loaded.name, loaded.config, loaded.identity) == ("tiny", whole.config, whole.identity)


def test_a_split_file_whose_parts_do_not_lie_together_names_the_part(parts):
    last = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"of-00003.gguf is missing: .*00001-of-00003.gguf is one of 3 parts"):
        load_model(parts[0])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"00003-of-00003.gguf says that split.no=1 and split.count=3; its name"):
        load_model(parts[0])
    parts[2].write_bytes(last[:-64])
    with pytest.raises(CheckpointError, match=r"00003-of-00003.gguf is damaged"):
        load_model(parts[0])
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(CheckpointError, match=r"model.gguf is one of 3 parts .* must end in -00001-of-00003.gguf"):
        load_model(renamed)


def test_a_suffix_in_capitals_is_a_gguf_files_too(tmp_path, model):
    assert load_model(write_gguf(tmp_path / "TINY.GGUF", model)).name == "TINY"
    with pytest.raises(FileNotFoundError, match=r"a/LOST.GGUF does not exist"):
        load_model("a/LOST.GGUF")


def test_a_size_given_for_each_layer_is_read_where_all_are_equal(tmp_path, model):
    sizes = {"attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96]}
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model, metadata=sizes))
    assert loaded.config == load_model(write_gguf(tmp_path / "plain.gguf", model)).config
    uneven = write_gguf(tmp_path / "uneven.gguf", model, metadata={"attention.head_count_kv": [2, 1]})
    with pytest.raises(ValueError, match=r"llama.attention.head_count_kv differs between layers \(2, 1\)"):
        load_model(uneven)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_or_grown_is_an_error(tmp_path_factory, sound, data):
    # The file ends with the padding of the last tensor. Without this padding it is still complete.
    length = data.draw(st.one_of(st.integers(0, len(sound) - 32), st.integers(len(sound) + 1, len(sound) + 64)))
    path = tmp_path_factory.mktemp("cut") / "model.gguf"
    path.write_bytes((sound + bytes(64))[:length])
    with pytest.raises(CheckpointError, match=r"model.gguf (is damaged|is not a GGUF)"):
        load_model(path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_before_the_tensors_is_an_error_or_is_seen_in_what_the_file_says(
    tmp_path_factory, sound, position, bit
):
    path = tmp_path_factory.mktemp("flip") / "model.gguf"
    path.write_bytes(sound)
    before = read_gguf(path)
    start = min(tensor.offset for tensor in before.tensors.values())
    path.write_bytes(flipped(sound[:start], position, bit) + sound[start:])
    caught = None
    try:
        load_model(path)
    except ValueError as error:
        caught = str(error)
    if caught is not None:
        assert "model.gguf" in caught
        return
    after = read_gguf(path)  # it loads: the flip changed a name, a number to another valid one, or the padding
    is_padding = position % start >= start - 32
    assert is_padding or after != before


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_with_checksums_any_flipped_bit_is_an_error(tmp_path_factory, sound, position, bit):
    path = tmp_path_factory.mktemp("sums") / "model.gguf"
    path.write_bytes(sound)
    write_checksums(path.parent)
    path.write_bytes(flipped(sound, position, bit))
    with pytest.raises(CheckpointError, match=r"model.gguf is damaged: its SHA-256 is"):
        load_model(path)


def test_every_flipped_bit_of_a_count_is_refused(tmp_path, sound):
    # The numbers of tensors and of metadata entries: a reader that trusted them would never end.
    for position in range(8, 24):
        for bit in range(8):
            (tmp_path / "model.gguf").write_bytes(flipped(sound, position, bit))
            with pytest.raises(CheckpointError, match=r"model.gguf is damaged"):
                load_model(tmp_path / "model.gguf")


def byte_level(pre: str, pre_tokenizer) -> tuple[Tokenizer, dict]:
    """A byte-level BPE trained on a few words, and the metadata that describes it."""
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizer
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the cat's 1234 hats, they'll sit: 55512!", "größer\n\n  über 1984's cats  \t they're"] * 9
    reference.train_from_iterator(text, trainer)
    tokens = [token for token, _ in sorted(reference.get_vocab().items(), key=lambda item: item[1])]
    merges = [" ".join(pair) for pair in json.loads(reference.to_str())["model"]["merges"]]
    metadata = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "ggml.merges": merges,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.add_bos_token": False,
        "chat_template": "{{ '<|im_start|>' + messages[0]['content'] + '<|im_end|>' }}",
    }
    return reference, metadata


def loaded_tokenizer(directory, metadata) -> Any:
    model = tiny_model(vocab_size=len(metadata["ggml.tokens"]))
    return load_model(write_gguf(directory / "model.gguf", model, tokenizer=metadata)).tokenizer


SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
TEXT = st.text(st.sampled_from("thecas'lr 0123459\n\t.,:!?üß日 "), max_size=24)


@pytest.mark.parametrize(
    ("pre", "pre_tokenizer"), [("smollm", SMOLLM), ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False))]
)
def test_byte_level_tokens_equal_the_source_tokenizers(tmp_path, pre, pre_tokenizer):
    reference, metadata = byte_level(pre, pre_tokenizer)
    tokenizer = loaded_tokenizer(tmp_path, metadata)

    @settings(max_examples=100, deadline=None)
    @given(text=TEXT)
    def check(text):
        ids = tokenizer(text).input_ids
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids) == text

    check()


def test_qwen2_tokens_equal_transformers_own(tmp_path):
    _, metadata = byte_level("qwen2", pre_tokenizers.ByteLevel(add_prefix_space=False))
    vocab = {token: index for index, token in enumerate(metadata["ggml.tokens"])}
    merges: Any = [tuple(merge.split(" ")) for merge in metadata["ggml.merges"]]
    reference = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer = loaded_tokenizer(tmp_path, metadata)

    @settings(max_examples=100, deadline=None)
    @given(text=TEXT)
    def check(text):
        assert tokenizer(text).input_ids == reference(text).input_ids

    check()


CASES = "theTHEca'sSéÉ\u0301日あ0123\n\t.,/!_ "  # small and large letters, a mark, other scripts, signs


@pytest.mark.parametrize("pre", ["llama-bpe", "falcon3", "pixtral", "smaug-bpe", "tekken", "gpt-4o", "llama4"])
def test_text_is_cut_into_words_as_transformers_cuts_it(tmp_path, pre):
    reference, metadata = byte_level(pre, pre_tokenizers.ByteLevel(add_prefix_space=False))
    wanted = set_split_regex(Namespace(backend_tokenizer=reference), {"pre_tokenizer_type": pre})
    cutter = loaded_tokenizer(tmp_path, metadata).backend_tokenizer.pre_tokenizer

    @settings(max_examples=100, deadline=None)
    @given(text=st.text(st.sampled_from(CASES), max_size=24))
    def check(text):
        assert cutter.pre_tokenize_str(text) == wanted.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)

    check()


# What is cut out, one after another. The letters of deepseek-llm are the small and large ones of CASES and OTHERS,
# except the small ones of Armenian and Georgian and those of mathematics.
DEEPSEEK = {
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥\u0800-一\uac00-\ud7ff]+", r"\p{N}"),
    "deepseek-llm": (
        r"[\r\n]", r"\s?[A-Za-zÀ-ÖØ-öΩ\u0531]+",
        "\\s?[!-/:-~\u2018-\u201f\u3000-\u3002\uff01-\uff0f\uff1a-\uff5e]+", r"\s+$",
        r"[一-龥\u0800-一\uac00-\ud7ff]+", r"\p{N}",
    ),
}  # fmt: skip
OTHERS = "\u3099\u3013+Ω\u0531\u0561\u10d0\u01c0\U0001d400\uff1f\u2019\u3000"


@pytest.mark.parametrize("pre", DEEPSEEK)
def test_deepseek_cuts_with_one_expression_after_another(tmp_path, pre):
    _, metadata = byte_level(pre, pre_tokenizers.ByteLevel(add_prefix_space=False))
    cutter = loaded_tokenizer(tmp_path, metadata).backend_tokenizer.pre_tokenizer

    @settings(max_examples=200, deadline=None)
    @given(text=st.text(st.sampled_from(CASES + OTHERS), max_size=24))
    def check(text):
        pieces = [text]
        for split in DEEPSEEK[pre]:
            pieces = [part for piece in pieces for part in regex.split(f"({split})", piece) if part]
        starts = [0, *itertools.accumulate(map(len, pieces))]
        assert [place for _, place in cutter.pre_tokenize_str(text)] == list(itertools.pairwise(starts))

    check()


def test_a_file_that_names_no_rule_of_cutting_is_read_by_gpt2s_with_a_warning(tmp_path):
    reference, metadata = byte_level("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False))
    del metadata["ggml.pre"]
    with pytest.warns(UserWarning, match=r"model.gguf does not say how text is cut into words \(tokenizer.ggml.pre\)"):
        tokenizer = loaded_tokenizer(tmp_path, metadata)
    assert tokenizer("the cat's 1234").input_ids == reference.encode("the cat's 1234").ids


def test_llama3_splits_numbers_into_groups_of_three_and_begins_unasked(tmp_path):
    _, metadata = byte_level("llama-bpe", pre_tokenizers.ByteLevel(add_prefix_space=False))
    del metadata["ggml.add_bos_token"]
    tokenizer = loaded_tokenizer(tmp_path, metadata)
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12345 they'll\n\n go")
    assert [word for word, _ in words] == ["123", "45", "Ġthey", "'ll", "ĊĊ", "Ġgo"]
    assert tokenizer("the").input_ids[0] == 1
    assert tokenizer.decode(tokenizer("the cats").input_ids, skip_special_tokens=True) == "the cats"


def test_control_tokens_are_one_id_each_and_the_template_renders(tmp_path):
    _, metadata = byte_level("smollm", SMOLLM)
    model = tiny_model(vocab_size=len(metadata["ggml.tokens"]))
    loaded = load_model(write_gguf(tmp_path / "model.gguf", model, tokenizer={**metadata, "ggml.eos_token_id": 0}))
    tokenizer: Any = loaded.tokenizer
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "cats"}], tokenize=False)
    assert rendered == "<|im_start|>cats<|im_end|>"
    ids = tokenizer(rendered).input_ids
    assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)
    assert loaded.eos_token_ids == (0, 2)  # the file's own, and the one that ends a turn


PIECES = {
    "\u2581": -1.0,
    "a": -2.0,
    "b": -3.0,
    "c": -4.0,
    "ab": -5.0,
    "\u2581a": -6.0,
    "bc": -5.5,
    "abc": -7.0,
    "\u2581abc": -6.5,
}


def sentencepiece_oracle(text: str, pieces: dict[str, float]) -> list[str]:
    """Joins the neighbours with the best score, the leftmost first, until none can be joined (SentencePiece's rule)."""
    symbols = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        scores = [pieces.get(left + right, -np.inf) for left, right in itertools.pairwise(symbols)]
        if not scores or max(scores) == -np.inf:
            return symbols
        best = int(np.argmax(scores))
        symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]


def test_sentencepiece_tokens_equal_the_definition(tmp_path):
    control = {"<unk>": 2, "<s>": 3, "</s>": 3}
    bytes_ = {f"<0x{byte:02X}>": 6 for byte in range(256)}
    kinds = {**control, **bytes_, **dict.fromkeys(PIECES, 1)}
    metadata = {
        "ggml.model": "llama",
        "ggml.tokens": list(kinds),
        "ggml.scores": [PIECES.get(token, 0.0) for token in kinds],
        "ggml.token_type": list(kinds.values()),
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }
    tokenizer = loaded_tokenizer(tmp_path, metadata)

    @settings(max_examples=100, deadline=None)
    @given(text=st.text(st.sampled_from("abc "), min_size=1, max_size=16))
    def check(text):
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *sentencepiece_oracle(text, PIECES)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    check()
    assert tokenizer.convert_ids_to_tokens(tokenizer("é").input_ids) == ["<s>", "\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("é").input_ids, skip_special_tokens=True) == "é"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"ggml.pre": "chatglm-bpe"},
            ValueError,
            r"ggml.pre='chatglm-bpe' is not known; known: gpt-2, .*smollm, llama-bp",
        ),
        ({"ggml.model": "t5"}, ValueError, r"tokenizer.ggml.model='t5' is not supported; supported: gpt2, llama"),
        ({"ggml.eos_token_id": 9999}, CheckpointError, r"tokenizer.ggml.eos_token_id=9999 is not one of"),
        ({"ggml.merges": ["thecat"]}, CheckpointError, r"tokenizer.ggml.merges must be a list of pairs"),
        ({"ggml.merges": ["the xyz"]}, CheckpointError, r"merges joins \('the', 'xyz'\), which are not tokens"),
        ({"ggml.token_type": [1, 1]}, CheckpointError, r"token_type must hold one entry for each of"),
        ({"ggml.tokens": ["a"] * 320}, CheckpointError, r"names a token twice"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused(tmp_path, change, error, message):
    _, metadata = byte_level("smollm", SMOLLM)
    with pytest.raises(error, match=message):
        loaded_tokenizer(tmp_path, {**metadata, **change})
