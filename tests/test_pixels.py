"""Pictures become the tower's squares; odd files are read, or refused with the reason."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mod_jax.config import CLIP_MEAN, ConfigError, VisionConfig
from mod_jax.data.samples import pixels
from mod_jax.data.samples.pixels import load_image
from mod_jax.data.sources.record import BadSample

CLIP_FILL = (122, 116, 104)

# pytest replaces the filters that `pixels` sets.
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Image size")


def photo(height, width, seed=0):
    """Makes smooth colours with a little noise, u8[H,W,3]."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 11)], -1)
    noise = np.random.default_rng(seed).normal(0, 8, waves.shape)
    return (128 + 90 * waves + noise).clip(0, 255).astype(np.uint8)


def encoded(image, form="PNG", **options):
    """Encodes a Pillow image or an array."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def tower(size, mean=CLIP_MEAN):
    return VisionConfig(image_size=size, patch_size=1, pixel_mean=mean)


STOCK = {  # fit -> the processor of transformers that does the same
    "pad": lambda size, mean: LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": size}, image_mean=list(mean), **square(size)
    ),
    "crop": lambda size, mean: CLIPImageProcessorPil(size={"shortest_edge": size}, **square(size)),
    "stretch": lambda size, mean: SiglipImageProcessorPil(
        size={"height": size, "width": size}, do_rescale=False, do_normalize=False
    ),
}


def square(size):
    return {
        "crop_size": {"height": size, "width": size},
        "do_rescale": False,
        "do_normalize": False,
    }


@pytest.mark.parametrize("mean", [CLIP_MEAN, (0.5, 0.5, 0.5)])
@pytest.mark.parametrize("fit", STOCK)
@pytest.mark.parametrize(
    "shape",
    [
        (60, 91),
        (91, 60),
        (40, 40),
        (7, 300),
        (28, 28),
        (29, 28),
        (5, 3),
        (1, 1),
        (1, 400),
        (400, 1),
    ],
)
def test_agrees_with_the_processor_of_transformers(shape, fit, mean):
    """With its PIL backend. The second mean is SigLIP's, whose padding is gray."""
    source = photo(*shape)
    pixel_values = STOCK[fit](28, mean)(Image.fromarray(source)).pixel_values[0]
    expected = np.asarray(pixel_values).transpose(1, 2, 0)
    made = load_image(encoded(source), tower(28, mean), fit)
    assert made.shape == (28, 28, 3)
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize(
    "shape", [(60, 91), (91, 60), (40, 40), (7, 300), (300, 7), (1, 5), (5, 1)]
)
def test_padding_strip_by_strip_is_padding_at_once(shape, monkeypatch):
    whole = load_image(photo(*shape), tower(28))
    for strip in (1, 1000, 10_000):
        monkeypatch.setattr(pixels, "STRIP_PIXELS", strip)
        np.testing.assert_array_equal(load_image(photo(*shape), tower(28)), whole)


@pytest.mark.parametrize("width, height", [(20_000, 300), (20, 8000), (30_000, 60)])
def test_a_panorama_is_padded_without_a_square_of_its_side(width, height, monkeypatch):
    panorama = Image.new("RGB", (width, height), "red")
    new = Image.new
    sizes = []

    def recorded(mode, size, *color):
        sizes.append(size)
        return new(mode, size, *color)

    monkeypatch.setattr(Image, "new", recorded)
    picture = load_image(panorama, tower(28)).astype(int)
    assert max(w * h for w, h in sizes) <= pixels.STRIP_PIXELS
    rows = picture if width > height else picture.transpose(1, 0, 2)
    assert (rows[:10] == CLIP_FILL).all()
    assert (rows[-10:] == CLIP_FILL).all()
    red_share = (rows - CLIP_FILL) / (np.array([255, 0, 0]) - CLIP_FILL)
    expected = 28 * min(width, height) / max(width, height)  # red rows, which may be less than one
    assert abs(red_share.mean((1, 2)).sum() - expected) < 0.03


def test_a_picture_of_a_single_row_may_be_too_long_to_be_cropped():
    assert load_image(np.zeros((1, 30_000, 3), np.uint8), tower(8), "crop").shape == (8, 8, 3)
    with pytest.raises(BadSample, match="picture too long: 30000 x 1 px"):
        load_image(np.zeros((1, 30_000, 3), np.uint8), tower(336), "crop")


def test_an_unknown_fit_is_refused():
    with pytest.raises(ConfigError, match="fit = 'squeeze': expected one of .*pad"):
        load_image(encoded(photo(8, 8)), tower(8), "squeeze")


