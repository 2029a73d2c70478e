"""The matrices of a model that can be quantized: path, role and shape, read off mlx-lm's own tree."""

from __future__ import annotations

from typing import Any

from optiq.artifacts import ModuleInfo, Role
from optiq.backend import nn
from optiq.upstream import SwitchLinear

_ROUTER_NAMES = {"gate", "router", "shared_expert_gate", "shared_gate"}


def _is_router(path: str) -> bool:
    parts = path.split(".")
    return parts[-1] in _ROUTER_NAMES or (len(parts) > 1 and parts[-2] in {"router", "gate"})


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    return config | nested if isinstance(nested, dict) else config


def _active_share(config: dict[str, Any], num_experts: int) -> float:
    text = _text_config(config)
    for name in ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk"):
        if isinstance(text.get(name), int):
            return min(1.0, text[name] / num_experts)
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
    vocab = max(
        (m.weight.shape[0] for _, m in model.named_modules() if isinstance(m, nn.Embedding)),
        default=0,
    )
    found: list[tuple[str, nn.Module, Role]] = []
    for path, module in model.named_modules():
        role: Role
        if isinstance(module, SwitchLinear):
            role = "expert"
        elif isinstance(module, nn.Embedding):
            role = "embedding"
        elif isinstance(module, nn.Linear):
            is_head = module.weight.shape[0] == vocab and ".layers." not in f".{path}"
            role = "router" if _is_router(path) else "head" if is_head else "linear"
        else:
            continue
        if predicate is None or predicate(path, module) is not False:
            found.append((path, module, role))
    order = {path: i for i, (path, _) in enumerate(reversed(list(model.named_modules())))}
    found.sort(key=lambda item: _tree_order(item[0], order))
    has_head = any(role == "head" for _, _, role in found)
    modules = []
    for path, module, role in found:
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


def _tree_order(path: str, order: dict[str, int]) -> tuple[object, ...]:
    """Embeddings first, then layers by number, then the rest; stable within a layer."""
    parts = path.split(".")
    numbers = [int(p) for p in parts if p.isdigit()]
    stage = 1 if numbers else (0 if "embed" in path else 2)
    return (stage, numbers[0] if numbers else 0, order[path])
