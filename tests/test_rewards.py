"""What holds for every text, every weight and every source, beyond single cases."""

import json
import math
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from textwrap import dedent

import pytest

import arithmetic
import mathematics
import rewards

ROWS = {
    "countdown": {"nums": [2, 3, 4], "target": 20},
    "gsm8k": {"question": "How many pens?", "answer": "Steps.\n#### 18"},
    "math": {"problem": "What is $9+9$?", "answer": "18"},
    "arc": {
        "question": "Which gas?",
        "choices": {"text": ["oxygen", "carbon dioxide"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "code": {"text": "Double it.", "test_list": ["assert f(2) == 4"], "test_setup_code": ""},
}
RIGHT = {"countdown": "(2+3)*4", "gsm8k": "18", "math": "18", "arc": "B", "code": "def f(x): return 2 * x"}
WRONG = {"countdown": "2+3+4", "gsm8k": "20", "math": "20", "arc": "A", "code": "def f(x): return 5"}
FAST = ("countdown", "gsm8k", "arc")


def completion(answer, reasoning="So.", style="reasoning"):
    return f"<{style}>{reasoning}</{style}>\n<answer>{answer}</answer>"


def printed_by(script):
    """What a fresh interpreter prints that runs this."""
    argv = [sys.executable, "-c", script]
    return subprocess.run(argv, cwd=Path(rewards.__file__).parent, capture_output=True, text=True, check=True).stdout


def seconds(action):
    """Processor time of the fastest of up to four runs: what others do to this machine meanwhile is no fault of the grader's."""
    times = []
    for _ in range(4):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
        if times[-1] < 0.02:
            break
    return min(times)


# ---------------------------------------------------------------------------------------------- any text

try:
    from hypothesis import HealthCheck, given, settings, strategies as st
except ImportError:

    @pytest.mark.skip(reason="needs `pip install hypothesis`")
    def test_properties_over_random_text():
        pass
else:
    CALM = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
    PIECES = [
        "<reasoning>",
        "</reasoning>",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "\\boxed{",
        "}",
        "{",
        "####",
        "answer is ",
        "\\frac",
        "\\text{",
        "\\times",
        "\n",
        " ",
        "=",
        "+",
        "-",
        "*",
        "/",
        "(",
        ")",
        "1",
        "2",
        "3",
        "4",
        "20",
        "18",
        ",",
        ".",
        "$",
        "%",
        "A",
        "B",
        "x",
        "\u2212",
        "\u00d7",
        "\u0663",
        "\ud800",
        "\0",
        "\u200b",
        "**",
        "```",
        "1,000",
        "2+3=5",
        "\\",
        "^",
        "_",
        "[",
        "]",
    ]
    TEXTS = st.one_of(
        st.text(),
        st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
        st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 400)), max_size=6).map(
            lambda parts: "".join(piece * n for piece, n in parts)
        ),
    )
    ANSWERS = st.one_of(TEXTS, st.lists(st.sampled_from(PIECES[20:]), max_size=12).map("".join)).map(completion)

    @CALM
    @given(
        text=st.one_of(TEXTS, ANSWERS),
        task=st.sampled_from(FAST),
        style=st.sampled_from(rewards.STYLES),
        strict=st.booleans(),
    )
    def test_any_text_is_scored_within_bounds_and_50_ms(text, task, style, strict):
        row = json.loads(json.dumps(ROWS[task]))
        assert seconds(lambda: rewards.score(task, text, row, style, strict=strict)) < 0.05
        parts = rewards.score(task, text, row, style, strict=strict)
        assert parts["correct"] in (0.0, 1.0) and parts["format"] in (0.0, 1.0) and parts["length"] == 0
        assert 0 <= parts["process"] <= 1 and 0 <= parts["efficiency"] <= 1 and math.isfinite(parts["reward"])
        assert row == ROWS[task]
        assert rewards.score(task, text, row, style, strict=strict) == parts

    @CALM
    @given(text=st.one_of(TEXTS, ANSWERS), style=st.sampled_from(rewards.STYLES))
    def test_strict_and_flexible_agree_where_there_is_an_answer_block(text, style):
        said = rewards.answer(text, style)
        assert said is None or rewards.answer(text, style, strict=False) == said

    @CALM
    @given(text=st.lists(st.sampled_from(PIECES[19:]), max_size=30).map("".join))
    def test_any_mathematics_is_compared_without_an_error(text):
        assert mathematics.equal("18", text) in (True, False)

    @CALM
    @given(
        st.recursive(
            st.integers(0, 99).map(str),
            lambda inner: st.one_of(
                st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
                inner.map("(-{})".format),
            ),
            max_leaves=8,
        )
    )
    def test_value_and_shortest_form_of_an_expression_are_exact(text):
        found = arithmetic.evaluate(text)
        try:
            value = eval(
                __import__("re").sub("[0-9]+", r"Fraction(\g<0>)", text), {"Fraction": Fraction}
            )  # our own text, not a model's
        except ZeroDivisionError:
            assert found is None
        else:
            assert found[0] == value
            assert len(found[1]) <= len(text) and arithmetic.evaluate(found[1]) == (value, found[1])

    PART = st.floats(0, 10, allow_nan=False)

    @CALM
    @given(
        task=st.sampled_from(FAST),
        others=st.tuples(PART, PART, PART, PART),
        more=st.floats(0, 1),
        n_tokens=st.one_of(st.none(), st.integers(0, 2000)),
        reasoning=TEXTS,
        ugly=TEXTS,
    )
    def test_no_wrong_answer_outscores_a_right_one(task, others, more, n_tokens, reasoning, ugly):
        weights = dict(zip(("format", "length", "process", "efficiency"), others), correct=math.fsum(others) + more)
        best_wrong = [
            rewards.score(task, completion(WRONG[task], r), ROWS[task], weights=weights)
            for r in ("2+3=5 5*4=20", "9+9=18", reasoning)
        ]
        worst_right = [
            rewards.score(task, text, ROWS[task], weights=weights, n_tokens=n_tokens)
            for text in (
                f"<answer>{RIGHT[task]}</answer>",
                f"<answer>{RIGHT[task]}</answer>" + ugly.replace("<", ""),
                completion(RIGHT[task], "1=2, 2+2=5"),
            )
        ]
        assert all(parts["correct"] == 0 for parts in best_wrong) and all(
            parts["correct"] == 1 for parts in worst_right
        )
        assert max(parts["reward"] for parts in best_wrong) <= min(parts["reward"] for parts in worst_right)


