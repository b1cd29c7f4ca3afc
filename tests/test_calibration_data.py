"""Calibration data: the same sets at every reading, one in memory, and one clear line for what cannot be used."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rewrite.calibration_data import CalibrationSets, calibration_sets
from rewrite.calibration_data.arrays import BLOCK
from rewrite.calibration_data.files import find_files
from rewrite.calibration_data.text import Pieces
from rewrite.capture.preprocessors import Tokenizer, load_image_processor, load_tokenizer
from rewrite.errors import InputsError, RequestError, RewriteError, UnsafeSourceError
from rewrite.ir.program import Program
from rewrite.models.byte_tokenizer import FILES, printable_bytes, save_byte_tokenizer

CHECKPOINTS = Path(__file__).parent.parent / "models" / "checkpoints"
LANGUAGE_MODELS = ("bytegpt", "bytellama")


def network(inputs: str, maximum: int | None = None, **described: tuple[str, int | None, int | None]) -> ir.Model:
    """A network that takes `inputs`, in ONNX text, of the kinds and bounds given by name."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]> g ({inputs}) => () {{ }}')
    for value in model.graph.inputs:
        kind, low, high = described.get(value.name or "", ("number", None, None))
        value.metadata_props["rewrite.kind"] = kind
        for name, bound in (("low", low), ("high", high)):
            if bound is not None:
                value.metadata_props[f"rewrite.{name}"] = str(bound)
    if maximum is not None:
        model.metadata_props["rewrite.maximum.sequence"] = str(maximum)
    return model


def language_model(vocabulary: int = 256, maximum: int | None = 256) -> ir.Model:
    return network(
        "int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask",
        maximum,
        input_ids=("token_ids", 0, vocabulary),
        attention_mask=("attention_mask", 0, 2),
    )


def image_model(shape: str = "batch,1,8,8", dtype: str = "float") -> ir.Model:
    return network(f"{dtype}[{shape}] pixel_values", pixel_values=("image", None, None))


def vectors() -> ir.Model:
    return network("float[batch,4] x, int64[batch] y", y=("number", 0, 10))


def same(one: Iterable[dict[str, np.ndarray]], other: Iterable[dict[str, np.ndarray]]) -> bool:
    a, b = list(one), list(other)
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x) for x, y in zip(a, b)
    )


def refused(*arguments: Any, kind: type[RewriteError] = InputsError, match: str, **options: Any) -> str:
    """The one line that calibration_sets refuses with, and that it refuses."""
    with pytest.raises(kind, match=match) as caught:
        calibration_sets(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


def numbered(index: int, batch: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.full((batch, 4), index, np.float32), "y": np.full(batch, index % 10)}


def numbers(sets: Iterable[dict[str, np.ndarray]]) -> list[int]:
    return [int(one["x"].flat[0]) for one in sets]


@pytest.fixture
def byte_source(tmp_path: Path) -> Path:
    """A folder with the byte tokenizer and nothing else."""
    folder = tmp_path / "source"
    folder.mkdir()
    save_byte_tokenizer(folder)
    return folder


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Entries:
    """os.scandir with its entries backwards, as another file system would give them."""

    def __init__(self, path: Path) -> None:
        with SCANDIR(path) as entries:
            self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

    def __enter__(self) -> Iterator[os.DirEntry[str]]:
        return iter(self.entries)

    def __exit__(self, *_: object) -> None:
        pass


SCANDIR = os.scandir


def test_order_is_that_of_the_names_whatever_the_file_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.py", "c", "B.txt", ".hidden", ".git/config", "__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    expected = ["B.txt", "a/b/c.py", "a/z.md", "b.txt", "c"]
    for _ in range(2):
        files = find_files(tmp_path)
        assert [path.relative_to(tmp_path).as_posix() for path in files] == expected
        assert (files.kind, files.count, files.size) == ("text", 5, 5)
        monkeypatch.setattr(os, "scandir", Entries)
    assert [entry.name for entry in Entries(tmp_path).entries] != sorted(os.listdir(tmp_path))


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        ([], "holds no files"),
        ([".hidden"], "holds no files"),
        (["a.npz", "b.txt"], r"mixes a.npz \(npz\) and b.txt \(text\)"),
        (["a.png", "labels.csv"], r"mixes a.png \(images\) and labels.csv \(text\)"),
        (["a/1.jpg", "b/2.npz"], r"mixes a/1.jpg \(images\) and b/2.npz \(npz\)"),
        (["a.pkl"], "a.pkl: may be a pickle"),
        (["a.txt", "model.PT"], "model.PT: may be a pickle"),
        (["a.npy"], "files of the kind .npy are not read"),
    ],
)
def test_folders_that_are_no_data(files: list[str], pattern: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert str(tmp_path) in refused(tmp_path, language_model(), match=pattern)


def test_what_is_missing_or_neither_file_nor_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", language_model(), match="none: does not exist")
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would wait for ever
    refused(tmp_path / "pipe.txt", language_model(), match=r"pipe.txt: is neither a file nor a folder")
    refused(tmp_path, language_model(), match=r"pipe.txt: is neither a file nor a folder")
    folder = tmp_path / "sockets"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "a.txt"))
        refused(folder, language_model(), match=r"a.txt: is neither a file nor a folder")


