"""Train digits-vit, a Pre-LN vision transformer with convolutional patches and a class token, on 8 × 8 digits."""

from transformers import ViTConfig, ViTForImageClassification

from rewrite.models.digits_data import digits, training_batches
from rewrite.models.evaluate import accuracy, predictor
from rewrite.models.training import arguments, train

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=4000)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            num_labels=10,
        )
    )
    train(
        model,
        training_batches(batch=64, seed=chosen.seed),
        lambda: accuracy(predictor(model), *digits("held-out")),
        steps=chosen.steps,
        learning_rate=1e-3,
        label_smoothing=0.1,
    )
    model.save_pretrained(chosen.out)
