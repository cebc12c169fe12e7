"""Runs the tables that are named, or all, and writes ``docs/benchmarks.md``."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from benchmarks import QUICK_VARIABLE

_ROOT = Path(__file__).parents[1]
# In the order of the page; with the seconds that each may take, of 25 minutes in all, what is made
# once not counted.
TABLES = {
    "push": 270,
    "file": 80,
    "pull": 130,
    "s3_push": 185,
    "s3_pull": 115,
    "second_push": 125,
    "series": 125,
    "components": 40,
    "partial": 45,
    "registry": 130,
    "stall": 165,
    "modules": 70,
    "start": 20,
}


def main() -> None:
    """Measure, print and write."""
    chosen, quick = _arguments()
    sys.path.insert(0, str(_ROOT / "tests"))  # which know how to start the servers
    if quick:
        os.environ[QUICK_VARIABLE] = "1"  # read by what is imported from here on
    from benchmarks.page import read_results, render_table, write_results
    from benchmarks.table import Measured, package_versions

    docs = _ROOT / ("build/benchmarks" if quick else "docs")
    results = read_results(docs)
    began = time.monotonic()
    for name in chosen:
        measure = importlib.import_module(f"benchmarks.{name}").measure
        start = time.monotonic()
        # Not below /tmp, which may be memory.
        with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=_ROOT) as folder:
            table = measure(Path(folder))
        seconds = time.monotonic() - start
        versions = package_versions(table.packages)
        results[name] = Measured(table, str(date.today()), _machine(), versions, seconds)
        print(render_table(name, results[name]), flush=True)
        over = f", over its {TABLES[name]} s" if seconds > TABLES[name] else ""
        print(f"{name} took {seconds:.0f} s{over}\n", flush=True)
        write_results(docs, {one: results[one] for one in TABLES if one in results})
    print(f"all of it took {time.monotonic() - began:.0f} s; {docs / 'benchmarks.md'}")


def _arguments() -> tuple[list[str], bool]:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--quick", action="store_true", help="small sizes; writes below build/")
    given = parser.parse_args()
    unknown = sorted(set(given.tables) - set(TABLES))
    if unknown:
        parser.error(f"there is no table {', '.join(unknown)}; choose from {', '.join(TABLES)}")
    return given.tables or list(TABLES), given.quick


def _machine() -> str:
    """The processor, its cores and memory, the system and Python."""
    names = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":")[1].strip() for line in names if line.startswith("model name")), ""
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({model or platform.machine()}), {memory:.0f} GiB of memory,"
        f" {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
