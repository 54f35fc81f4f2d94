"""`python -m benchmarks.carry`: what has to travel to a machine with a GPU and no network, in the folder `carried/`.

registry -> wheels for Python 3.12 on Linux; DeepSpeed made here | datasets -> compressed archives | policies, commit
-> carried/ (under 60 MB) -> there: `bash carried/run.sh PLAN` installs, unpacks and runs

The machine has torch, numpy, transformers, h5py, pyarrow, rich, tensorboard and the like; carried is what it lacks.
`--shards` are a control dataset and one of Atari; `--policies` the folder whose policies record, for `--results`.

Invariant: nothing of the checkout changes; `carried/` is ignored by git.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from eval.provenance import commit

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 60.0
PYTHON = "3.12"
DEEPSPEED = "deepspeed==0.19.8"
TRAINING = (
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "hjson", "tyro", "docstring-parser",
    "typeguard", "gymnasium", "farama-notifications", "minigrid",
)  # fmt: skip
PLAYING = ("mujoco==3.3.0", "glfw", "ale-py", "zlib-ng")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64",
             "manylinux1_x86_64", "manylinux_2_12_x86_64", "manylinux_2_5_x86_64")  # fmt: skip
RUN = """#!/bin/bash
# bash carried/run.sh nine|four|results [ARGUMENT ...], from the root of the copy: install, unpack, run.
set -euo pipefail
root=$(pwd) place=${CARRIED_PLACE:-/tmp/carried} python=${CARRIED_PYTHON:-python3}
mkdir -p "$place/shards"
$python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$place/site" \\
    carried/wheels/*.whl & jobs=$!
for archive in carried/shards/*.tar.xz; do $python -m tarfile -e "$archive" "$place/shards" & jobs="$jobs $!"; done
for job in $jobs; do wait "$job"; done
export PYTHONPATH="$root:$place/site" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false MUJOCO_GL=egl
out=${OUT:-$root/results/gpu} plan=$1
shift
shards=("$place"/shards/*)
case $plan in
    nine) exec $python -m benchmarks.gpu --shards "${shards[@]}" --output "$out" --minutes 9 "$@" ;;
    four) exec $python -m benchmarks.gpu --shards "${shards[@]}" --output "$out" --minutes 4 "$@" ;;
    results) exec $python -m benchmarks.gpu --results --policies carried/policies --shards "${shards[@]}" \\
        --output "$out" --minutes 8 "$@" ;;
    *) echo "nine, four or results" >&2; exit 2 ;;
esac
"""


def wheels(folder: Path) -> None:
    """Download what there is in binary form, and make DeepSpeed's wheel, which is pure Python."""
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip"]
    target = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*pip, "download", "-q", *target, "-d", folder, *TRAINING, *PLAYING], check=True)
    make = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, DEEPSPEED]
    subprocess.run([*pip, *make], check=True, capture_output=True)


def archive(dataset: Path, folder: Path) -> None:
    """A dataset as one .tar.xz that unpacks to a folder of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{dataset.name}.tar.xz", "w:xz", preset=6) as file:
        file.add(dataset, dataset.name, filter=plain)


def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner: a name or number of this machine has no meaning there."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def carry(output: Path, shards: list[Path], policies: Path | None, made: Path | None) -> float:
    """Fill the folder; its size in MB. SystemExit if it is too large to travel."""
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    if made:
        shutil.copytree(made, output / "wheels")
    else:
        wheels(output / "wheels")
    for dataset in shards:
        archive(dataset, output / "shards")
    if policies:
        from benchmarks.gpu_results import BODIES

        (output / "policies").mkdir()
        for body in BODIES:
            shutil.copy(policies / body.policy, output / "policies")
    (output / "commit").write_text(commit() + "\n")
    (output / "run.sh").write_text(RUN)
    size = size_mb(output)
    if size > LIMIT_MB:
        largest = sorted(output.rglob("*"), key=lambda path: -path.stat().st_size)[:3]
        named = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in largest)
        raise SystemExit(f"{output}: {size:.1f} MB, more than {LIMIT_MB:g} may travel; largest: {named}")
    return size


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=ROOT / "carried")
    parser.add_argument("--shards", type=Path, nargs="+", required=True, help="a control dataset, and one of Atari")
    parser.add_argument("--policies", type=Path, help="policies that record, for --results")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that was filled before")
    options = parser.parse_args()
    size = carry(options.output, options.shards, options.policies, options.wheels)
    print(f"{options.output}: {size:.1f} MB; there: bash carried/run.sh nine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
