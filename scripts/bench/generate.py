"""Times decoding of whole LLaMA models on a GPU, dense and through shared lists of an eighth of the tokens.

Weights, cache and labels are random bfloat16, made on the device, because speed does not depend on their values. Plans
are random: each row has another plan, with the share of computed lists that the method names. The first steps
choose the lists. The steps run as one jitted scan, greedy, and end 32 tokens before the cache is full. The floor is the
time that a step's bytes (weights, keys and values, scored labels) take at the measured copy bandwidth.

    python -m scripts.bench.generate --models LLaMA3-8B --batch 1 8 --context 4096
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hshare_jax.decode_state import DecodeState, count_reads, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.generate import generate
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_shapes
from hshare_jax.models.pretrained import Model
from scripts.bench import gpu_timing as timing

Tree = TypeVar("Tree")
ROOM = 64  # free slots when the steps begin
COLUMNS = (
    "model", "context", "batch", "side", "tokens read", "tokens/s", "step", "must read", "floor", "of floor",
    "dense / this",
)  # fmt: skip
TOY = ModelConfig(
    vocab_size=256, width=64, mlp_width=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, max_positions=512,
    windows=(None,) * 3,
)  # fmt: skip


def sides(context: int) -> dict[str, HShare | None]:
    """Dense; half of the lists computed, which is the default; and a third, as at the paper's ratio 7/8-3/4-1/2."""
    sinks, recent = (16, 64) if context >= 4096 else (2, 8)
    settings = HShareSettings(
        num_sinks=sinks, num_critical=context // 8 - sinks - recent, num_recent=recent, min_length=0
    )
    sparse = (HShare(settings).with_sharing_ratio(ratio) for ratio in ("1/2-1-1", "1/3-1-1"))
    return {"dense": None} | {f"HShare {side.sharing_ratio}": side for side in sparse}


def with_positions(config: ModelConfig, positions: int) -> ModelConfig:
    """The model with at least so many positions."""
    return dataclasses.replace(config, max_positions=max(config.max_positions, positions))


def random_tree(shapes: Tree, seed: int, dtype: jnp.dtype | None = None, scale: float = 1) -> Tree:
    """Random arrays of these shapes, in `dtype` where one is given."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = range(seed, seed + len(leaves))
    arrays = [
        timing.random_array(key, shape=leaf.shape, dtype=dtype or leaf.dtype, scale=scale)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return tree.unflatten(arrays)


def random_params(config: ModelConfig) -> dict:
    """Random bfloat16 weights of a model."""
    return random_tree(parameter_shapes(config), seed=10_000, dtype=timing.BF16, scale=0.02)


def random_plan(config: ModelConfig, method: HShare, batch: int) -> Array:
    """Plans [B, L, J] that compute the method's number of lists; every other list copies a lower computed one."""
    L, J = config.num_layers, method.settings.num_lists(config)
    first, size = method.settings.num_dense * J, L * J
    num_computed = method.search.num_computed_lists(method.settings, config)
    rng, source = np.random.default_rng(0), np.tile(np.arange(size), (batch, 1))
    for row in source:
        others = rng.permutation(np.arange(first + 1, size))[: num_computed - 1]
        own = np.sort(np.append(others, first))
        copies = np.setdiff1d(np.arange(first, size), own)
        row[copies] = own[rng.integers(np.searchsorted(own, copies))]
    return jnp.asarray(source.reshape(batch, L, J), jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "steps", "impl"), donate_argnames=("state",))
