"""Plan files: plans and channels are read back unchanged, and an unusable file is refused with its key and the rule."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_weights import random_params
from tiny_decoder import vary

from hshare_jax.calibration import Calibration
from hshare_jax.errors import SettingError
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.plan_files import load_channels, load_plan, save_channels, save_plan, with_files
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.pretrained import Model, ModelFiles

MODEL = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=8, max_positions=1024,
    windows=(None,) * 3, rope=RopeConfig(theta=100.0),
)  # fmt: skip
MODEL_OF_IDS = Model(MODEL, random_params(MODEL), None, (), "tiny", "0" * 16)
FILES = ModelFiles(MODEL, None, (), "tiny", "float32", lambda dtype, quantize, mesh: iter(()))
L, K, N, H = MODEL.num_layers, MODEL.num_kv_heads, MODEL.num_heads, MODEL.head_dim
HSHARE = HShare(
    HShareSettings(num_sinks=2, num_critical=6, num_recent=4, label_channels=3, dense_layers=1, min_length=0)
)
LLAMA2_MAP = [
    *(0, 1, 2, 2, 2, 2, 6, 7, 8, 8, 8, 11, 8, 8, 14, 14, 14, 14, 14, 19, 20, 20, 22, 22, 24, 25, 24, 27, 27, 29, 27),
    31,
]
LLAMA2 = dataclasses.replace(
    MODEL, num_layers=32, windows=(None,) * 32, num_heads=32, num_kv_heads=32, head_dim=128, width=4096
)


@pytest.fixture
def calibrated() -> Calibration:
    channels = np.stack([np.random.default_rng(2).permutation(H) for _ in range(L * K)]).reshape(L, K, H)
    return Calibration(channels, SharePlan(((0, 1, 2), (3, 4, 3), (3, 4, 8))), 87)


def test_files_are_read_back_unchanged(tmp_path, calibrated):
    save_channels(tmp_path / "new" / "channels.json", calibrated.channels, MODEL_OF_IDS)
    save_plan(tmp_path / "plan.json", calibrated.plan, MODEL_OF_IDS, HSHARE)
    for model in (MODEL_OF_IDS, FILES):
        channels = load_channels(tmp_path / "new" / "channels.json", model)
        np.testing.assert_array_equal(channels, calibrated.channels)
        assert load_plan(tmp_path / "plan.json", model, HSHARE) == calibrated.plan
    settings = json.loads((tmp_path / "plan.json").read_text())["hshare_jax"]["settings"]
    records = (HSHARE.settings, HSHARE.search)
    assert settings == {f.name: str(getattr(record, f.name)) for record in records for f in dataclasses.fields(record)}


def test_a_file_of_another_model_is_refused(tmp_path, calibrated):
    save_channels(tmp_path / "channels.json", calibrated.channels, MODEL_OF_IDS)
    save_plan(tmp_path / "plan.json", calibrated.plan, MODEL_OF_IDS, HSHARE)
    other = dataclasses.replace(MODEL_OF_IDS, identity="1" * 16)
    message = "json was made with tiny, identity 0000.*, has identity 1111.* in float32: calibrate again with it"
    with pytest.raises(ValueError, match=message):
        load_channels(tmp_path / "channels.json", other)
    with pytest.raises(ValueError, match=message):
        load_plan(tmp_path / "plan.json", other, HSHARE)


def test_a_file_is_replaced_only_when_asked(tmp_path, calibrated):
    path = tmp_path / "plan.json"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"plan\.json exists; choose another path, or ask to overwrite it"):
        save_plan(path, calibrated.plan, MODEL_OF_IDS, HSHARE)
    assert path.read_text() == "mine"
    save_plan(path, calibrated.plan, MODEL_OF_IDS, HSHARE, overwrite=True)
    assert load_plan(path, MODEL_OF_IDS, HSHARE) == calibrated.plan


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, calibrated, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "plan.json").write_text("mine")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_plan(tmp_path / "plan.json", calibrated.plan, MODEL_OF_IDS, HSHARE, overwrite=True)
    with pytest.raises(OSError, match="No space left"):
        save_channels(tmp_path / "channels.json", calibrated.channels, MODEL_OF_IDS)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "mine"


def write(path: Path, table: Any) -> Path:
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


def published_channels(heads: list, num_layers: int = L) -> dict[str, Any]:
    return {f"model.layers.{layer}.self_attn.qk_proj": heads for layer in range(num_layers)}


def test_published_channels_of_query_heads_are_merged_by_mean_rank(tmp_path):
    up, down = list(range(H)), list(range(H))[::-1]
    odd = [1, 0, 3, 2, 5, 4, 7, 6]
    rest = {"model.layers.0.self_attn.q_proj": [[0]], "model.layers.0.mlp.down_proj": "anything"}
    path = write(tmp_path / "c.json", {**published_channels([up, down, odd, odd, up, odd]), **rest})
    # In up and down every channel has the mean rank 3.5. In up and odd the two channels of each pair tie.
    np.testing.assert_array_equal(load_channels(path, MODEL_OF_IDS), np.tile([up, odd, up], (L, 1, 1)))


def test_published_channels_of_kv_heads_are_taken_as_they_are(tmp_path):
    heads = [[3, 1, 2], [0, 7, 5], [2, 6, 4]]
    found = load_channels(write(tmp_path / "c.json", published_channels(heads)), MODEL_OF_IDS)
    np.testing.assert_array_equal(found, np.tile(heads, (L, 1, 1)))


ALL = [list(range(H))] * K
MALFORMED_CHANNELS = {
    # the content of the file, and the message that follows the name of the file
    "not JSON": ("{", "is not JSON"),
    "not text": ("\udcff", "is not JSON"),
    "a list": ([1], "must hold a JSON object; it holds a list"),
    "a plan": ({"hshare_jax": {"kind": "plan"}}, "key hshare_jax must be of kind 'channels'; it is 'plan'"),
    "no origin": ({"hshare_jax": 1}, "key hshare_jax must be of kind 'channels'; it is 1"),
    "empty": ({}, r"key model.layers.0.self_attn.qk_proj is missing; a file for this model has 3 layers"),
    "too few layers": (published_channels(ALL, L - 1), "key model.layers.2.self_attn.qk_proj is missing"),
    "too many layers": (published_channels(ALL, L + 1), "key model.layers.3.self_attn.qk_proj is unexpected"),
    "too few heads": (published_channels(ALL[1:]), "for each of 3 kv heads or 6 query heads; it has 2 entries"),
    "no list": ({**published_channels(ALL), "model.layers.1.self_attn.qk_proj": 7}, r"qk_proj must .*; it has 7"),
    "no list of a head": (published_channels([*ALL[1:], 3]), r"qk_proj\[2\] must be a list of channel numbers"),
    "an empty list": (published_channels([[], *ALL[1:]]), r"qk_proj\[0\] must be a list of channel numbers, at least"),
    "a fraction": (published_channels([[0.5], *ALL[1:]]), r"qk_proj\[0\] must be a list of channel numbers"),
    "beyond the head": (published_channels([*ALL[1:], [8]]), r"qk_proj\[2\] holds channel 8; .* in \[0, head_dim=8\)"),
    "negative": (published_channels([[0, -1], *ALL[1:]]), r"qk_proj\[0\] holds channel -1"),
    "repeated": (published_channels([[0, 1, 0], *ALL[1:]]), r"qk_proj\[0\] holds a channel twice"),
    "ragged": (published_channels([[0, 1], [2], [3, 4]]), r"qk_proj\[1\] has 1 channels, but head 0 has 2"),
    "ragged layers": (
        {**published_channels(ALL), "model.layers.1.self_attn.qk_proj": [[0]] * K},
        "model.layers.1.self_attn.qk_proj has 1 channels a head, but layer 0 has 8",
    ),
    "half a ranking to merge": (published_channels([[0, 1]] * N), "ranks 2 channels of each query head; .* head_dim=8"),
}


@pytest.mark.parametrize("name", MALFORMED_CHANNELS)
def test_a_malformed_file_of_channels_is_named_with_its_key_and_rule(name, tmp_path):
    table, message = MALFORMED_CHANNELS[name]
    path = tmp_path / "bad.json"
    path.write_bytes(table.encode(errors="surrogateescape") if isinstance(table, str) else json.dumps(table).encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_channels(path, MODEL_OF_IDS)
    assert str(caught.value).startswith(str(path))


def test_a_published_layer_map_copies_list_by_list(tmp_path):
    model = dataclasses.replace(FILES, config=LLAMA2)
    plan = load_plan(
        write(tmp_path / "p.json", {"layer.share_config": LLAMA2_MAP}),
        model,
        vary(HSHARE, dense_layers=0),
    )
    assert plan.source == tuple(tuple(32 * layer + j for j in range(32)) for layer in LLAMA2_MAP)
    assert plan.is_computed.any(axis=1).sum() == 16


MALFORMED_PLANS = {
    "not JSON": ("no", "is not JSON"),
    "no plan": ({}, "neither key hshare_jax nor layer.share_config; this is not a plan file"),
    "channels": ({"hshare_jax": {"kind": "channels"}}, "key hshare_jax must be of kind 'plan'; it is 'channels'"),
    "no source": ({"hshare_jax": {"kind": "plan", "identity": "0" * 16}}, "source must be a list of whole numbers"),
    "words": ({"hshare_jax": {"kind": "plan", "identity": "0" * 16}, "source": [["a"]]}, "source must be a list of wh"),
    "other sizes": (
        {"hshare_jax": {"kind": "plan", "identity": "0" * 16}, "source": [[0, 1]]},
        "the plan is for 1 layers of 2 lists; this model with lists_per='kv_head' has 3 layers of 3",
    ),
    "a higher list": (
        {"hshare_jax": {"kind": "plan", "identity": "0" * 16}, "source": [[0, 2, 2], [3, 4, 5], [6, 7, 8]]},
        r"source\[0\]\[1\]=2 must be a flat id",
    ),
    "too few layers": ({"layer.share_config": [0, 1]}, "share_config must be a list of 3 layer numbers, one for each"),
    "a word": ({"layer.share_config": [0, 1, "1"]}, "share_config must be a list of 3 layer numbers"),
    "a higher layer": ({"layer.share_config": [0, 2, 2]}, r"share_config\[1\]=2 must be a layer from 0 to 1 that maps"),
    "a copy of a copy": ({"layer.share_config": [0, 0, 1]}, r"share_config\[2\]=1 must be a layer from 0 to 2 that m"),
    "a copy of a dense layer": ({"layer.share_config": [0, 1, 0]}, "copies from the first 1 layers, which are dense"),
}


@pytest.mark.parametrize("name", MALFORMED_PLANS)
def test_a_malformed_file_of_a_plan_is_named_with_its_key_and_rule(name, tmp_path):
    table, message = MALFORMED_PLANS[name]
    path = write(tmp_path / "bad.json", table)
    with pytest.raises(ValueError, match=message) as caught:
        load_plan(path, MODEL_OF_IDS, HSHARE)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "none.json", MODEL_OF_IDS, HSHARE)


def write_as_before(path: Path, **changes: str) -> Path:
    """Writes a plan file as this package wrote it when the kind of a plan was the setting `plan`."""
    settings = {
        "num_sinks": "8", "num_critical": "88", "num_recent": "32", "budget_ratio": "None", "layer_ratio": "1/2",
        "head_ratio": "1", "refresh_interval": "1", "lists_per": "kv_head", "plan": "units", "plan_scope": "sequence",
        "dilate": "True", "dense_layers": "1", "min_length": "0", "scoring": "labels", "label_channels": "None",
        "label_bits": "4", "num_probes": "64",
    }  # fmt: skip
    origin = {"kind": "plan", "model": "tiny", "identity": "0" * 16, "settings": settings | changes}
    return write(path, {"hshare_jax": origin, "source": [[0, 1, 2], [3, 4, 3], [3, 4, 8]]})


def test_a_plan_file_with_the_settings_of_before_still_loads(tmp_path):
    path = write_as_before(tmp_path / "plan.json")
    assert load_plan(path, MODEL_OF_IDS, HSHARE) == SharePlan(((0, 1, 2), (3, 4, 3), (3, 4, 8)))
    given = ("plan_kind", "plan_scope", "num_probes", "layer_ratio", "head_ratio")
    method = with_files(HSHARE, MODEL_OF_IDS, plan_file=path, given=given)
    assert method.plan == load_plan(path, MODEL_OF_IDS, HSHARE)


def test_a_kind_of_plan_that_contradicts_a_file_of_before_is_refused(tmp_path):
    path = write_as_before(tmp_path / "plan.json", plan="anchors")
    with pytest.raises(SettingError, match=r"plan_kind='units' has no effect: .*was found with .*anchors"):
        with_files(HSHARE, MODEL_OF_IDS, plan_file=path, given=["plan_kind"])
