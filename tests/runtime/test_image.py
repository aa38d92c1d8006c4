"""Pictures: what is read right, what is refused and how, and that writing is whole or nothing."""

from __future__ import annotations

import io
import os
import stat
import struct
import time
import zlib
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt
import pytest

from lp_edge.errors import MediaError, OutputError
from lp_edge.runtime.image import _quiet_opencv, encode_image, picture_header, read_image, write_image

U8 = npt.NDArray[np.uint8]


def picture(height: int = 40, width: int = 64) -> U8:
    """Four differently coloured quarters with a gradient: no symmetry, mild enough for JPEG."""
    out = np.empty((height, width, 3), np.uint8)
    y, x = np.mgrid[0:height, 0:width]
    out[..., 0] = np.where(x < width // 2, 200, 40)
    out[..., 1] = np.where(y < height // 2, 180, 60)
    out[..., 2] = 255 * x // width
    return out


def bgr(rgb: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return rgb[..., [2, 1, 0, 3][: rgb.shape[2]]]


def encoded(pixels: npt.NDArray[np.generic], suffix: str, *params: int) -> bytes:
    done, data = cv2.imencode(suffix, pixels, list(params))
    assert done
    return data.tobytes()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def exif(orientation: int, order: str = "<") -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 274, 3, 1, orientation, 0)
    return mark + struct.pack(order + "IH", 8, 1) + entry + b"\0\0\0\0"


def jpeg_with_exif(data: bytes, block: bytes) -> bytes:
    body = b"Exif\0\0" + block
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_lossless_formats_come_back_exactly(suffix: str, tmp_path: Path) -> None:
    rgb = picture()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(bgr(rgb), suffix))
    got = read_image(path)
    assert got.dtype == np.uint8 and got.flags.c_contiguous and got.flags.writeable
    np.testing.assert_array_equal(got, rgb)
    np.testing.assert_array_equal(read_image(path.read_bytes()), rgb)
    np.testing.assert_array_equal(read_image(str(path)), rgb)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_come_back_closely(suffix: str) -> None:
    rgb = cv2.GaussianBlur(picture(), (0, 0), 3)
    assert np.abs(read_image(encoded(bgr(rgb), suffix)).astype(int) - rgb).mean() < 4


def gif(frames: list[U8]) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="gif") as container:
        stream = container.add_stream("gif", rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb8"
        for rgb in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="rgb8"))
            )
        container.mux(stream.encode(None))
    return out.getvalue()


def test_gif_gives_its_first_frame() -> None:
    first, second = np.full((20, 30, 3), (255, 0, 0), np.uint8), np.full((20, 30, 3), (0, 0, 255), np.uint8)
    header = picture_header(gif([first, second]))
    assert header is not None and (header.format, header.frames, header.complete) == ("gif", 2, True)
    got = read_image(gif([first, second]))
    np.testing.assert_allclose(got, first, atol=4)  # the rgb8 palette has no 255 red


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation_of_jpeg_agrees_with_opencv(orientation: int, order: str, tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    path.write_bytes(jpeg_with_exif(encoded(bgr(picture()), ".jpg"), exif(orientation, order)))
    expected = cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]
    assert expected.shape == ((40, 64, 3) if orientation < 5 else (64, 40, 3))
    np.testing.assert_array_equal(read_image(path), expected)


def test_exif_orientation_of_png_webp_and_tiff() -> None:
    rgb = picture()
    turned = np.rot90(rgb, -1)  # orientation 6: turn clockwise
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    np.testing.assert_array_equal(read_image(png(64, 40, 8, 2, rows, extra=chunk(b"eXIf", exif(6)))), turned)
    tiff = bytearray(encoded(bgr(rgb), ".tiff"))
    at = int.from_bytes(tiff[4:8], "little")
    entries = int.from_bytes(tiff[at : at + 2], "little")
    tags = [int.from_bytes(tiff[at + 2 + 12 * i :][:2], "little") for i in range(entries)]
    if 274 in tags:
        entry = at + 2 + 12 * tags.index(274)
        tiff[entry + 8 : entry + 10] = (6).to_bytes(2, "little")
        np.testing.assert_array_equal(read_image(bytes(tiff)), turned)
    lossless = encoded(bgr(rgb), ".webp", cv2.IMWRITE_WEBP_QUALITY, 101)
    body = lossless[12:]
    if body[:4] != b"VP8X":
        size = (63).to_bytes(3, "little") + (39).to_bytes(3, "little")
        body = b"VP8X" + struct.pack("<I", 10) + b"\x08\0\0\0" + size + body
    block = exif(6)
    body += b"EXIF" + struct.pack("<I", len(block)) + block
    webp = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    header = picture_header(webp)
    assert header is not None and (header.width, header.height, header.orientation) == (64, 40, 6)
    np.testing.assert_array_equal(read_image(webp), turned)


