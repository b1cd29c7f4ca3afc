"""Would loading a `.pt2` archive run code? Its pickles are read as opcodes, never executed.

torch.export.load unpickles sample inputs and constants. A pickle can call only what it names, so every global named in
any pickle of the archive must be on a short list of constructors of tensors and containers.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path

from rewrite.errors import SourceError, UnsafeSourceError

ALLOWED = frozenset(
    {"collections.OrderedDict", "torch.Size", "torch.device", "torch.Tensor", "torch.storage.UntypedStorage"}
    | {"torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
    | {"torch._tensor._rebuild_from_type_v2", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"}
    | {
        f"torch.{kind}Storage"
        for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
    }
    | {f"torch.{dtype}" for dtype in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8")}
    | {f"torch.{dtype}" for dtype in ("uint8", "bool", "strided", "preserve_format", "contiguous_format")}
)
"""The globals a pickle may name: constructors without side effects."""

REFUSED = frozenset({"INST", "OBJ", "EXT1", "EXT2", "EXT4"})
"""Opcodes that reach a class without naming it as a global; torch writes none of them."""

DEPTH = 4
"""How many archives inside archives are opened (sample inputs are one inside the other)."""


def refuse_code(path: Path) -> None:
    """Raise unless every pickle in the archive at `path` is harmless.

    Raises:
        SourceError: it is no zip archive.
        UnsafeSourceError: a pickle names a global that is not in `ALLOWED`, or cannot be read to its end.
    """
    if not zipfile.is_zipfile(path):
        raise SourceError("not a .pt2 archive", where=str(path), remedy="save it with torch.export.save")
    with zipfile.ZipFile(path) as archive:
        _scan_archive(archive, str(path), DEPTH)


def _scan_archive(archive: zipfile.ZipFile, where: str, depth: int) -> None:
    if depth == 0:
        raise UnsafeSourceError("archives nested too deep to inspect", where=where, remedy="save the program again")
    for entry in archive.infolist():
        with archive.open(entry) as member:
            start = member.read(4)
            if start.startswith(b"PK"):
                content = start + member.read()
                if zipfile.is_zipfile(io.BytesIO(content)):
                    with zipfile.ZipFile(io.BytesIO(content)) as inner:
                        _scan_archive(inner, f"{where}/{entry.filename}", depth - 1)
                    continue
            elif start[:1] == b"\x80" or entry.filename.endswith((".pkl", ".pickle")):
                _scan_pickle(start + member.read(), f"{where}/{entry.filename}", _is_pickle_name(entry.filename))
            elif entry.filename.endswith((".pt", ".pth", ".bin")) and b"data/weights" not in entry.filename.encode():
                _scan_pickle(start + member.read(), f"{where}/{entry.filename}", certain=False)


def _is_pickle_name(name: str) -> bool:
    return name.endswith((".pkl", ".pickle", ".pt", ".pth"))


def _scan_pickle(content: bytes, where: str, certain: bool) -> None:
    """Refuse a stream that names a forbidden global. Raw weights may begin like a pickle: then they do not parse."""
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in REFUSED:
                _refuse(opcode.name, where)
            elif opcode.name == "GLOBAL":
                _check(str(argument).replace(" ", "."), where)
            elif opcode.name == "STACK_GLOBAL":
                if len(strings) < 2:
                    _refuse("a computed name", where)
                _check(f"{strings[-2]}.{strings[-1]}", where)
            elif isinstance(argument, str):
                strings.append(argument)
            elif opcode.name in ("MEMOIZE", "PROTO", "FRAME", "BINPUT", "LONG_BINPUT", "PUT"):
                continue
            elif opcode.name in ("BINGET", "LONG_BINGET", "GET", "DUP"):
                # A name taken from the memo cannot be followed without running the pickle.
                strings.clear()
    except UnsafeSourceError:
        raise
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError) as error:
        if certain:
            raise UnsafeSourceError(
                "a pickle that cannot be inspected", where=where, remedy="save the program again"
            ) from error


def _check(name: str, where: str) -> None:
    if name not in ALLOWED:
        _refuse(name, where)


def _refuse(name: str, where: str) -> None:
    raise UnsafeSourceError(
        f"loading it would execute code: its pickle calls {name}",
        where=where,
        remedy="export the module again where you trust it, or capture it as a factory package.module:function",
    )
