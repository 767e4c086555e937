"""Use InSPO's loss in verl, whose actor calls ``loss_function(config, model_output, data, dp_group=None)``.

verl passes the log-probs (B, response length) and the data of a micro-batch, and expects a scalar and metrics. Here
``response_log_probs`` takes the place of verl's fused kernel: it computes log-probs and entropy from hidden states and
the head's weight. verl lays out the rows. Both rows of a pair must be in the same micro-batch, with chosen rows first.
"""

from types import SimpleNamespace

import torch

import inspo_kernels as ik


def response_log_probs(hidden, weight, responses, temperature):
    """Return the fields of verl's model_output: the responses' log-probs and entropy, from one pass over the logits."""
    log_probs, statistics = ik.linear_logps(hidden, weight, responses, temperature=temperature, statistics=("entropy",))
    return {"log_probs": log_probs, "entropy": statistics["entropy"]}


def inspo_loss(config, model_output, data, dp_group=None):
    """Return the loss of conditioned pairs and its metrics. Rows 0..B/2-1 are chosen responses, the others rejected."""
    mask = data["response_mask"].bool()
    chosen, rejected = (model_output["log_probs"].double() * mask).sum(1).chunk(2)
    ref_chosen, ref_rejected = (data["ref_log_prob"].double() * mask).sum(1).chunk(2)
    chosen_len, rejected_len = mask.double().sum(1).chunk(2)
    index = torch.arange(len(chosen), device=mask.device)
    sums = ik.PairSums(chosen, rejected, chosen_len, rejected_len, index, ref_chosen, ref_rejected)
    objective = config.objective
    rewards = [reward.detach().mean() for reward in objective.rewards(sums)]
    metrics = {"actor/rewards_chosen": rewards[0].item(), "actor/rewards_rejected": rewards[1].item()}
    return objective(sums).mean().float(), metrics


if __name__ == "__main__":
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    data = {
        "responses": torch.randint(50, (4, 6)),
        "response_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 4 + [0] * 2, [1] * 6]),
        "ref_log_prob": torch.full((4, 6), -4.0),  # of rows without the alternative
    }
    output = response_log_probs(hidden, weight, data["responses"], temperature=0.9)
    loss, metrics = inspo_loss(SimpleNamespace(objective=ik.DPO(beta=0.1)), model_output=output, data=data)
    loss.backward()
    print(f"loss {loss.item():.4f}", metrics, f"gradient {weight.grad.norm().item():.4f}")
