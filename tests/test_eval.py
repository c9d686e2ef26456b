import itertools
import json
import math
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import toys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eval as ev
import rewards

TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def save_tokenizer(folder, chat_template=TEMPLATE):
    special = ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(special + words)}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|end|>", additional_special_tokens=special[1:])
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def toy_model(seed=0, layers=2, context=4096):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.5, eos_token_id=0,
                         bos_token_id=None, pad_token_id=None)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two toy checkpoints, an adapter on the first, and data of three tasks."""
    root = tmp_path_factory.mktemp("eval")
    for seed, name in enumerate(("a", "b")):
        toy_model(seed).save_pretrained(root / name)
        save_tokenizer(root / name)
    rows = [{"nums": [3, 5, 8], "target": 64, "difficulty": "easy"}, {"nums": [1, 2, 3, 4], "target": 24, "difficulty": "hard"},
            {"nums": [7, 7, 2], "target": 16, "difficulty": "easy"}, {"nums": [9, 4, 6], "target": 11, "difficulty": "hard"}]
    (root / "countdown").mkdir()
    write(root / "countdown" / "test.jsonl", rows)
    write(root / "gsm8k.jsonl", [
        {"question": "Tom has 3 bags of 4 apples. How many?", "answer": "He has 3*4=<<3*4=12>>12.\n#### 12"},
        {"question": "What is the area of a 2 by 5 rectangle?", "answer": "It is 10.\nSo 10.\n#### 10"}])
    return root


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def records_of(path):
    return [json.loads(line) for line in open(path)]


def say(reasoning, answer):
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


def speak(monkeypatch, folder, reply):
    """The sampler replaced by reply(prompt text, sample) -> completion: known figures through the whole script."""
    tokenizer = ev.open_checkpoint(str(folder / "a"), ev.parse(["--model", "a"])).tokenizer

    def sampler(prompts, noise, group_size=1, **_):
        return [tokenizer.encode(reply(tokenizer.decode(p), s)) + [0] for p in prompts for s in range(group_size)], None
    monkeypatch.setattr(ev, "Sampler", lambda lm: sampler)


# ---------------------------------------------------------------- the sampler

PROMPTS = [[5, 6, 7], [9] * 11, [40, 41, 42, 43, 44, 45], [100], [9, 8, 9, 8, 9, 8, 9]]


def hf_generate(model, prompts, n, eos_ids):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=n, eos_token_id=eos_ids, pad_token_id=259)
    return [row[width:].tolist() for row in out]


def complete(lm, prompts, *flags, eos_ids, forbid=()):
    """The ids of each prompt's completions, [P][K]"""
    args, found = ev.parse(["--model", "a", *map(str, flags)]), {}
    checkpoint = SimpleNamespace(prompts=prompts, eos_ids=set(eos_ids), forbid=forbid, tokenizer=SimpleNamespace(pad_token_id=None))
    for batch, ids in ev.sample(lm, checkpoint, list(range(len(prompts))), args):
        found |= {i: ids[j * args.samples:(j + 1) * args.samples] for j, i in enumerate(batch)}
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("sampler", ["auto", "plain"])
def test_greedy_sampling_equals_generate_token_for_token_with_left_padding_and_several_end_tokens(sampler):
    model, eos = toy_model(), list(range(0, 40))
    ours = complete(model, PROMPTS, "--max_new_tokens", 24, "--sampler", sampler, "--batch_size", 3, eos_ids=eos)
    theirs = hf_generate(model, PROMPTS, 24, eos)
    for (a,), b in zip(ours, theirs):
        assert a == b[:len(a)] and set(b[len(a):]) <= {259}
        assert a[-1] in eos or len(a) == 24
        assert not set(a[:-1]) & set(eos)
    assert len({len(a) for a, in ours}) > 1


