"""Compile the native kernels: one shared library, one copy of the algorithms per instruction set.

    python -m kernels.native.build

It lies in build/ beside this file under a name made of the sources and the compiler, so that a
change of either builds anew and nothing stale is loaded. Needs a C++17 compiler (g++ or clang++,
or what CXX names) and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "src"
BUILD = FOLDER / "build"

AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512_bf16": (*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vnni"),
        "avx512": AVX512,
        "avx2": AVX2,
        "portable": (),
    },
    "aarch64": {"neon": ()},
}
"""Instruction sets and their flags by machine, the best first."""
# Sums and products are contracted where the source says so and nowhere else: the same sum must have
# the same bits in every copy of a loop.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
         "-fno-math-errno", "-fno-exceptions", "-pthread")  # fmt: skip


class BuildError(Exception):
    """There is no library and none can be made; the message says why."""


def build() -> Path:
    """Compile what is not compiled yet; returns the library's path.

    Two processes may build at once: each compiles in a folder of its own and renames the result.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    path = library_path()
    if path.exists():
        return path
    compiler, sets = _compiler(), _sets()
    logger.info("Compiling the CPU kernels, once ...")
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        work = Path(folder)
        names = " ".join(f"DO({name})" for name in sets)
        jobs = [
            ("kernels.cpp", work / f"{name}.o", (*flags, f"-DHERD_ISA={name}"))
            for name, flags in sets.items()
        ]
        jobs.append(("pool.cpp", work / "pool.o", ()))
        jobs.append(("ranking.cpp", work / "ranking.o", ()))
        jobs.append(("library.cpp", work / "library.o", (f"-DHERD_BUILT_SETS(DO)={names}",)))

        def compile_one(job: tuple[str, Path, tuple[str, ...]]) -> None:
            source, target, flags = job
            _run([*compiler, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", str(target)])

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(compile_one, jobs))
        objects = [str(target) for _, target, _ in jobs]
        _run([*compiler, "-shared", "-pthread", *objects, "-o", str(work / "library.so")])
        (work / "library.so").replace(path)
    return path


@cache
def library_path() -> Path:
    """Where the library of these sources and this compiler is, or is to be.

    Raises:
        BuildError: there is no compiler.
    """
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    version = subprocess.run([*_compiler(), "--version"], capture_output=True, check=False).stdout
    digest.update(repr((version, platform.machine(), FLAGS, SETS)).encode())
    return BUILD / f"herd_kernels_{digest.hexdigest()}.so"


def _compiler() -> list[str]:
    asked = os.environ.get("CXX")
    if asked:
        return shlex.split(asked)
    for name in ("g++", "clang++", "c++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise BuildError("no C++ compiler was found; install g++ or clang++")


def _sets() -> dict[str, tuple[str, ...]]:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(
        platform.machine().lower(), platform.machine().lower()
    )
    return SETS.get(machine, {"portable": ()})


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise BuildError(f"{command[0]} failed: {first.strip()}")


def main() -> int:
    """Command line: build, and say what came of it. No compiler is no error: PyTorch serves too."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started_s = time.perf_counter()
    try:
        path = build()
    except BuildError as error:
        logger.warning("Native CPU kernels: not built, PyTorch will be used: %s", error)
        return 0
    seconds = time.perf_counter() - started_s
    logger.info("Native CPU kernels: %s (%.0f s)", path.relative_to(FOLDER), seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
