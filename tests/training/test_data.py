"""Windows of text: their order, the held-out windows, and files that become one stream of tokens."""

import numpy as np
import pytest
from tiny_tokenizer import byte_tokenizer

from hshare_jax.errors import SettingError
from hshare_jax.training.data import encode_files, epoch_order, split_windows, step_places


@pytest.mark.parametrize("num_windows", [5, 8, 30])
def test_every_window_is_read_once_an_epoch(num_windows):
    read = np.concatenate([step_places(step, batch_size=6, num_windows=num_windows, seed=1) for step in range(20)])
    for epoch in range(120 // num_windows):
        in_epoch = read[epoch * num_windows : (epoch + 1) * num_windows]
        assert sorted(in_epoch) == list(range(num_windows))
        np.testing.assert_array_equal(in_epoch, epoch_order(num_windows, seed=1, epoch=epoch))


def test_seed_and_epoch_change_the_order():
    orders = {tuple(epoch_order(30, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    # A run that is resumed with another NumPy, or another version of this code, must continue the same order.
    assert epoch_order(8, seed=1, epoch=2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]


@pytest.mark.parametrize(
    ("num_tokens", "fraction", "held_out"), [(31, 0.3, 3), (40, 0.01, 1), (7, 0.99, 1), (400, 0.1, 13)]
)
def test_held_out_windows_are_never_trained_on(num_tokens, fraction, held_out):
    data = split_windows(np.arange(num_tokens, dtype=np.int32), 3, eval_fraction=fraction)
    predicted = [
        data.windows[data.training_indices][:, 1:].ravel().tolist(),
        data.held_out()[:, 1:].ravel().tolist(),
    ]
    assert len(data.held_out()) == held_out
    assert sorted(predicted[0] + predicted[1]) == list(range(1, 1 + (num_tokens - 1) // 3 * 3))


def test_text_to_evaluate_on_can_be_given():
    data = split_windows(np.arange(10, dtype=np.int32), 3, eval_tokens=np.arange(50, 58, dtype=np.int32))
    assert data.training_indices.tolist() == [0, 1, 2]
    assert data.held_out().tolist() == [[50, 51, 52, 53], [53, 54, 55, 56]]
    stream = np.arange(31, dtype=np.int32)
    assert split_windows(stream, 3, eval_tokens=stream, max_eval_windows=2).eval_indices.tolist() == [2, 7]
    assert split_windows(stream, 3, eval_fraction=0.5, max_eval_windows=2).eval_indices.tolist() == [2, 7]
    assert data.fingerprint != split_windows(np.arange(10, dtype=np.int32), 3).fingerprint


@pytest.mark.parametrize(
    ("num_tokens", "message"),
    [
        (3, "sequence_length=3 must be less than the text's 3 tokens: a window needs one token more than it predicts"),
        (5, "sequence_length=3 makes one window of the text's 5 tokens: .* need 7 tokens"),
    ],
)
def test_too_little_text_is_refused(num_tokens, message):
    with pytest.raises(SettingError, match=message):
        split_windows(np.arange(num_tokens, dtype=np.int32), 3)


def test_files_become_one_stream_with_an_end_token_after_each(tmp_path):
    tokenizer = byte_tokenizer()
    for name, text in (("a.txt", "so"), ("b.txt", "ah é")):
        (tmp_path / name).write_text(text)
    found = encode_files(tokenizer, [tmp_path / "a.txt", tmp_path / "b.txt"])
    end = tokenizer.eos_token_id
    assert found.tolist() == [*b"so", end, *"ah é".encode(), end]
    (tmp_path / "c.txt").write_bytes(b"ab\xff")
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"c.txt is not UTF-8 text \(byte 2\)"):
        encode_files(tokenizer, [tmp_path / "c.txt"])
    with pytest.raises(ValueError, match=r"d.txt is empty"):
        encode_files(tokenizer, [tmp_path / "d.txt"])
