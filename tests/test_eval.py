"""eval.py: what is sampled, how a figure is computed, what is written, and what is refused."""
import itertools
import json
import math
import os
import re
import signal
import sys
from datetime import datetime

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eval as ev
import rewards
import toys

TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def save_tokenizer(folder, chat_template=TEMPLATE):
    """One token per byte; id 0 ends a completion."""
    special = ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(special + words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>",
                                   additional_special_tokens=special[1:])
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def toy_model(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.5, eos_token_id=0,
        bos_token_id=None, pad_token_id=None)).eval()


def save(folder, seed=0, chat_template=TEMPLATE):
    toy_model(seed).save_pretrained(folder)
    save_tokenizer(folder, chat_template)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def say(reasoning, answer):
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two toy checkpoints, a and b, and data of two tasks."""
    root = tmp_path_factory.mktemp("eval")
    save(root / "a", 0)
    save(root / "b", 1)
    write(root / "countdown" / "test.jsonl", [
        {"nums": [3, 5, 8], "target": 64, "difficulty": "easy"}, {
            "nums": [1, 2, 3, 4], "target": 24, "difficulty": "hard"},
        {"nums": [7, 7, 2], "target": 16, "difficulty": "easy"}, {"nums": [9, 4, 6], "target": 11, "difficulty": "hard"}])
    write(root / "gsm8k.jsonl", [
        {"question": "Tom has 3 bags of 4 apples. How many?", "answer": "He has 3*4=<<3*4=12>>12.\n#### 12"},
        {"question": "What is the area of a 2 by 5 rectangle?", "answer": "It is 10.\nSo 10.\n#### 10"}])
    return root


@pytest.fixture(autouse=True)
def handlers():
    """main() takes over SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def evaluate(folder, out, *flags, model=("a",), data=None):
    names = [str(folder / name) for name in model]
    ev.main(["--model", *names, "--data", data or f"countdown={folder}/countdown", "--max_new_tokens", "4",
             "--output", str(out), *map(str, flags)])


def speak(monkeypatch, folder, reply):
    """The sampler replaced by reply(prompt text, sample) -> completion: known figures through the whole script."""
    tokenizer = ev.load_tokenizer(str(folder / "a"), "reasoning")

    def generate(lm, prompts, noise, group_size, *rest):
        asked = [(tokenizer.decode(prompt), sample) for prompt in prompts for sample in range(group_size)]
        return [tokenizer.encode(reply(*question)) + [0] for question in asked], None
    monkeypatch.setattr(ev, "generate", generate)


# ---------------------------------------------------------------------------------------------- sampling
PROMPTS = [[5, 6, 7], [9] * 11, [40, 41, 42, 43, 44, 45], [100], [9, 8, 9, 8, 9, 8, 9]]


def test_greedy_sampling_equals_generate_token_for_token_with_left_padding_and_several_end_tokens():
    model, ends, width = toy_model(), list(range(40)), max(map(len, PROMPTS))
    ours, logps = ev.generate(model, PROMPTS, None, 1, 24, 1.0, ends)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    theirs = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24, eos_token_id=ends,
                            pad_token_id=259)
    for mine, other in zip(ours, theirs[:, width:].tolist(), strict=True):
        assert mine == other[:len(mine)] and set(other[len(mine):]) <= {259}
        assert mine[-1] in ends or len(mine) == 24
        assert not set(mine[:-1]) & set(ends)
    assert len({len(mine) for mine in ours}) > 1 and [*map(len, ours)] == [*map(len, logps)]


def texts(path):
    return {(r["row"], r["sample"]): r["completion"] for r in read(path)}


def test_sampled_completions_depend_neither_on_the_batch_nor_on_the_number_of_samples(folder, tmp_path):
    common = ["--temperature", 1.3, "--seed", 3, "--max_new_tokens", 30]
    evaluate(folder, tmp_path / "x.json", *common, "--samples", 4)
    together = texts(tmp_path / "x.samples.jsonl")
    for more in (["--samples", 4, "--batch_size", 1], ["--samples", 2, "--batch_size", 6]):
        evaluate(folder, tmp_path / "y.json", *common, *more)
        alone = texts(tmp_path / "y.samples.jsonl")
        assert len(alone) == 4 * more[1] and all(together[key] == text for key, text in alone.items())
    assert len(set(together.values())) > 12
    evaluate(folder, tmp_path / "y.json", *common, "--samples", 4, "--seed", 4)
    assert not any(together[key] == text for key, text in texts(tmp_path / "y.samples.jsonl").items())


