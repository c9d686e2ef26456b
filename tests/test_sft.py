"""sft.py: what is trained, what must not change it (batches, processes, kills), what is left on disk."""
import json
import math
import os
import random
import shutil
import signal
import time
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401 (FSDP imports it: here once for all forks)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, LlamaForCausalLM,
                          Qwen3MoeConfig)

import rewards
import sft
import toys

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # some tests fork
TRACES = [("5+3=8 8*8=64 no\n8*5=40 40-3=37 no", "8*5-3"), ("8*3=24 ok", "8*3"),
          ("8-5=3 3*8=24 ok", "(8-5)*8"), ("5*3=15 15+8=23 no", "5*3+8"),
          ("8+5=13 13+3=16 no\n5-3=2 8*2=16 no", "8*(5-3)")]
ROWS = [{"nums": [5, 3, 8], "target": 24, "trace": trace, "trace_answer": said} for trace, said in TRACES * 4]
fork, together = partial(toys.fork, sft.main), partial(toys.together, sft.main)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toys.save(folder)
    toys.write(folder / "sft.jsonl", ROWS)
    toys.write(folder / "val.jsonl", ROWS[:3])
    return folder


@pytest.fixture(scope="module")
def tiny():
    return sft.tiny_tokenizer()


@pytest.fixture(autouse=True)
def no_stop_is_left():
    yield
    sft.STOP.clear()


def flags(toy, out, *more, steps=4):
    argv = ["--model", toy / "model", "--data", f"countdown={toy / 'sft.jsonl'}", "--output_dir", out,
            "--batch_size", 4, "--max_length", 300, "--micro_batch_size", 2,
            "--steps", steps, "--lr", 1e-3, *more]
    return [str(word) for word in argv]


def parsed(*more):
    return sft.parse_args([str(word) for word in more])


def weights(folder):
    found = {name: w for file in Path(folder).glob("*.safetensors") for name, w in load_file(file).items()}
    assert found
    return found


def trained(folder):
    """The fp32 weights in a checkpoint."""
    return torch.load(folder / "trainer.pt", weights_only=True)["weights"]


