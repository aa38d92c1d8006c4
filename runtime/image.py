"""Pictures in and out: uint8 RGB ``[H, W, 3]``, upright, within bounds.

Nothing is decoded before the header says that it is worth it: :func:`picture_header` reads size, orientation
and completeness from the bytes of JPEG, PNG, WebP, BMP, GIF and TIFF files, so a picture of 20000x20000
pixels, a truncated one or a text file in disguise is refused within milliseconds. OpenCV decodes (GIF: PyAV).
Colour profiles are not applied; pictures are taken as sRGB.
"""

from __future__ import annotations

import os
import secrets
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import av
import av.error
import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.errors import MediaError, OutputError

__all__ = [
    "MAX_PIXELS",
    "MAX_SIDE",
    "MIN_SIDE",
    "PICTURE_SUFFIXES",
    "PictureHeader",
    "TooLargeError",
    "check_size",
    "encode_image",
    "picture_header",
    "read_image",
    "write_image",
]

U8 = npt.NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""Most pixels a picture may have unless the caller says otherwise."""
MAX_SIDE = 16_384
"""Longest side a picture may have; also what the H.264 encoder can take."""
MIN_SIDE = 16
"""Shortest side that can hold anything worth animating."""
_MAX_BYTES = 1 << 30
_MAX_PARTS = 1 << 14
"""Most segments, chunks or blocks that a header's parser walks over; a file of a million empty ones keeps it busy for seconds."""

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Suffixes of the picture formats that can be read (GIF: its first frame)."""

_FORMATS = "JPEG, PNG, WebP, BMP, GIF or TIFF"


@dataclass(frozen=True)
class PictureHeader:
    """What the header of a picture file says.

    Attributes:
        format: ``jpeg``, ``png``, ``webp``, ``bmp``, ``gif`` or ``tiff``.
        width, height: stored size in pixels, before ``orientation`` is applied.
        orientation: EXIF orientation, 1 (upright) to 8.
        frames: pictures in the file (GIF; 1 for all other formats).
        complete: False when the file ends before its picture does.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    frames: int = 1
    complete: bool = True


class _Cut(Exception):
    """The bytes end before the header does."""


class _Crumbs(Exception):
    """More parts than a picture has."""


def _unpack(fmt: str, data: bytes, at: int) -> tuple[int, ...]:
    try:
        values: tuple[int, ...] = struct.unpack_from(fmt, data, at)
    except struct.error as error:
        raise _Cut from error
    return values


def picture_header(data: bytes) -> PictureHeader | None:
    """Read a picture's header from the bytes of its file.

    Returns:
        The header, or None when the bytes are none of the known formats.

    Raises:
        MediaError: the format is known but the header is cut off or senseless.
    """
    for name, magic, parse in _PARSERS:
        if data.startswith(magic) and (name != "webp" or data[8:12] == b"WEBP"):
            try:
                return parse(data)
            except _Crumbs as error:
                raise MediaError(
                    f"a {name.upper()} file of more than {_MAX_PARTS} parts",
                    "expected a picture",
                    "export it again",
                ) from error
            except _Cut as error:
                raise MediaError(
                    f"a {name.upper()} file of {len(data)} bytes that ends within its header",
                    "expected a whole picture",
                    "copy or export the file again",
                ) from error
    return None


def _jpeg(data: bytes) -> PictureHeader:
    # ITU-T T.81 annex B: a chain of segments up to the first scan; the size stands in a start-of-frame segment.
    at, orientation, size = 2, 1, None
    for _ in range(_MAX_PARTS):
        (marker,) = _unpack(">H", data, at)
        if marker == 0xFFFF:  # fill byte
            at += 1
            continue
        if marker < 0xFF00:
            raise _Cut
        if marker == 0xFFD9:
            raise _Cut
        if marker == 0xFF01 or 0xFFD0 <= marker <= 0xFFD8:  # stand-alone markers
            at += 2
            continue
        (length,) = _unpack(">H", data, at + 2)
        body = at + 4
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
            height, width = _unpack(">HH", data, body + 1)
            size = (width, height)
        elif marker == 0xFFE1 and data[body : body + 6] == b"Exif\0\0":
            orientation = _exif_orientation(data[body + 6 : at + 2 + length])
        elif marker == 0xFFDA:
            if size is None:
                raise _Cut
            # A scan ends at an end-of-image marker; a file that was cut has none behind its first scan.
            complete = data.rfind(b"\xff\xd9", body) >= 0
            return PictureHeader("jpeg", *size, orientation, complete=complete)
        at += 2 + length
    raise _Crumbs


