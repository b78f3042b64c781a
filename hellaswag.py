"""
HellaSwag (arXiv 1905.07830): a context and four endings, of which the model takes the one with the fewest nats.

Nats are minus the log-probability of an ending given its context, measured in three ways:
    acc             of the whole ending; `acc` of llm.c and of lm-evaluation-harness
    acc_per_token   divided by the ending's tokens; `acc_norm` of llm.c
    acc_per_byte    divided by its bytes; `acc_bytes` of lm-evaluation-harness, whose `acc_norm` divides by characters
The text is llm.c's, the tokens of `ctx` and then those of " " + ending, and figures compare with llm.c's.
lm-evaluation-harness changes it (the activity before the context, no marks such as [title]) and gets others: for
OpenAI's 124M model 28.9 and 31.1 %, where llm.c gets 28.6 and 29.6 %, as llm.c's dev/data/hellaswag.py has them.

The file is the published .jsonl, one example on each line, with these fields among others: `ctx`, `endings` (four
texts), `label` (number of the right one, from 0).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data.shards import prepare
from data.tokenizer import gpt2
from files import write_hashed
from kernels.fused import IGNORED
from rundir import DataError, NotFinite, writing

COMMIT = "a29ff8e9a04bba4bd6588223785ce105328adc57"
URL = f"https://raw.githubusercontent.com/rowanz/hellaswag/{COMMIT}/data/hellaswag_val.jsonl"
GIT_SHA1 = "0f5ee25d72216f12317d5d8a7b92deafa423d81e"  # of this file in that commit
N_ENDINGS = 4
SHORTEST = 64  # tokens, of a batch on a GPU

# -----------------------------------------------------------------------------
# the file


@dataclass(frozen=True)
class HellaSwag:
    """
    n examples with four endings each. rows: 4 n lists of token ids, context and ending of one after the other;
    n_tokens, n_bytes: of each ending, int64 (n, 4); labels: int64 (n,); sha256: of the file.
    """

    rows: list[list[int]]
    n_tokens: torch.Tensor
    n_bytes: torch.Tensor
    labels: torch.Tensor
    sha256: str


def read(path: Path) -> HellaSwag:
    """Raises DataError, with the line, for a file that is missing or not in the format, and for an empty one."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot read: {reason}; --hellaswag download fetches the published file") from None
    rows, n_tokens, n_bytes, labels = [], [], [], []
    for number, line in enumerate(content.rstrip().splitlines(), 1):
        try:
            context, endings, label = parse(line)
            n_bytes += [len(ending.encode()) for ending in endings]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: not an example of HellaSwag: {error}") from None
        context = gpt2().encode_ordinary(context)
        for ending in endings:
            tokens = gpt2().encode_ordinary(" " + ending)
            rows.append(context + tokens)
            n_tokens.append(len(tokens))
        labels.append(label)
    if not labels:
        raise DataError(f"{path}: empty: no example of HellaSwag")
    n_tokens, n_bytes = (torch.tensor(counts).view(-1, N_ENDINGS) for counts in (n_tokens, n_bytes))
    return HellaSwag(rows, n_tokens, n_bytes, torch.tensor(labels), hashlib.sha256(content).hexdigest())


def parse(line: bytes) -> tuple[str, list[str], int]:
    """Context, endings and label of one line. ValueError or RecursionError if it has none."""
    example = json.loads(line.decode("utf-8-sig"))
    if not isinstance(example, dict):
        raise ValueError("no JSON object")
    context, endings, label = (example.get(field) for field in ("ctx", "endings", "label"))
    if not (isinstance(context, str) and context):
        raise ValueError(f"ctx is {context!r:.40}, expected a text")
    if not (isinstance(endings, list) and len(endings) == N_ENDINGS and all(isinstance(e, str) and e for e in endings)):
        raise ValueError(f"endings is {endings!r:.40}, expected {N_ENDINGS} texts")
    if type(label) is not int or not 0 <= label < N_ENDINGS:
        raise ValueError(f"label is {label!r:.40}, expected a number from 0 to {N_ENDINGS - 1}")
    return context, endings, label


