"""Turn a TRL script with DPOTrainer into InSPO by changing one import."""

import sys
import tempfile

from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

# before: from trl import DPOConfig, DPOTrainer
from inspo_kernels.integrations.trl import InSPOConfig as DPOConfig
from inspo_kernels.integrations.trl import InSPOTrainer as DPOTrainer

tokenizer = tiny_tokenizer()
rows = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    {"prompt": "Capital of France?", "chosen": " Paris", "rejected": " Rome, I think"},
    {"prompt": "Name a prime.", "chosen": " Seven.", "rejected": " Nine."},
    {"prompt": "Sky?", "chosen": " Blue.", "rejected": " It depends."},
]
trainer = DPOTrainer(
    tiny_model(tokenizer),  # yours: "Qwen/Qwen3-0.6B"
    tiny_model(tokenizer),  # the reference; leave it out if you pass the model by name
    args=DPOConfig(
        sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        num_train_epochs=3,
        learning_rate=1e-3,
        logging_steps=2,
        loss_type=["sigmoid", "sft"],  # any of DPOConfig's options
        loss_weights=[1.0, 0.1],
        bf16=False,
        report_to="none",
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.train()