def _png(data: bytes) -> PictureHeader:
    width, height = _unpack(">II", data, 16)
    at, orientation, complete, pixels, parts = 8, 1, False, False, 0
    while at + 12 <= len(data):
        if (parts := parts + 1) > _MAX_PARTS:
            raise _Crumbs
        (length,) = _unpack(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            break
        if kind == b"eXIf":
            orientation = _exif_orientation(data[at + 8 : end - 4])
        elif kind == b"IDAT":
            pixels = True
            if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != _unpack(">I", data, end - 4)[0]:
                break
        elif kind == b"IEND":
            complete = pixels
            break
        at = end
    return PictureHeader("png", width, height, orientation, complete=complete)


def _webp(data: bytes) -> PictureHeader:
    (riff,) = _unpack("<I", data, 4)
    complete = len(data) >= 8 + riff
    at, orientation = 12, 1
    size: tuple[int, int] | None = None
    parts = 0
    while at + 8 <= len(data):
        if (parts := parts + 1) > _MAX_PARTS:
            raise _Crumbs
        kind, (length,) = data[at : at + 4], _unpack("<I", data, at + 4)
        body = at + 8
        if kind == b"VP8X" and size is None:
            (width,), (height,) = _unpack("<I", data, body + 3), _unpack("<I", data, body + 6)
            size = ((width >> 8) + 1, (height >> 8) + 1)  # 24 bit each, at 4 and 7
        elif kind == b"VP8 " and size is None:
            width, height = _unpack("<HH", data, body + 6)
            size = (width & 0x3FFF, height & 0x3FFF)
        elif kind == b"VP8L" and size is None:
            (bits,) = _unpack("<I", data, body + 1)
            size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif kind == b"EXIF":
            exif = data[body : body + length]
            orientation = _exif_orientation(exif[6:] if exif.startswith(b"Exif\0\0") else exif)
        at = body + length + (length & 1)
    if size is None:
        raise _Cut
    return PictureHeader("webp", *size, orientation, complete=complete)


def _bmp(data: bytes) -> PictureHeader:
    offset, header = _unpack("<II", data, 10)
    if header == 12:
        width, height, _, bits = _unpack("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = _unpack("<iiHHI", data, 18)
    complete = len(data) > offset
    if compression == 0:
        complete = len(data) >= offset + (abs(width) * bits + 31) // 32 * 4 * abs(height)
    return PictureHeader("bmp", abs(width), abs(height), complete=complete)


def _gif(data: bytes) -> PictureHeader:
    # GIF89a: blocks of sub-blocks; only the number of pictures and whether the first is whole matter here.
    width, height, packed = _unpack("<HHB", data, 6)
    at, frames = 13 + (3 << (packed & 7) + 1 if packed & 0x80 else 0), 0
    try:
        while True:
            (block,) = _unpack("B", data, at)
            if block == 0x21:
                at = _skip_sub_blocks(data, at + 2)
            elif block == 0x2C:
                (local,) = _unpack("B", data, at + 9)
                at = _skip_sub_blocks(data, at + 11 + (3 << (local & 7) + 1 if local & 0x80 else 0))
                frames += 1
            else:
                return PictureHeader(
                    "gif", width, height, frames=frames, complete=block == 0x3B and frames > 0
                )
    except _Cut:
        return PictureHeader("gif", width, height, frames=frames, complete=False)


def _skip_sub_blocks(data: bytes, at: int) -> int:
    while True:
        (length,) = _unpack("B", data, at)
        at += 1 + length
        if length == 0:
            return at


def _tiff(data: bytes) -> PictureHeader:
    tags = _tiff_tags(data)
    if 256 not in tags or 257 not in tags:
        raise _Cut
    orientation = tags.get(274, 1)
    return PictureHeader("tiff", tags[256], tags[257], orientation if 1 <= orientation <= 8 else 1)


def _tiff_tags(data: bytes) -> dict[int, int]:
    """First directory of a TIFF (or EXIF) block: tag -> its first value, for whole-number tags."""
    order = "<" if data[:2] == b"II" else ">"
    (version,) = _unpack(order + "H", data, 2)
    if version == 43:  # BigTIFF
        (at,) = _unpack(order + "Q", data, 8)
        (count,) = _unpack(order + "Q", data, at)
        at, step, value_at = at + 8, 20, 12
    else:
        (at,) = _unpack(order + "I", data, 4)
        (count,) = _unpack(order + "H", data, at)
        at, step, value_at = at + 2, 12, 8
    tags: dict[int, int] = {}
    for entry in range(at, at + min(count, 4096) * step, step):
        tag, kind = _unpack(order + "HH", data, entry)
        code = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if code is not None and (code != "Q" or step == 20):
            (tags[tag],) = _unpack(order + code, data, entry + value_at)
    return tags


def _exif_orientation(block: bytes) -> int:
    """EXIF tag 274; 1 where it is absent or the block is broken (a picture is not refused for that)."""
    if block[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    try:
        orientation = _tiff_tags(block).get(274, 1)
    except _Cut:
        return 1
    return orientation if 1 <= orientation <= 8 else 1


_PARSERS = (
    ("jpeg", b"\xff\xd8\xff", _jpeg),
    ("png", b"\x89PNG\r\n\x1a\n", _png),
    ("webp", b"RIFF", _webp),
    ("bmp", b"BM", _bmp),
    ("gif", b"GIF8", _gif),
    ("tiff", b"II*\0", _tiff),
    ("tiff", b"MM\0*", _tiff),
    ("tiff", b"II+\0", _tiff),
    ("tiff", b"MM\0+", _tiff),
)


class TooLargeError(MediaError):
    """A picture, or a frame of a clip, has more pixels than are allowed; told as a MediaError, and by a server as a limit."""


def check_size(
    name: str,
    width: int,
    height: int,
    *,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    min_side: int = MIN_SIDE,
) -> None:
    """Refuse sizes in pixels that are too small to hold a face or too large to work on.

    Raises:
        MediaError: a side is too short.
        TooLargeError: a side is too long, or there are too many pixels.
    """
    if min(width, height) < min_side:
        raise MediaError(
            f"{name} is {width}x{height} pixels",
            f"expected at least {min_side} pixels on each side",
            "use a larger picture",
        )
    if max(width, height) > max_side or width * height > max_pixels:
        raise TooLargeError(
            f"{name} is {width}x{height} pixels ({width * height / 1e6:.0f} megapixels)",
            f"expected at most {max_side} pixels on a side and {max_pixels / 1e6:g} megapixels",
            "scale it down first",
        )


def read_bytes(path: Path) -> bytes:
    """The whole of a regular file.

    Raises:
        MediaError: it does not exist, is a folder or a device, is empty, too large or may not be read.
    """
    check_input_file(path)
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise MediaError(
            f"{path} holds {size / 2**20:.0f} MiB",
            f"expected a picture of at most {_MAX_BYTES >> 20} MiB",
            "",
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def check_input_file(path: Path) -> None:
    """Refuse what cannot be an input file, with a message for each case.

    Raises:
        MediaError: no such file, a folder, not a regular file, empty, or not readable by this user.
    """
    try:
        if not path.exists():
            raise MediaError(f"{path} does not exist", "expected a file", "check the path")
        if path.is_dir():
            raise MediaError(f"{path} is a folder", "expected a file", "name a file inside it")
        if not path.is_file():
            raise MediaError(
                f"{path} is no regular file", "expected a picture or clip on disk", "copy it to a file"
            )
        if path.stat().st_size == 0:
            raise MediaError(
                f"{path} is empty (0 bytes)", "expected a picture or clip", "copy or export it again"
            )
        with path.open("rb"):
            pass
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> MediaError:
    return MediaError(
        f"{path} cannot be read ({error.strerror or error})",
        "expected a readable file",
        "check its permissions and the disk",
    )


def read_image(
    source: str | Path | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    min_side: int = MIN_SIDE,
) -> U8:
    """Read a picture: upright, 8 bit, three channels.

    EXIF orientation is applied, transparency is laid over white, grey becomes three equal channels, 16 bit
    values are rounded to 8 bit. Of an animated GIF the first frame is taken.

    Args:
        source: path, or the bytes of a file.
        max_pixels: most pixels (width times height); checked in the header, before anything is decoded.
        max_side: longest side in pixels.
        min_side: shortest side in pixels.

    Returns:
        uint8 ``[H, W, 3]`` RGB, C-contiguous, owned by the caller.

    Raises:
        MediaError: missing, a folder, empty, unreadable, of unknown format, out of bounds, truncated or broken.
    """
    if isinstance(source, bytes):
        name, data = f"picture ({len(source)} bytes)", source
        if not data:
            raise MediaError("an empty picture (0 bytes)", f"expected {_FORMATS}", "send the whole file")
    else:
        path = Path(source)
        name, data = path.name, read_bytes(path)
    try:
        header = picture_header(data)
    except MediaError as error:
        raise MediaError(f"{name}: {error.got}", error.expected, error.remedy) from error
    if header is None:
        raise MediaError(
            f"{name} is no picture that can be read (it starts with {data[:8]!r})",
            f"expected {_FORMATS}",
            "convert it to PNG or JPEG, or check that it is the right file",
        )
    check_size(name, header.width, header.height, max_pixels=max_pixels, max_side=max_side, min_side=min_side)
    if not header.complete and not (header.format == "gif" and header.frames > 0):
        raise MediaError(
            f"{name} is cut off or damaged: a {header.format.upper()} of {header.width}x{header.height} pixels "
            f"whose data does not end as it should after {len(data)} bytes",
            "expected a whole picture",
            "copy or export it again",
        )
    pixels = _decode_gif(data) if header.format == "gif" else _decode(data)
    if pixels is None or pixels.size == 0:
        raise MediaError(
            f"{name} is damaged: its {header.format.upper()} header is fine, its pixels cannot be decoded",
            "expected a whole picture",
            "copy or export it again, or convert it to PNG",
        )
    if pixels.shape[:2] != (header.height, header.width):
        raise MediaError(
            f"{name} decodes to {pixels.shape[1]}x{pixels.shape[0]} pixels, its header says "
            f"{header.width}x{header.height}",
            "expected both to agree",
            "convert it to PNG",
        )
    return _upright(_to_rgb8(pixels, name), header.orientation)


_quiet_lock = threading.Lock()
_quiet: list[int] = []  # the level to go back to, once for everyone who decodes now


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """OpenCV prints decoding errors to stderr; the caller gets a MediaError instead. Several threads may decode at a time."""
    logging = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # the former up to OpenCV 4.12
    get, put = logging.getLogLevel, logging.setLogLevel
    with _quiet_lock:
        _quiet.append(_quiet[0] if _quiet else get())
        put(0)
    try:
        yield
    finally:
        with _quiet_lock:
            level = _quiet.pop()
            if not _quiet:
                put(level)


def _decode(data: bytes) -> npt.NDArray[np.generic] | None:
    """Pixels as stored (BGR order, any depth), not turned: IMREAD_UNCHANGED ignores the orientation."""
    with _quiet_opencv():
        try:
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:
            return None
    return None if decoded is None else np.asarray(decoded)


def _decode_gif(data: bytes) -> npt.NDArray[np.generic] | None:
    # OpenCV reads GIF only from 4.11 on.
    try:
        with av.open(BytesIO(data), "r", format="gif") as container:
            for frame in container.decode(video=0):
                return np.asarray(frame.to_ndarray(format="bgra"))
    except (av.error.FFmpegError, ValueError):
        return None
    return None


def _to_rgb8(pixels: npt.NDArray[np.generic], name: str) -> U8:
    """Any decoded picture (grey, grey+alpha, BGR, BGRA; 8 or 16 bit) as RGB over white."""
    if pixels.dtype not in (np.uint8, np.uint16):
        raise MediaError(
            f"{name} holds {pixels.dtype} values", "expected 8 or 16 bit whole numbers", "convert it to PNG"
        )
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    top = 255 if pixels.dtype == np.uint8 else 65535
    channels = pixels.shape[2]
    if channels not in (1, 2, 3, 4):
        raise MediaError(f"{name} has {channels} channels", "expected 1 to 4", "convert it to PNG")
    colour = pixels[:, :, :1] if channels < 3 else pixels[:, :, 2::-1]
    out = np.empty((*pixels.shape[:2], 3), np.uint8)
    # In strips: the intermediate precision would need several times the picture's own memory.
    for y in range(0, pixels.shape[0], 256):
        rows = slice(y, y + 256)
        part: npt.NDArray[np.generic] = colour[rows]
        if channels in (2, 4):
            alpha = pixels[rows, :, -1:].astype(np.uint64)
            if int(alpha.min(initial=top)) < top:
                mixed = part.astype(np.uint64) * alpha + top * (top - alpha)
                part = (mixed + top // 2) // top
        if top == 65535:
            part = (part.astype(np.uint32) * 255 + 32767) // 65535
        out[rows] = part
    return out


def _upright(rgb: U8, orientation: int) -> U8:
    """Apply EXIF orientation 1..8 (EXIF 2.3, tag 274: where row 0 and column 0 of the stored picture are)."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)


# -- writing --------------------------------------------------------------------------------------------


def encode_image(rgb: U8, suffix: str, *, quality: int = 95) -> bytes:
    """A picture as the bytes of a file.

    Args:
        rgb: uint8 ``[H, W, 3]``.
        suffix: ``.png``, ``.jpg``, ``.jpeg``, ``.webp`` or ``.bmp``.
        quality: 1 to 100, for JPEG and WebP.

    Raises:
        OutputError: unknown suffix, wrong array, or the encoder refuses the size.
    """
    suffix = suffix.lower()
    if suffix not in _WRITABLE:
        raise OutputError(
            f"a picture cannot be written as {suffix or 'a name without suffix'}",
            f"expected {', '.join(_WRITABLE)}",
            "choose one of these suffixes",
        )
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
        raise OutputError(f"a picture array {rgb.dtype}{list(rgb.shape)}", "expected uint8 [H, W, 3]")
    params: list[int] = []
    if suffix in (".jpg", ".jpeg"):
        params = [cv2.IMWRITE_JPEG_QUALITY, quality]
    elif suffix == ".webp":
        params = [cv2.IMWRITE_WEBP_QUALITY, quality]
    elif suffix == ".png":
        # Runs only: on pictures a third faster than the default strategy at level 3, and no larger.
        params = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    try:
        done, encoded = cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), params)
    except cv2.error as error:
        raise OutputError(
            f"{rgb.shape[1]}x{rgb.shape[0]} pixels cannot be encoded as {suffix}", "", "write a PNG instead"
        ) from error
    if not done:
        raise OutputError(
            f"{rgb.shape[1]}x{rgb.shape[0]} pixels cannot be encoded as {suffix}", "", "write a PNG instead"
        )
    return bytes(encoded.data)


_WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def write_image(path: str | Path, rgb: U8, *, quality: int = 95) -> None:
    """Write a picture; the file appears whole or not at all.

    Args:
        path: suffix ``.png``, ``.jpg``, ``.jpeg``, ``.webp`` or ``.bmp``; an existing file is replaced.
        rgb: uint8 ``[H, W, 3]``.
        quality: 1 to 100, for JPEG and WebP.

    Raises:
        OutputError: unknown suffix, missing or unwritable folder, disk full.
    """
    path = Path(path)
    encoded = encode_image(rgb, path.suffix, quality=quality)
    part = create_beside(path)
    try:
        part.write_bytes(encoded)
        publish(part, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def create_beside(path: Path) -> Path:
    """Make an empty temporary file in the folder of ``path``, with the rights a new file gets.

    Raises:
        OutputError: the folder is missing or not writable, or ``path`` is a folder.
    """
    check_folder(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "expected the name of a file", "add a file name to it")
    return create_part(path)


def create_part(path: Path) -> Path:
    """As :func:`create_beside`, where ``path`` may as well become a folder.

    Raises:
        OutputError: the file cannot be made.
    """
    part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise cannot_write(path, error) from error
    return part


def check_folder(path: Path) -> None:
    """Refuse an output whose folder is not there.

    Raises:
        OutputError: the folder of ``path`` is missing or no folder.
    """
    folder = path.parent
    try:
        if folder.is_dir():
            return
        found = "is no folder" if folder.exists() else "does not exist"
    except OSError as error:
        raise cannot_write(path, error) from error
    raise OutputError(
        f"{path} cannot be written: the folder {folder} {found}",
        "expected an existing folder",
        f"create it (mkdir -p {folder}) or choose another output",
    )


def publish(part: Path, path: Path) -> None:
    """Give a finished temporary file its name: fsync, rename, fsync of the folder. Raises OSError."""
    fsync_path(part)
    part.replace(path)
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The OutputError for an operating-system error while writing ``path``."""
    return OutputError(
        f"{path} cannot be written ({error.strerror or error})",
        "expected a writable folder with enough space",
        "check permissions and free space, or choose another output",
    )
