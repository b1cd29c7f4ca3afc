"""Train bytellama, a Llama over bytes with grouped queries and a tied head, on the sources of Python's library."""

from transformers import LlamaConfig, LlamaForCausalLM

from rewrite.models.byte_data import CONTEXT, corpus, training_batches
from rewrite.models.byte_tokenizer import save_byte_tokenizer
from rewrite.models.evaluate import bits_per_byte, predictor
from rewrite.models.training import arguments, train

if __name__ == "__main__":
    chosen = arguments(__doc__, steps=2200)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            max_position_embeddings=CONTEXT,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
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
