"""
Text from a trained run.

    python sample.py --run d12_post_norm_qk_norm --prompt "To be, or not to be"

Exit codes: 0 done, 1 out of memory or a bug, 2 bad option or no such run, 4 checkpoints present but none valid,
7 no tokenizer, 130 Ctrl-C.
"""

import codecs
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

import checkpoint
import machine
from data.tokenizer import EOT, gpt2
from kernels.compiling import SlowPath, compiles
from kernels.kv_cache import KVCache, Recompute
from rundir import BAD_OPTION, INTERRUPTED, BadOption, NoValidCheckpoint

COMPILE_FROM_TOKENS = 20_000  # below, compiling takes longer than it saves
WARM_UP_TOKENS = 10  # not in the tokens/s: the first of them compile and capture


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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where it runs; auto: CUDA, MPS or CPU, whichever there is"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of weights and cache; auto is bfloat16 on GPUs that compute it, else float32"""
    compile: Literal["auto", "on", "off"] = "auto"
    """on CUDA: fuse the kernels of a step, some 20 s once; auto does from 20,000 tokens on"""

    recompute: bool = False
    """without a cache, every token from all tokens before it: slow, for comparison"""

    def __post_init__(self):
        for name, least in {"n_samples": 1, "max_new_tokens": 1, "top_k": 0, "seed": 0}.items():
            if not least <= getattr(self, name) <= 2**40:
                raise ValueError(f"{name}={getattr(self, name)} must lie between {least} and 2^40")
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(f"temperature={self.temperature} must be 0 or lie between 0.001 and 1000")
        if self.recompute and self.compile == "on":
            raise ValueError("compile=on has no use with recompute: every length would be compiled anew")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be more than 0 and at most 1")


def choose(logits, temperature: float, top_k: int, top_p: float, u: float):
    """One token id, int64 (1, 1), by its logits, float32 (1, n); u: a random number, uniform in [0, 1)."""
    if temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    probabilities, ids = (logits / temperature).softmax(dim=1).sort(dim=1, descending=True)
    total = probabilities.cumsum(dim=1)
    n_kept = (total - probabilities < top_p).sum(dim=1, keepdim=True)  # what comes before a token leaves room for it
    n_kept = n_kept.clamp(min=1, max=top_k or None)  # at least one, however small top_p is
    chosen = torch.searchsorted(total, u * total.gather(1, n_kept - 1), right=True)
    return ids.gather(1, chosen.minimum(n_kept - 1))


def generate(cache: KVCache | Recompute, tokens: list[int], n_vocab: int, config: SampleConfig, seed: int):
    """Yields up to max_new_tokens token ids that continue `tokens`, each below n_vocab; stops before <|endoftext|>."""
    generator = torch.Generator().manual_seed(seed)
    device = cache.device
    copied = torch.cuda.Event() if device.type == "cuda" else None
    token_here = torch.empty(1, 1, dtype=torch.int64, pin_memory=copied is not None)
    cache.clear()
    logits = cache.feed(torch.tensor([tokens], device=device))
    for i in range(config.max_new_tokens):
        u = torch.rand((), generator=generator).item()
        token = choose(logits[:, :n_vocab].float(), config.temperature, config.top_k, config.top_p, u)
        token_here.copy_(token, non_blocking=True)
        if copied:
            copied.record()
        if i + 1 < config.max_new_tokens:
            logits = cache.feed(token)  # a GPU is busy with the next token while this one is looked at
        if copied:
            copied.synchronize()
        if int(token_here) == EOT:
            return
        yield int(token_here)


def sample(config: SampleConfig):
    """Prints the texts as they come. Raises BadOption, NoValidCheckpoint or DataError."""
    device = machine.select_device(config.device)
    newest = checkpoint.find(config.run, config.out_dir)
    if checkpoint.read_state(newest).get("tokenizer") != "gpt2":
        raise BadOption(f"{newest} was not trained on GPT-2 tokens: its output cannot be turned into text")
    model = checkpoint.load_model(newest, device).to(machine.matmul_dtype(device, config.dtype))
    tokenizer = gpt2()
    tokens = tokenizer.encode_ordinary(config.prompt) or [EOT]  # what begins a document
    many = config.n_samples * config.max_new_tokens >= COMPILE_FROM_TOKENS
    compiled = compiles(config.compile, device) and (many or config.compile == "on")
    n_tokens = len(tokens) + config.max_new_tokens
    cache = Recompute(model) if config.recompute else KVCache(model, n_tokens, compiled=compiled)
    for i in range(config.n_samples):
        print(f"--- {newest}, seed {config.seed}, sample {i + 1} of {config.n_samples}")
        print(config.prompt, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character can span several tokens
        times = []  # when each token came
        for token in generate(cache, tokens, tokenizer.n_vocab, config, 1_000_003 * config.seed + i):
            times.append(time.perf_counter())
            print(decoder.decode(tokenizer.decode_single_token_bytes(token)), end="", flush=True)
        print(decoder.decode(b"", final=True))
        if len(times) > WARM_UP_TOKENS + 1:
            rate = (len(times) - WARM_UP_TOKENS - 1) / (times[-1] - times[WARM_UP_TOKENS])
            print(f"{len(times)} tokens, {rate:,.0f} tokens/s", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    config = tyro.cli(SampleConfig, args=arguments, description=__doc__, use_underscores=True)
    try:
        sample(config)
    except (ValueError, OSError, NoValidCheckpoint, SlowPath) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_OPTION)
    except RuntimeError as error:
        if not machine.is_out_of_memory(error):
            raise
        print(f"error: out of memory: fewer --max_new_tokens? ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
