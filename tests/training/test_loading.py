"""Test models that others load or save wrong: each is refused before step 1, or handled correctly."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from helpers import PAIRS, metrics, options, tiny_model, token_pairs
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from training import generate
from training.adapters import adapter_off, add_lora, has_adapter
from training.architecture import check_architecture
from training.chat import prepare_tokenizer
from training.checkpoint import whole_folder
from training.config import TrainConfig
from training.data_options import DataOptions
from training.errors import InputError, SaveError
from training.model import byte_tokenizer, load_model, padding_id
from training.save_model import check_saving, save_final
from training.train import main, train

ID = torch.tensor([[1, 50, 60, 70]])


def base(folder, **fields):
    """Save a model with its tokenizer."""
    tiny_model(initializer_range=0.5, **fields).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def change_weights(folder, change, name="model.safetensors"):
    weights = load_file(folder / name)
    save_file(change(weights), folder / name, metadata={"format": "pt"})


def edit(file, **changes):
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def run(folder, out, *more):
    main(["--model", str(folder), *options(out, "--max_steps", "1", *more)[8:]])


def refused(folder, tmp_path, capsys, *more):
    """Return the error of ``train``. Its dry run must give the same error."""
    said = []
    for words in ([], ["--dry_run", "true"]):
        with pytest.raises(SystemExit) as stopped:
            run(folder, tmp_path / "refused", *more, *words)
        said.append(capsys.readouterr().err)
        assert stopped.value.code == 2 and "Traceback" not in said[-1]
        assert not (tmp_path / "refused/final").exists()
    return said


# --- Whatever from_pretrained initialises anew ---


DAMAGE = {
    "prefixed": lambda w: {f"_orig_mod.{name}": tensor for name, tensor in w.items()},
    "one missing": lambda w: {name: tensor for name, tensor in w.items() if "q_proj" not in name},
    "no head": lambda w: {name: tensor for name, tensor in w.items() if "lm_head" not in name},
    "renamed": lambda w: {name.replace("mlp", "ffn"): tensor for name, tensor in w.items()},
}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("prefixed", r"lack 12 tensors.*lm_head.weight.*they hold _orig_mod"),
        ("one missing", r"lack 1 tensors.*model.layers.0.self_attn.q_proj.weight"),
        ("no head", r"lack 1 tensors.*lm_head.weight"),
        ("renamed", r"lack 3 tensors.*mlp.*they hold model.layers.0.ffn"),
    ],
)
def test_weights_that_would_be_random_are_refused(tmp_path, capsys, damage, named):
    folder = base(tmp_path / "m")
    change_weights(folder, DAMAGE[damage])
    for said in refused(folder, tmp_path, capsys):
        assert_matches(named, said)
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--model", str(folder), "--prompt", "Why?"])
    assert_matches(named, capsys.readouterr().err)


def assert_matches(pattern, text):
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_a_tied_head_is_no_missing_tensor(tmp_path):
    folder = base(tmp_path / "m", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model, _ = load_model(DataOptions(model=str(folder)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    load_model(DataOptions(model=str(folder)), meta=True)


def test_layers_that_the_configuration_lacks_are_refused(tmp_path, capsys):
    folder = base(tmp_path / "m", num_hidden_layers=3)
    edit(folder / "config.json", num_hidden_layers=2)
    for said in refused(folder, tmp_path, capsys):
        assert "by its config.json the model has no model.layers.2." in said


@pytest.mark.parametrize("name", ["bias", "lora_A.weight", "weight_scale"])
def test_tensors_that_a_layer_ignores_are_refused(tmp_path, capsys, name):
    """A trained bias without ``attention_bias``, an unmerged adapter or a scale changes each log-prob."""
    folder, key = base(tmp_path / "m"), f"model.layers.0.self_attn.q_proj.{name}"
    change_weights(folder, lambda w: w | {key: torch.ones(16)})
    for said in refused(folder, tmp_path, capsys):
        assert f"by its config.json the model has no {key}, but its weights do" in said


def test_tensors_of_no_layer_are_ignored(tmp_path):
    folder = base(tmp_path / "m")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "v_head.weight": torch.ones(16)}
    of_float8 = {"model.layers.0.input_layernorm._extra_state": torch.ones(1)}
    change_weights(folder, lambda w: w | old | of_float8)
    run(folder, tmp_path / "out")


def test_an_adapter_that_lacks_a_tensor_is_refused(tmp_path, capsys):
    run(base(tmp_path / "m"), tmp_path / "out", "--lora.r", "2")
    adapter = tmp_path / "out/final"
    change_weights(adapter, lambda w: dict(list(w.items())[1:]), "adapter_model.safetensors")
    for said in refused(adapter, tmp_path, capsys):
        assert_matches("lack 1 tensors.*lora_", said)


# --- Corrupted folders ---


def _vocabulary(folder):
    edit(folder / "config.json", vocab_size=300)


def _cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _empty(name):
    return lambda folder: (folder / name).write_text("{}")


def _cut_text(name):
    return lambda folder: (folder / name).write_text((folder / name).read_text()[:-20])


def _lost_shard(folder):
    tiny_model(hidden_size=64).save_pretrained(folder, max_shard_size="100KB")
    next(folder.glob("model-00002-*")).unlink()
    (folder / "model.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            _vocabulary,
            r"weights and config.json do not fit together: .*embed_tokens.weight \(\(259, 16\) in the weights",
        ),
        (_cut, r"weights .*could not be loaded.*model.safetensors is damaged"),
        (_empty("tokenizer.json"), r"tokenizer .*could not be loaded.*tokenizer.json is damaged"),
        (_cut_text("tokenizer.json"), r"tokenizer .*could not be loaded.*tokenizer.json is damaged"),
        (_cut_text("tokenizer_config.json"), r"tokenizer .*could not be loaded.*tokenizer_config.json is damaged"),
        (_cut_text("config.json"), r"config.json could not be loaded.*config.json is damaged"),
        (_empty("config.json"), r"config.json could not be loaded.*config.json is damaged"),
        (_lost_shard, r"weights .*could not be loaded.*model-00002-of"),
        (_cut_text("generation_config.json"), r"generation_config.json is damaged"),
    ],
)
def test_a_corrupted_folder_names_its_file(tmp_path, capsys, damage, named):
    folder = base(tmp_path / "m")
    damage(folder)
    with pytest.raises(SystemExit) as stopped:
        run(folder, tmp_path / "out")
    assert stopped.value.code == 2
    assert_matches(named, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_corrupted_adapter_names_its_file(tmp_path, capsys, name):
    run(base(tmp_path / "m"), tmp_path / "out", "--lora.r", "2")
    file = tmp_path / "out/final" / name
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(SystemExit, match="2"):
        run(file.parent, tmp_path / "more")
    assert f"{name} is damaged" in capsys.readouterr().err


# --- Failures at the end of a run ---


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.3, "do_sample": False}, {"top_p": 0.9, "do_sample": False}], ids=str
)
def test_a_generation_config_with_warnings_is_saved(tmp_path, settings, touched):
    folder = base(tmp_path / "m")
    edit(folder / "generation_config.json", **settings)
    model, tokenizer = load_model(DataOptions(model=str(folder)))
    if touched:
        model.generation_config.pad_token_id = 2
    check_saving(model, tokenizer, DataOptions())
    save_final(folder, model, tokenizer, model.state_dict(), DataOptions())
    saved = json.loads((folder / "generation_config.json").read_text())
    assert settings.items() <= saved.items()
    run(folder, tmp_path / "out", "--eval_data", str(PAIRS), "--lora.r", "2")
    again = json.loads((tmp_path / "out/final/generation_config.json").read_text())
    assert settings.items() <= again.items()


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("no"), KeyError("no"), OSError("no")])
def test_any_failure_to_save_is_a_save_error(tmp_path, monkeypatch, error):
    model = tiny_model()

    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr(model, "save_pretrained", fail)
    folder = tmp_path / "final"
    with pytest.raises(SaveError, match=rf"^{folder} could not be written: .*no"), whole_folder(folder) as to:
        save_final(to, model, None, model.state_dict(), DataOptions())
    with pytest.raises(InputError, match=r"could not be saved after training: .*no"):
        check_saving(model, None, DataOptions())


@pytest.mark.parametrize("lora", [None, {"r": 2, "modules_to_save": ["norm"]}])
def test_valid_models_pass_the_save_check(lora):
    model = tiny_model()
    if lora:
        add_lora(model, lora, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_saving(model, byte_tokenizer(), DataOptions())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_are_saved_in_the_requested_dtype(tmp_path):
    run(base(tmp_path / "m"), tmp_path / "out", "--save_dtype", "bfloat16")
    final = tmp_path / "out/final"
    assert {tensor.dtype for tensor in load_file(final / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(final).dtype == torch.bfloat16


# --- Working state stays out of artefacts ---


def test_final_has_the_bases_own_pad_token(tmp_path):
    folder = base(tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    run(folder, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out/final").pad_token is None


def test_a_callers_tokenizer_is_not_changed():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    before = tokenizer.chat_template = "{{ a }}" + tokenizer.chat_template
    prepared = prepare_tokenizer(tokenizer, DataOptions(chat_template_kwargs={"a": 1}), lambda note: None)
    assert padding_id(prepared, lambda note: None) == 2
    assert tokenizer.pad_token is None is prepared.pad_token
    assert tokenizer.chat_template == before != prepared.chat_template
    config = TrainConfig(train_data=str(PAIRS), max_steps=1, chat_template_kwargs={"a": 1})
    train(config, model=tiny_model(), tokenizer=tokenizer, quiet=True)
    assert tokenizer.pad_token is None and tokenizer.chat_template == before


# --- What cannot run here ---


def test_flex_attention_on_a_cpu_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = base(tmp_path / "m")
    for said in refused(folder, tmp_path, capsys, "--attn_implementation", "flex_attention"):
        assert "attn_implementation=flex_attention" in said and "use sdpa or eager" in said
    with pytest.raises(InputError, match="flex_attention has no backward pass on a CPU"):
        load_model(DataOptions(model={"hidden_size": 16}, attn_implementation="flex_attention"))


def test_library_errors_give_advice_for_the_command_line(tmp_path, capsys, monkeypatch):
    def refuse(*arguments, **more):
        raise ValueError("its head is bent. Call fused_inspo_loss with its parts instead")

    monkeypatch.setattr("training.architecture.ik.hidden_and_head", refuse)
    with pytest.raises(SystemExit, match="2"):
        run(base(tmp_path / "m"), tmp_path / "out")
    said = capsys.readouterr().err
    assert "its head is bent; choose a model of another architecture" in said and "fused_inspo_loss" not in said


# --- Adapters ---


def test_an_adapter_that_is_not_whole_is_refused(tmp_path, capsys):
    run(base(tmp_path / "m"), tmp_path / "one", "--lora.r", "2")
    adapter = tmp_path / "one/final"
    settings = adapter / "adapter_config.json"
    (adapter / "adapter_model.safetensors").rename(tmp_path / "kept")
    for said in refused(adapter, tmp_path, capsys):
        assert "adapter_model.safetensors" in said
    (tmp_path / "kept").rename(adapter / "adapter_model.safetensors")
    edit(settings, base_model_name_or_path="/nowhere/base")
    for said in refused(adapter, tmp_path, capsys):
        assert f"model '{adapter}': adapter_config.json names the base '/nowhere/base': no such folder" in said
    edit(settings, base_model_name_or_path=None)
    for said in refused(adapter, tmp_path, capsys):
        assert "adapter_config.json names no base_model_name_or_path" in said


def test_folders_of_runs_name_their_models(tmp_path, capsys):
    run(base(tmp_path / "m"), tmp_path / "out")
    for name, kind in (("out", "run"), ("out/checkpoint-1", "checkpoint")):
        for said in refused(tmp_path / name, tmp_path, capsys):
            assert f"is the folder of a {kind}; give {tmp_path}/out/final\n" in said
    shutil.rmtree(tmp_path / "out/final")
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--model", str(tmp_path / "out/checkpoint-1"), "--prompt", "Why?"])
    assert "resume the run, which writes its model to final/" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--lora.r", "2"), ("--quantization", "4bit")])
def test_adapters_and_quantisation_need_a_saved_base(tmp_path, capsys, option):
    """The adapter of a built base would be saved alone, and no folder would hold its base."""
    for words in ([], ["--dry_run", "true"]):
        with pytest.raises(SystemExit, match="2"):
            main(options(tmp_path / "out", *option, *words))
        said = capsys.readouterr().err
        assert f"{option[0][2:].split('.')[0]}: needs a base in a folder or on the hub" in said
        assert "without lora" in said and not (tmp_path / "out").exists()


def test_lora_rank_must_be_a_whole_number(tmp_path, capsys):
    for said in refused(base(tmp_path / "m"), tmp_path, capsys, "--lora.r", "2.5"):
        assert "lora: r=2.5 must be a whole number above 0" in said


def test_a_dry_run_refuses_a_corrupted_generation_config(tmp_path, capsys):
    folder = base(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"max_length"')
    for said in refused(folder, tmp_path, capsys):
        assert "generation_config.json is damaged" in said


@pytest.mark.parametrize("text", ['{"eos_token_id": "2"}', '{"eos_token_id": [2, "5"]}', "[1]"])
def test_a_wrong_generation_config_is_refused(tmp_path, capsys, text):
    folder = base(tmp_path / "m")
    (folder / "generation_config.json").write_text(text)
    for said in refused(folder, tmp_path, capsys):
        assert "its generation_config.json could not be loaded" in said


def test_a_dry_run_says_that_weights_are_missing(tmp_path, capsys):
    folder = base(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    run(folder, tmp_path / "out", "--dry_run", "true")
    assert f"note: {folder} has no weights" in capsys.readouterr().out


def test_an_adapter_is_trained_further(tmp_path, capsys):
    folder = base(tmp_path / "m")
    run(folder, tmp_path / "one", "--lora.r", "2", "--lora.lora_alpha", "8", "--learning_rate", "0.1")
    first = tmp_path / "one/final"
    run(first, tmp_path / "two", "--logging_steps", "1", "--conditioned", "false")
    assert "M of them trained (LoRA)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # its reference is the adapter as it was
    settings = [json.loads((tmp_path / name / "final/adapter_config.json").read_text()) for name in ("one", "two")]
    for one in settings:
        one["target_modules"].sort()  # kept in a set
    assert settings[0] == settings[1] and settings[1]["base_model_name_or_path"] == str(folder)
    tensors = [load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("one", "two")]
    assert tensors[0].keys() == tensors[1].keys()
    assert any(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_an_adapter_with_tensors_of_its_base_is_refused(tmp_path, capsys):
    """peft saves a whole head beside an adapter if asked to; training would neither train nor save it."""
    run(base(tmp_path / "m"), tmp_path / "one", "--lora.r", "2")
    folder = tmp_path / "one/final"
    change_weights(
        folder, lambda w: w | {"base_model.model.lm_head.weight": torch.ones(259, 16)}, "adapter_model.safetensors"
    )
    for said in refused(folder, tmp_path, capsys):
        assert "also holds lm_head.weight, which modules_to_save does not name" in said and "merge_and_unload" in said


def test_an_adapter_may_leave_the_tokenizer_to_its_base(tmp_path):
    run(base(tmp_path / "m"), tmp_path / "one", "--lora.r", "2")
    for file in (folder := tmp_path / "one/final").glob("*token*"):
        file.unlink()
    run(folder, tmp_path / "two")
    assert (tmp_path / "two/final/tokenizer.json").is_file()


def test_a_continued_adapters_reference_keeps_the_adapter(tmp_path):
    run(base(tmp_path / "m"), tmp_path / "out", "--lora.r", "2", "--learning_rate", "0.1")
    model, _ = load_model(DataOptions(model=str(tmp_path / "out/final")))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad(), adapter_off(model):
        reference = model(ID).logits
    assert torch.equal(reference, model(ID).logits) and has_adapter(model)


def test_continued_adapters_of_bfloat16_bases_are_float32(tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        run(tmp_path / "m", out, "--lora.r", "2", "--dtype", dtype)
        model, _ = load_model(DataOptions(model=str(out / "final"), dtype=dtype))
        dtypes = {"lora_" in name: p.dtype for name, p in model.named_parameters()}
        assert dtypes == {True: torch.float32, False: getattr(torch, dtype)}


@pytest.mark.parametrize("kind", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_trains_and_continues(tmp_path, kind):
    """The loss scores with the adapted head, like the merged model."""
    folder, out = base(tmp_path / "m"), tmp_path / "out"
    more = [
        "--lora",
        json.dumps({"r": 2, **kind}),
        "--learning_rate",
        "1e-1",
        "--conditioned",
        "false",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--save_steps",
        "1",
    ]
    run(folder, out, *more)
    rows = metrics(out)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[-1]["loss"] < rows[0]["loss"]
    merge(out / "final", tmp_path / "merged")
    merged, _ = load_model(DataOptions(model=str(tmp_path / "merged")))
    head = merged.lm_head.weight
    assert not torch.equal(head, AutoModelForCausalLM.from_pretrained(folder).lm_head.weight)
    losses = []
    for name in (out / "final", tmp_path / "merged"):
        run(name, tmp_path / f"{name.name}_on", "--objective", "simpo", "--logging_steps", "1")
        losses.append(metrics(tmp_path / f"{name.name}_on")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    run(folder, tmp_path / "again", *more, "--resume_from_checkpoint", str(out / "checkpoint-1"))
    again, whole = (load_file(run / "final/adapter_model.safetensors") for run in (tmp_path / "again", out))
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


def merge(folder, other):
    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(other)
    byte_tokenizer().save_pretrained(other)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "nope"]}, r"lora.target_modules: nothing in the model is called 'nope'"),
        ({"target_modules": ["q_proj", "v_prj"]}, "'v_prj'; did you mean 'v_proj'"),
        ({"target_modules": "nope"}, "lora: .*nope not found"),
        ({"modules_to_save": ["embed_tokns"]}, "lora.modules_to_save: .*did you mean 'embed_tokens'"),
        ({"exclude_modules": ["nope"]}, "lora.exclude_modules: nothing in the model is called 'nope'"),
        ({"layers_to_transform": [0, 7], "target_modules": ["q_proj"]}, "there is no layer 7; the model has 1"),
        ({"rank_pattern": {"q_porj": 4}}, "lora: .*'q_porj'"),
        ({"alpha_pattern": {"embed_tokens": 4}}, "lora: .*'embed_tokens'"),
        ({"rnak": 4}, r"lora\.rnak; did you mean 'rank_pattern'|lora\.rnak"),
        ({"lora_dropout": 0.1}, "lora_dropout: must be 0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': must be true or gaussian"),
        ({"r": 0}, "lora: r=0 must be a whole number above 0"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"bias": "sometimes"}, "lora"),
    ],
)
def test_a_lora_option_without_effect_is_refused(lora, message):
    with pytest.raises(InputError, match=message):
        add_lora(tiny_model(), lora, 0)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 8}},
        {"modules_to_save": ["norm"]},
        {"exclude_modules": ["v_proj"]},
        {"target_modules": r".*\.(q|v)_proj", "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
        {"trainable_token_indices": [5, 6]},
    ],
    ids=str,
)
def test_peft_options_pass_through(tmp_path, lora):
    folder = base(tmp_path / "m")
    more = [word for name, value in lora.items() for word in (f"--lora.{name}", json.dumps(value).strip('"'))]
    if "target_modules" in lora and isinstance(lora["target_modules"], str):
        (tmp_path / "c.yaml").write_text(json.dumps({"lora": lora}))
        more = ["--config", str(tmp_path / "c.yaml")]
    run(folder, tmp_path / "out", *more, "--learning_rate", "0.1")
    settings = json.loads((tmp_path / "out/final/adapter_config.json").read_text())
    assert {name: settings[name] for name in lora} == lora | (
        {"target_modules": settings["target_modules"]} if "target_modules" in lora else {}
    )
    model, _ = load_model(DataOptions(model=str(tmp_path / "out/final")), training=False)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert (model(ID).logits - plain(ID).logits).abs().max() > 1e-4


# --- Quantised bases ---


def quantised(folder, bits, **fields):
    """Return a base that was saved in 4 or 8 bit."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    source = folder.with_name("whole")
    tiny_model(hidden_size=64, intermediate_size=128, initializer_range=0.3).to(fields.get("dtype")).save_pretrained(
        source
    )
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, **fields)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4}]
)
def test_a_quantised_base_without_an_adapter_is_refused(tmp_path, capsys, quantization):
    folder = base(tmp_path / "m")
    edit(folder / "config.json", quantization_config=quantization)
    for said in refused(folder, tmp_path, capsys):
        assert "is quantised, and quantised weights cannot be trained; train an adapter on them" in said


