"""Every implementation of the kernels' operations against the reference, on one set of cases.

A case is a pure function of arrays that are drawn from a literal seed. On a GPU the cases run with impl="pallas"; on
other machines impl="interpret" runs the same kernels slowly, on the small cases. tests/kernels holds the reference to
an oracle that shares nothing with it.

    python -m scripts.bench.conformance                # on a GPU
    python -m scripts.bench.conformance --toy          # on any machine
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hshare_jax.decode_state import init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.kernels import api
from hshare_jax.kernels.choose_tokens import weigh_tokens
from hshare_jax.kernels.int8_rows import quantise_rows
from hshare_jax.kernels.labels import label_query, make_labels, score_labels
from hshare_jax.kernels.tail import HIGH, LOW, NUM_TERMS, Tail
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_shapes
from hshare_jax.prefill import prefill
from hshare_jax.shapes import EMPTY
from scripts.bench import gpu_timing as timing
from scripts.bench.generate import random_tree

F32 = 1e-5  # absolute, on outputs of about 1
LOGITS = 1e-4  # absolute, on logits after a whole decode in float32
WEIGHTS = 1e-5  # of the largest weight: how much worse a chosen slot may be than the slot that the reference chooses
RECEIVED = 1e-4  # of the most attention that a slot receives
LOW_PRECISION = 2  # a kernel may err so many times as much as the reference in the same precision
NUM_SINKS, NUM_RECENT, NUM_CRITICAL = 3, 7, 20
BUDGET = HShareSettings(num_sinks=2, num_critical=16, num_recent=4, min_length=0)  # of whole decodes
MAX_SAVED_BYTES = 14 * 10**6  # of all saved inputs together

Arrays = dict[str, Any]  # by name
Outcome = tuple[str, bool]  # what was found, and whether that is right


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: its inputs, and how an implementation's results on them are judged."""

    name: str
    make: Callable[[], Arrays]
    judge: Callable[[Arrays, str], Outcome]  # (inputs, impl)


