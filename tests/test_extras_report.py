"""extras/report.py: what a person gets to see of runs and of an evaluation."""
import json
import re
import time

import pytest

from extras import report


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def say(reasoning, answer):
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


def sample(model, row, completion, correct, format=1.0, **more):
    return {"model": model, "task": "countdown", "row": row, "sample": 0, "prompt": f"Numbers: [1, {row}]\nTarget: 4",
            "completion": completion, "correct": correct, "format": format, "reward": correct + 0.5 * format, **more}


def result(model, accuracy, **more):
    return {"model": model, "task": "countdown", "n": 4, "samples": 1, "accuracy": accuracy, "accuracy_low": 0.1,
            "accuracy_high": 0.9, "accuracy_flexible": accuracy, "format": 1.0, "pass_at_k": accuracy, "maj_at_k": accuracy,
            "completion_length": 12.3, "truncated": 0.0, "by": {"numbers": {"3": {"n": 4, "accuracy": accuracy}}}, **more}


@pytest.fixture
def folder(tmp_path):
    """An evaluation of two models on four problems, and one run of each kind."""
    (tmp_path / "e.json").write_text(json.dumps([result("a<b", 0.25), result("after", 0.5, better=2, worse=1, p=1.0)]))
    write(tmp_path / "e.samples.jsonl", [
        sample("a<b", 0, say("no idea <script>alert(1)</script>", "1"), 0.0), sample("after", 0, say("2+1 is it", "2+1"), 1.0),
        sample("a<b", 1, say("yes that", "5"), 1.0), sample("after", 1, say("lost it", "6"), 0.0),
        sample("a<b", 2, say("the same", "7"), 0.0), sample("after", 2, say("is said", "8"), 0.0),
        sample("a<b", 3, say("no tags", "9"), 0.0), sample("after", 3, "<answer>9</answer>", 1.0, format=0.0)])
    write(tmp_path / "sft" / "metrics.jsonl", [{"step": i, "loss": 1 / i, "token_accuracy": i / 9, "lr": i} for i in range(1, 9)])
    write(tmp_path / "grpo" / "metrics.jsonl",
          [{"step": i, "loss": 0.1 * i, "reward": i / 9, "kl": 0.1 * i, "my_part": i % 3, "length": 0.0} for i in range(1, 9)]
          + [{"step": 8, "eval_reward": 0.5}])
    write(tmp_path / "grpo" / "samples.jsonl", [
        {k: v for k, v in sample("", 9, say("line one\n" * 4, "4"), 0.0, step=step, my_part=0.25).items() if k != "model"}
        for step in (1, 8)])
    return tmp_path


def test_the_page_holds_its_parts_in_order_and_needs_no_other_file(folder, capsys):
    out = folder / "deep" / "r.html"
    report.main([str(folder / "sft"), str(folder / "grpo"), "--results", str(folder / "e.json"), "--output", str(out)])
    page = out.read_text()
    at = [page.index(f"<h2>{part}") for part in ("Held-out accuracy", "Training", "Suspects", "Before and after")]
    assert at == sorted(at) and capsys.readouterr().out == f"{out}\n"
    assert "25.0%" in page and "2 : 1" in page and "in the reasoning" in page and "data:image/svg+xml;base64," in page
    assert not re.search(r"""(src|href)=(?!["']?data:)|url\(|@import""", page)


def test_what_a_model_wrote_cannot_become_part_of_the_page(folder):
    page = report.page([str(folder / "grpo")], str(folder / "e.json"))
    assert "<script" not in page and "&lt;script&gt;" in page and "a&lt;b" in page


def test_a_page_of_runs_alone_shows_the_first_and_last_samples_with_parts_that_nothing_lists(folder):
    page = report.page([str(folder / "sft"), str(folder / "grpo")])
    assert "First and last logged step" in page and "step 1" in page and "step 8" in page and "Held-out" not in page
    assert "my_part 0.25" in page


