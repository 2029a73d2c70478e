"""The matrices of a model that can be quantized: path, role and shape, from mlx-lm's own tree."""

from __future__ import annotations

from typing import Any, cast

from optiq.artifacts import ModuleInfo, Role
from optiq.backend import mx, nn, tree_flatten
from optiq.upstream import SwitchLinear

_ROUTER_NAMES = {"gate", "router", "shared_expert_gate", "shared_gate"}


def parameters_of(module: nn.Module) -> dict[str, mx.array]:
    """All parameters of a module, by name."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(module.parameters())))


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, such as `model.layers.0.mlp`; the root at the empty path."""
    node: Any = root
    for part in path.split(".") if path else ():
        node = node[int(part)] if isinstance(node, list) else node[part]
    return cast(nn.Module, node)


def _is_router(path: str) -> bool:
    parts = path.split(".")
    return parts[-1] in _ROUTER_NAMES or (len(parts) > 1 and parts[-2] in {"router", "gate"})


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    return config | nested if isinstance(nested, dict) else config


def _active_share(config: dict[str, Any], num_experts: int) -> float:
    text = _text_config(config)
    for name in ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk"):
        chosen = text.get(name)
        if isinstance(chosen, int):
            return min(1.0, chosen / num_experts)
    return 1.0


def find_modules(model: nn.Module, config: dict[str, Any]) -> tuple[ModuleInfo, ...]:
    """Linears, expert stacks and embeddings of a model, in tree order.

    Modules for which the family's own `quant_predicate` says no stay in the source dtype and are
    not listed.

    Args:
        model: a tree of mlx-lm.
        config: its config.json.
    """
    predicate = getattr(model, "quant_predicate", None)
    vocab = _vocab_size(model, config)
    order = {path: i for i, (path, _) in enumerate(reversed(list(model.named_modules())))}
    found: list[tuple[str, nn.Module, Role]] = []
    for path, module in model.named_modules():
        role = _role(path, module, vocab)
        if role is not None:
            found.append((path, module, role))
    found.sort(key=lambda item: _tree_order(item[0], order))
    has_head = any(role == "head" for _, _, role in found)
    modules = []
    for path, module, role in found:
        if predicate is not None and predicate(path, module) is False:
            continue
        shape = tuple(module.weight.shape)
        tied = role == "embedding" and shape[0] == vocab and not has_head
        tied = tied and path.rpartition(".")[2] != "embed_tokens_per_layer"
        active = 1.0
        if role == "expert":
            active = _active_share(config, shape[0])
        elif role == "embedding" and not tied:
            active = 1.0 / shape[0]
        modules.append(ModuleInfo(path, role, shape, tied, active))
    return tuple(modules)


def _vocab_size(model: nn.Module, config: dict[str, Any]) -> int:
    """Rows of the token embedding: as the config says, else those of the longest embedding."""
    rows = {m.weight.shape[0] for _, m in model.named_modules() if isinstance(m, nn.Embedding)}
    told = _text_config(config).get("vocab_size")
    return told if isinstance(told, int) and told in rows else max(rows, default=0)


def _role(path: str, module: nn.Module, vocab: int) -> Role | None:
    """What a module does; None if it cannot be quantized."""
    if isinstance(module, SwitchLinear):
        return "expert"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if not isinstance(module, nn.Linear):
        return None
    if _is_router(path):
        return "router"
    is_head = module.weight.shape[0] == vocab and ".layers." not in f".{path}"
    return "head" if is_head else "linear"


def _tree_order(path: str, order: dict[str, int]) -> tuple[object, ...]:
    """Embeddings first, then layers by number, then the rest; stable within a layer."""
    parts = path.split(".")
    numbers = [int(p) for p in parts if p.isdigit()]
    stage = 1 if numbers else (0 if "embed" in path else 2)
    return (stage, numbers[0] if numbers else 0, order[path])
