"""The tokenizer of the byte language models: the ids of a text are the bytes of its UTF-8.

`python -m rewrite.models.byte_tokenizer FOLDER` writes it into the folder of a checkpoint, as the training scripts do.
"""

import argparse
import json
from pathlib import Path

from rewrite.models.byte_data import CONTEXT

FILES = ("tokenizer.json", "tokenizer_config.json")


def printable_bytes() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's), and the byte.

    Printable characters of Latin-1 stand for themselves, the other bytes, in order, for the characters from 256 on.

    >>> table = printable_bytes()
    >>> len(table), table["A"], table["Ġ"]
    (256, 65, 32)
    """
    themselves = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(256 + others.index(byte) if byte in others else byte): byte for byte in range(256)}


def save_byte_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: 256 tokens, no merges, none of them special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=printable_bytes(), merges=[]))
    # Without its pattern the text is one word, and without a prefix nothing is added to it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(Path(folder) / FILES[0]))
    # By the class of the configuration's model_type it would get that model's special tokens.
    written = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (Path(folder) / FILES[1]).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="+", help="folder of a checkpoint")
    for each in parser.parse_args().folder:
        save_byte_tokenizer(each)
