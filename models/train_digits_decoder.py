"""Train digits-decoder, an autoencoder with a decoder of transposed convolutions, on 8 × 8 digits."""

from torch.nn.functional import mse_loss

from rewrite.models.archive import save
from rewrite.models.digits_convolutional import Autoencoder
from rewrite.models.digits_data import digits, training_batches
from rewrite.models.evaluate import predictor, squared_error
from rewrite.models.training import arguments, train

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=4000)
    model = Autoencoder()
    train(
        model,
        ((images, images) for images, _ in training_batches(batch=64, seed=chosen.seed)),
        lambda: squared_error(predictor(model), digits("held-out")[0]),
        steps=chosen.steps,
        learning_rate=3e-3,
        weight_decay=0.01,
        loss=mse_loss,
    )
    save(model, "digits-decoder", chosen.out)
