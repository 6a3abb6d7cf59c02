"""Where cached files go: one rule for all, also without a home, and nothing is left behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from selfdraft.errors import RunnerUnavailable
from selfdraft.files import atomic
from selfdraft.models.runner import kernel_build


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SELFDRAFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    atomic._private_folder.cache_clear()


def test_what_the_user_says_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert atomic.cache_folder("proofs") == tmp_path / "home" / ".cache" / "selfdraft" / "proofs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert atomic.cache_folder("proofs") == tmp_path / "xdg" / "selfdraft" / "proofs"
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "own"))
    assert atomic.cache_folder("proofs") == tmp_path / "own" / "proofs"


@pytest.mark.parametrize("why", ["a file in the way", "not writable", "no home"])
def test_without_a_home_later_runs_find_the_same_folder(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    if why == "a file in the way":
        home.write_text("", "utf-8")
    elif why == "not writable":
        home.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(home))
    else:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("platformdirs.user_cache_path", lambda _: Path("~/.cache").expanduser() / missing())
    found = atomic.cache_folder("kernels")
    atomic._private_folder.cache_clear()
    assert found == atomic.cache_folder("kernels") == tmp_path / "tmp" / f"selfdraft-{os.getuid()}" / "kernels"
    assert found.parent.stat().st_mode & 0o077 == 0


def missing() -> str:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("taken", ["link", "open to others"])
def test_a_folder_that_others_could_write_is_not_used(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are loaded from it: whoever can write there could run code as this user."""
    name, other = tmp_path / "tmp" / f"selfdraft-{os.getuid()}", tmp_path / "other"
    other.mkdir()
    if taken == "link":
        name.symlink_to(other)
    else:
        name.mkdir()
        name.chmod(0o777)
    assert atomic._private_folder() != name
    assert not list(other.iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(kernel_build, "_compiler", lambda: "c++")
    monkeypatch.setattr(kernel_build, "_fingerprint", lambda _: "x")
    kernel_build.library.cache_clear()
    with pytest.raises(RunnerUnavailable, match=r"kernels-x\.so cannot be written .*: set SELFDRAFT_CACHE"):
        kernel_build.library()
    kernel_build.library.cache_clear()


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_build, "SOURCE", tmp_path / "missing.cpp")
    with pytest.raises(RunnerUnavailable):
        kernel_build._build("false", tmp_path / "cache" / "kernels.so")
    assert not list((tmp_path / "cache").iterdir())
