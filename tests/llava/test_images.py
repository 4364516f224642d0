"""Images from files and from the web: every mode, what is damaged, what is too much; padding without its canvas."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import requests
from PIL import ExifTags, Image, ImageFile, ImageOps

from golden import golden_root
from llava import images
from llava.images import expand2square, load_image, load_image_from_base64, load_rgb, pad_to_square
from noise_images import encoded, noise


def test_rgb_is_handed_through():
    picture = noise(5, 4)
    assert load_rgb(picture) is picture


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_become_rgb_as_pillow_converts_them(mode):
    picture = noise(9, 7).convert("L" if mode in ("LA", "PA") else "RGB").convert(mode)
    result = load_rgb(picture)
    assert result.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(result), np.asarray(picture.convert("RGB")))


def test_transparency_is_dropped_not_blended():
    pixels = np.array([[[10, 20, 30, 0], [40, 50, 60, 128]]], dtype=np.uint8)
    assert np.asarray(load_rgb(Image.fromarray(pixels))).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    result = load_rgb(io.BytesIO(encoded(Image.fromarray(grey * 257), kind)))
    np.testing.assert_array_equal(np.asarray(result)[..., 1], grey)


def test_integers_of_32_bits_are_scaled_by_what_they_hold():
    wide = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert np.asarray(load_rgb(wide))[..., 0].tolist() == [[0, 255]]
    narrow = Image.fromarray(np.array([[0, 255]], dtype=np.int32))
    assert np.asarray(load_rgb(narrow))[..., 0].tolist() == [[0, 255]]
    with pytest.raises(ValueError, match="from -1 to 70000; allowed: 0 to 65535"):
        load_rgb(Image.fromarray(np.array([[-1, 70000]], dtype=np.int32)))


def test_floating_point_pictures_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        load_rgb(Image.fromarray(np.zeros((2, 2), dtype=np.float32)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert load_rgb(io.BytesIO(data)).getpixel((4, 4)) == (255, 0, 0)


def test_the_frame_that_a_caller_chose_is_kept():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    film = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    film.seek(1)
    assert load_rgb(film).getpixel((4, 4)) == (0, 255, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file_gives_one_clear_error(kind, kept, tmp_path):
    data = encoded(noise(64, 48), kind)
    file = tmp_path / "cut.img"
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"cut\.img is (truncated or damaged|not an image)"):
        load_image(str(file))


def test_a_truncated_file_is_refused_whatever_the_process_accepts(monkeypatch, tmp_path):
    """lmms-eval tells Pillow to accept cut-off pictures."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(noise(64, 48), "PNG")
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.png is truncated"):
        load_image(str(tmp_path / "cut.png"))
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "note.txt").write_text("not a picture")
    with pytest.raises(ValueError, match=r"note\.txt is not an image"):
        load_image(str(tmp_path / "note.txt"))
    with pytest.raises(FileNotFoundError, match=r"nothing\.png does not exist"):
        load_image(str(tmp_path / "nothing.png"))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_image(str(tmp_path))
    with pytest.raises(TypeError, match="ndarray"):
        load_rgb(np.zeros((4, 4, 3), dtype=np.uint8))


def test_a_decompression_bomb_is_refused(monkeypatch, tmp_path):
    noise(40, 40).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"big\.png is too large"):
        load_image(str(tmp_path / "big.png"))


class Server(BaseHTTPRequestHandler):
    """A web site of images, and of what only looks like one."""

    def do_GET(self):
        getattr(self, self.path.strip("/").split(".")[0])()

    def log_message(self, *_):
        pass

    def begin(self, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def image(self):
        self.begin()
        self.wfile.write(encoded(noise(6, 5), "PNG"))

    def moved(self):
        self.begin(302, Location="/image.png")

    def missing(self):
        self.begin(404)

    def page(self):
        self.begin()
        self.wfile.write(b"<html>")

    def stated(self):
        self.begin(Content_Length=10**12)

    def flood(self):
        self.begin()
        with contextlib.suppress(OSError):  # the other side hangs up
            for _ in range(64):
                self.wfile.write(bytes(2**16))

    def drip(self):
        self.begin()
        with contextlib.suppress(OSError):
            for byte in encoded(noise(6, 5), "PNG"):
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.01)

    def headers_drip(self):
        with contextlib.suppress(OSError):
            for byte in b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n" * 20:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.01)


