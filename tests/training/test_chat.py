from __future__ import annotations

import json

import pytest
import torch
from helpers import PAIRS, metrics, tiny_model, token_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import inspo_kernels as ik
from training.batching import Batcher
from training.chat import TextEncoder, separator_ids, set_template_kwargs
from training.config import TrainConfig
from training.data import Pair, load_pairs
from training.errors import InputError
from training.model import byte_tokenizer
from training.references import reference_logps
from training.scoring import PairModel
from training.train import main, train

CORPUS = [
    "Why is the sky blue? Because the air scatters blue light. The first answer, the second answer; better answer.\n\n",
    "[INST] user assistant model system Give a better answer. [/INST] You are helpful. I think, therefore 12345.\n",
] * 3
USER = {"role": "user", "content": "Why is the sky blue?"}
CHOSEN, REJECTED = "Because the air scatters blue light.", "Why not?"

# Templates like those of known model families, reduced to the parts that decide where turns begin and end.
HEADERS = (
    "{% for m in messages %}<|head|>{{ m['role'] }}</head>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant</head>\n\n{% endif %}"
)
LLAMA_3 = "{{ bos_token }}" + HEADERS
LLAMA_2 = (  # a BOS before every exchange
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|head|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|eot|>\n{% endfor %}{% if add_generation_prompt %}<|head|>model\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|head|>system\nYou are helpful.<|eot|>\n{% endif %}"
    "{% for m in messages %}<|head|>{{ m['role'] }}\n{{ m['content'] }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)
# The last answer keeps its thoughts (or an empty block). Earlier answers lose them.
THINKING = (
    "{% set last = namespace(user=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|head|>{{ m['role'] }}\n"
    "{% set text = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if m['role'] == 'assistant' and loop.index0 > last.user %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1] if '</think>' in m['content'] else '' %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ text }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# EOS occurs only at the end of the conversation, after the last end of turn.
EOS_AT_THE_END = HEADERS.replace("{% endif %}", "{% else %}{{ '\n' + eos_token }}{% endif %}")
NO_END_TOKEN = (
    "{{ bos_token }}{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
TEMPLATES = {name.lower(): text for name, text in list(globals().items()) if name.isupper() and isinstance(text, str)}
del TEMPLATES["chosen"], TEMPLATES["rejected"], TEMPLATES["headers"]


def byte_level(template=None, **special):
    """Return a tokenizer like Llama 3's, Qwen's and GPT's: byte merges within words, digits and white space."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<s>", "</s>", "<|head|>", "<|eot|>"],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer, template, **special)


def sentence_piece(template=None, **special):
    """Return a tokenizer like Llama 2's and Mistral 7B's: it adds a space before text that follows a special token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # pieces are learned within words
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>"])
    )
    tokenizer.pre_tokenizer = None
    learned = json.loads(tokenizer.to_str())["model"]
    vocabulary = {token: i for i, token in enumerate([*learned["vocab"], *(f"<0x{i:02X}>" for i in range(256))])}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer.add_special_tokens(["<s>", "</s>", "<|head|>", "<|eot|>"])
    return _wrapped(tokenizer, template, **special)


def _wrapped(tokenizer, template, **special):
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **{"bos_token": "<s>", "eos_token": "</s>", **special},
    )


def says(text):
    return [{"role": "assistant", "content": text}]


def tokenise(tokenizer, prompt=(USER,), responses=(CHOSEN, REJECTED)):
    """Return (prompt ids, [response ids])."""
    encoder = TextEncoder(tokenizer)
    opening, texts = encoder.render_pair(list(prompt), [says(text) for text in responses], "d:1")
    return encoder.prompt(opening), [encoder.response(text, opening, chat=True) for text in texts]


def _glyphs(text):
    """Remove the first BOS, and the spaces that sentence pieces put around special tokens."""
    return text.replace(" ", "").removeprefix("<s>")


BUILDERS = pytest.mark.parametrize("build", [byte_level, sentence_piece])


@BUILDERS
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_follows_the_template_and_ends_once(name, build):
    tokenizer = build(TEMPLATES[name])
    prompt, responses = tokenise(tokenizer)
    end = "</s>" if name in ("llama_2", "mistral", "no_end_token") else "<|eot|>"
    for ids, text in zip(responses, (CHOSEN, REJECTED)):
        whole = tokenizer.apply_chat_template([USER, *says(text)], tokenize=False)
        expected = whole[: whole.index(text) + len(text)]
        written = tokenizer.decode([*prompt, *ids])
        assert _glyphs(written).startswith(_glyphs(expected))
        assert written.endswith(end) and ids.count(tokenizer.convert_tokens_to_ids(end)) == 1
        assert written.rstrip()[len(tokenizer.decode(prompt)) :].count(end) == 1
        # The ids equal those of the whole conversation: no space or token is added where the response begins.
        conversation = tokenizer(expected, add_special_tokens=False)["input_ids"]
        if conversation[0] != tokenizer.bos_token_id:
            conversation = [tokenizer.bos_token_id, *conversation]
        assert [*prompt, *ids][: len(conversation)] == conversation
    assert prompt[0] == tokenizer.bos_token_id and prompt[1] != tokenizer.bos_token_id


@BUILDERS
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "thinking"])
def test_second_answers_follow_the_templates_conversation(name, build):
    tokenizer = build(TEMPLATES[name])
    prompt, (chosen, rejected) = tokenise(tokenizer)
    ask = {"role": "user", "content": "Give a better answer."}
    row = [*prompt, *rejected, *TextEncoder(tokenizer).separator(ask["content"]), *chosen]
    conversation = tokenizer.apply_chat_template(
        [USER, *says(REJECTED), ask], tokenize=False, add_generation_prompt=True
    )
    expected = tokenizer(conversation, add_special_tokens=False)["input_ids"]
    row = row[row[0] != expected[0] :]  # the template has no BOS, but the prompt has one
    if name == "no_end_token":  # the template has none, so each answer ends with EOS
        row.remove(tokenizer.eos_token_id)
        assert _glyphs(tokenizer.decode(row)).startswith(_glyphs(tokenizer.decode(expected)))
    else:
        assert row[: len(expected)] == expected


