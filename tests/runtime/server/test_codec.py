from __future__ import annotations

import struct
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("google.protobuf", reason="needs the extra server or client")

from lp_edge.errors import ConfigError, LimitError, LpEdgeError, MediaError, OutputError, ProtocolError
from lp_edge.proto.v1 import common_pb2
from lp_edge.runtime.image import encode_image, read_image
from lp_edge.runtime.server.codec import (
    ENCODINGS,
    PIXEL_FORMATS,
    OutputSettings,
    PictureDecoder,
    PictureEncoder,
    decode_image,
    decode_picture,
    encode_frame,
    output_settings,
)

LIMITS = SimpleNamespace(max_pixels=1 << 20)


def picture(width: int = 96, height: int = 64, shift: int = 0) -> np.ndarray:
    """A smooth picture whose channels differ."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [
        128 + 90 * np.sin((x + shift) / 17),
        128 + 90 * np.cos(y / 13),
        255 * (x + y) / (width + height),
    ]
    return np.stack(channels, axis=-1).astype(np.uint8)


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int64) - b).mean())


def encoded(data: bytes) -> common_pb2.Image:
    return common_pb2.Image(encoded=common_pb2.EncodedImage(data=data))


def raw(width: int, height: int, data: bytes, pixel_format: int = 0) -> common_pb2.Image:
    return common_pb2.Image(
        raw=common_pb2.RawImage(width=width, height=height, data=data, format=pixel_format)
    )


# -- in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "tolerance"), [(".jpg", 3.0), (".png", 0.0), (".webp", 3.0)])
def test_files_become_rgb(suffix: str, tolerance: float) -> None:
    rgb = picture()
    out = decode_image(encoded(encode_image(rgb, suffix)), LIMITS)
    assert out.dtype == np.uint8 and out.flags.c_contiguous and out.flags.writeable
    assert out.shape == rgb.shape and off(out, rgb) <= tolerance


def test_jpegs_are_decoded_as_read_image_does() -> None:
    for quality, channels in ((90, 3), (40, 3), (90, 1)):
        rgb = picture(101, 67)
        stored = rgb[:, :, 0] if channels == 1 else rgb[:, :, ::-1]
        data = cv2.imencode(".jpg", stored, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        np.testing.assert_array_equal(decode_image(encoded(data), LIMITS), read_image(data))


def test_exif_orientation_is_applied() -> None:
    data = encode_image(picture(96, 64), ".jpg")
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, 6, 0, 0)
    app1 = b"Exif\0\0" + tiff
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1 + data[2:]
    out = decode_image(encoded(turned), LIMITS)
    np.testing.assert_array_equal(out, np.rot90(decode_image(encoded(data), LIMITS), -1))


def test_transparency_is_laid_over_white() -> None:
    bgra = np.zeros((32, 32, 4), np.uint8)
    data = cv2.imencode(".png", bgra)[1].tobytes()
    assert (decode_image(encoded(data), LIMITS) == 255).all()


@pytest.mark.parametrize("pixel_format", [0, 1, 2])
def test_raw_pixels(pixel_format: int) -> None:
    rgb = picture(33, 17)
    stored = rgb[:, :, ::-1] if pixel_format == 2 else rgb
    out = decode_image(raw(33, 17, stored.tobytes(), pixel_format), LIMITS)
    np.testing.assert_array_equal(out, rgb)
    out[0] = 0  # the caller's own


def test_shared_pixels_come_from_their_slot() -> None:
    rgb = picture(40, 20)
    asked: list[tuple[int, int, int]] = []

    def read(slot: int, width: int, height: int) -> np.ndarray:
        asked.append((slot, width, height))
        return rgb[:, :, ::-1].copy()

    message = common_pb2.Image(shared=common_pb2.SharedImage(slot=3, width=40, height=20, format=2))
    np.testing.assert_array_equal(decode_image(message, LIMITS, read), rgb)
    assert asked == [(3, 40, 20)]
    with pytest.raises(ProtocolError, match="no shared memory"):
        decode_image(message, LIMITS)
    message.shared.width = 1 << 31
    with pytest.raises((MediaError, LimitError)):
        decode_image(message, LIMITS, read)
    assert len(asked) == 1


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def bomb(width: int, height: int) -> bytes:
    return png(
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * 1000)),
        (b"IEND", b""),
    )


def apng() -> bytes:
    data = encode_image(picture(), ".png")
    ihdr, rest = data[8:33], data[33:]
    control = b"acTL" + struct.pack(">II", 2, 0)
    chunk = struct.pack(">I", 8) + control + struct.pack(">I", zlib.crc32(control))
    return data[:8] + ihdr + chunk + rest


def animated_webp() -> bytes:
    still = encode_image(picture(), ".webp")
    extended = struct.pack("<I", 0x02) + struct.pack("<I", 95)[:3] + struct.pack("<I", 63)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + extended + still[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_scans() -> bytes:
    data = encode_image(picture(), ".jpg")
    start = data.index(b"\xff\xda")
    return data[:start] + data[start:-2] * 65 + data[-2:]


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (common_pb2.Image(), ProtocolError, "holds nothing"),
        (encoded(b""), MediaError, "JPEG, PNG or WebP"),
        (encoded(b"hello, this is no picture"), MediaError, "JPEG, PNG or WebP"),
        (encoded(cv2.imencode(".bmp", picture())[1].tobytes()), MediaError, "begins with b'BM"),
        (encoded(b"GIF89a" + bytes(64)), MediaError, "begins with b'GIF"),
        (encoded(encode_image(picture(), ".jpg")[:200]), MediaError, "ends within its header"),
        (encoded(encode_image(picture(), ".jpg")[:-40]), MediaError, "cut off"),
        (encoded(encode_image(picture(), ".png")[:-30]), MediaError, "cut off"),
        (encoded(encode_image(picture(8, 64), ".png")), MediaError, "at least 16"),
        (encoded(bomb(60_000, 60_000)), LimitError, "at most"),
        (encoded(bomb(2048, 1024)), LimitError, "at most"),
        (encoded(apng()), MediaError, "animated PNG"),
        (encoded(animated_webp()), MediaError, "animated WEBP"),
        (encoded(many_scans()), MediaError, "66 scans|65 scans"),
        (raw(32, 32, bytes(32 * 32 * 3 - 1)), ProtocolError, "expected 3072"),
        (raw(32, 32, bytes(32 * 32 * 3), 7), ProtocolError, "pixel format is 7"),
        (raw(0, 0, b""), MediaError, "at least 16"),
        (raw(2**32 - 1, 2**32 - 1, b""), LimitError, "at most"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(image: common_pb2.Image, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        decode_image(image, LIMITS)


def test_progressive_jpegs_are_read() -> None:
    data = cv2.imencode(".jpg", picture(), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert data.count(b"\xff\xda") > 1
    assert decode_image(encoded(data), LIMITS).shape == (64, 96, 3)


FILES = [encode_image(picture(), suffix) for suffix in (".jpg", ".png", ".webp")]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(FILES), st.data())
def test_a_damaged_file_is_a_picture_or_an_error_of_ours(data: bytes, choose: st.DataObject) -> None:
    broken = bytearray(data)
    for _ in range(choose.draw(st.integers(0, 4))):
        broken[choose.draw(st.integers(0, len(data) - 1))] = choose.draw(st.integers(0, 255))
    cut = choose.draw(st.integers(0, len(data)))
    try:
        out = decode_image(encoded(bytes(broken[:cut] if choose.draw(st.booleans()) else broken)), LIMITS)
    except LpEdgeError:
        return
    assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] == 3
    assert out.shape[0] * out.shape[1] <= LIMITS.max_pixels


u32 = st.one_of(st.integers(0, 64), st.integers(0, 2**32 - 1))


@settings(deadline=None)
@given(u32, u32, st.integers(-(2**31), 2**31 - 1), st.binary(max_size=4000))
def test_any_raw_picture_is_pixels_or_an_error_of_ours(
    width: int, height: int, form: int, data: bytes
) -> None:
    try:
        out = decode_image(raw(width, height, data, form), LIMITS)
    except (LimitError, MediaError, ProtocolError):
        return
    assert out.shape == (height, width, 3) and out.size == len(data)


# -- out --------------------------------------------------------------------------------------------------


def test_settings_have_the_defaults_that_the_protocol_names() -> None:
    assert output_settings(common_pb2.OutputOptions()) == OutputSettings()
    full = common_pb2.OutputOptions(
        encoding=common_pb2.OUTPUT_ENCODING_H264,
        width=320,
        height=240,
        quality=50,
        pixel_format=common_pb2.PIXEL_FORMAT_BGR24,
        crf=30,
        keyframe_interval=10,
    )
    expected = OutputSettings("h264", 320, 240, 50, "bgr24", 30, 10, max_pixels=100_000)
    assert output_settings(full, max_pixels=100_000) == expected


def test_all_enum_numbers_have_a_name() -> None:
    assert set(ENCODINGS) == set(common_pb2.OutputEncoding.values())
    assert set(PIXEL_FORMATS) == set(common_pb2.PixelFormat.values())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("encoding", 99, "jpeg"), ("pixel_format", -1, "bgr24"), ("width", 15, "16 to 8192"),
        ("height", 8193, "16 to 8192"), ("quality", 101, "1 to 100"), ("crf", 52, "1 to 51"),
        ("keyframe_interval", 1001, "1 to 1000"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field: str, value: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        output_settings(common_pb2.OutputOptions(**{field: value}))


def test_the_size_of_results_is_bounded() -> None:
    assert OutputSettings(width=320).size(640, 360) == (320, 180)
    assert OutputSettings(height=720).size(640, 360) == (1280, 720)
    assert OutputSettings(width=100, height=50).size(640, 360) == (100, 50)
    assert OutputSettings().size(640, 360) == (640, 360)
    with pytest.raises(ConfigError, match="megapixels"):
        OutputSettings(width=4096, height=4096, max_pixels=1 << 20)
    with pytest.raises(ConfigError, match="8388608"):  # a narrow picture would become a huge one
        OutputSettings(width=8192).size(16, 16_384)
    with pytest.raises(ConfigError):
        PictureEncoder(OutputSettings("raw", width=8192)).encode(np.zeros((16_384, 16, 3), np.uint8))


@given(
    st.integers(0, 9000),
    st.integers(0, 9000),
    st.integers(16, 16_384),
    st.integers(16, 16_384),
    st.integers(256, 1 << 28),
)
def test_a_size_is_within_bounds_or_refused(
    width: int, height: int, drawn_width: int, drawn_height: int, pixels: int
) -> None:
    try:
        size = OutputSettings(width=width, height=height, max_pixels=pixels).size(drawn_width, drawn_height)
    except ConfigError:
        return
    if width or height:
        assert min(size) >= 1 and max(size) <= 8192 and size[0] * size[1] <= pixels
        assert size[0] == width or not width
        assert size[1] == height or not height
    else:
        assert size == (drawn_width, drawn_height)


@pytest.mark.parametrize("size", [(96, 64), (97, 65)])
@pytest.mark.parametrize(
    ("encoding", "tolerance"), [("jpeg", 2.5), ("png", 0.0), ("webp", 2.5), ("raw", 0.0), ("h264", 4.0)]
)
def test_pictures_go_there_and_back(encoding: str, tolerance: float, size: tuple[int, int]) -> None:
    encoder = PictureEncoder(OutputSettings(encoding, pixel_format="bgr24"))
    decoder = PictureDecoder()
    for shift in range(3):
        rgb = picture(*size, shift=shift)
        message = common_pb2.Picture.FromString(encoder.encode(rgb).SerializeToString())
        assert (message.width, message.height) == size and ENCODINGS[message.encoding] == encoding
        out = decoder.decode(message)
        assert out.shape == rgb.shape and off(out, rgb) <= tolerance
        if encoding != "h264":
            np.testing.assert_array_equal(decode_picture(message), out)
    encoder.close()
    decoder.close()


def test_raw_pixels_are_those_asked_for() -> None:
    rgb = picture(64, 48)
    settings = OutputSettings("raw", width=32, pixel_format="bgr24")
    message = PictureEncoder(settings).encode(rgb)
    expected = cv2.resize(rgb, (32, 24), interpolation=cv2.INTER_AREA)
    assert message.data == expected[:, :, ::-1].tobytes()
    assert message.pixel_format == common_pb2.PIXEL_FORMAT_BGR24
    enlarged = PictureEncoder(OutputSettings("raw", width=128)).pixels(rgb)
    assert enlarged.shape == (96, 128, 3) and off(enlarged[::2, ::2], rgb) < 3


def test_shared_memory_carries_the_header_alone() -> None:
    encoder = PictureEncoder(OutputSettings("shared_memory", width=32, pixel_format="bgr24"))
    rgb = picture(64, 48)
    slots = {5: encoder.pixels(rgb)}
    message = encoder.encode(rgb, slot=5)
    assert (message.width, message.height, message.slot, message.data) == (32, 24, 5, b"")
    decoder = PictureDecoder(lambda slot, width, height: slots[slot].reshape(height, width, 3).copy())
    np.testing.assert_array_equal(decoder.decode(message), slots[5][:, :, ::-1])
    with pytest.raises(ConfigError, match="slot"):
        encoder.encode(rgb)
    with pytest.raises(ConfigError, match="slot"):
        PictureEncoder(OutputSettings("raw")).encode(rgb, slot=0)
    with pytest.raises(ProtocolError, match="shared memory"):
        PictureDecoder().decode(message)


def test_none_has_no_pictures() -> None:
    with pytest.raises(ConfigError, match="none"):
        PictureEncoder(OutputSettings("none")).encode(picture())


def nal_types(unit: bytes) -> list[int]:
    """Types of the NAL units of an Annex B access unit (H.264 table 7-1)."""
    assert unit.startswith((b"\0\0\0\1", b"\0\0\1"))
    return [part[0] & 31 for part in unit.split(b"\0\0\1")[1:]]


def test_h264_is_annex_b_with_headers_before_every_key_frame() -> None:
    encoder = PictureEncoder(OutputSettings("h264", keyframe_interval=4))
    messages = [encoder.encode(picture(shift=5 * i)) for i in range(9)]
    assert [m.keyframe for m in messages] == [i % 4 == 0 for i in range(9)]
    for message in messages:
        types = set(nal_types(message.data)) - {6}  # supplemental information says which encoder it was
        assert types == ({7, 8, 5} if message.keyframe else {1})


def test_h264_can_be_entered_at_a_key_frame_and_nowhere_else() -> None:
    encoder = PictureEncoder(OutputSettings("h264", keyframe_interval=3))
    frames = [picture(shift=9 * i) for i in range(6)]
    messages = [encoder.encode(rgb) for rgb in frames]
    late = PictureDecoder()
    for rgb, message in zip(frames[3:], messages[3:], strict=True):
        assert off(late.decode(message), rgb) < 4
    with pytest.raises(MediaError, match="key frame"):
        PictureDecoder().decode(messages[1])


def test_h264_begins_anew_when_the_size_changes() -> None:
    encoder, decoder = PictureEncoder(OutputSettings("h264")), PictureDecoder()
    for size in ((96, 64), (96, 64), (128, 80), (96, 64)):
        rgb = picture(*size)
        message = encoder.encode(rgb)
        assert off(decoder.decode(message), rgb) < 4
    assert message.keyframe


def test_h264_colours_are_tagged_and_right() -> None:
    rgb = np.zeros((64, 96, 3), np.uint8)
    rgb[:, :32], rgb[:, 32:64], rgb[:, 64:] = (220, 40, 40), (40, 200, 60), (30, 60, 210)
    message = PictureEncoder(OutputSettings("h264", crf=5)).encode(rgb)
    out = PictureDecoder().decode(message)
    for x in (16, 48, 80):
        assert np.abs(out[32, x].astype(int) - rgb[32, x]).max() <= 3
    import av

    context = av.CodecContext.create("h264", "r")
    frame = [*context.decode(av.Packet(message.data)), *context.decode(None)][0]
    assert (frame.color_range, frame.colorspace, frame.format.name) == (1, 1, "yuv420p")


def test_a_size_that_an_encoder_does_not_take_is_an_error_of_ours() -> None:
    wide = np.zeros((16, 20_000, 3), np.uint8)
    for encoding in ("webp", "h264"):
        with pytest.raises(OutputError, match="20000x16"):
            PictureEncoder(OutputSettings(encoding)).encode(wide)


# -- the client's side -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(-(2**31), 2**31 - 1) | st.integers(0, 8),
    u32,
    u32,
    st.integers(-1, 3),
    st.binary(max_size=400),
    st.booleans(),
)
def test_any_result_is_pixels_or_an_error_of_ours(
    encoding: int, width: int, height: int, form: int, data: bytes, keyframe: bool
) -> None:
    message = common_pb2.Picture(
        encoding=encoding, width=width, height=height, pixel_format=form, data=data, keyframe=keyframe
    )
    for decode in (decode_picture, PictureDecoder().decode):
        try:
            out = decode(message)
        except LpEdgeError:
            continue
        assert out.dtype == np.uint8 and out.shape == (height, width, 3)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_damaged_access_units_are_pixels_or_errors_of_ours(choose: st.DataObject) -> None:
    encoder, decoder = PictureEncoder(OutputSettings("h264", keyframe_interval=3)), PictureDecoder()
    for shift in range(4):
        message = encoder.encode(picture(shift=shift))
        data = bytearray(message.data)
        for _ in range(choose.draw(st.integers(0, 3))):
            data[choose.draw(st.integers(0, len(data) - 1))] ^= choose.draw(st.integers(1, 255))
        message.data = bytes(data[: choose.draw(st.sampled_from((len(data), len(data) // 2)))])
        try:
            out = decoder.decode(message)
        except LpEdgeError:
            continue
        assert out.shape == (64, 96, 3)


@pytest.mark.parametrize(("encoding", "fits"), [("raw", False), ("jpeg", True), ("png", False)])
def test_the_pictures_of_an_answer_have_to_fit_a_message(encoding: str, fits: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    encoders = [PictureEncoder(OutputSettings(encoding, quality=10)) for _ in range(2)]
    limit = 2 * noise.nbytes  # two of them, and no room for the rest of the answer
    if fits:
        pictures = encode_frame(encoders, [noise, noise], limit)
        assert [p.width for p in pictures] == [256, 256]
    else:
        with pytest.raises(LimitError, match="2 pictures"):
            encode_frame(encoders, [noise, noise], limit)
