"""The surface of the command line: a change of a flag or of its help shows here.

After a wanted change: `python tests/unit/cli/test_help.py`.
"""

from pathlib import Path

import pytest

from optiq.cli.main import VERBS, command

GOLDEN = Path(__file__).parents[2] / "golden" / "help"
NAMES = ["optiq", *VERBS, "cache list", "cache clear"]


def help_text(name: str) -> str:
    """What `--help` prints, 100 columns wide."""
    context, current = None, command
    for word in name.split() if name == "optiq" else ["optiq", *name.split()]:
        if context is not None:
            current = current.get_command(context, word)
        context = current.make_context(word, [], context, resilient_parsing=True)
        context.terminal_width = 100
    return current.get_help(context) + "\n"


def golden(name: str) -> Path:
    """The file with the text of a command."""
    return GOLDEN / f"{name.replace(' ', '-')}.txt"


@pytest.mark.parametrize("name", NAMES)
def test_help_is_as_recorded(name):
    assert help_text(name) == golden(name).read_text()


def test_nothing_else_is_recorded():
    assert {path.stem for path in GOLDEN.iterdir()} == {golden(name).stem for name in NAMES}


if __name__ == "__main__":
    for each in NAMES:
        golden(each).write_text(help_text(each))
