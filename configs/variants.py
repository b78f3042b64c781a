"""The model variants by name. A name is computed from the flags of its config, never the other way round."""

import difflib
from dataclasses import fields, replace

from model import GPTConfig

# n_layer, n_head, n_embd: GPT-2 small, medium, large and XL, and one for tests and CPUs
SIZES = {"d12": (12, 12, 768), "d24": (24, 16, 1024), "d36": (36, 20, 1280), "d48": (48, 25, 1600), "tiny": (2, 2, 64)}


def size(name: str) -> GPTConfig:
    """The pre-norm model of this size without any flag."""
    n_layer, n_head, n_embd = SIZES[name]
    return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)


# of each flag that is set, in a model's name; sizes and norms have words of their own
WORDS = {"embedding_norm": "_embedding_norm", "qk_norm": "_qk_norm", "attention_scale": "_scale{:g}",
         "window_size": "_window{}", "window_pattern": "_{}", "mlp_activation": "_{}", "untie": "_untied",
         "logit_softcap": "_softcap{:g}"}


def model_name(config: GPTConfig) -> str:
    """The one name of a config: size, then each flag that is set, then `-field=value` for any other field."""
    body = (config.n_layer, config.n_head, config.n_embd)
    known = {shape: name for name, shape in SIZES.items()}
    name = known.get(body) or "d{}_{}heads_{}wide".format(*body)
    if config.post_norm:
        name += "_post_norm" if config.pre_norm else "_olmo2_norm"
    changed = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    name += "".join(word.format(changed[field]) for field, word in WORDS.items() if field in changed)
    told = {*WORDS, "n_layer", "n_head", "n_embd", "pre_norm", "post_norm"}
    return name + "".join(f"-{field}={value}" for field, value in changed.items() if field not in told)


def variants() -> dict[str, GPTConfig]:
    """All variants by their computed names; a new one is a line here."""
    configs = []
    for body in ("d12", "d24", "d36", "d48"):
        for post_norm in (False, True):
            for qk_norm in (False, True):
                configs.append(replace(size(body), post_norm=post_norm, qk_norm=qk_norm))
    d12, hybrid = size("d12"), replace(size("d12"), post_norm=True, qk_norm=True)
    configs += [
        replace(d12, pre_norm=False, post_norm=True, qk_norm=True),
        replace(d12, window_size=256),
        replace(hybrid, window_size=256),
        replace(hybrid, window_size=1024),
        replace(hybrid, window_size=256, window_pattern="SSSL"),
        replace(d12, embedding_norm=True),
        replace(d12, qk_norm=True, attention_scale=0.25),
        replace(d12, mlp_activation="relu2"),
        replace(d12, untie=True),
        replace(d12, logit_softcap=15.0),
        replace(d12, qk_norm=True, mlp_activation="relu2", untie=True, logit_softcap=15.0),
        replace(d12, n_head=6, embedding_norm=True, qk_norm=True, attention_scale=0.125, mlp_activation="relu2",
                untie=True, logit_softcap=15.0),  # of the recipe `fast`
        size("tiny"),
        replace(size("tiny"), post_norm=True, qk_norm=True, window_size=32),
    ]
    return {model_name(config): config for config in configs}


VARIANTS = variants()


def variant(name: str) -> GPTConfig:
    """The config of this exact name; ValueError with the known names and the nearest one otherwise."""
    if name not in VARIANTS:
        of_size = [known for known in VARIANTS if known.split("_")[0] == name.split("_")[0]]
        nearest = difflib.get_close_matches(name, of_size or VARIANTS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown model {name!r}, did you mean {nearest}? Other combinations are options, such as "
                         f"--model d12 --window_size 128. Known: {', '.join(VARIANTS)}")
    return VARIANTS[name]