@pytest.mark.parametrize("sampler", ["auto", "plain"])
def test_sampled_tokens_depend_neither_on_the_batch_nor_on_the_number_of_samples(sampler):
    model = toy_model(1)
    flags = ["--max_new_tokens", 40, "--temperature", 1.3, "--seed", 3, "--sampler", sampler]
    together = complete(model, PROMPTS, *flags, "--samples", 4, eos_ids=range(12))
    for more in (["--samples", 4, "--batch_size", 1], ["--samples", 2, "--batch_size", 6]):
        assert complete(model, PROMPTS, *flags, *more, eos_ids=range(12)) == [ids[:more[1]] for ids in together]
    assert len({len(ids) for group in together for ids in group}) > 5
    assert len({tuple(ids) for group in together for ids in group}) > 15
    other_seed = complete(model, PROMPTS, *flags, "--seed", 4, "--samples", 4, eos_ids=range(12))
    assert not any(a == b for a, b in zip(together, other_seed))


def test_sampling_follows_the_softmax_at_the_temperature():
    model, n, temperature = toy_model(2), 20_000, 2.0
    flags = ["--samples", n, "--sampler", "plain", "--max_new_tokens", 1, "--temperature", temperature]
    ids, = complete(model, [[7, 8]], *flags, eos_ids=[0])
    want = (model(torch.tensor([[7, 8]])).logits[0, -1] / temperature).softmax(-1) * n
    got = torch.bincount(torch.tensor(ids)[:, 0], minlength=260)
    big = want > 5
    chi2 = ((got - want) ** 2 / want)[big].sum().item()
    freedom = int(big.sum()) - 1
    assert freedom > 20
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_a_forbidden_token_never_follows_and_is_free_elsewhere():
    flags = ["--samples", 200, "--max_new_tokens", 30, "--temperature", 3]
    pairs = [p for ids in complete(toy_model(3), [[5]], *flags, eos_ids=[259])[0] for p in zip(ids, ids[1:])]
    a, b = max(set(pairs), key=pairs.count)
    after = [p for ids in complete(toy_model(3), [[5]], *flags, eos_ids=[259], forbid=(a, b))[0] for p in zip(ids, ids[1:])]
    assert (a, b) not in after
    assert any(y == b for _, y in after) and any(x == a for x, _ in after)


# ---------------------------------------------------------------- statistics

def test_pass_at_k_equals_the_share_of_all_subsets_that_hold_a_right_one():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
                assert ev.pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets), abs=1e-12)


def test_wilson_interval_has_its_published_values():
    assert ev.wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert ev.wilson(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert ev.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)         # Newcombe 1998, table I


def test_wilson_interval_covers_the_true_share_about_95_times_in_100():
    for p in (0.05, 0.3, 0.5, 0.9):
        n = 60
        covered = sum(math.comb(n, c) * p ** c * (1 - p) ** (n - c) for c in range(n + 1)
                      if ev.wilson(c / n, n)[0] <= p <= ev.wilson(c / n, n)[1])
        assert 0.92 < covered < 0.98


def test_majority_vote_ignores_missing_answers_and_splits_ties():
    assert ev.maj_at_k(["1", "2", "2"], [1, 0, 0]) == 0
    assert ev.maj_at_k(["1", "2", " 2 "], [0, 1, 1]) == 1
    assert ev.maj_at_k([None, None, "2"], [0, 0, 1]) == 1
    assert ev.maj_at_k(["1", "2"], [1, 0]) == 0.5
    assert ev.maj_at_k(["1", "2", "3", None], [1, 0, 0, 0]) == pytest.approx(1 / 3)
    assert ev.maj_at_k([None], [0]) == 0


def test_mcnemar_is_the_exact_two_sided_binomial():
    for b, c in itertools.product(range(8), range(8)):
        n = b + c
        far = [i for i in range(n + 1) if abs(i - n / 2) >= abs(b - n / 2)]
        assert ev.mcnemar(b, c) == pytest.approx(min(1, sum(math.comb(n, i) for i in far) / 2 ** n))
    assert ev.mcnemar(0, 0) == 1
    assert ev.mcnemar(10, 0) == pytest.approx(2 / 1024)


# ---------------------------------------------------------------- reading a trace

def counts(reasoning, nums, target):
    row = {"task": "countdown", "nums": nums, "target": target}
    return ev.tries(reasoning, row)


