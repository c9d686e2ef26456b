"""lm-evaluation-harness beside our own reading. The golden column holds what lm-eval 0.4.13 makes of each output on gsm8k; it
is checked against lm-eval itself where that is installed (pip install lm-eval)."""
import json
import sys
import types

import pytest
import toys

import eval as ev
import rewards

# output, gold, lm-eval's strict-match (the number after ####), lm-eval's flexible-extract (the last number)
GOLDEN = [
    ("He has 3*4=12 apples.\n#### 12", "12", 1, 1),
    ("So 3*4=12.\n#### 13", "12", 0, 0),
    ("#### 1,200", "1200", 1, 1),
    ("#### -5", "-5", 1, 1),
    ("That makes $18.", "18", 0, 1),
    ("That makes $1,234 in all", "1234", 0, 1),
    ("First 7 and then 12", "12", 0, 1),
    ("First 12 and then 7", "12", 0, 0),
    ("It costs 2.50 dollars", "2.50", 0, 1),
    ("I do not know", "12", 0, 0),
    ("", "12", 0, 0),
    ("#### 12\nThis took 3 steps", "12", 1, 0),
    ("3 and 4 make 12\n#### none", "12", 0, 1),
]


def row_of(gold):
    return {"task": "gsm8k", "question": f"What is {gold}?", "answer": f"It is so.\n#### {gold}"}


def test_flexible_reading_agrees_with_lm_eval_where_they_mean_the_same_rule():
    """Ours takes what follows #### where there is one, as strict-match does, and else the last number, as flexible-extract."""
    for output, gold, strict, flexible in GOLDEN:
        ours = rewards.correct("gsm8k", output, row_of(gold), strict=False)
        assert ours == (strict if "####" in output else flexible), output


def test_an_answer_in_our_form_is_missed_by_lm_evals_strict_match_and_found_by_ours():
    output = "<reasoning>3*4=12</reasoning>\n<answer>12</answer>"
    assert rewards.correct("gsm8k", output, row_of("12")) == 1
    assert "####" not in output


def test_without_lm_eval_the_flag_gets_one_line(tmp_path, monkeypatch, capsys):
    toys.save(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setattr(ev, "load_lm", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as e:
        ev.main(["--model", str(tmp_path / "model"), "--data", f"gsm8k={tmp_path}/gsm8k", "--max_new_tokens", "4",
                 "--harness", "gsm8k:8", "--output", str(tmp_path / "e.json")])
    assert e.value.code == 2 and "pip install lm-eval" in capsys.readouterr().err


def fake_harness(monkeypatch, index, evaluate=None):
    """lm-evaluation-harness, in so far as eval.py calls it"""
    names = ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    whole, tasks, _, huggingface = (types.ModuleType(name) for name in names)
    tasks.TaskManager = lambda: types.SimpleNamespace(task_index=index)
    huggingface.HFLM, whole.simple_evaluate = lambda **settings: settings, evaluate
    for name, module in zip(names, (whole, tasks, types.ModuleType("models"), huggingface)):
        monkeypatch.setitem(sys.modules, name, module)


def test_a_harness_task_is_lm_evals_own_with_our_shots_and_rows(tmp_path, monkeypatch, capsys):
    fake_harness(monkeypatch, {"gsm8k": types.SimpleNamespace(yaml_path="/there/gsm8k.yaml")})
    toys.write(tmp_path / "data" / "test.jsonl", [])
    (tmp_path / "tasks").mkdir()
    ev.harness_tasks(["gsm8k:8", f"gsm8k={tmp_path}/data:0"], tmp_path / "tasks")
    first, second = (json.loads((tmp_path / "tasks" / f"{i}.yaml").read_text()) for i in range(2))
    assert first == {"include": "/there/gsm8k.yaml", "task": "gsm8k", "num_fewshot": 8}
    assert second["num_fewshot"] == 0 and second["dataset_kwargs"]["data_files"] == {"test": f"{tmp_path}/data/test.jsonl"}
    for spec, said in (("chess:8", "chess"), ("gsm8k", "SHOTS"), ("gsm8k:x", "SHOTS"), (f"gsm8k={tmp_path}:8", "test.jsonl")):
        with pytest.raises(SystemExit):
            ev.harness_tasks([spec], tmp_path / "tasks")
        assert said in capsys.readouterr().err


def test_its_rows_stand_below_ours_and_where_it_fails_ours_stay(tmp_path, monkeypatch, capfd):
    asked = []

    def evaluate(lm, tasks, limit, **_):
        shots = [json.load(open(task))["num_fewshot"] for task in tasks]
        asked.append((lm["pretrained"].config.model_type, lm["tokenizer"].eos_token, shots))
        if len(asked) == 2:
            raise ConnectionError("the hub is\nnot there")
        return {"results": {"gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1,
                                      "exact_match,flexible-extract": 0.5}},
                "n-shot": {"gsm8k": 8}, "n-samples": {"gsm8k": {"original": 9, "effective": 4}}}
    fake_harness(monkeypatch, {"gsm8k": types.SimpleNamespace(yaml_path="/there/gsm8k.yaml")}, evaluate)
    toys.save(tmp_path)
    argv = ["--model", str(tmp_path / "model"), "--data", f"gsm8k={tmp_path}/gsm8k", "--max_new_tokens", "4", "--harness", "gsm8k:8",
            "--output", str(tmp_path / "e.json")]
    ev.main(argv)
    ours, row = json.loads((tmp_path / "e.json").read_text())
    assert asked == [("llama", "<|end|>", [8])]
    assert (row["task"], row["n"], row["accuracy"], row["accuracy_flexible"]) == ("lm-eval gsm8k:8", 4, 0.25, 0.5)
    assert (row["accuracy_low"], row["accuracy_high"]) == ev.wilson(0.25, 4)
    with pytest.raises(SystemExit) as e:
        ev.main(argv)
    assert e.value.code == 2 and json.loads((tmp_path / "e.json").read_text()) == [ours]
    assert "failed on" in capfd.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("*so_far*"))