def test_folders_that_are_nested_without_end(tmp_path: Path) -> None:
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=place)
        inner = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    try:
        refused(tmp_path, language_model(), match="nested too deeply")
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # shutil.rmtree would recurse as well


def test_links_stay_inside_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "secret.txt"
    (folder / "part").mkdir(parents=True)
    outside.write_text("secret")
    (folder / "part" / "a.txt").write_text("a")
    (folder / "b.txt").symlink_to("part/a.txt")
    assert [path.name for path in find_files(folder)] == ["b.txt", "a.txt"]
    (tmp_path / "link").symlink_to(folder)
    assert find_files(tmp_path / "link").count == 2  # what the caller gives may be a link
    for target, pattern in (
        ("../secret.txt", "leads out of the folder"),
        (str(outside), "leads out of the folder"),
        ("..", "leads out of the folder"),
        ("part", "link to a folder"),
        (".", "link to a folder"),
    ):
        (folder / "c.txt").symlink_to(target)
        refused(folder, language_model(), kind=UnsafeSourceError, match=pattern)
        (folder / "c.txt").unlink()
    (folder / "c.txt").symlink_to("nothing")
    refused(folder, language_model(), match=r"c.txt: is a link that leads nowhere")


@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": -3}, {"length": 0}])
def test_numbers_that_are_not_positive(options: dict[str, int], tmp_path: Path) -> None:
    refused(tmp_path, language_model(), kind=RequestError, match="at least 1", **options)


# ── Arrays ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_sets(path: Path, indices: Iterable[int], save: Callable[..., None] = np.savez) -> None:
    """A file with an axis of sets in front."""
    each = [numbered(index) for index in indices]
    save(path, **{name: np.stack([one[name] for one in each]) for name in ("x", "y")})


def test_one_file_is_one_set_or_many(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", **numbered(7))
    sets = calibration_sets(tmp_path / "one.npz", vectors())
    assert len(sets) == 1
    assert same(sets, [numbered(7)])
    for save in (np.savez, np.savez_compressed):
        save_sets(tmp_path / "many.npz", range(5), save)
        sets = calibration_sets(tmp_path / "many.npz", vectors())
        assert len(sets) == 5
        assert same(sets, map(numbered, range(5)))
        assert same(sets, sets)
        assert all(array.flags.writeable for one in sets for array in one.values())


def test_a_folder_of_files_is_sampled_evenly_by_sets(tmp_path: Path) -> None:
    save_sets(tmp_path / "a.npz", range(10))
    np.savez(tmp_path / "b.npz", **numbered(10))
    save_sets(tmp_path / "c.npz", range(11, 20), np.savez_compressed)
    assert numbers(calibration_sets(tmp_path, vectors())) == list(range(20))
    assert numbers(calibration_sets(tmp_path, vectors(), samples=5)) == [0, 4, 8, 12, 16]
    assert numbers(calibration_sets(tmp_path, vectors(), samples=1)) == [0]
    assert numbers(calibration_sets(tmp_path, vectors(), samples=19)) == list(range(19))
    assert numbers(calibration_sets(tmp_path, vectors(), samples=2)) == [0, 10]


def test_arrays_stored_by_columns(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(x), y=np.zeros(3, int))
    (one,) = calibration_sets(tmp_path / "a.npz", vectors())
    assert np.array_equal(one["x"], x)
    stacked = np.zeros((5, 3, 4), np.float32)
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(stacked), y=np.zeros((5, 3), int))
    refused(tmp_path / "a.npz", vectors(), match="stored by columns.*ascontiguousarray")


def test_progress_tells_how_many_of_how_many(tmp_path: Path) -> None:
    save_sets(tmp_path / "a.npz", range(3))
    told: list[str] = []
    sets = calibration_sets(tmp_path / "a.npz", vectors(), samples=2, progress=told.append)
    assert told == ["calibration data: 1/2", "calibration data: 2/2"]
    assert len(list(sets)) == 2
    assert len(told) == 2  # who reads them knows how many there are, and says what for


STACKED = {"x": np.zeros((3, 2, 4), np.float32), "y": np.zeros((3, 2), int)}
REFUSED_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"y": None}, "lacks y"),
    "extra": ({"z": np.zeros(3)}, "unknown z"),
    "type": ({"x": np.zeros((3, 2, 4))}, "set 1: x: has type float64.*float32"),
    "static size": ({"x": np.zeros((3, 2, 5), np.float32)}, "5 on axis 1"),
    "axis of sets in one only": ({"y": np.zeros(2, int)}, "x has an axis of sets in front and y has none"),
    "two axes more": ({"x": np.zeros((2, 3, 2, 4), np.float32), "y": np.zeros(2, int)}, "has 4 axes"),
    "numbers of sets": ({"y": np.zeros((4, 2), int)}, "y holds 4 sets, x 3"),
    "no sets": ({"x": np.zeros((0, 2, 4), np.float32), "y": np.zeros((0, 2), int)}, "x holds 0 sets"),
    "empty sets": ({"x": np.zeros((3, 0, 4), np.float32), "y": np.zeros((3, 0), int)}, "empty on axis 0"),
    "sizes": ({"y": np.zeros((3, 5), int)}, "batch 5, x has 2"),
    "bounds": ({"y": np.array([[0, 0], [0, 9], [0, 10]])}, r"set 3: y: has values from 0 to 10.*\[0, 10\)"),
    "not finite": ({"x": np.full((3, 2, 4), np.nan, np.float32)}, "not finite"),
    "pickled": ({"x": np.array([[[object()]]])}, "without unpickling.*Python objects"),
}


