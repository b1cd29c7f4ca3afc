"""Train digits-mobilenet, depthwise convolutions and inverted residuals with ReLU6, on 8 × 8 digits."""

from torch import nn

from rewrite.models.archive import save
from rewrite.models.digits_convolutional import InvertedResidual, MobileNet
from rewrite.models.digits_data import digits, training_batches
from rewrite.models.evaluate import accuracy, predictor
from rewrite.models.training import arguments, train

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=1500)
    model = MobileNet()
    for part in model.modules():
        # The BatchNorm behind the next convolution takes a projection's bias away again, so that training leaves it at
        # its initial 0, where a rewrite that forgets it is not seen.
        if isinstance(part, InvertedResidual):
            nn.init.normal_(part.norm_project.bias, std=0.2)
    train(
        model,
        training_batches(batch=64, seed=chosen.seed),
        lambda: accuracy(predictor(model), *digits("held-out")),
        steps=chosen.steps,
        learning_rate=3e-3,
        label_smoothing=0.1,
    )
    save(model, "digits-mobilenet", chosen.out)