def test_a_picture_of_the_right_size_is_untouched():
    source = photo(28, 28)
    for fit in STOCK:
        np.testing.assert_array_equal(load_image(encoded(source), tower(28), fit), source)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    """transformers 5 does the same with a Pillow image."""
    alpha = np.linspace(0, 255, 600, dtype=np.uint8).reshape(20, 30, 1)
    source = np.concatenate([photo(20, 30), alpha], -1)
    if mode == "P":
        image = Image.fromarray(source[..., 0], "L").convert("P")
        image.info["transparency"] = 77
    else:
        image = Image.fromarray(source).convert(mode)
    pixel_values = STOCK["pad"](24, CLIP_MEAN)(image, do_convert_rgb=True).pixel_values[0]
    expected = np.asarray(pixel_values).transpose(1, 2, 0)
    np.testing.assert_array_equal(load_image(image, tower(24)), expected)
    np.testing.assert_array_equal(load_image(encoded(image), tower(24)), expected)


def test_padding_is_centred_and_has_the_mean_colour():
    made = load_image(encoded(np.zeros((10, 40, 3), np.uint8)), tower(40))
    assert (made[:15] == CLIP_FILL).all()
    assert (made[25:] == CLIP_FILL).all()
    assert (made[15:25] == 0).all()


def test_colour_modes_become_rgb():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for image in (red.convert("RGBA"), red.convert("P"), red.convert("CMYK")):
        form = "TIFF" if image.mode == "CMYK" else "PNG"
        np.testing.assert_allclose(
            load_image(encoded(image, form), tower(8)),
            np.broadcast_to((255, 0, 0), (8, 8, 3)),
            atol=1,
        )
    assert (load_image(encoded(Image.new("L", (8, 8), 77)), tower(8)) == 77).all()


