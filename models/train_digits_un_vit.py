"""Train digits-un-vit, a vision transformer with Unified Normalization, on 8 × 8 digits."""

from rewrite.models.archive import save
from rewrite.models.digits_transformers import UnifiedNorm, VisionTransformer
from rewrite.models.training import arguments, train_on_digits

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=3000)
    model = VisionTransformer(UnifiedNorm)
    train_on_digits(model, chosen, learning_rate=2e-3)
    save(model, "digits-un-vit", chosen.out)
