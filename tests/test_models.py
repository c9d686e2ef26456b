"""Models that users bring, in the three scripts alike: right, or one line before weights load."""
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import (AutoConfig, AutoModelForCausalLM, Gemma3Config, GenerationConfig, MambaConfig,
                          MixtralConfig, OlmoeConfig, PreTrainedTokenizerFast, Qwen3NextConfig, RwkvConfig)


import eval as ev
import grpo
import rewards
import sft
import toys

SCRIPTS = {"sft": sft, "grpo": grpo, "eval": ev}
EVERY = pytest.mark.parametrize("script", SCRIPTS)
TRACES = [("8*3=24 ok", "8*3"), ("8-5=3 3*8=24 ok", "(8-5)*8"), ("5*3=15 15+8=23 no", "5*3+8"),
          ("5+3=8 no", "5+3")]
ROWS = [{"nums": [5, 3, 8], "target": 24, "trace": trace, "trace_answer": said} for trace, said in TRACES]
FLAGS = {"sft": "--steps 2 --batch_size 4 --micro_batch_size 2 --max_length 300 --lr 1e-2",
         "grpo": "--steps 2 --prompts_per_step 2 --group_size 2 --max_new_tokens 6 --max_resample 0",
         "eval": "--max_new_tokens 6"}


def flags(script, model, out, *more):
    data = toys.write(Path(out).parent / "rows.jsonl", ROWS)
    where = ["--output", f"{out}/e.json"] if script == "eval" else ["--output_dir", out]
    argv = ["--model", model, "--data", f"countdown={data}", *where, *FLAGS[script].split()]
    return [str(word) for word in (*argv, *" ".join(more).split())]


def run(script, model, out, *more):
    SCRIPTS[script].main(flags(script, model, out, *more))


def in_a_child(script, model, out, *more, before=lambda: None):
    return toys.exit_code(toys.fork(SCRIPTS[script].main, flags(script, model, out, *more), before=before))


def bring(folder, config=None, tokenizer=None, **changes):
    """A model folder without weights."""
    config = config or toys.model().config
    config.update(changes)
    config.save_pretrained(folder)
    (tokenizer or toys.tokenizer()).save_pretrained(folder)
    return folder


def hybrid():
    return Qwen3NextConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
                           vocab_size=128)


def without_tags():
    tok = toys.tokenizer()
    state = json.loads(tok._tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in toys.TAGS]
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "<"}, "content": ""}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=toys.END)


def endless():
    tok = toys.tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tok.eos_token = None
    return tok


def added_end():
    """Its end is special in tokenizer.json, but no token that has a name: the shape of Phi-3 and Gemma 3."""
    tok = toys.tokenizer()
    tok.add_tokens([AddedToken("<|turn|>", special=True)])
    end = "{{ '<|turn|>' if m['role'] == 'assistant' else '<|end|>' }}"
    tok.chat_template = toys.TEMPLATE.replace(toys.END, end)
    return tok


def with_tokenizer(make, *inputs, **changes):
    return lambda folder: bring(folder, tokenizer=make(*inputs), **changes)


ALL, TRAINERS = ("sft", "grpo", "eval"), ("sft", "grpo")
REFUSED = {  # what is brought -> scripts, how it is made, words of the line
    "Mamba": (ALL, partial(bring, config=MambaConfig(vocab_size=128)), "mamba is no decoder"),
    "RWKV": (ALL, partial(bring, config=RwkvConfig(vocab_size=128)), "rwkv is no decoder"),
    "linear attention": (ALL, partial(bring, config=hybrid()), "qwen3_next is no decoder"),
    "more ids than embeddings": (ALL, partial(bring, vocab_size=60), "its embeddings end at 59"),
    "a short context": (ALL, partial(bring, max_position_embeddings=20), "do not fit its context of 20"),
    "no chat template": (ALL, with_tokenizer(toys.tokenizer, None), "its folder, as chat_template.jinja"),
    "a template that raises": (ALL, with_tokenizer(toys.tokenizer, "{{ raise_exception('not today') }}"),
                               "its chat template: not today"),
    "a tokenizer that loses the tags": (ALL, with_tokenizer(without_tags), "of the tags <reasoning>"),
    "no end of a turn": (("sft",), with_tokenizer(endless), "no end token"),
    "an end without an embedding": (("sft",), with_tokenizer(added_end, vocab_size=106), "has the id 106"),
    "4-bit weights, to train whole": (TRAINERS, partial(bring, quantization_config={
        "quant_method": "bitsandbytes", "load_in_4bit": True}), "add --lora_rank")}
