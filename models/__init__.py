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

`train_NAME.py` writes a folder that `from_pretrained` of transformers opens without a network;
`checkpoints/NAME/` is that folder with a card (README.md). `evaluate.py` measures the numbers on the cards again.
The weights are trained, because random ones hide mistakes: a fresh LayerNorm has γ = 1 and β = 0, a fresh
BatchNorm has mean 0 and variance 1, and a wrong rewrite of either can still give the right answer.
"""
