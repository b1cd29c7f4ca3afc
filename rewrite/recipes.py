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

_INT4 = {"pass": "quantize-weights", "bits": 4}

Step = str | dict[str, Any]

RECIPES: dict[str, tuple[Step, ...]] = {
    "default": _DEFAULT,
    "compress": (*_DEFAULT, "compress-residual"),
    "rotate": (*_DEFAULT, "rotate-residual", "rotate-heads", "rotate-online"),
    "smooth": (*_DEFAULT, "smooth", "equalize", "scale-heads"),
    "reparameterize": (*_DEFAULT, "reparameterize-norm-scale"),
    "split": (*_DEFAULT, "split-outliers"),
    "int8-dynamic": (*_DEFAULT, "quantize-dynamic"),
    "int8-static": (*_DEFAULT, "quantize-static"),
    "int4-weight": (*_DEFAULT, _INT4),
    "int4-weight-int8-activation": (*_DEFAULT, {**_INT4, "accuracy_level": 4}),
    "integer": (*_DEFAULT, "quantize-static", "quantize-operators"),
    "none": (),
}
"""Named recipes; `rotate+int4-weight` is all passes of both in the order of `rewrite passes`. A recipe file is a JSON
list of pass names, or of objects {"pass": name, option: value, …}."""


def passes_of(names: Sequence[str | Pass[Any]] | None, recipe: str | None) -> list[Pass[Any]]:
    """The passes to run, in order: `names` if given, else those of `recipe`, else the default recipe's.

    Raises RequestError for a name, recipe or option that does not exist, and where an equivalence stands behind an
    approximation: what was declared to be approximated is not rewritten any more.
    """
    if names:
        made = [_made(name, "--pass") if isinstance(name, str) else name for name in names]
    else:
        made = _of_recipe(recipe or "default")
    approximated = ""
    for each in made:
        if approximated and not each.approximates:
            raise RequestError(f"{each.name} stands behind {approximated}", remedy="put what approximates last")
        approximated = each.name if each.approximates else approximated
    return made


def _of_recipe(recipe: str) -> list[Pass[Any]]:
    if recipe in RECIPES:
        return [_made(step, "recipe") for step in RECIPES[recipe]]
    path = Path(recipe)
    if "+" in recipe and not path.is_file():
        return _joined(recipe.split("+"))
    if not path.is_file():
        raise RequestError(
            f"no recipe {recipe!r}",
            where="--recipe",
            remedy=f"one of {', '.join(RECIPES)}, several joined by +, or a JSON file",
        )
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"is no JSON: {error}", where=str(path), remedy="write a list of pass names") from error
    if not isinstance(steps, list) or not all(isinstance(step, str | dict) for step in steps):
        raise RequestError("is no list of passes", where=str(path), remedy='write ["center-residual", …]')
    return [_made(step, str(path)) for step in steps]


def _joined(recipes: Sequence[str]) -> list[Pass[Any]]:
    """All passes of several recipes, each once, as the last recipe that has it says, in the order of all passes."""
    from rewrite.passes import APPROXIMATIONS, PASSES

    order = [each.name for each in (*PASSES, *APPROXIMATIONS)]
    found = {each.name: each for recipe in recipes for each in _of_recipe(recipe)}
    return [found[name] for name in order if name in found]


def _made(given: Step, where: str) -> Pass[Any]:
    from rewrite.passes import APPROXIMATIONS, PASSES

    step: dict[str, Any] = {"pass": given} if isinstance(given, str) else given
    known = {each.name: each for each in (*PASSES, *APPROXIMATIONS)}
    name = step.get("pass")
    if name not in known:
        raise RequestError(f"no pass {name!r}", where=where, remedy=f"one of {', '.join(known)}")
    options = {key.replace("-", "_"): value for key, value in step.items() if key != "pass"}
    try:
        return known[name](**options)
    except TypeError as error:
        raise RequestError(f"{name}: {error}", where=where, remedy="see `rewrite passes` for its options") from error
