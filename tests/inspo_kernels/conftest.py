"""Without a GPU, Triton kernels are interpreted, which Triton decides when it is first imported: before any test."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
