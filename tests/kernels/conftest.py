"""The folder `interpreted/` is collected where its kernels can run: under Triton's interpreter, or on a GPU.

`TRITON_INTERPRET` has to be set before Triton is imported and makes compilation impossible, so a plain `pytest` without
a GPU leaves that folder to the subprocess of `test_interpreted.py`.
"""

from __future__ import annotations

import os

import torch

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["interpreted"]