def test_sampling_follows_the_softmax_at_the_temperature():
    model, n, temperature = toy_model(2), 20_000, 2.0
    noise = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    ids, _ = ev.generate(model, [[7, 8]], noise, n, 1, temperature, [0])
    want = (model(torch.tensor([[7, 8]])).logits[0, -1] / temperature).softmax(-1) * n
    got = torch.bincount(torch.tensor(ids)[:, 0], minlength=260)
    big = want > 5
    freedom = int(big.sum()) - 1
    assert freedom > 20
    assert ((got - want) ** 2 / want)[big].sum().item() < freedom + 5 * math.sqrt(2 * freedom)


def test_the_largest_noise_still_picks_an_id_of_the_vocabulary():
    noise = torch.full((len(PROMPTS), 3), 1 - 2 ** -24)
    for ids in ev.generate(toy_model(), PROMPTS, noise, 1, 3, 5.0, [0])[0]:
        assert all(0 <= token < 260 for token in ids)


def test_a_forbidden_token_never_follows_and_is_free_elsewhere():
    def pairs():
        completions, _ = ev.generate(lm, [[5]], noise, 200, 30, 3.0, [259])
        return [pair for ids in completions for pair in zip(ids, ids[1:])]

    noise, lm = torch.rand(200, 30, generator=torch.Generator().manual_seed(0)), toy_model(3)
    free = pairs()
    a, b = max(set(free), key=free.count)
    ev.forbid(lm, [a, b])
    after = pairs()
    assert (a, b) not in after
    assert any(y == b for _, y in after) and any(x == a for x, _ in after)
    ev.forbid(lm := toy_model(3), [])                           # without the flag nothing changes
    assert pairs() == free


# ---------------------------------------------------------------------------------------------- statistics
def test_pass_at_k_equals_the_share_of_all_subsets_that_hold_a_right_one():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert ev.pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets), abs=1e-12)


def test_wilson_interval_has_its_published_values_and_covers_the_true_share_95_times_in_100():
    assert ev.wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert ev.wilson(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert ev.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)     # Newcombe 1998, table I
    for p, n in ((0.05, 60), (0.3, 60), (0.5, 60), (0.9, 60)):
        covered = sum(math.comb(n, c) * p ** c * (1 - p) ** (n - c) for c in range(n + 1)
                      if ev.wilson(c / n, n)[0] <= p <= ev.wilson(c / n, n)[1])
        assert 0.92 < covered < 0.98


def test_majority_vote_ignores_missing_answers_and_splits_ties():
    for answers, correct, share in ((["1", "2", "2"], [1, 0, 0], 0), (["1", "2", " 2 "], [0, 1, 1], 1),
                                    ([None, None, "2"], [0, 0, 1], 1), (["1", "2"], [1, 0], 0.5),
                                    (["1", "2", "3", None], [1, 0, 0, 0], 1 / 3), ([None], [0], 0)):
        assert ev.maj_at_k(list(zip(answers, correct))) == pytest.approx(share)


# ---------------------------------------------------------------------------------------------- the whole script
FIELDS = {"model", "task", "n", "accuracy", "accuracy_low", "accuracy_high", "accuracy_flexible", "format", "pass_at_k",
          "maj_at_k", "completion_length", "truncated", "by"}


