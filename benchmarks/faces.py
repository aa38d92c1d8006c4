"""How well and how fast the built-in face networks are: prints one JSON object.

    python benchmarks/faces.py mesh --images DIR --landmarks FILE.npy [--index mesh.json --split val]
    python benchmarks/faces.py detect --labels detect.json [--split val] [--threshold T]

`mesh`: row i of the landmarks [N,478,2 or 3] (pixels) belongs to the i-th picture by name, or to entry i of the index.
Errors are distances in the picture's plane over all points of a region in % of the inter-ocular distance (label points
468 to 473, the iris centres); percentiles are over faces. `detect`: labels as in the face data (`file`, `split`, `faces`
with `box` and `points`); a detection is right when its IoU with a face not yet found is at least 0.5.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime

import lp_edge
from lp_edge.engines.ort import OrtRunner
from lp_edge.errors import LpEdgeError
from lp_edge.runtime import faces, topology

DATA = Path(lp_edge.__file__).resolve().parent / "engines" / "data" / "mesh"
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

REGIONS: dict[str, tuple[int, ...]] = {
    "eyes": topology.LEFT_EYE + topology.RIGHT_EYE,
    "iris": topology.LEFT_IRIS + topology.RIGHT_IRIS,
    "lips": (
        topology.OUTER_LIP_UPPER
        + topology.OUTER_LIP_LOWER[1:-1]
        + topology.INNER_LIP_UPPER
        + topology.INNER_LIP_LOWER[1:-1]
    ),
    "brows": topology.LEFT_BROW + topology.RIGHT_BROW,
    "oval": topology.FACE_OVAL,
    "nose": topology.NOSE,
}

# Side of the first crop over the side of the picture: the labelled crops show the face at 53 % of their side, and the
# network's crop is 1.5 times the face.
FIRST_SIDE = 1.5 * 0.53
# Below the threshold down to here detections still count for the average precision.
FLOOR = 0.02


def fail(message: str) -> NoReturn:
    """Ends the program with status 2 and `message`."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """Picture as uint8 [H,W,3] RGB."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        fail(f"{path}: not a readable picture")
    return np.ascontiguousarray(image[..., ::-1], dtype=np.uint8)


def open_model(path: Path, threads: int) -> OrtRunner:
    """The network on the CPU with `threads` threads."""
    if not path.is_file():
        fail(f"{path}: no such model; give --model")
    return OrtRunner(path, threads=threads)


def milliseconds(run: Callable[[], Any], repeats: int = 50) -> dict[str, float]:
    """Median and least time of `run` in ms, after five runs to warm up; the least is what an idle machine needs."""
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return {"median": round(float(np.median(times)) * 1e3, 3), "min": round(min(times) * 1e3, 3)}