def test_both_answers_keep_the_thinking_block_alike():
    separator = "\n<|head|>user\nBetter?<|eot|>\n<|head|>assistant\n"
    tokenizer = byte_level(THINKING)
    prompt, (chosen, _) = tokenise(tokenizer)
    assert tokenizer.decode(prompt).endswith("<|head|>assistant\n")
    assert tokenizer.decode(chosen) == f"<think>\n\n</think>\n\n{CHOSEN}<|eot|>"
    assert tokenizer.decode(TextEncoder(tokenizer).separator("Better?")) == separator

    set_template_kwargs(tokenizer, {"enable_thinking": False})
    prompt, (chosen, _) = tokenise(tokenizer)
    assert tokenizer.decode(prompt).endswith("<|head|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(chosen) == f"{CHOSEN}<|eot|>"
    assert tokenizer.decode(TextEncoder(tokenizer).separator("Better?")) == separator + "<think>\n\n</think>\n\n"


def test_thoughts_are_scored_and_history_follows_the_template():
    tokenizer = byte_level(THINKING)
    thought = "<think>\nI think.\n</think>\n\n" + CHOSEN
    prompt, (chosen,) = tokenise(tokenizer, [USER, *says(thought), USER], [thought])
    assert "I think" not in tokenizer.decode(prompt) and CHOSEN in tokenizer.decode(prompt)
    assert tokenizer.decode(chosen) == thought + "<|eot|>"


def test_a_template_that_drops_its_opening_thought_is_refused():
    drops = HEADERS.replace("assistant</head>\n\n{% endif %}", "assistant</head>\n\n<think>\n{% endif %}")
    with pytest.raises(InputError, match=r"d:1: .*'<think>\\n' becomes 'Because.*chat_template_kwargs"):
        tokenise(byte_level(drops))


def test_a_templates_refusal_of_a_role_is_quoted():
    with pytest.raises(InputError, match=r"d:1: .*roles: system, user.*System role not supported"):
        tokenise(byte_level(GEMMA), [{"role": "system", "content": "Be kind."}, USER])
    with pytest.raises(InputError, match=r"roles: user, user.*roles must alternate"):
        tokenise(byte_level(MISTRAL), [USER, USER])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "alternative=chat: holds messages, but the tokenizer has no chat template"),
        (
            GEMMA.replace("{% for m in", "{{ messages | length }}{% for m in").replace(
                "<|head|>model\n{% endif", "{{ messages | length }}{% endif"
            ),
            "depends on the conversation",
        ),
        (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|eot|>{% endif %}{% endfor %}",
            "leaves out alternative_instruction",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{{ '<|eot|>' if loop.last }}{% endfor %}",
            "but not in front of another turn",
        ),
        ("{% for m in messages %}{{ m['role'] }}<|eot|>{% endfor %}", "leaves out what an assistant says"),
        ("{{ raise_exception('never') }}", "cannot render these messages.*never"),
    ],
)
def test_an_unsuitable_template_says_why(template, message):
    with pytest.raises(InputError, match=message):
        TextEncoder(byte_level(template)).separator("Better?")


