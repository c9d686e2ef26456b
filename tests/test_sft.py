"""sft.py: what is trained, what it costs nothing to change (micro-batches, processes, kills), and what is left on disk."""
import json
import math
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo                                            # which FSDP imports: here once for all forks
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import models
import rewards
import runs
import sft
import toys
from toys import exit_code

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # some tests fork
ROWS = [{"nums": [5, 3, 8], "target": 24, "solution": "(5-8/8)*3", "trace": t, "trace_answer": a}
        for t, a in [("5+3=8 8*8=64 no\n8*5=40 40-3=37 no", "8*5-3"), ("8*3=24 ok", "8*3"), ("8-5=3 3*8=24 ok", "(8-5)*8"),
                     ("5*3=15 15+8=23 no", "5*3+8"), ("8+5=13 13+3=16 no\n8*3=24 24-5=19 no\n5-3=2 8*2=16 no", "8*(5-3)")] * 4]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toys.save(folder)
    toys.write(folder / "sft.jsonl", ROWS)
    toys.write(folder / "val.jsonl", ROWS[:3])
    return folder


def flags(toy, out, *more, steps=4):
    return ["--model", str(toy / "model"), "--data", f"countdown={toy / 'sft.jsonl'}", "--output_dir", str(out), "--max_length", "300",
            "--batch_size", "4", "--micro_batch_size", "2", "--steps", str(steps), "--lr", "1e-3", *map(str, more)]


def weights(folder):
    from safetensors.torch import load_file
    return {k: v for f in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(f).items()}


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[k], b[k]) for k in a)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def refusal(argv, capfd):
    """The one line that a wrong command line gets."""
    with pytest.raises(SystemExit) as stop:
        sft.main([str(a) for a in argv])
    err = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


fork, together = partial(toys.fork, sft.main), partial(toys.together, sft.main)


def around(wrapper):
    """-> sft.prepare, but that the function it gives runs as wrapper(that function, ids, ...)."""
    return lambda *args: partial(wrapper, models.prepare(*args))


