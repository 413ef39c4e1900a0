"""Measures on a CPU what a mesh of devices costs: memory while a model is loaded, and decoding with twice the rows.

Loading: a LLaMA of random weights is written as safetensors. Some processes load it together, each its part. Told is
how far each process' peak memory goes beyond its parts, beside the largest tensor.

Decoding: the built-in model decodes rows of random tokens on one device with one thread, then on two devices, with a
thread each, twice the rows. Twice the first time over the second is 2 if the devices do not disturb each other. They
share the memory's bandwidth, so `reads` tells the same ratio for a sum over 512 MiB a thread. The last column is what
one device makes of both threads.

    python -m scripts.bench.devices                       # both
    python -m scripts.bench.devices --rows 0              # loading alone
    python -m scripts.bench.devices --processes --rows 2  # decoding alone, of 2 and 4 rows
"""

import argparse
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROUNDS, STEPS = 4, 8  # timed calls, and decode steps of each
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32_000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip
TINY = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


def write_checkpoint(directory: Path, **sizes: int) -> int:
    """Writes random weights of `CONFIG`, or of other sizes; returns the bytes of the largest tensor."""
    import numpy as np
    from safetensors.numpy import save_file

    from hshare_jax.models.hf_checkpoint import read_hf_config
    from hshare_jax.models.weights import tensor_layout

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | sizes))
    config, _ = read_hf_config(directory)
    rng, shapes = np.random.default_rng(0), {}
    for parts in tensor_layout(config).values():
        shapes |= parts
    save_file(
        {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()},
        directory / "model.safetensors",
    )
    return max(4 * int(np.prod(shape)) for shape in shapes.values())


def load_part(path: str, tiny: str, index: int, count: int, address: str) -> dict[str, Any]:
    """The work of one process: loads its part, and tells peak memory beyond what it held after a tiny model."""
    import jax

    import hshare_jax

    if count > 1:
        jax.distributed.initialize(address, count, index)
    mesh = hshare_jax.make_mesh(model=count)
    hshare_jax.load_model(tiny, mesh=mesh)  # brings every module into memory
    before = _memory("VmRSS")
    model = hshare_jax.load_model(path, mesh=mesh)
    jax.block_until_ready(model.params)
    own = sum(shard.data.nbytes for leaf in jax.tree.leaves(model.params) for shard in leaf.addressable_shards)
    return {"own": own, "peak": _memory("VmHWM") - before}


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def decode_rows(num_devices: int, rows: int, context: int) -> dict[str, Any]:
    """The work of one process: the median seconds of a decode step, dense and by HShare, and of a sum over memory."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import hshare_jax
    from hshare_jax.decode_step import decode_step
    from hshare_jax.mesh import put

    mesh = hshare_jax.make_mesh(data=num_devices) if num_devices > 1 else None
    model, found = hshare_jax.load_model("smollm2-135m-instruct", mesh=mesh), {}
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, context), np.int32)
    for name, method in {"dense": None, "HShare": hshare_jax.HShare()}.items():
        state = hshare_jax.init_state(model.config, rows, context + (ROUNDS + 1) * STEPS, method=method, mesh=mesh)
        how: Any = {"config": model.config, "method": method}
        given = put(tokens, "B T", mesh), put(np.full(rows, context, np.int32), "B", mesh)
        logits, state = hshare_jax.prefill(model.params, *given, state, **how)
        step = functools.partial(decode_step, config=model.config)
        interval = 1 if state.method_state is None else state.method_state.refresh_interval

        @functools.partial(jax.jit, donate_argnums=2)
        def decode(params, token, state, step=step, interval=interval):
            for index in range(STEPS):
                logits, state = step(params, token, state, refresh=index % interval == 0)
                token = logits.argmax(axis=-1).astype(jnp.int32)
            return token, state

        token, times = logits.argmax(axis=-1).astype(jnp.int32), []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            token, state = decode(model.params, token, state)
            jax.block_until_ready(token)
            times.append((time.perf_counter() - began) / STEPS)
        found[name] = statistics.median(times[1:])
    parts = put(np.ones((int(os.environ["PJRT_NPROC"]), 2**27), np.float32), "B S", mesh)  # a part for each thread
    add, times = jax.jit(lambda x: x.sum(axis=1)), []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        jax.block_until_ready(add(parts))
        times.append(time.perf_counter() - began)
    return found | {"reads": statistics.median(times[1:])}


def run_workers(work: str, all_arguments: list[list[object]], **settings: object) -> list[dict[str, Any]]:
    """What the processes print that do this work at the same time, one for each list of arguments."""
    environment = os.environ | {name: str(value) for name, value in settings.items()} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "scripts.bench.devices", "--work", work]
    workers = [
        subprocess.Popen([*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True)
        for arguments in all_arguments
    ]
    printed = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"{work} with {settings} failed; its error is above")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def measure_loading(counts: list[int]) -> None:
    """Prints a row for each number of processes."""
    print("| processes | parts of each | peak beyond them | the largest tensor | peak beyond / largest |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path, tiny = Path(folder) / "model", Path(folder) / "tiny"
        largest = write_checkpoint(path)
        write_checkpoint(tiny, **TINY)
        for count in counts:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            work = [[path, tiny, index, count, address] for index in range(count)]
            found = run_workers("load", work, JAX_NUM_CPU_DEVICES=1)
            worst = max(found, key=lambda process: process["peak"] - process["own"])
            beyond = worst["peak"] - worst["own"]
            print(
                f"| {count} | {worst['own'] / 1e6:.0f} MB | {beyond / 1e6:.0f} MB | {largest / 1e6:.0f} MB "
                f"| {beyond / largest:.2f} |",
                flush=True,
            )


def measure_decoding(rows: int, context: int) -> None:
    """Prints a row for each kind of decoding."""
    settings = (1, rows, 1), (2, 2 * rows, 2), (1, 2 * rows, 2)
    (one,), (two,), (wide,) = (
        run_workers("decode", [[devices, count, context]], JAX_NUM_CPU_DEVICES=devices, PJRT_NPROC=threads)
        for devices, count, threads in settings
    )
    print(f"\n{context} tokens a row\n")
    print(
        f"| | {rows} rows, 1 device, 1 thread | {2 * rows} rows, 2 devices, 2 threads | scaling "
        f"| {2 * rows} rows, 1 device, 2 threads |\n|---|---|---|---|---|"
    )
    for name in one:
        print(
            f"| {name} | {one[name] * 1e3:.1f} ms | {two[name] * 1e3:.1f} ms | {2 * one[name] / two[name]:.2f} "
            f"| {wide[name] * 1e3:.1f} ms |"
        )


def main() -> None:
    """Measures both, or does a worker's work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4], help="that load the model together")
    parser.add_argument("--rows", type=int, default=4, help="on one device")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work, *arguments = options.work
        if work == "load":
            path, tiny, index, count, address = arguments
            print(json.dumps(load_part(path, tiny, int(index), int(count), address)))
        else:
            print(json.dumps(decode_rows(*map(int, arguments))))
        return
    import jax

    print(f"{date.today()}, jax {jax.__version__}, {os.cpu_count()} cores\n")
    if options.processes:
        measure_loading(options.processes)
    if options.rows:
        measure_decoding(options.rows, options.context)


if __name__ == "__main__":
    main()
