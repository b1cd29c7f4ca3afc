"""Train digits-mobilenet, depthwise convolutions and inverted residuals with ReLU6, on 8 × 8 digits."""

from torch import nn

from rewrite.models.archive import save
from rewrite.models.digits_convolutional import InvertedResidual, MobileNet
from rewrite.models.training import arguments, train_on_digits

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=1500)
    model = MobileNet()
    for part in model.modules():
        # The BatchNorm behind the next convolution takes a projection's bias away again, so that training leaves it at
        # its initial 0, where a rewrite that forgets it is not seen.
        if isinstance(part, InvertedResidual):
            nn.init.normal_(part.norm_project.bias, std=0.2)
    train_on_digits(model, chosen, learning_rate=3e-3)
    save(model, "digits-mobilenet", chosen.out)
