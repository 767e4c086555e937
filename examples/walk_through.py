"""Walk through InSPO step by step: what the rows hold, what the reference scores, and what training changes."""

import torch
from tiny import tiny_model, tiny_tokenizer

import inspo_kernels as ik

tokenizer = tiny_tokenizer()
texts = [("2+2=", "4", "5"), ("3+4=", "7", "I do not know"), ("9-1=", "8", "10")]  # prompt, chosen, rejected
pairs = [[tokenizer(text).input_ids for text in (p, f"{c}<eos>", f"{r}<eos>")] for p, c, r in texts]


def score(model, conditioned, **options):
    """Return the loss of the pairs; without ``options``, the tables of summed log-probs and lengths."""
    batch = ik.condition_pairs(pairs, pad_token_id=tokenizer.pad_token_id, conditioned=conditioned)
    hidden, head = ik.hidden_and_head(model, **{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")})
    labels = {name: batch[name] for name in ("labels", "marginal_labels")}
    return (ik.fused_inspo_loss if options else ik.pair_logps)(hidden, **labels, **head, **options)


# 1. Each pair becomes two rows. The last response of a row is scored; it sees the prompt and the other response.
batch = ik.condition_pairs(pairs, pad_token_id=tokenizer.pad_token_id)
for name, row in (("chosen", 0), ("rejected", len(pairs))):
    scored = tokenizer.decode(batch["labels"][row][batch["labels"][row] != -100])
    print(f"row {row} scores the {name} response {scored!r} in {tokenizer.decode(batch['input_ids'][row])!r}")

# 2. The reference is the model before training. It sees the prompt alone, so its log-probs are computed once.
with torch.no_grad():
    plain_sums, lengths = score(tiny_model(tokenizer), conditioned=False)  # 2 x pairs: chosen, rejected
    sums, _ = score(tiny_model(tokenizer), conditioned=True)  # 4 x pairs: the marginals follow
print("scored tokens", lengths.tolist(), "reference log-probs", plain_sums.round(decimals=1).tolist())

# 3. The same conditioned rows also hold the marginals: the first response of a row sees the prompt alone.
print(f"largest difference of the two ways to get them: {(sums[2:] - plain_sums).abs().max():.1e} nats")
gap = (sums[:2] - sums[2:]).mean()
print(f"log-prob given the other response - given the prompt alone: {gap:+.2f} nats per response")

# 4. Train once with InSPO and once with plain DPO, and compare the margins given the prompt alone, as at inference.
for conditioned in (True, False):
    model = tiny_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        out = score(model, conditioned, objective=ik.DPO(beta=0.1), ref_logps=plain_sums.flatten())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        change = score(model, conditioned=False)[0] - plain_sums
    name, margin = "InSPO" if conditioned else "plain", 0.1 * (change[0] - change[1]).mean()
    print(f"{name}: loss {out.loss:.3f}, margin from the prompt alone {margin:+.3f}")
