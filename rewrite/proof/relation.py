"""What "equal" means here. Every rule, verdict and report inherits this page.

**The theorem.** Let W be the constants of the original, W′ those of the rewritten network as shipped. EQUAL(δ) says:
there are constants Ŵ, one for each shipped constant W′ and within δ ulps of it in its storage dtype, such that for
every input on which the original is finite, whatever sizes of at least 1 its symbolic dimensions have,

    rewritten(Ŵ)(x) = original(W)(x)      over the real numbers.

It is a backward-error statement: exact arithmetic, perturbed constants. It says nothing about rounding during
inference (`check/` measures that), and it does not grow with depth.

**δ.** The distance |W′ − Ŵ| in units in the last place of the storage dtype, at the largest term that was summed to
make the entry: an entry that cancels has no ulps of its own to speak of. The float64 error of computing Ŵ is bounded
and counted in. δ ≤ 1 is EQUAL; more is reported as what it is and is not EQUAL. A shipped entry is accepted by the
tighter test |W′ − Ŵ| ≤ 1 ulp *of Ŵ* plus that bound, so that a cancelling entry is not a hiding place.

**One initializer, one Ŵ.** A shipped tensor that is used twice must be given the same Ŵ by both uses: two demands that
are not the same expression of W are refused. This is what catches a tied embedding of which one side was changed.

**Constants of an operator's definition** (√(2/π) in Gelu, 1/√d in attention, ε in a norm) are real numbers on the side
where the operator stands, and float32 numbers where the definition was written out. The two are equal within 1 ulp of
float32, counted in δ like any other constant. Numbers that nobody wrote (a count, the −1 of Sub, the 1 of no factor at
all) are exact.

**Declared.** EQUAL_MODULO(…) is the same theorem under a condition that it names: constants within more than 1 ulp of
exact (other tools fold constants in float32, which rounds several times), or a layout that only the machine that wrote
the file knows. A conversion never asks for it; whoever compares two files of others may accept it or not.

**Codes.** A network that computes with codes is not the original, and EQUAL_MODULO(sites) says what it is besides
them. The erasure theorem: replace every dequantized constant W_q = (q − z)·s by the exact Ŵ that the other constants
leave to it, and every rounding of an activation to codes and back by nothing; then

    erased(Ŵ)(x) = original(W)(x)      over the real numbers, for every input, as above.

*A weight site* is measured: the largest |W_q − Ŵ| in steps (what one code is worth, the entry's scale) and
‖W_q − Ŵ‖_F/‖Ŵ‖_F over all entries. Steps are no ulps: δ stays that of the constants stored as numbers. Rounding to
nearest is within half a step and no convention of it beyond one; more is proved only where it was declared, and codes
that are no closer to Ŵ than zeros never are. With a certificate, formats, scales and both errors are what it declares.
*An activation site* is listed with its format, scale and zero point. How far rounding and saturation take a value is
not claimed: codes of x stand for x, so that a Relu which only a saturation replaces is missing, and nothing is proved.
A low-rank correction, or numbers beside codes that a mask or a selection tells apart, belong to the one site whose
codes are adjusted. Sums of an integer kernel fit into 32 bits for all inputs, or nothing is proved; where sums of two
products may leave 16 bits on processors without VNNI, the verdict names that condition (`accumulators.py`). Sites are
those of the rewritten network: what the original rounds is part of what it computes.

**The real numbers.** A value that does not exist in them (the logarithm of −1, 1/0) is undefined, and so is whatever
is computed from it: what IEEE arithmetic makes of an infinity on its way to a finite output is not looked at.

**What is not claimed.** That the rewritten network runs wherever the original does: an operator whose result it does
not use may still refuse its operands there. Casts between floating-point types of 16 bits and more are identities; to
fewer bits they are sites. Operators mean what they mean from opset 13 on.

**How it is proved.** Not by keeping a relation for each pair of values, as a change of basis is usually argued, but by
one normal form (`forms.py`): every value of either graph is an affine expression over the results of nonlinear
operators, with the affine maps kept as products of constants, unevaluated. In that form x·W·P and x·(WP) are the same
expression up to the arithmetic of constants, and the only question left is whether two products of constants are the
same matrix (`linear.py`). Nonlinear operators are equal when they are the same operator on equal operands. A change of
basis needs no rule of its own as long as it is undone before the next nonlinear operator; what commutes with a
nonlinear operator is a rule of that operator.

**Unknown means no.** An operator without a rule is an opaque function of its operands. Operators with subgraphs, random
ones, and whatever the normal form cannot express are never equal to anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["BITWISE", "EQUAL", "EQUAL_MODULO", "TESTED", "UNKNOWN", "REFUTED"]


@dataclass(frozen=True)
class Verdict:
    """An answer, strongest kind first: BITWISE, EQUAL, EQUAL_MODULO, TESTED, UNKNOWN, REFUTED.

    `ulps` is δ (for UNKNOWN, the δ that was too large, where that is the reason); `node` and `reason` say where a proof
    stopped. Only the first three are proofs: `holds`.
    """

    kind: Kind
    ulps: float = 0.0
    node: str = ""
    reason: str = ""

    @property
    def holds(self) -> bool:
        return self.kind in ("BITWISE", "EQUAL", "EQUAL_MODULO")

    def __str__(self) -> str:
        if self.kind == "EQUAL":
            return f"EQUAL({self.ulps:.2g} ulp)"
        if self.kind == "EQUAL_MODULO" and self.reason:
            return f"EQUAL_MODULO({self.reason})"
        if self.kind in ("UNKNOWN", "REFUTED"):
            return f"{self.kind}({', '.join(part for part in (self.node, self.reason) if part)})"
        return self.kind