def test_figures_of_known_completions_come_out_as_known(folder, tmp_path, monkeypatch, capfd):
    def reply(prompt, sample):
        if "3, 5, 8" in prompt:
            return say("5+3=8 8*8=64 ok", "(5+3)*8")
        if "7, 7, 2" in prompt:
            return say("7+7=14 14+2=16 ok", "7+7+2") if sample else say("", "7*7*2")
        return "(9+6)-4" if "9, 4, 6" in prompt else say("1+2=3 3+3=6 6*4=24 ok", "1*2*3*4")
    speak(monkeypatch, folder, reply)
    evaluate(folder, tmp_path / "e.json", "--samples", 2, "--temperature", 1, "--batch_size", 3, "--weights",
             "correct=2")
    row, = json.loads((tmp_path / "e.json").read_text())
    assert FIELDS <= set(row)
    figures = [row[name] for name in ("n", "accuracy", "pass_at_k", "format", "truncated")]
    assert figures == [4, 5 / 8, 3 / 4, 5 / 8, 0]
    assert row["maj_at_k"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"] and row["reward"] == 2 * row["accuracy"]
    assert row["by"] == {"difficulty": {"easy": {"n": 2, "accuracy": 0.75}, "hard": {"n": 2, "accuracy": 0.5}},
                         "numbers": {"3": {"n": 3, "accuracy": 0.5}, "4": {"n": 1, "accuracy": 1.0}}}
    samples = read(tmp_path / "e.samples.jsonl")
    assert sorted((s["row"], s["sample"]) for s in samples) == [(i, k) for i in range(4) for k in range(2)]
    first, = [s for s in samples if (s["row"], s["sample"]) == (0, 0)]
    chat = rewards.messages("countdown", {"nums": [3, 5, 8], "target": 64})
    turns = "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in chat)
    assert first["prompt"] == turns + "<|assistant|>" and first["answer"] == "(5+3)*8"
    row = {"nums": [3, 5, 8], "target": 64}
    parts = rewards.score("countdown", first["completion"], row, weights={"correct": 2})
    assert all(first[name] == value for name, value in parts.items())
    rates = rewards.load_rows(f"countdown={tmp_path}/e.pass_rates.jsonl", "train")
    assert [r["pass_rate"] for r in rates] == [1.0, 1.0, 0.5, 0.0]
    assert [r["nums"] for r in rates] == [[3, 5, 8], [1, 2, 3, 4], [7, 7, 2], [9, 4, 6]]
    out = capfd.readouterr().out
    assert "62.5%" in out and "pass@2" in out and re.search(r"^difficulty easy +2 +75.0%$", out, re.M)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["e.json", "e.pass_rates.jsonl", "e.samples.jsonl"]


def test_breakdowns_add_up_to_the_whole_for_each_of_several_tasks(folder, tmp_path, monkeypatch):
    speak(monkeypatch, folder, lambda prompt, sample: say("x", "12" if "apples" in prompt else "(5+3)*8"))
    ev.main(["--model", str(folder / "a"), "--data", f"gsm8k={folder}/gsm8k.jsonl", f"countdown={folder}/countdown",
             "--output", str(tmp_path / "e.json")])
    rows = json.loads((tmp_path / "e.json").read_text())
    assert [row["task"] for row in rows] == ["gsm8k", "countdown"]
    assert rows[0]["by"] == {"steps": {"1": {"n": 1, "accuracy": 1.0}, "2": {"n": 1, "accuracy": 0.0}},
                             "geometry": {"no": {"n": 1, "accuracy": 1.0}, "yes": {"n": 1, "accuracy": 0.0}}}
    for row in rows:
        for cells in row["by"].values():
            assert sum(cell["n"] for cell in cells.values()) == row["n"]
            assert sum(cell["n"] * cell["accuracy"]
                       for cell in cells.values()) == pytest.approx(row["accuracy"] * row["n"])
    assert ev.kinds({"task": "math", "subject": "Algebra", "level": 3}) == {
                    "subject": "Algebra", "level": "3"}


def test_several_models_stand_side_by_side_and_are_compared_on_the_same_problems(
    folder, tmp_path, monkeypatch, capfd):
    loaded = []
    monkeypatch.setattr(ev, "load_lm", lambda name, *rest: loaded.append(name) or toy_model())
    speak(monkeypatch, folder, lambda prompt, sample: say("x", "(5+3)*8" if len(loaded) == 2 else "1*2*3*4"))
    evaluate(folder, tmp_path / "e.json", model=("a", "b"))
    first, second = json.loads((tmp_path / "e.json").read_text())
    assert (first["accuracy"], second["accuracy"]) == (0.25, 0.25)
    assert re.search(r"/b +countdown +4 +25.0%", capfd.readouterr().out, re.M)


def test_a_table_has_a_column_for_each_figure_and_a_line_for_each_model(capsys):
    row = {"model": "runs/tiny-sft", "task": "countdown", "n": 500, "samples": 4, "accuracy": 0.4,
           "accuracy_low": 0.3, "accuracy_high": 0.5, "accuracy_flexible": 0.4, "format": 1.0, "pass_at_k": 0.6,
           "maj_at_k": 0.5, "completion_length": 40.2, "truncated": 0.0,
           "by": {"numbers": {"3": {"n": 500, "accuracy": 0.4}}}}
    other = {**row, "model": "runs/tiny-grpo", "accuracy": 0.8}
    for table in ev.tables([row, other]):
        ev.print_table(table)
    names, first, second, *_, cell = capsys.readouterr().out.splitlines()[1:]
    assert all(text in names for text in ("strict", "95 % interval", "pass@4", "maj@4"))
    assert "40.0%" in first and "30.0% - 50.0%" in first and first.startswith("runs/tiny-sft ")
    assert "80.0%" in second and "numbers 3" in cell


def test_the_asked_for_style_is_prompted_and_scored(folder, tmp_path, monkeypatch):
    prompts = []
    speak(monkeypatch, folder, lambda prompt, s: prompts.append(
        prompt) or "<think>x</think><answer>(5+3)*8</answer>")
    evaluate(folder, tmp_path / "e.json", "--style", "think", "--limit", 1)
    row, = json.loads((tmp_path / "e.json").read_text())
    assert "<think>" in prompts[0] and row["n"] == row["accuracy"] == row["format"] == 1


def test_strict_and_flexible_differ_where_the_form_is_wrong(folder, tmp_path, monkeypatch):
    speak(monkeypatch, folder, lambda prompt, s: "The answer is 12." if "apples" in prompt else say("x", "10"))
    evaluate(folder, tmp_path / "e.json", data=f"gsm8k={folder}/gsm8k.jsonl")
    row, = json.loads((tmp_path / "e.json").read_text())
    assert (row["accuracy"], row["accuracy_flexible"], row["format"]) == (0.5, 1.0, 0.5)


def test_shots_stand_before_the_problem_as_turns_and_only_before_those_of_their_task(
    folder, tmp_path, monkeypatch):
    write(tmp_path / "gsm8k" / "train.jsonl", [
        {"question": "Shown?", "answer": "It is 3*4=<<3*4=12>>12.\n#### 12"}, {"question": "Never shown", "answer": "#### 1"}])
    prompts = []
    speak(monkeypatch, folder, lambda prompt, s: prompts.append(prompt) or say("x", "10"))
    ev.main(["--model", str(folder / "a"), "--data", f"gsm8k={folder}/gsm8k.jsonl", f"countdown={folder}/countdown:1",
             "--shots", f"gsm8k={tmp_path}/gsm8k:1", "--output", str(tmp_path / "e.json")])
    turns = [re.findall(r"<\|(system|user|assistant)\|>", prompt) for prompt in prompts]
    one, shown = ["system", "user", "assistant"], ["system", "user", "assistant", "user", "assistant"]
    assert sorted(turns) == [one, shown, shown]
    shot = f"<|assistant|>{say('It is 3*4=12.', '12')}<|end|>"
    assert sum(shot in prompt for prompt in prompts) == 2 and not any(
        "Never shown" in prompt for prompt in prompts)


def test_shots_that_a_template_would_cut_are_shown_in_one_user_turn_and_the_samples_hold_them(
    folder, tmp_path, monkeypatch):
    cut = "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}"    # Qwen3
    save(tmp_path / "cuts", chat_template=TEMPLATE.replace("{{ m['content'] }}", cut))
    solved = {"question": "Shown?", "answer": "It is 3*4=<<3*4=12>>12.\n#### 12"}
    write(tmp_path / "gsm8k" / "train.jsonl", [solved])
    speak(monkeypatch, folder, lambda prompt, s: "<think>x</think><answer>10</answer>")
    shot = "Shown?{}<think>It is 3*4=12.</think>\n<answer>12</answer>{}"
    for name, between, after in ((folder / "a", "<|end|><|assistant|>", "<|end|><|user|>"), (
            tmp_path / "cuts", "\n\n", "\n\n")):
        evaluate(folder, tmp_path / "e.json", "--data", f"gsm8k={folder}/gsm8k.jsonl",
                 f"countdown={folder}/countdown:1", "--shots", f"gsm8k={tmp_path}/gsm8k:1", "--style", "think",
                 model=(name,))
        samples = read(tmp_path / "e.samples.jsonl")
        for sample in samples:
            system, user = (turn["content"] for turn in rewards.messages(
                sample["task"], rewards.load_rows(f"gsm8k={folder}/gsm8k.jsonl", "test")[sample["row"]]
                if sample["task"] == "gsm8k" else {"nums": [3, 5, 8], "target": 64}, "think"))
            shown = shot.format(between, after) if sample["task"] == "gsm8k" else ""
            assert sample["prompt"] == f"<|system|>{system}<|end|><|user|>{shown}{user}<|end|><|assistant|>"
        assert {sample["task"] for sample in samples} == {"gsm8k", "countdown"}


def test_a_task_of_the_users_own_is_evaluated_and_shown_by_its_row_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.TASKS, "palindrome", {
        "columns": {"length": int}, "data": "data/palindrome", "gold": lambda row: row["length"],
        "grade": lambda said, row: len(said) == row["length"] and said == said[::-1], "needs": "a length",
        "ask": lambda row: f"A palindrome of {row['length']} letters.", "instruction": "You write palindromes.",
        "worked": lambda row: ("a, mirrored", "a" * row["length"])})
    write(tmp_path / "data.jsonl", [{"length": 3}, {"length": 4}])
    prompts = []
    speak(monkeypatch, folder, lambda prompt, s: prompts.append(prompt) or say("x", "aba"))
    source = f"palindrome={tmp_path}/data.jsonl"
    ev.main(["--model", str(folder / "a"), "--data", source, "--shots",
            f"{source}:1", "--output", str(tmp_path / "e.json")])
    assert json.loads((tmp_path / "e.json").read_text())[0]["accuracy"] == 0.5
    assert all(say("a, mirrored", "aaa") in prompt for prompt in prompts)


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
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(folder / "a")}))
    return str(tmp_path / "adapter"), model.eval()


