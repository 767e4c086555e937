"""Write your own pairwise loss: plain torch on per-pair sums, computed by the same fused kernels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import inspo_kernels as ik


@dataclass(frozen=True)
class CautiousDPO(ik.Objective):
    """DPO, plus a penalty for a chosen response that falls below the reference (DPO-positive, arXiv 2402.13228)."""

    beta: float = 0.1
    penalty: float = 5.0

    def __call__(self, s):  # ik.PairSums: float64 vectors, one entry per pair
        chosen, rejected = s.chosen - s.ref_chosen, s.rejected - s.ref_rejected
        return -F.logsigmoid(self.beta * (chosen - rejected - self.penalty * (-chosen).relu()))


# Stand-ins for a model's outputs: hidden states of 4 pairs (8 rows) with 12 tokens, and the head's weight.
torch.manual_seed(0)
hidden = torch.randn(8, 12, 32, requires_grad=True)
weight = torch.randn(1000, 32, requires_grad=True)
labels = torch.randint(1000, (8, 12))
labels[:, :5] = -100  # prompts are not scored
ref_logps = torch.full((8,), -60.0)

for objective in (CautiousDPO(), ik.Mixture([(CautiousDPO(beta=0.2), 1.0), ("sft", 0.1)])):
    out = ik.fused_inspo_loss(hidden, weight, labels, objective=objective, ref_logps=ref_logps)
    out.loss.backward()
    print(objective, f"loss {out.loss.item():.4f}", f"gradient {weight.grad.norm().item():.4f}")
    weight.grad = hidden.grad = None
