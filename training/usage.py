"""How fast a run is, how well it uses its devices, and how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

GIB = 2**30

# Dense bfloat16 products in FLOP/s, from the vendors' data sheets, by the name that torch reports. Others: no MFU.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
}


@dataclass(frozen=True)
class Usage:
    """Turns counts of tokens and seconds into the metrics of ``metrics.jsonl``. ``peak``: FLOP/s of all devices."""

    device: torch.device
    flops_per_token: float
    flops_per_scored_token: float
    peak: float | None

    def metrics(self, tokens: int, scored: int, seconds: float) -> dict[str, float]:
        """``tokens_per_second`` (tokens that the model reads, no padding), ``mfu`` where the peak is known, memory."""
        values = {"tokens_per_second": tokens / seconds}
        if self.peak:
            flops = tokens * self.flops_per_token + scored * self.flops_per_scored_token
            values["mfu"] = flops / seconds / self.peak
        if self.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        else:
            values["rss_gib"] = psutil.Process().memory_info().rss / GIB
        return values


def usage_of(model: PreTrainedModel, device: torch.device, *, bf16: bool, processes: int) -> Usage:
    """Model FLOPs: 2 a parameter and token forward, 2 for the activations' gradients, 2 more for trained parameters'.

    That is 6 N for a full fine-tune. N leaves out the input embedding, which is a look-up; the head is counted for
    scored tokens alone. Attention's products of positions with positions, recomputation and padding are not counted.
    MFU is these over the devices' peak in bfloat16; there is none for other dtypes, unknown devices, and models of
    which a token uses a part of the parameters (mixtures of experts).
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    trunk = [p for p in model.parameters() if p is not embedding and p is not head]
    per_token = sum(p.numel() * (6 if p.requires_grad else 4) for p in trunk)
    experts = any(getattr(model.config, f"{name}_experts", None) for name in ("num", "num_local", "n_routed"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = PEAK_FLOPS.get(name) if bf16 and not experts else None
    return Usage(device, per_token, head.numel() * (6 if head.requires_grad else 4), peak * processes if peak else None)
