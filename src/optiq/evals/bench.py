"""Speed of a model directory through stock mlx-lm generation."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from optiq.artifacts import Speed
from optiq.backend import mx, nn
from optiq.configs import BenchConfig
from optiq.data.calibration import builtin_records, needs_bos
from optiq.errors import UsageError
from optiq.evals.provenance import provenance
from optiq.events import Emit, track
from optiq.models.load import load_tokenizer, read_config
from optiq.upstream import TokenizerWrapper, generate_text, load_quantized

_WARM_UP_TOKENS = 2


def bench(model_dir: Path, config: BenchConfig, emit: Emit) -> Speed:
    """Prefill and decode speed, and peak memory.

    Args:
        model_dir: an MLX model directory.
        config: length of the prompt, tokens to generate, repeats.
        emit: receives progress.

    Returns:
        Medians over the repeats of what mlx-lm reports, after a short run that is not counted.
        Generation does not end at an end-of-text token.

    Raises:
        UsageError: if the directory is no model that mlx-lm can load.
    """
    source_config = read_config(model_dir)
    tokenizer = load_tokenizer(model_dir, source_config)
    prompt = _prompt(tokenizer, source_config, config.prompt_tokens)
    tokenizer.eos_token_ids = None
    model = _loaded(model_dir)
    _last_response(model, tokenizer, prompt[:_WARM_UP_TOKENS], _WARM_UP_TOKENS)
    mx.reset_peak_memory()
    prefill, decode = [], []
    for _ in track(range(config.repeats), emit, "bench", config.repeats, "runs"):
        response = _last_response(model, tokenizer, prompt, config.new_tokens)
        prefill.append(float(response.prompt_tps))
        decode.append(float(response.generation_tps))
    return Speed(
        model=str(model_dir),
        prompt_tokens=len(prompt),
        new_tokens=config.new_tokens,
        repeats=config.repeats,
        prefill_tps=statistics.median(prefill),
        decode_tps=statistics.median(decode),
        peak_memory_bytes=int(mx.get_peak_memory()),
        provenance=provenance(),
    )


def _loaded(model_dir: Path) -> nn.Module:
    try:
        model, _ = load_quantized(model_dir)
        mx.eval(model.parameters())
    except (ValueError, KeyError, TypeError, FileNotFoundError, RuntimeError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise UsageError(f"mlx-lm cannot load {model_dir}: {reason}; convert it again") from None
    return model


def _prompt(tokenizer: TokenizerWrapper, config: dict[str, Any], length: int) -> list[int]:
    """`length` tokens of prose, over again where the corpus ends."""
    prose = "\n\n".join(r.text for r in builtin_records("heldout") if r.text is not None)
    ids: list[int] = tokenizer.encode(prose, add_special_tokens=False)
    head = [tokenizer.bos_token_id] if needs_bos(tokenizer, config) else []
    return (head + ids * (length // len(ids) + 1))[:length]


def _last_response(
    model: nn.Module, tokenizer: TokenizerWrapper, prompt: list[int], new_tokens: int
) -> Any:  # noqa: ANN401  mlx-lm's response
    *_, last = generate_text(model, tokenizer, prompt, new_tokens, temperature=0.0)
    return last
