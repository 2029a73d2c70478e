"""The wheel holds all of the package."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_code_corpus_templates_and_the_type_marker(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in (source / "optiq").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert files <= packed
    assert "optiq/py.typed" in packed
    assert any(name.startswith("optiq/data/corpus/") and name.endswith(".jsonl") for name in packed)
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    assert any(name.endswith("entry_points.txt") for name in packed)
