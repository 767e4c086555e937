"""Train on on-policy pairs, as InSPO's authors do (arXiv 2512.23126): sample, rank with your function, train."""

import tempfile

import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer

SAMPLES = 5  # answers per prompt; the best and the worst become a pair

tokenizer = tiny_tokenizer()
model = tiny_model(tokenizer)  # yours: an instruction-tuned model, or its path


def score(prompt, answer):
    """Return the answer's grade. Here digits are good; replace this with a reward model, unit tests or a judge."""
    return sum(character.isdigit() for character in answer) - 0.1 * len(answer)


def sampled_pairs(prompts):
    """Return one pair per prompt, if its best and worst answers differ."""
    pairs = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_return_sequences": SAMPLES}
        with torch.no_grad():
            sequences = model.generate(**inputs, **sampling, max_new_tokens=12)
        answers = tokenizer.batch_decode(sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        ranked = sorted({answer for answer in answers if answer}, key=lambda answer: score(prompt, answer))
        if len(ranked) > 1:
            pairs.append({"prompt": prompt, "chosen": ranked[-1], "rejected": ranked[0]})
    return pairs


if __name__ == "__main__":
    torch.manual_seed(0)
    pairs = sampled_pairs([f"{a}+{b}=" for a in range(3) for b in range(3)])
    print(f"{len(pairs)} pairs, the first {pairs[0]}")
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1}
    trainer = InSPOTrainer(
        model,
        tiny_model(tokenizer),  # the model that sampled the answers is the reference
        args=InSPOConfig(tempfile.mkdtemp(), **options, beta=0.1, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