@pytest.mark.parametrize("case", REFUSED_ARRAYS)
def test_arrays_that_do_not_fit(case: str, tmp_path: Path) -> None:
    change, pattern = REFUSED_ARRAYS[case]
    np.savez(tmp_path / "a.npz", **{name: array for name, array in {**STACKED, **change}.items() if array is not None})
    assert "a.npz" in refused(tmp_path, vectors(), match=pattern)


def test_the_arrays_that_others_are_changed_from_are_accepted(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **STACKED)
    assert len(calibration_sets(tmp_path, vectors())) == 3


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut", b"\x80\x04K\x01.", b"PK\x05\x06" + bytes(18)])
def test_bytes_that_are_no_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    refused(tmp_path / "a.npz", vectors(), match=r"a.npz: (cannot be read|lacks)")


def test_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def header(shape: tuple[int, ...]) -> bytes:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text

    def write(x: bytes, *, twice: bool = False) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", x)
            if twice:
                archive.writestr("x", x)

    model = network("float[batch,4] x")
    write(header((3, 2, 4)) + bytes(96))
    assert len(calibration_sets(path, model)) == 3
    for shape in ((10**6, 10**6, 4), (3, 10**13, 4), (4, 2, 4), (3, 2, -4)):
        write(header(shape) + bytes(96))
        refused(path, model, match=r"a.npz: cannot be read")
    write(header((3, 2, 4)) + bytes(96), twice=True)
    refused(path, model, match="two arrays have one name")
    write(b"no array")
    refused(path, model, match=r"a.npz: cannot be read")
    write(header((3, 2, 4)) + bytes(96))
    content = path.read_bytes()
    for cut in range(1, len(content), 37):
        path.write_bytes(content[:cut])
        refused(path, model, match=r"a.npz: cannot be read")
    # Sizes in the archive's own tables that its data do not have.
    write(header((3, 10**6, 4)) + bytes(96))
    assert path.read_bytes().count((128 + 96).to_bytes(4, "little")) == 4
    path.write_bytes(path.read_bytes().replace((128 + 96).to_bytes(4, "little"), (1 << 30).to_bytes(4, "little")))
    refused(path, model, match=r"a.npz: cannot be read")


def test_files_that_change_between_readings(tmp_path: Path) -> None:
    save_sets(tmp_path / "a.npz", range(3))
    sets = calibration_sets(tmp_path, vectors())
    save_sets(tmp_path / "a.npz", range(2))
    with pytest.raises(InputsError, match="there were 3 sets of inputs and now there are 2"):
        list(sets)
    (tmp_path / "a.npz").unlink()
    with pytest.raises(InputsError, match=r"there were 3 sets of inputs and now there are 0"):
        list(sets)


