"""Would loading a `.pt2` archive run code? It is inspected before torch opens it, and nothing is executed.

torch.export.load reaches an interpreter in five ways, and each is closed here:

* members with code or pickled objects (compiled kernels, custom objects): only tensors, their tables and the graph
  pass;
* pickles of sample inputs and of unusual tensors: read as opcodes, and every global they name must be on a short list
  of constructors of tensors;
* targets of graph nodes, which are attributes of torch by name (`torch.hub.load`): only operators pass;
* symbolic sizes, which sympy evaluates: parsed, and only arithmetic over symbols passes;
* tree specifications, which import what they name, and guards, which are Python text.
"""

from __future__ import annotations

import ast
import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewrite.errors import SourceError, UnsafeSourceError

GLOBALS = frozenset(
    {"collections.OrderedDict", "torch.Size", "torch.device", "torch.storage.UntypedStorage"}
    | {"torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2", "torch.serialization._get_layout"}
    | {
        f"torch.{kind}Storage"
        for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    }
)
"""The globals a pickle may name: constructors of tensors and containers, without side effects."""

MEMBERS = re.compile(
    r"models/[^/]+\.json|data/weights/(weight_\d+|[^/]+_config\.json)|data/constants/(tensor_\d+|[^/]+_config\.json)"
    r"|data/sample_inputs/[^/]+\.pt|extra/.*|archive_format|archive_version|byteorder|version|\.format_version"
    r"|\.storage_alignment|\.data/(version|serialization_id)"
)
"""What torch.export.save writes for a program of plain tensors."""

TENSOR_MEMBERS = re.compile(
    r"data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
"""What torch.save writes."""

TARGETS = re.compile(
    r"torch\.ops\.(aten|prims|higher_order|transformers|torchvision|quantized_decomposed)\.\w+(\.\w+)?"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem|index|pos|abs)"
    r"|torch\.(sym_(int|float|min|max|not|sum|ite|sqrt)|_sym_sqrt)|math\.(ceil|floor|trunc|sqrt)"
)
"""Operators, and the integer functions that symbolic sizes need."""

