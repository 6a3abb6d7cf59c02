"""What a machine without a network is given, and what this package's own version is there."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp

WHEELS = (
    "transformers==5.23.0", "accelerate", "platformdirs", "regex", "tokenizers", "safetensors", "huggingface-hub",
    "filelock", "gguf", "hf-xet", "httpx", "httpcore", "h11", "anyio", "idna", "certifi", "packaging", "pyyaml", "tqdm",
    "typer", "click", "shellingham", "rich", "pygments", "markdown-it-py", "mdurl",
    "peft", "psutil", "pytest", "iniconfig", "pluggy",
)  # fmt: skip
"""What the project and its tests need beside torch, numpy and jinja2, which a machine for GPUs has: 29 MB."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")


def command(folder: Path, python: str) -> list[str]:
    """What fetches the wheels for CPython `python` (such as 3.12) on Linux."""
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    where = [part for platform in PLATFORMS for part in ("--platform", platform)]
    return [*fetch, "--python-version", python, "--implementation", "cp", *where, *WHEELS]


def pack(folder: Path, python: str) -> int:
    """Fetch the wheels; the exit code of pip."""
    done = subprocess.run(command(folder, python)).returncode
    if not done:
        size = sum(file.stat().st_size for file in folder.glob("*.whl")) / 1e6
        print(f"{size:.0f} MB in {folder}. Copy it and this folder to the machine, and say there:")
        print(f"  python3 -m pip install -q --no-index --no-deps --target site {folder}/*.whl")
        print("  PYTHONPATH=site:src:. python3 recipes/gpu.py check")
    return done


def be_installed(root: Path) -> None:
    """Where the package runs from its source: a note of its version, which some parts ask for."""
    try:
        version("selfdraft")
    except PackageNotFoundError:
        number = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]
        folder = Path(mkdtemp())
        note = folder / f"selfdraft-{number}.dist-info" / "METADATA"
        note.parent.mkdir()
        note.write_text(f"Metadata-Version: 2.1\nName: selfdraft\nVersion: {number}\n", "utf-8")
        sys.path.append(str(folder))
