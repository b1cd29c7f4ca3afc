"""Train bytegpt, a Pre-LN GPT-2 over bytes, on the sources of Python's standard library."""

from transformers import GPT2Config, GPT2LMHeadModel

from rewrite.models.byte_data import CONTEXT, corpus, training_batches
from rewrite.models.byte_tokenizer import save_byte_tokenizer
from rewrite.models.evaluate import bits_per_byte, predictor
from rewrite.models.training import arguments, train

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=2600)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=CONTEXT,
            n_embd=192,
            n_layer=5,
            n_head=6,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    held_out = corpus("held-out")
    train(
        model,
        training_batches(batch=8, context=CONTEXT, seed=chosen.seed),
        lambda: bits_per_byte(predictor(model), held_out, CONTEXT, count=64),
        steps=chosen.steps,
        learning_rate=2e-3,
    )
    model.save_pretrained(chosen.out)
    save_byte_tokenizer(chosen.out)