for kind in ("bert", "roberta", "electra", "t5", "cpmant", "llama4_text", "moshi", "phimoe", "trocr"):
    REFUSED[kind] = (ALL, lambda folder, kind=kind: bring(folder, AutoConfig.for_model(kind)), f"{kind} is no decoder")


@pytest.mark.parametrize("what, script", [(what, script) for what in REFUSED for script in REFUSED[what][0]])
def test_what_cannot_work_gets_one_line_before_weights_load(tmp_path, capfd, what, script):
    def no_weights():
        SCRIPTS[script].transformers.AutoModelForCausalLM.from_pretrained = None

    _, make, words = REFUSED[what]
    make(tmp_path / "model")
    capfd.readouterr()
    assert in_a_child(script, tmp_path / "model", tmp_path / "out", before=no_weights) == 2
    line, = [line for line in capfd.readouterr().err.splitlines() if "it/s]" not in line]
    assert line.startswith(f"{script}.py: --model {tmp_path}/model: ") and words in line
    assert not (tmp_path / "out").exists()


@EVERY
def test_a_moved_base_of_an_adapter_names_the_adapter_too(tmp_path, capfd, script):
    bring(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "/moved/away"}')
    capfd.readouterr()
    assert in_a_child(script, tmp_path / "adapter", tmp_path / "out") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{script}.py: --model {tmp_path}/adapter: ") and "/moved/away" in line


# ---------------------------------------------------------------- what a turn is
def special_tags():
    tok = toys.tokenizer()
    tok.add_special_tokens({"additional_special_tokens": [*toys.TAGS, toys.USER, toys.ASSISTANT]})
    return tok


def plain_end():
    tok = toys.tokenizer()
    tok.add_tokens(["<|turn|>"])                                # a token like any other: decoding keeps it
    tok.chat_template = toys.TEMPLATE.replace(toys.END, "<|turn|>")
    return tok


def opens(style):
    return toys.tokenizer(toys.TEMPLATE.replace("<|assistant|>", f"<|assistant|><{style}>\n"))


BROUGHT = {  # name -> tokenizer, the token that ends a turn, what the prompt opens
    "end is the eos": (toys.tokenizer, "<|end|>", ""),
    "end is special, not named": (added_end, "<|turn|>", ""),
    "end is not special": (plain_end, "<|turn|>", ""), "tags are special": (special_tags, "<|end|>", ""),
    "prompt opens the thought": (partial(opens, "reasoning"), "<|end|>", "<reasoning>")}


def trained_on(monkeypatch, model, out):
    """[(inputs, targets)] of the rows of a step of sft.py."""
    real, drawn = sft.make_batches, []
    monkeypatch.setattr(sft, "make_batches", lambda rows, size: drawn.extend(rows) or real(rows, size))
    run("sft", model, out, "--steps 1 --max_length 900")
    return drawn


@pytest.mark.parametrize("what", BROUGHT)
def test_sft_trains_what_is_to_be_written_and_the_turns_end_once(tmp_path, monkeypatch, what):
    make, end, opened = BROUGHT[what]
    tok = make()
    toys.model().save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    found = trained_on(monkeypatch, tmp_path / "model", tmp_path / "out")
    assert all(tok.decode(inputs).count("<reasoning>") == 1 for inputs, _ in found)
    trained = [opened + tok.decode(targets[targets >= 0]) for _, targets in found]
    assert sorted(trained) == sorted(rewards.worked_completion("countdown", row) + end for row in ROWS)
    assert tok.convert_tokens_to_ids(end) in GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id


@pytest.mark.parametrize("what", BROUGHT)
def test_eval_cuts_the_end_by_its_id_and_finds_the_form_right(tmp_path, monkeypatch, what):
    def generate(lm, prompts, noise, group_size, max_new_tokens, temperature, ends, steps=range):
        assert tok.convert_tokens_to_ids(end) in ends
        worked = [rewards.worked_completion("countdown", row) for row in ROWS]
        said = [*(text + end for text in worked[:3]), "<reasoning>8*3=24"]
        return tok([text.removeprefix(opened) for text in said], add_special_tokens=False)["input_ids"], None

    make, end, opened = BROUGHT[what]
    tok = make()
    toys.model().save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(ev, "generate", generate)
    run("eval", tmp_path / "model", tmp_path / "out")
    *done, cut = toys.read(tmp_path / "out/e.samples.jsonl")
    assert all(r["format"] == 1 and not r["truncated"] for r in done)
    assert all(r["completion"].endswith("</answer>") for r in done)
    assert cut["truncated"] and not cut["format"] and cut["answer"] is None     # a thought that was cut off
    assert cut["completion"] == "<reasoning>8*3=24"


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize("template", [toys.TEMPLATE, NO_SYSTEM + toys.TEMPLATE], ids=["dropped", "refused"])
def test_instructions_are_trained_and_evaluated_without_a_system_turn(tmp_path, monkeypatch, template):
    tok = toys.tokenizer(template.replace("m['content'].split('\n\n')[-1]", "m['content']"))
    task = rewards.messages("countdown", ROWS[0])[0]["content"]
    shown = tok.decode(tok(task)["input_ids"])                  # it does not know every character
    toys.model(max_position_embeddings=2000).save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    found = trained_on(monkeypatch, tmp_path / "model", tmp_path / "out")
    assert len(found) == 4 and all(f"<|user|>{shown}\n\nNumbers" in tok.decode(inputs) for inputs, _ in found)
    run("eval", tmp_path / "model", tmp_path / "out", "--limit 1")
    sample, = toys.read(tmp_path / "out/e.samples.jsonl")
    assert f"<|user|>{task}\n\nNumbers" in sample["prompt"]


