"""The Python example of the README runs."""

import re
import shutil
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example(tiny_llama, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    shutil.copytree(tiny_llama, tmp_path / "models" / "smollm2-135m-hf")
    monkeypatch.setenv("OPTIQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert 'print(f"measured' in code
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "bpw, predicted KL" in printed
    assert "measured KL" in printed
    assert (tmp_path / "models" / "smollm2-5bpw" / "README.md").exists()
