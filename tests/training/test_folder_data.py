"""Pictures of one's own: how they are scaled and cut, where their captions come from, and what is wrong with a folder."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsd.errors import ImageError, ParameterError
from fastsd.training.data import Caption
from fastsd.training.folder_data import PictureFolder


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Red on the left, green in the middle, blue on the right; and three more kinds of picture."""
    wide = np.zeros((40, 120, 3))
    wide[:, :40, 0] = wide[:, 40:80, 1] = wide[:, 80:, 2] = 255
    save(tmp_path / "b-wide.png", wide)
    save(tmp_path / "a-gray.JPG", np.full((50, 40), 128), quality=100)
    see_through = np.zeros((40, 40, 4))
    see_through[:20] = (10, 20, 30, 255)
    save(tmp_path / "c-clear.webp", see_through, lossless=True)
    for name in ("b-wide", "a-gray", "c-clear"):
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n\n  {name} two  \n")
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def test_pictures_come_in_the_order_of_their_names(folder: Path) -> None:
    data = PictureFolder(folder, 40)
    assert [file.name for file in data.files] == ["a-gray.JPG", "b-wide.png", "c-clear.webp"]
    assert len(data) == 3


def test_the_middle_is_cut_out_square(folder: Path) -> None:
    picture = PictureFolder(folder, 40).image(1)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, np.broadcast_to(np.uint8([0, 255, 0]), (40, 40, 3)))


@pytest.mark.parametrize("resolution", [16, 64])
def test_the_short_side_is_scaled_to_the_resolution(resolution: int, folder: Path) -> None:
    """The middle stays green but for a blurred pixel or two at its edges, enlarged or made smaller."""
    picture = PictureFolder(folder, resolution).image(1).astype(int)
    assert picture.shape == (resolution, resolution, 3)
    assert abs(picture[:, 5:-5] - [0, 255, 0]).max() <= 4


def test_gray_and_transparent_pictures_become_colours_on_white(folder: Path) -> None:
    data = PictureFolder(folder, 40)
    assert abs(data.image(0).astype(int) - 128).max() <= 1
    clear = data.image(2)
    assert np.array_equal(clear[5, 5], [10, 20, 30])
    assert np.array_equal(clear[35, 5], [255, 255, 255])


def test_cameras_that_were_turned(tmp_path: Path) -> None:
    """EXIF orientation 6: the first row is the right-hand side."""
    picture = np.zeros((32, 32, 3))
    picture[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", picture, exif=exif)
    (tmp_path / "a.txt").write_text("a")
    found = PictureFolder(tmp_path, 32).image(0)
    assert found[:, 20:].min() == 255
    assert found[:, :12].max() == 0


def test_each_line_is_a_caption_and_all_are_chosen(folder: Path) -> None:
    data, rng = PictureFolder(folder, 40), np.random.default_rng(0)
    assert {data.caption(1, rng).text for _ in range(30)} == {"b-wide one", "b-wide two"}
    assert data.caption(0, rng).stated == {}
    assert data.caption(2, np.random.default_rng(5)) == data.caption(2, np.random.default_rng(5))


def write_metadata(folder: Path, *lines: object) -> None:
    text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")


def test_metadata_comes_before_text_files(folder: Path) -> None:
    """Several lines of one file are several captions; U+2028 is a letter here, and blank lines are none."""
    write_metadata(
        folder,
        {"file_name": "b-wide.png", "text": "one,\u2028still one", "width": 3},
        "",
        {"file_name": "b-wide.png", "text": "ein grünes Bild"},
        {"file_name": "absent.png", "text": "nothing"},
    )
    data = PictureFolder(folder, 40)
    assert data.captions[1] == ["one,\u2028still one", "ein grünes Bild"]
    assert data.captions[0] == ["a-gray one", "a-gray two"]
    assert isinstance(data.caption(1, np.random.default_rng(0)), Caption)


@pytest.mark.parametrize("line", ["{", '{"file_name": "a.png"}', '"text"', "[]", "3"])
def test_metadata_that_is_wrong_names_its_line(line: str, folder: Path) -> None:
    write_metadata(folder, {"file_name": "b-wide.png", "text": "x"}, line)
    with pytest.raises(ParameterError, match=r'^metadata\.jsonl, line 2: must be \{"file_name": …, "text": …\}$'):
        PictureFolder(folder, 40)


def test_files_that_windows_begins_with_a_mark(folder: Path) -> None:
    (folder / "b-wide.txt").write_text("wide", encoding="utf-8-sig")
    line = json.dumps({"file_name": "a-gray.JPG", "text": "gray"})
    (folder / "metadata.jsonl").write_text(line + "\n", encoding="utf-8-sig")
    assert PictureFolder(folder, 40).captions[:2] == [["gray"], ["wide"]]


def test_the_fingerprint_is_of_names_bytes_and_captions(folder: Path) -> None:
    """By its formula: a run goes on only with the fingerprint that it was begun with."""
    pictures = PictureFolder(folder, 40)
    text = json.dumps(pictures.captions).encode()
    for file in pictures.files:
        text += file.name.encode() + hashlib.sha256(file.read_bytes()).digest()
    assert pictures.fingerprint() == hashlib.sha256(text).hexdigest()[:16]


def test_a_picture_that_cannot_be_read_is_named(folder: Path) -> None:
    pictures = PictureFolder(folder, 40)
    pictures.files[0].unlink()
    with pytest.raises(ImageError, match=rf"^{pictures.files[0].name}: cannot be read: No such file or directory$"):
        pictures.fingerprint()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        with pytest.raises(ParameterError, match=rf"^data\.path: '.*{name}' is no folder$"):
            PictureFolder(tmp_path / name, 40)


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ParameterError, match=r"^data\.path: '.*' holds no pictures \(\.png, \.jpg"):
        PictureFolder(tmp_path, 40)


@pytest.mark.parametrize("text", [None, "", " \n\n"])
def test_a_picture_without_a_caption_is_named(text: str | None, folder: Path) -> None:
    (folder / "b-wide.txt").unlink()
    if text is not None:
        (folder / "b-wide.txt").write_text(text)
    with pytest.raises(
        ParameterError, match=r"1 pictures have no caption, e\.g\. 'b-wide\.png'; write b-wide\.txt beside"
    ):
        PictureFolder(folder, 40)


@pytest.mark.parametrize("name", ["b-wide.txt", "metadata.jsonl"])
def test_text_that_is_not_utf_8_names_its_file(name: str, folder: Path) -> None:
    (folder / name).write_bytes("ein grünes Bild".encode("latin-1"))
    with pytest.raises(ParameterError, match=rf"^data\.path: {name} is not UTF-8 text"):
        PictureFolder(folder, 40)


@pytest.mark.parametrize("content", [b"no picture", b""])
def test_a_damaged_picture_is_named(content: bytes, folder: Path) -> None:
    (folder / "b-wide.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"^b-wide\.png: cannot be read as a picture"):
        PictureFolder(folder, 40).image(1)


def test_a_picture_that_ends_early_is_named(folder: Path) -> None:
    rng = np.random.default_rng(0)
    save(folder / "b-wide.png", rng.integers(0, 256, (64, 64, 3)))
    whole = (folder / "b-wide.png").read_bytes()
    (folder / "b-wide.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"^b-wide\.png: cannot be read as a picture"):
        PictureFolder(folder, 40).image(1)
