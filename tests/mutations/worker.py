"""A process that runs mutants: it reads `KIND SEED` lines, and writes what became of each as a JSON line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_MEMORY = 6 * 2**30
"""Bytes of address space that a mutant may take in addition to what the process has."""


def environment(work: Path) -> dict[str, str]:
    """The variables of such a process: all that is written goes below `work`, and programs compile quickly."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(work / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "MANYHEADS_CACHE": str(work / "cache"),
        "HF_HOME": str(work / "cache" / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(work / "cache" / "matplotlib"),
        "PIP_NO_INDEX": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def main() -> None:
    import faulthandler
    import json

    work, seconds = Path(sys.argv[1]), float(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Whatever a library writes to the process's own output is not an answer.
    os.dup2(2, 1)
    faulthandler.enable()
    from tests.mutations.kinds import Runner
    from tests.mutations.material import make

    if not (work / "material").is_dir():
        make(work / "partial")
        (work / "partial").rename(work / "material")
    _limit_memory()
    runner = Runner(work, seconds)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, seed = line.split()
        # A call in a library's own code may not see the alarm: the process ends, and says where it was.
        faulthandler.dump_traceback_later(4 * seconds, exit=True)
        outcome = runner.run(kind, int(seed))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(vars(outcome)), file=answers, flush=True)


def _limit_memory() -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()