def test_a_broken_exif_block_does_not_matter() -> None:
    data = encoded(bgr(picture()), ".jpg")
    plain = read_image(data)
    for block in (b"II*\0\xff\xff\xff\x00", b"nonsense", exif(99)):
        np.testing.assert_array_equal(read_image(jpeg_with_exif(data, block)), plain)


def test_alpha_is_laid_over_white() -> None:
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:10, :, 3] = 255
    rgba[10:, :10, 3] = 128
    got = read_image(encoded(bgr(rgba), ".png"))
    assert (got[:10] == (200, 0, 0)).all()
    # 128/255 of the colour, the rest white: 200 -> 227.4, 0 -> 127.
    assert (got[10:, :10] == (227, 127, 127)).all()
    assert (got[10:, 10:] == 255).all()
    np.testing.assert_array_equal(
        read_image(encoded(bgr(rgba.astype(np.uint16) * 257), ".png")), got, err_msg="16 bit with alpha"
    )


def test_grey_grey_with_alpha_palette_and_16_bit() -> None:
    grey = np.arange(20 * 20, dtype=np.uint32).reshape(20, 20) % 256
    as_u8 = grey.astype(np.uint8)
    np.testing.assert_array_equal(read_image(encoded(as_u8, ".png")), np.repeat(as_u8[..., None], 3, 2))
    np.testing.assert_array_equal(
        read_image(encoded(as_u8, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 100))[..., 0],
        read_image(encoded(as_u8, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 100))[..., 2],
    )
    wide = (grey * 257).astype(np.uint16)
    np.testing.assert_array_equal(read_image(encoded(wide, ".png")), np.repeat(as_u8[..., None], 3, 2))
    # Rounded, not cut: 65535 * k / 255 ± 128 is still k.
    np.testing.assert_array_equal(read_image(encoded(np.full((16, 16), 1000 - 1, np.uint16), ".png")), 4)
    rows = b"".join(b"\0" + bytes([0, 255] * 20) for _ in range(20))
    assert (read_image(png(20, 20, 8, 4, rows)) == 0).all(), "grey with alpha, opaque black"
    rows = b"".join(b"\0" + bytes([0, 0] * 20) for _ in range(20))
    assert (read_image(png(20, 20, 8, 4, rows)) == 255).all(), "grey with alpha, clear"
    rows = b"".join(b"\0" + bytes([0, 1] * 10) for _ in range(20))
    got = read_image(png(20, 20, 8, 3, rows, extra=chunk(b"PLTE", bytes([9, 8, 7, 1, 2, 3]))))
    assert tuple(got[0, 0]) == (9, 8, 7) and tuple(got[0, 1]) == (1, 2, 3)


def refused(source: Path | bytes, *words: str, **options: int) -> None:
    start = time.monotonic()
    with pytest.raises(MediaError) as caught:
        read_image(source, **options)
    assert time.monotonic() - start < 1
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert caught.value.expected


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "no.png", "no.png", "does not exist")
    refused(tmp_path, "is a folder")
    refused(Path("/dev/null"), "no regular file")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    refused(empty, "empty")
    refused(b"", "empty")
    with pytest.raises(MediaError, match="cannot be read"):
        read_image(tmp_path / ("x" * 300 + ".png"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode_image(picture(), ".png"))
    path.chmod(0)
    refused(path, "permission")


def test_permission_errors_are_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode_image(picture(), ".png"))

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    refused(path, "Permission denied", "check its permissions")