def cases(*, toy: bool) -> Iterator[Case]:
    """All cases, those that real models need first; only a few small ones where `toy`."""
    small = {"S": 256, "lengths": (0, 1, 31, 32, 33, 256)}
    if toy:
        yield _attention("sparse", (4, 2, 2, 64), "float32", window=None, **small)
        yield _attention("dense", (4, 2, 2, 64), "bfloat16", window=20, **small)
        yield _attention("sparse", (4, 2, 2, 64), "float32", window=None, has_int8_cache=True, **small)
        yield _selection((4, 2, 2), 256, bits=4, dilate=False)
        yield _attention("sparse", (4, 2, 2, 64), "float32", window=20, rank=2, **small)
        yield _prefill((4, 2, 16), 256, "float32", window=None)
        yield _decode("labels", BUDGET)
        return
    llama2, llama3 = (32, 32, 32, 128), (32, 8, 8, 128)  # (N, K, J, H)
    ragged = (4096, 4095, 3001, 1, 64, 129, 0, 2048, *range(500, 4100, 450))
    for kind, sizes in itertools.product(("sparse", "dense"), (llama2, llama3)):
        yield _attention(kind, sizes, "bfloat16", window=None, S=4096, lengths=ragged)
    for sizes in (llama2, llama3):
        yield _attention("sparse", sizes, "bfloat16", window=None, rank=2, S=4096, lengths=ragged)
    for sizes, S in itertools.product(((4, 4, 4), (8, 2, 2)), (4096, 32_768)):
        yield _selection(sizes, S, bits=4, dilate=False)
    yield _decode("labels", BUDGET)
    yield _decode("dense", None)
    yield _prefill((32, 8, 128), 4096, "bfloat16", window=None)
    for kind, sizes in itertools.product(("sparse", "dense"), (llama2, llama3)):
        yield _attention(kind, sizes, "bfloat16", window=None, S=32_768, lengths=(32_768, 20_001))
    for kind in ("sparse", "dense"):
        yield _attention(kind, llama3, "bfloat16", window=None, S=131_072, lengths=(131_072,))
    yield _decode("labels, reused", dataclasses.replace(BUDGET, refresh_interval=2, label_bits=None))
    yield _decode("exact, per query head", dataclasses.replace(BUDGET, scoring="exact", lists_per="query_head"))
    for sizes in ((4, 4, 4, 64), (8, 2, 2, 128), (4, 2, 4, 80), (6, 1, 1, 96), (6, 3, 3, 256)):
        yield _attention("sparse", sizes, "bfloat16", window=None, **small)
    for kind, sizes in itertools.product(("sparse", "dense"), ((4, 2, 4, 80), (6, 1, 1, 96))):
        yield _attention(kind, sizes, "float32", window=20, **small)
    for kind in ("sparse", "dense"):
        yield _attention(kind, (8, 2, 2, 128), "float16", window=None, **small)
        yield _attention(kind, (6, 1, 1, 96), "float16", window=None, has_int8_cache=True, **small)
        yield _attention(kind, llama3, "bfloat16", window=None, has_int8_cache=True, S=4096, lengths=ragged)
    for sizes, rank in (((4, 2, 4, 80), 0), ((6, 1, 1, 96), 2)):
        yield _attention("sparse", sizes, "float32", window=20, rank=rank, **small)
    for S, lengths in ((32_768, (32_768, 20_001)), (131_072, (131_072,))):
        yield _attention("sparse", llama3, "bfloat16", window=None, rank=2, S=S, lengths=lengths)
    for sizes, S, bits in (((4, 2, 4), 256, 8), ((4, 2, 2), 4096, 8), ((4, 2, 2), 32_768, None)):
        yield _selection(sizes, S, bits=bits, dilate=True)
    for dtype, S, window in (("float32", 1024, None), ("bfloat16", 1024, 100), ("bfloat16", 32_768, None)):
        yield _prefill((32, 8, 128), S, dtype, window=window)


# --- attention


