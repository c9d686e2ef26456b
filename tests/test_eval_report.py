"""report.py: what a person gets to see."""
import json
import re

import pytest
import toys

import report


def sample(model, row, completion, correct, format=1.0, reward=None, **more):
    reward = correct + 0.5 * format if reward is None else reward
    return {"model": model, "task": "countdown", "row": row, "sample": 0, "prompt": f"Numbers: [{row}]", "completion": completion,
            "correct": correct, "format": format, "reward": reward, "length": 0.0, "process": 0.0, "efficiency": 0.0, **more}


def table_row(model, accuracy, **more):
    return {"model": model, "task": "countdown", "n": 4, "accuracy": accuracy, "accuracy_low": 0.1, "accuracy_high": 0.9,
            "accuracy_flexible": accuracy, "format": 1.0, "pass_at_k": None, "maj_at_k": None, "completion_length": 12.3, "samples": 1,
            "truncated": 0.0, "by": {"numbers": {"3": {"n": 4, "accuracy": accuracy}}}, "behaviour": {"tries": 1.5}, **more}


def say(reasoning, answer):
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


@pytest.fixture
def results(tmp_path):
    """An evaluation of two models on four problems, and one run of each kind."""
    summary = [table_row("a<b", 0.25), table_row("after", 0.5, better=2, worse=1, p=1.0)]
    (tmp_path / "e.json").write_text(json.dumps(summary))
    toys.write(tmp_path / "e.samples.jsonl", [
        sample("a<b", 0, say("no idea <script>alert(1)</script>", "1"), 0.0), sample("after", 0, say("2+1 is it", "2+1"), 1.0),
        sample("a<b", 1, say("yes that", "5"), 1.0), sample("after", 1, say("lost it", "6"), 0.0),
        sample("a<b", 2, say("the same", "7"), 0.0), sample("after", 2, say("is said", "8"), 0.0),
        sample("a<b", 3, say("no tags", "9"), 0.0), sample("after", 3, "<answer>9</answer>", 1.0, format=0.0)])
    toys.write(tmp_path / "sft" / "metrics.jsonl", [{"step": i, "loss": 1 / i, "token_accuracy": i / 9} for i in range(1, 9)])
    toys.write(tmp_path / "grpo" / "metrics.jsonl", [{"step": i, "loss": 0.1, "reward": i / 9, "kl": 0.1} for i in range(1, 9)]
               + [{"step": 8, "eval_reward": 0.5}])
    toys.write(tmp_path / "grpo" / "samples.jsonl", [
        {k: v for k, v in sample("", 9, say("line one\nline one\nline one\nline one", "4"), 0.0, step=step).items() if k != "model"}
        for step in (1, 8)])
    return tmp_path


def make(results, *argv):
    report.main(["--report", str(results / "sft"), str(results / "grpo"), "--results", str(results / "e.json"),
                 "--output", str(results / "r.html"), *argv])
    return (results / "r.html").read_text()


def test_the_page_holds_all_its_parts_and_needs_nothing_else(results):
    page = make(results)
    parts = ["Held-out accuracy", "Training", "Suspects", "Before and after", "Best of after", "Worst of after"]
    at = [page.index(f"<h2>{part}") for part in parts]
    assert at == sorted(at)
    assert "25.0 %" in page and "2 : 1" in page and "data:image/svg+xml;base64," in page
    assert not re.search(r"""(src|href)=(?!["']?data:)|url\(|@import""", page)


def test_what_a_model_wrote_cannot_become_part_of_the_page(results):
    page = make(results)
    assert "<script" not in page and "&lt;script&gt;" in page and "a&lt;b" in page


def test_suspects_are_the_paid_and_odd_each_text_once(results):
    records = list(report.read_lines(results / "e.samples.jsonl"))
    found = report.suspects(records + records, n=20)
    assert [r["completion"] for r, _ in found].count("<answer>9</answer>") == 1
    odd = {r["completion"]: why for r, why in found}
    assert odd["<answer>9</answer>"] == ["right, in an odd form", "right, without working"]
    assert say("2+1 is it", "2+1") not in odd
    assert odd[say("lost it", "6")] == ["paid, though wrong"]
    assert report.signs(sample("m", 0, say("a line\na line\na line", "1"), 1.0)) == ["says a line again and again"]
    assert report.signs(sample("m", 0, say("ha " * 30, "1"), 1.0)) == ["one word is most of it"]
    assert report.signs(sample("m", 0, say("that is", "1") + "<answer>2</answer>", 0.0, ended=False)) == [
        "paid, though wrong", "several answers", "cut off"]
    assert report.suspects([sample("m", 0, "<answer>9</answer>", 0.0, reward=0.0)]) == []


def test_pairs_are_the_same_problem_before_and_after_most_changed_first(results):
    found = report.pairs(list(report.read_lines(results / "e.samples.jsonl")))
    assert [(title, a["row"]) for title, a, b in found] == [("learned", 0), ("learned", 3), ("unlearned", 1)]
    for _, a, b in found:
        assert (a["model"], b["model"], a["row"]) == ("a<b", "after", b["row"])