@pytest.mark.parametrize(
    "unit",
    [
        "<answer>",
        "</answer>",
        "<reasoning>",
        "((-1)",
        "1--",
        "1+1=2-",
        "1=",
        "1,000,",
        "\\boxed{",
        "$",
        "\u00d7",
        "answer is ",
        "B ",
        "\n",
        "9",
        "(1",
    ],
)
def test_a_megabyte_of_anything_is_scored_quickly(unit):
    body = unit * (1_000_000 // len(unit))
    for text in (body, completion("18", body), completion(body), "<reasoning>a</reasoning>" + body):
        for task in FAST:
            assert (
                seconds(lambda: rewards.score(task, text, ROWS[task], strict=False)) < 0.05 * 4
            )  # a quadratic step would take minutes


def test_scoring_does_not_grow_memory():
    script = dedent("""
        import random, resource, rewards
        random.seed(0)

        def go(n):
            for _ in range(n):
                a, b = random.randint(1, 10**9), random.randint(1, 10**9)
                text = f"<reasoning>{a}+{b}={a + b} " + "so " * 100 + f"</reasoning><answer>{a}+{b}" + " " * 150 + "</answer>"
                rewards.score("countdown", text, {"nums": [a, b], "target": a + b})
                rewards.score("gsm8k", text, {"answer": f"#### {a}"})
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        print(-go(4500) + go(4500))
        """)
    assert int(printed_by(script)) < 8_000  # kB


def test_loading_takes_neither_torch_nor_a_tenth_of_a_second():
    script = dedent("""
        import sys, time
        start = time.process_time()
        import rewards
        print(time.process_time() - start, {"torch", "transformers", "numpy", "sympy", "datasets"} & set(sys.modules) or "none")
        """)
    outs = [printed_by(script).split() for _ in range(3)]
    assert outs[0][1] == "none" and min(float(out[0]) for out in outs) < 0.1


# ---------------------------------------------------------------------------------------------- the shape of the reward


@pytest.mark.parametrize("task", ROWS)
def test_copying_the_prompt_earns_nothing(task):
    for style in rewards.STYLES:
        prompt = rewards.messages(task, ROWS[task], style)
        copied = "\n".join(message["content"] for message in prompt)
        for text in (
            copied,
            prompt[0]["content"],
            prompt[1]["content"],
            completion(prompt[1]["content"], prompt[0]["content"].replace("<", ""), style),
        ):
            parts = rewards.score(task, text, ROWS[task], style)
            assert parts["correct"] == 0 and parts["process"] == 0 and parts["efficiency"] == 0


@pytest.mark.parametrize("task", FAST)
def test_repeating_and_padding_never_pay(task):
    weights = dict.fromkeys(rewards.WEIGHTS, 1.0)
    plain = completion(RIGHT[task], "2+3=5 5*4=20 2*3=7")
    base = rewards.score(task, plain, ROWS[task], weights=weights)["reward"]
    for text in (
        plain * 2,
        plain + plain.partition("\n")[2],
        completion(RIGHT[task], "2+3=5 5*4=20 2*3=7 " * 50),
        completion(RIGHT[task], "2+3=5 2 + 3 = 5 (2+3)=5 2+3=5.0 5*4=20 2*3=7"),
        plain + "\n" * 1000,
        completion(RIGHT[task] + " " * 20, "2+3=5 5*4=20 2*3=7"),
        completion(plain, plain),
        "<reasoning>" * 3 + plain,
        plain + "</answer>",
    ):
        assert rewards.score(task, text, ROWS[task], weights=weights)["reward"] <= base


def test_length_only_ever_costs():
    rewarded = [
        rewards.score("gsm8k", completion("18"), ROWS["gsm8k"], n_tokens=n)["reward"] for n in range(0, 1200, 50)
    ]
    assert rewarded == sorted(rewarded, reverse=True) and rewarded[0] == 1.5 and rewarded[-1] == 1.4
    assert rewards.score("gsm8k", completion("18"), ROWS["gsm8k"], n_tokens=150, length=(100, 200))["length"] == -0.5
    assert rewards.score("gsm8k", completion("18"), ROWS["gsm8k"], n_tokens=101, length=(100, 100))["length"] == -1


def test_process_cannot_be_farmed_with_true_but_foreign_equations():
    padding = " ".join(f"{a}+{b}={a + b}" for a in range(5, 25) for b in range(5, 15))
    assert rewards.score("countdown", completion("2+3+4", padding), ROWS["countdown"])["process"] == 0
    spun = " ".join(f"2+3=5 5+4=9 {'0+' * k}9=9" for k in range(1, 9))
    assert rewards.score("countdown", completion("2+3+4", spun), ROWS["countdown"])["process"] < 0.3


def test_every_line_of_a_true_trace_earns_its_process():
    noise = random.Random(0)
    for _ in range(300):
        nums = [noise.randint(1, 12) for _ in range(3)]
        lines = []
        for _ in range(noise.randint(1, 7)):
            pool, steps = list(nums), []
            while len(pool) > 1:
                b, a = sorted(pool.pop(noise.randrange(len(pool))) for _ in range(2))
                sign = noise.choice("+-*" + "/" * (b > 0 and a % b == 0))
                pool.append({"+": a + b, "-": a - b, "*": a * b, "/": b and a // b}[sign])
                steps.append(f"{a}{sign}{b}={pool[-1]}")
            lines.append(" ".join(steps) + noise.choice([" no", " ok"]))
        row = {"nums": nums, "target": 1}
        assert rewards.score("countdown", completion("1", "\n".join(lines)), row)["process"] == 1, lines


@pytest.mark.parametrize(
    "written, shortest",
    [
        ("2--(3*(4))", "2+3*4"),
        ("2--(3+4)", "2+3+4"),
        ("2+(-3+4)", "2-3+4"),
        ("-(3*4)+20", "-3*4+20"),
        ("-(-3*4)", "3*4"),
        ("--(2+3)", "2+3"),
        ("2-(-3+4)", "2-(-3+4)"),
        ("2/-(3*4)", "2/(-3*4)"),
        ("8-(3-2)", "8-(3-2)"),
        ("8/(2*2)", "8/(2*2)"),
    ],
)
def test_padding_with_signs_and_parentheses_is_seen(written, shortest):
    assert arithmetic.evaluate(written)[1] == shortest


def test_weights_name_the_parts_that_count():
    text = completion("18", "9+9=18")
    assert rewards.score("gsm8k", text, ROWS["gsm8k"])["reward"] == 1.5
    assert rewards.score("gsm8k", text, ROWS["gsm8k"], weights={"correct": 1, "format": 0.2})["reward"] == 1.2
    assert rewards.score("gsm8k", text, ROWS["gsm8k"], weights={"process": 2})["reward"] == 2


# ---------------------------------------------------------------------------------------------- batches, threads, processes


def test_a_batch_is_the_same_as_one_by_one_and_in_order():
    tasks = [task for task in ROWS for _ in range(6)]
    texts = [completion((RIGHT if i % 2 else WRONG)[task], f"{i}+1={i + 1}") for i, task in enumerate(tasks)]
    order = list(range(len(tasks)))
    random.Random(0).shuffle(order)
    tasks, texts = [tasks[i] for i in order], [texts[i] for i in order]
    rows, n_tokens = [ROWS[task] for task in tasks], [500 + 10 * i for i in range(len(tasks))]
    batch = rewards.score_batch(tasks, texts, rows, n_tokens=n_tokens)
    assert batch == [rewards.score(*item[:3], n_tokens=item[3]) for item in zip(tasks, texts, rows, n_tokens)]
    assert [parts["correct"] for parts in batch] == [float(i % 2) for i in order]
    assert rewards.score_batch([], [], []) == []


def test_math_works_from_any_thread():
    with ThreadPoolExecutor(4) as threads:
        verdicts = list(
            threads.map(lambda k: mathematics.equal(f"{k}\\sqrt{{3}}", f"\\sqrt{{{3 * k * k}}}"), range(2, 14))
        )
    assert verdicts == [True] * 12


def test_math_works_in_a_forked_process_and_beside_it():
    assert mathematics.equal("2\\sqrt{5}", "\\sqrt{20}")
    if (pid := os.fork()) == 0:
        right = mathematics.equal("3\\sqrt{5}", "\\sqrt{45}") and not mathematics.equal("3\\sqrt{5}", "\\sqrt{46}")
        mathematics.end_workers()
        os._exit(0 if right else 1)
    assert mathematics.equal("4\\sqrt{5}", "\\sqrt{80}")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_comparison_that_hangs_is_ended_and_the_next_one_works(monkeypatch):
    monkeypatch.setattr(mathematics, "too_heavy", lambda text: False)
    started = time.time()
    assert not mathematics.equal("18", "(((9^{99999})^{99999})^{99999})!") and not mathematics.equal("18", "(10^{8})!")
    assert time.time() - started < 40
    assert mathematics.equal("5\\sqrt{5}", "\\sqrt{125}")


def test_workers_end_with_their_process():
    script = (
        "import mathematics\nassert mathematics.equal('2\\\\sqrt{3}', '\\\\sqrt{12}')\nprint(mathematics.IDLE[0].pid)"
    )
    pid = int(printed_by(script))
    assert not os.path.exists(f"/proc/{pid}")


def test_hostile_mathematics_costs_little():
    noise = random.Random(1)
    atoms = ["9", "10^8", "x", "\\pi", "18", "7!", "(x+1)^{99}", "10^{100}", "\\sin x", "n", "e"]

    def grow(depth):
        if depth == 0:
            return noise.choice(atoms)
        a, b = grow(depth - 1), grow(depth - 1)
        return noise.choice(
            [f"({a})^{{{b}}}", f"{a}^{b}", f"\\frac{{{a}}}{{{b}}}", f"\\sqrt{{{a}}}", f"({a})!", f"({a})({b})"]
        )

    texts = (
        [grow(noise.randint(1, 6)) for _ in range(800)]
        + ["(" * k + "18" for k in range(0, 10_000, 100)]
        + ["9^{" * k + "9" + "}" * k for k in range(1, 90)]
        + [unit * 200_000 for unit in ("{", "\\frac", "1,", "$", "\\boxed{1}", "a", "\\text{", "\\pm", "^", "or ")]
    )
    started = time.time()
    for text in texts:
        assert mathematics.equal("17", text) is False or text.count("18") == 0
    assert time.time() - started < 60


@pytest.mark.parametrize(
    "gold",
    [
        "\\frac{1}{2}",
        "x^2+1",
        "(3,4]",
        "1,-2",
        "\\text{east}",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        "\\{1\\pm\\sqrt{5},-2\\}",
        "(0,9) \\cup (9,36)",
        "x=5",
        "y = 2x + 3",
        "864 \\mbox{ inches}^2",
        "\\$32,\\!348",
        "2516_8",
        "90^\\circ",
        "\\text{(C)}",
        "11,\\! 111,\\! 111,\\! 100",
        "5x - 7y + 11z + 4 = 0",
        "\\cot x",
        "6 - 5i",
    ],
)
def test_golds_accept_themselves_in_every_wrapping_and_reject_the_others(gold):
    for said in (gold, f"${gold}$", f"\\boxed{{{gold}}}", f"\\[{gold}\\]", f" {gold}. ", f"**{gold}**"):
        assert mathematics.equal(gold, said), said
    for other in (
        "\\frac{1}{3}",
        "x^2-1",
        "(3,4)",
        "[3,4]",
        "1,2",
        "\\text{west}",
        "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}",
        "7",
        "\\text{(D)}",
        f"{gold}, 77",
        f"77 or {gold}",
        "",
    ):
        assert not mathematics.equal(gold, other), other


# ---------------------------------------------------------------------------------------------- prompts and rows


@pytest.mark.parametrize("style", rewards.STYLES)
@pytest.mark.parametrize("task", ROWS)
def test_prompt_has_instructions_in_the_system_turn_and_the_problem_in_the_users(task, style):
    system, user = rewards.messages(task, ROWS[task], style)
    assert (system["role"], user["role"]) == ("system", "user")
    assert (
        all(tag in system["content"] for tag in (f"<{style}>", f"</{style}>", "<answer>", "</answer>"))
        and "<" not in user["content"]
    )
    assert RIGHT[task] not in user["content"].replace("B) ", "") or task in ("math",)


def test_countdown_prompt_is_numbers_and_target():
    assert (
        rewards.messages("countdown", {"nums": [3, 5, 8], "target": 24})[1]["content"]
        == "Numbers: [3, 5, 8]\nTarget: 24"
    )


def test_a_task_is_one_function_and_one_row(monkeypatch, tmp_path):
    def vowels(said, row):
        return rewards.number(said) == sum(row["word"].count(vowel) for vowel in "aeiou")

    task = {
        "columns": {"word": str},
        "data": "data/vowels",
        "grade": vowels,
        "gold": lambda row: row["word"],
        "needs": "'word' must not be empty",
        "ask": lambda row: f"How many vowels are in '{row['word']}'?",
        "instruction": "You count letters. The answer is one number alone.",
    }
    monkeypatch.setitem(rewards.TASKS, "vowels", task)
    (row,) = rewards.load_rows(f"vowels={write(tmp_path / 'train.jsonl', [{'word': 'banana'}])}", "train")
    assert rewards.messages("vowels", row)[1]["content"] == "How many vowels are in 'banana'?"
    assert [rewards.correct("vowels", completion(said), row) for said in ("3", "3 vowels", "2", "")] == [1, 1, 0, 0]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_come_with_their_task_and_all_their_columns(tmp_path):
    for task, row in ROWS.items():
        file = write(tmp_path / f"{task}.jsonl", [{**row, "extra": 1}] * 3)
        assert rewards.load_rows(f"{task}={file}", "test") == [{**row, "extra": 1, "task": task}] * 3
        assert (
            len(rewards.load_rows(f"{task}={file}:2", "train")) == 2
            and len(rewards.load_rows(f"{task}={file}:9", "train")) == 3
        )


def test_folders_give_the_split_that_is_asked_for(tmp_path):
    for split, n in (("train", 3), ("test", 2), ("validation", 1)):
        write(tmp_path / f"{split}.jsonl", [ROWS["gsm8k"]] * n)
    assert [len(rewards.load_rows(f"gsm8k={tmp_path}", split)) for split in ("train", "test", "val")] == [3, 2, 1]


def test_parquet_reads_like_jsonl(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for task, row in ROWS.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 2), tmp_path / "train.parquet")
        assert rewards.load_rows(f"{task}={tmp_path}", "train") == [{**row, "task": task}] * 2
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(rewards.DataError, match="train.parquet"):
        rewards.load_rows(f"gsm8k={tmp_path}", "train")


GOOD = json.dumps(ROWS["gsm8k"])


@pytest.mark.parametrize(
    "task, content, says",
    [
        ("gsm8k", GOOD + "\n" + GOOD[:-3] + "\n", "line 2, column"),
        ("gsm8k", "", "no rows"),
        ("gsm8k", "\n \n", "no rows"),
        ("gsm8k", "[1]\n", "line 1"),
        ("gsm8k", "{}\n", "'question'"),
        ("gsm8k", '{"question": "a"}\n', "'answer'"),
        ("gsm8k", '{"question": "a", "answer": 5}\n', "'answer'"),
        ("gsm8k", '{"question": "a", "answer": "none"}\n', "'answer'"),
        ("gsm8k", "\ufffe\n", "line 1"),
        ("gsm8k", "[" * 100_000 + "\n", "line 1"),
        ("gsm8k", '{"question": "a", "answer": ' + "9" * 5000 + "}\n", "line 1"),
        ("countdown", '{"nums": [1, 2]}\n', "'target'"),
        ("countdown", '{"nums": [1, "2"], "target": 3}\n', "'nums'"),
        ("countdown", '{"nums": [1, 2.0], "target": 3}\n', "'nums'"),
        ("countdown", '{"nums": [1, true], "target": 3}\n', "'nums'"),
        ("countdown", '{"nums": [], "target": 3}\n', "'nums'"),
        ("countdown", '{"nums": [-1, 2], "target": 3}\n', "'nums'"),
        ("countdown", '{"nums": "12", "target": 3}\n', "'nums'"),
        ("countdown", '{"nums": [1, 2], "target": null}\n', "'target'"),
        ("math", '{"problem": "a"}\n', "'answer'"),
        ("math", '{"problem": "a", "solution": "no box"}\n', "boxed"),
        ("math", '{"answer": "a"}\n', "'problem'"),
        ("math", '{"problem": "a", "answer": ""}\n', "'answer'"),
        ("arc", '{"question": "a", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}\n', "'answerKey'"),
        ("arc", '{"question": "a", "choices": {"text": ["a"]}, "answerKey": "A"}\n', "'choices'"),
        ("arc", '{"question": "a", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}\n', "'choices'"),
        ("code", '{"text": "a", "test_list": [], "test_setup_code": ""}\n', "'test_list'"),
        ("code", '{"text": "a", "test_list": "x", "test_setup_code": ""}\n', "'test_list'"),
    ],
)
def test_bad_data_gets_one_line_that_names_file_and_place(task, content, says, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_bytes(content.encode("utf-8"))
    with pytest.raises(rewards.DataError) as error:
        rewards.load_rows(f"{task}={tmp_path}", "train")
    assert says in str(error.value) and "train.jsonl" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source, says",
    [
        ("nothing", "no task"),
        ("", "no task"),
        ("gsm8k:", "TASK[=PATH][:N]"),
        ("gsm8k:0", "1 or more"),
        ("gsm8k:-1", "1 or more"),
        ("gsm8k:x", "N the number"),
        ("gsm8k=", "TASK[=PATH][:N]"),
        ("gsm8k=:3", "TASK[=PATH][:N]"),
        ("gsm8k:1e3", "N the number"),
        ("gsm8k=/no/such/file.jsonl", "no such file"),
        ("gsm8k=no-such-folder", "no such file"),
        ("gsm8k=data/no-such-folder", "no such file"),
        ("gsm8k=./a/b", "no such file"),
        ("GSM8K", "no task"),
    ],
)
def test_bad_sources_get_one_line(source, says):
    with pytest.raises(rewards.DataError) as error:
        rewards.load_rows(source, "train")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_the_split_says_what_it_holds(tmp_path):
    write(tmp_path / "test.jsonl", [ROWS["gsm8k"]])
    with pytest.raises(rewards.DataError, match="train.jsonl.*it holds test.jsonl"):
        rewards.load_rows(f"gsm8k={tmp_path}", "train")
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(rewards.DataError, match="must end in"):
        rewards.load_rows(f"gsm8k={tmp_path / 'x.csv'}", "train")


def test_a_hub_that_cannot_be_reached_is_one_line_and_soon(monkeypatch):
    pytest.importorskip("datasets")
    import rows

    monkeypatch.setattr(rows, "reachable", lambda endpoint: False)
    with pytest.raises(rewards.DataError, match="nobody/nothing: not a file or folder here") as error:
        rewards.load_rows("gsm8k=nobody/nothing", "train")
    assert "\n" not in str(error.value)