def test_lm_eval_itself_scores_the_golden_outputs_so_and_stands_in_the_same_table(tmp_path, monkeypatch, capfd):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    import lm_eval.models.huggingface as huggingface

    class Stub(LM):
        """Answers each question with its golden output."""
        def __init__(self, pretrained, tokenizer, batch_size):
            super().__init__()
            self.tokenizer = tokenizer

        def generate_until(self, requests):
            asked.extend(r.args for r in requests)
            return [outputs[r.doc["question"]] for r in requests]

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template=False):
            return ""
        tokenizer_name, loglikelihood, loglikelihood_rolling = "stub", None, None

    def evaluate(*args, **kwargs):
        out = real(*args, **kwargs)
        results.append(out)
        return out
    asked, results, real = [], [], lm_eval.simple_evaluate
    rows = [row_of(gold) | {"question": f"Question {i}"} for i, (_, gold, *_) in enumerate(GOLDEN)]
    outputs = {row["question"]: output for row, (output, *_) in zip(rows, GOLDEN)}
    monkeypatch.setattr(huggingface, "HFLM", Stub)
    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    toys.save(tmp_path)
    for split in ("train", "test"):
        toys.write(tmp_path / "golden" / f"{split}.jsonl", rows)
    ev.main(["--model", str(tmp_path / "model"), "--data", f"gsm8k={tmp_path}/gsm8k:1", "--max_new_tokens", "4",
             "--harness", f"gsm8k={tmp_path}/golden:1", "--output", str(tmp_path / "e.json")])
    by_filter = {name: {s["doc"]["question"]: s["exact_match"] for s in results[0]["samples"]["gsm8k"] if s["filter"] == name}
                 for name in ("strict-match", "flexible-extract")}
    for i, (output, gold, strict, flexible) in enumerate(GOLDEN):
        assert by_filter["strict-match"][f"Question {i}"] == strict, output
        assert by_filter["flexible-extract"][f"Question {i}"] == flexible, output
    row = json.loads((tmp_path / "e.json").read_text())[-1]
    assert row["task"] == "lm-eval gsm8k:1" and row["n"] == len(GOLDEN)
    assert row["accuracy"] == pytest.approx(sum(strict for *_, strict, _ in GOLDEN) / len(GOLDEN))
    assert row["accuracy_flexible"] == pytest.approx(sum(flexible for *_, flexible in GOLDEN) / len(GOLDEN))
    assert "lm-eval gsm8k:1" in capfd.readouterr().out
    for prompt, settings in asked:                      # one shot as a turn of its own, our limit of tokens
        assert prompt.count("<|user|>") == 2 and prompt.endswith("Answer:<|end|><|assistant|>")
        assert settings["max_gen_toks"] == 4