def test_a_page_of_runs_alone_shows_their_first_and_last_samples(results):
    (results / "e.json").unlink()
    (results / "e.samples.jsonl").unlink()
    page = report.page([str(results / "sft"), str(results / "grpo")], str(results / "none.json"))
    assert "First and last logged step" in page and "step 1" in page and "step 8" in page and "Held-out" not in page


def test_the_table_is_printed_in_columns(results, capsys):
    report.main(["--table", str(results / "e.json")])
    out = capsys.readouterr().out
    assert re.search(r"^after +countdown +4 +50\.0 % +10\.0 - 90\.0 +50\.0 % +100\.0 % +12 +0\.0 % +2 : 1 +1$", out, re.MULTILINE)
    assert re.search(r"^ +3 +4 +25\.0 % +50\.0 %$", out, re.MULTILINE) and re.search(r"^ +tries +1\.50 +1\.50$", out, re.MULTILINE)


def test_curves_show_what_the_runs_have_and_not_the_policy_loss(results):
    figure = report.draw([str(results / "sft"), str(results / "grpo")])
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.axison}
    assert list(panels) == ["loss", "token accuracy", "reward", "KL to the reference"]
    assert len(panels["loss"].lines) == 2 and len(panels["reward"].lines) == 3     # every step, running mean, held out
    x, y = panels["reward"].lines[0].get_data()
    assert list(x) == list(range(1, 9)) and y[-1] == pytest.approx(8 / 9)


def test_wrong_input_gets_one_line_and_exit_code_2(results, capsys):
    (results / "empty").mkdir()
    toys.write(results / "none" / "metrics.jsonl", [])
    (results / "broken").mkdir()
    (results / "broken" / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    toys.write(results / "foreign" / "metrics.jsonl", [{"reward": 0.5}])
    toys.write(results / "samples" / "metrics.jsonl", [{"step": 1, "reward": 0.5}])
    toys.write(results / "samples" / "samples.jsonl", [{"step": 1, "text": "a"}])
    (results / "bytes").mkdir()
    (results / "bytes" / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    (results / "list.json").write_text("[[1]]")
    out = str(results / "x.png")
    for argv, said in [(["--curves", str(results / "empty"), "--output", out], "metrics.jsonl"),
                       (["--curves", str(results / "none"), "--output", out], "no metrics"),
                       (["--curves", str(results / "broken"), "--output", out], "line 2"),
                       (["--curves", str(results / "foreign"), "--output", out], "line 1: not an object with step"),
                       (["--curves", str(results / "bytes"), "--output", out], "line 1: not JSON"),
                       (["--report", str(results / "samples"), "--output", out], "samples.jsonl, line 1"),
                       (["--table", str(results / "list.json")], "list.json"), (["--no_such_flag"], "--no_such_flag"),
                       (["--curves", str(results / "sft"), "--output", str(results / "x.docx")], "--output"),
                       (["--curves", str(results / "sft"), "--output", str(results / "e.json" / "x.png")], "--output"),
                       (["--report", str(results / "sft"), "--results", "nowhere.json"], "nowhere.json"),
                       (["--table", "nowhere.json"], "nowhere.json"), (["--table", str(results / "broken" / "metrics.jsonl")], "broken"),
                       (["--report", str(results / "sft"), "--results", str(results / "broken" / "metrics.jsonl")], "broken"),
                       ([], "--table")]:
        with pytest.raises(SystemExit) as e:
            report.main(argv)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, (argv, err)


def panels(runs):
    return {axis.get_title(loc="left"): axis for axis in report.draw(list(map(str, runs))).axes if axis.axison}


def test_a_step_without_a_figure_does_not_blank_the_others(tmp_path):
    toys.write(tmp_path / "run" / "metrics.jsonl", [{"step": i, "reward": [float("nan"), None, 0.5][i % 3], "kl": float("inf")}
                                                    for i in range(300)])
    shown = panels([tmp_path / "run"])
    assert list(shown) == ["reward"]
    for line in shown["reward"].lines:
        assert set(line.get_ydata()) == {0.5} and len(line.get_ydata()) == 100


def test_a_run_that_is_being_written_and_one_that_earns_nothing_can_be_looked_at(tmp_path):
    toys.write(tmp_path / "run" / "metrics.jsonl", [{"step": i, "reward": 0.0, "process": 0.0} for i in (1, 2)])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "rew')
    shown = panels([tmp_path / "run"])
    assert list(shown) == ["reward"] and list(shown["reward"].lines[0].get_xdata()) == [1, 2]


def test_a_running_mean_is_that_of_two_percent_on_either_side():
    values = [i * i % 17 for i in range(150)]
    smooth = report.smooth(values)
    assert smooth[0] == pytest.approx(sum(values[:4]) / 4) and smooth[70] == pytest.approx(sum(values[67:74]) / 7)
    assert report.smooth([3.0]) == [3.0] and report.smooth([]) == []


def test_a_dozen_runs_look_different_and_one_step_shows(tmp_path):
    for i in range(12):
        toys.write(tmp_path / str(i) / "metrics.jsonl", [{"step": 1, "reward": i / 9}])
    lines = [line for line in panels([tmp_path / str(i) for i in range(12)])["reward"].lines if line.get_marker()]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12
    assert all(line.get_marker() not in ("", "None") for line in lines[1::2])
