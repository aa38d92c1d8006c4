"""PyTorch's side of a comparison in an interpreter of its own, for run.py: a line in, a call, its seconds out.

python torch_side.py WEIGHTS eager|compile NETWORK BATCH DEVICE auto|cpu
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lp_edge.export.bench_torch import open_torch_side


def main() -> None:
    """Load, call once for every line, end with the input."""
    weights, mode, network, batch, device, where = sys.argv[1:]
    if mode not in ("eager", "compile"):
        sys.exit(f"torch_side: mode {mode!r}; expected eager or compile")
    side = open_torch_side(Path(weights), mode, device=int(device), gpu=False if where == "cpu" else None)
    with side.open(network, int(batch)) as call:
        call()
        print(0.0, flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            call()
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
