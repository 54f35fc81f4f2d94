"""Run by the launcher: bytes of the live tensors of a real engine between a step's last backward and its update, and of
what a batch's graph holds; as JSON, of the fullest rank."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch

from shards.loader import Loader
from shards.stream import Stream, StreamConfig
from trainer import engine, states
from trainer.loss import Targets
from trainer.model import Gato
from trainer.model.patch import PatchEmbedding
from trainer.recipes import RECIPES

RECIPE = RECIPES["tiny-tokens"]
CONFIG = replace(
    RECIPE,
    model=replace(RECIPE.model, blocks=3, width=64, feed_forward=256, heads=2),
    data=replace(RECIPE.data, global_batch=4, micro_batch=2, stream=StreamConfig(sequence_length=120, mixture_block=8)),
)

SEQUENCES = 6


def storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Address -> bytes of every storage below tensors."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None and tensor.numel()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def held(zero: engine.Engine) -> dict[str, int]:
    """Bytes of parameters, gradients, and optimiser states with their float32 masters; those of two kinds count as the
    first."""
    inner, stage = zero.engine.optimizer, zero.stage
    parameters = [p for p in zero.gato.parameters()]
    weights = [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    gradients = [p.grad for p in parameters]
    if stage:
        for group in inner.averaged_gradients.values():
            gradients += group if isinstance(group, list) else [group]
    if stage == 3:
        gradients.append(inner.grad_partitions_flat_buffer)
    masters = states.master_weights(zero.engine)
    optimiser = list(masters)
    for master in masters:
        optimiser += [states.base_optimiser(zero.engine).state[master][key] for key in states.MOMENTS]
    seen: dict[int, int] = {}
    result = {}
    for kind, tensors in (("parameters", weights), ("gradients", gradients), ("optimiser", optimiser)):
        own = {place: size for place, size in storages(tensors).items() if place not in seen}
        seen |= own
        result[kind] = sum(own.values())
    return result


def main(folder: str, deepspeed: str) -> None:
    PatchEmbedding.appearance = PatchEmbedding.each  # as on a GPU, of whose memory the estimate is
    device = engine.start(0, 1.0)
    stream = Stream(folder.split(","), CONFIG.data.stream, seed=0)
    config = replace(CONFIG, deepspeed=deepspeed)
    trainer = engine.Engine(
        Gato(config.model, stream.vocabulary).initialise(0),
        config,
        device,
        Targets((True, False), text=False, text_shown=False),
    )
    batches = Loader(stream, 0, 4, 2, trainer.rank, trainer.world, threads=0)
    trainer.train_step(0, next(batches), False)
    trainer.engine.train()
    batch = stream.batch(0, SEQUENCES)
    kept: dict[int, int] = {}
    own = storages([*trainer.gato.parameters(), *(getattr(p, "ds_tensor", None) for p in trainer.gato.parameters())])

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.update({place: size for place, size in storages([tensor]).items() if place not in own})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.loss(batch.to(device))
    alive = sum(kept.values())
    trainer.engine.backward(loss)
    parts: list[dict[str, int]] = [{}] * trainer.world
    torch.distributed.all_gather_object(parts, held(trainer))
    result = {kind: max(part[kind] for part in parts) for kind in parts[0]} | {
        "activations": alive,
        "patches": len(batch.patches),
        "supervised": int(batch.supervised.sum()),
        "masked": bool((batch.segments != batch.segments[:, :1]).any()),
    }
    if trainer.rank == 0:
        print("measured " + json.dumps(result), flush=True)
    torch.distributed.barrier()
    os._exit(0)  # as trainer/main.py ends, and for its reason


if __name__ == "__main__":
    main(*sys.argv[-2:])
