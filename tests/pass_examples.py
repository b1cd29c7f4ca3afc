"""One golden network for each pass, where all its sites apply, and others that several tests share."""

PRE_LN = """
pre_ln (int64[B, S] ids, float[11, 8] table, float[7, 8] places, float[8] g1, float[8] b1, float[8, 8] w1, float[8] c1,
        float[8, 8] w2, float[8] c2, float[8] g2, float[8] b2, float[8, 12] w3, float[12, 8] w4, float[8] g3,
        float[8] b3, float[8] c3) => (float[B, S, 11] logits)
{
    tokens = Gather (table, ids)
    first = Constant <value_ints = [0, 1, 2, 3, 4]> ()
    positions = Gather (places, first)
    x0 = Add (tokens, positions)
    n1 = LayerNormalization (x0, g1, b1)
    h1 = MatMul (n1, w1)
    a1 = Add (h1, c1)
    r1 = Tanh (a1)
    o1 = MatMul (r1, w2)
    m1 = Add (o1, c2)
    x1 = Add (x0, m1)
    n2 = LayerNormalization <epsilon = 0.001> (x1, g2, b2)
    h2 = MatMul (n2, w3)
    r2 = Gelu (h2)
    o2 = MatMul (r2, w4)
    s2 = Add (c3, o2)
    x2 = Add (s2, x1)
    n3 = LayerNormalization (x2, g3, b3)
    head = Transpose <perm = [1, 0]> (table)
    logits = MatMul (n3, head)
}
"""
"""Pre-LN with a tied head, learned positions, biases here and there."""

LAYER_SCALE = """
layer_scale (float[B, 3, 4, 4] x, float[6, 3, 2, 2] kernel, float[6] kernel_bias, float[6, 1, 1] lambda0, float[6, 5] w,
             float[5] b, float[5] lambda1) => (float[B, 9, 5] y)
{
    patches = Conv <kernel_shape = [2, 2]> (x, kernel, kernel_bias)
    scaled = Mul (patches, lambda0)
    shape = Constant <value_ints = [0, 6, 9]> ()
    flat = Reshape (scaled, shape)
    rows = Transpose <perm = [0, 2, 1]> (flat)
    active = Tanh (rows)
    product = MatMul (active, w)
    biased = Add (product, b)
    halved = Mul (lambda1, biased)
    two = Constant <value_float = 2.0> ()
    y = Div (halved, two)
}
"""
"""A kernel with a factor a channel, a matrix with LayerScale and a number."""

EXAMPLES = {"center-residual": (PRE_LN, ("ids",)), "fold-norm": (PRE_LN, ("ids",)), "fold-scale": (LAYER_SCALE, ("x",))}