def test_tries_hits_repeats_and_giving_up_are_counted():
    got = counts("5+3=8 8*2=16 no\n5*2=10 10+3=13 ok", [2, 3, 5], 13)
    assert got == {"tries": 2, "hits": 1, "repeated": 0, "stops after a miss": False}
    got = counts("5+3=8 8*2=16 no\n5+3=8 8*2=16 no", [2, 3, 5], 13)
    assert got == {"tries": 2, "hits": 0, "repeated": 1, "stops after a miss": True}


def test_a_try_is_a_hit_only_if_it_truly_solves_the_problem():
    assert counts("5*2=10 10+3=14 ok", [2, 3, 5], 14)["hits"] == 0             # false arithmetic
    assert counts("5*2=10 10+4=14 ok", [2, 3, 5], 14)["hits"] == 0             # a number that is not given
    assert counts("5+3=8", [2, 3, 5], 8)["tries"] == 0                         # not all numbers
    assert counts("Let me try (5 * 2) + 3 = 13.", [2, 3, 5], 13)["hits"] == 1  # one expression, in prose
    assert counts("First 2 * 2 = 4, then 4 + 4 = 8", [2, 2, 4], 8)["hits"] == 1


@pytest.mark.parametrize("name, text", [
    ("checks", "3*8=24. Let me check: 24 is right."), ("checks", "So 12. I verified it."), ("checks", "5+3=8 ok\n"),
    ("goes back", "Wait, that uses 3 twice."), ("goes back", "That doesn't work, try another."),
    ("checks, goes back", "5+3=8 no\n5+2=7 ok\n"),
    ("sets sub-goals", "First, find the price of one."), ("sets sub-goals", "Step 1: the area."),
    ("sets sub-goals", "We need to find the radius."), (None, "3 boxes of 4 make 12 apples. Noah has 2 more."),
    (None, "He waited at the station, and no one came to look.")])
def test_behaviours_go_by_the_phrases_in_the_reasoning(name, text):
    row = {"task": "gsm8k", "question": "?", "answer": "#### 1"}
    shown = ev.behaviour(say(text, "Wait, step 1: let me check"), row, "reasoning")
    assert [n for n, yes in shown.items() if yes] == (name.split(", ") if name else [])


def test_nothing_a_model_writes_takes_long_to_read():
    row, start = {"task": "countdown", "nums": [1, 2, 3], "target": 6}, time.perf_counter()
    for text in ("1+" * 50_000 + "=", "(" * 100_000, "1=1 " * 25_000, "wait " * 20_000, "1+2=3\n" * 15_000, "\n" * 100_000):
        ev.behaviour(text, row, "reasoning")
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------- the whole script

FIELDS = {"model", "task", "n", "accuracy", "accuracy_low", "accuracy_high", "accuracy_flexible", "format", "pass_at_k",
          "maj_at_k", "completion_length", "truncated", "by"}


