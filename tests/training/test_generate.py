from __future__ import annotations

import pytest
import torch
from helpers import tiny_model

from training.generate import generate, main
from training.model import byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture
def saved(tmp_path):
    # Large embeddings make the next byte depend visibly on the prompt.
    model = tiny_model(initializer_range=1.0).eval()
    model.save_pretrained(tmp_path / "final")
    TOKENIZER.save_pretrained(tmp_path / "final")
    return model, str(tmp_path / "final")


def test_main_answers_greedily_from_the_prompt_alone(saved, capsys):
    model, folder = saved
    ids = [1, *TOKENIZER("Why?", add_special_tokens=False)["input_ids"]]
    for _ in range(8):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    main(["--model", folder, "--prompt", "Why?", "--max_new_tokens", "8"])
    assert capsys.readouterr().out == TOKENIZER.decode(ids[5:], skip_special_tokens=True) + "\n"


def test_samples_follow_the_seed(saved):
    model, _ = saved
    one, again, other = (
        generate(model, TOKENIZER, "Why?", max_new_tokens=12, temperature=2.0, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_chat_wraps_the_prompt(saved):
    model, _ = saved
    wrapped = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    answer = generate(model, TOKENIZER, "Why?", max_new_tokens=8, chat=True)
    assert answer == generate(model, TOKENIZER, wrapped, max_new_tokens=8)
    assert answer != generate(model, TOKENIZER, "Why?", max_new_tokens=8)


def test_a_missing_model_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tmp_path / "nothing"), "--prompt", "Why?"])
    assert stopped.value.code == 2
    assert "nothing" in capsys.readouterr().err