def surroundings(model: Path) -> dict[str, Any]:
    """Versions, processor and the model's digest."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        processor = names[0] if names else processor
    return {
        "model": model.name,
        "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "model_bytes": model.stat().st_size,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
            "opencv": cv2.__version__,
        },
        "processor": processor,
    }


# --- mesh --------------------------------------------------------------------------------------------------------


def mesh_points(
    net: faces.FaceMeshNet, image: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.float32], float]:
    """Points [478,3] in pixels of `image` and the score, from the centred crop and one crop more."""
    height, width = image.shape[:2]
    first = faces.CropTransform((width / 2, height / 2), FIRST_SIDE * max(width, height), 0.0, net.size)
    points, _ = net.run(image, [first])
    points, scores = net.run(image, [faces.crop_from_points(points[0], net.size)])
    return points[0], float(scores[0])


def mesh(chosen: argparse.Namespace) -> dict[str, Any]:
    """Errors and time of the mesh network."""
    labels = np.load(chosen.landmarks, allow_pickle=False).astype(np.float64)
    if chosen.index is None:
        files = sorted(p for p in chosen.images.iterdir() if p.suffix.lower() in PICTURES)
        rows = list(range(len(files)))
    else:
        index = json.loads(chosen.index.read_text())
        rows = [i for i, entry in enumerate(index) if chosen.split is None or entry["split"] == chosen.split]
        files = [chosen.images / Path(index[i]["file"]).name for i in rows]
        if len(index) != len(labels):
            fail(f"{chosen.index} has {len(index)} entries, {chosen.landmarks} {len(labels)} rows")
    if not rows or (chosen.index is None and len(files) != len(labels)):
        fail(f"{chosen.images}: {len(files)} pictures for {len(labels)} rows of landmarks")
    runner = open_model(chosen.model, chosen.threads)
    net = faces.FaceMeshNet(runner)
    errors, scores = [], []
    for row, file in zip(rows, files, strict=True):
        points, score = mesh_points(net, read_rgb(file))
        truth = labels[row, :, :2]
        apart = float(np.linalg.norm(truth[468] - truth[473]))
        errors.append(np.linalg.norm(points[:, :2] - truth, axis=1) / apart * 100)
        scores.append(score)
    table = np.stack(errors)
    means = table.mean(1)
    blank = np.zeros((1, net.size, net.size, 3), np.uint8)
    return {
        "what": "mesh",
        "n": len(rows),
        "mean_error_pct": round(float(means.mean()), 3),
        "p50": round(float(np.percentile(means, 50)), 3),
        "p95": round(float(np.percentile(means, 95)), 3),
        "max": round(float(means.max()), 3),
        "regions_pct": {name: round(float(table[:, list(i)].mean()), 3) for name, i in REGIONS.items()},
        "score_min": round(min(scores), 4),
        "score_p5": round(float(np.percentile(scores, 5)), 4),
        "threads": chosen.threads,
        "ms": milliseconds(lambda: runner.infer({"image": blank})),
    }


# --- detection ---------------------------------------------------------------------------------------------------


def average_precision(right: npt.NDArray[np.bool_], count: int) -> float:
    """Area under the precision-recall curve (precision made monotonous) of detections sorted by falling score."""
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[right].sum() / max(1, count))


def detect(chosen: argparse.Namespace) -> dict[str, Any]:
    """Recall, false positives, average precision and time of the detector."""
    entries = [
        e for e in json.loads(chosen.labels.read_text()) if chosen.split is None or e["split"] == chosen.split
    ]
    if not entries:
        fail(f"{chosen.labels}: no frames of split {chosen.split!r}")
    runner = open_model(chosen.model, chosen.threads)
    defaults = faces.DetectorConfig()
    threshold = defaults.score if chosen.threshold is None else chosen.threshold
    detector = faces.FaceDetector(runner, defaults)
    rows: list[tuple[float, bool, float, float]] = []
    count, missed = 0, []
    for entry in entries:
        image = read_rgb(chosen.labels.parent / entry["file"])
        found = detector.detect(image, FLOOR)
        truth = np.array([f["box"] for f in entry["faces"]], np.float32).reshape(-1, 4)
        spots = np.array([f["points"] for f in entry["faces"]], np.float32).reshape(-1, 5, 2)
        pairs = faces.iou_matrix([face.box for face in found], truth)
        free = set(range(len(truth)))
        count += len(truth)
        for index in range(len(found)):
            fitting = [t for t in free if pairs[index, t] >= 0.5]
            if not fitting:
                rows.append((found[index].score, False, math.nan, math.nan))
                continue
            best = max(fitting, key=lambda t: float(pairs[index, t]))
            free.discard(best)
            if found[index].score < threshold:
                missed.append(entry["file"])
            apart = float(np.linalg.norm(spots[best, 0] - spots[best, 1]))
            error = float(np.linalg.norm(found[index].points - spots[best], axis=1).mean()) / apart * 100
            rows.append((found[index].score, True, float(pairs[index, best]), error))
        missed += [entry["file"]] * len(free)
    rows.sort(key=lambda row: -row[0])
    right = np.array([row[1] for row in rows], bool)
    sure = np.array([row[0] for row in rows]) >= threshold
    good = [row for row in rows if row[1] and row[0] >= threshold]
    blank = np.zeros((1, 640, 640, 3), np.uint8)
    return {
        "what": "detect",
        "n": len(entries),
        "faces": count,
        "threshold": threshold,
        "nms_iou": defaults.iou,
        "recall_iou50": round(float((right & sure).sum()) / max(1, count), 4),
        "false_per_100_frames": round(100 * float((~right & sure).sum()) / len(entries), 2),
        "average_precision_iou50": round(average_precision(right, count), 4),
        "mean_iou": round(float(np.mean([row[2] for row in good])), 4) if good else None,
        "point_error_pct": round(float(np.mean([row[3] for row in good])), 3) if good else None,
        "missed": sorted(missed),
        "threads": chosen.threads,
        "ms_640": milliseconds(lambda: runner.infer({"image": blank})),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Measure the built-in face networks; prints one JSON object."
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("mesh", help="errors of the 478-point network on labelled crops")
    one.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    one.add_argument(
        "--landmarks", type=Path, required=True, help=".npy [N,478,2 or 3], pixels of the pictures"
    )
    one.add_argument("--index", type=Path, help="JSON list with `file` and `split`, one entry per row")
    one.add_argument("--split", help="only entries of this split (with --index)")
    one.add_argument("--model", type=Path, default=DATA / "face_mesh.onnx")
    two = kinds.add_parser("detect", help="recall, false positives and time of the detector")
    two.add_argument("--labels", type=Path, required=True, help="JSON list with `file`, `split` and `faces`")
    two.add_argument("--split", help="only frames of this split")
    two.add_argument(
        "--threshold", type=float, help="smallest score that counts as a face; by default the product's"
    )
    two.add_argument("--model", type=Path, default=DATA / "face_detector.onnx")
    for each in (one, two):
        each.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    chosen = parser.parse_args(arguments)
    try:
        result = mesh(chosen) if chosen.kind == "mesh" else detect(chosen)
    except (OSError, ValueError, KeyError, LpEdgeError) as error:
        fail(f"{type(error).__name__}: {error}")
    print(json.dumps({**result, **surroundings(chosen.model)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