def far(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and a
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# ---------------------------------------------------------------- rows
@settings(max_examples=200, deadline=None)
@given(st.text())
def test_the_tiny_tokenizer_gives_any_text_back(text):
    tok = tiny_tokenizer()
    assert tok.decode(tok(text, add_special_tokens=False)["input_ids"], skip_special_tokens=False) == text


def tiny_tokenizer(made=[]):
    made or made.append(sft.tiny_tokenizer())
    return made[0]


def test_the_tiny_tokenizer_has_a_token_for_each_number_tag_and_word():
    tok = tiny_tokenizer()
    for word in [*map(str, range(100)), "<reasoning>", "</think>", "<answer>", " ok", " no", "Numbers: ["]:
        assert len(tok(word)["input_ids"]) == 1, word
    assert len(tok("105")["input_ids"]) == 3 and tok.eos_token_id != tok.pad_token_id
    assert len(tok(sft.completion("countdown", ROWS[1], "reasoning"))["input_ids"]) == 14


def test_the_tiny_model_and_tokenizer_load_like_any_checkpoint(tmp_path):
    tok = tiny_tokenizer()
    model = sft.tiny_model(tok, 0)
    assert 0.4e6 < sum(p.numel() for p in model.parameters()) < 1e6
    tok.save_pretrained(tmp_path), model.save_pretrained(tmp_path)
    again, text = AutoTokenizer.from_pretrained(tmp_path), "Numbers: [3, 50]\nTarget: 24 é\0 <think>7</think>"
    assert again(text)["input_ids"] == tok(text)["input_ids"] and again.eos_token_id == tok.eos_token_id
    chat = rewards.messages("countdown", {"nums": [3, 5], "target": 8})
    assert again.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == \
        "<|user|>Numbers: [3, 5]\nTarget: 8<|end|><|assistant|>"
    ids = torch.arange(20)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("task, row", [
    ("countdown", ROWS[1]), ("countdown", {"nums": [8, 3], "target": 24, "solution": "8*3"}), ("gsm8k", toys.GSM8K[0]),
    ("gsm8k", {"question": "?", "answer": "She sold $<<1000*2=2000>>2,000.\nTwice.\n#### 2,000"}),
    ("math", {"problem": "2+2?", "solution": r"It is $\boxed{4}$."})])
@pytest.mark.parametrize("style", rewards.STYLES)
def test_a_completion_is_well_formed_and_right(task, row, style):
    text = sft.completion(task, row, style)
    assert "<<" not in text and rewards.answer(text, style)
    if task != "math":
        assert rewards.correct(task, text, row, style) == (row.get("trace_answer") != "8*3")
        assert rewards.score(task, text, row, style)["format"] == 1


def test_prompt_ids_are_the_chat_templates_and_the_end_token_is_trained_and_the_prompt_is_not():
    tok = toys.tokenizer()
    rows = [{**row, "task": "countdown"} for row in ROWS[:3]] + [{**toys.GSM8K[0], "task": "gsm8k"}]
    encoded = sft.encode(tok, rows, "reasoning", 1000, sft.end_token(tok))
    rows, encoded = zip(*sorted(zip(rows, encoded), key=lambda x: x[1]["ids"].tolist()))           # those that begin alike
    (ids, prompt_lengths, masks), = sft.micro_batches(encoded, 4)
    assert prompt_lengths.tolist() == [row["prompt"] for row in encoded]
    for row, made, line, start, mask in zip(rows, encoded, ids, prompt_lengths, masks):
        prompt = tok.apply_chat_template(rewards.messages(row["task"], row), add_generation_prompt=True, return_dict=False)
        assert made["ids"][:made["prompt"]].tolist() == prompt
        text = sft.completion(row["task"], row, "reasoning")
        want = tok(text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id]  # pad is the same id, and is not trained
        assert line[start:start + len(mask)][mask[:len(line) - start].bool()].tolist() == want and mask.sum() == len(want)


def test_the_end_token_is_that_of_the_chat_template_even_where_the_eos_is_another():
    tok = toys.tokenizer(toys.TEMPLATE.replace("{% endfor %}", "\n{% endfor %}"))
    tok.eos_token = toys.UNKNOWN
    assert sft.end_token(tok) == tok.convert_tokens_to_ids(toys.END)
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert sft.end_token(tok) == tok.convert_tokens_to_ids(toys.UNKNOWN)


def test_rows_beyond_the_limit_are_left_out_whole_and_counted(toy, tmp_path, capfd):
    lengths = [len(r["ids"]) for r in sft.encode(toys.tokenizer(), [{**r, "task": "countdown"} for r in ROWS], "reasoning", 999, 0)]
    limit = sorted(lengths)[10]
    sft.main(flags(toy, tmp_path / "run", "--max_length", limit, steps=1))
    assert f"{sum(n > limit for n in lengths)} of {len(ROWS)} rows" in capfd.readouterr().err
    line = refusal(flags(toy, tmp_path / "none", "--max_length", 20), capfd)
    assert "--max_length 20" in line and not (tmp_path / "none").exists()


def test_every_row_comes_once_an_epoch_in_an_order_of_the_seed():
    assert sorted(sft.permutation(50, 1, 0)) == list(range(50))
    assert sft.permutation(50, 1, 0) != sft.permutation(50, 2, 0) and sft.permutation(50, 1, 0) != sft.permutation(50, 1, 1)


# ---------------------------------------------------------------- a step
def batch(n=7):
    return sft.encode(toys.tokenizer(), [{**r, "task": "countdown"} for r in ROWS[:n]], "reasoning", 1000, 0)


def gradients(model, rows, size, scale=0.01, chunk=models.HEAD_LOGITS):
    args = parsed("--micro_batch_size", size)
    sums = sft.sums(partial(models.completion_logps, model, chunk=chunk), models.Optimizer(model, args), rows,
                    torch.device("cpu"), args, scale)
    return sums, [p.grad.clone() for p in model.parameters()]


def parsed(*more):
    return sft.parse_args(list(map(str, more)))


def test_the_gradient_does_not_depend_on_how_a_batch_is_split_nor_on_its_order():
    model, rows = toys.model(), batch()
    sums, grads = gradients(model, rows, 7)
    for size, some in [(1, rows), (2, rows[::-1]), (3, rows), (100, rows[3:] + rows[:3])]:
        other_sums, others = gradients(model, some, size)
        torch.testing.assert_close(other_sums, sums, rtol=1e-6, atol=1e-4)
        assert max((a - b).abs().max() for a, b in zip(grads, others)) < 1e-6


@pytest.mark.parametrize("logits", [2**26, 128 * 5])
def test_the_loss_is_the_cross_entropy_of_the_completions_and_the_head_runs_in_chunks(logits):
    model, rows, seen = toys.model().train(), batch(), []
    model.lm_head.register_forward_hook(lambda m, i, out: seen.append(out.numel()))
    sums, grads = gradients(model, rows, 7, 1.0, logits)
    assert max(seen) <= logits
    model.zero_grad()
    want, right, n = 0, 0, 0
    for row in rows:  # one by one, by transformers' own loss
        labels = row["ids"].clone()
        labels[:row["prompt"]] = -100
        out = model(row["ids"][None], labels=labels[None])
        n_row = len(row["ids"]) - row["prompt"]
        want, n = want + out.loss * n_row, n + n_row
        right += (out.logits[0, row["prompt"] - 1:-1].argmax(-1) == row["ids"][row["prompt"]:]).sum()
    want.backward()
    torch.testing.assert_close(sums, torch.tensor([want.item(), right, n], dtype=sums.dtype), rtol=1e-5, atol=0)
    for p, g in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-4)