def _attention(
    kind: str, heads: tuple[int, int, int, int], dtype: str, *, window: int | None, S: int, lengths: tuple[int, ...],
    rank: int | None = None, has_int8_cache: bool = False,
) -> Case:  # fmt: skip
    """A case of attention, with a tail of this rank unless it is None."""
    (N, K, J, H), B = heads, len(lengths)
    num_critical = NUM_CRITICAL if S < 4096 else S // 8 - NUM_SINKS - NUM_RECENT
    starts = np.maximum(np.array(lengths) - NUM_RECENT, 0)

    def make() -> Arrays:
        rng = np.random.default_rng(1)
        shapes = {"q": (B, N, H), "keys": (B, K, S, H), "values": (B, K, S, H)}
        if rank is not None:
            shapes |= {"tail_keys": (B, N, 1 + rank, H), "tail_values": (B, N, 1 + rank, H)}
        arrays: Arrays = {
            name: timing.random_array(i, shape=shape, dtype=jnp.dtype(dtype))
            for i, (name, shape) in enumerate(shapes.items())
        }
        if rank is not None:
            # Bounds that hold some tails back, and keep all tails from weighing nothing or everything.
            terms = rng.standard_normal((B, N, NUM_TERMS + rank))
            terms[..., LOW], terms[..., HIGH] = -1, 1
            arrays["tail_terms"] = jnp.asarray(terms, jnp.float32)
        lists = np.full((2, B, J, num_critical), EMPTY, np.int32)
        for layer, b, j in np.ndindex(2, B, J):
            listed = rng.permutation(np.arange(NUM_SINKS, max(NUM_SINKS, int(starts[b]))))[
                : rng.integers(num_critical + 1)
            ]
            lists[layer, b, j, : len(listed)] = np.sort(listed)
        source = rng.integers(0, 2 * J, (B, 2, J))
        arrays |= {"lists": lists, "source": source, "lengths": np.array(lengths), "starts": starts}
        return arrays | {
            name: jnp.asarray(arrays[name], jnp.int32) for name in ("lists", "source", "lengths", "starts")
        }

    def run(a: Arrays, impl: str, keys: Any, values: Any) -> np.ndarray:
        q, lengths = a["q"].astype(keys.dtype), a["lengths"]
        if has_int8_cache:
            keys, values = quantise_rows(keys), quantise_rows(values)
        if kind == "dense":
            dense = functools.partial(api.dense_decode, window=window, impl=impl)
            return np.asarray(jax.jit(dense)(q, keys, values, lengths).astype(jnp.float32))
        sparse = functools.partial(
            api.sparse_decode, layer=1, num_sinks=NUM_SINKS, max_recent=NUM_RECENT, window=window, impl=impl
        )
        plan = {"lists": a["lists"], "source": a["source"], "recent_start": a["starts"]}
        tail = None
        if rank is not None:
            tail = Tail(a["tail_keys"].astype(keys.dtype), a["tail_values"].astype(keys.dtype), a["tail_terms"])
        out = jax.jit(sparse)(q, keys, values, lengths=lengths, tail=tail, **plan)
        return np.asarray(out.astype(jnp.float32))

    def judge(a: Arrays, impl: str) -> Outcome:
        unread = (jnp.arange(S)[None, :] >= a["lengths"][:, None])[:, None, :, None]
        poisoned = (jnp.where(unread, jnp.nan, a[name]) for name in ("keys", "values"))  # no kernel may read these
        found = run(a, impl, *poisoned)
        plain = [jnp.where(unread, 0, a[name]) for name in ("keys", "values")]
        with jax.default_matmul_precision("highest"):
            exact = run(a, "reference", *(cache.astype(jnp.float32) for cache in plain))
        most = F32
        if dtype != "float32":
            most += LOW_PRECISION * float(np.abs(run(a, "reference", *plain) - exact).max())
        return _within(found, exact, most)

    gate = ", int8 cache" if has_int8_cache else ""
    gate += "" if window is None else f", window {window}"
    gate += "" if rank is None else f", tail of rank {rank}"
    return Case(f"{kind} attention, heads {N}/{K}/{J} of {H}, {B} rows of {S}, {dtype}{gate}", make, judge)


