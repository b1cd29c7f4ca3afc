"""Train digits-conv3d, a 3-D convolutional network, on short clips of digits that move."""

from rewrite.models.archive import save
from rewrite.models.digits_convolutional import Conv3dNet
from rewrite.models.digits_data import as_clips
from rewrite.models.training import arguments, train_on_digits

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=1000)
    model = Conv3dNet()
    train_on_digits(model, chosen, learning_rate=3e-3, batch=32, inputs=as_clips)
    save(model, "digits-conv3d", chosen.out)
