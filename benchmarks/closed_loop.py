"""The closed loop: template -> clip of A -> clip of B -> motion read back. Prints one JSON object.

    python benchmarks/closed_loop.py [--first A.jpg] [--second B.jpg] [--template talk --template nod ...]

Animates picture A with a template, takes that clip as driver for picture B, reads the motion of B's clip with the built-in
networks and correlates it with the template. Without pictures A and B are the demo picture and its mirror image.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lp_edge.errors import LpEdgeError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.gestures import GESTURES
from lp_edge.runtime.image import read_image, write_image
from lp_edge.runtime.job import RunConfig, demo_picture, run_job
from lp_edge.runtime.provenance import provenance
from lp_edge.runtime.signals import compare, signals_of, signals_of_clip


def loop(
    animator: Animator, first: Path, second: Path, template: str, folder: Path, bundle: str | None
) -> dict[str, Any]:
    """One template around the loop."""
    once, twice = folder / "once.mp4", folder / "twice.mp4"
    run_job(RunConfig(first, template, once, bundle=bundle))
    run_job(RunConfig(second, once, twice, bundle=bundle))
    wanted, fps = signals_of(animator, template)
    middle, _ = signals_of_clip(animator, once, fps=fps)
    got, _ = signals_of_clip(animator, twice, fps=fps)
    return {"template": template, "after_one": compare(wanted, middle), "after_two": compare(wanted, got)}


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=Path, help="picture A")
    parser.add_argument("--second", type=Path, help="picture B")
    parser.add_argument("--template", action="append", help=f"default: all of {', '.join(GESTURES)}")
    parser.add_argument("--bundle", help="bundle instead of the built-in one")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="closed-loop-") as name, Animator(args.bundle) as animator:
            folder = Path(name)
            second = args.second
            if second is None:
                second = folder / "mirrored.png"
                write_image(second, np.ascontiguousarray(read_image(demo_picture())[:, ::-1]))
            first = args.first or demo_picture()
            runs = [
                loop(animator, first, second, template, folder, args.bundle)
                for template in args.template or list(GESTURES)
            ]
            report = {
                "benchmark": "closed_loop",
                "first": first.name,
                "second": second.name,
                "runs": runs,
                "provenance": provenance(animator.bundle),
            }
    except LpEdgeError as error:
        print(f"closed_loop: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