def test_the_learning_rate_of_each_step_warms_up_to_the_peak_and_falls_by_half_a_cosine(toy, tmp_path):
    sft.main(flags(toy, tmp_path, "--warmup", 2, steps=6))
    assert [m["lr"] for m in metrics(tmp_path)] == pytest.approx([1e-3 * x for x in (
        0.5, 1, 1, *(0.5 + 0.5 * math.cos(math.pi * x / 4) for x in (1, 2, 3)))])


def test_an_update_of_5e_7_moves_the_masters_of_bf16_weights(toy, tmp_path):
    sft.main(flags(toy, tmp_path, "--dtype", "bfloat16", "--lr", "5e-7", steps=1))
    key, before = "model.layers.0.mlp.up_proj.weight", weights(toy / "model")["model.layers.0.mlp.up_proj.weight"].bfloat16()
    state = torch.load(tmp_path / "checkpoint-1/trainer.pt", weights_only=True)
    after = state["weights"][key]
    assert after.dtype == torch.float32 and 1e-7 < (before.float() - after).abs().max() < 1e-6
    assert (before.float() != after).float().mean() > 0.99
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert weights(folder)[key].dtype == torch.bfloat16 and AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
        assert torch.equal(weights(folder)[key], after.bfloat16())


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit", "muon"])
def test_training_lowers_the_loss_with_every_optimizer(toy, tmp_path, optim):
    sft.main(flags(toy, tmp_path, "--optim", optim, "--eval_data", f"countdown={toy / 'val.jsonl'}", "--lr", "3e-3", steps=12))
    lines = metrics(tmp_path)
    assert lines[11]["loss"] < 0.8 * lines[0]["loss"] and lines[12]["eval_loss"] < 0.8 * lines[0]["loss"]
    assert lines[12]["eval_token_accuracy"] > lines[0]["token_accuracy"]


def test_activation_checkpointing_changes_nothing(toy, tmp_path):
    sft.main(flags(toy, tmp_path / "a"))
    sft.main(flags(toy, tmp_path / "b", "--activation_checkpointing"))
    assert same(tmp_path / "a", tmp_path / "b")


