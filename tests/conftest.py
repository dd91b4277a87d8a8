"""The tests import the project's files from the folder above this one."""

import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py: read by torch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when model.py defines its kernel
