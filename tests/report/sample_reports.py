"""Reports with something in every section, for the tests of this folder."""

from __future__ import annotations

import math
from dataclasses import replace

from rewrite.check.approximation import Approximation, FloatWeight, Histogram, OutputQuality, SiteQuality
from rewrite.check.faithful import AS_DECLARED, RuntimeCheck
from rewrite.report.report import LayerRow, OutputRow, Report, SiteRow, Sizes


def good_report() -> Report:
    """A twelve-layer language model, centred and proved."""
    sites = [
        SiteRow("center-residual", "embeddings", "applied", notes=("25 LayerNormalization became RMSNormalization",))
    ]
    sites += [SiteRow("fold-norm", f"h.{i}.ln_1", "applied") for i in range(12)]
    sites += [
        SiteRow(
            "fold-norm", f"h.{i}.ln_2", "refused", "R4", "every reader of the norm is a matrix product",
            f"node_attention_{i}", "Attention", "an attention reads the norm directly",
        )
        for i in range(12)
    ]  # fmt: skip
    sites.append(
        SiteRow(
            "compress-residual",
            "embeddings",
            "refused",
            "R7",
            "the target gains from d − 1 channels",
            "node_matmul_0",
            "MatMul",
            "767 channels break the alignment that the kernels like",
        )
    )
    outputs = [
        OutputRow("logits", name, "within noise", noise, 2e-8, 3e-7, 4.1e-6, 3.2, 1.0, 131.4, "", 2e-13, 1.0, 1.0, 0.01)
        for name, noise in (("1 × 7", 0.94), ("2 × 16", 1.02), ("3 × 33", 1.1), ("padded left", 0.98))
    ]
    layers = [
        LayerRow(
            f"h.{i // 5}.{('ln_1', 'attention', 'ln_2', 'mlp', 'residual')[i % 5]}",
            3e-8 * (1 + i / 20) * (1.6 + math.sin(2.1 * i)),
            2e-7 * (1 + i / 15),
            node=f"node_{i}",
            operator="MatMul",
            relation="centre" if i % 5 == 4 else "identity",
        )
        for i in range(60)
    ]
    return Report(
        source="checkpoints/gpt2",
        target="ort-cpu",
        verdict="EQUAL(0.5 ulp)",
        detail="There are constants within 0.5 ulp of the shipped ones for which both networks compute the same "
        "function over the reals.",
        numerical="within noise",
        sites=tuple(sites),
        outputs=tuple(outputs),
        layers=tuple(layers),
        skipped={"new": 37, "of integers": 120},
        timings_s={"capture": 12.4, "passes": 0.8, "proof": 3.1, "lower": 1.9, "check": 7.45},
        sizes=Sizes(497_759_232, 652_148_736, 154_389_504),
        warnings=("transformer.wte.weight was tied to lm_head.weight and is now a copy of it",),
        proof={"certificate": "certificate.json", "relations": "centring of 61 values"},
        environment={"rewrite": "0.1.0", "onnx": "1.23.2", "onnxruntime": "1.31.1", "machine": "2 cores"},
    )


def bad_report() -> Report:
    """A refuted rewrite whose texts all try to break out of the page."""
    hostile = "<script>alert('&')</script>\""
    return Report(
        source=hostile,
        verdict=f"REFUTED({hostile})",
        target=hostile,
        detail=hostile,
        numerical="different",
        sites=(
            SiteRow(hostile, hostile, "refused", hostile, hostile, hostile, hostile, hostile),
            SiteRow(hostile, hostile, "applied", notes=(hostile,)),
        ),
        outputs=(
            OutputRow(
                hostile, hostile, "different", math.inf, math.nan, math.nan, math.nan, math.nan, math.nan, -math.inf,
                f"3 entries are not finite {hostile}",
            ),
        ),
        layers=(LayerRow(hostile, 0.02, 1e-7, True, hostile, hostile, hostile, hostile), LayerRow("b", 0.0, 0.0)),
        skipped={hostile: 1},
        timings_s={hostile: 0.0},
        warnings=(hostile,),
        proof={hostile: hostile},
        environment={hostile: hostile},
    )  # fmt: skip


def approximated_report(verdict: str = AS_DECLARED) -> Report:
    """An int8 model with one site not measured and a weight that stayed."""
    shown = Histogram(-1.0, 2.0, tuple(range(64)), 7.5)
    site = SiteQuality(
        name="h.0.mlp.weight",
        values=("h.0.mlp",),
        codes=("h.0.mlp.weight.codes", "h.0.mlp.weight.scales"),
        operator="DynamicQuantizeMatMul",
        format="int8 per channel",
        activations="uint8 dynamic",
        elements=4096,
        bytes=4352,
        weight_sqnr_db=42.5,
        activation_sqnr_db=38.25,
        product_sqnr_db=37.75,
        end_to_end_sqnr_db=31.0,
        error=1e-4,
        share=1.0,
        weight={"original": shown, "rewritten": shown, "stored": shown},
        activation={"rewritten": shown},
    )
    others = [
        replace(site, name=f"h.{i}.mlp.weight", error=None, share=None, weight={}, activation={}) for i in range(1, 30)
    ]
    found = Approximation(
        outputs=(OutputQuality("logits", 4, 33.25, 0.5, 0.02, 64, 1e-3, 2e-2, 0.984375, 0.95),),
        runtime=RuntimeCheck(verdict, "", "logits", 2e-7, 2e-7, 1e-7, 8e-7, 4096, 3, 5, 2),
        sites=(site, *others),
        kept=(FloatWeight("embeddings", 1000, 4000, "rows of it are looked up"),),
        bytes_before=1 << 20,
        bytes_after=1 << 18,
        declared=(
            {
                "name": "h.0.mlp.weight.codes",
                "kind": "weight",
                "node": "matmul",
                "format": "int8 per column",
                "scale": [0.001, 0.02],
                "error_steps": 0.5,
                "error_relative": 0.006,
                "saturation": "none",
            },
            {"name": "h.0.ln_2", "kind": "activation", "node": "matmul", "format": "uint8", "scale": None},
        ),
    )
    return replace(good_report(), verdict="EQUAL_MODULO(2 sites)").with_approximation(found)
