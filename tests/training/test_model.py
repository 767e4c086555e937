from __future__ import annotations

import huggingface_hub
import pytest
import torch
from helpers import TINY, tiny_model
from transformers import AutoTokenizer, GPT2LMHeadModel

import inspo_kernels as ik
from training.architecture import check_architecture
from training.config import TrainConfig
from training.errors import InputError
from training.model import byte_tokenizer, load_model, padding_id


def test_the_same_seed_builds_the_same_model():
    one, again, other = (load_model(TrainConfig(model=TINY, seed=seed))[0] for seed in (1, 1, 2))
    weights = [model.lm_head.weight for model in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    gpt2, _ = load_model(TrainConfig(model={"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}))
    assert isinstance(gpt2, GPT2LMHeadModel)


def test_building_a_model_keeps_the_random_state():
    before = torch.get_rng_state()
    load_model(TrainConfig(model=TINY))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hiden_size": 8}, r"model\.hiden_size; did you mean 'hidden_size'"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "multiple of the number of attention heads"),
        ("./no/such/folder", r"'\./no/such/folder': no such folder"),
    ],
)
def test_a_model_that_cannot_be_made_is_named(model, message):
    with pytest.raises(InputError, match=message):
        load_model(TrainConfig(model=model))


def test_any_architecture_is_accepted_whose_head_is_linear():
    check_architecture(tiny_model())
    section = {"model_type": "bloom", "hidden_size": 8, "n_layer": 1, "n_head": 2}
    model, _ = load_model(TrainConfig(model=section))
    check_architecture(model)
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
    with pytest.raises(InputError, match=r"BloomForCausalLM cannot be trained here.*another architecture"):
        check_architecture(model)


def test_checking_the_architecture_leaves_log_probs_right():
    model = tiny_model().eval()  # the embedding of padding, id 0, is 0
    check_architecture(model)
    ids = torch.tensor([[1, 50, 60]])
    with torch.no_grad():
        hidden, head = ik.hidden_and_head(model, input_ids=ids)
        assert head["logit_scale"] == 1.0
        torch.testing.assert_close(hidden @ head["weight"].T, model(ids).logits)


def test_truncated_weights_are_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        InputError, match=r"its weights \(model\.safetensors, or its parts\) could not be loaded"
    ) as error:
        load_model(TrainConfig(model=str(tmp_path)))
    assert "HF_HUB_OFFLINE" not in str(error.value)  # the folder is there


@pytest.mark.parametrize(
    ("missing", "named"),
    [("config.json", r"config\.json"), ("tokenizer.json", "tokenizer"), ("model.safetensors", "weights")],
)
def test_a_folder_that_lacks_a_file_says_which(tmp_path, missing, named):
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    if missing == "tokenizer.json":
        (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=rf"its {named}.* could not be loaded"):
        load_model(TrainConfig(model=str(tmp_path)))


def test_an_unreachable_hub_names_file_and_remedy(monkeypatch):
    # Imitates a missing network without half a minute of retries.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        load_model(TrainConfig(model="some-org/some-model"))
    message = str(error.value)
    assert message.startswith("model 'some-org/some-model': its config.json could not be loaded")
    assert "hf download some-org/some-model --local-dir DIR" in message and "HF_HUB_OFFLINE=1" in message


def test_attention_is_chosen_by_name():
    model, _ = load_model(TrainConfig(model=TINY, attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(InputError, match="no_such_attention"):
        load_model(TrainConfig(model=TINY, attn_implementation="no_such_attention"))


def test_half_precision_weights_are_trained_in_float32(tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(TrainConfig(model=str(tmp_path)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_byte_tokenizer_round_trips_any_text(tmp_path):
    text = "Käse  , 日本\n\t<tag> don't ."
    byte_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and len(ids) == 1 + len(text.encode())
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_tokenizer_without_pad_or_eos_token():
    tokenizer, said = byte_tokenizer(), []
    tokenizer.pad_token = None
    assert padding_id(tokenizer, said.append) == tokenizer.eos_token_id
    assert "no padding token" in said[0]
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        padding_id(tokenizer, said.append)


@pytest.mark.parametrize(
    "name", ["{}/nowhere", "./nowhere", "../nowhere", "runs/nowhere", "runs/mine/best", "a/b/c", "~/no"]
)
def test_a_missing_path_is_not_searched_on_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.model.AutoConfig.from_pretrained", lambda *what: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such folder") as error:
        load_model(TrainConfig(model=name.format(tmp_path)))
    assert "hf download" not in str(error.value)
