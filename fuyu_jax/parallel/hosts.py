"""Several hosts as one run: starting JAX's processes, and what they must agree on.

One process a host (on GPUs under Slurm or Open MPI: one a GPU). All run the same program in the
same order; the first alone writes and prints.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fuyu_jax.errors import TrainingStoppedError, UserError

T = TypeVar("T")

# How long hosts wait for one that prepares data or trains a tokenizer; a dead one is noticed by
# JAX's heartbeats, long before.
_PATIENCE_MS = 24 * 3600 * 1000
# Where launchers say how many processes there are and which this is.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_INDEXED_JOB = "JOB_COMPLETION_INDEX"

# --- start-up -----------------------------------------------------------------------------------


def start_hosts(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> int:
    """Joins the other processes of this run; nothing is initialised on a single plain machine.

    Without arguments Cloud TPU, GKE, Slurm and Open MPI are found by JAX itself. Must come before
    JAX is first used.

    Args:
      coordinator: HOST:PORT of process 0, which all others reach.
      num_processes: of all hosts together. 1 alone: no other process is looked for.
      process_id: 0 to num_processes - 1.

    Returns:
      How many processes there are.

    Raises:
      UserError: some are given and some are not, or make no sense; a launcher that started
        several processes, of which JAX knows nothing.
    """
    if jax.distributed.is_initialized():
        return _joined()
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if num_processes == 1 and coordinator is None and not process_id:
        return 1
    if any(v is not None for v in given.values()):
        missing = [f"--{k}" for k, v in given.items() if v is None]
        if missing:
            there = ", ".join(f"--{k}={v}" for k, v in given.items() if v is not None)
            raise UserError(
                f"{there} without {' and '.join(missing)}: give all of --coordinator=HOST:PORT "
                "--num_processes=N --process_id=I, or none"
            )
        assert coordinator is not None and num_processes is not None and process_id is not None
        _check(coordinator, num_processes, process_id)
        _initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    elif not _detect():
        _refuse_strangers()
    return _joined()


def _joined() -> int:
    # jax.process_count() would begin to use the devices, whose number may not be settled yet.
    from jax._src import distributed

    return distributed.global_state.num_processes


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            f"--coordinator={coordinator}: give HOST:PORT of process 0, such as "
            f"{coordinator.rstrip(':')}:1234"
        )
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: give 1 or more")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} of --num_processes={num_processes}: give 0 to "
            f"{num_processes - 1}, another to each process"
        )


def _initialize(**arguments: Any) -> None:
    try:
        jax.distributed.initialize(**arguments)
    except RuntimeError as error:
        told = str(error).strip().splitlines()[0]
        raise UserError(f"the processes of this run do not find each other: {told}") from None


def _detect() -> bool:
    """Whether JAX found (and joined) a cluster by itself."""
    indexed = _INDEXED_JOB in os.environ
    with warnings.catch_warnings():
        if not indexed:  # a plain pod: that no Kubernetes client is installed is no news
            warnings.simplefilter("ignore")
        try:
            jax.distributed.initialize()
        except ValueError as error:
            # Raised before anything is begun, where no cluster is known.
            if "coordinator_address" in str(error):
                return False
            raise UserError(f"several hosts: {error} Give all of {_flags('N', 'I')}") from None
        except RuntimeError as error:
            if "KUBERNETES_SERVICE_HOST" in os.environ and not indexed:
                return False  # a plain pod: nobody else belongs to it
            told = str(error).strip().splitlines()[0]
            raise UserError(f"the hosts of this run do not find each other: {told}") from None
    return True


def _flags(count: str, index: str) -> str:
    return f"--coordinator=HOST:PORT --num_processes={count} --process_id={index}"


def _refuse_strangers() -> None:
    """Several processes that each train alone would write over each other's work."""
    for name, count, index in _LAUNCHERS:
        if int(os.environ.get(count) or 1) > 1:
            raise UserError(
                f"{name} started {os.environ[count]} processes, and JAX does not find the others: "
                f"give {_flags(os.environ[count], '$' + index)} (or --num_processes=1 to each "
                "that is a run of its own)"
            )
    if _INDEXED_JOB in os.environ:
        raise UserError(
            f"pod {os.environ[_INDEXED_JOB]} of an indexed job, and JAX does not find the others: "
            f"install jax[k8s], or give {_flags('N', '$' + _INDEXED_JOB)} (or --num_processes=1 "
            "where this pod is the whole run)"
        )


# --- agreement ----------------------------------------------------------------------------------


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def index() -> int:
    """The number of this process."""
    return jax.process_index()


def say(text: str) -> None:
    """Prints a line, once for all hosts."""
    if first():
        print(text, flush=True)


def _client() -> Any:
    from jax._src import distributed  # the one way to exchange texts without devices

    return distributed.global_state.client


_gathered = 0


def gather(value: Any) -> list[Any]:
    """Every host's value (anything that JSON can hold), by process; all hosts must call it."""
    global _gathered
    if jax.process_count() == 1:
        return [value]
    _gathered += 1
    client, name = _client(), f"fuyu_jax/gather/{_gathered}/"
    client.key_value_set(f"{name}{jax.process_index()}", json.dumps(value))
    return [
        json.loads(client.blocking_key_value_get(f"{name}{host}", _PATIENCE_MS))
        for host in range(jax.process_count())
    ]


