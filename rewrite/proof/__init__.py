"""The proof that a rewritten network computes the original's function over the reals.

Read `relation.py` first: it says what "equal" means. `forms.py` is the normal form both graphs are brought to,
`rules.py` the table that brings them there, `linear.py` the comparison of constants, `checker.py` the walk over both.
This package imports nothing else of ours, neither torch nor ONNX Runtime: whoever trusts it need read no further.
"""

from rewrite.proof import blocked_rules, quantized_products, runtime_rules, windows
from rewrite.proof.checker import Proof, prove
from rewrite.proof.relation import Verdict
from rewrite.proof.sites import Site

__all__ = ["Proof", "Site", "Verdict", "blocked_rules", "prove", "quantized_products", "runtime_rules", "windows"]