def test_a_gradient_that_is_not_finite_is_skipped_and_several_in_a_row_stop_the_run(toy, tmp_path, monkeypatch, capfd):
    calls, bad = [], {1}

    def broken(logps, *args, **kwargs):
        calls.append(1)
        logp, hit = logps(*args, **kwargs)
        return logp * (math.nan if (len(calls) + 1) // 2 in bad else 1), hit  # two micro-batches a step
    monkeypatch.setattr(sft, "prepare", around(broken))
    sft.main(flags(toy, tmp_path / "a", steps=1))
    assert same(tmp_path / "a", toy / "model") and metrics(tmp_path / "a")[0]["skipped"] == 1 and metrics(tmp_path / "a")[0]["loss"] is None
    calls.clear()
    bad = {4, 5, 6, 7, 8}
    line = refusal(flags(toy, tmp_path / "b", "--save_every", 2, steps=20), capfd)
    assert "5 updates in a row" in line and "bad_rows.txt" in line and (tmp_path / "b" / "bad_rows.txt").read_text().count("<answer>") == 4
    bad = {}
    sft.main(flags(toy, tmp_path / "b", "--save_every", 2, "--resume", steps=20))
    assert [m["step"] for m in metrics(tmp_path / "b")] == list(range(1, 21))


def test_how_many_updates_in_a_row_were_bad_survives_a_resume(toy, tmp_path, monkeypatch, capfd):
    def nan_or_stop(logps, *args, **kwargs):
        calls.append(1)
        if len(calls) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        logp, hit = logps(*args, **kwargs)
        return logp * math.nan, hit
    monkeypatch.setattr(sft, "prepare", around(nan_or_stop))
    calls, stop_at = [], 7                                      # two micro-batches a step: in the fourth
    with pytest.raises(SystemExit) as stopped:
        sft.main(flags(toy, tmp_path, steps=20))
    assert stopped.value.code == 128 + signal.SIGTERM
    line = refusal(flags(toy, tmp_path, "--resume", steps=20), capfd)
    assert "5 updates in a row" in line and [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_pass_in_training_and_evaluation(toy, tmp_path, monkeypatch, capfd):
    argv = lambda out, *more: flags(toy, tmp_path / out, "--eval_data", f"countdown={toy / 'val.jsonl'}", *more)
    sft.main(argv("a"))
    failed = []

    def small_memory(logps, ids, *args, **kwargs):
        out = logps(ids, *args, **kwargs)
        if len(ids) > (2 if torch.is_grad_enabled() else 1):
            failed.append(len(ids))
            if torch.is_grad_enabled():
                out[0].sum().backward()                         # an error that comes late has left gradients behind
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out
    monkeypatch.setattr(sft, "prepare", around(small_memory))
    sft.main(argv("b", "--micro_batch_size", 4))
    assert failed == [4, 2] and far(tmp_path / "a", tmp_path / "b") < 1e-5
    err = capfd.readouterr().err
    assert err.count("--micro_batch_size 2") == 1 == err.count("--micro_batch_size 1")
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-4) for k in a if k in ("loss", "grad_norm", "eval_loss", "eval_tokens"))

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(sft, "prepare", around(no_memory))
    assert "out of GPU memory: take" in refusal(flags(toy, tmp_path / "c"), capfd)


# ---------------------------------------------------------------- adapters
def test_lora_trains_the_adapter_alone_and_merging_gives_the_same_logits(toy, tmp_path):
    import peft
    sft.main(flags(toy, tmp_path, "--lora_rank", 4, "--merge", "--lr", "1e-2"))
    base = AutoModelForCausalLM.from_pretrained(toy / "model")
    ids = torch.randint(0, 100, (2, 30))
    plain = base(ids).logits
    policy = peft.PeftModel.from_pretrained(base, tmp_path)
    with policy.disable_adapter():
        assert torch.equal(policy(ids).logits, plain)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    got = policy(ids).logits
    assert (got - plain).abs().max() > 0.01 and (merged(ids).logits - got).abs().max() < 1e-5
    assert merged.generation_config.eos_token_id == 0 and AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert set(weights(tmp_path)) and all("lora_" in k for k in weights(tmp_path)) and not (tmp_path / "model.safetensors").exists()


def test_qlora_trains_on_a_4_bit_base_and_merging_gives_its_logits(toy, tmp_path):
    import peft
    sft.main(flags(toy, tmp_path, "--lora_rank", 4, "--load_in_4bit", "--merge", "--lr", "1e-2"))
    assert metrics(tmp_path)[3]["loss"] < metrics(tmp_path)[0]["loss"]
    ids = torch.randint(0, 100, (2, 30))
    base = models.load_lm(str(toy / "model"), torch.device("cpu"), torch.float32, load_in_4bit=True)
    policy, merged = peft.PeftModel.from_pretrained(base, tmp_path).eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        got, want = merged(ids).logits, policy(ids).logits
    assert (got - want).norm() < 1e-4 * want.norm()


# ---------------------------------------------------------------- what is left on disk
def test_the_final_model_and_every_checkpoint_load_and_keep_tied_weights(toy, tmp_path):
    sft.main(flags(toy, tmp_path, "--save_every", 2))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not list(tmp_path.glob("**/tmp-*")) and json.loads((tmp_path / "args.json").read_text())["lr"] == 1e-3
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight and "lm_head.weight" not in weights(folder)
        assert tok.chat_template == toys.TEMPLATE and GenerationConfig.from_pretrained(folder).eos_token_id == 0
    assert same(tmp_path, tmp_path / "checkpoint-4") and not same(tmp_path, tmp_path / "checkpoint-2")
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4]
    assert {"step", "loss", "token_accuracy", "lr", "grad_norm", "tokens_per_s"} <= metrics(tmp_path)[0].keys()


