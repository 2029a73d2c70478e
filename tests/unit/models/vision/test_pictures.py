"""Pictures of every kind, and files that are none."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from optiq.errors import UsageError
from optiq.models.vision.pictures import open_picture

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def halves():
    """Left half red, right half blue, 8 x 4."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4], pixels[:, 4:] = RED, BLUE
    return Image.fromarray(pixels)


def saved(picture, path, **options):
    picture.save(path, **options)
    return path


def corners(picture):
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0)), picture.getpixel((picture.width - 1, 0))


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp", "a.tiff", "a.gif", "a.ppm"])
def test_formats(tmp_path, halves, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    file = saved(halves, tmp_path / name, **options)
    assert corners(open_picture(file)) == (RED, BLUE)
    assert corners(open_picture(str(file))) == (RED, BLUE)
    assert corners(open_picture(file.read_bytes())) == (RED, BLUE)


def test_a_picture_of_pillow_is_left_alone(halves):
    before = halves.tobytes()
    assert corners(open_picture(halves)) == (RED, BLUE)
    assert halves.tobytes() == before


@pytest.mark.parametrize(("orientation", "size"), [(3, (8, 4)), (6, (4, 8)), (8, (4, 8))])
def test_orientation(tmp_path, halves, orientation, size):
    """3 is upside down; 6 and 8 lie on a side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = open_picture(saved(halves, tmp_path / "a.png", exif=exif))
    assert found.size == size
    top = found.getpixel((0, 0))
    assert top == {3: BLUE, 6: RED, 8: BLUE}[orientation]


def test_what_is_transparent_is_white(tmp_path):
    layered = Image.new("RGBA", (2, 1), (*RED, 255))
    layered.putpixel((1, 0), (*BLUE, 0))
    assert corners(open_picture(saved(layered, tmp_path / "a.png"))) == (RED, (255, 255, 255))
    half = Image.new("LA", (1, 1), (0, 128))
    assert open_picture(half).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00"])
def test_palettes(tmp_path, transparency):
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *BLUE])
    picture.putpixel((1, 0), 1)
    options = {} if transparency is None else {"transparency": transparency}
    second = BLUE if transparency is None else (255, 255, 255)
    assert corners(open_picture(saved(picture, tmp_path / "a.png", **options))) == (RED, second)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bits_a_channel_are_scaled_not_cut(tmp_path, name):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    found = open_picture(saved(Image.fromarray(values), tmp_path / name))
    assert np.asarray(found)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_whole_numbers_and_fractions_of_32_bits():
    whole = Image.fromarray(np.array([[0, 255]], np.int32))
    assert np.asarray(open_picture(whole))[0, :, 0].tolist() == [0, 255]
    deep = Image.fromarray(np.array([[0, 65535]], np.int32))
    assert np.asarray(open_picture(deep))[0, :, 0].tolist() == [0, 255]
    fractions = Image.fromarray(np.array([[0, 0.5, 1, np.nan]], np.float32))
    assert np.asarray(open_picture(fractions))[0, :, 0].tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "PA", "RGBa"])
def test_other_modes(mode):
    found = open_picture(Image.new(mode, (3, 2)))
    assert found.mode == "RGB"
    assert found.size == (3, 2)


def test_cmyk_from_a_file(tmp_path):
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = open_picture(saved(inks, tmp_path / "a.jpg", quality=95)).getpixel((3, 3))
    assert red > 240
    assert max(green, blue) < 15


def test_the_first_frame_of_an_animation(tmp_path, halves):
    other = Image.new("RGB", (8, 4), (0, 255, 0))
    file = saved(halves, tmp_path / "a.gif", save_all=True, append_images=[other], duration=50)
    assert corners(open_picture(file)) == (RED, BLUE)


# -- what is refused -----------------------------------------------------------------------------


def refused(source, words):
    with pytest.raises(UsageError, match=words) as caught:
        open_picture(source)
    assert "\n" not in str(caught.value)


def png(width, height):
    """A PNG that says it is of some size, with next to nothing in it."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_000, 10_000), (8001, 8001), (60_000, 60_000)])
def test_too_many_pixels_are_seen_in_the_header(tmp_path, size):
    file = tmp_path / "bomb.png"
    file.write_bytes(png(*size))
    refused(file, "more than 64 megapixels; make it smaller")


def test_64_megapixels_are_not_too_many(tmp_path):
    file = tmp_path / "large.png"
    file.write_bytes(png(8000, 8000))
    refused(file, "cannot be decoded")  # after the header: there is no more in it


def test_a_file_cut_short(tmp_path, halves):
    for name in ("a.png", "a.jpg"):
        file = saved(halves.resize((80, 40)), tmp_path / name)
        file.write_bytes(file.read_bytes()[:-60])
        refused(file, "cannot be decoded .* it is damaged: give another image")


def test_bytes_that_are_wrong(tmp_path, halves):
    file = saved(halves, tmp_path / "a.png")
    data = bytearray(file.read_bytes())
    data[40:60] = bytes(20)
    file.write_bytes(data)
    refused(file, "cannot be decoded|is no image")


@pytest.mark.parametrize("text", [b"Dear all,\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"GIF"])
def test_what_is_no_image(tmp_path, text):
    file = tmp_path / "letter.png"
    file.write_bytes(text)
    refused(file, "is no image that optiq reads")
    refused(text, "the picture is no image that optiq reads")


def test_an_empty_file(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"")
    refused(file, "is empty")


def test_no_pixels(tmp_path):
    refused(Image.new("RGB", (0, 5)), "has 0 x 5 pixels")
    file = tmp_path / "a.png"
    file.write_bytes(png(0, 5))
    refused(file, "cannot be decoded|is no image|has 0 x 5 pixels")


@pytest.mark.parametrize("name", ["gone.png", "", "x" * 5000, "a\0b"])
def test_no_file(tmp_path, name):
    refused(tmp_path / name if name else tmp_path, "there is no image file")


@pytest.mark.parametrize(
    "address",
    [
        "https://example.com/a.png",
        "HTTP://example.com/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,iVBORw0KGgo" + "A" * 10_000,
    ],
)
def test_addresses(address):
    refused(address, "is an address; optiq opens image files and fetches nothing")
