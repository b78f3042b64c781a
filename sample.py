"""
Text from a trained run.

    python sample.py --run d12_post_norm_qk_norm --prompt "To be, or not to be"

Exit codes: 0 done, 2 bad option or no such run, 4 checkpoints present but none valid, 7 no tokenizer, 130 Ctrl-C.
"""

import codecs
import sys
from dataclasses import dataclass

import torch
import tyro

import checkpoint
import machine
from data.tokenizer import EOT, gpt2
from kv_cache import KVCache
from model import GPT
from rundir import BAD_OPTION, INTERRUPTED, BadOption, NoValidCheckpoint


@dataclass(frozen=True)
class SampleConfig:
    """What to write. ValueError for a value out of range."""

    run: str
    """name of a run under out_dir, or the path of its directory; the newest valid checkpoint is read"""
    prompt: str = ""
    """what the text begins with; empty: the start of a document"""
    n_samples: int = 1
    """how many texts"""
    max_new_tokens: int = 200
    """length of each; a text also ends where the model ends the document"""
    temperature: float = 0.8
    """the logits are divided by it; 0 takes the most likely token each time"""
    top_k: int = 0
    """choose among the k most likely tokens; 0 = all"""
    top_p: float = 1.0
    """choose among the fewest tokens whose probabilities add up to p (arXiv 1904.09751)"""
    seed: int = 0
    """same seed, same texts; sample i of a seed does not depend on n_samples"""
    out_dir: str = "runs"
    """where the run directories are"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self):
        for name, least in {"n_samples": 1, "max_new_tokens": 1, "top_k": 0, "seed": 0}.items():
            if not least <= getattr(self, name) <= 2**40:
                raise ValueError(f"{name}={getattr(self, name)} must lie between {least} and 2^40")
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(f"temperature={self.temperature} must be 0 or lie between 0.001 and 1000")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be more than 0 and at most 1")


def choose(logits, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token id by its logits, float32 (n,) on the CPU."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(dim=0).sort(descending=True)
    keep = probabilities.cumsum(dim=0) - probabilities < top_p  # what comes before a token leaves room for it
    keep[0] = True  # however small top_p is
    keep[top_k or len(keep) :] = False
    chosen = torch.multinomial(probabilities * keep, 1, generator=generator)
    return int(ids[chosen])


def generate(model: GPT, tokens: list[int], n_vocab: int, config: SampleConfig, seed: int, device: torch.device):
    """Yields up to max_new_tokens token ids that continue `tokens`, each below n_vocab; stops before <|endoftext|>."""
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model, len(tokens) + config.max_new_tokens)
    for _ in range(config.max_new_tokens):
        logits = cache.feed(torch.tensor([tokens], device=device))[0, :n_vocab]
        token = choose(logits.float().cpu(), config.temperature, config.top_k, config.top_p, generator)
        if token == EOT:
            return
        yield token
        tokens = [token]


def sample(config: SampleConfig):
    """Prints the texts as they come. Raises BadOption, NoValidCheckpoint or DataError."""
    device = machine.select_device(config.device)
    newest = checkpoint.find(config.run, config.out_dir)
    if checkpoint.read_state(newest)["tokenizer"] != "gpt2":
        raise BadOption(f"{newest} was not trained on GPT-2 tokens: its output cannot be turned into text")
    model = checkpoint.load_model(newest, device)
    tokenizer = gpt2()
    tokens = tokenizer.encode_ordinary(config.prompt) or [EOT]  # what begins a document
    for i in range(config.n_samples):
        print(f"--- {newest}, seed {config.seed}, sample {i + 1} of {config.n_samples}")
        print(config.prompt, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character can span several tokens
        for token in generate(model, tokens, tokenizer.n_vocab, config, 1_000_003 * config.seed + i, device):
            print(decoder.decode(tokenizer.decode_single_token_bytes(token)), end="", flush=True)
        print(decoder.decode(b"", final=True))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    config = tyro.cli(SampleConfig, args=arguments, description=__doc__, use_underscores=True)
    try:
        sample(config)
    except (ValueError, OSError, NoValidCheckpoint) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_OPTION)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
