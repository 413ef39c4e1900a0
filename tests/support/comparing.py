"""Comparing what was written with what is read: parameter trees, and files with a flipped bit."""

import numpy as np


def flipped(data: bytes, position: int, bit: int) -> bytes:
    """`data` with one bit flipped. The position wraps around."""
    position %= len(data)
    return data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]


def assert_equal_trees(found, expected, atol: float = 0.0) -> None:
    """Fails unless two parameter trees have the same keys and values, bit for bit or within `atol`."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal_trees(found[key], expected[key], atol)
    elif atol:
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=atol, rtol=0)
    else:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