def test_unknown_quantisation_methods_are_refused(tmp_path, capsys):
    folder = base(tmp_path / "m")
    for method in ("gptq", "nonesuch"):
        edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
        for said in refused(folder, tmp_path, capsys, "--lora.r", "2"):
            assert "quantised weights cannot be used here" in said and method in said.lower()


def test_quantised_bases_need_bitsandbytes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_8bit.is_bitsandbytes_available", lambda: False)
    folder = base(tmp_path / "m")
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    for said in refused(folder, tmp_path, capsys, "--lora.r", "2"):
        assert "pip install -U bitsandbytes" in said
    for said in refused(base(tmp_path / "n"), tmp_path, capsys, "--lora.r", "2", "--quantization", "8bit"):
        assert "pip install -U bitsandbytes" in said


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_a_quantised_base_resumes(tmp_path, capsys, bits, dtype):
    folder = quantised(tmp_path / "m", bits, dtype=dtype)
    more = ["--lora.r", "2", "--save_steps", "1", "--max_steps", "3", "--learning_rate", "0.1"]
    for out in ("whole", "broken"):
        main(["--model", str(folder), *options(tmp_path / out, *more)[8:]])
    shutil.rmtree(tmp_path / "broken/final")
    shutil.rmtree(tmp_path / "broken/checkpoint-3")
    main(["--model", str(folder), *options(tmp_path / "broken", *more, "--resume_from_checkpoint", "true")[8:]])
    assert "resumed from" in capsys.readouterr().out
    one, other = (load_file(tmp_path / out / "final/adapter_model.safetensors") for out in ("whole", "broken"))
    assert one and all(torch.equal(one[name], other[name]) for name in one)
    main(["--model", str(folder), *options(tmp_path / "dry", *more, "--dry_run", "true")[8:]])
    generate.main(["--model", str(tmp_path / "whole/final"), "--prompt", "Why?", "--max_new_tokens", "4"])


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_unquantised_base_is_quantised_on_loading(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    folder = base(tmp_path / "m", hidden_size=64, intermediate_size=128)
    run(folder, tmp_path / "out", "--lora.r", "2", "--quantization", bits)
    assert (tmp_path / "out/final/adapter_model.safetensors").is_file()
    with pytest.raises(InputError, match="quantised already"):
        load_model(DataOptions(model=str(quantised(tmp_path / "q", 4)), quantization="4bit", lora={}))


def test_unquantised_parameters_have_the_runs_dtype(tmp_path):
    folder = quantised(tmp_path / "m", 4, dtype=torch.bfloat16)
    model, _ = load_model(DataOptions(model=str(folder), lora={}))
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    add_lora(model, {}, 0)
    check_architecture(model)
    assert train(
        TrainConfig(max_steps=1, lora={"r": 2}),
        token_pairs(),
        model=load_model(DataOptions(model=str(folder), lora={}))[0],
        quiet=True,
    )


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path, capsys, name):
    folder = base(tmp_path / "m")
    change_weights(folder, lambda w: w | {name: w[name] * math.nan})
    for command in (
        lambda: run(folder, tmp_path / "out", "--objective", "simpo"),
        lambda: generate.main(["--model", str(folder), "--prompt", "Why?"]),
    ):
        with pytest.raises(SystemExit, match="2"):
            command()
        assert f"weights hold values that are not finite: {name}" in capsys.readouterr().err


