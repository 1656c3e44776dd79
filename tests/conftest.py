"""What must be settled before any test module is imported."""

import os

import torch

# Triton decides when it is first imported whether to interpret kernels; torch alone does not import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
