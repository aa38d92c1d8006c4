"""Does the result follow the driver? Prints one JSON object.

    python benchmarks/follow.py --source S --driving D [--output VIDEO] [--no-smooth]

Measures mouth opening, both eye openings, yaw, pitch and roll in driver and result with the built-in networks (or those
of --bundle), frame by frame, and correlates them over time. VIDEO is a result of `lp-run -s S -d D` (not side by
side); without it one is made in a temporary folder. A signal in which the driver hardly moves is marked `flat` and has no
correlation. Angles also have the mean absolute difference of both relative to the first frame, in degrees.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import LpEdgeError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.job import RunConfig, run_job
from lp_edge.runtime.provenance import provenance
from lp_edge.runtime.signals import compare, signals_of, signals_of_clip


def follow(
    source: str,
    driving: str,
    output: str | None,
    *,
    smooth: bool = True,
    bundle: str | None = None,
    backend: str = "auto",
) -> dict[str, object]:
    """The comparison as a dictionary; see the module."""
    config = BackendConfig(backend)
    with tempfile.TemporaryDirectory(prefix="follow-") as folder:
        made = output is None
        if output is None:
            output = str(Path(folder) / "result.mp4")
            run_job(RunConfig(source, driving, output, bundle=bundle, backend=config, audio="none"))
        with Animator(bundle, backend=config) as animator:
            driver, fps = signals_of(animator, driving, smooth=smooth)
            result, _ = signals_of_clip(animator, output, fps=fps, smooth=smooth)
            report = compare(driver, result)
            return {
                "benchmark": "follow",
                "source": Path(source).name,
                "driving": Path(driving).name,
                "output": None if made else Path(output).name,
                "smooth": smooth,
                "frames_driver": len(driver),
                "frames_result": len(result),
                **report,
                "provenance": provenance(animator.bundle),
            }


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="picture or clip that was animated")
    parser.add_argument("--driving", required=True, help="clip, template file or name of a built-in template")
    parser.add_argument("--output", help="result to measure; default: make one")
    parser.add_argument("--no-smooth", action="store_true", help="measure without the one-euro filter")
    parser.add_argument("--bundle", help="bundle instead of the built-in one")
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()
    try:
        report = follow(
            args.source,
            args.driving,
            args.output,
            smooth=not args.no_smooth,
            bundle=args.bundle,
            backend=args.backend,
        )
    except LpEdgeError as error:
        print(f"follow: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
