"""Times cross-layer KV sharing: decode throughput under a byte budget, and prefill.

Every configuration decodes the largest batch whose cache fits into the bytes that `--rows` rows of the standard model
take, and prefills one prompt. The standard model is timed again beside each configuration, so that a row of the table
is one comparison. Weights are random, because speed does not depend on their values.

    python -m scripts.bench.kv_sharing --preset 110m --kv-layers 6 --rows 2 --context 1024
"""

import argparse
import dataclasses
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date

import jax
import jax.numpy as jnp
from tqdm import tqdm

from hshare_jax.decode_state import DecodeState, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.kv_sharing import PATTERNS, TARGETS, layer_passes, papers_prefill_cost, share_kv
from hshare_jax.prefill import prefill
from hshare_jax.training.presets import PRESETS, preset
from hshare_jax.training.start import new_model
from scripts.bench.gpu_timing import command

WARM_STEPS = 4
NAMES = tuple(f"{pattern}-{target}" for pattern in PATTERNS for target in TARGETS)


@dataclasses.dataclass(frozen=True)
class Speed:
    """The times of one model, each the shortest of several."""

    rows: int  # rows of the decoded batch
    step_seconds: float
    prefill_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The decode throughput of all rows together."""
        return self.rows / self.step_seconds


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One configuration beside the standard model, timed turn by turn."""

    name: str
    config: ModelConfig
    shared: Speed
    standard: Speed

    @property
    def throughput(self) -> float:
        """Decode throughput relative to the standard model's."""
        return self.shared.tokens_per_second / self.standard.tokens_per_second

    @property
    def prefill(self) -> float:
        """Prefill time relative to the standard model's."""
        return self.shared.prefill_seconds / self.standard.prefill_seconds

    def counted(self, num_tokens: int) -> float:
        """Layers that a prefill of so many tokens evaluates, relative to the standard model's."""
        return sum(layer_passes(self.config, num_tokens)) / self.config.num_layers


class Bench:
    """One model's compiled programs and arrays, ready to be timed."""

    def __init__(self, config: ModelConfig, params: dict, rows: int, context: int, prompt: int) -> None:
        self.config, self.params, self.rows, self.context = config, params, rows, context
        self.prompt = jax.random.randint(jax.random.key(1), (1, prompt), 0, config.vocab_size)

    def _seconds_of_steps(self, steps: int) -> list[float]:
        """The times of decode steps, the last with a full cache. Speed does not depend on the cached numbers."""
        state = init_state(self.config, self.rows, self.context)
        lengths = jnp.full((self.rows,), self.context - steps - WARM_STEPS, jnp.int32)
        state = DecodeState(dataclasses.replace(state.cache, lengths=lengths), None)
        token, times = jnp.zeros((self.rows,), jnp.int32), []
        for _ in range(steps + WARM_STEPS):
            began = time.perf_counter()
            logits, state = decode_step(self.params, token, state, config=self.config)
            logits.block_until_ready()
            times.append(time.perf_counter() - began)
        return times[WARM_STEPS:]

    def _seconds_of_prefill(self) -> float:
        state = jax.block_until_ready(init_state(self.config, 1, self.prompt.shape[1]))
        began = time.perf_counter()
        logits, _ = prefill(self.params, self.prompt, jnp.asarray([self.prompt.shape[1]]), state, config=self.config)
        logits.block_until_ready()
        return time.perf_counter() - began

    def warm(self) -> None:
        """Compiles both programs."""
        self._seconds_of_steps(1)
        self._seconds_of_prefill()

    def turn(self, steps: int) -> Speed:
        """The times of one turn."""
        return Speed(self.rows, min(self._seconds_of_steps(steps)), self._seconds_of_prefill())


def fastest(turns: Sequence[Speed]) -> Speed:
    """The shortest times of several turns."""
    return Speed(
        turns[0].rows, min(turn.step_seconds for turn in turns), min(turn.prefill_seconds for turn in turns)
    )  # fmt: skip


def compare(
    config: ModelConfig,
    specs: Sequence[str],
    *,
    rows: int,
    context: int,
    prompt: int,
    steps: int,
    rounds: int,
    make_params: Callable[[ModelConfig], dict],
) -> Iterator[Comparison]:
    """Yields each way of sharing beside the standard model, which decodes `rows` rows of `context` tokens."""
    standard = Bench(config, make_params(config), rows, context, prompt)
    standard.warm()
    budget = rows * config.cache_bytes_per_token(4)
    for spec in specs:
        shared_config = share_kv(config, spec)
        most = budget // shared_config.cache_bytes_per_token(4)
        shared = Bench(shared_config, make_params(shared_config), most, context, prompt)
        shared.warm()
        turns = [(standard.turn(steps), shared.turn(steps)) for _ in range(rounds)]
        ours, theirs = fastest([turn for _, turn in turns]), fastest([turn for turn, _ in turns])
        yield Comparison(spec, shared_config, ours, theirs)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="110m")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--kv-layers", type=int, nargs="+", metavar="N", help="default: half of the layers")
    parser.add_argument("--rows", type=int, default=2, help="rows of the standard model, whose cache is the budget (2)")
    parser.add_argument("--context", type=int, default=1024, help="tokens that the cache of a row holds (1024)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the timed prefill (512)")
    parser.add_argument("--steps", type=int, default=12, help="timed decode steps of a turn (12)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each model (3)")
    options = parser.parse_args()
    config = preset(options.preset, vocab_size=options.vocab_size, max_positions=max(options.context, options.prompt))
    sizes = options.kv_layers or [config.num_layers // 2]
    specs = [f"{name}:{size}" for size in sizes for name in NAMES]
    budget = options.rows * options.context * config.cache_bytes_per_token(4)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, Python {platform.python_version()}, {date.today()}; "
        f"{config.num_parameters / 1e6:.0f}M parameters, {config.num_layers} layers, float32; caches of at most "
        f"{budget / 2**20:.0f} MiB, {options.context} tokens a row; prompt of {options.prompt}"
    )
    print(f"{command()}\n")
    print(
        "| | cache bytes a token | rows | decode, tokens/s | standard's | ratio | prefill, of standard "
        "| layers counted | the paper's formula |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    found = compare(
        config, specs, rows=options.rows, context=options.context, prompt=options.prompt, steps=options.steps,
        rounds=options.rounds, make_params=lambda config: new_model(config, None).params,
    )  # fmt: skip
    for row in tqdm(found, total=len(specs), desc="configurations", disable=None):
        print(
            f"| {row.name} | {row.config.cache_bytes_per_token(4):,} | {row.shared.rows} "
            f"| {row.shared.tokens_per_second:.1f} | {row.standard.tokens_per_second:.1f} | {row.throughput:.2f} "
            f"| {row.prefill:.2f} | {row.counted(options.prompt):.2f} | {papers_prefill_cost(row.config):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
