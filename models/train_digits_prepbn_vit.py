"""Train digits-prepbn-vit, a vision transformer whose LayerNorms become RepBN step by step, on 8 × 8 digits."""

from rewrite.models.archive import save
from rewrite.models.digits_transformers import ProgressiveNorm, VisionTransformer, progressive_norms, reparameterized
from rewrite.models.training import arguments, train_on_digits

# λ is 0 from here on, so that the last part of the training is that of the network which is shipped.
REPLACED_AT = 0.6

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=3000)
    model = VisionTransformer(ProgressiveNorm)

    def replace(step: int) -> None:
        for norm in progressive_norms(model):
            norm.share = max(0.0, 1 - step / (REPLACED_AT * chosen.steps))

    train_on_digits(model, chosen, learning_rate=2e-3, before_step=replace)
    save(reparameterized(model), "digits-prepbn-vit", chosen.out)
