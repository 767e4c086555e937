"""Set up what all tests share, before any test imports the libraries concerned."""

import gc
import os

gc.disable()  # until tests are collected: imports make millions of objects, and hardly any garbage

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Without a GPU, Triton kernels are interpreted. Triton decides this at its first import, which any test may trigger.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Two threads would only fight over tensors this small, here and in the processes that tests start. Inductor would start
# processes of its own to compile in, each of which imports torch for a handful of kernels.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


def pytest_collection_finish() -> None:
    """Spare the garbage collector the objects that imports made.

    Every training run collects garbage once, which otherwise takes half a second, as long as the rest of a tiny run.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