def far(a, b):
    """The largest difference between the weights of two folders."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def metrics(out):
    return toys.read(Path(out) / "metrics.jsonl")


def steps_of(out):
    return [line["step"] for line in metrics(out)]


def refusal(argv, capfd):
    """The one line that a command gets which cannot work."""
    capfd.readouterr()
    assert toys.exit_code(fork([str(word) for word in argv])) == 2  # a process keeps its folder locked
    err = capfd.readouterr().err.strip()
    assert "Traceback" not in err
    return err.splitlines()[-1]


def read(tokenizer, rows, tmp_path, *more):
    """rows of countdown -> what sft.py makes of them."""
    path = toys.write(tmp_path / "rows.jsonl", rows)
    rows = rewards.load_rows(f"countdown={path}", "train")
    return sft.encode(rows, tokenizer, parsed("--model", "toy", *more))


# ---------------------------------------------------------------- rows
@settings(max_examples=100, deadline=None)
@given(st.text())
def test_the_tiny_tokenizer_gives_any_text_back(tiny, text):
    assert tiny.decode(tiny(text, add_special_tokens=False)["input_ids"], skip_special_tokens=False) == text


def test_the_tiny_tokenizer_has_a_token_for_each_number_tag_and_word(tiny):
    for word in [*map(str, range(100)), "<reasoning>", "</think>", "<answer>", " ok", " no", "Numbers: ["]:
        assert len(tiny(word)["input_ids"]) == 1, word
    assert len(tiny("105")["input_ids"]) == 2 and tiny.eos_token_id != tiny.pad_token_id
    assert len(tiny(rewards.worked_completion("countdown", ROWS[1]))["input_ids"]) == 14


def test_the_tiny_model_and_tokenizer_load_like_any_checkpoint(tiny, tmp_path):
    lm = sft.tiny_model(tiny, 0)
    assert 0.4e6 < sum(p.numel() for p in lm.parameters()) < 1e6
    tiny.save_pretrained(tmp_path)
    lm.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Numbers: [3, 50]\nTarget: 24 é\0 <think>7</think>"
    assert again(text)["input_ids"] == tiny(text)["input_ids"] and again.eos_token_id == tiny.eos_token_id
    chat = rewards.messages("countdown", {"nums": [3, 5], "target": 8})
    assert again.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == \
        "<|user|>Numbers: [3, 5]\nTarget: 8<|end|><|assistant|>"
    ids = torch.arange(20)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, lm(ids).logits)


@pytest.mark.parametrize("style", rewards.STYLES)
def test_only_the_worked_completion_and_its_end_token_are_trained(tmp_path, style):
    tok = toys.tokenizer()                                      # its pad token is its end token
    rows = read(tok, ROWS[:4], tmp_path, "--style", style)
    (inputs, targets), = sft.make_batches(rows, 4)
    longest_first = sorted(range(4), key=lambda i: -len(rows[i][0]))
    for i, line, target in zip(longest_first, inputs, targets):
        chat = rewards.messages("countdown", ROWS[i], style)
        prompt = tok(sft.render(tok, [chat])[0], add_special_tokens=False)["input_ids"]
        text = rewards.worked_completion("countdown", ROWS[i], style)
        want = tok(text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
        ids, padding = prompt + want, len(line) - len(prompt) - len(want) + 1
        assert line.tolist() == ids[:-1] + [0] * padding
        assert target.tolist() == [-100] * (len(prompt) - 1) + want + [-100] * padding


def test_the_end_token_is_the_chat_templates_even_where_the_eos_is_another():
    tok = toys.tokenizer(toys.TEMPLATE.replace("{% endfor %}", "\n{% endfor %}"))
    tok.eos_token = toys.UNKNOWN
    assert sft.end_ids(tok, GenerationConfig())[0] == tok.convert_tokens_to_ids(toys.END)
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert sft.end_ids(tok, GenerationConfig())[0] == tok.convert_tokens_to_ids(toys.UNKNOWN)


def test_rows_beyond_the_limit_are_left_out_whole_and_counted(toy, tmp_path, capfd):
    tok = toys.tokenizer()
    lengths = [len(inputs) + 1 for inputs, _ in read(tok, ROWS, tmp_path)]
    limit = sorted(lengths)[10]
    kept = read(tok, ROWS, tmp_path, "--max_length", limit)
    assert [len(inputs) + 1 for inputs, _ in kept] == [n for n in lengths if n <= limit]
    assert f"{len(ROWS) - len(kept)} of {len(ROWS)} rows" in capfd.readouterr().err


def test_every_row_comes_once_an_epoch_in_an_order_of_the_seed(toy, tmp_path, monkeypatch):
    drawn, data, encode, make_batches = {}, [], sft.encode, sft.make_batches
    monkeypatch.setattr(sft, "encode", lambda *args: data.append(encode(*args)) or data[-1])
    for seed in (1, 2):
        def spy(rows, size):
            drawn.setdefault(seed, []).extend(next(i for i, row in enumerate(data[-1]) if row is x) for x in rows)
            return make_batches(rows, size)
        monkeypatch.setattr(sft, "make_batches", spy)
        sft.main(flags(toy, tmp_path / str(seed), "--seed", seed, steps=11))    # of 4 rows: 2 epochs and 4 rows
    epochs = [drawn[1][:20], drawn[1][20:40], drawn[2][:20], drawn[2][20:40]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and len({*map(tuple, epochs)}) == 4
    assert len(drawn[1]) == 44


def test_a_task_of_the_users_own_trains_by_its_row_of_the_table_alone(toy, tmp_path, monkeypatch):
    row = {"columns": {"text": str}, "data": "reversed", "instruction": "Reverse the text.",
           "ask": lambda row: row["text"], "gold": lambda row: row["text"][::-1],
           "grade": lambda said, row: said == row["text"][::-1],
           "worked": lambda row: ("I read it backwards.", row["text"][::-1])}
    monkeypatch.setitem(rewards.TASKS, "reverse", row)
    file = toys.write(tmp_path / "rows.jsonl", [{"text": "abc"}, {"text": "wxyz"}])
    sft.main(flags(toy, tmp_path / "run", "--data", f"reverse={file}", "--lr", 3e-3, steps=8))
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


# ---------------------------------------------------------------- a step
def reference(folder, rows):
    """Sums over the completions' tokens by transformers' own loss: cross-entropy, hits, tokens."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss, hits, tokens = 0, 0, 0
    for inputs, targets in rows:
        ids, labels = torch.cat([inputs, targets[-1:]]), torch.cat([torch.tensor([-100]), targets])
        out, n = lm(ids[None], labels=labels[None]), int((targets >= 0).sum())
        loss, tokens = loss + out.loss * n, tokens + n
        hits += int((out.logits[0, :-1].argmax(-1) == targets).sum())
    return lm, loss, hits, tokens