def decode_steps(
    params: dict, tokens: Array, state: DecodeState, *, config: ModelConfig, steps: int, impl: str
) -> tuple[Array, DecodeState]:
    """(The last greedy tokens [B], the state) after so many steps, a multiple of the refresh interval."""
    interval = 1 if state.method_state is None else state.method_state.refresh_interval

    def run_block(carry: tuple[Array, DecodeState], _: None) -> tuple[tuple[Array, DecodeState], None]:
        tokens, state = carry
        for step in range(interval):
            logits, state = decode_step(params, tokens, state, config=config, refresh=step == 0, impl=impl)
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (tokens, state), None

    return lax.scan(run_block, (tokens, state), length=steps // interval)[0]


def bytes_of_step(
    config: ModelConfig, params: dict, method: HShare | None, batch: int, *, reads: float, length: float
) -> float:
    """The bytes that a step must read.

    Args:
        config: the model.
        params: the weights. Embeddings that are not tied are not counted, because a step reads only a few rows.
        method: how lists are shared; None for dense decoding.
        batch: rows.
        reads: tokens that a head reads.
        length: tokens of a row, whose labels are scored.
    """
    size: float = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not config.tie_embeddings:
        size -= params["embedding"].nbytes
    size += batch * reads * config.cache_bytes_per_token(timing.BF16.itemsize)
    if method is None:
        return size
    shapes = _state_shapes(config, 1, 256, method)
    assert isinstance(shapes.method_state, SharedLists)
    labels = jax.tree.leaves(shapes.method_state.labels[-1])
    per_slot = _num_bytes(labels) / (config.num_kv_heads * shapes.cache.capacity)
    per_step = method.search.num_computed_lists(method.settings, config) / method.settings.refresh_interval
    return size + batch * per_step * length * per_slot


def _state_shapes(config: ModelConfig, batch: int, context: int, method: Method | None) -> DecodeState:
    return jax.eval_shape(lambda: init_state(config, batch, context, method=method, dtype=jnp.bfloat16))


def state_bytes(config: ModelConfig, size: tuple[int, int], method: Method | None) -> int:
    """The bytes of a state of a size (context, batch)."""
    context, batch = size
    return _num_bytes(_state_shapes(config, batch, context, method))


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Program:
    """Decode steps of one model at one size, compiled first, perhaps beside others, and run later.

    A method's plan is data, so all methods with the same settings share a program.
    """

    def __init__(
        self,
        config: ModelConfig,
        size: tuple[int, int],
        method: HShare | None,
        *,
        steps: int,
        impl: str,
    ) -> None:
        self.config, (self.context, self.batch), self.steps = config, size, steps
        self.shapes, self._impl = _state_shapes(config, self.batch, self.context, method), impl
        self._compiled: Any = None

    def compile(self) -> None:
        """Compiles the program, once. Errors come from XLA."""
        if self._compiled is None:
            shapes = parameter_shapes(self.config)
            params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, timing.BF16), shapes)
            tokens = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
            lowered = decode_steps.lower(
                params, tokens, self.shapes, config=self.config, steps=self.steps, impl=self._impl
            )
            self._compiled = lowered.compile()

    def run(self, params: dict, tokens: Array, state: DecodeState) -> tuple[Array, DecodeState]:
        """The last tokens, and the state after the steps. The given state is donated."""
        return jax.block_until_ready(self._compiled(params, tokens, state))


class Steps:
    """The decode steps of one method, ready to be timed."""

    def __init__(self, program: Program, method: HShare | None) -> None:
        self.program, self._method = program, method

    @property
    def lack(self) -> str | None:
        """Why the state does not fit on the device; None where it fits."""
        # A step's temporaries are small beside 3 % of a state.
        return timing.lacks_memory(1.03 * _num_bytes(self.program.shapes))

    def measure(self, params: dict, repeats: int) -> dict:
        """A step's {"seconds", "bytes", "reads"}; "seconds" is the median. Every repeat starts at the same length."""
        program = self.program
        program.compile()
        state, times, tokens = self._make_state(), [], jnp.zeros((program.batch,), jnp.int32)
        begin = np.asarray(state.cache.lengths)
        for _ in range(repeats + 2):  # XLA records command buffers on the first two runs
            state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, lengths=jnp.array(begin)))
            began = time.perf_counter()
            tokens, state = program.run(params, tokens, state)
            times.append((time.perf_counter() - began) / program.steps)
        reads, length = float(count_reads(state, program.config).mean()), float(state.cache.lengths.mean())
        size = bytes_of_step(program.config, params, self._method, program.batch, reads=reads, length=length)
        return {"seconds": statistics.median(times[2:]), "bytes": size, "reads": reads}

    def _make_state(self) -> DecodeState:
        """A state that lacks ROOM tokens to be full; its random arrays are allocated once."""
        program, method, shapes = self.program, self._method, self.program.shapes
        cache = random_tree(shapes.cache, seed=1)
        lengths = jnp.full((program.batch,), program.context - ROOM, jnp.int32)
        cache = dataclasses.replace(cache, lengths=lengths)
        if method is None:
            return DecodeState(cache, None)

        def lists_and_plan() -> SharedLists:  # without the labels, which are random
            state = init_state(program.config, program.batch, program.context, method=method, dtype=jnp.bfloat16)
            assert isinstance(state.method_state, SharedLists)
            return dataclasses.replace(state.method_state, labels=())

        assert isinstance(shapes.method_state, SharedLists)
        labels = random_tree(shapes.method_state.labels, seed=1000)
        lists, plan = jax.jit(lists_and_plan)(), random_plan(program.config, method, program.batch)
        return DecodeState(cache, dataclasses.replace(lists, labels=labels, source=plan))


def steps_of_size(config: ModelConfig, size: tuple[int, int], *, steps: int, impl: str) -> dict[str, Steps]:
    """The decode steps of every side at a size (context, batch)."""
    programs: dict[HShareSettings | None, Program] = {}
    found = {}
    for side, method in sides(size[0]).items():
        settings = None if method is None else method.settings
        if settings not in programs:
            programs[settings] = Program(config, size, method, steps=steps, impl=impl)
        found[side] = Steps(programs[settings], method)
    return found


