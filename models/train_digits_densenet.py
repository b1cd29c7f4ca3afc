"""Train digits-densenet, a DenseNet of BN → ReLU → convolution with concatenation, on 8 × 8 digits."""

from rewrite.models.archive import save
from rewrite.models.digits_convolutional import DenseNet
from rewrite.models.digits_data import digits, training_batches
from rewrite.models.evaluate import accuracy, predictor
from rewrite.models.training import arguments, train

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=1200)
    model = DenseNet()
    train(
        model,
        training_batches(batch=64, seed=chosen.seed),
        lambda: accuracy(predictor(model), *digits("held-out")),
        steps=chosen.steps,
        learning_rate=3e-3,
        label_smoothing=0.1,
    )
    save(model, "digits-densenet", chosen.out)
