"""Which instructions kernels use: bits on processors that have fewer, and libraries that a wheel brings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from selfdraft.errors import RunnerUnavailable
from selfdraft.models.machine import cpu_flags
from selfdraft.models.packed import layout
from selfdraft.models.packed.formats import FORMATS
from selfdraft.models.packed.twin import twin
from selfdraft.models.runner import kernel_build, levels
from selfdraft.models.runner.one_layer import run_floats
from tests.models import unavailable
from tests.test_packed_formats import blocks, odd_rows

compiled = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
SERVER = levels.LEVELS[0].needs | {"sse2", "amx_tile"}

CHECK = """
import torch
from selfdraft.models.packed import layout
from selfdraft.models.packed.formats import FORMATS
from selfdraft.models.packed.twin import twin
from selfdraft.models.runner.one_layer import run_blocks, run_floats
from tests.test_packed_formats import blocks, odd_rows

def same(a, b):
    return torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5))

torch.set_num_threads(1)
for out, wide in ((5, 1), (17, 33), (33, 200)):
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = odd_rows(wide, dtype), torch.randn(out).to(dtype)
        for kind in FORMATS.values():
            packed = layout.pack(blocks(kind, out, wide), kind)
            wanted = twin(x, packed, bias, kind, out, wide)
            for rows in (1, 2, 3, 4, 6, 8, 10, 13):
                said = run_blocks(x[:rows], packed, bias, kind.code, out, wide, threads=1 + rows % 2)
                assert same(said, wanted[:rows]), (str(kind), out, wide, rows, dtype)
        weight = torch.randn(out, wide).to(dtype)
        exact = torch.zeros(13, out, dtype=torch.float64)
        for k in range(wide):  # one rounding for each input; products of float32 are exact in float64
            exact = (exact + x[:, k, None].double() * weight[:, k].double()).float().double()
        exact = (exact.float() + bias.float()).to(dtype)
        alone = torch.cat([run_floats(x[r : r + 1], weight, bias) for r in range(13)])
        for rows in (2, 3, 4, 6, 8, 10, 13):
            assert same(run_floats(x[:rows], weight, bias), alone[:rows]), (out, wide, rows, dtype)
        near = alone.isfinite().all(1) & exact.isfinite().all(1)
        torch.testing.assert_close(alone[near], exact[near], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
print("checked", len(FORMATS))
"""


@compiled
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_sums_in_the_middle_of_two_numbers_go_to_the_even_one(rows: int) -> None:
    """So rare in text that comparisons of whole passes do not see it. Whole vectors of results, and the rest of one."""
    step = 2.0**-7  # from one bfloat16 number to the next, above 1
    sums = torch.tensor([[1, step / 2], [1 + step, step / 2], [-1, -step / 2], [-1 - step, -step / 2], [1, 0]])
    x = sums.bfloat16().repeat(8, 1)[:rows] if rows > 1 else sums[1:2].bfloat16()
    said = run_floats(x, torch.ones(33, 2, dtype=torch.bfloat16))
    wanted = x.float().sum(1, keepdim=True).bfloat16().expand(-1, 33)
    assert said.tolist() == wanted.tolist()
    assert rows == 1 or {1.0, 1 + 2 * step} <= set(said.flatten().tolist())


@compiled
def test_bits_with_fewer_instructions() -> None:
    """In a process of its own: kernels are loaded once."""
    if levels.best_level(cpu_flags(), "avx2") is None:
        pytest.skip("this processor has no AVX2")
    there = {**os.environ, "SELFDRAFT_INSTRUCTIONS": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, env=there, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == f"checked {len(FORMATS)}", done.stderr


@compiled
def test_passes_with_fewer_instructions() -> None:
    """Attention has kernels of its own for AVX2: whole passes, where the processor would run others."""
    if "avx512f" not in cpu_flags():
        pytest.skip("this processor has no AVX-512: all tests run the kernels for AVX2, or fewer")
    there = {**os.environ, "SELFDRAFT_INSTRUCTIONS": "avx2"}
    files = ["tests/test_attention_rows.py", "tests/test_runner.py::test_the_text_is_that_of_the_plain_path"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        env=there,
        cwd=Path(__file__).parent.parent,
    )
    assert not done.returncode, done.stdout


def test_the_best_level_of_a_processor() -> None:
    def name(cpu: frozenset[str], asked: str = "native") -> str | None:
        level = levels.best_level(cpu, asked)
        return None if level is None else level.name

    assert name(SERVER) == "avx512"
    assert name(SERVER, "avx2") == "avx2"
    assert name(SERVER, "generic") is None
    assert name(SERVER - {"avx512_vnni"}) == "avx2"
    assert name(SERVER - {"fma"}) is None
    assert name(frozenset()) is None


@pytest.mark.parametrize(
    ("target", "version", "switch", "system", "machine", "built"),
    [
        ("wheel", "standard", "1", "Linux", "x86_64", True),
        ("wheel", "standard", "", "Linux", "x86_64", False),
        ("wheel", "editable", "1", "Linux", "x86_64", False),
        ("sdist", "standard", "1", "Linux", "x86_64", False),
        ("wheel", "standard", "1", "Linux", "aarch64", False),
        ("wheel", "standard", "1", "Darwin", "x86_64", False),
    ],
)
def test_when_a_wheel_has_kernels(
    target: str, version: str, switch: str, system: str, machine: str, built: bool
) -> None:
    assert levels.wanted(target, version, {levels.SWITCH: switch}, system, machine) is built


def test_a_failing_compiler_fails_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(levels, "COMPILERS", ("no-such-compiler",))
    assert levels.compiled(tmp_path / "run.cpp", tmp_path, said.append) == {}
    monkeypatch.setattr(levels, "COMPILERS", ("false",))
    assert levels.compiled(tmp_path / "run.cpp", tmp_path, said.append) == {}
    assert [line.partition(":")[0] for line in said] == ["no kernels in this wheel"] * 2


def test_a_built_in_library_is_for_machines_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELFDRAFT_INSTRUCTIONS", raising=False)
    monkeypatch.setattr(kernel_build, "BUILT", tmp_path)
    monkeypatch.setattr(kernel_build, "cpu_flags", lambda: SERVER)
    for name in ("avx512", "avx2"):
        (tmp_path / f"{name}.so").write_bytes(name.encode())
    monkeypatch.setattr(kernel_build, "_found", lambda: "g++")
    assert kernel_build._built_in() is None
    monkeypatch.setattr(kernel_build, "_found", lambda: None)
    assert kernel_build._built_in() == tmp_path / "avx512.so"
    first = kernel_build.fingerprint()
    monkeypatch.setenv("SELFDRAFT_INSTRUCTIONS", "avx2")
    assert kernel_build._built_in() == tmp_path / "avx2.so"
    assert first.startswith("built-in-avx512-") != kernel_build.fingerprint().startswith("built-in-avx512-")
    monkeypatch.setenv("SELFDRAFT_INSTRUCTIONS", "generic")
    with pytest.raises(RunnerUnavailable, match="no C\\+\\+ compiler"):
        kernel_build.fingerprint()


FLAGS = ("-O1", "-fopenmp", "-std=c++17", *levels.FLAGS[5:], "-static")
ALONE = {
    "generic": (("g++",), ()),
    "NEON": (("aarch64-linux-gnu-g++", "-march=armv8.2-a+dotprod+fp16"), ("qemu-aarch64",)),
}
"""A compiler and what runs its programs. All kernels together take long to compile for these."""


@pytest.mark.parametrize("name", ALONE)
def test_bits_of_one_layer_alone(name: str, tmp_path: Path) -> None:
    compiler, runs = ALONE[name]
    missing = [program for program in (compiler[0], *runs) if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here")
    program = tmp_path / "one_layer"
    source = Path(__file__).with_name("one_layer.cpp")
    subprocess.run([*compiler, *FLAGS, str(source), "-o", str(program)], check=True, capture_output=True)
    for kind in FORMATS.values():
        for out, wide in ((5, 1), (33, 200)):
            packed, x = layout.pack(blocks(kind, out, wide), kind), odd_rows(wide, torch.float32)
            wanted = twin(x, packed, None, kind, out, wide)
            for rows in (1, 3, 13):
                head = np.array([kind.code, out, wide, rows], np.int64).tobytes()
                given, said = tmp_path / "given", tmp_path / "said"
                given.write_bytes(head + packed.numpy().tobytes() + x[:rows].numpy().tobytes())
                subprocess.run([*runs, str(program), str(given), str(said)], check=True, timeout=100)
                found = torch.from_numpy(np.fromfile(said, np.float32)).view(rows, out)
                assert torch.equal(found.nan_to_num(1.5), wanted[:rows].nan_to_num(1.5)), (str(kind), out, wide, rows)
