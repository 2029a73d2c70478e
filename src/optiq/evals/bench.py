"""Speed of a model directory in the engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optiq.artifacts import Speed
from optiq.backend import mx
from optiq.configs import BenchConfig
from optiq.data.calibration import builtin_records, needs_bos
from optiq.engine.engine import Engine, load
from optiq.engine.events import Tokens
from optiq.evals.provenance import provenance
from optiq.events import Emit, track
from optiq.upstream import TokenizerWrapper

_WARM_UP_TOKENS = 2
_NEVER = -100.0


def bench(model_dir: Path, config: BenchConfig, emit: Emit) -> Speed:
    """Prefill and decode speed of one answer at a time, and peak memory.

    Args:
        model_dir: a model directory.
        config: length of the prompt, tokens to generate, repeats.
        emit: receives progress.

    Returns:
        Medians over the repeats, after a short run that is not counted. Answers do not end at an
        end-of-text token.

    Raises:
        UsageError: if the directory is no model, or prompt and answer are longer than its context.
    """
    engine = load(model_dir, emit=emit)
    prompt = _prompt(engine.tokenizer, engine.config, config.prompt_tokens)
    _timed(engine, prompt[:_WARM_UP_TOKENS], _WARM_UP_TOKENS)
    mx.reset_peak_memory()
    prefill, decode = [], []
    for _ in track(range(config.repeats), emit, "bench", config.repeats, "runs"):
        times = _timed(engine, prompt, config.new_tokens)
        prefill.append(len(prompt) / times[0])
        decode.append((len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0)
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


def _timed(engine: Engine, prompt: Sequence[int], new_tokens: int) -> list[float]:
    """Seconds from the beginning to every token."""
    never = dict.fromkeys(engine.stop_tokens, _NEVER)
    start = time.perf_counter()
    answer = engine.generate(prompt, temperature=0, max_tokens=new_tokens, logit_bias=never)
    return [time.perf_counter() - start for event in answer if isinstance(event, Tokens)]


def _prompt(tokenizer: TokenizerWrapper, config: dict[str, Any], length: int) -> list[int]:
    """`length` tokens of prose, over again where the corpus ends."""
    prose = "\n\n".join(r.text for r in builtin_records("heldout") if r.text is not None)
    ids: list[int] = tokenizer.encode(prose, add_special_tokens=False)
    head = [tokenizer.bos_token_id] if needs_bos(tokenizer, config) else []
    return (head + ids * (length // len(ids) + 1))[:length]