ENCODER = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
NOT_CAUSAL = {
    "bert": (BertLMHeadModel(BertConfig(num_attention_heads=2, **ENCODER)), "a token sees the tokens after it"),
    "t5": (
        T5ForConditionalGeneration(T5Config(vocab_size=259, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)),
        "t5 is an encoder-decoder; choose a causal language model (decoder only)",
    ),
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_models_that_are_not_causal_are_refused(tmp_path, capsys, kind):
    model, message = NOT_CAUSAL[kind]
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    for said in refused(tmp_path / "m", tmp_path, capsys):
        assert message in said
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--model", str(tmp_path / "m"), "--prompt", "Why?"])
    assert message in capsys.readouterr().err


def test_later_tokens_are_tried_whatever_the_name():
    model = tiny_model(initializer_range=0.5)
    check_architecture(model)
    model.model.layers[0].self_attn.is_causal = False
    model.config._attn_implementation = "sdpa"
    forward = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda *given, **more: forward(*given, **more | {"attention_mask": None})
    with pytest.raises(InputError, match="a token sees the tokens after it"):
        check_architecture(model)


def test_a_decoder_with_dropout_is_causal():
    model = BartForCausalLM(
        BartConfig(vocab_size=259, d_model=16, decoder_layers=1, decoder_attention_heads=2, dropout=0.5)
    )
    check_architecture(model.train())
    assert model.training


def test_models_without_attention_heads_train(tmp_path):
    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    words = [word for name, value in mamba.items() for word in (f"--model.{name}", str(value))]
    main([*words, *options(tmp_path / "out", "--max_steps", "1")[8:]])
    assert math.isfinite(metrics(tmp_path / "out")[-1]["loss"])


def test_a_model_that_cannot_compute_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(options(tmp_path / "out", "--model.num_key_value_heads", "8"))
    assert "LlamaForCausalLM cannot be trained here: The size of tensor" in capsys.readouterr().err