UPRIGHT = {  # EXIF's orientation -> what turns the picture upright
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_camera_s_rotation_is_applied(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    lossless = options.get(form, {})
    made = load_image(encoded(photo(16, 16), form, exif=exif, **lossless), tower(16)).astype(int)
    np.testing.assert_allclose(
        made, UPRIGHT[orientation](photo(16, 16)), atol=4 if form == "JPEG" else 0
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *, depth=8, colour=2, chunks=b"", row=b"") -> bytes:
    """Makes a PNG that claims a size. It has `height` times the bytes of `row`, or no pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunks
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * height if row else b""))
        + chunk(b"IEND", b"")
    )


def tiff(width, height) -> bytes:
    """Makes a TIFF that claims a size, but has no pixels."""
    tags = {
        256: width,
        257: height,
        258: 8,
        259: 1,
        262: 1,
        273: 8,
        277: 1,
        278: height,
        279: width * height,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(100)


def gif(width, height, frame_width, frame_height) -> bytes:
    """Makes a GIF that claims a size of its screen and of its frame, but has a single pixel."""
    screen = struct.pack("<HH", width, height) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    return (
        b"GIF89a"
        + screen
        + b","
        + struct.pack("<HHHH", 0, 0, frame_width, frame_height)
        + b"\0\2\2\x4c\1\0;"
    )


def in_png(*chunks: bytes) -> bytes:
    """Makes a PNG of PHOTO with further chunks before its pixels."""
    whole = encoded(PHOTO)
    return whole[:33] + b"".join(chunks) + whole[33:]


PHOTO = Image.fromarray(photo(24, 32))  # 32 px wide
RGB = np.asarray(PHOTO)


def jpeg(**options) -> bytes:
    return encoded(RGB, "JPEG", quality=95, **options)


def two_frames(form, **options) -> bytes:
    """Encodes PHOTO, then the same upside down."""
    return encoded(RGB, form, save_all=True, append_images=[PHOTO.rotate(180)], **options)


ODD = {  # name -> (encoded picture, largest difference of a pixel from PHOTO's)
    "progressive JPEG": (jpeg(progressive=True), 25),
    "EXIF of garbage": (jpeg(exif=b"Exif\0\0garbage"), 25),
    "EXIF that points nowhere": (jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), 25),
    "EXIF with a broken tag": (
        jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\1\7\0\xff\xff\xff\xff"),
        25,
    ),
    "EXIF that is no EXIF": (
        in_png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      4\nnone")),
        0,
    ),
    "huge colour profile": (jpeg(icc_profile=bytes(3_000_000)), 25),
    "colour profile in PNG": (
        in_png(chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(900_000)))),
        0,
    ),
    "long text": (in_png(chunk(b"tEXt", b"comment\0" + b"x" * 2_000_000)), 0),
    "MPO": (two_frames("MPO", quality=95), 25),
    "animated PNG": (two_frames("PNG"), 0),
    "animated WEBP": (two_frames("WEBP", lossless=True), 0),
    "animated GIF": (two_frames("GIF"), 40),
    "TIFF of pages": (two_frames("TIFF"), 0),
    "BMP": (encoded(RGB, "BMP"), 0),
    "PPM": (encoded(RGB, "PPM"), 0),
    "AVIF": (encoded(RGB, "AVIF", quality=100, subsampling="4:4:4"), 10),
    "JPEG 2000": (encoded(RGB, "JPEG2000"), 0),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_and_only_their_first_frame_is_used(name, tmp_path):
    data, tolerance = ODD[name]
    (tmp_path / "wrong.tga").write_bytes(data)
    for picture in (data, tmp_path / "wrong.tga"):
        made = np.asarray(pixels.decode(picture)).astype(int)
        assert np.abs(made - RGB).max() <= tolerance


def test_cmyk_is_ink_on_white_paper():
    cmyk = np.random.default_rng(0).integers(0, 256, (6, 8, 4)).astype(np.uint8)
    paper = 255 - cmyk.astype(int)
    expected = paper[..., :3] * paper[..., 3:] / 255
    np.testing.assert_allclose(
        pixels.decode(encoded(Image.fromarray(cmyk, "CMYK"), "TIFF")), expected, atol=1
    )
    flat = Image.new("CMYK", (16, 16), (0, 200, 100, 30))
    np.testing.assert_allclose(
        np.asarray(pixels.decode(encoded(flat, "JPEG", quality=100)))[8, 8],
        (225, 48.5, 136.8),
        atol=3,
    )


def test_of_sixteen_bits_the_upper_eight_are_kept_in_gray_and_in_colour():
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7)).astype(np.uint16)
    expected = np.repeat((deep >> 8)[..., None], 3, -1)
    for picture in (encoded(deep), encoded(deep, "TIFF"), deep):
        np.testing.assert_array_equal(pixels.decode(picture), expected)
    colours = b"\x80\0\x40\xff\x20\1" * 3
    np.testing.assert_array_equal(
        pixels.decode(png(3, 2, depth=16, row=colours)),
        np.broadcast_to((0x80, 0x40, 0x20), (2, 3, 3)),
    )


def test_one_bit_is_black_and_white():
    bits = np.random.default_rng(0).integers(0, 2, (9, 17)).astype(bool)
    np.testing.assert_array_equal(
        pixels.decode(encoded(Image.fromarray(bits))), np.repeat(255 * bits[..., None], 3, -1)
    )


def test_a_transparent_colour_is_white():
    key = chunk(b"tRNS", struct.pack(">HHH", 5, 6, 7))
    np.testing.assert_array_equal(
        pixels.decode(png(2, 1, chunks=key, row=b"\5\6\7\x80\x81\x82")),
        [[(255, 255, 255), (0x80, 0x81, 0x82)]],
    )


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


LARGE = {form: encoded(photo(200, 200), form) for form in ("JPEG", "PNG", "WEBP")}
REFUSED = {  # name -> (bytes, pattern of the reason)
    "empty": (b"", "0 bytes, none of JPEG, PNG,"),
    "HTML": (b"<!DOCTYPE html><title>404</title>", "begin with b'<!DOCTYPE html><'"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "begin with b'<svg"),
    "EPS": (encoded(RGB, "EPS"), "begin with b'%!PS"),
    "PDF": (encoded(RGB, "PDF"), "begin with b'%PDF"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "none of .*ftypheic"),
    "head of a JPEG": (LARGE["JPEG"][:300], "Truncated"),
    "half a JPEG": (half(LARGE["JPEG"]), "truncated"),
    "half a progressive JPEG": (
        half(encoded(photo(200, 200), "JPEG", progressive=True)),
        "truncated",
    ),
    "head of a PNG": (LARGE["PNG"][:30], "none of .*PNG"),
    "half a PNG": (half(LARGE["PNG"]), "truncated"),
    "PNG with a wrong byte": (
        LARGE["PNG"][:50_000] + bytes([LARGE["PNG"][50_000] ^ 1]) + LARGE["PNG"][50_001:],
        "broken",
    ),
    "half a WEBP": (half(LARGE["WEBP"]), "decoder"),
    "half a GIF": (half(encoded(RGB, "GIF")), "truncated"),
    "half a TIFF": (half(encoded(RGB, "TIFF")), "truncated"),
    "TIFF without pixels": (tiff(100, 100), "truncated"),
    "PNG bomb": (png(50_000, 50_000), "2500000000 pixels.*bomb"),
    "TIFF bomb": (tiff(50_000, 50_000), "2500000000 pixels.*bomb"),
    "GIF bomb": (gif(50_000, 50_000, 5, 5), "2500000000 pixels.*bomb"),
    "bomb in the frame of a GIF": (gif(5, 5, 50_000, 50_000), "2500000000 pixels.*bomb"),
    "too large": (png(12_000, 12_000), "picture too large: 12000 x 12000 px, more than 100000000"),
    "too long": (png(10, 30_001), "picture too large: 10 x 30001 px, .* 30000 on a side"),
    "colour profile bomb": (
        in_png(chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2_000_000)))),
        "too large.*MAX_TEXT_CHUNK",
    ),
    "floats": (
        encoded(PHOTO.convert("F"), "TIFF"),
        "pixels of 32 bits, whose value for white is unknown",
    ),
    "32-bit integers": (encoded(PHOTO.convert("I"), "TIFF"), "pixels of 32 bits"),
}


TEXTS = {  # texts that Pillow refuses, or does not unpack
    "huge": chunk(b"tEXt", b"text\0" + bytes(PngImagePlugin.MAX_TEXT_MEMORY + 1)),
    "compressed": chunk(b"zTXt", b"text\0\0" + zlib.compress(bytes(2_000_000))),
    "international": chunk(b"iTXt", b"text\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
    "many": chunk(b"tEXt", b"text\0" + b"x" * 700_000) * 100,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("behind", [False, True])
def test_texts_of_any_size_in_a_png_do_not_keep_it_from_being_read(name, behind, tmp_path):
    plain = in_png(b"")
    end = plain.index(b"IEND") - 4
    with_text = plain[:end] + TEXTS[name] + plain[end:] if behind else in_png(TEXTS[name])
    (tmp_path / "a.png").write_bytes(with_text)
    for picture in (with_text, tmp_path / "a.png"):
        np.testing.assert_array_equal(pixels.decode(picture), pixels.decode(plain))


@pytest.mark.parametrize("width, height", [(30_000, 3), (3, 30_000), (8000, 1)])
def test_a_picture_of_which_nothing_but_padding_would_be_left_is_named(width, height):
    picture = np.zeros((height, width, 3), np.uint8)
    with pytest.raises(
        BadSample,
        match=f"picture too narrow: {width} x {height} px becomes nothing but padding",
    ):
        load_image(picture, tower(336))


def test_a_long_picture_of_which_a_line_is_left_is_read():
    assert (load_image(np.zeros((4, 1000, 3), np.uint8), tower(336))[167] < 40).all()


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_says_why_bytes_are_no_picture(name):
    data, reason = REFUSED[name]
    with pytest.raises(BadSample, match=reason):
        load_image(data, tower(8))


DECODE_ALL = """
import contextlib, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    with contextlib.suppress(Exception):
        decode(path)
"""


def warnings_of(folder, definition: str) -> str:
    """Decodes all pictures of a folder, with all of Python's warnings on, and returns stderr.

    Args:
      folder: The folder.
      definition: Code that defines `decode`.
    """
    code = definition + DECODE_ALL
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code, str(folder)],
        capture_output=True,
        text=True,
        check=True,
    ).stderr


def test_pillow_s_warnings_do_not_fill_the_log(tmp_path):
    broken_exif = jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\1\7")
    (tmp_path / "large.png").write_bytes(png(9500, 9500))
    (tmp_path / "exif.jpg").write_bytes(broken_exif)
    pillow = "from PIL import Image\ndecode = lambda path: Image.open(path).getexif()"
    warned = warnings_of(tmp_path, pillow)
    assert "DecompressionBombWarning" in warned
    assert "EXIF" in warned
    assert "PIL" not in warnings_of(tmp_path, "from mod_jax.data.samples.pixels import decode")


def test_paths_arrays_and_pillow_images_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photo(8, 8)))
    image = Image.fromarray(photo(8, 8))
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), photo(8, 8), image):
        np.testing.assert_array_equal(load_image(picture, tower(8)), photo(8, 8))
    assert (load_image(np.full((8, 8), 7, np.uint8), tower(8)) == 7).all()
    np.testing.assert_array_equal(image, photo(8, 8))  # the caller's image is unchanged


def test_a_missing_picture_is_a_bad_sample(tmp_path):
    with pytest.raises(BadSample, match="no such picture file.*b.jpg"):
        load_image(tmp_path / "b.jpg", tower(8))
    for nothing in (tmp_path, np.zeros((4, 4, 7), np.uint8), None):
        with pytest.raises(BadSample, match="unreadable picture: ."):
            load_image(nothing, tower(8))