def _prefill(heads: tuple[int, int, int], S: int, dtype: str, *, window: int | None) -> Case:
    (N, K, H), B, T = heads, 2, min(512, S // 2)

    def make() -> Arrays:
        shapes = {"q": (B, T, N, H), "keys": (B, K, S, H), "values": (B, K, S, H)}
        arrays: Arrays = {
            name: timing.random_array(i, shape=shape, dtype=jnp.dtype(dtype))
            for i, (name, shape) in enumerate(shapes.items())
        }
        is_counted = jnp.arange(B * T).reshape(B, T) % 3 != 1
        return arrays | {"starts": jnp.asarray([7, S - T], jnp.int32), "is_counted": is_counted}

    def run(a: Arrays, impl: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        q, keys, values = (a[name].astype(dtype) for name in ("q", "keys", "values"))
        attend = jax.jit(functools.partial(api.prefill_attention_received, window=window, impl=impl))
        out, received = attend(q, keys, values, a["starts"], a["is_counted"] != 0)
        return np.asarray(out.astype(jnp.float32)), np.asarray(received)

    def judge(a: Arrays, impl: str) -> Outcome:
        with jax.default_matmul_precision("highest"):
            (exact, all_received), (found, received) = run(a, "reference", "float32"), run(a, impl, dtype)
        # In low precision the weights are rounded to the dtype. What a slot receives is no such product.
        told, is_right = _within(found, exact, F32 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps))
        told_too, is_right_too = _within(received, all_received, RECEIVED * float(np.abs(all_received).max()))
        return f"{told}; received: {told_too}", is_right and is_right_too

    gate = "" if window is None else f", window {window}"
    return Case(f"prefill attention, heads {N}/{K} of {H}, {T} tokens of {S}, {dtype}{gate}", make, judge)


def _within(found: np.ndarray, exact: np.ndarray, most: float) -> Outcome:
    if not np.isfinite(found).all():
        return f"{(~np.isfinite(found)).sum()} of {found.size} numbers are not finite", False
    error = float(np.abs(found - exact).max())
    return f"error {error:.2e}, at most {most:.2e}", error <= most


# --- selection


def _selection(heads: tuple[int, int, int], S: int, *, bits: Any, dilate: bool) -> Case:
    (N, K, J), H, R = heads, 32, 16
    lengths = np.array([0, 3, 30, S // 2, S])
    B, num_critical = len(lengths), NUM_CRITICAL if S < 4096 else 432

    def make() -> Arrays:
        rng = np.random.default_rng(5)
        channels = np.sort(np.argsort(rng.random((B, K, H)), axis=-1)[..., :R], axis=-1)
        source = np.tile(np.arange(2 * J).reshape(1, 2, J), (B, 1, 1))
        source[::2, 1, -1] = 0  # the last list is a copy in every other row
        arrays = {"channels": channels, "lists": rng.integers(0, S, (2, B, J, num_critical)), "source": source}
        arrays |= {"lengths": lengths, "is_due": np.arange(B) != 3}
        keys = timing.random_array(1, shape=(B, K, S, H), dtype=jnp.dtype(jnp.float32))
        query = timing.random_array(2, shape=(B, N, H), dtype=jnp.dtype(jnp.float32), scale=2)
        integers = {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}
        return {"q": query, "keys": keys} | integers

    def judge(a: Arrays, impl: str) -> Outcome:
        labels = make_labels(a["keys"], a["channels"], bits)
        query = label_query(a["q"], a["channels"], bits)
        first, last = jnp.full_like(a["lengths"], NUM_SINKS), a["lengths"] - NUM_RECENT
        plan = {"source": a["source"], "is_due": a["is_due"] != 0, "first": first, "last": last}

        def select(impl: str) -> np.ndarray:
            choose = functools.partial(api.select_by_labels, layer=1, num_allowed=None, dilate=dilate, impl=impl)
            return np.asarray(jax.jit(choose)(a["lists"], query=query, labels=labels, **plan))

        found, expected = select(impl), select("reference")
        with jax.default_matmul_precision("highest"):
            scores = score_labels(query, labels)
        weights = np.asarray(weigh_tokens(scores, first, last, num_lists=J, dilate=dilate))
        return _chosen_alike(found, expected, weights, np.asarray(a["lists"]))

    return Case(f"selection by labels, heads {N}/{K}/{J}, {S} slots, {bits} bits, dilated {dilate}", make, judge)


def _chosen_alike(found: np.ndarray, expected: np.ndarray, weights: np.ndarray, before: np.ndarray) -> Outcome:
    """Whether lists are the reference's, but for slots of almost equal weight; `before` holds the old lists."""
    if not (found[0] == before[0]).all():
        return "lists of another layer were written", False
    differing, worst = 0, 0.0
    for b, j in np.ndindex(*weights.shape[:2]):
        ours, theirs = found[1, b, j], expected[1, b, j]
        if (ours == theirs).all():
            continue
        if (theirs == before[1, b, j]).all():
            return f"row {b}, list {j} was to stay as it was", False
        slots, wanted = ours[ours != EMPTY], theirs[theirs != EMPTY]
        if len(slots) != len(wanted) or (np.diff(slots) <= 0).any() or (ours[len(slots) :] != EMPTY).any():
            return f"row {b}, list {j} is {ours[:8]}..., not {theirs[:8]}...", False
        differing += len(set(slots.tolist()) - set(wanted.tolist()))
        got, best = np.sort(weights[b, j, slots]), np.sort(weights[b, j, wanted])
        worst = max(worst, float(np.abs(got - best).max() / np.abs(best).max()))
    return f"{differing} slots differ, by {worst:.1e} of the largest weight", worst <= WEIGHTS


# --- whole decodes


def _decode(name: str, settings: HShareSettings | None) -> Case:
    method = None if settings is None else HShare(settings, PlanSearch(num_probes=4))
    config = ModelConfig(
        vocab_size=96, width=64, mlp_width=96, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=16,
        max_positions=1024, windows=(None, 20, None, None),
    )  # fmt: skip
    lengths, steps = (1, 5, 30, 200), 4

    def make() -> Arrays:
        rng = np.random.default_rng(7)
        tokens = rng.integers(0, config.vocab_size, (len(lengths), max(lengths) + steps))
        return {"tokens": jnp.asarray(tokens, jnp.int32), "lengths": jnp.asarray(lengths, jnp.int32)}

    def run(a: Arrays, impl: str) -> tuple[np.ndarray, np.ndarray]:
        params = random_tree(parameter_shapes(config), seed=1, dtype=jnp.dtype(jnp.float32), scale=0.2)
        state = init_state(config, len(lengths), 256, method=method)
        prompt = a["tokens"][:, : max(lengths)]
        state, logits = prefill(params, prompt, a["lengths"], state, config=config, method=method)[1], []
        for step in range(steps):
            refresh = None if settings is None else step % settings.refresh_interval == 0
            tokens = a["tokens"][:, max(lengths) + step]
            out, state = decode_step(params, tokens, state, config=config, refresh=refresh, impl=impl)
            logits.append(np.asarray(out))
        method_state = state.method_state
        lists = method_state.token_indices if isinstance(method_state, SharedLists) else jnp.zeros(0)
        return np.stack(logits), np.asarray(lists)

    def judge(a: Arrays, impl: str) -> Outcome:
        with jax.default_matmul_precision("highest"):
            (found, lists), (exact, expected) = run(a, impl), run(a, "reference")
        told, is_right = _within(found, exact, LOGITS)
        return f"{told}; {int((lists != expected).sum())} places of the lists differ", is_right

    return Case(f"whole decode, {name}", make, judge)


# --- running them


def check(case: Case, impl: str) -> tuple[dict, Arrays | None]:
    """(The row of a case, its inputs if it failed)."""
    row: dict = {"side": impl}
    try:
        arrays = case.make()
        told, is_right = case.judge(arrays, impl)
    except timing.FAILURES as error:
        return row | {"error": timing.reason(error)}, None
    return row | {"note" if is_right else "error": told}, None if is_right else arrays


def save_inputs(path: Path, name: str, arrays: Arrays) -> bool:
    """Adds a case's inputs to an .npz file, as CASE/ARRAY.npy; returns False where that would grow too large."""
    host = {key: np.asarray(array) for key, array in arrays.items()}
    # numpy has no bfloat16; float32 holds the same numbers.
    host = {key: array.astype(np.float32) if array.dtype.kind == "V" else array for key, array in host.items()}
    size = path.stat().st_size if path.exists() else 0
    if size + sum(array.nbytes for array in host.values()) > MAX_SAVED_BYTES:
        return False
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        for key, array in host.items():
            with file.open(f"{name.replace('/', '-')}/{key}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    return True


def main() -> int:
    """Runs all cases and returns 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", choices=api.IMPLS, help="default: pallas, or interpret with --toy")
    parser.add_argument("--toy", action="store_true", help="a few small cases, on any machine")
    options = parser.parse_args()
    impl = options.impl or ("interpret" if options.toy else "pallas")
    print(timing.heading())
    print("| case | found |\n|---|---|")
    failed = 0
    for case in cases(toy=options.toy):
        row, _ = check(case, impl)
        failed += "error" in row
        print(f"| {case.name} | {'FAILED: ' + row['error'] if 'error' in row else row['note']} |", flush=True)
    print(f"\n{failed} failed" if failed else "\nall equal the reference")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
