"""Train digits-resnet, a ResNet of basic blocks with BatchNorm, on 8 × 8 digits."""

from transformers import ResNetConfig, ResNetForImageClassification

from rewrite.models.digits_data import digits, training_batches
from rewrite.models.evaluate import accuracy, predictor
from rewrite.models.training import arguments, train

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=2000)
    model = ResNetForImageClassification(
        # The stem leaves 2 × 2 of 8 × 8 pixels: most blocks keep that size, and one halves it.
        ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[64, 128],
            depths=[3, 1],
            layer_type="basic",
            num_labels=10,
            image_size=8,
        )
    )
    train(
        model,
        training_batches(batch=64, seed=chosen.seed),
        lambda: accuracy(predictor(model), *digits("held-out")),
        steps=chosen.steps,
        learning_rate=2e-3,
        label_smoothing=0.1,
    )
    model.save_pretrained(chosen.out)