def test_loss_accuracy_and_gradient_are_those_of_transformers_with_prompts_at_minus_100(toy, tmp_path):
    rows = read(toys.tokenizer(), ROWS, tmp_path)
    batch = [rows[i] for i in np.random.default_rng([0, 0]).permutation(len(rows))[:7]]     # seed, epoch
    lm, loss, hits, tokens = reference(toy / "model", batch)
    (loss / tokens).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in lm.parameters()))
    sft.main(flags(toy, tmp_path / "run", "--batch_size", 7, "--micro_batch_size", 3, steps=1))
    line, = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(float(loss) / tokens, rel=1e-5)
    assert line["token_accuracy"] == hits / tokens and line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert line["tokens"] == sum(len(inputs) + 1 for inputs, _ in batch)
    assert {"step", "lr", "skipped", "tokens_per_s", "step_seconds", "peak_memory_gb"} <= line.keys()


def test_held_out_loss_and_accuracy_are_those_of_the_final_model(toy, tmp_path):
    val = ["--eval_data", f"countdown={toy / 'val.jsonl'}", "--eval_every", 2]
    sft.main(flags(toy, tmp_path / "run", *val, steps=5))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 5]
    _, loss, hits, tokens = reference(tmp_path / "run", read(toys.tokenizer(), ROWS[:3], tmp_path))
    assert lines[-1]["eval_loss"] == pytest.approx(float(loss) / tokens, rel=1e-5)
    assert lines[-1]["eval_token_accuracy"] == hits / tokens and lines[-1]["eval_tokens"] == tokens
    sft.main(flags(toy, tmp_path / "without", steps=5))
    assert far(tmp_path / "run", tmp_path / "without") == 0


def test_splitting_a_batch_into_micro_batches_changes_no_weight(toy, tmp_path):
    for size in (1, 3, 100):
        sft.main(flags(toy, tmp_path / str(size), "--batch_size", 7, "--micro_batch_size", size))
    assert far(tmp_path / "1", tmp_path / "100") < 1e-5 and far(tmp_path / "3", tmp_path / "100") < 1e-5
    assert far(tmp_path / "1", toy / "model") > 1e-3


@pytest.mark.parametrize("world, more", [(2, []), (4, []), (2, ["--fsdp"]),
                                         (2, ["--lora_rank", "4", "--load_in_4bit"])])
def test_processes_learn_what_one_learns_and_their_checkpoint_resumes_in_one(toy, tmp_path, world, more):
    def argv(out, *extra):  # 5 and 3 rows: not the same number for each process
        return flags(toy, tmp_path / out, "--batch_size", 5, "--save_every", 2, "--eval_data",
                     f"countdown={toy / 'val.jsonl'}", "--eval_every", 2, *extra)

    alone = [word for word in more if word != "--fsdp"]
    sft.main(argv("one", *alone))
    assert together(world, argv("many", *more)) == [0] * world
    assert far(tmp_path / "one", tmp_path / "many") < 1e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        for key in {"step", "loss", "grad_norm", "token_accuracy", "eval_loss", "eval_tokens"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    shutil.rmtree(tmp_path / "many/checkpoint-4")
    sft.main(argv("many", "--resume", *alone))
    assert far(tmp_path / "one", tmp_path / "many") < 1e-5


def test_the_learning_rate_warms_up_to_the_peak_and_falls_by_half_a_cosine(toy, tmp_path):
    sft.main(flags(toy, tmp_path, "--warmup", 2, steps=6))
    factors = [0.5, 1, 1, *(0.5 + 0.5 * math.cos(math.pi * x / 4) for x in (1, 2, 3))]
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx([1e-3 * x for x in factors])


def test_steps_are_lines_in_a_log_and_a_bar_on_a_terminal_and_the_end_says_what_is_next(
        toy, tmp_path, monkeypatch, capsys):
    sft.main(flags(toy, tmp_path / "log", steps=12))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [f"{i}/12" for i in range(1, 13)]
    assert "loss" in lines[-2] and lines[-1].startswith(f"wrote {tmp_path}/log: next, python grpo.py --model")
    monkeypatch.setattr(sft.sys.stderr, "isatty", lambda: True)
    sft.main(flags(toy, tmp_path / "terminal", steps=12))
    said = capsys.readouterr().err
    bar = said.split("\r")[-1]
    assert "step 1/12" not in said and "12/12 [" in bar and "loss" in bar and "accuracy" in bar


def test_without_steps_the_epochs_count(toy, tmp_path):
    argv = flags(toy, tmp_path, "--epochs", 1.5, "--batch_size", 7)
    at = argv.index("--steps")
    sft.main(argv[:at] + argv[at + 2:])
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]                # 30 rows