def _attempt(make: Callable[[], T] | None) -> T | None:
    """`make()`, if this host has something to make; an error on one is an error on all."""
    error: UserError | TrainingStoppedError | None = None
    made = None
    if make is not None:
        try:
            made = make()
        except (UserError, TrainingStoppedError) as caught:
            error = caught
    told = gather([type(error).__name__, str(error)] if error else None)
    if error is not None:
        raise error
    for host, other in enumerate(told):
        if other is not None:
            kind = UserError if other[0] == UserError.__name__ else TrainingStoppedError
            raise kind(f"host {host}: {other[1]}")
    return made


def together(make: Callable[[], T]) -> T:
    """`make()` on all hosts at once; none goes on where one could not."""
    if jax.process_count() == 1:
        return make()
    return cast(T, _attempt(make))


def first_to_last(make: Callable[[], T]) -> T:
    """`make()` on the first host, and then on the others, which find what it wrote."""
    if jax.process_count() == 1:
        return make()
    mine = _attempt(make if first() else None)
    others = _attempt(None if first() else make)
    return cast(T, mine if first() else others)


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder for the time being: a temporary one, or, for several hosts to share, a hidden one
    beside a path."""
    if jax.process_count() == 1:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = beside.with_name(f".{beside.name}.starting")
    if first():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    gather(None)
    try:
        yield folder
        gather(None)
    finally:
        if first():
            shutil.rmtree(folder, ignore_errors=True)


class HostSums:
    """Numbers of all hosts put together on the devices, beside the step and as late as it.

    What one host alone knows (a signal, lengths of its rows) is given at a step and read when the
    step's metrics are, so that nobody waits, and all hosts read the same at the same step.
    """

    def __init__(self) -> None:
        devices = np.array(jax.devices())
        mesh = Mesh(devices, ("all",))
        self._sharding = NamedSharding(mesh, PartitionSpec("all"))
        self._reduce = jax.jit(
            lambda largest, summed: (largest.max(), summed.sum(axis=0)),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )

    def give(self, largest: int, summed: list[float]) -> Any:
        """What `read` takes: the largest of all hosts' numbers, and sums."""
        if jax.process_count() == 1:
            return np.int32(largest), np.asarray(summed, np.float32)
        rows = jax.local_device_count()
        own = np.zeros((rows, len(summed)), np.float32)
        own[0] = summed
        arrays = (np.full(rows, largest, np.int32), own)
        return self._reduce(
            *(jax.make_array_from_process_local_data(self._sharding, a) for a in arrays)
        )

    @staticmethod
    def read(given: Any) -> tuple[int, list[float]]:
        largest, summed = jax.device_get(given)
        return int(largest), [float(x) for x in summed]


# --- global arrays ------------------------------------------------------------------------------


def place(tree: Any, sharding: Any) -> Any:
    """Arrays that all hosts have alike, laid out; each host brings its devices' parts alone."""
    if jax.process_count() == 1 or sharding is None:
        return jax.device_put(tree, sharding)

    def lay(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(lay, tree)


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array, on every host."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def row_share(processes: np.ndarray, process: int) -> tuple[int, int]:
    """(which, of how many) equal shares of a batch's rows a process brings.

    Args:
      processes: the process of each device of a mesh, [row shards, devices with the same rows].
      process: whose share.

    Raises:
      UserError: devices of a process have rows in part with another process.
    """
    shards = [frozenset(row.tolist()) for row in processes]
    # Processes that have the same rows (a tensor axis over hosts) bring the same share.
    groups = list(dict.fromkeys(shards))
    if sum(len(g) for g in groups) != len(frozenset().union(*groups)) or any(
        shards.count(g) != len(shards) // len(groups) for g in groups
    ):
        hosts = len(set(processes.flatten().tolist()))
        raise UserError(
            f"mesh: {len(shards)} row shards of {processes.shape[1]} devices each do not divide "
            f"over {hosts} hosts; take a mesh.tensor that divides a host's devices "
            f"({processes.size // hosts}), or a multiple of them"
        )
    mine = next(i for i, g in enumerate(groups) if process in g)
    return mine, len(groups)


# --- the end ------------------------------------------------------------------------------------


@contextlib.contextmanager
def leaving_together(seconds: float = 20.0) -> Iterator[None]:
    """Where one host ends by an error that the others do not share, it ends at once.

    JAX would let it wait minutes for the others, while they wait for it.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        try:
            _client().wait_at_barrier("fuyu_jax/leaving", int(seconds * 1000))
        except Exception:
            if isinstance(error, UserError | TrainingStoppedError):
                print(f"error: host {jax.process_index()}: {error}", file=sys.stderr, flush=True)
            else:
                traceback.print_exception(error)
                told = f"host {jax.process_index()} ends alone; another may have said why"
                print(f"error: {told}", file=sys.stderr)
            sys.stderr.flush()
            time.sleep(0.1)
            os._exit(2 if isinstance(error, UserError) else 3)
        raise