def test_an_empty_instruction_is_refused():
    with pytest.raises(InputError, match="alternative_instruction is empty"):
        TextEncoder(byte_tokenizer()).separator(" ")


@BUILDERS
@pytest.mark.parametrize(
    ("prompt", "response"), [("Why is the sk", "y blue?"), ("The first ", "answer."), ("12", "345")]
)
def test_the_joint_adds_no_merge_and_no_space(prompt, response, build):
    tokenizer = build()
    encoder = TextEncoder(tokenizer)
    ids = encoder.response(response, prompt, chat=False)
    assert tokenizer.decode([*encoder.prompt(prompt), *ids], skip_special_tokens=True) == prompt + response
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1


TEXTS = st.text(st.sampled_from("ab 1\n.,é日▁?"), min_size=1, max_size=12)
TOKENIZERS = {build.__name__: build() for build in (byte_level, sentence_piece)}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXTS, response=TEXTS)
def test_joined_prompt_and_response_keep_their_text(name, prompt, response):
    tokenizer = TOKENIZERS[name]
    encoder = TextEncoder(tokenizer)
    ids = encoder.response(response, prompt, chat=False)
    if not response.strip():
        assert ids == []
        return
    text = prompt + response
    if name == "sentence_piece":
        text = text.replace("▁", " ")  # the tokenizer's own symbol for a space
    assert tokenizer.decode([*encoder.prompt(prompt), *ids], skip_special_tokens=True) == text


def test_pad_equal_to_eos_changes_nothing():
    assert tokenise(byte_level(LLAMA_3, pad_token="</s>")) == tokenise(byte_level(LLAMA_3))


def test_a_tokenizer_without_bos_gets_none():
    tokenizer = byte_level(DEFAULT_SYSTEM)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    prompt, _ = tokenise(tokenizer)
    assert tokenizer.bos_token_id not in prompt
    assert tokenizer.decode(prompt).startswith("<|head|>system\nYou are helpful.<|eot|>")


def test_fixed_template_switches_are_saved_with_the_tokenizer(tmp_path):
    tokenizer = byte_level(THINKING)
    for _ in range(2):
        set_template_kwargs(tokenizer, {"enable_thinking": False})
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = again.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<think>\n\n</think>\n\n")
    assert tokenizer.chat_template.count("set enable_thinking") == 1


def test_template_switches_keep_their_values_and_types():
    tokenizer = byte_level("{{ a }}|{{ b is true }}|{{ c is none }}|{{ n + 1 }}")
    set_template_kwargs(tokenizer, {"a": 'it\'s "%}" \n', "b": True, "c": None, "n": 2})
    assert tokenizer.apply_chat_template([USER], tokenize=False) == 'it\'s "%}" \n|True|True|3'
    with pytest.raises(InputError, match=r"d=\[1\] is not a name with"):
        set_template_kwargs(tokenizer, {"d": [1]})
    with pytest.raises(InputError, match="no chat template"):
        set_template_kwargs(byte_level(), {"a": 1})


def test_templates_here_fail_as_real_ones_do():
    with pytest.raises(TemplateError):
        byte_level(MISTRAL).apply_chat_template([USER, USER], tokenize=False)


def messages_file(tmp_path):
    words = [("Why is the sky blue?", CHOSEN, REJECTED), ("Is it 12345?", "I think so.", "No, it is a better answer.")]
    return write_jsonl(
        tmp_path / "d.jsonl",
        [{"prompt": [{"role": "user", "content": x}], "chosen": says(w), "rejected": says(l)} for x, w, l in words],
    )


def saved_model(tmp_path, template=LLAMA_3):
    tokenizer = byte_level(template)
    tiny_model(vocab_size=len(tokenizer), initializer_range=0.5).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base"), tokenizer