def test_other_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    path.write_text("this is no picture at all\n" * 10)
    refused(path, "text.jpg is no picture", "this is ", "JPEG, PNG")
    refused(b"\0" * 1000, "no picture")
    refused(os.urandom(7) + b"\0", "no picture")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tiff", ".gif"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_truncated_pictures_are_refused(
    suffix: str, part: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    data = gif([noise]) if suffix == ".gif" else encoded(noise, suffix)
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(len(data) * part)])
    refused(path, "cut")
    if suffix in (".jpg", ".png", ".webp", ".bmp"):
        assert capfd.readouterr().err == "", "the decoder was not even asked"


def test_opencv_speaks_again_when_the_last_thread_has_decoded() -> None:
    logging = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging
    before = logging.getLogLevel()
    logging.setLogLevel(before + 1)
    try:
        first, second = _quiet_opencv(), _quiet_opencv()
        first.__enter__()
        second.__enter__()
        assert logging.getLogLevel() == 0
        first.__exit__(None, None, None)
        assert logging.getLogLevel() == 0, "another thread still decodes"
        second.__exit__(None, None, None)
        assert logging.getLogLevel() == before + 1
    finally:
        logging.setLogLevel(before)


def test_headers_cut_anywhere_are_refused() -> None:
    for suffix in (".jpg", ".png", ".webp", ".bmp", ".tiff"):
        data = encoded(bgr(picture()), suffix)
        for length in range(1, min(len(data), 200)):
            with pytest.raises(MediaError):
                read_image(data[:length])


def test_damaged_png_data_is_refused() -> None:
    data = bytearray(encode_image(picture(), ".png"))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    refused(bytes(data), "damaged")


def test_a_progressive_jpeg_that_lost_scans_is_refused() -> None:
    data = encoded(bgr(picture(200, 200)), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    read_image(data)
    refused(data[: len(data) * 2 // 3], "cut off")


def test_bounds_are_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = png(20_000, 20_000, 1, 0, b"".join([b"\0" * (2501 * 20_000)]))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    refused(huge, "20000x20000", "at most", "scale it down")
    refused(png(1, 1, 8, 0, b"\0\0"), "1x1", "at least 16")
    refused(png(17_000, 20, 8, 0, b"\0"), "17000x20")
    refused(png(200, 8, 8, 0, b"\0"), "200x8")
    refused(encode_image(picture(), ".png"), "64x40", max_pixels=2000)


def test_bounds_can_be_chosen() -> None:
    assert read_image(encode_image(picture(), ".png"), max_pixels=64 * 40).shape == (40, 64, 3)
    assert read_image(encode_image(picture(2, 2), ".png"), min_side=1).shape == (2, 2, 3)


def test_float_pictures_are_refused() -> None:
    refused(encoded(np.ones((20, 20, 3), np.float32), ".tiff"), "float32", "convert it to PNG")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".PNG"])
def test_written_pictures_come_back(suffix: str, tmp_path: Path) -> None:
    rgb = cv2.GaussianBlur(picture(), (0, 0), 3)
    path = tmp_path / f"out{suffix}"
    path.write_bytes(b"old")
    write_image(path, rgb)
    assert np.abs(read_image(path).astype(int) - rgb).mean() < 4
    assert os.listdir(tmp_path) == [path.name]


def test_written_files_have_the_rights_of_new_files(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", picture())
    (tmp_path / "b").touch()
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_what_cannot_be_written_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgb = picture()
    with pytest.raises(OutputError, match=r"does not exist.*mkdir -p"):
        write_image(tmp_path / "no" / "a.png", rgb)
    with pytest.raises(OutputError, match=r"cannot be written as \.xyz"):
        write_image(tmp_path / "a.xyz", rgb)
    with pytest.raises(OutputError, match="name without suffix"):
        write_image(tmp_path / "a", rgb)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_image(tmp_path / "folder.png", rgb)
    with pytest.raises(OutputError, match="float64"):
        write_image(tmp_path / "a.png", np.zeros((4, 4, 3)))  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is no folder"):
        write_image(tmp_path / "file" / "a.png", rgb)
    old = tmp_path / "old.png"
    old.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_image(old, rgb)
    assert old.read_bytes() == b"old", "the old file stays"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png", "old.png"]


def test_sample_pictures(shared: Path) -> None:
    pictures = sorted((shared / "samples" / "source").glob("*.jpg"))
    if not pictures:
        pytest.skip("no sample pictures")
    for path in pictures:
        expected = cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(read_image(path), expected)
