"""Synthetic sensitivity tables: no model, no MLX, the shape of the real ones."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from optiq.artifacts import (
    KEEP,
    LATTICE,
    LatticeReport,
    Method,
    ModuleInfo,
    ModuleScores,
    OptionScore,
    Provenance,
    QuantOption,
    Role,
    Rounding,
    SensitivityTable,
    SourceInfo,
    menu,
)

NO_LATTICE = LatticeReport("none", False, 0.0, 0.0)
ON_LATTICE = LatticeReport("q4_0", True, 1.0, 0.0)
PROVENANCE = Provenance(optiq="0", mlx="0", mlx_lm="0", device="cpu", blas="none")


def make_source(fixed_bytes: int = 4096, dtype: str = "bfloat16") -> SourceInfo:
    return SourceInfo(
        name="synthetic",
        revision=None,
        fingerprint="0" * 16,
        model_type="llama",
        dtype=dtype,
        size_bytes=10**6,
        fixed_bytes=fixed_bytes,
    )


def make_scores(
    module: ModuleInfo,
    kls: Sequence[float],
    *,
    options: Sequence[QuantOption] | None = None,
    itemsize: int = 2,
) -> ModuleScores:
    """Scores of a module: `kls` for `options` (default: its affine menu), then keep at 0."""
    options = menu(module.in_dims) if options is None else options
    rows = [
        OptionScore(option, kl, kl / 4, option.size_bytes(module.shape, itemsize), "exact")
        for option, kl in zip(options, kls, strict=True)
    ]
    rows.append(OptionScore(KEEP, 0.0, 0.0, KEEP.size_bytes(module.shape, itemsize), "exact"))
    report = ON_LATTICE if LATTICE in options else NO_LATTICE
    return ModuleScores(module, tuple(rows), report)


def make_table(
    modules: Sequence[ModuleScores],
    *,
    source: SourceInfo | None = None,
    method: Method = "fisher",
    rounding: Rounding = "gptq",
    device: str = "cpu",
) -> SensitivityTable:
    return SensitivityTable(
        source=source or make_source(),
        method=method,
        reference="source",
        rounding=rounding,
        modules=tuple(modules),
        num_tokens=8192,
        num_probes=32,
        calibration="synthetic",
        checks={},
        provenance=dataclasses.replace(PROVENANCE, device=device),
    )


def llama_modules(
    num_layers: int, hidden: int = 128, mlp: int = 384, vocab: int = 1024, *, tied: bool = True
) -> list[ModuleInfo]:
    """The matrices of a llama, embedding first."""
    kv = hidden // 2
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    embedding = ModuleInfo("model.embed_tokens", "embedding", (vocab, hidden), tied)
    layers = [
        ModuleInfo(f"model.layers.{n}.{name}", "linear", shape)
        for n in range(num_layers)
        for name, shape in shapes.items()
    ]
    head = [] if tied else [ModuleInfo("lm_head", "head", (vocab, hidden))]
    return [embedding, *layers, *head]


def moe_modules(num_layers: int, hidden: int = 128, num_experts: int = 8) -> list[ModuleInfo]:
    """Attention-free layers of a router and stacked experts, two experts in use per token."""
    kinds: list[tuple[str, Role, tuple[int, ...], float]] = [
        ("mlp.gate", "router", (num_experts, hidden), 1.0),
        ("mlp.switch_mlp.up_proj", "expert", (num_experts, hidden, hidden), 2 / num_experts),
        ("mlp.switch_mlp.down_proj", "expert", (num_experts, hidden, hidden), 2 / num_experts),
    ]
    return [
        ModuleInfo(f"model.layers.{n}.{name}", role, shape, active=active)
        for n in range(num_layers)
        for name, role, shape, active in kinds
    ]


def random_table(
    modules: Sequence[ModuleInfo],
    seed: int = 0,
    *,
    lattice: bool = False,
    source: SourceInfo | None = None,
    device: str = "cpu",
) -> SensitivityTable:
    """A table with the look of a measured one.

    KL falls about fourfold per bit and with finer groups, spreads over three decades between
    modules, and carries noise, so that it is not quite monotone. `lattice` puts the linears on a
    grid.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for module in modules:
        options = list(menu(module.in_dims))
        scale = 0.1 * 10 ** rng.uniform(-3, 0) * module.num_params / 1e5
        kls = [
            scale * 4.0 ** (2 - o.bits) * (o.group_size / 64) ** 0.5 * rng.lognormal(0.0, 0.1)
            for o in options
        ]
        if lattice and module.role == "linear":
            options.append(LATTICE)
            kls.append(scale * 1e-6)
        rows.append(make_scores(module, kls, options=options))
    return make_table(rows, source=source, device=device)
