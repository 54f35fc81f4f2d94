"""The choice of torch's kernel for attention within segments of varying length, made once per process.

candidates here -> as a mask in float32, values and gradients? -> timed -> the fastest is `use`d from then on

FlashAttention 2 comes with torch; FlashAttention 3 replaces it where its package is installed; cuDNN has one of its
own. Which is faster depends on the head's size and the GPU.

Invariant: a candidate that fails, or differs from the mask, is never used; without a decision it is FlashAttention 2.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import attention
from torch.nn import functional as F

TOLERANCE = 1e-2  # relative, of bfloat16 against float32
GAIN = 1.03  # that another kernel than the default must bring
_used = "flash"

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""q, k, v (N, H, D), cu_seqlens (S,) int32, the longest possible segment -> (N, H, D), causal."""


def flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """The operator is the same in all releases of torch from 2.10 on; its public wrapper, torch.nn.attention.varlen,
    is not."""
    operator = torch.ops.aten._flash_attention_forward
    return operator(q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False)[0]


def cudnn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    operator = torch.ops.aten._cudnn_attention_forward
    return operator(q, k, v, None, cu_seqlens, cu_seqlens, longest, longest, True, 0.0, True, False)[0]


def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Attention by the kernel in use."""
    return (cudnn if _used == "cudnn" else flash)(q, k, v, cu_seqlens, longest)


def candidates() -> list[str]:
    """Names of the kernels that this torch may have."""
    known: list[str] = getattr(attention, "list_flash_attention_impls", list)()
    third = "FA3" in known and importlib.util.find_spec("flash_attn_interface") is not None
    return ["flash", *(["FA3"] if third else []), "cudnn"]


def use(name: str) -> None:
    """Attend by a kernel of `candidates` from now on."""
    global _used
    if _used == "FA3":
        attention.restore_flash_attention_impl()
    if name == "FA3":
        attention.activate_flash_attention_impl("FA3")
    _used = name


def in_use() -> str:
    return _used


def named(head_size: int) -> str:
    """The kernel that the environment names, GATO_ATTENTION="flash" or "128=cudnn,32=flash" by size of the heads;
    empty if it names none."""
    parts = dict(part.rpartition("=")[::2] for part in os.environ.get("GATO_ATTENTION", "").split(","))
    return parts.get(str(head_size), parts.get("", ""))


def decide(
    device: torch.device, heads: int, head_size: int, length: int, sequences: int, compiled: bool = False
) -> dict[str, float]:
    """Try the candidates, `compiled` or not, on segments like a batch's of `sequences` x `length` tokens, and use the
    fastest of those that are right. Milliseconds of each, forward and backward; inf for one that failed or differs.
    Waits for the device."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (sequences * length, heads, head_size)
    q, k, v, upstream = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4))
    cu_seqlens, segments = example(sequences, length, device)
    few = slice(2 * length if sequences > 1 else length)
    plain = gradients(masked(segments[few], length), *(x[few].float() for x in (q, k, v, upstream)))
    found: dict[str, float] = {}
    for name in candidates():
        try:
            use(name)
            form = torch.compile(attend, dynamic=False) if compiled else attend

            def work(form: Kernel = form) -> list[Tensor]:
                return gradients(lambda q, k, v: form(q, k, v, cu_seqlens, length), q, k, v, upstream)

            right = all(difference(mine[few], other) < TOLERANCE for mine, other in zip(work(), plain))
            found[name] = milliseconds(work, device) if right else float("inf")
        except (RuntimeError, NotImplementedError):
            found[name] = float("inf")
    best = min(found, key=lambda name: found[name])
    use(best if found[best] * GAIN < found["flash"] else "flash")
    return found


def example(sequences: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Segment starts (S,) int32, padded as a batch's are, and each token's segment (N,), where every other sequence
    has two segments."""
    starts = [n * length for n in range(sequences)] + [
        n * length + 1 + (7 * n) % length for n in range(0, sequences, 2)
    ]
    cu_seqlens = torch.full((1 << (2 * sequences).bit_length(),), sequences * length, dtype=torch.int32)
    cu_seqlens[: len(starts)] = torch.tensor(sorted(starts), dtype=torch.int32)
    places = torch.arange(sequences * length, dtype=torch.int32)
    return cu_seqlens.to(device), torch.bucketize(places, cu_seqlens[: len(starts)], right=True).to(device)


def masked(segments: Tensor, length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The slow reference: causal attention of q, k, v (N, H, D) of sequences of `length` under a mask."""
    rows = segments.view(-1, length)
    mask = (rows[:, :, None] == rows[:, None, :]).tril()[:, None]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)

    return attention


def gradients(work: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output of `work` for q, k, v, and their gradients."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    y = work(q, k, v)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), upstream.to(y.dtype))]


def difference(mine: Tensor, plain: Tensor) -> float:
    """Norm of the difference over the norm of `plain`; nan where either is."""
    return float((mine.float() - plain).norm() / plain.norm())


def milliseconds(work: Callable[[], object], device: torch.device, turns: int = 5) -> float:
    """The best of some turns."""
    best = float("inf")
    for _ in range(turns):
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        best = min(best, 1e3 * (time.perf_counter() - begun))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
