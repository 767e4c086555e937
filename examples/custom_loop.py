"""Train InSPO in a plain torch loop: score the reference once, then use conditioned pairs and the fused loss."""

import torch
from tiny import tiny_model, tiny_tokenizer

import inspo_kernels as ik

tokenizer = tiny_tokenizer()  # yours: AutoTokenizer.from_pretrained(...)
model = tiny_model(tokenizer)  # yours: AutoModelForCausalLM.from_pretrained(...).eval()
texts = [("2+2=", "4", "5"), ("Capital of France?", " Paris", " Rome, I think")]  # prompt, chosen, rejected
end = [tokenizer.eos_token_id]
pairs = [(tokenizer(p).input_ids, tokenizer(c).input_ids + end, tokenizer(r).input_ids + end) for p, c, r in texts]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def forward(conditioned):
    """Return the model's hidden states and head for ``index``, and the batch of pairs."""
    batch = ik.condition_pairs(pairs, pad_token_id=tokenizer.pad_token_id, conditioned=conditioned)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return *ik.hidden_and_head(model, **inputs), batch


with torch.no_grad():  # the reference is the model before training, and sees the prompt alone
    hidden, head, batch = forward(conditioned=False)
    sums, _ = ik.pair_logps(hidden, labels=batch["labels"], **head)
    ref_logps = sums.flatten()

for step in range(5):
    hidden, head, batch = forward(conditioned=True)
    out = ik.fused_inspo_loss(hidden, labels=batch["labels"], ref_logps=ref_logps, objective=ik.DPO(beta=0.1), **head)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, f"loss {out.loss.item():.4f}", f"margin {out.metrics()['rewards/margins'].item():+.4f}")