# ── Text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def byte_tokenizer(request: pytest.FixtureRequest) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    folder = CHECKPOINTS / request.param
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_byte_tokenizers_are_shipped_as_they_are_written(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    for name in LANGUAGE_MODELS:
        for file in FILES:
            written, shipped = (json.loads((folder / file).read_text()) for folder in (tmp_path, CHECKPOINTS / name))
            assert written == shipped


def test_every_byte_has_its_own_id(byte_tokenizer: tuple[Tokenizer, Any]) -> None:
    mine, theirs = byte_tokenizer
    assert (mine.prefix, mine.suffix) == ((), ())
    assert len(theirs) == 256
    assert theirs.all_special_tokens == []
    table = {byte: character for character, byte in printable_bytes().items()}
    assert theirs.convert_ids_to_tokens(list(range(256))) == [table[byte] for byte in range(256)]
    assert mine.encode("".join(map(chr, range(128)))) == list(range(128))
    assert mine.encode("<s></s><|endoftext|>\ufeff\r\n \u2028") == list(
        "<s></s><|endoftext|>\ufeff\r\n \u2028".encode()
    )


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_a_text_is_its_bytes_and_back(byte_tokenizer: tuple[Tokenizer, Any], text: str) -> None:
    mine, theirs = byte_tokenizer
    assert mine.encode(text) == list(text.encode())
    assert theirs.decode(list(text.encode())) == text


def test_a_short_text_gives_all_of_its_rows(tmp_path: Path, byte_source: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "b.txt").write_text("zwei\ndrei " * 30, encoding="utf-8")
    (folder / "a.md").write_text("\ufeffeins é 日本\r\n" * 9, encoding="utf-8")
    (folder / "empty.py").write_text("")
    content = b"".join((folder / name).read_bytes().removeprefix(b"\xef\xbb\xbf") for name in ("a.md", "b.txt"))
    sets = calibration_sets(folder, language_model(), byte_source, length=50)
    assert len(sets) == len(content) // 50
    rows = [one["input_ids"] for one in sets]
    assert all(row.shape == (1, 50) and row.dtype == np.int64 for row in rows)
    assert np.concatenate(rows, 1).astype(np.uint8).tobytes() == content[: 50 * len(rows)]
    assert all((one["attention_mask"] == 1).all() for one in sets)
    assert same(sets, calibration_sets(folder, language_model(), byte_source, length=50))


def test_a_long_text_is_sampled_over_all_of_it_without_overlap(tmp_path: Path, byte_source: Path) -> None:
    text = "".join(f"line {number} é日\n" for number in range(20_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    content, samples = text.encode(), 25
    sets = calibration_sets(tmp_path / "a.txt", language_model(), byte_source, samples=samples)
    assert len(sets) == samples
    places = [content.index(one["input_ids"].astype(np.uint8).tobytes()) for one in sets]
    for index, place in enumerate(places):
        begin = index * len(content) // samples
        assert begin <= place < begin + 40  # at the next line
        assert content[:place].endswith(b"\n") or place == 0
    assert min(b - a for a, b in itertools.pairwise(places)) >= 128


def test_rows_are_spread_over_the_files_of_a_folder(tmp_path: Path, byte_source: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.txt").write_text(f"{index}" * 5000)
    sets = calibration_sets(folder, language_model(), byte_source, samples=8)
    assert [set(one["input_ids"].flat) for one in sets] == [{ord(str(index))} for index in range(8)]


def pieces(content: list[bytes], size: int, folder: Path) -> Pieces:
    for index, each in enumerate(content):
        (folder / f"{index}").write_bytes(each)
    return Pieces(iter([(folder / f"{index}", len(each)) for index, each in enumerate(content)]), size)


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(alphabet="ab \né日🎉\ufeff", max_size=40), max_size=4),
    size=st.integers(4, 30),  # a jump may lead into a character, whose rest the first block has to hold
    data=st.data(),
)
def test_pieces_are_the_text_and_jumps_go_forward(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    with pieces([text.encode() for text in texts], size, folder) as reader:
        read = []
        while (piece := reader.read()) is not None:
            assert piece[1]
            read.append(piece[1])
    assert "".join(read) == "".join(text.removeprefix("\ufeff") for text in texts)
    total = sum(len(text.encode()) for text in texts)
    with pieces([text.encode() for text in texts], size, folder) as reader:
        while reader.position < total:
            reader.skip_to(data.draw(st.integers(reader.position, total)))
            before = reader.position
            piece = reader.read()
            if piece is None:
                break
            assert reader.position > before or reader.position == total
            assert piece[1] in texts[int(piece[0].name)]


def test_a_text_of_ten_gigabytes_is_not_read_whole(tmp_path: Path, byte_source: Path) -> None:
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.write(b"some text at the start\n" * 1000)
        file.truncate(10 << 30)  # the rest are zeros without a place on the disk
    begin = time.perf_counter()
    assert len(calibration_sets(path, language_model(), byte_source)) == 128
    assert time.perf_counter() - begin < 60  # to decode it all takes minutes


def test_text_that_is_not_utf_8_is_named_with_its_byte(tmp_path: Path, byte_source: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("good\n" * 100)
    (folder / "b.txt").write_bytes(b"good " * 100 + b"\xff\xfe" + b"good" * 100)
    message = refused(folder, language_model(), byte_source, match="is not UTF-8 text at byte 500")
    assert "b.txt" in message
    (folder / "b.txt").write_bytes(b"x" * 1000 + "é".encode()[:1])  # cut inside of a character
    refused(folder, language_model(), byte_source, match=r"b.txt: is not UTF-8 text at byte 1000")
    (folder / "b.txt").write_bytes("é".encode("utf-16"))
    refused(folder, language_model(), byte_source, match=r"b.txt: is not UTF-8 text at byte 0")


def test_too_little_text(tmp_path: Path, byte_source: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    (one,) = calibration_sets(tmp_path / "a.txt", language_model(), byte_source)
    assert bytes(one["input_ids"].astype(np.uint8)) == b"short"
    fixed = network("int64[1,16] input_ids", input_ids=("token_ids", 0, 256))
    refused(tmp_path / "a.txt", fixed, byte_source, match="fewer than the 16 tokens")
    (tmp_path / "a.txt").write_text("")
    refused(tmp_path / "a.txt", language_model(), byte_source, match="fewer than the 128 tokens")


def test_the_length_is_what_the_network_takes(tmp_path: Path, byte_source: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text " * 1000)

    def shapes(model: ir.Model, **options: int) -> list[tuple[int, ...]]:
        return [one["input_ids"].shape for one in calibration_sets(path, model, byte_source, samples=2, **options)]

    assert shapes(language_model()) == [(1, 128)] * 2
    assert shapes(language_model(maximum=None), length=999) == [(1, 999)] * 2
    assert shapes(language_model(maximum=20)) == [(1, 20)] * 2
    assert shapes(language_model(maximum=20), length=20) == [(1, 20)] * 2
    assert shapes(network("int64[3,16] input_ids", input_ids=("token_ids", 0, 256))) == [(3, 16)] * 2
    assert shapes(network("int64[n] input_ids", input_ids=("token_ids", 0, 256)), length=9) == [(9,)] * 2
    assert shapes(network("int32[n,s] input_ids", input_ids=("token_ids", 0, 256))) == [(1, 128)] * 2
    assert shapes(network("int64[n,s] input_ids"), length=7) == [(1, 7)] * 2  # a name and no kind
    refused(path, language_model(maximum=20), byte_source, length=21, match="at most 20 tokens, not 21")
    fixed = network("int64[1,16] input_ids", input_ids=("token_ids", 0, 256))
    refused(path, fixed, byte_source, length=8, match="rows of 16 tokens, not 8")


def test_masks_positions_and_types_are_made(tmp_path: Path, byte_source: Path) -> None:
    model = network(
        "int32[batch,sequence] input_ids, float[batch,1,sequence,sequence] mask, bool[batch,sequence] keep, "
        "int64[1,sequence] position_ids, int64[?,?] token_type_ids",
        input_ids=("token_ids", 0, 256),
        mask=("attention_mask", None, None),
        keep=("attention_mask", None, None),
        position_ids=("position_ids", 2, 100),
        token_type_ids=("token_type_ids", 0, 2),
    )
    (tmp_path / "a.txt").write_text("text " * 1000)
    (one,) = calibration_sets(tmp_path / "a.txt", model, byte_source, samples=1, length=6)
    assert one["input_ids"].dtype == np.int32
    assert one["mask"].shape == (1, 1, 6, 6)
    assert not one["mask"].any()
    assert one["keep"].dtype == bool
    assert one["keep"].all()
    assert one["position_ids"].tolist() == [[2, 3, 4, 5, 6, 7]]
    assert one["token_type_ids"].tolist() == [[0] * 6]


def test_a_decoder_is_given_the_same_tokens_after_its_start(tmp_path: Path, byte_source: Path) -> None:
    model = network(
        "int64[batch,decoder_sequence] decoder_input_ids, int64[batch,sequence] input_ids, "
        "int64[batch,decoder_sequence] decoder_attention_mask",
        input_ids=("token_ids", 0, 256),
        decoder_input_ids=("token_ids", 0, 256),
        decoder_attention_mask=("attention_mask", 0, 2),
    )
    (tmp_path / "a.txt").write_text("abcdefghij" * 10)
    (byte_source / "config.json").write_text('{"decoder_start_token_id": 0}')
    first, *_ = calibration_sets(tmp_path / "a.txt", model, byte_source, length=5)
    assert bytes(first["input_ids"].astype(np.uint8)) == b"abcde"
    assert bytes(first["decoder_input_ids"].astype(np.uint8)) == b"\0abcd"
    assert first["decoder_attention_mask"].tolist() == [[1] * 5]
    (byte_source / "config.json").write_text("{}")
    first, *_ = calibration_sets(tmp_path / "a.txt", model, byte_source, length=5)
    assert bytes(first["decoder_input_ids"].astype(np.uint8)) == b"abcde"


def word_tokenizer(folder: Path, *, truncation: int | None = None) -> Path:
    """A tokenizer of words with [CLS] in front and [SEP] behind: hello 3, world 4, a 5, unknown 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "hello": 3, "world": 4, "a": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[UNK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    if truncation is not None:
        tokenizer.enable_truncation(truncation)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.mark.parametrize("truncation", [None, 5])
def test_every_row_has_the_special_tokens_around_it(truncation: int | None, tmp_path: Path) -> None:
    source = word_tokenizer(tmp_path / "words", truncation=truncation)
    (tmp_path / "a.txt").write_text("hello world other\n" * 4)
    sets = calibration_sets(tmp_path / "a.txt", language_model(6), source, length=6)
    assert [one["input_ids"].tolist() for one in sets] == [
        [[0, 3, 4, 2, 3, 1]],
        [[0, 4, 2, 3, 4, 1]],
        [[0, 2, 3, 4, 2, 1]],
    ]
    refused(tmp_path / "a.txt", language_model(6), source, length=2, match="rows of 2 tokens have no place")


def test_ids_that_the_network_does_not_have(tmp_path: Path) -> None:
    source = word_tokenizer(tmp_path / "words")
    (tmp_path / "a.txt").write_text("hello world")
    refused(tmp_path / "a.txt", language_model(4), source, match=r"a.txt: .*the id 4.*ids \[0, 4\)")
    (tmp_path / "a.txt").write_text("hello hello")
    refused(tmp_path / "a.txt", language_model(1), source, match=r"a.txt: .*the id 3")


def test_words_that_a_tokenizer_cannot_express(tmp_path: Path) -> None:
    source = word_tokenizer(tmp_path / "words")
    written = json.loads((source / "tokenizer.json").read_text())
    written["model"]["unk_token"] = "[GONE]"
    (source / "tokenizer.json").write_text(json.dumps(written))
    (tmp_path / "a.txt").write_text("hello world")
    assert len(calibration_sets(tmp_path / "a.txt", language_model(), source)) == 1
    (tmp_path / "a.txt").write_text("hello other")
    refused(tmp_path / "a.txt", language_model(), source, match="words: the tokenizer cannot take the text")


def test_sources_without_a_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("text")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((CHECKPOINTS / "bytegpt" / "config.json").read_text())
    refused(text, language_model(), source, match=r"source: there is no tokenizer in it.*\.npz")
    (source / "model.onnx").write_bytes(b"")
    refused(text, language_model(), source / "model.onnx", match=r"source: there is no tokenizer in it")
    for factory in ("package.module:function", None, object()):
        refused(text, language_model(), factory, match=r"no file or folder that a tokenizer could lie beside.*\.npz")
    (source / "tokenizer_config.json").write_text("{}")  # from which transformers makes an empty tokenizer
    refused(text, language_model(), source, match="the tokenizer has no vocabulary")
    (source / "tokenizer.json").write_text("{broken")
    refused(text, language_model(), source, match="source: the tokenizer cannot be loaded")
    save_byte_tokenizer(source)
    assert len(calibration_sets(text, language_model(), source / "model.onnx")) == 1  # beside the file
    program = Program(language_model(), language_model(), str(source))
    assert len(calibration_sets(text, program)) == 1


def test_no_code_beside_the_source_is_run(tmp_path: Path) -> None:
    source, marker = tmp_path / "source", tmp_path / "marker"
    source.mkdir()
    (tmp_path / "a.txt").write_text("text")
    (source / "config.json").write_text('{"model_type": "unheard-of"}')
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    written = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(written))
    (source / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "evil.Evil"}}))
    refused(tmp_path / "a.txt", language_model(), source, kind=UnsafeSourceError, match="not executed")
    with pytest.raises(UnsafeSourceError, match="not executed"):
        load_image_processor(source)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("inputs", "described", "pattern"),
    [
        ("float[n,8] x", {}, r"takes x, no text.*\.npz"),
        ("int64[n,s] input_ids, float[n,3,8,8] pixel_values", {}, "takes pixel_values beside the text"),
        ("int64[n,s] input_ids, float[n,2] past", {}, "takes past beside the text"),
        ("int64[n,s] input_ids, int64[n,t] mask", {"mask": ("attention_mask", 0, 2)}, "the axis t"),
    ],
)
def test_networks_that_text_is_no_input_of(
    inputs: str, described: dict[str, Any], pattern: str, tmp_path: Path, byte_source: Path
) -> None:
    (tmp_path / "a.txt").write_text("text")
    model = network(inputs, **{"input_ids": ("token_ids", 0, 256), **described})
    refused(tmp_path / "a.txt", model, byte_source, match=pattern)


# ── Images ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_images_of_digits_are_what_the_networks_were_trained_on(tmp_path: Path) -> None:
    from rewrite.models.digits_data import digits

    images = digits("held-out")[0][:12]
    for index, image in enumerate(images):
        Image.fromarray((image[0] * 255).round().astype(np.uint8)).save(tmp_path / f"{index:02}.png")
    sets = calibration_sets(tmp_path, image_model(), CHECKPOINTS / "digits-vit")
    read = np.concatenate([one["pixel_values"] for one in sets])
    assert read.shape == images.shape
    assert read.dtype == np.float32
    # Half a step of 8 bits, and the rounding of numbers up to 1 to float32.
    assert np.abs(read.astype(np.float64) - images).max() <= 0.5 / 255 + np.finfo(np.float32).eps
    assert same(sets, sets)


def test_images_are_scaled_and_brought_into_the_channels(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 16), (255, 0, 51, 255))
    image.save(tmp_path / "a.png")

    def only(model: ir.Model) -> np.ndarray:
        (one,) = calibration_sets(tmp_path / "a.png", model)
        (array,) = one.values()
        return array

    colour = np.array([255, 0, 51]) / 255
    rgb = only(image_model("n,3,8,4"))
    assert rgb.shape == (1, 3, 8, 4)
    assert np.array_equal(rgb, np.broadcast_to(colour.astype(np.float32)[:, None, None], rgb.shape))
    assert np.array_equal(only(image_model("n,8,4,3")), rgb.transpose(0, 2, 3, 1))
    assert np.array_equal(only(image_model("n,8,4,3", "uint8"))[0, 0, 0], [255, 0, 51])
    assert only(image_model("n,4,8,4"))[0, :, 0, 0].tolist() == [1.0, 0.0, np.float32(51 / 255), 1.0]
    grey = only(image_model("n,1,8,4", "float16"))
    assert grey.dtype == np.float16
    assert np.array_equal(grey, np.full((1, 1, 8, 4), np.asarray(image.convert("L"))[0, 0] / 255).astype(np.float16))
    assert np.array_equal(only(network("float[n,3,8,4] data")), rgb)  # the only input with four axes


def test_sixteen_bits_are_scaled_and_rotated_images_are_turned(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 51 * 257, np.uint16)).save(tmp_path / "a.png")
    (one,) = calibration_sets(tmp_path / "a.png", image_model())
    assert (one["pixel_values"] == np.float32(51 / 255)).all()
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise: the first row becomes the last column
    Image.fromarray(pixels).save(tmp_path / "b.png", exif=exif)
    (one,) = calibration_sets(tmp_path / "b.png", image_model())
    assert np.array_equal(one["pixel_values"][0, 0] > 0.5, np.rot90(pixels, -1) > 0)


def test_folders_of_images_are_sampled_evenly_and_batched(tmp_path: Path) -> None:
    for index in range(9):
        folder = tmp_path / f"class-{index // 3}"
        folder.mkdir(exist_ok=True)
        Image.new("L", (8, 8), index).save(folder / f"{index}.bmp")

    def read(model: ir.Model, **options: int) -> list[list[int]]:
        sets = calibration_sets(tmp_path, model, **options)
        return [(one["pixel_values"][:, 0, 0, 0] * 255).round().astype(int).tolist() for one in sets]

    assert read(image_model(), samples=3) == [[0], [3], [6]]
    assert read(image_model()) == [[index] for index in range(9)]
    assert read(image_model("2,1,8,8")) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert read(image_model("2,1,8,8"), samples=2) == [[0, 2], [4, 6]]
    refused(tmp_path, image_model("10,1,8,8"), match="holds 9 images, and the network takes 10")


def processor(folder: Path, channels: int = 3, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    written = {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": [0.5] * channels,
        "image_std": [0.25] * channels,
        "size": {"height": 8, "width": 8},
        **options,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_images_go_through_the_processor_beside_the_source(channels: int, tmp_path: Path) -> None:
    source = processor(tmp_path / "source", channels)
    for mode in ("L", "RGB", "P", "RGBA"):
        Image.new(mode, (20, 30), 51 if mode in "LP" else (51,) * len(mode)).save(tmp_path / "a.png")
        grey = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))[0, 0, 0]
        (one,) = calibration_sets(tmp_path / "a.png", image_model(f"batch,{channels},h,w"), source)
        assert one["pixel_values"].shape == (1, channels, 8, 8)
        exact = (grey / 255 - 0.5) / 0.25
        # Three float32 operations on numbers of at most 4.
        assert np.abs(one["pixel_values"] - exact).max() <= 3 * 4 * np.finfo(np.float32).eps


def test_processors_that_do_not_fit(tmp_path: Path) -> None:
    source = processor(tmp_path / "source", size={"height": 9, "width": 8})
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", image_model("n,3,8,8"), source, match=r"a.png: pixel_values: has 9 on axis 2")
    message = refused(tmp_path / "a.png", image_model("n,1,9,8"), source, match="the image processor cannot take it")
    assert "a.png" in message
    both = network("float[n,3,h,w] pixel_values, int64[n,s] input_ids", pixel_values=("image", None, None))
    refused(tmp_path / "a.png", both, source, match="the network takes input_ids too")
    (source / "preprocessor_config.json").write_text("{broken")
    refused(tmp_path / "a.png", image_model("n,3,8,8"), source, match="the image processor cannot be loaded")
    (source / "preprocessor_config.json").write_text('{"feature_extractor_type": "WhisperFeatureExtractor"}')
    refused(tmp_path / "a.png", image_model("n,3,8,8"), source, match="the image processor cannot be loaded")


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (network("float[n,8,8] frames"), r"takes frames \[n, 8, 8\], not one image"),
        (network("float[n,1,5,8,8] clip"), r"takes clip \[n, 1, 5, 8, 8\], not one image"),
        (network("float[n,3,8,8] a, float[n,3,8,8] b"), "not one image"),
        (image_model("n,2,8,8"), "has 2 channels"),
        (image_model("n,c,8,8"), "has c channels"),
        (image_model("n,3,h,w"), "no preprocessor_config.json lies beside the source"),
        (network("float[n,3,8,8] image, int64[n] label"), "takes label beside the image"),
    ],
)
def test_networks_that_images_are_no_input_of(model: ir.Model, pattern: str, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert ".npz" in refused(tmp_path / "a.png", model, match=pattern)


def test_images_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(path)
    content = path.read_bytes()
    assert len(calibration_sets(path, image_model())) == 1
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8"  # Pillow would start Ghostscript
    for bad in (b"", b"hello", content[:100], content[: len(content) // 2], postscript):
        path.write_bytes(bad)
        refused(path, image_model(), match=r"a.png: cannot be read as an image")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "b.tif")
    refused(tmp_path / "b.tif", image_model(), match=r"b.tif: cannot be read as an image: its samples have 32 bits")
    path.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)  # where Pillow only warns
    refused(path, image_model(), match=r"a.png: cannot be read as an image: .*bomb")


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(tmp_path / "a.png", image_model(), match=r"Pillow is needed.*pip install rewrite\[images\]")


def test_without_transformers(tmp_path: Path, byte_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(tmp_path / "a.txt", language_model(), byte_source, match=r"transformers is needed.*rewrite\[hf\]")


# ── The shipped networks, and the command line ──────────────────────────────────────────────────────────────────────


def test_data_of_the_shipped_networks_is_written_and_read(tmp_path: Path) -> None:
    from rewrite.models.byte_data import is_held_out
    from rewrite.models.calibration import main_input, write_calibration
    from rewrite.models.digits_data import INPUTS, digits

    images = digits("train")[0][:3]
    for name, shape in {
        "digits-vit": "batch,1,8,8",
        "digits-conv1d": "batch,8,8",
        "digits-conv3d": "n,1,5,8,8",
    }.items():
        given, folder = main_input(name), tmp_path / name
        write_calibration(folder, given, count=3)
        model = network(
            f"float[{shape}] {given}", **{given: ("image" if name == "digits-vit" else "number", None, None)}
        )
        read = np.concatenate([one[given] for one in calibration_sets(folder, model)])
        assert np.abs(read.astype(np.float64) - INPUTS[given](images)).max() <= 0.5 / 255 + np.finfo(np.float32).eps
    with pytest.raises(FileExistsError, match="not empty"):
        write_calibration(tmp_path / "digits-vit", "pixel_values", 3)
    write_calibration(tmp_path / "text", main_input("bytellama"), count=5)
    files = [path.relative_to(tmp_path / "text").as_posix() for path in find_files(tmp_path / "text")]
    assert len(files) == 5
    assert not any(map(is_held_out, files))
    assert len(calibration_sets(tmp_path / "text", language_model(), CHECKPOINTS / "bytellama", samples=9)) == 9


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    from rewrite import cli

    monkeypatch.setattr(sys, "argv", ["rewrite", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_convert_calibrates_on_what_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_cli import small_model

    source, data = small_model(tmp_path / "small.onnx"), tmp_path / "a.npz"
    rng = np.random.default_rng(0)
    np.savez(data, ids=rng.integers(0, 11, (6, 2, 5)))
    options = ("--recipe", "smooth", "--no-check", "--json", "--force")
    out = tmp_path / "out"
    assert run(monkeypatch, "convert", source, "-o", out, *options, "--calibrate", data) == 0
    # The same numbers as of sets in memory, and not those of weights alone.
    from rewrite.pipeline import convert

    sets = list(calibration_sets(data, ir.load(source)))
    assert len(sets) == 6
    told: list[str] = []
    for calibration, samples, equal in ((sets, 128, True), (data, 128, True), (data, 2, False), (None, 128, False)):
        other = tmp_path / "other"
        convert(
            source,
            other,
            recipe="smooth",
            calibration=calibration,
            calibration_samples=samples,
            check=False,
            force=True,
            progress=told.append,
        )
        assert ((out / "model.onnx.data").read_bytes() == (other / "model.onnx.data").read_bytes()) == equal
    assert "calibration data: 6/128" in told
    assert "calibration data: 2/2" in told
    capsys.readouterr()
    for path, words in ((tmp_path / "none", "does not exist"), (source, "files of the kind .onnx are not read")):
        assert run(monkeypatch, "convert", source, "-o", out, *options, "--calibrate", path) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {path}: {words}")
    text = tmp_path / "a.txt"
    text.write_text("text")
    assert run(monkeypatch, "convert", source, "-o", out, *options, "--calibrate", text) == 2
    assert "there is no tokenizer in it" in capsys.readouterr().err
    assert (
        run(monkeypatch, "convert", source, "-o", out, *options, "--calibrate", data, "--calibration-samples", 0) == 2
    )
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytegpt", "bytellama", "digits-vit", "digits-resnet", "digits-conv1d"])
def test_shipped_networks_are_calibrated_on_files(name: str, tmp_path: Path) -> None:
    from rewrite.models.calibration import main_input, write_calibration
    from rewrite.pipeline import convert

    write_calibration(tmp_path / "data", main_input(name), count=20)
    told: list[str] = []
    report = convert(
        CHECKPOINTS / name,
        tmp_path / "out",
        recipe="smooth",
        calibration=tmp_path / "data",
        calibration_samples=4,
        check=False,
        progress=told.append,
    )
    assert report.verdict.startswith("EQUAL")
    assert "calibration data: 4/4" in told


# ── Memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def peak_bytes(sets: CalibrationSets) -> int:
    """The most that Python and NumPy held at once while all sets were read, each dropped for the next."""
    for one in sets:  # what is allocated once and kept is there before
        del one
    tracemalloc.start()
    try:
        for one in sets:
            assert one
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def nbytes(sets: CalibrationSets) -> int:
    return max(sum(array.nbytes for array in one.values()) for one in sets)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_of_arrays_is_that_of_one_set(save: Callable[..., None], tmp_path: Path) -> None:
    model = network("float[batch,size] x")
    peaks = []
    for count in (3, 12):
        save(tmp_path / "a.npz", x=np.zeros((count, 1, 1 << 20), np.float32))
        sets = calibration_sets(tmp_path / "a.npz", model)
        one = nbytes(sets)
        peaks.append(peak_bytes(sets))
    # The caller's set, the one that is being made, and where it is finite: a copy in float64, twice as large, and a
    # byte for each of its four. Before that a block of the archive, as it was read and as it was decompressed.
    assert peaks[1] <= 4 * one + one // 4 + 2 * BLOCK
    assert peaks[1] <= peaks[0] + one // 2
    assert 12 * one > peaks[1] * 1.5  # the bound says something: all sets are more


def test_memory_of_text_and_images_does_not_grow_with_the_samples(tmp_path: Path, byte_source: Path) -> None:
    text, images = tmp_path / "a.txt", tmp_path / "images"
    text.write_text("some words in a line\n" * 30_000)
    images.mkdir()
    for index in range(20):
        Image.new("L", (256, 256), index).save(images / f"{index}.png")
    for path, model in ((text, language_model(maximum=None)), (images, image_model("batch,1,256,256"))):
        few, many = (
            calibration_sets(path, model, byte_source, samples=samples, length=2048 if path == text else None)
            for samples in (2, 20)
        )
        assert (len(few), len(many)) == (2, 20)
        assert peak_bytes(many) <= peak_bytes(few) + nbytes(few)
