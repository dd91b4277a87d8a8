"""The suite on the oldest versions that requirements.txt allows, in a new environment.

    python tests/bench/floor.py                         # this Python, the quick suite
    python tests/bench/floor.py --python python3.10     # another one
    python tests/bench/floor.py tests/test_model.py     # what comes behind is pytest's

In a temporary folder, each package of requirements.txt is installed at its floor.
Prints how the tests ended and what was installed; exit code: that of pytest.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="default: this one")
    args, of_pytest = parser.parse_known_args()
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    floors = re.findall(r"(?m)^([\w.-]+)\s*>=\s*([\d.]+)", text)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
        pinned = [f"{name}=={version}" for name, version in floors]  # 1.26 is 1.26.0
        subprocess.run([args.python, "-m", "venv", folder], check=True)
        subprocess.run([own, "-m", "pip", "install", "-q", *pinned], check=True)
        pytest = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *of_pytest]
        code = subprocess.run(pytest, cwd=ROOT).returncode
        for command in (["--version"], ["-m", "pip", "list"]):
            subprocess.run([own, *command], check=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