def test_an_adapter_folder_is_its_base_with_the_adapter_merged(folder, adapter, tmp_path, monkeypatch):
    name, model = adapter
    loaded, ids = [], torch.arange(4, 20)[None]
    monkeypatch.setattr(ev, "generate", lambda lm, prompts, *rest: (
        loaded.append(lm) or [[0] for _ in prompts], None))
    evaluate(folder, tmp_path / "e.json", model=(name,))
    merged, = loaded
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, toy_model(0)(ids).logits, atol=1e-2)
    assert not any(hasattr(module, "lora_A") for module in merged.modules())


def test_an_adapter_folders_own_generation_config_comes_before_its_bases(
    folder, adapter, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ev, "generate", lambda lm, prompts, noise, size, limit, temperature, ends, *rest: (
        seen.append(set(ends)) or [[0] for _ in prompts], None))
    evaluate(folder, tmp_path / "e.json", model=(adapter[0],))
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": [50, 51], "top_k": 3}')
    evaluate(folder, tmp_path / "e.json", model=(adapter[0],))
    assert seen == [{0}, {0, 50, 51}]


def test_lm_evaluation_harness_loads_a_saved_checkpoint_and_scores_with_its_logits(folder):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=str(folder / "a"), device="cpu", batch_size=1, dtype="float32")
    (logp, greedy), = lm.loglikelihood([Instance("loglikelihood", {}, ("ab", "cd"), 0)], disable_tqdm=True)
    ids = torch.tensor([save_tokenizer(folder / "a").encode("abcd")])
    want = toy_model(0)(ids).logits[0].log_softmax(-1)
    assert logp == pytest.approx(sum(want[i, ids[0, i + 1]].item() for i in (1, 2)), abs=1e-3)
    assert lm.apply_chat_template([{"role": "user", "content": "hi"}]
                                  ) == "<|user|>hi<|end|><|assistant|>" and not greedy


