"""How to train: every option of train_gpt2.py, and the recipes, which are named sets of values for them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class TrainConfig:
    """Options of a run. What a model computes is in GPTConfig; its fields are options too."""

    # what to train, on what, and where the result goes
    model: str = "d12"
    """variant, see --list; the recipe's own, if it has one"""
    recipe: str = "default"
    """default, cpu, fineweb124M, short700 or fast: sets the defaults of what follows (without a GPU: cpu)"""
    data: str = "shakespeare"
    """a folder under data/, or the path of a folder, that holds train and val shards"""
    out_dir: str = "runs"
    """where run directories go"""
    run_name: str | None = None
    """directory of the run; None: the model's name and what differs from the recipe"""
    seed: int = 0
    """of the initial weights and of the order of the data"""

    # how much
    batch_size: int | Literal["auto"] = "auto"
    """sequences per process and micro-step; auto: the most that divide the step and fit by prediction (for a compiled
    model), without a GPU at most 8"""
    sequence_length: int = 1024
    """tokens in a sequence"""
    total_batch_tokens: int = 65_536
    """tokens per optimizer step over all processes; gradient accumulation follows from it"""
    max_steps: int = 300
    """optimizer steps of the whole schedule"""
    stop_after: int | None = None
    """leave early, after this step; the schedule does not change, and the same line without it continues"""

    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW (arXiv 1711.05101), or Muon for the matrices of the blocks and AdamW for the rest (optim.py)"""
    learning_rate: float = 6e-4
    """of AdamW: peak, reached after the warm-up"""
    embedding_learning_rate: float | None = None
    """AdamW's for an embedding that is not the head too, which then has no weight decay; None: learning_rate"""
    muon_learning_rate: float = 0.02
    """of Muon: peak, with the same schedule"""
    final_lr_fraction: float = 0.0
    """learning rate at the end of the schedule as a fraction of the peak"""
    schedule: Literal["cosine", "linear"] = "cosine"
    """form of the decay"""
    decay_fraction: float = 1.0
    """of all steps, the last ones, over which the learning rate decays; less than 1 is warm-up, stable, decay (WSD)"""
    warmup_steps: int = 20
    """steps over which the learning rate rises linearly"""
    beta1: float = 0.9
    """decay of the running mean of the gradient"""
    beta2: float = 0.95
    """decay of the running mean of its square"""
    weight_decay: float = 0.1
    """on all matrices, the embedding included unless it has a rate of its own"""
    grad_clip: float = 1.0
    """largest norm of the whole gradient; 0 = no limit"""

    # evaluation and checkpoints
    val_every: int = 25
    """steps between evaluations, and one after the last; 0 = never"""
    val_tokens: int = 1_048_576
    """validation targets, the first in file order"""
    save_every: int = 150
    """steps between checkpoints, and one at the end and when stopped; 0 = never"""
    keep_last: int = 2
    """checkpoints that stay, at least 2"""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest valid checkpoint of the run; never: refuse a run that has one"""
    allow_change: tuple[str, ...] = ()
    """settings that may differ from those that the run was begun with"""
    init_from: str | None = None
    """start from the weights of another run (name under out_dir, or path) with a new schedule"""
    verify_data: bool = False
    """hash all shards again before the first step"""

    # execution: none of these changes what is computed, beyond rounding
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where it runs; auto: CUDA, MPS or CPU, whichever there is"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the matrix products; weights stay float32. auto: bfloat16 on GPUs that have it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on CUDA"""
    window_backend: str | None = None
    """kernel of the sliding window: flex, flash or blocked (kernels/attention.py); None: flex on CUDA, else blocked"""
    kernels: Literal["fused", "plain"] | None = None
    """those of kernels/fused.py, or as one reads them in model.py; None: fused on CUDA in bfloat16, else plain"""
    recompute_gelu: bool = False
    """with fused kernels: keep GELU's input alone for backward, half the logits: a quarter less memory, 3 % slower"""
    deterministic: bool = False
    """on a GPU: the same bits in every run of the same seed on the same machine, slower (machine.make_deterministic)"""
    hang_timeout_s: float = 600.0
    """of several processes, one that hangs is named and the run ended within this time; no save may take as long"""
    wandb: bool = False
    """mirror the metrics to Weights & Biases (pip install wandb); offline without a key"""

    def __post_init__(self):
        minimum = {
            "seed": 0, "batch_size": 1, "sequence_length": 1, "total_batch_tokens": 1, "max_steps": 1, "stop_after": 1,
            "warmup_steps": 0, "val_every": 0, "val_tokens": 1, "save_every": 0, "keep_last": 2,
        }
        for name, least in minimum.items():
            value = getattr(self, name)
            if value not in (None, "auto") and not least <= value <= 2**40:
                raise ValueError(f"{name}={value} must lie between {least} and 2^40")
        limits = {
            "learning_rate": (0, 10), "final_lr_fraction": (0, 1), "beta1": (0, 0.999999), "beta2": (0, 0.999999),
            "weight_decay": (0, 10), "grad_clip": (0, 1e9), "hang_timeout_s": (1, 1e6), "muon_learning_rate": (0, 10),
            "decay_fraction": (0, 1), "embedding_learning_rate": (0, 10),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # nan fails too
                raise ValueError(f"{name}={value} must lie between {low} and {high}")
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than max_steps={self.max_steps}")
        if self.total_batch_tokens % self.sequence_length:
            raise ValueError(
                f"total_batch_tokens={self.total_batch_tokens} is not a multiple of "
                f"sequence_length={self.sequence_length}"
            )
        if self.val_every and self.val_tokens < self.sequence_length:
            raise ValueError(f"val_tokens={self.val_tokens} is less than sequence_length={self.sequence_length}")
        if self.run_name is not None and (self.run_name in ("", ".", "..") or "/" in self.run_name):
            raise ValueError(f"run_name={self.run_name!r} must be the name of one directory")


# options on which the trained weights depend, in the order of a run's name; the others move rounding at most
RESULT_FIELDS = (
    "recipe", "data", "sequence_length", "total_batch_tokens", "max_steps", "optimizer", "learning_rate",
    "embedding_learning_rate", "muon_learning_rate", "final_lr_fraction", "schedule", "decay_fraction", "warmup_steps",
    "beta1", "beta2", "weight_decay", "grad_clip", "init_from", "dtype", "seed",
)

RECIPES = {
    # one GPU, about a minute: ends where the validation loss on Shakespeare has levelled off
    "default": TrainConfig(recipe="default", val_tokens=65_536),
    # the same model without a GPU: about three minutes on 2 cores
    "cpu": TrainConfig(recipe="cpu", total_batch_tokens=1024, max_steps=20, warmup_steps=5, val_every=10,
                       val_tokens=4096),
    # tokens, batch and schedule of llm.c's GPT-2 124M: 10 billion tokens of FineWeb
    "fineweb124M": TrainConfig(
        recipe="fineweb124M", data="fineweb10B", total_batch_tokens=524_288, max_steps=19_073, learning_rate=6e-4,
        warmup_steps=700, val_every=250, val_tokens=10_485_760, save_every=1000,
    ),
    # short comparisons on any text: 46 million tokens
    "short700": TrainConfig(recipe="short700", max_steps=700, learning_rate=1.5e-3, warmup_steps=70, val_every=100,
                            save_every=350),
    # the same tokens with Muon
    "fast": TrainConfig(
        recipe="fast", model="d12_6heads_768wide_embedding_norm_qk_norm_scale0.125_relu2_untied_softcap15",
        max_steps=700, optimizer="muon", learning_rate=0.004, embedding_learning_rate=0.3, muon_learning_rate=0.02,
        schedule="linear", decay_fraction=0.5, warmup_steps=10, beta1=0.65, beta2=0.99, grad_clip=0.0, val_every=100,
        save_every=350,
    ),
}


def restored(kind: type, values: dict):
    """The TrainConfig or GPTConfig of values that were kept as JSON. TypeError or ValueError for what is none."""
    of = get_type_hints(kind)
    for name in values:
        if name not in of or not fits(values[name], of[name]):
            raise TypeError(f"{name!r}: {values[name]!r}")
    return kind(**values)


def fits(value, kind) -> bool:
    """Whether a value of JSON is one of this type of a field."""
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    allowed = {float: (float, int), int: (int,), str: (str,), bool: (bool,), NoneType: (NoneType,)}[kind]
    return type(value) in allowed


def recipe(name: str) -> TrainConfig:
    """The recipe of this name; ValueError with the known ones otherwise."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}. Known: {', '.join(RECIPES)}")
    return RECIPES[name]


def result_settings(config: TrainConfig, gpt_config) -> dict:
    """What the result depends on, apart from the tokens. A run goes on only with the same values."""
    chosen = {name: getattr(config, name) for name in RESULT_FIELDS if name not in ("recipe", "data")}
    return chosen | asdict(gpt_config)


def run_name(config: TrainConfig, model_name: str) -> str:
    """The model's name, then `-field=value` for each option that changes the result and differs from the recipe."""
    if config.run_name is not None:
        return config.run_name
    usual = asdict(recipe(config.recipe)) | {"recipe": "default"}  # so that another recipe is in the name
    name = model_name
    for field in RESULT_FIELDS:
        value = getattr(config, field)
        if value != usual[field]:
            name += f"-{field}={Path(value).name if field in ('data', 'init_from') else value}"
    return name
