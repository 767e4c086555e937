"""Shared by all tests: two threads would only fight over tensors this small."""

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")