def test_suspects_are_rewarded_and_odd_completions_each_text_once(folder):
    records = list(report.read_lines(folder / "e.samples.jsonl"))
    found = report.suspects(records + records, n=20)
    assert [r["completion"] for r, _ in found].count("<answer>9</answer>") == 1
    odd = {r["completion"]: why for r, why in found}
    assert odd["<answer>9</answer>"] == ["right, in an odd form", "right, without working"]
    assert say("2+1 is it", "2+1") not in odd and odd[say("lost it", "6")] == ["rewarded, though wrong"]
    assert report.signs(sample("m", 0, say("a line\n" * 3, "1"), 1.0)) == ["says a line again and again"]
    assert report.signs(sample("m", 0, say("ha " * 30, "1"), 1.0)) == ["one word is most of it"]
    assert report.signs(sample("m", 0, say("that is", "1") + "<answer>2</answer>", 0.0, ended=False)) == [
        "rewarded, though wrong", "several answers", "cut off"]
    assert report.suspects([sample("m", 0, "<answer>9</answer>", 0.0, format=0.0)]) == []


def test_pairs_are_the_same_problem_before_and_after_the_most_changed_first(folder):
    found = report.pairs(list(report.read_lines(folder / "e.samples.jsonl")))
    assert [(heading, a["row"]) for heading, a, _ in found] == [("learned", 0), ("learned", 3), ("unlearned", 1)]
    assert all((a["model"], b["model"], a["row"]) == ("a<b", "after", b["row"]) for _, a, b in found)
    assert report.pairs([]) == []


# ---------------------------------------------------------------------------------------------- behaviours
def counts(reasoning, nums, target, closed=True):
    return report.tries(reasoning, f"Numbers: {nums}\nTarget: {target}", closed)


def test_tries_hits_repeats_and_giving_up_are_counted():
    assert counts("5+3=8 8*2=16 no\n5*2=10 10+3=13 ok", [2, 3, 5], 13) == {
        "tries": 2, "hits": 1, "repeated": 0, "stops after a miss": False}
    assert counts("5+3=8 8*2=16 no\n5+3=8 8*2=16 no", [2, 3, 5], 13) == {
        "tries": 2, "hits": 0, "repeated": 1, "stops after a miss": True}


def test_a_try_is_a_hit_only_if_it_truly_solves_the_problem():
    assert counts("5*2=10 10+3=14 ok", [2, 3, 5], 14)["hits"] == 0             # false arithmetic
    assert counts("5*2=10 10+4=14 ok", [2, 3, 5], 14)["hits"] == 0             # a number that is not given
    assert counts("5+3=8", [2, 3, 5], 8)["tries"] == 0                         # not all numbers
    assert counts("Let me try (5 * 2) + 3 = 13.", [2, 3, 5], 13)["hits"] == 1  # one expression, in prose
    assert counts("First 2 * 2 = 4, then 4 + 4 = 8", [2, 2, 4], 8)["hits"] == 1


@pytest.mark.parametrize("names, text", [
    ("checks", "3*8=24. Let me check: 24 is right."), ("checks", "So 12. I verified it."), ("checks", "5+3=8 ok\n"),
    ("goes back", "Wait, that uses 3 twice."), ("goes back", "That doesn't work, try another."),
    ("checks, goes back", "5+3=8 no\n5+2=7 ok\n"), ("sets sub-goals", "First, find the price of one."),
    ("sets sub-goals", "Step 1: the area."), ("sets sub-goals", "We need to find the radius."),
    ("", "3 boxes of 4 make 12 apples. Noah has 2 more."), ("", "He waited at the station, and no one came to look.")])
def test_behaviours_go_by_the_phrases_in_the_reasoning_alone(names, text):
    shown = report.behaviours({"task": "gsm8k", "prompt": "?", "completion": say(text, "Wait, step 1: let me check")})
    assert ", ".join(name for name, yes in shown.items() if yes) == names


def test_nothing_a_model_writes_takes_long_to_read():
    start = time.perf_counter()
    for text in ("1+" * 50_000 + "=", "(" * 100_000, "1=1 " * 25_000, "wait " * 20_000, "1+2=3\n" * 15_000, "\n" * 100_000):
        report.behaviours({"task": "countdown", "prompt": "Numbers: [1, 2, 3]\nTarget: 6", "completion": text})
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------------------------------------- curves
def panels(*runs):
    return {axis.get_title(loc="left"): axis for axis in report.draw(list(map(str, runs))).axes if axis.axison}


