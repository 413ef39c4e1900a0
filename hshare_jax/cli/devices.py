"""Options for several devices and several processes, and the mesh that they make."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from hshare_jax.cli.errors import Silent, UsageError, option_name, usage_errors
from hshare_jax.cli.options import whole
from hshare_jax.errors import check_whole

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from hshare_jax.models.config import ModelConfig

# A cluster names itself in one of these. Numbers below 2 mean that there is one process.
_CLUSTERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JAX_COORDINATOR_ADDRESS")
_OF_PROCESSES = ("num_processes", "process_id", "coordinator_address")
_HEARTBEAT = 10  # seconds after which a process that does not answer counts as dead, and ends the others


def add_devices(parser: argparse.ArgumentParser, *, rows: bool = False, processes: bool = False) -> None:
    """Adds the options of devices; with `rows` also those that divide prompts, with `processes` those of processes."""
    group = parser.add_argument_group("devices")
    add_sizes(group, rows=rows, default=1)
    if not processes:
        return
    group.add_argument(
        "--num-processes", type=whole, metavar="N",
        help="how many processes run this command, each on its own devices; the first one prints (default: what the "
        "environment of a cluster says, else 1)",
    )  # fmt: skip
    group.add_argument("--process-id", type=whole, metavar="I", help="which of them this is, from 0")
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="where process 0 is reached by the others")


def add_sizes(group: argparse._ArgumentGroup, *, rows: bool, default: int | None) -> None:
    """Adds the numbers of devices; with `rows` also the number of groups that divide rows. Without a value it is 1."""
    group.add_argument(
        "--tensor-parallel-size", type=whole, default=default, metavar="N",
        help="devices that divide the model's heads, mlp and vocabulary among themselves (default: 1)",
    )  # fmt: skip
    if rows:
        group.add_argument(
            "--data-parallel-size", type=whole, default=default, metavar="N",
            help="groups of such devices, which divide the rows (default: 1)",
        )  # fmt: skip


def start_processes(options: argparse.Namespace) -> None:
    """Joins the processes that run this command, if there are several, and silences all but the first.

    It must come before anything asks jax for its devices. A process that dies ends the others.

    Raises:
        UsageError: options of processes that do not belong together.
    """
    _check_numbers(options)
    given = {name: getattr(options, name, None) for name in _OF_PROCESSES}
    if all(value is None for value in given.values()):
        if not any(_names_cluster(os.environ.get(name, "")) for name in _CLUSTERS):
            return
    else:
        for name, value in given.items():
            if value is None:
                raise UsageError(f"{option_name(name)} is missing; several processes need " + _and(_OF_PROCESSES))
        if not 0 <= options.process_id < options.num_processes:
            raise UsageError(f"--process-id {options.process_id} must lie between 0 and {options.num_processes - 1}")
        host, colon, port = options.coordinator_address.rpartition(":")
        if not (host and colon and port.isascii() and port.isdecimal()):
            raise UsageError(f"--coordinator-address {options.coordinator_address} must be HOST:PORT")
        if options.num_processes == 1:
            return
    import jax

    jax.distributed.initialize(
        given["coordinator_address"], given["num_processes"], given["process_id"],
        heartbeat_timeout_seconds=_HEARTBEAT, shutdown_timeout_seconds=3 * _HEARTBEAT,
    )  # fmt: skip
    _keep_output_for_answers()
    if jax.process_index() > 0:
        sys.stdout, sys.stderr = Silent(sys.stdout), Silent(sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]


def _keep_output_for_answers() -> None:
    """Gives standard output to Python alone; what libraries write there goes to standard error.

    The library of a CPU's collectives tells on standard output that processes are connected, in the midst of an answer.
    """
    ours, encoding, errors = os.dup(1), sys.stdout.encoding, sys.stdout.errors
    sys.stdout.flush()
    os.dup2(2, 1)
    sys.stdout = open(ours, "w", encoding=encoding, errors=errors)  # noqa: SIM115 - for as long as the process lives


def _check_numbers(options: argparse.Namespace) -> None:
    """Raises UsageError for a number of devices or processes below 1."""
    with usage_errors():
        for name in ("tensor_parallel_size", "data_parallel_size", "num_processes"):
            if (value := getattr(options, name, None)) is not None:
                check_whole(name, value, 1)


def read_mesh(options: argparse.Namespace, config: "ModelConfig") -> "Mesh | None":
    """The mesh that the options ask for; None for one device in one process.

    Raises:
        UsageError: the model cannot be divided so, or there are too few devices.
    """
    import jax

    from hshare_jax.mesh import make_mesh

    parts, groups = options.tensor_parallel_size, getattr(options, "data_parallel_size", 1)
    wanted, devices = parts * groups, jax.devices()
    if wanted == 1 and jax.process_count() == 1:
        return None
    with usage_errors():
        config.for_parts(parts)
    told = f"--tensor-parallel-size {parts} asks for {wanted} devices"
    if groups > 1:
        told = f"--tensor-parallel-size {parts} and --data-parallel-size {groups} ask for {wanted} devices"
    if wanted > len(devices):
        more = "; JAX_NUM_CPU_DEVICES makes a CPU several" if devices[0].platform == "cpu" else ""
        raise UsageError(f"{told}; jax finds {len(devices)}{more}")
    if jax.process_count() > 1 and wanted < len(devices):
        raise UsageError(f"{told}; {jax.process_count()} processes have {len(devices)}, and all must take part")
    return make_mesh(groups, parts, devices[:wanted])


def _names_cluster(value: str) -> bool:
    return value != "" and not (value.isdecimal() and int(value) < 2)


def _and(names: tuple[str, ...]) -> str:
    *most, last = map(option_name, names)
    return f"{', '.join(most)} and {last}"
