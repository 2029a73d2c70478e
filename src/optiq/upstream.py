"""The one door to mlx-lm (pinned to 0.32.x).

Nothing of it is replaced; only public functions and classes are used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import (
    _get_classes,
    dequantize_model,
    load_config,
    load_model,
    load_tokenizer,
)

from optiq.backend import mx, nn
from optiq.errors import UnsupportedModel

_MAX_BLOCKS = 10_000  # a tree of more takes minutes and gigabytes, and no model has them
_ANY_LENGTH = int(1e30)  # of text: what transformers takes where a tokenizer names no limit

__all__ = [
    "ArraysCache",
    "CacheList",
    "KVCache",
    "RotatingKVCache",
    "SwitchLinear",
    "TokenizerWrapper",
    "build_model",
    "dense_float32",
    "load_as",
    "load_config",
    "make_prompt_cache",
    "sharding",
    "tokenizer_of",
]


def build_model(
    config: dict[str, Any], own: Callable[[dict[str, Any]], nn.Module] | None = None
) -> nn.Module:
    """The module tree of a config, with its own (random, unevaluated) parameters.

    Args:
        config: of a model.
        own: makes the tree of a model type that mlx-lm does not have.

    Raises:
        UnsupportedModel: if mlx-lm has no such `model_type`, or the config lacks what it needs or
            has numbers that no model can have.
    """
    if config.get("model_file") is not None:
        raise UnsupportedModel(
            f"the source asks to run its own code ({config['model_file']!r}); optiq never runs "
            f"remote code"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModel("config.json has no model_type; give a Hugging Face model directory")
    make = own or _maker(config, model_type)
    _check_blocks(config, model_type)
    try:
        return make(config)
    except (
        TypeError,
        LookupError,
        AttributeError,
        ValueError,
        ArithmeticError,
        AssertionError,
    ) as error:
        # of a wrong argument MLX writes a page, which begins with what is wrong
        first = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
        reason = first or type(error).__name__
        raise UnsupportedModel(
            f"config.json of model_type '{model_type}' is not complete or has values that no model "
            f"can have ({reason}); get it again"
        ) from None


def _maker(config: dict[str, Any], model_type: str) -> Callable[[dict[str, Any]], nn.Module]:
    """What makes mlx-lm's tree of a config."""
    try:
        model_class, args_class = _get_classes(config)
    except ValueError:
        raise UnsupportedModel(
            f"model_type '{model_type}' is not supported by the installed mlx-lm; update mlx-lm "
            f"or use another source"
        ) from None
    return lambda config: cast(nn.Module, model_class(args_class.from_dict(config)))


def _check_blocks(config: dict[str, Any], model_type: str) -> None:
    """Refuse a number of blocks that would fill the memory before anything else fails."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
            value = part.get(key)
            if isinstance(value, int) and value > _MAX_BLOCKS:
                raise UnsupportedModel(
                    f"config.json of model_type '{model_type}' asks for more than {_MAX_BLOCKS:,} "
                    f"blocks ({key}), which no model has; get it again"
                )


def load_as(
    path: Path, config: dict[str, Any], own: Callable[[dict[str, Any]], nn.Module] | None
) -> nn.Module:
    """The tree of a directory, quantized or not, with its weights, unevaluated.

    Args:
        path: the directory.
        config: takes the place of its config.json.
        own: makes the tree of a model type that mlx-lm does not have.
    """

    class Given:
        """Stands where mlx-lm has a class of arguments."""

        @classmethod
        def from_dict(cls, _: dict[str, Any]) -> dict[str, Any]:
            return config

    if own is None:
        model, _ = load_model(path, lazy=True, model_config=config)
    else:
        classes: Any = (own, Given)
        model, _ = load_model(
            path, lazy=True, model_config=config, get_model_classes=lambda config: classes
        )
    return model


def dense_float32(model: nn.Module) -> nn.Module:
    """The model with dense float32 weights, which the CPU runs much faster than packed ones."""
    model.set_dtype(mx.float32)
    return dequantize_model(model)


def sharding(model: nn.Module) -> Callable[[mx.distributed.Group], None]:
    """What leaves this rank its part of a model, which then adds up what the ranks make.

    Weights may be unevaluated; only what stays here is then computed. It raises a `ValueError` if
    a size cannot be divided by the number of ranks.

    Raises:
        UnsupportedModel: if mlx-lm cannot share models of the family out.
    """
    own = getattr(model, "shard", None)
    if own is None:
        raise UnsupportedModel(f"mlx-lm has no tensor parallelism for {type(model).__module__}")
    return cast(Callable[[mx.distributed.Group], None], own)


def tokenizer_of(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """Tokenizer of a directory, with the eos ids of its config; code it brings is refused.

    It takes texts of any length and says nothing of the model's context, which is in the config.
    """
    settings = {
        # without a word transformers would ask at the terminal, and run the code on a yes
        "trust_remote_code": False,
        # else a text beyond the context is warned of, also where it is only counted or cut up
        "model_max_length": _ANY_LENGTH,
    }
    eos = config.get("eos_token_id")
    return cast(TokenizerWrapper, load_tokenizer(path, settings, eos_token_ids=eos))