@pytest.mark.parametrize("world, more", [(1, []), (2, ["--fsdp"])])
def test_an_update_of_5e_7_moves_the_weights_that_are_saved_in_bf16(toy, tmp_path, world, more):
    argv = flags(toy, tmp_path, "--dtype", "bfloat16", "--lr", 5e-7, "--save_every", 1, *more, steps=1)
    assert together(world, argv) == [0] * world
    after, before = trained(tmp_path / "checkpoint-1"), weights(toy / "model")
    if world == 1:                                              # it is trained from what bf16 makes of a file
        before = {name: x.bfloat16().float() for name, x in before.items()}
    for name in weights(tmp_path):
        assert after[name].dtype == torch.float32 and 1e-7 < (before[name] - after[name]).abs().max() < 1e-6
        for folder in (tmp_path, tmp_path / "checkpoint-1"):
            assert torch.equal(weights(folder)[name], after[name].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit", "paged_adamw8bit", "muon"])
def test_training_lowers_the_loss_with_every_optimizer(toy, tmp_path, optim):
    sft.main(flags(toy, tmp_path, "--optim", optim, "--lr", 3e-3, steps=12))
    lines = metrics(tmp_path)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


@pytest.mark.parametrize("shape", [(24, 24), (8, 24), (24, 8)])
def test_muon_steps_as_pytorchs_own_but_for_its_bf16(shape, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    start, gradients, moved = torch.randn(shape), torch.randn(3, *shape), []
    bare = SimpleNamespace(modules=list, get_output_embeddings=lambda: None)
    ours = lambda p: sft.Muon(bare, {"weight": (p, p)}, lr=0.03)                      # noqa: E731
    for make in ours, lambda p: torch.optim.Muon([p], lr=0.1, weight_decay=0.0):
        p = torch.nn.Parameter(start.clone())
        optimizer = make(p)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        moved.append(p.detach() - start)
    assert (moved[0] - moved[1]).norm() < 1e-5 * moved[1].norm()


@pytest.mark.parametrize("config", [
    GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64), Qwen3MoeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=64,
        moe_intermediate_size=8, num_experts=4)], ids=["gpt2", "experts"])
def test_muon_takes_every_matrix_but_embeddings_and_head_and_each_expert_alone(config):
    lm = AutoModelForCausalLM.from_config(config)
    optimizer = sft.Muon(lm, {name: (p, p) for name, p in lm.named_parameters()}, lr=0.3)
    names = {name for name, p in lm.named_parameters() if any(p is m for m in optimizer.matrices)}
    assert {name for name, p in lm.named_parameters() if p.ndim > 1} - names <= {
        "transformer.wte.weight", "transformer.wpe.weight", "model.embed_tokens.weight", "lm_head.weight"}
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    for p in lm.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name in names:                                          # a step's singular values are about 1, whatever
        moved = before[name] - dict(lm.named_parameters())[name].detach()           # the gradient was
        scale = max(1, moved.size(-2) / moved.size(-1)) ** 0.5
        assert 0.5 < (torch.linalg.svdvals(moved) / scale).median() < 1.5


def test_activation_checkpointing_changes_nothing(toy, tmp_path):
    sft.main(flags(toy, tmp_path / "a"))
    sft.main(flags(toy, tmp_path / "b", "--activation_checkpointing"))
    assert far(tmp_path / "a", tmp_path / "b") == 0


