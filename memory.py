"""What a training step holds in GPU memory, in closed form."""

from model import GPT

MIB = 2**20


def predict_training_mib(model: GPT, batch_size: int, sequence_length: int) -> float:
    """
    Predicted peak of a compiled bf16 step with AdamW on CUDA, in MiB; docs/experiments.md has it beside measured peaks.

    For each parameter: float32 weight, gradient and two moments, and the bf16 copy that the products read. For the
    tied matrix: its gradients as embedding and as head, before they are added. For each token: bf16 logits and their
    gradient, and in each layer 12 vectors of n_embd in bf16, with post_norm 14: what backward needs.
    """
    config, tokens = model.config, batch_size * sequence_length
    parameters = (16 + 2) * model.num_params() + 8 * config.vocab_size * config.n_embd
    logits = 4 * tokens * config.vocab_size
    vectors_per_layer = 14 if config.post_norm and config.pre_norm else 12
    activations = 2 * tokens * config.n_embd * vectors_per_layer * config.n_layer
    return (parameters + logits + activations) / MIB
