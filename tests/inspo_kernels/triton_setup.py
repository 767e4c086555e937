"""Set up the triton backend on a GPU or, without one, in Triton's interpreter on CPU tensors (see conftest)."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from cases import Case

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def on_device(case: Case) -> Case:
    """Move all tensors of a case to the device under test."""
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{name: t.to(DEVICE) for name, t in tensors.items() if isinstance(t, torch.Tensor)})


# numpy warns where a GPU computes inf or nan and a mask then discards it
quiet = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered:RuntimeWarning")
    for what in ("overflow", "invalid value", "divide by zero", "underflow", "All-NaN slice")
]

if INTERPRETED:
    from triton.runtime import interpreter

    if not isinstance(tl.zeros, interpreter.InterpretedFunction):
        raise RuntimeError(
            "Triton was imported before TRITON_INTERPRET=1 was set: set it in a conftest that runs first"
        )

    _builder = interpreter.InterpreterBuilder
    _cast = _builder.cast_impl

    def _cast_to_nearest(self, src, dst_type):
        """Round to nearest, as every GPU does. The interpreter truncates float32 to bfloat16."""
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.uint16)
            return interpreter.TensorHandle(rounded.numpy(), dst_type.scalar)
        return _cast(self, src, dst_type)

    _builder.cast_impl = _cast_to_nearest

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_with_index(tensor, scope):
        """Give tensors __index__, because Triton 3.6 takes int() of one-element arrays, which numpy 2.5 refuses."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _patch_tensor_with_index
