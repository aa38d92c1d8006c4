"""Several portraits follow one clip at the same time, each in a stream of its own, in one asyncio program.

lp-serve &
python examples/asyncio_many.py driver.mp4 results a.jpg b.jpg c.jpg
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

from lp_edge.client.aio import Client
from lp_edge.client.sources import open_source
from lp_edge.errors import LpEdgeError
from lp_edge.runtime.media_write import open_writer


async def one(client: Client, picture: Path, driving: str, output: Path) -> str:
    """Animate one portrait into a file; what came of it, in words."""
    family = (await client.info()).family
    source = await asyncio.to_thread(open_source, driving, family=family)
    portrait = await client.register(picture)
    try:
        # The animated frames are read while the source's frames are decoded and sent in threads.
        async with await client.animate(portrait, mode="lossless", driving_size=source.size) as stream:
            start, writer = time.perf_counter(), None
            try:
                async for frame in stream.drive(source.frames()):
                    rgb = await asyncio.to_thread(
                        getattr, frame, "rgb"
                    )  # decoding keeps the loop waiting otherwise
                    if writer is None:
                        writer = open_writer(output, (rgb.shape[1], rgb.shape[0]), source.rate)
                    await asyncio.to_thread(writer.write, rgb)
            except BaseException:
                if writer is not None:
                    writer.abort()
                raise
            if writer is None:
                return f"{output}: no frames"
            await asyncio.to_thread(writer.close)
            rate = writer.frames / (time.perf_counter() - start)
            return f"{output}: {writer.frames} frames, {rate:.1f} frames/s, {stream.transport}"
    finally:
        await client.delete(portrait)


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("driving", help="clip or template")
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("portraits", type=Path, nargs="+", help="pictures to animate")
    parser.add_argument("--target", default="127.0.0.1:50051", help="where lp-serve listens")
    args = parser.parse_args()

    args.folder.mkdir(exist_ok=True)
    async with Client(args.target, token=os.environ.get("LP_EDGE_TOKEN")) as client:
        streams = (one(client, p, args.driving, args.folder / f"{p.stem}.mp4") for p in args.portraits)
        for done in asyncio.as_completed(list(streams)):
            print(await done, flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except LpEdgeError as error:
        sys.exit(f"asyncio_many.py: {error}")
