"""A user's DeepSpeed file made definite: what "auto" means, what offload needs, what a device cannot do.

    JSON -> resolve_auto -> complete_offload -> require_precision -> the body that trainer/engine.py completes

Invariant: no "auto" is ignored: it is filled in, resolved with a line that says so, or refused by field.
"""

from __future__ import annotations

import difflib
from importlib import resources
from typing import Any

import deepspeed_configs

Body = dict[str, Any]

CONFIGS = resources.files(deepspeed_configs)
AUTO = "auto"
OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler",
)  # fmt: skip
"""Fields that the run's own settings fill in, see `zero_config`."""


def resolve_auto(body: Body, cuda: bool) -> tuple[Body, list[str]]:
    """A copy without "auto", and a line per field that had it. The Hugging Face trainer fills those in from its own
    arguments; here bf16 is on with a GPU (`cuda`) and off without, fp16 is off, and any other field takes DeepSpeed's
    default."""
    remarks: list[str] = []

    def resolved(branch: Body, path: str) -> Body:
        result: Body = {}
        for name, value in branch.items():
            field = f"{path}{name}"
            if isinstance(value, dict):
                result[name] = resolved(value, f"{field}.")
            elif value != AUTO or field in OURS:
                result[name] = value
            elif field in ("bf16.enabled", "bfloat16.enabled", "fp16.enabled"):
                result[name] = cuda and not field.startswith("fp16")
                remarks.append(f"{field} 'auto': {str(result[name]).lower()} on this machine")
            else:
                remarks.append(f"{field} 'auto': DeepSpeed's default")
        return result

    return resolved(body, ""), remarks


def complete_offload(body: Body) -> Body:
    """A copy in which an offloaded optimiser may be torch's, which DeepSpeed refuses unless a field allows it."""
    if not _part(body, "zero_optimization").get("offload_optimizer"):
        return body
    return {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True} | body


def precision(body: Body) -> str:
    """Number format that the forward pass computes in."""
    for field, name in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
        if _part(body, field).get("enabled"):
            return name
    if _part(body, "torch_autocast").get("enabled"):
        return f"float32 with autocast to {_part(body, 'torch_autocast').get('dtype', 'bfloat16')}"
    return "float32"


def require_precision(file: str, body: Body, device: str) -> None:
    """ValueError names the file's field whose precision a device does not have, or which needs ZeRO."""
    if device == "cpu" and precision(body) == "float16":
        raise ValueError(
            f"{file}: field 'fp16.enabled': DeepSpeed trains in float16 on GPUs only; remove it, or use bf16, or "
            "--deepspeed zero1_cpu, which computes in float32"
        )
    if precision(body) in ("float16", "bfloat16") and not _part(body, "zero_optimization").get("stage"):
        raise ValueError(
            f'{file}: {precision(body)} weights need ZeRO here: add "zero_optimization": {{"stage": 1}}, or use '
            '"torch_autocast", which computes in bfloat16 from float32 weights'
        )


def refused(file: str, error: Exception) -> ValueError:
    """DeepSpeed's refusal of a file in one line."""
    details = getattr(error, "errors", None)  # pydantic's
    if callable(details) and (found := details()):
        where, text = ".".join(map(str, found[0]["loc"])), f"field '{{}}': {found[0]['msg']}"
        return ValueError(f"{file}: {text.format(where)}; correct or remove it")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ValueError(f"{file}: DeepSpeed refuses it: {lines[0] if lines else type(error).__name__}; correct the file")


def require_shape(file: str, body: Any) -> Body:
    """The content of a file; ValueError where it is no object, or a part that must be one is not."""
    if not isinstance(body, dict):
        raise ValueError(f"{file}: must be a JSON object, as DeepSpeed's documentation has it")
    for name in ("zero_optimization", "bf16", "bfloat16", "fp16", "torch_autocast"):
        if not isinstance(body.get(name, {}), dict):
            raise ValueError(f"{file}: field '{name}' must be an object, such as {{\"enabled\": true}}")
        # DeepSpeed takes "yes" and "2" too, and what decides by them here would not
        if _part(body, name).get("enabled", False) not in (True, False, AUTO):
            raise ValueError(f"{file}: field '{name}.enabled' must be true, false or \"auto\"")
    stage = _part(body, "zero_optimization").get("stage", 0)
    if stage != AUTO and (not isinstance(stage, int) or isinstance(stage, bool)):
        raise ValueError(f"{file}: field 'zero_optimization.stage' must be 0, 1, 2 or 3, without quotes")
    return body


class ReadFields(dict[str, Any]):
    """A configuration that remembers which fields DeepSpeed asked for: it ignores all others without a word."""

    def __init__(self, body: Body):
        super().__init__(body)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def keys(self) -> Any:  # DeepSpeed writes `name in fields.keys()`
        return self

    def remarks(self) -> list[str]:
        """A line per field that was not asked for."""
        found = []
        for name in super().keys() - self.asked:
            near = difflib.get_close_matches(name, sorted(self.asked), n=1)
            meant = f"; is '{near[0]}' meant?" if near else ""
            found.append(f"field '{name}' is ignored, DeepSpeed does not know it{meant}")
        return sorted(found)


def config_names() -> list[str]:
    """Names of the configurations in deepspeed_configs/, sorted."""
    return sorted(path.name.removesuffix(".json") for path in CONFIGS.iterdir() if path.name.endswith(".json"))


def cpu_twin(name: str, known: list[str], cuda: bool) -> str:
    """The configuration to use where a recipe names one for GPUs and there is none."""
    twin = f"{name}_cpu"
    return twin if not cuda and twin in known else name


def _part(body: Body, name: str) -> Body:
    part = body.get(name)
    return part if isinstance(part, dict) else {}
