"""Train digits-conv3d, a 3-D convolutional network, on short clips of digits that move."""

from rewrite.models.archive import save
from rewrite.models.digits_convolutional import Conv3dNet
from rewrite.models.digits_data import as_clips, digits, training_batches
from rewrite.models.evaluate import accuracy, predictor
from rewrite.models.training import arguments, train

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=1000)
    model = Conv3dNet()
    images, labels = digits("held-out")
    train(
        model,
        ((as_clips(batch), targets) for batch, targets in training_batches(batch=32, seed=chosen.seed)),
        lambda: accuracy(predictor(model), as_clips(images), labels),
        steps=chosen.steps,
        learning_rate=3e-3,
        label_smoothing=0.1,
    )
    save(model, "digits-conv3d", chosen.out)
