"""Measure seconds and memory for opening a token store of many documents and fetching random windows from it.

    python benchmarks/token_store.py

The stores are synthetic: a real index of documents of 1 to 1,000 tokens, and a sparse ``.bin``. With 10 million
documents the ``.bin`` has a size of 10 GB, but it occupies disk only where the file system has no sparse files (NTFS).
Each store is opened in a process of its own. Memory is the peak while opening and fetching, minus what the process held
after its imports. Mapped pages of the ``.bin`` count, though the system takes them back when it needs memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DOCUMENTS = [100_000, 1_000_000, 10_000_000]
WINDOWS, WINDOW_TOKENS = 10_000, 513


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print(
        f"{'documents':>12} {'tokens':>15} {'seconds to open':>16} {f's for {WINDOWS:,} windows':>22} {'MB added':>9}"
    )
    for documents in DOCUMENTS:
        with tempfile.TemporaryDirectory() as folder:
            figures = [_in_a_process(step, folder, documents) for step in ("make", "measure")][1]
            print(
                f"{documents:12,} {figures['tokens']:15,} {figures['open_seconds']:16.2f} "
                f"{figures['windows_seconds']:22.2f} {figures['added_bytes'] / 1e6:9.0f}",
                flush=True,
            )


def _in_a_process(step: str, folder: str, documents: int) -> dict:
    """Run ``step`` in a fresh process."""
    command = [sys.executable, __file__, step, folder, str(documents)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def make(folder: str, documents: int) -> dict:
    """Write a synthetic pair: an index, and a sparse ``.bin`` of the matching size."""
    import numpy as np

    from common.tokens.token_index import write_index

    sizes = np.random.default_rng(0).integers(1, 1001, documents, dtype=np.int32)
    write_index(f"{folder}/tokens.idx", sizes, np.dtype(np.uint16))
    with open(f"{folder}/tokens.bin", "wb") as file:
        file.truncate(2 * int(sizes.sum(dtype=np.int64)))
    return {}


def measure(folder: str, documents: int) -> dict:
    """Open the store and fetch windows at random positions; return tokens, seconds and added bytes."""
    import numpy as np
    import psutil

    from common.tokens.store import TokenStore

    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    store = TokenStore(Path(folder) / "tokens")
    opened = time.perf_counter()
    assert store.documents == documents
    for start in np.random.default_rng(1).integers(0, len(store.tokens) - WINDOW_TOKENS, WINDOWS).tolist():
        assert store.tokens[start : start + WINDOW_TOKENS].sum() == 0  # touches every page
    done = time.perf_counter()
    return {
        "tokens": len(store.tokens),
        "open_seconds": opened - began,
        "windows_seconds": done - opened,
        "added_bytes": _peak_bytes() - before,
    }


def _peak_bytes() -> int:
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":  # not ru_maxrss, which a child inherits from its parent
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    if len(sys.argv) == 4:  # started by _in_a_process
        print(json.dumps({"make": make, "measure": measure}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))))
    else:
        main()