def test_a_gradient_that_is_not_finite_is_skipped_and_training_goes_on(toy, tmp_path, monkeypatch):
    real, calls = torch.nn.functional.cross_entropy, []

    def broken(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", broken)
    sft.main(flags(toy, tmp_path, "--save_every", 1, steps=2))  # two micro-batches a step
    first, second = metrics(tmp_path)
    assert first["skipped"] == 1 and first["loss"] is None and second["skipped"] == 0 and second["loss"] > 0
    assert far(tmp_path / "checkpoint-1", toy / "model") == 0 < far(tmp_path, toy / "model")


# ---------------------------------------------------------------- adapters
@pytest.mark.parametrize("more", [[], ["--load_in_4bit"]])
def test_an_adapter_is_trained_alone_and_merging_gives_its_logits(toy, tmp_path, more):
    import peft
    sft.main(flags(toy, tmp_path, "--lora_rank", 4, "--merge", "--lr", 1e-2, *more))
    base = sft.load_lm(str(toy / "model"), torch.device("cpu"), torch.float32, load_in_4bit=bool(more))
    ids = torch.randint(0, 100, (2, 30))
    with torch.no_grad():
        plain = base(ids).logits
        policy = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        with policy.disable_adapter():
            assert torch.equal(policy(ids).logits, plain)
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        want = policy(ids).logits
    assert (want - plain).norm() > 0.01 * plain.norm() and (got - want).norm() < 1e-4 * want.norm()
    assert all("lora_" in name for name in weights(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [0]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == toys.TEMPLATE


# ---------------------------------------------------------------- what is left on disk
def test_the_final_model_and_every_checkpoint_load_and_keep_tied_weights(toy, tmp_path):
    sft.main(flags(toy, tmp_path, "--save_every", 2))
    assert not list(tmp_path.glob("**/tmp-*"))
    assert json.loads((tmp_path / "args.json").read_text())["lr"] == 1e-3
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        lm, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert lm.lm_head.weight is lm.model.embed_tokens.weight and "lm_head.weight" not in weights(folder)
        assert tok.chat_template == toys.TEMPLATE
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [0]
    assert far(tmp_path, tmp_path / "checkpoint-4") == 0 < far(tmp_path, tmp_path / "checkpoint-2")


def test_generation_stops_at_the_end_of_a_turn_and_at_the_models_own_ends(toy, tmp_path):
    shutil.copytree(toy / "model", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [5, 9], "temperature": 0.6}')
    sft.main(flags(tmp_path, tmp_path / "run", "--data", f"countdown={toy / 'sft.jsonl'}", steps=1))
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [0, 5, 9]


def test_same_seed_same_bytes_another_seed_others(toy, tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        sft.main(flags(toy, tmp_path / name, "--seed", seed))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("kind", [[], ["--optim", "muon"], ["--optim", "adamw8bit", "--dtype", "bfloat16"],
                                  ["--lora_rank", "4"], ["--lora_rank", "4", "--load_in_4bit"]], ids=" ".join)
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(toy, tmp_path, kind):
    def argv(out, *more):
        return flags(toy, tmp_path / out, "--save_every", 3, "--warmup", 2, *kind, *more, steps=6)

    sft.main(argv("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoint-6")
    sft.main(argv("cut", "--resume"))
    assert far(tmp_path / "whole", tmp_path / "cut") == 0 and steps_of(tmp_path / "cut") == [*range(1, 7)]
    a, b = (trained(tmp_path / out / "checkpoint-6") for out in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_killed_at_random_moments_ends_bitwise_equal(toy, tmp_path):
    def argv(out):
        return flags(toy, tmp_path / out, "--save_every", 1, "--resume", steps=6)

    _, status, usage = os.wait4(fork(argv("whole")), 0)
    assert status == 0
    rng, kills, code = random.Random(0), 0, 1
    while code:
        length = rng.uniform(0.05, 0.7) * (usage.ru_utime + usage.ru_stime) if kills < 5 else 0
        code = toys.exit_code(fork(argv("cut"), cpu_seconds=length))
        assert code in (0, -signal.SIGPROF)
        kills += code != 0
    assert kills and far(tmp_path / "whole", tmp_path / "cut") == 0
    assert steps_of(tmp_path / "cut") == [*range(1, 7)]


@pytest.mark.parametrize("where", ["weights half written", "before the rename", "before a removal"])
def test_a_run_killed_within_a_save_ends_bitwise_equal(toy, tmp_path, where):
    def argv(out):
        return flags(toy, tmp_path / out, "--save_every", 1, "--resume")

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(state, path):
        if state["done"]["step"] == 3:
            path.write_bytes(b"half of it")
            die()
        save(state, path)

    def trap():
        if where == "weights half written":
            torch.save = half
        elif where == "before the rename":
            Path.rename = die
        else:
            sft.shutil.rmtree = lambda path, **_: str(path).endswith("checkpoint-1") and Path(path).exists() and die()

    save = torch.save
    assert toys.exit_code(fork(argv("cut"), before=trap)) == -signal.SIGKILL
    sft.main(argv("whole"))
    sft.main(argv("cut"))
    assert far(tmp_path / "whole", tmp_path / "cut") == 0 and steps_of(tmp_path / "cut") == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_says_how_to_resume(toy, tmp_path, number, capfd):
    argv = flags(toy, tmp_path, "--save_every", 0, steps=3000)
    pid = fork(argv)
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 3:
        time.sleep(0.02)
    os.kill(pid, number)
    assert toys.exit_code(pid) == 128 + number
    folder, = tmp_path.glob("checkpoint-*")
    assert folder.name == f"checkpoint-{steps_of(tmp_path)[-1]}" and "--resume" in capfd.readouterr().err
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("who", [0, 1])
def test_processes_stop_together_when_one_is_told_to(toy, tmp_path, who):
    def told(rank):
        real, calls = sft.make_batches, []

        def third(*inputs):
            calls.append(1)
            if rank == who and len(calls) == 3:                 # a call a step: the third is left undone
                signal.raise_signal(signal.SIGTERM)
            return real(*inputs)
        sft.make_batches = third

    argv = flags(toy, tmp_path / "cut", "--save_every", 0)
    assert together(2, argv, told) == [128 + signal.SIGTERM] * 2
    assert [folder.name for folder in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    assert together(2, [*argv, "--resume"]) == [0, 0]
    assert together(2, flags(toy, tmp_path / "whole")) == [0, 0]
    assert far(tmp_path / "whole", tmp_path / "cut") == 0 and steps_of(tmp_path / "cut") == [1, 2, 3, 4]


# ---------------------------------------------------------------- command lines
def test_a_flag_file_makes_a_tiny_model_that_learns_and_generates(toy, tmp_path):
    file = tmp_path / "recipe.txt"
    file.write_text(f"# cold start\n\n--model tiny  # made here\n--data 'countdown={toy / 'sft.jsonl'}:8'\n"
                    f"--steps 12 --batch_size 4 --lr 3e-3\n--output_dir {tmp_path / 'run'}\n")
    sft.main([f"@{file}", "--seed", "3"])
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert json.loads((tmp_path / "run/args.json").read_text())["model"] == "tiny"
    lm, tok = (kind.from_pretrained(tmp_path / "run") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tok.apply_chat_template(rewards.messages("countdown", ROWS[0]), add_generation_prompt=True,
                                     return_tensors="pt", return_dict=False)
    assert lm.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.shape[1]


@pytest.mark.parametrize("more, words", [
    (["--steps", 0], "must be at least 1"), (["--lr", "nan"], "--lr"), (["--max_length", 20], "every row is longer"), (["--load_in_4bit"], "--lora_rank"),
    (["--fsdp"], "torchrun"), (["--lora_rank", 2, "--model", "tiny"], "tiny"),
    (["--style", "x"], "invalid choice"),
    (["--nonsense"], "unrecognized"), (["@nowhere.txt"], "nowhere.txt"),
    (["--model", "not/there"], "not/there"),
    (["--data", "poetry"], "poetry"), (["--data", "countdown=nowhere.jsonl"], "nowhere.jsonl"),
    (["--eval_data", "countdown=nowhere.jsonl"], "nowhere.jsonl"),
    (["--data", "countdown=BARE.jsonl"], "or `solution`"), (["--data", "countdown=BROKEN.jsonl"], "line 2"),
    (["--data", "countdown=SURROGATE.jsonl"], "line 1"), (["--output_dir", "FILE"], "FILE"),
    (["--model", "TEMPLATE"], "chat template"), (["--model", "DAMAGED"], "DAMAGED")])
def test_a_command_that_cannot_work_gets_one_line(toy, tmp_path, monkeypatch, capfd, more, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    toys.write("BARE.jsonl", toys.COUNTDOWN)
    Path("BROKEN.jsonl").write_text(json.dumps(ROWS[0]) + "\n{\n")
    toys.write("SURROGATE.jsonl", [{**ROWS[0], "trace": "\ud800"}])
    Path("FILE").write_text("a file")
    shutil.copytree(toy / "model", "TEMPLATE")
    Path("TEMPLATE/chat_template.jinja").write_text("{% for m in messages %}")
    shutil.copytree(toy / "model", "DAMAGED")
    os.truncate("DAMAGED/model.safetensors", 3000)
    assert words in refusal(flags(toy, tmp_path / "run", *more), capfd)
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_out_of_gpu_memory_is_one_line_of_advice_that_resume_allows(toy, tmp_path, monkeypatch, capfd):
    real = LlamaForCausalLM.forward

    @wraps(real)
    def no_memory(lm, input_ids, **inputs):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(lm, input_ids, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", no_memory)
    assert "smaller --micro_batch_size" in refusal(flags(toy, tmp_path), capfd)
    sft.main(flags(toy, tmp_path, "--resume", "--micro_batch_size", 1))
    assert steps_of(tmp_path) == [1, 2, 3, 4]
