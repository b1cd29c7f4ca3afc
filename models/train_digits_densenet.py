"""Train digits-densenet, a DenseNet of BN → ReLU → convolution with concatenation, on 8 × 8 digits."""

from rewrite.models.archive import save
from rewrite.models.digits_convolutional import DenseNet
from rewrite.models.training import arguments, train_on_digits

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=1200)
    model = DenseNet()
    train_on_digits(model, chosen, learning_rate=3e-3)
    save(model, "digits-densenet", chosen.out)
