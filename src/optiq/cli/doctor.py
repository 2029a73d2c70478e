"""`optiq doctor`: what optiq runs on, and what to install where something is wrong or slow."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import click

import optiq
from optiq import blas, settings
from optiq.cli import output

_PACKAGES = ("mlx", "mlx-lm", "numpy", "scipy", "gguf", "huggingface-hub", "tokenizers", "click")
_SLOW_GFLOPS = 20.0
_FASTER = (
    "matrix products are slow here; install OpenBLAS: sudo apt-get install libopenblas0-pthread "
    "(where nobody is root, on x86-64: pip install mkl, about 1 GB)"
)


@dataclasses.dataclass
class Report:
    """What was found: rows of name and value, errors, and advice."""

    rows: list[tuple[str, str]]
    problems: list[str]
    advice: list[str]


@click.command("doctor", context_settings=output.help_names)
@output.json_result
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Check back end, device, BLAS, memory, disk and versions; status 1 if something is broken."""
    report = Report([], [], [])
    _software(report)
    _machine(report)
    if as_json:
        output.data(json.dumps({**dataclasses.asdict(report), "rows": dict(report.rows)}, indent=1))
    else:
        output.data(output.table(report.rows))
        for text in report.problems:
            output.data(f"error: {text}")
        for text in report.advice:
            output.data(f"advice: {text}")
        if not report.problems and not report.advice:
            output.data("all is well")
    context.exit(1 if report.problems else 0)


def _software(report: Report) -> None:
    """Versions, and other packages in the way."""
    place = Path(optiq.__file__).parent
    report.rows += [
        ("optiq", f"{optiq.__version__} in {place}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    for name in _PACKAGES:
        try:
            report.rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            report.rows.append((name, "missing"))
            report.problems.append(f"{name} is not installed; install optiq again")
    report.problems += namesakes(place, metadata.distributions(name="mlx-optiq"))


def namesakes(place: Path, distributions: Iterable[metadata.Distribution]) -> list[str]:
    """Sentences about another package of the same name in this environment.

    The package index has an unrelated `mlx-optiq` that also owns `import optiq`.

    Args:
        place: folder of the imported optiq.
        distributions: installed distributions named `mlx-optiq`.
    """
    remedy = (
        "make a fresh environment and install optiq from its checkout or wheel, never by the name "
        "mlx-optiq"
    )
    found = [
        f"mlx-optiq {distribution.version} of the package index is another package that also owns "
        f"`import optiq`; {remedy}"
        for distribution in distributions
        if _is_foreign(distribution)
    ]
    if (place / "cli.py").exists():
        found.append(f"{place} holds files of another package that owns `import optiq`; {remedy}")
    return found


def _is_foreign(distribution: metadata.Distribution) -> bool:
    """Whether a distribution named `mlx-optiq` is not this project."""
    files = {file.as_posix() for file in distribution.files or ()}
    modules = {name for name in files if name.startswith("optiq/")}
    needs_flask = any(need.lower().startswith("flask") for need in distribution.requires or ())
    return needs_flask or bool(modules and "optiq/pipeline.py" not in modules)


def _machine(report: Report) -> None:
    """Back end, device, BLAS and its speed, memory and disk."""
    backends = blas.installed_backends()
    report.rows.append(("back end", ", ".join(backends) or "none"))
    if len(backends) > 1:
        report.problems.append(
            f"{len(backends)} MLX back ends are installed ({' and '.join(backends)}) and overwrite "
            f"each other's files; pip uninstall them all, then install one"
        )
    root = settings.load().cache_dir
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    report.rows.append(("cache", f"{root}, {free / 1e9:.1f} GB free"))
    report.rows.append(("BLAS", blas.NAME))
    try:
        from optiq import backend
    except ImportError as error:
        report.problems.append(f"MLX cannot be loaded ({error}); install one MLX back end")
        return
    speed = backend.gflops()
    report.rows += [
        ("device", backend.device_name()),
        ("speed", f"{speed:.0f} GFLOP/s (float32 matrix product)"),
        ("memory", f"{backend.memory_bytes() / 1e9:.1f} GB"),
    ]
    if backend.is_cpu() and sys.platform == "linux" and speed < _SLOW_GFLOPS:
        report.advice.append(_FASTER)