FUNCTIONS = frozenset(
    {"Symbol", "Integer", "Float", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "Add", "Mul"}
    | {"ModularIndexing", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Pow", "PowByNatural", "Identity"}
    | {"IntTrueDiv", "FloatTrueDiv", "FloatPow", "TruncToInt", "ToFloat", "CeilToInt", "FloorToInt", "RoundToInt"}
)
"""What an expression of a symbolic size may call."""

SYMBOL = re.compile(r"[a-z]{1,4}\d+|oo|int_oo|True|False")
EXPRESSION_NODES = (ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare)
EXPRESSION_OPERATORS = (ast.operator, ast.unaryop, ast.cmpop, ast.Load)

TREE_TYPES = frozenset(
    {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "builtins.NoneType"}
)


def refuse_code(path: Path) -> None:
    """Raise unless everything in the archive at `path` is tensors and a graph of operators.

    Raises:
        SourceError: it is no archive of torch.export.save.
        UnsafeSourceError: loading it could execute code.
    """
    again = "save it with torch.export.save of the installed torch"
    if not zipfile.is_zipfile(path):
        raise SourceError("not a .pt2 archive", where=str(path), remedy=again)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len({name.split("/")[0] for name in names}) != 1 or len(set(names)) != len(names):
            raise SourceError("not an archive of torch.export.save", where=str(path), remedy=again)
        for name in names:
            member = name.partition("/")[2]
            where = f"{path}/{member}"
            if not MEMBERS.fullmatch(member):
                _refuse(f"a member of an unknown kind, {member}", where)
            if member.startswith("models/"):
                check_graph(_json(archive.read(name), where), where)
            elif member.endswith("_config.json"):
                _check_table(_json(archive.read(name), where), archive, name, where)
            elif member.startswith("data/sample_inputs/"):
                _check_saved(archive.read(name), where)


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise SourceError("not JSON", where=where, remedy="save the program again") from error


def _check_table(table: Any, archive: zipfile.ZipFile, name: str, where: str) -> None:
    """A table of tensors: those stored as pickles are inspected, objects other than tensors refused."""
    for entry in table.get("config", {}).values():
        place = str(entry.get("path_name"))
        if not re.fullmatch(r"(weight|tensor)_\d+", place):
            _refuse(f"an object that is no tensor, {place}", where)
        if entry.get("use_pickle"):
            _check_saved(archive.read(f"{name.rpartition('/')[0]}/{place}"), f"{where}/{place}")


def _check_saved(content: bytes, where: str) -> None:
    """A file of torch.save: a zip archive whose only pickle is harmless."""
    if not content:
        return
    if not zipfile.is_zipfile(io.BytesIO(content)):
        _refuse("a bare pickle", where)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            member = name.partition("/")[2]
            if not TENSOR_MEMBERS.fullmatch(member):
                _refuse(f"a member of an unknown kind, {member}", where)
            if member == "data.pkl":
                check_pickle(archive.read(name), where)


def check_pickle(content: bytes, where: str) -> None:
    """Raise unless every global that a pickle names is in `GLOBALS`; it is not executed."""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "GLOBAL":
                name = str(argument).replace(" ", ".")
                if name not in GLOBALS:
                    _refuse(f"a pickle that calls {name}", where)
            elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                # torch.save writes protocol 2, where a global is named in place; these name it in ways that hide it.
                _refuse("a pickle that computes what it calls", where)
    except (ValueError, IndexError, OverflowError) as error:
        raise UnsafeSourceError("a pickle that cannot be read", where=where, remedy="save the program again") from error


def check_graph(program: Any, where: str) -> None:
    """Raise unless a serialized program names only operators, arithmetic of sizes and plain containers."""
    if not isinstance(program, dict) or "graph_module" not in program:
        raise SourceError("not a serialized program", where=where, remedy="save it with torch.export.save")
    if program.get("guards_code"):
        program_guards = [guard for guard in program["guards_code"] if not _is_size_guard(str(guard))]
        if program_guards:
            _refuse(f"a guard in Python, {program_guards[0]!r}", where)
    for name in program.get("range_constraints", {}):
        _check_expression(str(name), where)
    for key, value in _entries(program):
        if key == "expr_str":
            _check_expression(str(value), where)
        elif key == "target" and isinstance(value, str) and not TARGETS.fullmatch(value):
            _refuse(f"a call of {value}, which is no operator", where)
        elif key in ("in_spec", "out_spec") and isinstance(value, str):
            for inner, kind in _entries(json.loads(value)):
                if inner == "type" and kind is not None and kind not in TREE_TYPES:
                    _refuse(f"a container of the type {kind}", where)
                if inner == "__enum__":
                    _refuse("an enumeration in a tree specification", where)


GUARD_NAMES = frozenset({"L", "size", "stride"})


def _is_size_guard(guard: str) -> bool:
    """Whether a guard compares sizes only: `L['x'].size()[0] <= 64`."""
    try:
        tree = ast.parse(guard, mode="eval")
    except SyntaxError:
        return False
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names | attributes <= GUARD_NAMES and not any(isinstance(n, ast.Lambda) for n in ast.walk(tree))


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of every object in a JSON document, with its value."""
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            yield from current.items()
            pending.extend(current.values())
        elif isinstance(current, list):
            pending.extend(current)


def _check_expression(text: str, where: str) -> None:
    """sympy evaluates these as Python: only arithmetic, known functions and symbols pass."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        _refuse(f"a size that is no expression, {text[:60]!r}", where)
        return
    called = {id(node.func): node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, (*EXPRESSION_NODES, *EXPRESSION_OPERATORS)):
            _refuse(f"a size that is no arithmetic, {text[:60]!r}", where)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not SYMBOL.fullmatch(node.value):
            _refuse(f"a size over {node.value[:60]!r}", where)
        if isinstance(node, ast.Name):
            allowed = node.id in FUNCTIONS if id(node) in called else SYMBOL.fullmatch(node.id)
            if not allowed:
                _refuse(f"a size over {node.id}", where)
    if any(not isinstance(function, ast.Name) for function in called.values()):
        _refuse(f"a size that is no arithmetic, {text[:60]!r}", where)


def _refuse(what: str, where: str) -> None:
    raise UnsafeSourceError(
        f"loading it could execute code: {what}",
        where=where,
        remedy="export the module again where you trust it, or capture it as a factory package.module:function",
    )
