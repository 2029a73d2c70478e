"""Where intermediate state lies, and names for it that change with what it depends on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from optiq import settings
from optiq.configs import RunConfig
from optiq.models.load import Source


def digest(*parts: object) -> str:
    """16 hex digits over the text of the parts; dataclasses, tuples and plain values."""
    text = "\0".join(repr(part) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def work_root(run: RunConfig) -> Path:
    """`--work`, or the work directories of the user cache."""
    return run.work if run.work is not None else settings.load().cache_dir / "work"


def work_directory(source: Source, run: RunConfig) -> Path:
    """The directory for one source's state; state for other options lies beside it."""
    anonymous = dataclasses.replace(source.info, name="", revision=None)
    return work_root(run) / digest(anonymous)
