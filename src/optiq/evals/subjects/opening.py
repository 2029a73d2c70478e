"""From what the user names to a model under test."""

from __future__ import annotations

from pathlib import Path

from optiq import settings
from optiq.configs import EvalConfig, RunConfig, ServedConfig
from optiq.errors import UsageError
from optiq.evals.subjects.base import Subject
from optiq.evals.subjects.local import LocalModel
from optiq.evals.subjects.served import ServedModel


def open_subject(
    model: Path | None, config: EvalConfig, served: ServedConfig, run: RunConfig
) -> Subject:
    """The directory, or what is at the URL.

    Raises:
        UsageError: unless there is one of them, and it can be used.
        EngineFailure: if the server at the URL is dead.
    """
    if (model is None) == (served.served is None):
        raise UsageError("give a model directory or --served URL, one of them")
    if model is not None:
        return LocalModel(model, config, tokenizer_dir=run.tokenizer)
    return ServedModel(served, config, settings.load().served_key)
