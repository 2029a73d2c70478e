"""The checkpoint's own sampling, with a random key for every sequence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from optiq.backend import mx
from optiq.errors import UsageError
from optiq.upstream import apply_min_p, apply_top_k, apply_top_p, make_repetition_penalty

_WHOLE_CONTEXT = 1 << 30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of a checkpoint's generation_config.json; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __str__(self) -> str:
        """The settings that do something, as logs have them."""
        given = [
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name == "temperature" or getattr(self, field.name) != field.default
        ]
        return ", ".join(f"{name} {value:g}" for name, value in given)

    def sampler(self, key: int) -> Callable[[mx.array], mx.array]:
        """A sampler of one sequence: log-probabilities (1, vocabulary) -> token (1,).

        Temperature comes first, then top-k, top-p and min-p, as transformers has them.
        """
        state = mx.random.key(key)

        def sample(logprobs: mx.array) -> mx.array:
            nonlocal state
            state, use = mx.random.split(state)
            scaled = logprobs.astype(mx.float32) / self.temperature
            if 0 < self.top_k < scaled.shape[-1]:
                scaled = apply_top_k(scaled, self.top_k)
            if 0 < self.top_p < 1:
                scaled = apply_top_p(scaled, self.top_p)
            if self.min_p > 0:
                scaled = apply_min_p(scaled, self.min_p)
            return mx.random.categorical(scaled, key=use)

        return sample

    def processors(self) -> list[Callable[[mx.array, mx.array], mx.array]]:
        """What changes the logits before sampling."""
        if self.repetition_penalty == 1:
            return []
        return [make_repetition_penalty(self.repetition_penalty, _WHOLE_CONTEXT)]


def sampling_of(model_dir: Path) -> Sampling:
    """The sampling that a checkpoint asks for.

    Raises:
        UsageError: if it says nothing of it, says greedy, or holds values that cannot be used.
    """
    file = model_dir / "generation_config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        data = {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}") from None
    names = [field.name for field in dataclasses.fields(Sampling)]
    given = {name: data[name] for name in names if data.get(name) is not None}
    if not given or data.get("do_sample") is False:
        raise UsageError(
            f"{model_dir} says nothing of sampling in generation_config.json; leave out "
            f"--sampling model for greedy answers"
        )
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in given.values())
    if not numbers or given.get("temperature", 1.0) <= 0:
        raise UsageError(f"{file} has sampling settings that cannot be used: {given}")
    top_k = int(given.pop("top_k", 0))
    return Sampling(top_k=top_k, **{name: float(value) for name, value in given.items()})
