"""Turn the residual stream by an orthogonal matrix, so that no channel stands out.

      every writer of S is affine with constants W, b      every reader of S is x·V with a constant V
    ───────────────────────────────────────────────────────────────────────────────────────────────────  QᵀQ = I
      rms_ε(xQ) = rms_ε(x)·Q,      x′ = xQ is what W·Q and b·Q write,      x·V = x′·(QᵀV)

S holds the stream and the results of its norms, whose γ are one constant each. A γ that is not is folded into the
readers on the way where nothing but the sharing of a table kept fold-norm from it: the table is untied then. A table
that is written and read by the same Q stays tied, since (EQ)ᵀ = QᵀEᵀ.

Q is a Hadamard matrix over √d behind random signs, which spreads every channel over all of them; where no such matrix
is known for d it is drawn at random.

Shapes    x (..., d)   Q (d, d)   W (k, d)   b (d,)   V (d, n)
Relation  equal over the reals; every value of S is the original's times Q
Source    Ashkboos et al. 2024, arXiv:2404.00456, §3.1 and §4.1; Liu et al. 2024, arXiv:2405.16406, §3.1 (R1)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from rewrite.basis.factors import factors, unabsorbed
from rewrite.basis.operators import NORMS, right_factor
from rewrite.basis.regions import Cause, Region, Use, grow
from rewrite.basis.transforms import DIAGONAL_AND_SHIFT, ORTHOGONAL
from rewrite.ir.axes import operand
from rewrite.ir.constants import weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Transformed
from rewrite.passes.fold_norm import Affine, FoldNorm
from rewrite.proof.hadamard import parts
from rewrite.proof.transforms import Hadamard, Orthogonal, Transform
from rewrite.rule import Breach, Change, Pass, Requirement, Site, read_elsewhere, steps


@dataclass(frozen=True)
class Stream(Site):
    """A residual stream with its norms' results, and what its readers multiply it with.

    `folds` are norms that read the stream with a γ of their own: what fold-norm would do there.
    """

    region: Region
    factors: list[Region]
    folds: dict[ir.Node, Affine]


def _no_layernorm(rule: RotateResidual, stream: Stream) -> Breach | None:
    for node in _border_norms(stream.region):
        if node.op_type == "LayerNormalization":
            touches = "writes" if node in stream.region.writing_norms else "reads"
            return Breach(node, f"LayerNormalization {touches} the stream, which center-residual did not centre")
    return None


def _no_scaled_writer(rule: RotateResidual, stream: Stream) -> Breach | None:
    for node in stream.region.writing_norms:
        return Breach(node, f"{node.op_type} writes the stream with a γ that is not one constant")
    return None


def _scales_fold(rule: RotateResidual, stream: Stream) -> Breach | None:
    for use in stream.region.norms:
        if use.node.op_type != "RMSNormalization":
            continue
        fold = stream.folds.get(use.node)
        if fold is None:
            return Breach(use.node, f"{use.node.op_type} reads the stream with a γ that is not one constant")
        for requirement in FoldNorm.requires:
            met = requirement.check(FoldNorm(), fold) if requirement.id != "R5" else None
            if met is not None:
                return Breach(use.node, f"its γ is not one constant and cannot be folded: {met.reason}")
        for reader in fold.region.readers:
            for other in right_factor(reader.node, DIAGONAL_AND_SHIFT).readers:
                if other.position != 1 or not any(other.node is one.node for one in fold.region.readers):
                    return Breach(
                        use.node, f"its γ is not one constant, and {other.node.name} shares a reader's matrix"
                    )
    return None


def _hidden_from_outside(rule: RotateResidual, stream: Stream) -> Breach | None:
    return Breach.at(stream.region.met(Cause.INTERFACE))


def _own_constants(rule: RotateResidual, stream: Stream) -> Breach | None:
    return Breach.at(stream.region.met(Cause.OVERRIDABLE))


def _all_commute(rule: RotateResidual, stream: Stream) -> Breach | None:
    return Breach.at(stream.region.met(Cause.OPERATOR))


def _constant_readers(rule: RotateResidual, stream: Stream) -> Breach | None:
    return Breach.at(unabsorbed(stream.region, stream.factors))


def _may_copy(rule: RotateResidual, stream: Stream) -> Breach | None:
    if rule.untie:
        return None
    for fold in stream.folds.values():
        uses = [
            use for reader in fold.region.readers for use in right_factor(reader.node, DIAGONAL_AND_SHIFT).constants
        ]
        for use in uses:
            if (other := read_elsewhere(use, uses)) is not None:
                return Breach(other, f"{use.value.name} is tied, and would be copied to take γ in")
    return None


def _matrices(fold: Affine) -> list[Region]:
    """What the readers of a norm multiply its result with."""
    return [right_factor(reader.node, DIAGONAL_AND_SHIFT) for reader in fold.region.readers]


def _border_norms(region: Region) -> tuple[ir.Node, ...]:
    return (*(use.node for use in region.norms), *region.writing_norms)


@dataclass(frozen=True)
class RotateResidual(Pass[Stream]):
    """The stream in another orthonormal basis: writers absorb Q, readers Qᵀ.

    `seed` draws Q. `kind` is "hadamard" (random signs and a Hadamard matrix; random where there is none of that size)
    or "random" (uniform over all orthogonal matrices). `untie` allows a tied table to be copied for the γ of a norm.
    """

    seed: int = 0
    kind: Literal["hadamard", "random"] = "hadamard"
    untie: bool = True

    name: ClassVar[str] = "rotate-residual"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "every norm of the stream is an RMSNorm", _no_layernorm),
        Requirement("R2", "no norm writes the stream, unless with a constant γ", _no_scaled_writer),
        Requirement("R3", "a norm that reads it has a constant γ, or one that its readers can take in", _scales_fold),
        Requirement("R4", "no input or output of the graph is in the stream", _hidden_from_outside),
        Requirement("R5", "the stream's constants cannot be overridden", _own_constants),
        Requirement("R6", "every other operator in it commutes with Q", _all_commute),
        Requirement("R7", "every reader multiplies it with constants, and no one else reads those", _constant_readers),
        Requirement("R8", "no table is copied, unless that is allowed", _may_copy),
    )

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "random"):
            raise ValueError(f"kind is 'hadamard' or 'random', not {self.kind!r}")
        if self.seed < 0:
            raise ValueError(f"a seed is not negative, {self.seed} is")

    def sites(self, program: Program) -> Iterator[Stream]:
        seen: set[ir.Value] = set()
        for norm in [node for node in program.model.graph if is_operator(node, *NORMS)]:
            if norm.graph is None or not norm.inputs or (value := norm.inputs[0]) is None or value in seen:
                continue
            region = grow(value, len(shape_of(value) or ()) - 1, ORTHOGONAL)
            seen.update(region.axes)
            if is_done(region, program, self.name):
                continue
            border = {use.node for use in region.norms}
            folds = {fold.norm: fold for fold in FoldNorm().sites(program) if fold.norm in border} if border else {}
            nodes = _norms_of(region) or (norm,)
            yield Stream(value.name or "", nodes, region, factors(region, ORTHOGONAL), folds)

    def rewrite(self, site: Stream, change: Change) -> None:
        seed, axis = site.region.seed, site.region.axes[site.region.seed]
        for fold in site.folds.values():
            FoldNorm().rewrite(fold, change)
        change.editor.clean()
        region = grow(seed, axis, ORTHOGONAL) if site.folds else site.region
        turn = self.transform(region.size)
        readers = factors(region, ORTHOGONAL)
        absorb(change, region.constants, turn, "rotated")
        absorb(change, [use for factor in readers for use in factor.constants], turn.dual, "rotated")
        for value, place in region.axes.items():
            change.relate(value, turn, place)
        for value in dict.fromkeys(value for factor in readers for value in factor.axes):
            change.rename(value, "rotated")
        change.notes.append(f"{len(_norms_of(region))} norms read the stream rotated ({turn.kind}, {region.size})")

    def transform(self, size: int) -> Transform:
        """Q for a stream of `size` channels."""
        if self.kind == "hadamard" and parts(size) is not None:
            return Hadamard(size, self.seed)
        return Orthogonal(random_orthogonal(size, self.seed))


def absorb(change: Change, uses: list[Use], transform: Transform, suffix: str) -> None:
    """Let every operand of `uses` hold its constant times `transform`; one constant, changed alike, stays one."""
    for use in dict.fromkeys(uses):
        weight = Transformed(weight_behind(use.value), transform, use.axis)
        change.absorb(use, weight, suffix, key=(transform.key, use.axis))


def random_orthogonal(size: int, seed: int) -> np.ndarray:
    """An orthogonal matrix (size, size), float64, uniform over all of them.

    It is the Q of a normal matrix's QR, with R's diagonal positive.

    Source: Mezzadri 2007, arXiv:math-ph/0609050, §5.
    """
    matrix = np.random.default_rng(seed).normal(size=(size, size))
    turned, triangle = np.linalg.qr(matrix)
    return turned * np.where(np.diagonal(triangle) < 0, -1.0, 1.0)


def _norms_of(region: Region) -> tuple[ir.Node, ...]:
    """All norms that read the stream: those inside it, and those at its border."""
    inside = [node for node in region.nodes if is_operator(node, *NORMS) and operand(node, 0) in region.axes]
    return tuple(dict.fromkeys((*inside, *(use.node for use in region.norms))))


def is_done(region: Region, program: Program, name: str) -> bool:
    """Whether the pass `name` has transformed a value of the region."""
    relations = (program.relations.get(value.name or "") for value in region.axes)
    return any(step["pass"] == name for relation in relations for step in steps(relation))