def compile_programs(steps: Iterable[Steps]) -> int:
    """Compiles the programs of steps together, those whose state fits; returns their number."""
    programs = {each.program for each in steps if not each.lack}
    timing.compile_together(programs)
    return len(programs)


def measure_side(steps: Steps, params: dict, repeats: int, bandwidth: float) -> dict:
    """`Steps.measure` and the "floor" in seconds, or {"error"}."""
    if lack := steps.lack:
        return {"error": f"skipped: {lack}"}
    try:
        row = steps.measure(params, repeats)
    except timing.FAILURES as error:
        return {"error": timing.reason(error)}
    return row | {"floor": row["bytes"] / bandwidth}


def end_to_end(
    config: ModelConfig, params: dict, size: tuple[int, int], method: HShare | None, new_tokens: int
) -> dict[str, dict]:
    """Rows of prefill and decoding of one `generate` on random prompts: {"seconds", "bytes"} of a token or a step.

    Args:
        config: the model.
        params: its weights.
        size: (tokens of each prompt, rows).
        method: how lists are shared; None decodes dense.
        new_tokens: tokens to decode.
    """
    (context, batch), rng = size, np.random.default_rng(0)
    model = Model(config, params, None, (), "random", "random")
    prompts = [rng.integers(0, config.vocab_size, context).tolist() for _ in range(batch)]
    found = generate(model, prompts, max_new_tokens=new_tokens, method=method)
    timed, steps = found.timing, new_tokens - 1
    length = context + new_tokens / 2
    size_of_step = bytes_of_step(config, params, method, batch, reads=found.usage.mean_reads, length=length)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "prefill": {
            "seconds": timed.prefill_seconds, "bytes": weights, "tokens_per_second": timed.prefill_rate,
            "compile_seconds": timed.compile_seconds,
        },
        "decode": {
            "seconds": timed.decode_seconds / steps, "bytes": size_of_step, "tokens_per_second": timed.decode_rate,
            "reads": found.usage.mean_reads,
        },
    }  # fmt: skip


def bench_model(
    name: str, config: ModelConfig, options: argparse.Namespace, bandwidth: float, impl: str
) -> Iterator[dict]:
    """Yields a row for each side of each size."""
    config = with_positions(config, max(options.context))
    params = random_params(config)
    for context, batch in itertools.product(options.context, options.batch):
        dense, steps = None, steps_of_size(config, (context, batch), steps=options.steps, impl=impl)
        compile_programs(steps.values())
        for side, timed in steps.items():
            row = {"model": name, "context": context, "batch": batch, "side": side}
            row |= measure_side(timed, params, options.repeats, bandwidth)
            if side == "dense":
                dense = row.get("seconds")
            if dense is not None and "seconds" in row:
                row["dense_ratio"] = dense / row["seconds"]
            yield row


def print_row(row: dict) -> None:
    """Prints a row."""
    shown = [row.get("error", ""), *[""] * 6]
    if "seconds" in row:
        seconds, floor = row["seconds"], row["floor"]
        shown = [
            f"{row['reads']:.0f}", f"{row['batch'] / seconds:.1f}", f"{seconds * 1e3:.3f} ms",
            f"{row['bytes'] / 1e9:.3f} GB", f"{floor * 1e3:.3f} ms", f"{floor / seconds:.0%}",
            f"{row['dense_ratio']:.2f}" if "dense_ratio" in row else "",
        ]  # fmt: skip
    print(f"| {row['model']} | {row['context']} | {row['batch']} | {row['side']} | {' | '.join(shown)} |", flush=True)


def main() -> None:
    """Measures every model and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(timing.MODELS), default=list(timing.MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16_384])
    parser.add_argument("--steps", type=int, default=32, help="steps of one timed scan, at most 64")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, help="also writes the rows to this file, after each row")
    parser.add_argument("--toy", action="store_true", help="a tiny model through Pallas' interpreter, on any machine")
    options = parser.parse_args()
    if not 1 <= options.steps <= ROOM:
        parser.error(f"--steps {options.steps} must lie between 1 and {ROOM}")
    models, impl, effort = {name: timing.MODELS[name] for name in options.models}, "pallas", timing.FULL
    if options.toy:
        options.batch, options.context, options.steps, options.repeats = [1, 2], [256], 2, 2
        models, impl, effort = {"toy": TOY}, "interpret", timing.TOY
    print(timing.heading())
    bandwidth = timing.copy_bandwidth(effort)
    print(f"bfloat16, copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    print(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    rows: list[dict] = []
    for name, config in models.items():
        for row in bench_model(name, config, options, bandwidth, impl):
            print_row(row)
            rows.append(row)
            if options.json:
                timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
