"""Train digits-repvgg, a RepVGG with all its branches, on 8 × 8 digits."""

from rewrite.models.archive import save
from rewrite.models.digits_convolutional import RepVGG
from rewrite.models.training import arguments, train_on_digits

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=1500)
    model = RepVGG()
    train_on_digits(model, chosen, learning_rate=3e-3)
    save(model, "digits-repvgg", chosen.out)
