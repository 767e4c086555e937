"""Split an LM head over ranks on CPUs: torchrun --standalone --nproc_per_node 2 FILE, or python FILE for one rank.

Every rank runs the same trunk on the same pairs, and holds its own rows of the head's weight. The losses are the same
for any number of ranks.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import inspo_kernels as ik

VOCAB, WIDTH = 1003, 64


def main():
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    pairs = [[torch.randint(VOCAB, (n,)).tolist() for n in (5, 12, 9)] for _ in range(8)]
    batch = ik.condition_pairs(pairs, pad_token_id=0)
    trunk = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
    # The vocabulary need not divide by the number of ranks.
    weight = nn.Parameter(distribute_tensor(torch.randn(VOCAB, WIDTH) / 8, mesh, [Shard(0)]))
    # An optimizer accepts DTensors or plain tensors, but not both.
    optimizers = [torch.optim.AdamW(parameters, lr=1e-3) for parameters in (trunk.parameters(), [weight])]
    for step in range(10):
        hidden = trunk(batch["input_ids"])
        out = ik.fused_inspo_loss(
            hidden, weight, batch["labels"], objective="simpo", process_group=mesh.get_group("tp")
        )
        out.loss.backward()  # hidden's gradient is already summed over the ranks
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step} loss {out.loss.item():.6f} margin {out.margins.mean().item():+.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