@pytest.fixture(scope="module")
def site():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("path", ["image.png", "moved.png"])
def test_an_image_from_the_web_is_fetched_with_a_timeout_and_tls_checks(monkeypatch, site, path):
    real = requests.get

    def get(url, **kwargs):
        assert kwargs["timeout"] and kwargs.get("verify", True) is True
        return real(url, **kwargs)

    monkeypatch.setattr(requests, "get", get)
    assert load_image(f"{site}/{path}").tobytes() == noise(6, 5).tobytes()


def test_what_the_web_has_instead_of_an_image_is_named(site):
    with pytest.raises(OSError, match=rf"could not fetch {site}/missing.png: 404"):
        load_image(f"{site}/missing.png")
    with pytest.raises(ValueError, match=rf"{site}/page.png is not an image"):
        load_image(f"{site}/page.png")
    with pytest.raises(OSError, match="could not fetch http://: "):
        load_image("http://")


@pytest.mark.parametrize("path", ["stated.png", "flood.png"])
def test_a_download_without_end_is_refused(monkeypatch, site, path):
    monkeypatch.setattr(images, "MAX_DOWNLOAD", 2**20)
    with pytest.raises(OSError, match=rf"{path}: it is larger than 1,048,576 bytes"):
        load_image(f"{site}/{path}")


@pytest.mark.parametrize("path", ["drip.png", "headers_drip.png"])
def test_a_download_that_never_ends_is_given_up(monkeypatch, site, path):
    """Each byte comes soon enough; all of them do not."""
    monkeypatch.setattr(images, "DOWNLOAD_SECONDS", 0.1)
    with pytest.raises(OSError, match=rf"{path}: not finished after 0.1 s"):
        load_image(f"{site}/{path}")


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_file_is_turned_as_its_orientation_states(kind, orientation, tmp_path):
    """TIFF is turned by Pillow itself, whoever reads it."""
    data = encoded(noise(16, 8), kind, exif=with_orientation(orientation))
    (tmp_path / "a.img").write_bytes(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected.size == ((8, 16) if orientation in (5, 6, 7, 8) else (16, 8))
    np.testing.assert_array_equal(load_image(str(tmp_path / "a.img")), expected)
    np.testing.assert_array_equal(load_image_from_base64(base64.b64encode(data)), expected)


def test_the_published_way_and_an_image_of_the_caller_are_not_turned(tmp_path):
    data = encoded(noise(16, 8), "JPEG", exif=with_orientation(6))
    (tmp_path / "a.jpg").write_bytes(data)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(load_image(str(tmp_path / "a.jpg"), upright=False), stored)
    np.testing.assert_array_equal(load_rgb(Image.open(io.BytesIO(data))), stored)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_metadata_does_not_cost_the_image():
    draw = np.random.default_rng(3)
    whole = with_orientation(6).tobytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for place in draw.integers(6, len(damaged), draw.integers(1, 12)):
            damaged[place] = draw.integers(256)
        data = encoded(Image.new("RGB", (16, 8)), "PNG", exif=bytes(damaged[: draw.integers(6, len(damaged) + 1)]))
        assert load_rgb(io.BytesIO(data)).size in ((16, 8), (8, 16))


def test_padding_without_the_canvas_is_padding_with_it(monkeypatch):
    """Shapes of every ratio from four up, wide and tall; one level of 255 is rounding."""
    monkeypatch.setattr(images, "MAX_PADDING", 0)
    draw = np.random.default_rng(5)
    colour = (122, 116, 104)
    for _ in range(20):
        longer, side = int(draw.integers(700, 3000)), int(draw.choice([56, 112]))
        shorter = int(longer ** draw.uniform(0, 0.8))
        picture = noise(longer, shorter) if draw.random() < 0.5 else noise(shorter, longer)
        small = pad_to_square(picture, colour, side)
        assert small.size == (side, side)
        whole = np.asarray(expand2square(picture, colour).resize((side, side)), dtype=int)
        assert abs(np.asarray(small) - whole).max() <= 1, picture.size


def test_usual_images_are_padded_as_published():
    picture = noise(900, 600)
    assert pad_to_square(picture, (1, 2, 3), 56).tobytes() == expand2square(picture, (1, 2, 3)).tobytes()


def test_base64():
    case = json.loads((golden_root() / "llava/mm_utils/base64.json").read_text())
    picture = load_image_from_base64(case["base64"])
    assert (list(picture.size), picture.mode) == (case["size"], case["mode"])
    assert hashlib.sha256(picture.tobytes()).hexdigest() == case["sha256"]


def test_base64_keeps_the_mode():
    text = base64.b64encode(encoded(noise(3, 3, "RGBA"), "PNG")).decode()
    assert load_image_from_base64(text).mode == "RGBA"
