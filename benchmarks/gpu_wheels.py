"""What `gpu_day.py` needs on a GPU machine without a network, and the command to run there.

    python benchmarks/gpu_wheels.py      (make gpu-day)

fetches wheels for Python 3.12 on x86-64 Linux into .gpu-day/, which git ignores: pydantic and the pinned
transformers, with what they need beyond torch and the transformers 5.17 that are expected there. The tree and
the wheels together have to stay under a limit."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ".gpu-day"
MIB = 2**20
MOST = 64 * MIB
"""Bytes of the tree and the wheels together."""
NAMES = (
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_inspection",
    "typing_extensions",
    "transformers",
    "regex",
)
"""Without what these need in turn: that is here too, or expected on the machine."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
TARGET = "/tmp/site"


def requirements(constraints: str) -> list[str]:
    """The names, with the versions of constraints.txt where it has them."""
    pins = dict(re.findall(r"^([\w.-]+)(==\S+)", constraints, re.MULTILINE))
    return [name + pins.get(name, "") for name in NAMES]


def fetch(folder: Path) -> list[Path]:
    """Download the wheels in place of those that are there."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    wanted = requirements((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", *platforms, "--dest", str(folder)]
    subprocess.run([*command, *wanted], check=True)
    return sorted(folder.glob("*.whl"))


def tree(root: Path) -> int:
    """Bytes of the files that git has or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, check=True
    )
    files = [root / name for name in listed.stdout.decode().split("\0") if name]
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.exists())


def weighed(wheels: Sequence[Path], tree_bytes: int) -> tuple[str, bool]:
    """The sizes as text, and whether all of it is under the limit."""
    whole = tree_bytes + sum(wheel.stat().st_size for wheel in wheels)
    rows = [(wheel.name, wheel.stat().st_size) for wheel in wheels]
    rows += [("the tree", tree_bytes), ("together", whole), ("at most", MOST)]
    return "\n".join(f"{size / MIB:7.1f} MiB  {name}" for name, size in rows), whole <= MOST


def command(commit: str) -> str:
    """What is run there."""
    install = f"python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target {TARGET}"
    day = f'python3 benchmarks/gpu_day.py --tree {commit} --out "${{OUT:-results/gpu-day}}"'
    return f"{install} {FOLDER}/*.whl && export PYTHONPATH={TARGET} || exit; {day}"


def main() -> int:
    """Fetch, weigh, and print the command. -> the exit code."""
    try:
        wheels = fetch(ROOT / FOLDER)
    except subprocess.CalledProcessError as error:
        print(f"error: the wheels were not fetched: pip ended with {error.returncode}", file=sys.stderr)
        return 2
    text, fits = weighed(wheels, tree(ROOT))
    print(text)
    if not fits:
        print(f"error: more than {MOST // MIB} MiB: take something out of the tree", file=sys.stderr)
        return 2
    commit = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    described = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    print(f"\nOn the GPU machine, in a copy of this tree with {FOLDER}/ in it, within 10 minutes:\n")
    print(f"    {command(described)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
