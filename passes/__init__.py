if __name__ == "passes":
    raise ImportError(
        "imported as 'passes', expected 'rewrite.passes': the bare name belongs to other projects; "
        "write `import rewrite.passes` and take the repository root off sys.path"
    )

__doc__ = """The equivalences and the approximations, one file each, in the order in which a recipe runs them.

A pass is a frozen dataclass whose fields are its options. File, class and command agree: `center_residual.py`,
`CenterResidual`, `center-residual`. Nothing is discovered: a pass exists when it stands in `PASSES` or
in `APPROXIMATIONS`.
"""

from rewrite.passes.affine_heads import AffineHeads
from rewrite.passes.center_residual import CenterResidual
from rewrite.passes.compress_residual import CompressResidual
from rewrite.passes.eliminate_dead_channels import EliminateDeadChannels
from rewrite.passes.equalize import Equalize
from rewrite.passes.fold_batchnorm import FoldBatchnorm
from rewrite.passes.fold_norm import FoldNorm
from rewrite.passes.fold_parametrization import FoldParametrization
from rewrite.passes.fold_scale import FoldScale
from rewrite.passes.merge_affine import MergeAffine
from rewrite.passes.merge_branches import MergeBranches
from rewrite.passes.merge_duplicate_channels import MergeDuplicateChannels
from rewrite.passes.quantize_dynamic import QuantizeDynamic
from rewrite.passes.quantize_operators import QuantizeOperators
from rewrite.passes.quantize_static import QuantizeStatic
from rewrite.passes.quantize_weights import QuantizeWeights
from rewrite.passes.reparameterize_norm_scale import ReparameterizeNormScale
from rewrite.passes.rotate_heads import RotateHeads
from rewrite.passes.rotate_online import RotateOnline
from rewrite.passes.rotate_residual import RotateResidual
from rewrite.passes.scale_heads import ScaleHeads
from rewrite.passes.scale_query_key import ScaleQueryKey
from rewrite.passes.smooth import Smooth
from rewrite.passes.split_outliers import SplitOutliers
from rewrite.passes.stabilize_norm import StabilizeNorm

PASSES = (
    *(FoldParametrization, FoldBatchnorm, FoldScale, MergeAffine, MergeBranches),
    *(EliminateDeadChannels, MergeDuplicateChannels),
    *(CenterResidual, FoldNorm, CompressResidual, RotateResidual, StabilizeNorm),
    *(RotateHeads, ScaleHeads, AffineHeads, ScaleQueryKey),
    *(Smooth, Equalize, ReparameterizeNormScale),
    RotateOnline,
    SplitOutliers,
)
"""The equivalences, in the order of a recipe."""

APPROXIMATIONS = (QuantizeStatic, QuantizeOperators, QuantizeDynamic, QuantizeWeights)
"""What comes behind them: proved equal but for what they declare."""

__all__ = [
    "APPROXIMATIONS",
    "PASSES",
    "AffineHeads",
    "CenterResidual",
    "CompressResidual",
    "EliminateDeadChannels",
    "Equalize",
    "FoldBatchnorm",
    "FoldNorm",
    "FoldParametrization",
    "FoldScale",
    "MergeAffine",
    "MergeBranches",
    "MergeDuplicateChannels",
    "QuantizeDynamic",
    "QuantizeOperators",
    "QuantizeStatic",
    "QuantizeWeights",
    "ReparameterizeNormScale",
    "RotateHeads",
    "RotateOnline",
    "RotateResidual",
    "ScaleHeads",
    "ScaleQueryKey",
    "Smooth",
    "SplitOutliers",
    "StabilizeNorm",
]