# ---------------------------------------------------------------------------------------------- what can go wrong
def after(calls, how):
    """generate(), with how() in place of it when it has been called so often"""
    real, called = ev.generate, []

    def generate(*args, **kwargs):
        called.append(1)
        return how() if len(called) > calls else real(*args, **kwargs)
    return generate


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_completions_so_far_and_the_results_of_before(
    folder, tmp_path, monkeypatch, capsys, number):
    evaluate(folder, tmp_path / "e.json")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(ev, "generate", after(2, lambda: signal.raise_signal(number)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate(folder, tmp_path / "e.json", "--batch_size", 1)
    assert stop.value.code == 130
    so_far, = set(tmp_path.iterdir()) - set(before)
    assert f"interrupted; the completions so far are in {so_far}\n" in capsys.readouterr().err
    whole = {r["row"]: r for r in read(tmp_path / "e.samples.jsonl")}
    assert len(read(so_far)) == 2 and all(r == whole[r["row"]] for r in read(so_far))
    assert all(path.read_bytes() == content for path, content in before.items())


def raise_oom():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_names_the_flags_that_help_and_keeps_the_completions(
    folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ev, "generate", after(1, raise_oom))
    with pytest.raises(SystemExit) as stop:
        evaluate(folder, tmp_path / "e.json", "--batch_size", 2)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--batch_size" in err and "--max_new_tokens" in err
    assert len(read(tmp_path / "e.so_far.jsonl")) == 2


def test_a_full_disk_gets_one_line_and_loses_neither_old_results_nor_new_completions(
    folder, tmp_path, monkeypatch, capsys):
    evaluate(folder, tmp_path / "e.json")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()

    def write_text(path, text, **_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(ev.Path, "write_text", write_text)
    with pytest.raises(SystemExit) as stop:
        evaluate(folder, tmp_path / "e.json", "--samples", 2, "--temperature", 1)
    monkeypatch.undo()
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err
    assert len(read(tmp_path / "e.so_far.jsonl")) == 8
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_closed_pipe_and_odd_columns_lose_no_result(folder, tmp_path, monkeypatch, capfd):
    """`eval.py ... | true`, on a Parquet file with times and bytes."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"nums": [3, 5, 8], "target": 64, "made": datetime(2026, 1, 2), "image": b"\xff"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    speak(monkeypatch, folder, lambda prompt, sample: say("x", "(5+3)*8"))

    def into_a_closed_pipe():
        end, pipe = os.pipe()
        os.close(end)
        os.dup2(pipe, 1)
        sys.stdout = open(1, "w", closefd=False)

    def main(argv):
        ev.main(argv)
        sys.stdout.flush()                                      # as Python does when it ends

    argv = ["--model", f"{folder}/a", "--data", f"countdown={tmp_path}/rows.parquet", "--samples", "2",
            "--temperature", "1", "--output", f"{tmp_path}/e.json"]
    capfd.readouterr()
    assert toys.exit_code(toys.fork(main, argv, before=into_a_closed_pipe)) == 0
    assert "Traceback" not in capfd.readouterr().err
    row, = json.loads((tmp_path / "e.json").read_text())
    assert row["accuracy"] == 1 and len(read(tmp_path / "e.samples.jsonl")) == 2
    rate, = read(tmp_path / "e.pass_rates.jsonl")
    assert rate["pass_rate"] == 1 and rate["made"].startswith("2026-01-02") and isinstance(rate["image"], str)


def test_files_that_are_cut_off_or_lack_weights_get_one_line(folder, tmp_path, adapter, capsys):
    from safetensors.torch import load_file, save_file
    save(tmp_path / "damaged")
    file, adapted = tmp_path / "damaged" / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"
    weights, data = load_file(folder / "b" / "model.safetensors"), file.read_bytes()
    some = {name: w for name, w in weights.items() if "layers.1.mlp.up" not in name}
    config = tmp_path / "adapter" / "adapter_config.json"
    cases = [("damaged", lambda: file.write_bytes(data[:-100])), ("damaged", lambda: file.write_bytes(data[:5])),
             ("damaged", lambda: save_file(some, file, metadata={"format": "pt"})), ("damaged", file.unlink),
             ("adapter", lambda: adapted.write_bytes(adapted.read_bytes()[:-100])),
             ("adapter", lambda: config.write_text('{"base_model_name_or_path": "./gone"}')),
             ("adapter", lambda: config.write_text("{"))]
    for model, damage in cases:
        damage()
        with pytest.raises(SystemExit) as stop:
            evaluate(folder, tmp_path / "e.json", model=(tmp_path / model,))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py: ")]
        assert stop.value.code == 2 and len(said) == 1
        assert said[0].startswith(f"eval.py: --model {tmp_path / model}: ")
        assert "./gone" in said[0] or "gone" not in config.read_text()      # a moved base: both are named


def test_wrong_input_gets_one_line_and_exit_code_2_before_any_model_loads(
    folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ev, "load_lm", lambda *args: pytest.fail("a model was loaded"))
    good = {"--model": [folder / "a"],
    "--data": [f"countdown={folder}/countdown"],
     "--output": [tmp_path / "e.json"]}
    (tmp_path / "empty").mkdir()
    (tmp_path / "d.json").mkdir()
    save(tmp_path / "untemplated", chat_template=None)
    save(tmp_path / "refusing", chat_template="{{ raise_exception('no system turn here') }}")
    save(tmp_path / "broken", chat_template="{% for m in %}")
    (tmp_path / "broken.jsonl").write_text('{"nums": [1, 2], "target": 3}\n{"nums": [1,\n')
    (tmp_path / "surrogate.jsonl").write_text('{"question": "a \\ud800 b", "answer": "#### 1"}\n')
    (tmp_path / "file").write_text("")
    write(tmp_path / "unsolved.jsonl", [{"nums": [1, 2], "target": 3}])
    cases = [({"--samples": [0]}, "--samples: 0: must be"), ({"--samples": [4]}, "--temperature 1"), ({"--speed": [1]}, "--speed"),
             ({"--temperature": [-1]}, "--temperature: -1: must be"), ({"--temperature": ["nan"]},
              "--temperature: nan: must be"),
             ({"--temperature": ["inf"]}, "--temperature: inf: must be"), ({"--max_new_tokens": [0]},
              "--max_new_tokens: 0: must be"),
             ({"--batch_size": [0]}, "--batch_size: 0: must be"), ({"--limit": [-1]},
              "--limit: -1: must be"), ({"--seed": [-1]}, "--seed: -1: must be"),
             ({"--model": []}, "--model"), ({"--model": [tmp_path / "empty"]}, "empty"),
             ({"--model": [tmp_path / "untemplated"]}, "chat template"),
             ({"--model": [tmp_path / "refusing"]},
              "no system turn"), ({"--model": [tmp_path / "broken"]}, "chat template"),
             ({"--data": [f"countdown={tmp_path}/nowhere.jsonl"]},
              "nowhere.jsonl"), ({"--data": ["chess"]}, "chess"),
             ({"--data": [f"countdown={tmp_path}/broken.jsonl"]}, "broken.jsonl"),
             ({"--data": [f"gsm8k={tmp_path}/surrogate.jsonl"]}, "surrogate"),
             ({"--data": [f"gsm8k={folder}/countdown"]}, "question"), ({"--weights": ["speed=1"]}, "speed"),
             ({"--output": [tmp_path / "file" / "e.json"]}, "--output"), ({"--output": ["e.txt"]}, ".json"),
             ({"--output": [tmp_path / "d.json"]}, "d.json"), ({"--style": ["rhyme"]}, "rhyme"),
             ({"--shots": [f"countdown={tmp_path}/unsolved.jsonl:1"]},
              "worked answer"), ({"--forbid_after": ["ab", "c"]}, "[2, 1]"),
             ({"@gone.txt": [""]}, "gone.txt")]
    capsys.readouterr()
    for change, said in cases:
        argv = [str(a) for flag, values in {**good, **change}.items() if values for a in (flag, *values)]
        with pytest.raises(SystemExit) as stop:
            ev.main(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err, (argv, err)
        assert err.startswith("eval.py: ") and err.count("\n") == 1, (argv, err)
    assert not list(tmp_path.glob("e.*"))


def test_flags_can_stand_in_a_file_with_comments(folder, tmp_path):
    (tmp_path / \
     "flags.txt").write_text(f"# a comment\n--model '{folder}/a'   # where\n\n--samples 3 --temperature 0.5\n")
    args = ev.parse_args([f"@{tmp_path}/flags.txt"])
    assert (args.model, args.samples, args.temperature) == ([f"{folder}/a"], 3, 0.5)