# ---------------------------------------------------------------- weights
@pytest.mark.parametrize("config", [
    {"top_k": 20}, {"min_p": 0.1}, {"typical_p": 0.9}, {"temperature": 0.0}, {"pad_token_id": -1},
    {"length_penalty": 0.5}, {"early_stopping": True}], ids=str)
def test_a_generation_config_that_transformers_will_not_save_leaves_its_ends(tmp_path, config):
    toys.save(tmp_path)
    file = tmp_path / "model/generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [7, 9], "bos_token_id": 5, **config}))
    run("sft", tmp_path / "model", tmp_path / "out", "--steps 1 --save_every 1")
    for folder in (tmp_path / "out", tmp_path / "out/checkpoint-1"):
        saved = GenerationConfig.from_pretrained(folder)
        assert saved.eos_token_id == [0, 7, 9] and saved.bos_token_id == 5 and saved.pad_token_id != -1
        AutoModelForCausalLM.from_pretrained(folder).generation_config.validate(strict=True)


@pytest.mark.parametrize("more", ["", "--lora_rank 4"], ids=["whole", "lora"])
def test_sft_merges_an_adapter_and_trains_on_from_there(tmp_path, more):
    import peft
    toys.save(tmp_path)
    run("sft", tmp_path / "model", tmp_path / "first", "--lora_rank 2 --lr 1e-1")   # another rank
    (tmp_path / "first/generation_config.json").write_text('{"eos_token_id": [7], "top_k": 5}')
    run("sft", tmp_path / "first", tmp_path / "whole", "--save_every 1", more)
    argv = flags("sft", tmp_path / "first", tmp_path / "cut", "--save_every 1", more)
    sft.main(argv)
    shutil.rmtree(tmp_path / "cut/checkpoint-2")
    toys.exit_code(toys.fork(sft.main, [*argv, "--resume"]))
    ids, load = torch.tensor([[40, 50, 60, 70]]), AutoModelForCausalLM
    with torch.no_grad():
        plain = load.from_pretrained(tmp_path / "model")(ids).logits
        begin = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "first")(ids).logits
        torch.testing.assert_close(load.from_pretrained(tmp_path / "whole/base")(ids).logits, begin)
        assert (begin - plain).abs().max() > 1e-2
        load = peft.AutoPeftModelForCausalLM if more else load
        finals = [load.from_pretrained(tmp_path / name)(ids).logits for name in
                  ("whole", "whole/checkpoint-2", "cut", "cut/checkpoint-1")]
    assert torch.equal(finals[0], finals[1]) and torch.equal(finals[0], finals[2])
    assert (finals[0] - begin).abs().max() > 1e-3 and not torch.equal(finals[0], finals[3])
    assert GenerationConfig.from_pretrained(tmp_path / "whole").eos_token_id == [0, 7]