def test_generation_config_honours_both_ends_and_can_be_saved(tmp_path):
    model, tok = toys.model(), toys.tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=[5, 9], temperature=0.6)
    sft.set_end(model, tok, 7)
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [5, 7, 9]


def test_same_seed_same_bytes_another_seed_others(toy, tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        sft.main(flags(toy, tmp_path / name, "--seed", seed))
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", [[], ["--optim", "muon"], ["--optim", "adamw8bit"], ["--lora_rank", "4"], ["--dtype", "bfloat16"],
                                  ["--lora_rank", "4", "--load_in_4bit"], ["--dtype", "bfloat16", "--optim", "muon"]], ids=" ".join)
def test_a_resumed_run_ends_with_the_same_bits(toy, tmp_path, kind):
    argv = lambda out, *more: flags(toy, tmp_path / out, "--save_every", 3, "--warmup", 2, *kind, *more, steps=7)
    sft.main(argv("whole"))
    sft.main(argv("cut"))
    for name in ("checkpoint-7",):
        shutil.rmtree(tmp_path / "cut" / name)
    sft.main(argv("cut", "--resume"))
    assert same(tmp_path / "whole", tmp_path / "cut") and [m["step"] for m in metrics(tmp_path / "cut")] == list(range(1, 8))
    a, b = (torch.load(tmp_path / f"{x}/checkpoint-7/trainer.pt")["weights"] for x in ("whole", "cut"))
    assert a.keys() == b.keys() and all(a[k].dtype == torch.float32 and torch.equal(a[k], b[k]) for k in a)


