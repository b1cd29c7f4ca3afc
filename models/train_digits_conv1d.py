"""Train digits-conv1d, a network of the convolutions of speech models, on the rows of digits as steps in time."""

import numpy as np
import torch

from rewrite.models.archive import save
from rewrite.models.digits_convolutional import Conv1dNet
from rewrite.models.digits_data import as_frames, digits
from rewrite.models.training import arguments, train_on_digits

# The first column of pixels is nearly always empty; divided by its deviation it would be all that is seen.
SMALLEST_DEVIATION = 0.1

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=2500)
    model = Conv1dNet()
    seen = as_frames(digits("train")[0])
    model.mean.copy_(torch.from_numpy(seen.mean((0, 2)))[:, None])
    model.deviation.copy_(torch.from_numpy(np.maximum(seen.std((0, 2)), SMALLEST_DEVIATION))[:, None])
    train_on_digits(model, chosen, learning_rate=3e-3, inputs=as_frames)
    save(model, "digits-conv1d", chosen.out)