def test_figures_of_known_completions_come_out_as_known(folder, tmp_path, monkeypatch, capfd):
    def reply(prompt, sample):
        if "3, 5, 8" in prompt:
            return say("5+3=8 8*8=64 ok", "(5+3)*8")
        if "7, 7, 2" in prompt:
            return say("7+7=14 14*2=28 no\n7+7=14 14+2=16 ok", "7+7+2") if sample else say("", "7*7*2")
        return "(9+6)-4" if "9, 4, 6" in prompt else say("1+2=3 3+3=6 6*4=24 ok", "1*2*3*4")
    speak(monkeypatch, folder, reply)
    out = tmp_path / "e.json"
    ev.main(["--model", str(folder / "a"), "--data", f"countdown={folder}/countdown", "--samples", "2", "--temperature", "1",
             "--output", str(out), "--batch_size", "3"])
    row, = json.loads(out.read_text())
    assert FIELDS <= set(row)
    assert row["n"] == 4 and row["accuracy"] == 5 / 8 and row["pass_at_k"] == 3 / 4
    assert row["maj_at_k"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    assert row["truncated"] == 0 and row["format"] == 5 / 8
    assert row["by"]["numbers"] == {"3": {"n": 3, "accuracy": 0.5}, "4": {"n": 1, "accuracy": 1.0}}
    samples = records_of(tmp_path / "e.samples.jsonl")
    assert [(s["row"], s["sample"]) for s in samples] == [(i, s) for i in range(4) for s in range(2)]
    assert samples[0]["prompt"] == "Numbers: [3, 5, 8]\nTarget: 64"
    assert samples[0]["reward"] == rewards.score("countdown", samples[0]["completion"],
                                                          {"nums": [3, 5, 8], "target": 64}, n_tokens=9)["reward"]
    rates = rewards.load_rows(f"countdown={tmp_path}/e.pass_rates.jsonl", "train")
    assert [r["pass_rate"] for r in rates] == [1.0, 1.0, 0.5, 0.0]
    assert [r["nums"] for r in rates] == [[3, 5, 8], [1, 2, 3, 4], [7, 7, 2], [9, 4, 6]]
    assert "62.5 %" in capfd.readouterr().out


def test_breakdown_adds_up_to_the_whole(folder, tmp_path, monkeypatch):
    speak(monkeypatch, folder, lambda prompt, sample: say("x", "12" if "apples" in prompt else "(5+3)*8"))
    ev.main(["--model", str(folder / "a"), "--data", f"gsm8k={folder}/gsm8k.jsonl", f"countdown={folder}/countdown",
             "--output", str(tmp_path / "e.json")])
    rows = json.loads((tmp_path / "e.json").read_text())
    assert [r["task"] for r in rows] == ["gsm8k", "countdown"]
    assert rows[0]["by"] == {"steps": {"1": {"n": 1, "accuracy": 1.0}, "2": {"n": 1, "accuracy": 0.0}},
                             "geometry": {"no": {"n": 1, "accuracy": 1.0}, "yes": {"n": 1, "accuracy": 0.0}}}
    for row in rows:
        for cells in row["by"].values():
            assert sum(c["n"] for c in cells.values()) == row["n"]
            assert sum(c["n"] * c["accuracy"] for c in cells.values()) == pytest.approx(row["accuracy"] * row["n"])


def test_several_models_stand_side_by_side_and_are_compared_on_the_same_problems(folder, tmp_path, monkeypatch, capfd):
    models = []
    monkeypatch.setattr(ev, "load_lm", lambda name, *a, **k: models.append(name) or toy_model())
    speak(monkeypatch, folder, lambda prompt, s: say("x", "(5+3)*8" if len(models) == 2 else "1*2*3*4"))
    ev.main(["--model", str(folder / "a"), str(folder / "b"), "--data", f"countdown={folder}/countdown",
             "--output", str(tmp_path / "e.json")])
    first, second = json.loads((tmp_path / "e.json").read_text())
    assert (first["accuracy"], second["accuracy"]) == (0.25, 0.25)
    assert "p" not in first and (second["better"], second["worse"], second["p"]) == (1, 1, 1.0)
    assert re.search(r"/b +countdown .* 1 : 1 +1$", capfd.readouterr().out, re.MULTILINE)


def test_a_toy_checkpoint_is_evaluated_end_to_end_and_batches_change_nothing(folder, tmp_path):
    common = ["--model", str(folder / "a"), str(folder / "b"), "--data", f"countdown={folder}/countdown",
              f"gsm8k={folder}/gsm8k.jsonl", "--samples", "3", "--temperature", "1.5", "--max_new_tokens", "12"]
    ev.main(common + ["--output", str(tmp_path / "x.json")])
    ev.main(common + ["--output", str(tmp_path / "y.json"), "--batch_size", "4"])
    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "y.json").read_bytes()
    assert (tmp_path / "x.samples.jsonl").read_bytes() == (tmp_path / "y.samples.jsonl").read_bytes()
    assert len(json.loads((tmp_path / "x.json").read_text())) == 4
    assert len(list(tmp_path.glob("x.*.*.pass_rates.jsonl"))) == 4
    assert len(list(tmp_path.iterdir())) == 12                                 # nothing else is left