def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_bits(toy, tmp_path):
    argv = lambda out, *more: flags(toy, tmp_path / out, "--save_every", 1, *more, steps=6)
    _, status, usage = os.wait4(fork(argv("whole")), 0)
    assert status == 0
    rng, kills = random.Random(0), 0
    while True:
        whole = [folder for folder in runs.checkpoints(tmp_path / "cut").values() if runs.is_whole(folder)]
        length = rng.uniform(0.05, 1) * (usage.ru_utime + usage.ru_stime) if kills < 20 else 0
        code = exit_code(fork(argv("cut", "--resume" if whole else "--overwrite"), cpu_seconds=length))
        assert code in (0, -signal.SIGPROF)
        kills += code != 0
        if code == 0:
            assert same(tmp_path / "whole", tmp_path / "cut")
            assert [m["step"] for m in metrics(tmp_path / "cut")] == list(range(1, 7))
            if kills == 20:
                break
            shutil.rmtree(tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_says_how_to_go_on(toy, tmp_path, number, capfd):
    argv = flags(toy, tmp_path, "--save_every", 0, steps=3000)
    pid = fork(argv)
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 3:
        time.sleep(0.02)
    os.kill(pid, number)
    assert exit_code(pid) == 128 + number
    (step, folder), = runs.checkpoints(tmp_path).items()
    err = capfd.readouterr().err
    assert runs.is_whole(folder) and metrics(tmp_path)[-1]["step"] == step and "--resume" in err and str(tmp_path) in err


def test_a_second_signal_ends_at_once(toy, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        (tmp_path / "once").touch()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    monkeypatch.setattr(sft, "prepare", around(interrupted))
    assert exit_code(fork(flags(toy, tmp_path / "run"))) == -signal.SIGINT and (tmp_path / "once").exists()


@pytest.mark.parametrize("harm", [
    lambda f: os.truncate(f / "model.safetensors", 5000), lambda f: (f / "trainer.pt").unlink(),
    lambda f: (f / "manifest.json").write_text("{"),
    lambda f: (f / "trainer.pt").write_bytes((f / "trainer.pt").read_bytes()[:-1] + b"x")])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_used(toy, tmp_path, capfd, harm):
    argv = flags(toy, tmp_path, "--save_every", 2)
    sft.main(argv)
    before = weights(tmp_path)
    harm(tmp_path / "checkpoint-4")
    sft.main(argv + ["--resume"])
    assert "checkpoint-4 is damaged" in capfd.readouterr().err
    after = weights(tmp_path)
    assert all(torch.equal(before[k], after[k]) for k in before) and runs.is_whole(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("state, words", [
    (lambda state: state | {"more": Path("code")}, "trainer.pt does not hold the state of a run"),
    (lambda state: {"step": 4}, "trainer.pt does not"),
    (lambda state: state | {"weights": {}}, "of another model")])
def test_a_sealed_checkpoint_that_holds_other_things_than_a_state_gets_one_line(toy, tmp_path, capfd, state, words):
    argv, file = flags(toy, tmp_path, "--keep", 1), tmp_path / "checkpoint-4" / "trainer.pt"
    sft.main(argv)
    torch.save(state(torch.load(file)), file)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    (file.parent / "manifest.json").write_text(json.dumps(manifest | {"trainer.pt": runs.seal(file)}))
    assert runs.is_whole(file.parent) and words in refusal([*argv, "--resume"], capfd)


def test_a_full_disk_stops_with_one_line_and_leaves_the_checkpoint_before_it(toy, tmp_path, monkeypatch, capfd):
    real = torch.save

    def full(obj, path):
        if obj["step"] == 4:
            raise OSError(28, "No space left on device")
        real(obj, path)
    monkeypatch.setattr(torch, "save", full)
    line = refusal(flags(toy, tmp_path, "--save_every", 2, "--keep", 1), capfd)
    assert "No space left" in line and "checkpoint-4" in line
    assert [step for step, folder in runs.checkpoints(tmp_path).items() if runs.is_whole(folder)] == [2]
    assert not list(tmp_path.glob("tmp-*"))


def test_a_run_is_not_lost_to_another(toy, tmp_path, capfd):
    sft.main(flags(toy, tmp_path))
    before = (tmp_path / "model.safetensors").read_bytes()
    assert "holds a run" in refusal(flags(toy, tmp_path), capfd)
    line = refusal(flags(toy, tmp_path, "--resume", "--lr", "0.5", "--batch_size", 2), capfd)
    assert "--lr 0.001 -> 0.5" in line and "--batch_size 4 -> 2" in line
    assert "no whole checkpoint" in refusal(flags(toy, tmp_path / "new", "--resume"), capfd)
    refusal(flags(toy, tmp_path, "--overwrite", "--data", "countdown=nowhere.jsonl"), capfd)
    refusal(flags(tmp_path / "nowhere", tmp_path, "--overwrite"), capfd)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    sft.main(flags(toy, tmp_path, "--overwrite", steps=2))
    assert list(runs.checkpoints(tmp_path)) == [2] and len(metrics(tmp_path)) == 2


# ---------------------------------------------------------------- several processes
@pytest.mark.parametrize("more", [[], ["--fsdp"], ["--lora_rank", "4"], ["--lora_rank", "4", "--load_in_4bit"]])
def test_two_processes_learn_what_one_learns_and_their_checkpoint_goes_on_in_one(toy, tmp_path, more):
    argv = lambda out, *extra: flags(toy, tmp_path / out, "--save_every", 2, "--eval_data", f"countdown={toy / 'val.jsonl'}", *extra)
    alone = [m for m in more if m != "--fsdp"]
    sft.main(argv("one", *alone))
    assert together(2, argv("two", *more)) == [0, 0]
    assert far(tmp_path / "one", tmp_path / "two") < 1e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in {"step", "loss", "grad_norm", "token_accuracy", "eval_loss", "eval_tokens"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    shutil.rmtree(tmp_path / "two/checkpoint-4")
    sft.main(argv("two", "--resume", *alone))
    assert far(tmp_path / "one", tmp_path / "two") < 1e-5


def test_a_sharded_tiny_model_keeps_fp32_masters_though_it_computes_in_bf16(toy, tmp_path):
    argv = lambda out, *more: ["--model", "tiny", *flags(toy, tmp_path / out, "--dtype", "bfloat16", "--lr", "5e-7", *more, steps=2)[2:]]
    assert together(2, argv("two", "--fsdp")) == [0, 0]
    sft.main(argv("one"))
    one, two = (torch.load(tmp_path / f"{x}/checkpoint-2/trainer.pt")["weights"] for x in ("one", "two"))
    start = sft.tiny_model(tiny_tokenizer(), 0).state_dict()
    for key in one:
        for w in (two[key], one[key]):
            assert w.dtype == torch.float32 and (w != w.bfloat16().float()).float().mean() > 0.5
        assert 1e-8 < (two[key] - start[key]).abs().max() < 2e-6
    assert weights(tmp_path / "two")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("who", [0, 1])
def test_two_processes_stop_together_after_a_micro_batch_when_one_is_told_to(toy, tmp_path, who, capfd):
    argv = lambda out, *more: flags(toy, tmp_path / out, "--micro_batch_size", 1, "--save_every", 0, *more)

    def told(rank):
        def told(logps, *args, **kwargs):
            calls.append(1)
            (tmp_path / f"calls{rank}").write_text(str(len(calls)))
            if rank == who and len(calls) == 5:                 # two micro-batches a step and process: the first of step 3
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)             # of a cluster and of torchrun
            return logps(*args, **kwargs)
        calls, sft.prepare = [], around(told)
    assert together(2, argv("whole")) == [0, 0]
    assert together(2, argv("cut"), told) == [128 + signal.SIGTERM] * 2
    assert [(tmp_path / f"calls{rank}").read_text() for rank in (0, 1)] == ["5", "5"]
    (step, folder), = runs.checkpoints(tmp_path / "cut").items()
    err = capfd.readouterr().err
    assert step == 2 and runs.is_whole(folder) and err.count("after step 2 of 4; go on with: torchrun --nproc_per_node 2 sft.py") == 1
    assert together(2, argv("cut", "--resume")) == [0, 0]
    assert same(tmp_path / "whole", tmp_path / "cut") and [m["step"] for m in metrics(tmp_path / "cut")] == [1, 2, 3, 4]


def test_two_processes_halve_the_micro_batch_together_when_one_runs_out_of_memory(toy, tmp_path, capfd):
    argv = lambda out: flags(toy, tmp_path / out, "--eval_data", f"countdown={toy / 'val.jsonl'}")

    def small(rank):
        def small(logps, ids, *args, **kwargs):
            if rank == 1 and len(ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return logps(ids, *args, **kwargs)
        sft.prepare = around(small)
    sft.main(argv("one"))
    assert together(2, argv("two"), small) == [0, 0]
    assert capfd.readouterr().err.count("--micro_batch_size 1 from here on") == 1 and far(tmp_path / "one", tmp_path / "two") < 1e-5


def out_of_memory_in_one(rank):
    """What process 1 does not have the memory for is its third pass, as long as that has two rows."""
    def third(logps, ids, *args, **kwargs):
        calls.append(1)
        if rank == 1 and len(calls) == 3 and len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logps(ids, *args, **kwargs)
    calls, sft.prepare = [], around(third)


@pytest.mark.parametrize("save_every", [1, 0])
def test_a_sharded_run_out_of_memory_ends_with_one_line_and_torchruns_restart_goes_on_in_half_the_size(toy, tmp_path, capfd, save_every):
    argv = lambda out: flags(toy, tmp_path / out, "--fsdp", "--save_every", save_every)
    assert together(2, argv("whole")) == [0, 0]
    capfd.readouterr()
    codes = together(2, argv("cut"), out_of_memory_in_one)      # process 0 waits for a part of the pass until 1 is gone
    lines = [line for line in capfd.readouterr().err.splitlines() if "out of GPU memory" in line]
    assert codes[0] != 0 and codes[1] == 2 and len(lines) == 1 and "--micro_batch_size 1" in lines[0]
    assert (tmp_path / "cut" / "micro_batch_size").read_text() == "1"
    assert list(runs.checkpoints(tmp_path / "cut")) == ([1, 2] if save_every else [])
    assert together(2, argv("cut"), out_of_memory_in_one, {"TORCHELASTIC_RESTART_COUNT": "1"}) == [0, 0]
    assert far(tmp_path / "whole", tmp_path / "cut") < 1e-5 and [m["step"] for m in metrics(tmp_path / "cut")] == [1, 2, 3, 4]
    assert "--micro_batch_size 1: the memory was too small" in capfd.readouterr().err


# ---------------------------------------------------------------- command lines
def test_the_learning_rate_suits_what_is_trained_unless_it_is_given():
    lines = [], ["--model", "x"], ["--model", "x", "--lora_rank", 8], ["--lr", 1e-4]
    assert [parsed(*more).lr for more in lines] == [3e-3, 1e-5, 2e-4, 1e-4]


def test_the_command_line_with_a_flag_file_goes_from_nothing_to_a_tiny_model(toy, tmp_path):
    file = tmp_path / "recipe.txt"
    file.write_text(f"# cold start\n\n--model tiny  # made here\n--data 'countdown={toy / 'sft.jsonl'}:8' gsm8k={toy / 'gsm8k'}\n"
                    f"--steps 3 --batch_size 4 --lr 1e-3\n--output_dir {tmp_path / 'run'}\n")
    sft.main([f"@{file}", "--seed", "3"])
    model, tok = AutoModelForCausalLM.from_pretrained(tmp_path / "run"), AutoTokenizer.from_pretrained(tmp_path / "run")
    prompt = tok.apply_chat_template(rewards.messages("countdown", ROWS[0]), add_generation_prompt=True,
                                     return_tensors="pt", return_dict=False)
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.shape[1]


@pytest.mark.parametrize("more, words", [
    (["--lr", 0], "--lr 0: must be above 0"), (["--lr", "nan"], "--lr nan"), (["--lr", "x"], "invalid float value"),
    (["--batch_size", 0], "--batch_size 0: must be at least 1"), (["--micro_batch_size", -1], "at least 1"), (["--steps", 0], "at least 1"),
    (["--epochs", 0], "--epochs 0: must be above 0"), (["--muon_lr", 0], "above 0"),
    (["--warmup", 4], "--warmup 4: must be below --steps, 4"), (["--warmup", -1], "at least 0"),
    (["--max_length", 1], "at least 2"), (["--max_length", 600], "512 tokens"), (["--keep", 0], "at least 1"),
    (["--seed", -1], "at least 0"),
    (["--save_every", -1], "at least 0"), (["--eval_every", -1], "at least 0"), (["--weight_decay", -1], "at least 0"),
    (["--max_grad_norm", "inf"], "at least 0"), (["--betas", 0.9, 1.0], "below 1"), (["--lora_rank", -1], "at least 0"),
    (["--lora_alpha", 0], "at least 0.001"), (["--load_in_4bit"], "--lora_rank"), (["--merge"], "--lora_rank"), (["--fsdp"], "torchrun"),
    (["--lora_rank", 2, "--model", "tiny"], "tiny"), (["--lora_rank", 2, "--optim", "muon"], "adamw"),
    (["--resume", "--overwrite"], "take one"),
    (["--model", "EMPTY", "--output_dir", "."], "--model is or lies in it"), (["@QUOTE"], "No closing quotation"),
    (["--optim", "sgd"], "invalid choice"), (["--style", "x"], "invalid choice"), (["--nonsense"], "unrecognized"),
    (["@nowhere.txt"], "nowhere.txt"),
    (["--chat_template", "nowhere"], "--chat_template nowhere: no such file"), (["--model", "nowhere/at/all"], "--model nowhere/at/all"),
    (["--data", "poetry"], "poetry"), (["--data", "countdown"], "`python countdown.py"),
    (["--data", "countdown=nowhere.jsonl"], "nowhere.jsonl"), (["--data", "countdown=", ], "countdown="),
    (["--data", "arc=ARC"], "arc: a row without a worked answer"), (["--data", "countdown=BARE"], "or `solution`"),
    (["--data", "countdown=BROKEN"], "line 2"), (["--data", "countdown=NUMBER"], "`trace`"),
    (["--eval_data", "countdown=nowhere.jsonl"], "nowhere.jsonl"), (["--output_dir", "FILE"], "FILE"),
    (["--model", "NOTEMPLATE"], "--chat_template FILE"), (["--model", "EMPTY"], "EMPTY"), (["--model", "ADAPTER"], "is an adapter"),
    (["--model", "DAMAGED"], "DAMAGED")])
def test_a_wrong_command_line_gets_one_line(toy, tmp_path, monkeypatch, capfd, more, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    files = {"ARC": [{"question": "?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}], "BARE": toys.COUNTDOWN,
             "NUMBER": [{**ROWS[0], "trace": 5}]}
    for name, rows in files.items():
        toys.write(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "BROKEN.jsonl").write_text(json.dumps(ROWS[0]) + "\n{\n")
    (tmp_path / "FILE").write_text("a file")
    (tmp_path / "QUOTE").write_text("--model 'tiny")
    (tmp_path / "EMPTY").mkdir()
    toys.write(tmp_path / "ADAPTER" / "adapter_config.json", [{"base_model_name_or_path": "EMPTY"}])
    toys.model().save_pretrained("DAMAGED"), toys.tokenizer().save_pretrained("DAMAGED")
    os.truncate("DAMAGED/model.safetensors", 3000)
    toys.model().save_pretrained("NOTEMPLATE"), toys.tokenizer(None).save_pretrained("NOTEMPLATE")
    more = [f"{m}.jsonl" if str(m).partition("=")[2] in (*files, "BROKEN") and "=" in str(m) else m for m in more]
    assert words in refusal(flags(toy, tmp_path / "run", *more), capfd)
    assert not list(tmp_path.glob("run/*"))
