"""Any kind of image file becomes the RGB picture that a person sees."""

import numpy as np
import pytest
from PIL import Image, features

from layerwise.errors import DataError, LayerwiseWarning
from layerwise.sources.imagefile import find_bad_images, read_image


def gradient(width=20, height=10):
    row = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(
        np.stack([np.tile(row, (height, 1)), np.full((height, width), 60, np.uint8)] * 2, -1)[..., :3]
    )


def pixels(path, **options):
    return np.asarray(read_image(path, **options))


def test_grey_palette_and_one_bit(tmp_path):
    base = gradient()
    for mode in ("L", "P", "1"):
        base.convert(mode).save(tmp_path / f"{mode}.png")
        assert pixels(tmp_path / f"{mode}.png").shape == (10, 20, 3)
    grey = pixels(tmp_path / "L.png")
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert np.abs(pixels(tmp_path / "P.png").astype(int) - np.asarray(base)).max() < 60  # 256 colours


def test_cmyk_is_not_read_as_four_channels(tmp_path):
    gradient().convert("CMYK").save(tmp_path / "c.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "c.jpg").astype(int) - np.asarray(gradient())).mean() < 6


def test_what_is_hidden_under_transparency_is_not_seen(tmp_path):
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 255))
    image.putpixel((0, 0), (0, 255, 0, 0))
    image.save(tmp_path / "a.png")
    image.convert("LA").save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 255, 0, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    for name in ("a.png", "la.png", "p.png"):
        found = pixels(tmp_path / name)
        assert found[0, 0].tolist() == [255, 255, 255]
        assert found[1, 1].tolist() != [255, 255, 255]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 200).reshape(10, 20).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "d.png")
    found = pixels(tmp_path / "d.png")
    assert np.abs(found[..., 0] - deep / 257).max() <= 0.5


def test_fractions_are_scaled_and_other_ranges_refused(tmp_path):
    fractions = np.linspace(0, 1, 200, dtype=np.float32).reshape(10, 20)
    Image.fromarray(fractions).save(tmp_path / "f.tiff")
    assert np.abs(pixels(tmp_path / "f.tiff")[..., 0] - fractions * 255).max() <= 0.51
    Image.fromarray(fractions - 5).save(tmp_path / "n.tiff")
    with pytest.raises(DataError, match=r"n.tiff' has pixels from -5 to -4"):
        read_image(tmp_path / "n.tiff")


def test_the_cameras_orientation_is_followed(tmp_path):
    image = gradient()
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: turn by 90 degrees
    image.save(tmp_path / "o.jpg", exif=exif, quality=100)
    found = read_image(tmp_path / "o.jpg")
    assert found.size == (10, 20)


def test_grey_models_get_one_channel(tmp_path):
    gradient().save(tmp_path / "g.png")
    assert pixels(tmp_path / "g.png", channels=1).shape == (10, 20)


def bad_files(tmp_path):
    gradient(200, 100).save(tmp_path / "good.jpg")
    gradient(200, 100).save(tmp_path / "good.png")
    content = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "short.jpg").write_bytes(content[: len(content) // 2])
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "short.png").write_bytes(content[:-30])
    (tmp_path / "text.jpg").write_text("<html>")
    (tmp_path / "empty.png").touch()
    return [tmp_path / name for name in ("short.jpg", "short.png", "text.jpg", "empty.png", "gone.jpg")]


def test_damaged_files_are_named(tmp_path):
    for path in bad_files(tmp_path):
        with pytest.raises(DataError, match=path.name):
            read_image(path)


def test_a_full_check_finds_what_a_header_check_cannot(tmp_path):
    bad = bad_files(tmp_path)
    paths = [tmp_path / "good.jpg", *bad, tmp_path / "good.png"]
    assert set(find_bad_images(paths, decode=True)) == {1, 2, 3, 4, 5}
    assert set(find_bad_images(paths, decode=False)) == {3, 4, 5}


def test_a_damaged_avif_is_a_bad_image_like_others(tmp_path):
    # Pillow raises a RuntimeError for it, where other formats raise an OSError.
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "a.avif"
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    pixels_at = content.index(b"mdat") + 4
    path.write_bytes(content[:pixels_at] + b"\xff" * 40 + content[pixels_at + 40 :])
    with pytest.raises(RuntimeError), Image.open(path) as opened:
        opened.load()
    with pytest.raises(DataError, match=r"a\.avif"):
        read_image(path)
    assert set(find_bad_images([path], decode=True)) == {0}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_very_large_image_is_named(tmp_path, monkeypatch):
    # Pillow's own warning has the number of pixels alone
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    gradient().save(tmp_path / "large.png")
    gradient(5).save(tmp_path / "small.png")
    with pytest.warns(LayerwiseWarning, match=r"large\.png' has 200 pixels") as told:
        assert find_bad_images([tmp_path / "large.png", tmp_path / "small.png"], decode=True) == {}
    assert [warning.category for warning in told].count(LayerwiseWarning) == 1
