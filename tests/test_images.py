"""Pictures as the tower takes them."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mod_jax.data import images
from mod_jax.data.images import FILL, load_image
from mod_jax.data.sources import BadSample


def photo(height, width, seed=0):
    """Smooth colours with a little noise, u8[H,W,3]."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 11)], -1)
    return (128 + 90 * waves + np.random.default_rng(seed).normal(0, 8, waves.shape)).clip(0, 255).astype(np.uint8)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(60, 91), (91, 60), (40, 40), (7, 300), (28, 28)])
def test_agrees_with_the_processor_of_transformers(shape):
    source = photo(*shape)
    processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_rescale=False, do_normalize=False)
    expected = np.asarray(processor(Image.fromarray(source)).pixel_values[0]).transpose(1, 2, 0)
    made = load_image(encoded(source), 28)
    assert made.shape == (28, 28, 3) and made.dtype == np.uint8
    np.testing.assert_allclose(made.astype(int), expected.astype(int), atol=1)


def test_a_picture_of_the_right_size_is_untouched():
    source = photo(28, 28)
    np.testing.assert_array_equal(load_image(encoded(source), 28), source)


def test_padding_is_centred_and_has_the_mean_colour():
    made = load_image(encoded(np.zeros((10, 40, 3), np.uint8)), 40)
    assert (made[:15] == FILL).all() and (made[25:] == FILL).all() and (made[15:25] == 0).all()


def test_colour_modes_become_rgb():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for image in (red.convert("RGBA"), red.convert("P"), red.convert("CMYK")):
        form = "TIFF" if image.mode == "CMYK" else "PNG"
        np.testing.assert_allclose(load_image(encoded(image, form), 8), np.broadcast_to((255, 0, 0), (8, 8, 3)), atol=1)
    assert (load_image(encoded(Image.new("L", (8, 8), 77)), 8) == 77).all()


def test_the_camera_s_rotation_is_applied():
    source = photo(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # hold it turned by 90 degrees clockwise
    np.testing.assert_array_equal(load_image(encoded(source, exif=exif), 16), np.rot90(source, -1))


def test_a_path_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photo(8, 8)))
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", 8), photo(8, 8))


def test_unusable_pictures_are_bad_samples(tmp_path, monkeypatch):
    with pytest.raises(BadSample, match="no such picture file.*b.jpg"):
        load_image(tmp_path / "b.jpg", 8)
    for broken in (encoded(photo(64, 64), "JPEG")[:900], encoded(photo(64, 64))[:2000], b"not a picture", b""):
        with pytest.raises(BadSample, match="unreadable"):
            load_image(broken, 8)
    with pytest.raises(BadSample):
        load_image(tmp_path, 8)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(BadSample, match="64 x 64"):
        load_image(encoded(photo(64, 64)), 8)