def test_curves_show_whatever_is_numeric_and_changes_but_not_the_policy_loss(folder):
    shown = panels(folder / "sft", folder / "grpo")
    assert list(shown) == ["loss", "token accuracy", "reward", "KL", "my part"]
    assert [len(line.get_xdata()) for line in shown["reward"].lines if len(line.get_xdata())] == [8, 8, 1]
    x, y = next(line.get_data() for line in shown["reward"].lines if len(line.get_xdata()))
    assert list(x) == list(range(1, 9)) and y[-1] == pytest.approx(8 / 9)
    assert {len(line.get_xdata()) for line in shown["loss"].lines} <= {0, 8}


def test_a_step_without_a_figure_does_not_blank_the_others(tmp_path):
    values = [float("nan"), None, 0.5]
    write(tmp_path / "run" / "metrics.jsonl", [{"step": i, "reward": values[i % 3], "kl": float("inf")} for i in range(300)])
    shown = panels(tmp_path / "run")
    assert list(shown) == ["reward"]
    assert [set(line.get_ydata()) for line in shown["reward"].lines[:2]] == [{0.5}] * 2


def test_a_run_that_is_being_written_and_earns_nothing_can_be_looked_at(tmp_path):
    write(tmp_path / "run" / "metrics.jsonl", [{"step": i, "reward": 0.0, "process": 0.0} for i in (1, 2)])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    shown = panels(tmp_path / "run")
    assert list(shown) == ["reward"] and list(shown["reward"].lines[0].get_xdata()) == [1, 2]


def test_a_running_mean_is_that_of_two_percent_on_either_side():
    values = [i * i % 17 for i in range(150)]
    smooth = report.smooth(values)
    assert smooth[0] == pytest.approx(sum(values[:4]) / 4) and smooth[70] == pytest.approx(sum(values[67:74]) / 7)
    assert report.smooth([3.0]) == [3.0] and report.smooth([]) == []


def test_a_dozen_runs_look_different_and_one_step_shows(tmp_path):
    for i in range(12):
        write(tmp_path / str(i) / "metrics.jsonl", [{"step": 1, "reward": i / 9}])
    lines = [line for line in panels(*(tmp_path / str(i) for i in range(12)))["reward"].lines if line.get_marker() == "x"]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_wrong_input_gets_one_line_and_exit_code_2(folder, capsys):
    (folder / "empty").mkdir()
    write(folder / "none" / "metrics.jsonl", [])
    write(folder / "broken" / "metrics.jsonl", [])
    (folder / "broken" / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    write(folder / "foreign" / "metrics.jsonl", [{"reward": 0.5}])
    write(folder / "samples" / "metrics.jsonl", [{"step": 1, "reward": 0.5}])
    write(folder / "samples" / "samples.jsonl", [{"step": 1, "text": "a"}])
    (folder / "list.json").write_text("[[1]]")
    sft, png, page = folder / "sft", folder / "x.png", folder / "x.html"
    for argv, said in [([folder / "empty", "--output", png], "metrics.jsonl"), ([folder / "gone"], "gone"),
                       ([folder / "none", "--output", png], "no metrics"), ([], "RUN"), ([sft, "--no_such_flag"], "--no_such_flag"),
                       ([folder / "broken", "--output", png], "line 2"),
                       ([folder / "foreign", "--output", png], "line 1: not an object with step"),
                       ([folder / "samples", "--output", page], "samples.jsonl, line 1"),
                       ([sft, "--output", folder / "x.docx"], "--output"), ([sft, "--output", folder / "e.json" / "x.png"], "--output"),
                       ([sft, "--results", "nowhere.json", "--output", page], "nowhere.json"),
                       ([sft, "--results", folder / "list.json", "--output", page], "list.json"),
                       ([sft, "--results", folder / "broken" / "metrics.jsonl", "--output", page], "broken"),
                       ([sft, "--results", folder / "e.json", "--output", png], "--results")]:
        with pytest.raises(SystemExit) as stop:
            report.main(list(map(str, argv)))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and err.count("\n") == 1, (argv, err)
    assert not page.exists() and not png.exists()
