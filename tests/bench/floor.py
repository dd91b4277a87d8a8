"""The suite on the oldest versions that requirements.txt allows, in a new environment.

    python tests/bench/floor.py                         # this Python, the whole suite
    python tests/bench/floor.py --python python3.10     # another one
    python tests/bench/floor.py tests/test_model.py     # what comes behind is pytest's

It makes a virtual environment in a temporary folder, installs each package of
requirements.txt at its floor (torch>=2.13,<2.14 is installed as torch==2.13.0), runs
pytest there, and prints what was installed and how the tests ended. Exit code: that of
pip or pytest. Triton comes with torch or not at all: tests that need it skip.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def floors():
    """name -> the oldest version that requirements.txt allows, 2.13 as 2.13.0."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line):
            name, version = match.groups()
            parts = version.split(".")
            found[name] = ".".join(parts + ["0"] * (3 - len(parts)))
    return found


def make_environment(python, folder, packages):
    """Its Python, with these packages (name -> version) and what they need."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    scripts = "Scripts" if os.name == "nt" else "bin"
    own = folder / scripts / "python"
    pinned = [f"{name}=={version}" for name, version in packages.items()]
    subprocess.run([own, "-m", "pip", "install", "--quiet", *pinned], check=True)
    return own


def installed(python):
    """name -> version of all that is installed there."""
    command = [python, "-m", "pip", "list", "--format", "json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {row["name"].lower(): row["version"] for row in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="default: this one")
    args, of_pytest = parser.parse_known_args()
    packages = floors()
    with tempfile.TemporaryDirectory() as folder:
        try:
            own = make_environment(args.python, Path(folder) / "venv", packages)
        except subprocess.CalledProcessError as error:
            print(f"not installed: {packages}")
            return error.returncode
        version = [own, "-c", "import platform; print(platform.python_version())"]
        number = subprocess.run(version, check=True, capture_output=True, text=True)
        there = installed(own)
        tests = subprocess.Popen(
            [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *of_pytest], cwd=ROOT,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        last = ""
        for line in tests.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
        code = tests.wait()
    print("\n| package | floor | installed |\n|---|---|---|")
    print(f"| Python | | {number.stdout.strip()} |")
    for name, floor in packages.items():
        print(f"| {name} | {floor} | {there.get(name, 'missing')} |")
    print(f"| pytest {' '.join(of_pytest)} | | {last} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
