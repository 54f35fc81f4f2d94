"""`deepspeed trainer/main.py` (or `gato-train`, see trainer/launcher.py): train Gato on datasets of shards.

    recipe + command line -> configuration -> process group -> trainer.loop: steps -> checkpoints, metrics, export

Invariant: every run can be killed; the same command resumes it from its last checkpoint, at the next sequence. SIGTERM
and SIGINT save a checkpoint and end it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
from pathlib import Path

if __package__ in (None, ""):
    # The launcher runs this file: imports start at the root of checkout or site-packages, not at trainer/.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Nothing has to be saved before StopRequest listens. Python sometimes loses an exception that a signal raises in an
    # import: in a callback, or in a bare `except` of a library.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Threads that spin while they wait take most of a core from other processes. Read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch.distributed as dist

from schemas.dataset import DatasetError
from schemas.files import disk_fault
from schemas.ranges import require
from schemas.terminal import protect_streams
from schemas.vocabulary import DISJOINT, VocabularyMismatch
from trainer import dry_run, engine
from trainer.arguments import parse
from trainer.config import check
from trainer.distributed.ranks import complete_environment, lost, out_of_memory, process_rank
from trainer.inputs import for_this_machine, load_initial_model
from trainer.lifecycle import StopRequest
from trainer.loop import train


def main() -> int:
    """The command; its exit status."""
    protect_streams()
    faulthandler.enable()  # a mapped shard that is truncated while it is read ends the process: print where
    output = Path()
    try:
        complete_environment(os.environ)
        stop = StopRequest()
        asked, config = parse(sys.argv[1:])
        output = config.run.output
        if asked.dry_run:
            require("world", asked.world, 1, 2**20)
            require("tflops", asked.tflops, 1e-3, 1e9)
        check(config, asked.world if asked.dry_run else int(os.environ.get("WORLD_SIZE", "1")))
        if asked.dry_run:
            config, _ = load_initial_model(asked.recipe, config)
            dry_run.show(asked.recipe, config, DISJOINT, asked.world, asked.tflops)
            return 0
        if stop.left_alone:
            print("interrupted: the launcher has ended, and nothing was trained yet", file=sys.stderr)
            return 130
        config = for_this_machine(asked.recipe, config)
        device = engine.start(asked.local_rank, config.run.patience_minutes)
        train(asked.recipe, config, device, stop)
    except (DatasetError, VocabularyMismatch, ValueError, OSError) as error:
        rank, line = process_rank(), disk_fault(error, output) or str(error)
        print(f"rank {rank}: {line}" if rank else f"error: {line}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if out_of_memory(error):
            line, remedy = (
                str(error).splitlines()[0][:200],
                "give a smaller --data.micro-batch; --dry-run shows the needs",
            )
            print(f"error: rank {process_rank()}: out of memory: {line}; {remedy}", file=sys.stderr)
            return 1
        if not lost(error):
            raise
        line = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0])  # without gloo's source file
        line = line.partition(". This is typically")[0]
        remedy = "a rank was lost or does not answer; run the same command to resume from the last checkpoint"
        if isinstance(error, dist.DistNetworkError):
            remedy = "another training may hold the port: give deepspeed --master_port another number"
            if "EADDRINUSE" not in str(error):
                place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                remedy = f"rank 0 does not answer at {place}: see that it runs there, and that the port is open"
        if "Unable to find address for" in line:
            remedy = "GLOO_SOCKET_IFNAME must name a network interface of this machine that has an address (ip address)"
        print(f"error: rank {process_rank()}: {line}; {remedy}", file=sys.stderr)
        return 1
    if dist.is_initialized():  # after an error the other ranks may be gone
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All files are written and closed. Destructors of communication threads sometimes abort the process, which the
    # launcher takes for a lost rank.
    os._exit(status)
