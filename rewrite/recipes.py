"""Which passes run: by name, by recipe, or by a recipe file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.errors import RequestError

if TYPE_CHECKING:
    from rewrite.rule import Pass

_AFFINE = ("fold-parametrization", "fold-batchnorm", "fold-scale", "merge-affine", "merge-branches")
_DEFAULT = (*_AFFINE, "center-residual", "fold-norm")

RECIPES: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "compress": (*_DEFAULT, "compress-residual"),
    "rotate": (*_DEFAULT, "rotate-residual", "rotate-heads", "rotate-online"),
    "smooth": (*_DEFAULT, "smooth", "equalize", "scale-heads"),
    "none": (),
}
"""Named recipes. A recipe file is a JSON list of pass names, or of objects {"pass": name, option: value, …}."""


def passes_of(names: Sequence[str | Pass[Any]] | None, recipe: str | None) -> list[Pass[Any]]:
    """The passes to run, in order: `names` if given, else those of `recipe`, else the default recipe's."""
    if names:
        return [_made({"pass": name}, "--pass") if isinstance(name, str) else name for name in names]
    if recipe is None or recipe in RECIPES:
        return [_made({"pass": name}, "recipe") for name in RECIPES[recipe or "default"]]
    path = Path(recipe)
    if not path.is_file():
        raise RequestError(
            f"no recipe {recipe!r}", where="--recipe", remedy=f"one of {', '.join(RECIPES)}, or a JSON file"
        )
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"is no JSON: {error}", where=str(path), remedy="write a list of pass names") from error
    if not isinstance(steps, list) or not all(isinstance(step, str | dict) for step in steps):
        raise RequestError("is no list of passes", where=str(path), remedy='write ["center-residual", …]')
    return [_made({"pass": step} if isinstance(step, str) else step, str(path)) for step in steps]


def _made(step: dict[str, Any], where: str) -> Pass[Any]:
    from rewrite.passes import PASSES

    known = {each.name: each for each in PASSES}
    name = step.get("pass")
    if name not in known:
        raise RequestError(f"no pass {name!r}", where=where, remedy=f"one of {', '.join(known)}")
    options = {key.replace("-", "_"): value for key, value in step.items() if key != "pass"}
    try:
        return known[name](**options)
    except TypeError as error:
        raise RequestError(f"{name}: {error}", where=where, remedy="see `rewrite passes` for its options") from error
