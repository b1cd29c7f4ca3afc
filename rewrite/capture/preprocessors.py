"""What lies beside a source and makes its inputs of raw data: a tokenizer, an image processor.

transformers loads both from the folder alone: nothing is fetched, no code in the folder is run, no pickle is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewrite.errors import InputsError, UnsafeSourceError

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
"""Files of which a tokenizer has at least one. Without them transformers makes an empty one from the configuration."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
CONFIGURATIONS = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class Tokenizer:
    """`encode` turns text into ids without special ones; `prefix` and `suffix` are those put around one text."""

    encode: Callable[[str], list[int]]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


def has_any(folder: Path, names: tuple[str, ...]) -> bool:
    """Whether one of the files is in the folder."""
    return any((folder / name).is_file() for name in names)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`.

    Raises InputsError where there is none or it cannot be loaded, UnsafeSourceError where it is code in the folder.
    """
    if not has_any(folder, TOKENIZERS):
        raise InputsError(
            "there is no tokenizer in it to read text with",
            where=str(folder),
            remedy="put tokenizer.json beside the source, or give token ids as .npz",
        )
    loaded = _load("AutoTokenizer", "the tokenizer", folder)

    def ids(text: str, special: bool) -> list[int]:
        # Whatever tokenizer.json says of truncation: a piece of text is never cut.
        try:
            encoded = loaded(text, add_special_tokens=special, truncation=False, padding=False, verbose=False)
        except Exception as error:  # tokenizers raises bare exceptions for what a vocabulary cannot express
            raise InputsError(
                f"the tokenizer cannot take the text: {_first_line(error)}",
                where=str(folder),
                remedy="put the tokenizer that the network was trained with there, or give token ids as .npz",
            ) from error
        return [int(each) for each in encoded["input_ids"]]

    bare, whole = ids("a", False), ids("a", True)
    if not bare:
        raise InputsError(
            "the tokenizer has no vocabulary: it turns text into nothing",
            where=str(folder),
            remedy="put tokenizer.json beside the source, or give token ids as .npz",
        )
    starts = [start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare]
    prefix, suffix = (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts else ([], [])
    return Tokenizer(lambda text: ids(text, False), tuple(prefix), tuple(suffix))


def load_image_processor(folder: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]] | None:
    """What the image processor in `folder` makes of one image (height, width, channels) uint8; None without one.

    The results have a batch of one. Raises as `load_tokenizer` does; what is called raises InputsError for an image
    that the processor cannot take.
    """
    if not has_any(folder, PROCESSORS):
        return None
    from rewrite.capture.finish import quiet

    loaded = _load("AutoImageProcessor", "the image processor", folder)

    def made(image: np.ndarray) -> dict[str, np.ndarray]:
        try:
            with quiet():
                result = loaded(images=[image], input_data_format="channels_last", return_tensors="np")
                return {name: np.asarray(array) for name, array in result.items()}
        except Exception as error:  # processors raise many kinds for sizes and channels they were not made for
            raise InputsError(
                f"the image processor cannot take it: {_first_line(error)}",
                where=str(folder),
                remedy="give images of the kind it was made for, or arrays as .npz",
            ) from error

    return made


def decoder_start(folder: Path) -> int | None:
    """The id that a decoder's sequence begins with, where a configuration in the folder names one."""
    for name in CONFIGURATIONS:
        try:
            written = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        found = written.get("decoder_start_token_id") if isinstance(written, dict) else None
        if isinstance(found, int):
            return found
    return None


def _load(automatic: str, what: str, folder: Path) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise InputsError(
            f"{error.name} is needed to load {what}", where=str(folder), remedy="pip install rewrite[hf]"
        ) from error
    from rewrite.capture.finish import quiet

    try:
        with quiet():
            return getattr(transformers, automatic).from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # from a damaged file: whatever JSON, tokenizers and transformers raise
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            raise UnsafeSourceError(
                f"{what} is Python code in the folder (auto_map), which is not executed",
                where=str(folder),
                remedy="give the network's inputs as .npz",
            ) from error
        raise InputsError(
            f"{what} cannot be loaded: {_first_line(error)}",
            where=str(folder),
            remedy="save it again with save_pretrained, or give the network's inputs as .npz",
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