def test_the_chat_turn_does_not_change_scored_tokens(tmp_path):
    tokenizer = byte_level(LLAMA_3)
    config = TrainConfig(alternative="chat", alternative_instruction="Do better.")
    separator = separator_ids(tokenizer, config)
    pairs = load_pairs(messages_file(tmp_path), tokenizer, config)
    batches = [Batcher(0, torch.device("cpu"), 10**6, tuple(ids))(pairs, conditioned=True) for ids in (separator, [])]
    ask = {"role": "user", "content": "Do better."}
    for row, first, second in ((0, REJECTED, CHOSEN), (2, CHOSEN, REJECTED)):
        conversation = tokenizer.apply_chat_template([USER, *says(first), ask, *says(second)], tokenize=False)
        ids = batches[0]["input_ids"][row][batches[0]["attention_mask"][row].bool()]
        assert tokenizer.decode(ids) == conversation
    for labels in ("labels", "marginal_labels"):
        scored = [[row[row != -100].tolist() for row in batch[labels]] for batch in batches]
        assert scored[0] == scored[1]


def test_the_turn_counts_in_lengths_and_tokens(tmp_path, capsys):
    model, tokenizer = saved_model(tmp_path)
    data = messages_file(tmp_path)
    pairs = load_pairs(data, tokenizer)
    separator = separator_ids(tokenizer, TrainConfig(alternative="chat"))
    plain, chat = (Batcher(0, torch.device("cpu"), 10**6, tuple(ids)) for ids in ([], separator))
    for count in ("tokens", "padded"):
        with_turn, without = (getattr(batcher, count)(pairs.lengths, conditioned=True) for batcher in (chat, plain))
        assert (with_turn == without + 2 * len(separator)).all()
        alone = [getattr(batcher, count)(pairs.lengths, conditioned=False) for batcher in (chat, plain)]
        assert (alone[0] == alone[1]).all()
    longest = max(sum(map(len, pair[:3])) for pair in pairs) + len(separator)
    common = ["--model", model, "--train_data", data, "--max_steps", "1", "--alternative", "chat"]
    main([*common, "--output_dir", str(tmp_path / "o"), "--max_length", str(longest)])
    assert "2 pairs read, 2 kept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*common, "--output_dir", str(tmp_path / "p"), "--max_length", str(longest - 1)])
    assert f"and {len(separator)} between them" in capsys.readouterr().err


def test_the_turn_changes_only_conditioned_references(tmp_path):
    pairs, model, said = [Pair(*ids) for ids in token_pairs()], tiny_model(initializer_range=0.5), []
    module, found = PairModel(model, ik.DPO()), []
    for conditioned in (False, True):
        for separator in ((), (7, 8), (7, 9)):
            batcher = Batcher(0, torch.device("cpu"), 10**6, separator)
            found.append(
                reference_logps(
                    module,
                    pairs,
                    range(len(pairs)),
                    batcher,
                    conditioned=conditioned,
                    file=None,
                    log=said.append,
                    stop_requested=lambda: False,
                )
            )
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[4], found[5], atol=1e-3)


def test_unsupported_chat_turns_are_reported(tmp_path, capsys):
    with pytest.raises(InputError, match="alternative=chat needs a tokenizer"):
        train(TrainConfig(alternative="chat", max_steps=1), token_pairs(), model=tiny_model(), quiet=True)
    model, _ = saved_model(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(
            ["--model", model, "--train_data", str(PAIRS), "--alternative", "chat", "--output_dir", str(tmp_path / "o")]
        )
    assert "pairs.jsonl:1: holds strings; use messages, which alternative=chat needs" in capsys.readouterr().err


def test_template_switches_reach_data_and_saved_model(tmp_path):
    model, _ = saved_model(tmp_path, THINKING)
    file = tmp_path / "c.yaml"
    file.write_text("chat_template_kwargs: {enable_thinking: false}\n")
    common = ["--config", str(file), "--model", model, "--train_data", messages_file(tmp_path), "--max_steps", "1"]
    main([*common, "--output_dir", str(tmp_path / "out")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/final")
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<think>\n\n</think>\n\n")
    without = tmp_path / "plain"
    main([*common[2:], "--output_dir", str(without)])
    scored = [metrics(run)[-1]["tokens/chosen"] for run in (tmp_path / "out", without)]
    assert scored[0] < scored[1]  # the empty thought is in the prompt, not in the answer
