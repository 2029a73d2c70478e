"""A Gemma-4 12B with random weights, and its assistant: speed and memory do not depend on values.

usage: python bench/random_gemma4.py TINY OUT [--off-lattice] [--layers 48]

Writes OUT/target (24 GB, bfloat16) and OUT/assistant with the tokenizer and the template of TINY,
the random model of the same architecture in tests/assets/gemma4-tiny. The weights lie on a lattice
of 4 bits in blocks of 32, as those of a checkpoint trained for it do, unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

VOCAB, HIDDEN, HEADS, BLOCK = 262144, 3840, 16, 32
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 15360,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "vocab_size": VOCAB,
}
DRAFT = TEXT | {"hidden_size": 1024, "intermediate_size": 8192}
VISION = {
    "mm_embed_dim": HIDDEN,
    "mm_posemb_size": 1120,
    "output_proj_dims": HIDDEN,
    "patch_size": 16,
    "model_patch_size": 48,
    "num_soft_tokens": 280,
}
PATCH = 48 * 48 * 3
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def layer_kinds(count: int) -> list[str]:
    """Five sliding layers before each full one; the last is full."""
    return ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]


def layer(prefix: str, config: dict[str, Any], kind: str, own_keys: bool) -> Shapes:
    """Tensors of a layer."""
    full = kind == "full_attention"
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    dim = config["global_head_dim" if full else "head_dim"]
    keys = config["num_global_key_value_heads" if full else "num_key_value_heads"] * dim
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield f"{prefix}.{norm}_layernorm.weight", (hidden,)
    yield f"{prefix}.layer_scalar", (1,)
    yield f"{prefix}.self_attn.q_norm.weight", (dim,)
    yield f"{prefix}.self_attn.q_proj.weight", (HEADS * dim, hidden)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, HEADS * dim)
    if own_keys:
        yield f"{prefix}.self_attn.k_norm.weight", (dim,)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        if not full:
            yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
    yield f"{prefix}.mlp.gate_proj.weight", (mlp, hidden)
    yield f"{prefix}.mlp.up_proj.weight", (mlp, hidden)
    yield f"{prefix}.mlp.down_proj.weight", (hidden, mlp)


def target_files(kinds: list[str]) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Tensors of the target, by file."""
    text = "model.language_model"
    yield [
        (f"{text}.embed_tokens.weight", (VOCAB, HIDDEN)),
        (f"{text}.norm.weight", (HIDDEN,)),
        ("model.embed_audio.embedding_projection.weight", (HIDDEN, 64)),
        ("model.embed_vision.embedding_projection.weight", (HIDDEN, HIDDEN)),
        ("model.vision_embedder.patch_dense.weight", (HIDDEN, PATCH)),
        ("model.vision_embedder.pos_embedding", (VISION["mm_posemb_size"], 2, HIDDEN)),
        *((f"model.vision_embedder.patch_ln1.{n}", (PATCH,)) for n in ("weight", "bias")),
        *((f"model.vision_embedder.patch_ln2.{n}", (HIDDEN,)) for n in ("weight", "bias")),
        *((f"model.vision_embedder.pos_norm.{n}", (HIDDEN,)) for n in ("weight", "bias")),
        ("model.vision_embedder.patch_dense.bias", (HIDDEN,)),
    ]
    for number, kind in enumerate(kinds):
        yield list(layer(f"{text}.layers.{number}", TEXT, kind, own_keys=True))


def assistant_tensors() -> Shapes:
    """Tensors of the drafter, which reads the keys of the target."""
    hidden = DRAFT["hidden_size"]
    yield "model.embed_tokens.weight", (VOCAB, hidden)
    yield "model.norm.weight", (hidden,)
    yield "pre_projection.weight", (hidden, 2 * HIDDEN)
    yield "post_projection.weight", (HIDDEN, hidden)
    for number, kind in enumerate([*["sliding_attention"] * 3, "full_attention"]):
        yield from layer(f"model.layers.{number}", DRAFT, kind, own_keys=False)


def drawn(shape: tuple[int, ...], lattice: bool) -> mx.array:
    """Random bfloat16 weights of a size that keeps activations in range; ones for vectors."""
    if len(shape) == 1:
        return mx.ones(shape, mx.bfloat16)
    scale = shape[-1] ** -0.5
    if not lattice or shape[-1] % BLOCK:
        return (mx.random.normal(shape) * scale).astype(mx.bfloat16)
    blocks = (*shape[:-1], shape[-1] // BLOCK, BLOCK)
    codes = mx.clip(mx.round(8 + 2.5 * mx.random.normal(blocks)), 1, 15)
    first = mx.arange(BLOCK) == 0  # the largest of a block has code 0
    steps = mx.random.randint(16, 32, (*blocks[:-1], 1)).astype(mx.float32) * (scale / 64)
    steps = mx.view(
        mx.view(steps, mx.uint32) & 0xFFF80000, mx.float32
    )  # 5 bits: products are exact
    return (steps * (mx.where(first, 0, codes) - 8)).reshape(shape).astype(mx.bfloat16)


def resized(config: dict[str, Any], text: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """The config of the tiny model with other sizes."""
    out = config | {"text_config": config["text_config"] | text | {"layer_types": kinds}}
    out["text_config"]["num_hidden_layers"] = len(kinds)
    if "vocab_size" in out:
        out["vocab_size"] = VOCAB
    return out


def write(folder: Path, tiny: Path, config: dict[str, Any], files: Any, lattice: bool) -> None:  # noqa: ANN401
    """A directory with these tensors and everything else that the tiny model has."""
    folder.mkdir(parents=True)
    for path in tiny.iterdir():
        if not path.name.startswith("model"):
            shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    index: dict[str, str] = {}
    for number, shapes in enumerate(files):
        name = f"model-{number:05d}.safetensors"
        mx.save_safetensors(str(folder / name), {n: drawn(s, lattice) for n, s in shapes})
        index |= dict.fromkeys((n for n, _ in shapes), name)
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tiny", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--off-lattice", action="store_true")
    args = parser.parse_args()
    lattice, kinds = not args.off_lattice, layer_kinds(args.layers)
    config = json.loads((args.tiny / "target/config.json").read_text())
    config = resized(config, TEXT, kinds) | {"vision_config": config["vision_config"] | VISION}
    write(args.out / "target", args.tiny / "target", config, target_files(kinds), lattice)
    config = json.loads((args.tiny / "assistant/config.json").read_text())
    config = resized(config, DRAFT, config["text_config"]["layer_types"])
    config["backbone_hidden_size"] = HIDDEN
    files = [list(assistant_tensors())]
    write(args.out / "assistant", args.tiny / "assistant", config, files, lattice)


if __name__ == "__main__":
    main()
