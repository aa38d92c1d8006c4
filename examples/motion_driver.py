"""Drives a portrait without any driving picture: a nodding, blinking, talking face made of sines, sent as numbers.

    lp-serve &
    python examples/motion_driver.py portrait.jpg result.mp4 --seconds 4

A program that has head pose and expression from somewhere else (a game, a speech model, a tracker) sends them in the same way. A
message holds 10 numbers of the head, eyes and lips and 32 (mesh) or 63 (liveportrait) of the expression.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lp_edge.client import Client, Motion
from lp_edge.errors import LpEdgeError
from lp_edge.runtime.face_motion import load_canonical
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.gestures import builtin_template
from lp_edge.runtime.media_write import open_writer

FPS = 25


def directions(family: str) -> tuple[np.ndarray, np.ndarray, Motion, Motion]:
    """What closes the eyes and what opens the mouth: the extremes of two built-in templates against their neutral frames."""
    blink, talk = (builtin_template(name, family=family) for name in ("blink", "talk"))
    shut = blink.motion[int(blink.motion.eye_ratio.mean(axis=1).argmin())]
    wide = talk.motion[int(talk.motion.lip_ratio.argmax())]
    eyes = shut.expression - blink.motion[blink.neutral].expression
    mouth = wide.expression - talk.motion[talk.neutral].expression
    return eyes, mouth, shut, wide


def face(rest: Motion, family: str, seconds: float) -> Iterator[tuple[float, Motion]]:
    """Time and motion of each frame; the first one is the face at rest, which counts as neutral."""
    eyes, mouth, shut, wide = directions(family)
    for index in range(round(seconds * FPS)):
        t = index / FPS
        nod, turn = 8 * math.sin(2 * math.pi * 0.5 * t), 5 * math.sin(2 * math.pi * 0.3 * t)
        blink = max(0.0, math.sin(2 * math.pi * 0.4 * t)) ** 12  # short, every 2.5 s
        speak = max(0.0, math.sin(2 * math.pi * 2.1 * t)) * (0.5 - 0.5 * math.cos(2 * math.pi * 0.25 * t))
        yield (
            t,
            replace(
                rest,
                rotation=rotation_from_euler(nod, turn, 0).astype(np.float32) @ rest.rotation,
                expression=(rest.expression + blink * eyes + speak * mouth).astype(np.float32),
                eye_ratio=(1 - blink) * rest.eye_ratio + blink * shut.eye_ratio,
                lip_ratio=np.float32((1 - speak) * rest.lip_ratio + speak * wide.lip_ratio),
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("portrait", help="picture to animate")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--target", default="127.0.0.1:50051", help="where lp-serve listens")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--canonical", help="canonical.npz of a bundle other than the built-in one")
    args = parser.parse_args()

    canonical = None if args.canonical is None else load_canonical(Path(args.canonical))
    with Client(args.target, token=os.environ.get("LP_EDGE_TOKEN"), canonical=canonical) as client:
        info = client.info()
        layout = info.motion.layout  # the server's own: mesh coefficients or keypoints
        frames = face(client.neutral_motion(), info.family, args.seconds)
        portrait = client.register(args.portrait)
        with contextlib.ExitStack() as stack:
            stack.callback(client.delete, portrait)
            stream = stack.enter_context(
                client.animate(portrait, mode="lossless", driving_size=(0, 0), motion_layout=layout)
            )
            writer = None
            for frame in stream.drive(frames):
                if writer is None:
                    size = (frame.rgb.shape[1], frame.rgb.shape[0])
                    writer = stack.enter_context(open_writer(args.output, size, FPS))
                writer.write(frame.rgb)
        count = 0 if writer is None else writer.frames
        print(f"{args.output}: {count} frames from {10 + info.motion.expression_size} numbers each")


if __name__ == "__main__":
    try:
        main()
    except LpEdgeError as error:
        sys.exit(f"motion_driver.py: {error}")