MOE = {"moe": ("moe", {}), "mixtral": (MixtralConfig, {"num_local_experts": 4}),
       "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2})}


@pytest.mark.parametrize("kind, more", [("4-bit", "--lora_rank 4"), ("moe", "--lora_rank 4 --load_in_4bit"),
                                        *((kind, "--lora_rank 4") for kind in MOE)])
def test_an_adapter_of_4_bit_weights_and_of_experts_is_trained_and_merged(tmp_path, kind, more):
    import peft
    toys.save(tmp_path)
    if kind == "4-bit":
        lm = sft.load_lm(tmp_path / "model", torch.device("cpu"), torch.float32, True)
    else:
        lm = toys.small(MOE[kind][0], vocab_size=toys.VOCAB, eos_token_id=0, **MOE[kind][1])
    lm.save_pretrained(tmp_path / "model")
    run("sft", tmp_path / "model", tmp_path / "out", "--merge --steps 4", more)
    lines, ids = toys.read(tmp_path / "out/metrics.jsonl"), torch.tensor([[40, 50, 60, 70]])
    assert lines[-1]["loss"] < lines[0]["loss"] and all(line["grad_norm"] > 0 for line in lines)
    base = sft.load_lm(str(tmp_path / "model"), torch.device("cpu"), torch.float32, "4bit" in more)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged")
    with torch.no_grad():
        plain = base(ids).logits
        want = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, want, rtol=0, atol=1e-3)
        assert (want - plain).abs().max() > 1e-2
    run("eval", tmp_path / "out", tmp_path / "e")               # the adapter itself
    run("grpo", tmp_path / "model", tmp_path / "grpo", "--merge --steps 1", more)
    line, = toys.read(tmp_path / "grpo/metrics.jsonl")
    assert 0 < line["logp_gap"] < 1e-4 and abs(line["kl"]) < 1e-6
    AutoModelForCausalLM.from_pretrained(tmp_path / "grpo/merged")


def gemma_with_pictures():
    """As Gemma 3 of 4 B parameters: its text model is trained and sampled from."""
    text = toys.small("gemma 3", vocab_size=toys.VOCAB, eos_token_id=0).config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    return AutoModelForCausalLM.from_config(Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=120,
        boi_token_index=121, eoi_token_index=122)).eval()


@EVERY
@pytest.mark.parametrize("kind", ["gemma 3", "gemma 3 with pictures", "mistral"])
def test_sliding_windows_work(tmp_path, script, kind):
    toys.save(tmp_path)                                         # a window of 4
    lm = gemma_with_pictures() if "with" in kind else toys.small(kind, vocab_size=toys.VOCAB, eos_token_id=0)
    lm.save_pretrained(tmp_path / "model")
    run(script, tmp_path / "model", tmp_path / "out")
    if script == "eval":
        tok = toys.tokenizer()
        for sample in toys.read(tmp_path / "out/e.samples.jsonl"):
            ids = tok(sample["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
            said = lm.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=[0])
            said = said[0, ids.shape[1]:].tolist()
            assert sample["completion"] == tok.decode(said[:-1] if said[-1] == 0 else said)
        return
    lines = toys.read(tmp_path / "out/metrics.jsonl")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if script == "grpo":
        assert all(0 < line["logp_gap"] < 1e-4 and line["entropy"] > 0 for line in lines)
        return
    rows = sft.encode([{**row, "task": "countdown"} for row in ROWS], toys.tokenizer(), sft.parse_args([]))
    with torch.no_grad():
        loss = sum(torch.nn.functional.cross_entropy(lm(inputs[None]).logits[0], targets, reduction="sum")
                   for inputs, targets in rows) / sum(int((targets >= 0).sum()) for _, targets in rows)
    assert lines[0]["loss"] == pytest.approx(float(loss), rel=1e-4)


# ---------------------------------------------------------------- what is said
@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_data_that_changed_under_resume_are_refused_but_not_a_templates_date(tmp_path, capfd, script):
    toys.save(tmp_path)
    toys.tokenizer("{{ strftime_now('%f') }}" + toys.TEMPLATE).save_pretrained(tmp_path / "model")
    argv = flags(script, tmp_path / "model", tmp_path / "out", "--save_every 1")
    for more in [], ["--resume"]:
        assert toys.exit_code(toys.fork(SCRIPTS[script].main, [*argv, *more])) == 0
    toys.write(tmp_path / "rows.jsonl", [*ROWS[:-1], {**ROWS[-1], "target": 25}])
    capfd.readouterr()
    assert toys.exit_code(toys.fork(SCRIPTS[script].main, [*argv, "--resume"])) == 2
    line, = capfd.readouterr().err.splitlines()
    assert "--resume" in line and "rows" in line and "data" in line


@pytest.mark.parametrize("folder", ["out", "out/checkpoint-2"])
def test_eval_says_that_an_adapter_was_trained_on_4_bits(tmp_path, capsys, folder):
    toys.save(tmp_path)
    run("sft", tmp_path / "model", tmp_path / "out", "--lora_rank 2 --load_in_4bit --save_every 2")
    run("sft", tmp_path / "model", tmp_path / "plain", "--lora_rank 2")
    for name, words in ((folder, 1), ("plain", 0)):
        capsys.readouterr()
        run("eval", tmp_path / name, tmp_path / "e", "--limit 1")
        assert capsys.readouterr().err.count("4-bit base") == words
