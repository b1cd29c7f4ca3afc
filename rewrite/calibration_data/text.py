"""Sets of inputs from text: rows of token ids, with the mask, positions and types that go with them.

All files are one text, in the order of their names. Row i begins at i/n of its bytes, at the next line there, or where
row i − 1 ended if that is further on. So a text that is long enough is sampled evenly, a short one gives all of its
rows, and no token is in two. Only pieces of a few rows are read, whatever the size of the files.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from rewrite.calibration_data.files import Files
from rewrite.capture.preprocessors import Tokenizer, decoder_start, load_tokenizer
from rewrite.check.inputs import beside_text, maxima_of
from rewrite.errors import InputsError
from rewrite.ir.program import Input, signature

LENGTH = 128
"""Tokens in a row, unless the caller or the network says otherwise."""
BYTES_PER_TOKEN = 8
"""A piece has so many bytes for each token of a row: a row of most languages needs one piece."""
PIECES = (1 << 8, 1 << 20)
"""The smallest and the largest piece, in bytes."""
BESIDE = ("attention_mask", "position_ids", "token_type_ids")
NPZ = "give its inputs as .npz"


@dataclass(frozen=True)
class Rows:
    """The shape of what the network reads: `main` gets rows of `length` tokens, `batch` of them in a set.

    `decoder` is the second sequence of an encoder-decoder: the same tokens after its `start`, so that it reconstructs.
    """

    main: Input
    batch: int
    length: int
    beside: tuple[Input, ...]
    decoder: Input | None = None
    decoder_length: int = 0
    start: int | None = None

    @classmethod
    def of(cls, model: ir.Model, length: int | None, start: int | None) -> Rows:
        """Raises InputsError for a network that text alone is no input of, and for a length that it does not take."""
        inputs = signature(model)
        texts = [given for given in inputs if given.kind == "token_ids" and len(given.shape) in (1, 2)]
        if not texts and len(inputs) == 1 and len(inputs[0].shape) in (1, 2) and inputs[0].dtype.is_integer():
            texts = list(inputs)  # integers under a name that says nothing
        others = [given for given in inputs if given not in texts and given.kind not in BESIDE]
        if not texts:
            takes = ", ".join(given.name for given in inputs)
            raise InputsError(f"the network takes {takes}, no text", where="calibration", remedy=NPZ)
        if others or len(texts) > 2:
            more = (*others, *texts[2:])[0].name
            raise InputsError(f"the network takes {more} beside the text", where="calibration", remedy=NPZ)
        main = next((given for given in texts if not given.name.startswith("decoder")), texts[0])
        decoder = next((given for given in texts if given is not main), None)
        batch = main.shape[0] if len(main.shape) == 2 else 1
        return cls(
            main,
            batch if isinstance(batch, int) else 1,
            _length(main, model, length),
            tuple(given for given in inputs if given.kind in BESIDE),
            decoder,
            _length(decoder, model, None, length) if decoder is not None else 0,
            start,
        )

    def inputs(self, rows: list[list[int]]) -> dict[str, np.ndarray]:
        """One set of `batch` rows; all of one length, which only the last of a short text has not in full."""
        made = {self.main.name: self._ids(self.main, rows)}
        sizes = _sizes(self.main, made[self.main.name].shape)
        if self.decoder is not None:
            before = [] if self.start is None else [self.start]
            shifted = [(before + row)[: self.decoder_length] for row in rows]
            made[self.decoder.name] = self._ids(self.decoder, shifted)
            sizes |= _sizes(self.decoder, made[self.decoder.name].shape)
        for given in self.beside:
            shape = []
            for axis, dimension in enumerate(given.shape):
                unnamed = self.batch if axis == 0 and len(given.shape) > 1 else len(rows[0])
                size = dimension if isinstance(dimension, int) else sizes.get(dimension)
                if size is None and dimension != "None":
                    what = f"{given.name} has the axis {dimension}, which text does not have"
                    raise InputsError(what, where="calibration", remedy=NPZ)
                shape.append(unnamed if size is None else size)
            made[given.name] = beside_text(given, tuple(shape))
        return made

    @staticmethod
    def _ids(given: Input, rows: list[list[int]]) -> np.ndarray:
        return np.array(rows if len(given.shape) == 2 else rows[0], given.dtype.numpy())


def _sizes(given: Input, shape: tuple[int, ...]) -> dict[str, int]:
    """The size of every named axis of an input."""
    return {axis: size for axis, size in zip(given.shape, shape) if isinstance(axis, str) and axis != "None"}


def _length(given: Input, model: ir.Model, length: int | None, default: int | None = None) -> int:
    """Tokens in a row of `given`: what its axis has if it is static, at most what the network takes."""
    axis = given.shape[-1]
    if isinstance(axis, int):
        if length not in (None, axis):
            what = f"{given.name} takes rows of {axis} tokens, not {length}"
            raise InputsError(what, where="calibration", remedy="leave the length out")
        return axis
    maximum = maxima_of(model).get(axis)
    if length is not None and maximum is not None and length > maximum:
        what = f"{given.name} takes at most {maximum} tokens, not {length}"
        raise InputsError(what, where="calibration", remedy="give a smaller length")
    wanted = length or default or LENGTH
    return wanted if maximum is None else min(wanted, maximum)


@dataclass(frozen=True)
class TextSets:
    """The sets of a text: `samples` of them, or what it has."""

    files: Files
    rows: Rows
    tokenizer: Tokenizer
    samples: int

    @classmethod
    def of(cls, files: Files, model: ir.Model, folder: Path | None, samples: int, length: int | None) -> TextSets:
        """Raises InputsError where the network reads no text, or `folder` has no tokenizer for it."""
        start = None if folder is None else decoder_start(folder)
        rows = Rows.of(model, length, start)
        if folder is None:
            raise InputsError(
                "the source is no file or folder that a tokenizer could lie beside",
                where=str(files.root),
                remedy="give token ids as .npz",
            )
        return cls(files, rows, load_tokenizer(folder), samples)

    def __iter__(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        rows: list[list[int]] = []
        made = 0
        for row in self._rows():
            rows.append(row)
            if len(rows) == self.rows.batch:
                made += 1
                yield f"{self.files.root}: set {made}", self.rows.inputs(rows)
                rows = []
        if not made:
            needed = self.rows.batch * self.rows.length
            raise InputsError(
                f"has fewer than the {needed} tokens of one set", where=str(self.files.root), remedy="give more text"
            )

    def _rows(self) -> Iterator[list[int]]:
        prefix, suffix = list(self.tokenizer.prefix), list(self.tokenizer.suffix)
        content, count = self.rows.length - len(prefix) - len(suffix), self.samples * self.rows.batch
        if content < 1:
            what = f"rows of {self.rows.length} tokens have no place beside the tokenizer's {len(prefix + suffix)} own"
            raise InputsError(what, where=str(self.files.root), remedy="give a larger length")
        tokens: list[int] = []
        with Pieces(self.files.sized(), min(max(PIECES[0], BYTES_PER_TOKEN * content), PIECES[1])) as pieces:
            for row in range(count):
                if (begin := row * self.files.size // count) > pieces.position:
                    pieces.skip_to(begin)
                    tokens = []
                while len(tokens) < content and (piece := pieces.read()) is not None:
                    tokens += self._encoded(*piece)
                if len(tokens) < content:
                    if row == 0 and tokens and self.rows.batch == 1 and isinstance(self.rows.main.shape[-1], str):
                        yield prefix + tokens + suffix
                    return
                yield prefix + tokens[:content] + suffix
                tokens = tokens[content:]

    def _encoded(self, path: Path, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        low, high = self.rows.main.low or 0, self.rows.main.high
        for each in ids:
            if each < low or (high is not None and each >= high):
                raise InputsError(
                    f"the tokenizer makes the id {each} of it, and the network has the ids [{low}, {high})",
                    where=str(path),
                    remedy="put the tokenizer that the network was trained with beside the source",
                )
        return ids


class Pieces:
    """The files as one text, read in pieces that end at a line or a word; `position` counts bytes over all files."""

    def __init__(self, files: Iterator[tuple[Path, int]], size: int) -> None:
        self.position = 0
        self._files, self._size = files, size
        self._file: BinaryIO | None = None
        self._path, self._begin, self._end = Path(), 0, 0
        self._decoder, self._rest, self._jumped = codecs.getincrementaldecoder("utf-8")(), "", False

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def skip_to(self, position: int) -> None:
        """Go on at the first line that begins after `position`, which is not before what was read."""
        while position >= self._end:
            self._close()
            if not self._next_file():
                return
        self.position, self._rest, self._jumped = position, "", position > self._begin
        self._decoder.reset()
        if self._file is not None:
            self._file.seek(position - self._begin)

    def read(self) -> tuple[Path, str] | None:
        """The next piece and its file; None after the last. Raises InputsError for what is not UTF-8."""
        while self._end > self.position or self._next_file():
            text = self._rest + self._decoded()
            whole = self.position >= self._end
            cut = len(text) if whole else (text.rfind("\n") + 1 or max(text.rfind(" "), 0) or len(text))
            text, self._rest = text[:cut], text[cut:]
            if text:
                return self._path, text
        return None

    def _next_file(self) -> bool:
        self._close()
        following = next(self._files, None)
        if following is None:
            return False
        self._path, size = following
        self.position = self._begin = self._end
        self._end = self._begin + size
        self._rest, self._jumped = "", False
        self._decoder.reset()
        return True

    def _decoded(self) -> str:
        """The text of the next bytes; of the first ones after a jump, what follows the end of a line or word."""
        block = self._bytes()
        if self._jumped:
            # The jump may have led into a character, of which there are at most three more bytes.
            inside = next((place for place, byte in enumerate(block[:3]) if byte & 0xC0 != 0x80), 3)
            block = block[inside:]
        kept = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(block, final=self.position >= self._end)
        except UnicodeDecodeError as error:
            place = self.position - self._begin - len(block) - kept + error.start
            raise InputsError(
                f"is not UTF-8 text at byte {place}", where=str(self._path), remedy="save it as UTF-8, or leave it out"
            ) from error
        if self._jumped:
            text = text[text.find("\n") + 1 or text.find(" ") + 1 :]
        elif self.position - len(block) == self._begin:
            text = text.removeprefix("\ufeff")
        self._jumped = False
        return text

    def _bytes(self) -> bytes:
        try:
            if self._file is None:
                self._file = self._path.open("rb")
                self._file.seek(self.position - self._begin)
            block = self._file.read(min(self._size, self._end - self.position))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputsError(f"cannot be read: {reason}", where=str(self._path), remedy="leave it out") from error
        # A file that became shorter meanwhile ends here.
        self.position = self.position + len(block) if block else self._end
        return block

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