def download() -> Path:
    """The published file, 10,042 examples, fetched if it is not there. Raises DataError or CannotWrite."""
    import urllib.request
    from http.client import HTTPException

    path = Path("data/hellaswag/hellaswag_val.jsonl")
    with writing(path.parent), prepare(path.parent) as temporary:
        if temporary is None:
            return path
        try:
            with (urllib.request.urlopen(URL, timeout=60) as response,
                  tqdm(desc=path.name, unit="B", unit_scale=True, delay=1, leave=False) as bar):
                content = bytearray()
                while part := response.read(2**16):
                    content += part
                    bar.update(len(part))
        except (OSError, HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{URL}: download failed: {reason}; or give the file: --hellaswag FILE") from None
        found = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
        if found != GIT_SHA1:
            raise DataError(f"{URL}: git's sha1 of what came is {found}, expected {GIT_SHA1}")
        written = write_hashed(temporary / path.name, [content])
    print(f"{path}: {written['bytes']:,} bytes, sha256 {written['sha256']}")
    return path


# -----------------------------------------------------------------------------
# the scores


def ending_nats(model, examples: HellaSwag, batch_size: int, autocast, device, others) -> torch.Tensor:
    """
    Minus log-probability of each ending given its context, in nats, float64 (n, 4). Batches are of rows of similar
    length, padded on the right, where a causal model does not look; process r takes every world_size-th from r on.
    """
    rows, n_tokens = examples.rows, examples.n_tokens.flatten().tolist()
    batch_size, nats = min(batch_size, len(rows)), torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # what needs the most memory comes first
    starts = range(0, len(rows), batch_size)[others.rank :: others.world_size]
    for start in tqdm(starts, "HellaSwag", unit="batch", delay=1, leave=False, disable=others.rank != 0):
        batch = order[start : start + batch_size]
        T = padded(len(rows[batch[0]]) - 1, device)
        inputs = torch.zeros(batch_size, T, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for i, row in enumerate(batch):
            tokens, end = torch.tensor(rows[row]), len(rows[row]) - 1
            inputs[i, :end] = tokens[:-1]
            targets[i, end - n_tokens[row] : end] = tokens[-n_tokens[row] :]
        with autocast:
            logits, _ = model(inputs.to(device))  # (batch_size, T, V)
        counts = targets != IGNORED
        losses = F.cross_entropy(logits[counts.to(device)].float(), targets[counts].to(device), reduction="none")
        losses = torch.zeros(counts.shape, dtype=torch.float64).masked_scatter(counts, losses.cpu().double())
        nats[batch] = losses.sum(dim=1)[: len(batch)]
    if others.world_size > 1:
        dist.all_reduce(nats, group=others.hosts)
    return nats.view(examples.n_tokens.shape)


def padded(T: int, device: torch.device) -> int:
    """Length of a batch whose longest row has T tokens: on a GPU one of few, since kernels are compiled for each."""
    return T if device.type == "cpu" else max(SHORTEST, 1 << (T - 1).bit_length())


def accuracies(nats: torch.Tensor, examples: HellaSwag) -> dict[str, float]:
    """Fraction of the examples in which the right ending has the fewest nats, by three measures. nats: (n, 4)."""
    measures = {"acc": nats, "acc_per_token": nats / examples.n_tokens, "acc_per_byte": nats / examples.n_bytes}
    return {name: (measure.argmin(dim=1) == examples.labels).double().mean().item()
            for name, measure in measures.items()}


def score(model, examples: HellaSwag, batch_size: int, autocast, device, others) -> dict:
    """`accuracies`, the number of examples, and which they are. Raises NotFinite."""
    nats = ending_nats(model, examples, batch_size, autocast, device, others)
    if not nats.isfinite().all():
        raise NotFinite("the log-probability of an ending of HellaSwag is not finite")
    return accuracies(nats, examples) | {"n_examples": len(examples.labels), "data": examples.sha256}