def test_think_style_is_asked_for_and_scored(folder, tmp_path, monkeypatch):
    prompts = []
    speak(monkeypatch, folder, lambda prompt, s: prompts.append(prompt) or "<think>x</think><answer>(5+3)*8</answer>")
    ev.main(["--model", str(folder / "a"), "--data", f"countdown={folder}/countdown:1", "--style", "think",
             "--output", str(tmp_path / "e.json")])
    row, = json.loads((tmp_path / "e.json").read_text())
    assert "<think>" in prompts[0] and row["accuracy"] == row["format"] == 1


def test_strict_and_flexible_part_where_the_form_is_wrong(folder, tmp_path, monkeypatch):
    speak(monkeypatch, folder, lambda prompt, s: "The answer is 12." if "apples" in prompt else say("x", "10"))
    ev.main(["--model", str(folder / "a"), "--data", f"gsm8k={folder}/gsm8k.jsonl", "--output", str(tmp_path / "e.json")])
    row, = json.loads((tmp_path / "e.json").read_text())
    assert (row["accuracy"], row["accuracy_flexible"], row["format"]) == (0.5, 1.0, 0.5)


SOLVED = {
    "countdown": {"nums": [3, 5, 8], "target": 64, "solution": "(5+3)*8"},
    "gsm8k": {"question": "Tom has 3 bags of 4 apples. How many?", "answer": "He has 3*4=<<3*4=12>>12.\n#### 12"},
    "math": {"problem": "What is half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
    "arc": {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
    "code": {"text": "Write f that doubles.", "test_list": ["assert f(2) == 4"], "test_setup_code": "",
             "code": "def f(x):\r\n    return 2 * x"},
}


@pytest.mark.parametrize("style", rewards.STYLES)
def test_the_shots_of_every_task_are_right_and_in_the_asked_for_form(style):
    for task, row in SOLVED.items():
        problem, solution = ev.solved({**row, "task": task}, style)
        assert problem == rewards.messages(task, row, style)[-1] and "<<" not in solution["content"]
        parts = rewards.score(task, solution["content"], row, style)
        assert parts["correct"] == parts["format"] == 1, task


def test_shots_stand_before_the_problem_as_turns_and_only_before_those_of_their_task(folder, tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()
    write(tmp_path / "gsm8k" / "train.jsonl", [SOLVED["gsm8k"], {"question": "Never shown", "answer": "#### 1"}])
    prompts = []
    speak(monkeypatch, folder, lambda prompt, s: prompts.append(prompt) or say("x", "10"))
    ev.main(["--model", str(folder / "a"), "--data", f"gsm8k={folder}/gsm8k.jsonl", f"countdown={folder}/countdown:1",
             "--shots", f"gsm8k={tmp_path}/gsm8k:1", "--output", str(tmp_path / "e.json"), "--batch_size", "1"])
    turns = [re.findall(r"<\|(system|user|assistant)\|>", p) for p in prompts]
    assert sorted(map(tuple, turns)) == [("system", "user", "assistant")] + [("system", "user", "assistant", "user", "assistant")] * 2
    shot = "<|assistant|><reasoning>He has 3*4=12.</reasoning>\n<answer>12</answer><|end|>"
    assert sum(shot in p for p in prompts) == 2 and not any("Never shown" in p for p in prompts)


def test_two_processes_give_the_bytes_of_one(folder, tmp_path):
    """Forked, as torchrun's own start would take longer than all other tests."""
    argv = ["--model", str(folder / "a"), str(folder / "b"), "--data", f"countdown={folder}/countdown", f"gsm8k={folder}/gsm8k.jsonl:1",
            "--samples", "2", "--temperature", "1", "--max_new_tokens", "8", "--output"]
    assert toys.together(ev.main, 2, argv + [str(tmp_path / "two.json")]) == [0, 0]
    ev.main(argv + [str(tmp_path / "one.json")])
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert (tmp_path / "one.samples.jsonl").read_bytes() == (tmp_path / "two.samples.jsonl").read_bytes()
    assert sorted(p.name[3:] for p in tmp_path.glob("one*")) == sorted(p.name[3:] for p in tmp_path.glob("two*"))


@pytest.fixture
def adapter(folder, tmp_path):
    """A LoRA adapter on the first checkpoint that does something, and the model of both."""
    peft = pytest.importorskip("peft")
    base = LlamaForCausalLM.from_pretrained(folder / "a")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    name_base(tmp_path / "adapter", folder / "a")
    return str(tmp_path / "adapter"), model.eval()


def name_base(adapter, base):
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_folder_is_base_and_adapter_merged(adapter):
    name, model = adapter
    checkpoint = ev.open_checkpoint(name, ev.parse(["--model", name]), [{**SOLVED["gsm8k"], "task": "gsm8k"}])
    assert checkpoint.eos_ids == {0} and checkpoint.prompts[0]                         # from its base
    merged = ev.load_lm(name, torch.device("cpu"), torch.float32)
    ids = torch.arange(4, 20)[None]
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, toy_model(0)(ids).logits, atol=1e-2)


def evaluate_countdown(folder, out, *flags, model="a"):
    ev.main(["--model", str(folder / model), "--data", f"countdown={folder}/countdown", "--max_new_tokens", "4",
             "--output", str(out), *flags])


def interrupted_after(calls, how):
    """Sampler, interrupted when it has been called that often"""
    def make(lm):
        made, called = Sampler(lm), []

        def sampler(*args, **kwargs):
            called.append(1)
            if len(called) > calls:
                how()
            return made(*args, **kwargs)
        return sampler
    Sampler = ev.Sampler
    return make


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_completions_so_far_and_the_results_of_before(folder, tmp_path, monkeypatch, capsys, number):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    evaluate_countdown(folder, tmp_path / "e.json")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(ev, "Sampler", interrupted_after(2, lambda: os.kill(os.getpid(), number)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        evaluate_countdown(folder, tmp_path / "e.json", "--batch_size", "1")
    assert e.value.code == 130
    so_far, = set(tmp_path.iterdir()) - set(before)
    assert capsys.readouterr().err.endswith(f"interrupted; the completions so far are in {so_far}\n")
    whole = {r["row"]: r for r in records_of(tmp_path / "e.samples.jsonl")}
    assert len(records_of(so_far)) == 2 and all(r == whole[r["row"]] for r in records_of(so_far))
    assert all(p.read_bytes() == content for p, content in before.items())
    assert handlers == {s: signal.getsignal(s) for s in handlers}


def test_each_of_several_processes_keeps_its_completions(folder, tmp_path, capfd):
    def stop():
        raise KeyboardInterrupt
    codes = toys.together(lambda out: evaluate_countdown(folder, out, "--batch_size", "1"), 2, tmp_path / "e.json",
                          before=lambda rank: setattr(ev, "Sampler", interrupted_after(1, stop)))
    err = capfd.readouterr().err
    assert codes == [130, 130]
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and all(str(file) in err and len(records_of(file)) == 1 for file in files)


def test_a_full_disk_gets_one_line_and_leaves_the_results_of_before(folder, tmp_path, monkeypatch, capsys):
    evaluate_countdown(folder, tmp_path / "e.json")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()

    def write_text(path, text, **_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(ev.Path, "write_text", write_text)
    with pytest.raises(SystemExit) as e:
        evaluate_countdown(folder, tmp_path / "e.json", "--samples", "2", "--temperature", "1")
    monkeypatch.undo()
    so_far, = set(tmp_path.iterdir()) - set(before)
    err = capsys.readouterr().err
    assert e.value.code == 2 and "No space left" in err and str(so_far) in err and len(records_of(so_far)) == 8
    assert all(p.read_bytes() == content for p, content in before.items())


def test_out_of_gpu_memory_halves_the_batch_and_loses_nothing(folder, tmp_path, monkeypatch):
    sizes, Sampler = [], ev.Sampler

    def small_card(lm):
        def sampler(prompts, *args, **kwargs):
            sizes.append(len(prompts))
            if len(prompts) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return Sampler(lm)(prompts, *args, **kwargs)
        return sampler
    monkeypatch.setattr(ev, "Sampler", small_card)
    evaluate_countdown(folder, tmp_path / "e.json", "--batch_size", "100")
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert len(records_of(tmp_path / "e.samples.jsonl")) == 4


def test_files_that_are_cut_off_or_lack_weights_get_one_line(folder, tmp_path, adapter, capsys):
    from safetensors.torch import load_file, save_file
    weights, data = load_file(folder / "b" / "model.safetensors"), (folder / "b" / "model.safetensors").read_bytes()
    toy_model().save_pretrained(tmp_path / "damaged")
    save_tokenizer(tmp_path / "damaged")
    file, adapted = tmp_path / "damaged" / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"

    def lacking():
        save_file({name: w for name, w in weights.items() if "layers.1.mlp.up" not in name}, file, metadata={"format": "pt"})
    cases = [("damaged", lambda: file.write_bytes(data[:-100])), ("damaged", lambda: file.write_bytes(data[:5])),
             ("damaged", lambda: file.write_bytes(data[:8] + b"y" * 8 + data[16:])), ("damaged", lacking), ("damaged", file.unlink),
             ("adapter", lambda: adapted.write_bytes(adapted.read_bytes()[:-100])), ("adapter", adapted.unlink),
             ("adapter", lambda: name_base(tmp_path / "adapter", tmp_path / "gone")),
             ("adapter", lambda: (tmp_path / "adapter" / "adapter_config.json").write_text("{"))]
    for model, damage in cases:
        damage()
        with pytest.raises(SystemExit) as e:
            evaluate_countdown(folder, tmp_path / "e.json", model=tmp_path / model)
        err = capsys.readouterr().err
        said = [line for line in err.splitlines() if line.startswith("eval.py: ")]
        assert e.value.code == 2 and len(said) == 1 and str(tmp_path / model) in said[0] and "Traceback" not in err, err
    assert "lack" not in said[0] and "base" in said[0]
    assert not list(tmp_path.glob("e.*"))
    with pytest.raises(SystemExit) as e:                       # as the second of two: the first one's completions are kept
        evaluate_countdown(folder, tmp_path / "e.json", "--model", str(folder / "a"), str(tmp_path / "damaged"))
    so_far, = tmp_path.glob("e.*")
    assert e.value.code == 2 and len(records_of(so_far)) == 4 and str(so_far) in capsys.readouterr().err


def test_wrong_input_gets_one_line_and_exit_code_2_before_any_model_loads(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ev, "load_lm", lambda *a, **k: pytest.fail("a model was loaded"))
    good = {"--model": [str(folder / "a")], "--data": [f"countdown={folder}/countdown"], "--output": [str(tmp_path / "e.json")]}
    (tmp_path / "empty").mkdir()
    (tmp_path / "d.json").mkdir()
    (tmp_path / "outer" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "outer" / "checkpoint-5" / "config.json").write_text("{}")
    toy_model(context=64).save_pretrained(tmp_path / "short")
    save_tokenizer(tmp_path / "short")
    toy_model().save_pretrained(tmp_path / "untemplated")
    save_tokenizer(tmp_path / "untemplated", chat_template=None)
    (tmp_path / "refusing.jinja").write_text("{{ raise_exception('no system turn here') }}")
    (tmp_path / "broken.jsonl").write_text('{"nums": [1, 2], "target": 3}\n{"nums": [1,\n')
    (tmp_path / "file").write_text("")
    write(tmp_path / "unsolved.jsonl", [{"nums": [1, 2], "target": 3}])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    cases = [({"--samples": ["0"]}, "--samples 0"), ({"--samples": ["4"]}, "--temperature 1"),
             ({"--temperature": ["-1"]}, "--temperature -1"), ({"--temperature": ["nan"]}, "--temperature nan"),
             ({"--max_new_tokens": ["0"]}, "--max_new_tokens 0"), ({"--batch_size": ["0"]}, "--batch_size 0"),
             ({"--limit": ["-1"]}, "--limit -1"), ({"--seed": ["-1"]}, "--seed -1"),
             ({"--model": []}, "--model"), ({"--model": [str(tmp_path / "empty")]}, "config.json"),
             ({"--model": [str(tmp_path / "outer")]}, "checkpoint-5"), ({"--model": [str(tmp_path / "short")]}, "reads 64"),
             ({"--model": [str(tmp_path / "untemplated")]}, "chat template"),
             ({"--data": [f"countdown={tmp_path}/nowhere.jsonl"]}, "nowhere.jsonl"),
             ({"--data": [f"countdown={tmp_path}/broken.jsonl"]}, "broken.jsonl"), ({"--data": ["chess"]}, "chess"),
             ({"--data": [f"gsm8k={folder}/countdown"]}, "question"),
             ({"--output": [str(tmp_path / "file" / "e.json")]}, "--output"), ({"--output": ["e.txt"]}, ".json"),
             ({"--style": ["rhyme"]}, "rhyme"), ({"--shots": ["8"]}, "TASK"), ({"--shots": [f"gsm8k={folder}/gsm8k.jsonl"]}, ":N"),
             ({"--shots": [f"gsm8k={folder}/gsm8k.jsonl:1"]}, "no problems of the task gsm8k"),
             ({"--output": [str(tmp_path / "d.json")]}, "d.json"), ({"--chat_template": ["none.jinja"]}, "none.jinja"),
             ({"--chat_template": [str(tmp_path / "refusing.jinja")]}, "no system turn"),
             ({"--shots": [f"countdown={tmp_path}/unsolved.jsonl:1"]}, "solution"), ({"--model": [str(folder / "a")] * 2}, "twice"),
             ({"--model": [str(tmp_path / "adapter")]}, "adapter"), ({"--forbid_after": ["a"]}, "--forbid_after"),
             ({"--forbid_after": ["ab", "c"]}, "[2, 1] tokens"), ({"--speed": ["1"]}, "--speed"),
             ({"--seed": [str(2 ** 64)]}, "--seed"), ({"--results": ["e.json"]}, "--report"),
             ({"--temperature": ["inf"]}, "--temperature inf"),
             ({"--curves": ["runs/x"]}, "evaluate nothing"), ({"--sampler": ["fast"]}, "fast"), ({"@gone.txt": [""]}, "gone.txt")]
    for change, said in cases:
        argv = [a for flag, values in {**good, **change}.items() if values for a in (flag, *values)]
        with pytest.raises(SystemExit) as e:
            ev.main(argv)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and "Traceback" not in err, (argv, err)
        assert len([line for line in err.splitlines() if line.startswith("eval.py: ")]) == len(err.splitlines()) == 1, err
    assert not list(tmp_path.glob("e.*"))


def test_flags_can_stand_in_a_file_with_comments(folder, tmp_path, monkeypatch):
    flags = tmp_path / "flags.txt"
    flags.write_text(f"# a comment\n--model '{folder}/a'   # where\n\n--samples 3 --temperature 0.5\n")
    args = ev.parse([f"@{flags}"])
    assert (args.model, args.samples, args.temperature) == ([f"{folder}/a"], 3, 0.5)


def test_curves_and_report_are_passed_on_to_report_py_from_a_flag_file_too(tmp_path, capfd):
    for run, keys in (("sft", ("loss", "token_accuracy")), ("grpo", ("reward", "correct", "format", "kl", "entropy"))):
        (tmp_path / run).mkdir()
        lines = [{"step": i, **{k: i / 50 for k in keys}} for i in range(1, 51)]
        lines += [{"step": 25, "eval_correct": 0.4}, {"step": 50, "eval_correct": 0.6}]
        write(tmp_path / run / "metrics.jsonl", lines)
    runs, out = [str(tmp_path / "sft"), str(tmp_path / "grpo")], str(tmp_path / "deep" / "x.png")
    (tmp_path / "flags.txt").write_text("# two runs\n--curves " + " ".join(runs))
    with pytest.raises(SystemExit) as e:
        ev.main([f"@{tmp_path}/flags.txt", "--output", out])
    assert e.value.code == 0 and open(out, "rb").read(4) == b"\x89PNG"
    with pytest.raises(SystemExit) as e:
        ev.main(["--report", *runs, "--results", str(tmp_path / "gone.json"), "--output", str(tmp_path / "y.html")])
    assert e.value.code == 2 and "report.py: " in capfd.readouterr().err
