"""What a training step holds in GPU memory, in closed form."""

from model import GPT

MIB = 2**20


def predict_training_mib(model: GPT, batch_size: int, sequence_length: int) -> float:
    """
    Predicted peak of a compiled bf16 step with AdamW on CUDA, in MiB. Weights, gradients and both moments are float32.
    Activations count what backward needs, in bf16 and in units of (tokens, C) tensors; logits are there as bf16 logits
    and their gradient.
    """
    config, tokens, n_params = model.config, batch_size * sequence_length, model.num_params()
    per_layer = 12 + 2 * config.post_norm + 2 * config.qk_norm
    states = 16 * n_params
    activations = 2 * tokens * config.n_embd * per_layer * config.n_layer
    logits = 4 * tokens * config.vocab_size
    return (states + activations + logits) / MIB
