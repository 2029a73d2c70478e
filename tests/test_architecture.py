"""Rules of the code that no linter checks, and documents that must not drift."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from optiq.cli import toml
from optiq.cli.main import VERBS
from optiq.cli.options import SECTIONS, flag_name

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "optiq").rglob("*.py"))
MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 100


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def long_functions(tree):
    """Functions over the limit, by name."""
    return [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def imported_names(tree):
    """Names in a file that are bound by an import."""
    return {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def patches(tree):
    """Assignments to attributes or items of imported things, as `line: target`."""
    imported = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(value=node.args[0], attr="x")]
        else:
            continue
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            is_member = root is not target and isinstance(root, ast.Name)
            if is_member and root.id in imported:
                found.append(f"{node.lineno}: {ast.unparse(target)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_a_source_file_keeps_the_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= MAX_FILE_LINES
    assert long_functions(tree) == []
    assert patches(tree) == []
    if "cli" not in path.parts:
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call.lineno for call in calls if ast.unparse(call.func) == "print"]


@pytest.mark.parametrize(
    "text",
    [
        "import mlx_lm\nmlx_lm.load = 1",
        "import sys\nsys.modules['mlx'] = 1",
        "import mlx.nn as nn\nnn.Linear.__call__ = 1",
        "from mlx_lm import server\nsetattr(server, 'x', 1)",
        "import sys\nsys.argv += ['a']",
    ],
)
def test_the_check_finds_patches(text):
    assert patches(ast.parse(text))


def test_the_check_leaves_own_attributes_alone():
    text = "import os\nclass A:\n  def f(self):\n    self.x = os.sep\n    y = {}\n    y['a'] = 1"
    assert patches(ast.parse(text)) == []


def test_the_options_page_is_up_to_date():
    """After a change of options: `optiq config --markdown > docs/options.md`."""
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == toml.markdown(SECTIONS)
    for config_type in SECTIONS.values():
        for field in dataclasses.fields(config_type):
            assert f"`{field.name}`" in page


def test_every_config_field_has_help_that_is_a_sentence():
    for config_type in SECTIONS.values():
        for field in dataclasses.fields(config_type):
            assert field.metadata["help"].rstrip(")").endswith(".")


def documents():
    return [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("path", documents(), ids=names(documents()))
def test_commands_and_flags_in_documents_exist(path):
    text = path.read_text()
    used = set(re.findall(r"(?:`|^)optiq ([a-z]+)", text, flags=re.MULTILINE))
    assert used <= set(VERBS)
    own = {"--json", "--help", "--like", "--against", "--baseline", "--markdown", "--plot"}
    own |= {"--logs", "--baseline-logs", "--yes", "--responses"}
    pip = {"--no-deps", "--require-hashes", "--strict"}
    known = own | pip | {"--config"}
    known |= {flag_name(f.name) for t in SECTIONS.values() for f in dataclasses.fields(t)}
    assert set(re.findall(r"(?<![-\w])--[a-z][a-z-]+", text)) <= known


def test_the_readme_lists_every_verb():
    text = (ROOT / "README.md").read_text()
    assert all(f"`optiq {verb} " in text or f"`optiq {verb}`" in text for verb in VERBS)


def test_links_between_documents_lead_somewhere():
    for path in documents():
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_lock_names_no_host():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "--index" not in text


def test_ci_is_make_test():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.splitlines()[-1] == "make test"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
