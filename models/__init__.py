if __name__ == "models":
    raise ImportError(
        "imported as 'models', expected 'rewrite.models': the bare name belongs to other projects' checkpoints; "
        "write `import rewrite.models` and take the repository root off sys.path"
    )

__doc__ = """Small reference networks, the script that trained each, and their trained weights.

    bytegpt         GPT-2: Pre-LN, LayerNorm, GELU, learned positions      Python sources, bytes
    bytellama       Llama: RMSNorm, rotary positions, GQA, SwiGLU          Python sources, bytes
    digits-vit      ViT: convolutional patches, class token, LayerNorm     8 × 8 digits
    digits-resnet   ResNet: convolutions and BatchNorm, basic blocks       8 × 8 digits

Networks that are affine at inference where they were not in training, as plain modules:

    digits-repvgg       3 × 3, 1 × 1 and identity branches, each with BatchNorm     8 × 8 digits
    digits-densenet     BatchNorm → ReLU → convolution, concatenated                8 × 8 digits
    digits-mobilenet    depthwise convolutions, inverted residuals, ReLU6           8 × 8 digits
    digits-conv1d       normalized input, Conformer modules, dilation               rows of digits
    digits-conv3d       3-D and (2 + 1)-D convolutions                              moving digits
    digits-decoder      autoencoder: transposed convolutions and BatchNorm          8 × 8 digits
    digits-prepbn-vit   ViT: LayerNorm replaced by BN(x) + αx in training (SLAB)    8 × 8 digits
    digits-un-vit       ViT: Unified Normalization                                  8 × 8 digits

`train_NAME.py` writes a folder that `from_pretrained` of transformers opens without a network, or, of a plain module,
its weights and the exported program (`reference.py`, `archive.py`); `checkpoints/NAME/` is that folder with a card
(README.md). `evaluate.py` measures the numbers on the cards again, and those of a converted network.
`calibration.py` writes data to calibrate them on, `byte_tokenizer.py` the tokenizer of the language models.
The weights are trained, because random ones hide mistakes: a fresh LayerNorm has γ = 1 and β = 0, a fresh
BatchNorm has mean 0 and variance 1, and a wrong rewrite of either can still give the right answer.
"""
