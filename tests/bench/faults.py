"""Faults by their kind: cases that tests/test_faults.py tries, and cases right.

    python tests/bench/faults.py     # about a minute on two cores

Prints a table and writes it to tests/bench/results/faults.json. A case is a test with
one of its values; what cannot be tried on this machine is not counted.
"""

import json
import platform
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"


class Count:
    """A plugin of pytest: kind -> [cases tried, cases right]."""

    def __init__(self):
        self.kinds, self.wrong = {}, []

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        right = report.when == "call" and report.passed
        if right or report.failed:  # an error of a fixture is a case that failed
            tried = self.kinds.setdefault(item.function.kind, [0, 0])
            tried[0] += 1
            tried[1] += right
            if not right:
                self.wrong.append(item.name)


def main():
    count = Count()
    code = pytest.main(
        ["-q", "-p", "no:cacheprovider", str(ROOT / "tests/test_faults.py")], [count]
    )
    rows = [(kind, *numbers) for kind, numbers in count.kinds.items()]
    rows.append(("together", *(sum(row[i] for row in rows) for i in (1, 2))))
    print("\n| kind | cases tried | cases right |\n|---|---|---|")
    for row in rows:
        print("| {} | {} | {} |".format(*row))
    machine = {"machine": platform.machine(), "python": platform.python_version(),
               "torch": str(torch.__version__)}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    content = {**machine, "rows": rows, "wrong": count.wrong}
    (RESULTS / "faults.json").write_text(json.dumps(content, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
