"""The processes of a run: who started this one, and what they do together.

    environment of deepspeed, torchrun, mpirun or srun -> RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    on_every_rank, on_rank_0: a fault of one rank -> the same exception on all, named by rank and host

Invariant: after a collective function here, all ranks go on or all raise.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PORT = "29500"
# What starters set: (their name, rank, world size, rank on this machine, processes on this machine)
STARTERS = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE"),
)  # fmt: skip


def complete_environment(environment: MutableMapping[str, str]) -> None:
    """Add what torch.distributed needs, for a process that mpirun or srun started. What is set stays; a process that
    nobody started stays as it is.

    Raises:
        ValueError: a variable is no number, or the ranks are on several machines and where rank 0 is cannot be known.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not environment.get(name, "0").isdecimal():
            raise ValueError(f"environment variable {name}={environment[name]}: must be a number, as launchers set it")
    if "RANK" in environment:
        return
    for starter, rank, world, local, local_world in STARTERS:
        if rank not in environment or world not in environment:
            continue
        environment["RANK"], environment["WORLD_SIZE"] = environment[rank], environment[world]
        environment["LOCAL_RANK"] = environment.get(local, "0")
        here = _first_number(environment.get(local_world, ""))
        if here:
            environment["LOCAL_WORLD_SIZE"] = here
        if "MASTER_ADDR" not in environment:
            place = "127.0.0.1" if environment[world] in ("1", here) else _first_host(environment)
            if place is None:
                raise ValueError(f"{starter} on several machines does not say where rank 0 is: give it "
                                 "-x MASTER_ADDR=HOST -x MASTER_PORT=29500, the host of rank 0")  # fmt: skip
            environment["MASTER_ADDR"] = place
        environment.setdefault("MASTER_PORT", PORT)
        return


def _first_number(text: str) -> str:
    """The number that SLURM's '2(x3),1' starts with."""
    found = re.match(r"\d+", text)
    return found.group() if found else ""


def _first_host(environment: Mapping[str, str]) -> str | None:
    """The first host of SLURM's list: 'gpu[03-05,9],other' -> 'gpu03'."""
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", listed or "")
    return found.group(1) + (found.group(2) or "") if found else None


def on_rank_0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone and return its result on every rank. Its ValueError or OSError is raised on every
    rank too. Collective."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_rank(function: Callable[[], T]) -> T:
    """Call `function` on every rank and return its result. If some rank's call raises ValueError or OSError, each rank
    raises: that one its own, all others ValueError with the first one's message, rank and host. Collective."""
    result, fault = None, None
    try:
        result = function()
    except (ValueError, OSError) as error:
        fault = error
    faults = gather(str(fault) if fault is not None else "")
    if fault is not None:
        raise fault
    for rank, (host, message) in enumerate(faults):
        if message:
            raise ValueError(f"{where(rank, host)}: {message}")
    return result  # type: ignore[return-value]


def gather(value: T) -> list[tuple[str, T]]:
    """Every rank's (host, value), in the order of the ranks. Collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (socket.gethostname(), value))
    return gathered


def where(rank: int, host: str) -> str:
    """A rank in words."""
    return f"rank {rank} on {host}"


def lost(error: RuntimeError) -> bool:
    """True if an error of a collective says that another rank ended or does not answer. gloo raises a bare RuntimeError
    then; NCCL's are torch's own."""
    text = str(error)
    signs = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def out_of_memory(error: RuntimeError) -> bool:
    """True if an error says that memory is short: a GPU's, or the host's."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def process_rank() -> int:
    """Rank of this process, before the process group exists too."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
