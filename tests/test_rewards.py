"""Rewards: what every case must score, and what holds for every text, every weight and every source."""
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from textwrap import dedent

import pytest

import rewards

ROWS = {
    "countdown": {"nums": [2, 3, 4], "target": 20, "solution": "(2+3)*4"},
    "gsm8k": {"question": "How many pens?", "answer": "There are 9+9=<<9+9=18>>18 pens.\n#### 18"},
    "math": {"problem": "What is $9+9$?", "solution": "It is $9+9=\\boxed{18}$.", "answer": "18"},
    "arc": {
        "question": "Which gas?",
        "choices": {"text": ["oxygen", "carbon dioxide"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "code": {
        "text": "Double it.",
        "test_list": ["assert f(2) == 4"],
        "test_setup_code": "",
        "code": "def f(x):\r\n    return 2 * x\r\n",
    },
}
RIGHT = {"countdown": "(2+3)*4", "gsm8k": "18", "math": "18", "arc": "B", "code": "def f(x): return 2 * x"}
WRONG = {"countdown": "2+3+4", "gsm8k": "20", "math": "20", "arc": "A", "code": "def f(x): return 5"}
FAST = ("countdown", "gsm8k", "arc")


def completion(answer, reasoning="So.", style="reasoning"):
    return f"<{style}>{reasoning}</{style}>\n<answer>{answer}</answer>"


def process(reasoning, nums=None):
    row = {"nums": nums, "target": 1} if nums else ROWS["gsm8k"]
    return rewards.score("countdown" if nums else "gsm8k", completion("1", reasoning), row)["process"]


def printed_by(script, folder=Path(rewards.__file__).parent):
    """What a fresh interpreter prints that runs this."""
    argv = [sys.executable, "-c", dedent(script)]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True).stdout


def seconds(action):
    """Processor time of the fastest of up to four runs: what others do to this machine is not ours."""
    times = []
    while len(times) < 4 and (not times or times[-1] > 0.02):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return min(times)


# ------------------------------------------------------------------------------------ cases
CASES = [json.loads(line) for line in Path(__file__).with_name("reward_cases.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case_gets_the_score_it_must(case):
    """`want`: a part's value (a pair is a range), `answer_strict`, `correct_flexible`.

    `expand` {"@@1": [unit, n]} stands for the unit n times in place of `@@1`.
    """
    task, text, row, style, want = case["task"], case["text"], case["row"], case["style"], dict(case["want"])
    for mark, (unit, n) in case.get("expand", {}).items():
        text = text.replace(mark, unit * n)
    if "answer_strict" in want:
        assert rewards.answer(text, style) == want.pop("answer_strict")
    if "correct_flexible" in want:
        assert rewards.correct(task, text, row, style, strict=False) == want.pop("correct_flexible")
    parts = rewards.score(task, text, row, style, n_tokens=case.get("n_tokens"))
    for part, value in want.items():
        low, high = value if isinstance(value, list) else (value, value)
        assert low <= parts[part] <= high, part


# ------------------------------------------------------------------------------------ any text
try:
    from hypothesis import HealthCheck, given, settings, strategies as st
except ImportError:

    @pytest.mark.skip(reason="needs `pip install hypothesis`")
    def test_properties_over_random_text():
        pass
else:
    CALM = settings(
        max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
    )
    TAGS = ["<reasoning>", "</reasoning>", "<think>", "</think>", "<answer>", "</answer>"]
    PIECES = [
        "\\boxed{", "}", "{", "####", "answer is ", "\\frac", "\\text{", "\\times", "\n", " ", "=",
        "+", "-", "*", "/", "(", ")", "1", "2", "3", "4", "20", "18", ",", ".", "$", "%", "A", "B", "x",
        "\u2212", "\u00d7", "\u0663", "\ud800", "\0", "\u200b", "**", "```", "1,000", "2+3=5", "\\", "^", "_",
        "[", "]",
    ]
    TEXTS = st.one_of(
        st.text(),
        st.lists(st.sampled_from(TAGS + PIECES), max_size=60).map("".join),
        st.lists(st.tuples(st.sampled_from(TAGS + PIECES), st.integers(1, 400)), max_size=6).map(
            lambda parts: "".join(piece * n for piece, n in parts)
        ),
    )
    ANSWERS = st.one_of(TEXTS, st.lists(st.sampled_from(PIECES), max_size=12).map("".join)).map(completion)
    STYLE = st.sampled_from(rewards.STYLES)

    @CALM
    @given(text=st.one_of(TEXTS, ANSWERS), task=st.sampled_from(FAST), style=STYLE, strict=st.booleans())
    def test_any_text_is_scored_within_bounds_and_50_ms(text, task, style, strict):
        row = json.loads(json.dumps(ROWS[task]))
        assert seconds(lambda: rewards.score(task, text, row, style, strict=strict)) < 0.05
        parts = rewards.score(task, text, row, style, strict=strict)
        assert parts["correct"] in (0.0, 1.0) and parts["format"] in (0.0, 1.0) and parts["length"] == 0
        assert 0 <= parts["process"] <= 1 and 0 <= parts["efficiency"] <= 1 and math.isfinite(parts["reward"])
        assert parts["tags"] in (0.0, 0.25, 0.5, 0.75, 1.0) and parts["tags"] >= parts["format"]
        assert row == ROWS[task]

    @CALM
    @given(text=st.one_of(TEXTS, ANSWERS), style=STYLE)
    def test_strict_and_flexible_agree_where_there_is_an_answer_block(text, style):
        said = rewards.answer(text, style)
        assert said is None or rewards.answer(text, style, strict=False) == said

    def combined(inner):
        pairs = st.tuples(inner, st.sampled_from("+-*/"), inner)
        return st.one_of(pairs.map(lambda t: f"({t[0]}{t[1]}{t[2]})"), inner.map("(-{})".format))

    @CALM
    @given(st.recursive(st.integers(0, 99).map(str), combined, max_leaves=8))
    def test_the_value_of_an_expression_is_exact(text):
        try:
            fractions = re.sub("[0-9]+", r"Fraction(\g<0>)", text)
            value = eval(fractions, {"Fraction": Fraction})  # the test's own text, not a model's
        except ZeroDivisionError:
            assert rewards.evaluate(text) is None
        else:
            assert rewards.evaluate(text)[0] == value and rewards.evaluate(text)[1] <= len(text)

    PART = st.floats(0, 10, allow_nan=False)

    @CALM
    @given(
        task=st.sampled_from(FAST),
        others=st.tuples(PART, PART, PART, PART, PART),
        more=st.floats(0, 1),
        n_tokens=st.one_of(st.none(), st.integers(0, 2000)),
        reasoning=TEXTS,
        ugly=TEXTS,
    )
    def test_no_wrong_answer_outscores_a_right_one(task, others, more, n_tokens, reasoning, ugly):
        names = ("format", "length", "process", "efficiency", "tags")
        weights = dict(zip(names, others), correct=math.fsum(others) + more)
        for text in ("2+3=5 5*4=20", "9+9=18", reasoning):
            wrong = rewards.score(task, completion(WRONG[task], text), ROWS[task], weights=weights)
            block = f"<answer>{RIGHT[task]}</answer>"
            for right in (block, block + ugly.replace("<", ""), completion(RIGHT[task], "1=2, 2+2=5")):
                best = rewards.score(task, right, ROWS[task], weights=weights, n_tokens=n_tokens)
                assert (wrong["correct"], best["correct"]) == (0, 1) and wrong["reward"] <= best["reward"]

    @CALM
    @given(text=st.one_of(TEXTS, TEXTS.map(lambda text: completion("1", text))), task=st.sampled_from(FAST))
    def test_with_the_default_weights_a_wrong_answer_earns_at_most_format_and_a_tenth(text, task):
        parts = rewards.score(task, text, ROWS[task])
        assert parts["correct"] or parts["reward"] <= 0.3 * parts["format"] + 0.1 * parts["process"] + 1e-9


UNITS = ["<answer>", "</answer>", "<reasoning>", "((-1)", "1--", "1+1=2-", "1=", "1,000,", "\\boxed{", "$",
         "\u00d7", "answer is ", "B ", "\n", "9", "(1", "1+1=", "a "]


@pytest.mark.parametrize("unit", UNITS)
def test_a_megabyte_of_anything_is_scored_quickly(unit):
    body = unit * (1_000_000 // len(unit))
    for text in (body, completion("18", body), completion(body), "<reasoning>a</reasoning>" + body):
        for task in FAST:  # a quadratic step would take minutes
            assert seconds(lambda: rewards.score(task, text, ROWS[task], strict=False)) < 0.2


def test_scoring_does_not_grow_memory():
    script = """
        import random, resource, rewards
        random.seed(0)

        def go(n):
            for _ in range(n):
                a, b = random.randint(1, 10**9), random.randint(1, 10**9)
                text = f"<reasoning>{a}+{b}={a + b} " + "so " * 100 + f"</reasoning><answer>{a}+{b}</answer>"
                rewards.score("countdown", text, {"nums": [a, b], "target": a + b})
                rewards.score("gsm8k", text, {"answer": f"#### {a}"})
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        print(-go(4500) + go(4500))
        """
    assert int(printed_by(script)) < 8_000  # kB


def test_loading_takes_neither_torch_nor_a_tenth_of_a_second():
    script = """
        import sys, time
        start = time.process_time()
        import rewards
        heavy = {"torch", "transformers", "numpy", "sympy", "datasets", "extras"} & set(sys.modules)
        print(time.process_time() - start, heavy or "none")
        """
    outs = [printed_by(script).split() for _ in range(3)]
    assert outs[0][1] == "none" and min(float(out[0]) for out in outs) < 0.1


# ------------------------------------------------------------------------------------ choices
@pytest.mark.parametrize("texts, key, right, wrong", [
    (["T", "tt", "Tt", "TT"], "C", ["C", "Tt", "**Tt**", "C) Tt", "(C) Tt.", "Answer: Tt"],
     ["tt", "TT", "tT", "C) tt", "C: TT", "C - tT", "Answer: TT"]),
    (["Gas", "gas"], "A", ["Gas"], ["GAS", "gas", "A) gas", "A) GAS"]),
    (["oxygen", "carbon dioxide", "helium", "nitrogen"], "B",
     ["Answer: B", "answer: (B)", "The answer is B.", "Option B", "option **B**", "Choice B: carbon dioxide",
      "The correct answer is (B) Carbon Dioxide.", "Answer: option B", "Final answer: carbon dioxide",
      "B \u2013 carbon dioxide", "B \u2014 carbon dioxide", "B\u2014carbon dioxide", "B - carbon dioxide", "B\ncarbon dioxide"],
     ["Answer: A", "Option C", "Answer: not B", "Not B", "Options B", "Option B or C", "Answer: B, C", "B B", "Answer:",
      "Answer: B Answer: C", "Incorrect answer: B", "wrong answer: B", "Option B is wrong", "B \u2013 helium",
      "A \u2013 carbon dioxide", "B \u2013", "B carbon dioxide D", "B, helium", "answer is not: B"]),
    (["-2 m/s", "2 m/s", "-20 m/s", "20 m/s"], "A",
     ["A) -2 m/s", "(A) -2 m/s", "A. -2 m/s", "A - -2 m/s", "A \u2013 \u22122 m/s", "A: \u22122 m/s", "\u22122 m/s",
      "A -2 m/s", "$-2$ m/s"],
     ["2 m/s", "B) -2 m/s", "A) 2 m/s", "A - 2 m/s", "B -2 m/s", "A) -20 m/s", "A \u2014 2 m/s"]),
])
def test_a_choice_is_one_label_or_one_text_or_both(texts, key, right, wrong):
    row = {"choices": {"text": texts, "label": list("ABCD"[:len(texts)])}, "answerKey": key}
    assert [said for said in right if not rewards.arc(said, row)] == []
    assert [said for said in wrong if rewards.arc(said, row)] == []
    others = [{**row, "answerKey": other} for other in row["choices"]["label"] if other != key]
    assert [said for said in right for other in others if rewards.arc(said, other)] == []


# ------------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("gold, said", [
    ("-57", "Answer: \\boxed{-57}"), ("-57", "The total is **-57**"), ("-57", "Answer: $-57$"),
    ("-5", "x = -\\$5"), ("-57", "-57 degrees"), ("5", "5 dollars a day"), ("5", "5 (five)"),
    ("5", "5 months"), ("5", "US$5"),
    ("5", "5 teeth"), ("5", "5 miles/hour"), ("5", "5 g"), ("1234", "Answer: 1,234"), ("5", "5 pairs"),
])
def test_labels_markup_and_units_are_no_part_of_a_number(gold, said):
    assert rewards.gsm8k(said, {"answer": f"#### {gold}"})


@pytest.mark.parametrize("said", [
    "5 halves", "5 thirds", "5 tenths", "5 quarters of it", "5 sixteenths", "5 hundredths", "5 quadrillion", "H5",
    "5 billions", "negative: 5", "minus: 5", "half: 5", "twice: 5", "5 false", "false: 5", "5 wrong", "5 mil",
    "5 squared", "5 below zero", "5 a.m.", "5 PM", "5 BC", "5 x", "5n", "5 a", "5 B", "5 fold", "5th",
    "5 degrees north", "at least: 5",
])
def test_words_that_change_a_value_make_it_wrong(said):
    assert not rewards.gsm8k(said, {"answer": "#### 5"})


def test_a_minus_between_two_things_is_no_sign():
    for said in ("x-57", "$x$-57", "total -57", "20-57", "- -57", "-$-57"):
        assert not rewards.gsm8k(said, {"answer": "#### -57"}), said


READ = [
    (5, "5 miles"), (5, "5 milk bottles"), (5, "5 milliliters"), (5, "5 millimeters"), (5, "5 bills"),
    (5, "5 centimeters"), (5, "5 cents"), (5, "5 military medals"), (5, "5 times"), (5, "5 times a day"),
    (5, "5 quarters"), (5, "5 third graders"), (5, "5 two-liter bottles"), (10, "10 percent"), (10, "10%"),
    (10, "10 fewer"), (10, "Third day: 10"), (10, "She has a total of 10 apples"), (90, "Her score is 90"),
    (500, "Grand total: $500"), (500, "Gross income: $500"), (36, "Cost per dozen: $36"),
    (8, "Number of quarters: 8"), (8, "Number of dimes = 8"), (18, "18 m^2"), (18, "18 m²"), (18, "18 ft²"),
    (18, "18 cm^{3}"), (18, "18~\\text{dollars}"), (18, "\\displaystyle 18"), (18, "Rs. 18"), (18, "Rs 18"),
    (18, "= 18"), (5, "She has 5 apples left."), (5, "So, Janet's total is $5."),
    (18, "Janet makes $18 every day at the farmers' market."), (18, "Janet makes 18 dollars every day."),
    (5, "There are 5 apples left in the basket."), (5, "He needs 5 more hours."), (5, "5 apples are left."),
    (5, "The answer is 5"), (5, "The answer is 5 apples."), (5, "Answer: 5"), (5, "Total = $5.00"),
    (5, "Total cost: 5 USD"), (5, "USD 5"), (5, "US$5"), (5, "5 dollars per hour"), (5, "5 USD"), (5, "5°C"),
    (5, "5 km/h"), (5, "5 mph"), (5, "\\boxed{5 \\text{ apples}}"), (5, "\\[\n5\n\\]"),
    (5, "\\text{5 apples}"), (5, "5 \\text{ apples}"), (5, "$5$ apples"), (5, "5 sq ft"), (5, "5 people"),
    (5, "5 square feet"), (5, "5 pairs"), (5, "5 feet tall"),]
CHANGED = [
    (5, "5 lacs"), (5, "5 Mio."), (5, "5 Mrd"), (5, "5 milliards"), (5, "5 tens"), (5, "5 thou"), (5, "5 K"),
    (5, "5k"), (5, "5 mil"), (5, "5 mille"), (5, "5 bn"), (5, "5 tysiecy"), (5, "5 millones"),
    (5, "5 milhoes"), (5, "5 milhões"), (5, "5 docenas"), (5, "5 dozijn"), (5, "5 Dutzend"), (5, "5 ribu"),
    (5, "5 lakh rupees"), (5, "5 miljoen"), (5, "5 triệu"), (5, "5 centaines"), (5, "5 grand"),
    (5, "5 score"), (5, "5 hundreds"), (5, "5 тысяч"), (5, "5千"), (5, "5 times three"),
    (5, "5 quarters of a pizza"), (5, "5 thirds"), (10, "10/two"), (10, "10 six"), (10, "10 divided by two"),
    (10, "10 percent of fifty"), (10, "10 out of twelve"), (10, "10 less two"), (10, "10 or eleven"),
    (10, "never: 10"), (10, "never 10"), (10, "not: 10"), (10, "none: 10"), (10, "anything but 10"),
    (10, "half of 10"), (10, "Double: 10"), (10, "two times: 10"), (10, "three quarters of 10"),
    (10, "a third of 10"), (10, "a third of: 10"), (10, "The sum of two and 10"), (5, "Dozens: 5"),
    (5, "Profit in thousands: 5"), (18, "x^2 = 18"), (18, "18 x^2"), (18, "18^2"), (18, "18 m^4"),
    (18, "2 m^2 18"), (5, "There are twice 5 apples left"), (5, "She has at least 5 apples"),
    (5, "She does not have 5 apples"), (5, "She has 5 dozen apples"), (5, "If she has 5 apples"),
    (5, "Step 5"), (5, "He adds 5"), (5, "It takes him 5 hours to finish."), (5, "5 in base six"),
    (5, "5 factorial"), (5, "5 squared"), (5, "5 p.m."), (5, "5 hundred"), (5, "The remainder of 5"),
    (5, "anything except 5"), (5, "5 isn't right"), (5, "It isn't 5"), (5, "5 doesn't work"),]


def test_a_number_is_read_in_what_models_write_around_it_and_no_other():
    assert [pair for pair in READ if not rewards.gsm8k(pair[1], {"answer": f"#### {pair[0]}"})] == []
    assert [pair for pair in CHANGED if rewards.gsm8k(pair[1], {"answer": f"#### {pair[0]}"})] == []


@pytest.mark.parametrize("written, shortest", [
    ("2--(3*(4))", "2+3*4"), ("-(3*4)+20", "-3*4+20"), ("2-(-3+4)", "2-(-3+4)"),
    ("2/-(3*4)", "2/(-3*4)"), ("8-(3-2)", "8-(3-2)"), ("8/(2*2)", "8/(2*2)"), ("2*(3*4)", "2*3*4"),
    ("((2+3))*4", "(2+3)*4"), ("( 2 + 3 ) * 4", "(2+3)*4"),
])
def test_padding_with_spaces_signs_and_parentheses_costs_efficiency(written, shortest):
    row = {"nums": [int(n) for n in re.findall("[0-9]+", written)]}
    row["target"] = rewards.evaluate(written)[0]
    efficiency = rewards.score("countdown", completion(written), row)["efficiency"]
    assert efficiency == pytest.approx(len(shortest) / len(written))


# ------------------------------------------------------------------------------------ process
@pytest.mark.parametrize("idle", [
    "3+5=5+3", "3+5=3+5", "5+3+0=3+5", "2*(3+4)=(4+3)*2", "1*1=1", "0+3=3", "3-0=3", "3*1=3", "3/1=3",
    "0*5=0", "8+2-2=8", "8*2/2=8", "0+0=0", "3=3", "3=1*3", "2.0+3=3+2",
])
def test_equations_that_work_nothing_out_earn_nothing(idle):
    assert process(idle) == 0
    assert process(f"4+4=8 {idle}") == 1 and process(f"4+4=9 {idle}") == 0  # nor do they hide a false one


def test_equations_that_work_something_out_earn_their_share():
    for work in ("3+5=8", "6-3=3", "4/2=2", "5-5=0", "1+1=2", "3+5=10-2", "48 x 2 = 96", "(so 3+5=8)"):
        assert process(work) == 1 and process(f"{work} 4+4=9") == 0.5, work


def test_repeating_an_equation_in_another_form_earns_nothing_more():
    forms = "3+5=8 5+3=8 8=3+5 (3+5)=8 3 + 5 = 8 3+5=8.0 3.0+5=8"
    assert process(f"{forms} 4+4=9") == process("3+5=8 4+4=9") == 0.5


def test_process_cannot_be_farmed_with_true_but_foreign_equations():
    padding = " ".join(f"{a}+{b}={a + b}" for a in range(5, 25) for b in range(5, 15))
    assert process(padding, [2, 3, 4]) == 0
    spun = " ".join(f"2+3=5 5+4=9 {'0+' * k}9=9" for k in range(1, 9))
    assert process(spun, [2, 3, 4]) < 0.3


@pytest.mark.parametrize("text, share", [
    ("24 x (1/6) = 4", 1), ("(1/6) x 24 = 5", 0), ("8 * 2 1/4 = 18", 1), ("8 * 2 1/4 = 17", 0),
    ("3 apples + 5 apples = 8 apples", 1), ("16 eggs - 3 eggs = 12 eggs", 0), ("20 boxes * 3 pens/box = 60 pens", 1),
    ("$10/hour * 5 hours = $50", 1), ("2 dozen + 3 = 5", 0), ("2x + 3 = 5", 0), ("3 feet 5 inches = 8", 0),
])
def test_an_equation_is_read_without_its_units(text, share):
    assert process(text) == share


def test_a_step_that_only_uses_up_a_number_still_moves_the_game():
    assert process("7*1=7 7*3=21", [7, 1, 3]) == 1
    assert process("7*1=7", [7, 1, 3]) == 0


def test_every_line_of_a_true_trace_earns_its_process():
    noise = random.Random(0)
    for _ in range(300):
        nums = [noise.randint(2, 12) for _ in range(3)]
        lines = []
        for _ in range(noise.randint(1, 7)):
            pool, steps = list(nums), []
            while len(pool) > 1:
                b, a = sorted(pool.pop(noise.randrange(len(pool))) for _ in range(2))
                sign = noise.choice("+-*" + "/" * (b > 0 and a % b == 0))
                pool.append({"+": a + b, "-": a - b, "*": a * b, "/": b and a // b}[sign])
                steps.append(f"{a}{sign}{b}={pool[-1]}")
            lines.append(" ".join(steps) + noise.choice([" no", " ok"]))
        assert process("\n".join(lines), nums) == 1, lines


# ------------------------------------------------------------------------------------ the shape of the reward
@pytest.mark.parametrize("task", ROWS)
def test_copying_the_prompt_earns_nothing(task):
    for style in rewards.STYLES:
        prompt = [message["content"] for message in rewards.messages(task, ROWS[task], style)]
        copied = completion(prompt[1], prompt[0].replace("<", ""), style)
        for text in ("\n".join(prompt), *prompt, copied):
            parts = rewards.score(task, text, ROWS[task], style)
            assert parts["correct"] == 0 and parts["process"] == 0 and parts["efficiency"] == 0


@pytest.mark.parametrize("task", FAST)
def test_repeating_and_padding_never_pay(task):
    weights = dict.fromkeys(rewards.WEIGHTS, 1.0)
    steps = "2+3=5 5*4=20 2*3=7"
    plain = completion(RIGHT[task], steps)
    base = rewards.score(task, plain, ROWS[task], weights=weights)["reward"]
    for text in (
        plain * 2,
        plain + plain.partition("\n")[2],
        completion(RIGHT[task], f"{steps} " * 50),
        plain + "\n" * 1000,
        completion(RIGHT[task] + " " * 20, steps),
        completion(plain, plain),
        "<reasoning>" * 3 + plain,
        plain + "</answer>",
    ):
        assert rewards.score(task, text, ROWS[task], weights=weights)["reward"] <= base


def test_length_only_ever_costs():
    def scored(n_tokens, **length):
        weights = {"length": 1}
        return rewards.score("gsm8k", "18", ROWS["gsm8k"], weights=weights, n_tokens=n_tokens, **length)

    rewarded = [scored(n)["reward"] for n in range(0, 1200, 50)]
    assert rewarded == sorted(rewarded, reverse=True) and rewarded[0] == 0 and rewarded[-1] == -1
    assert scored(150, length=(100, 200))["length"] == -0.5
    assert scored(101, length=(100, 100))["length"] == -1 and scored(100, length=(100, 100))["length"] == 0


def test_weights_name_the_parts_that_count():
    text = completion("18", "9+9=18")
    assert rewards.score("gsm8k", text, ROWS["gsm8k"])["reward"] == 1.4
    assert rewards.score("gsm8k", text, ROWS["gsm8k"], weights={"correct": 1, "format": 0.2})["reward"] == 1.2
    assert rewards.score("gsm8k", text, ROWS["gsm8k"], weights={"process": 2})["reward"] == 2


@pytest.mark.parametrize("text, tags", [
    ("18", 0), ("<think>a</think>", 0), ("<Answer>18</Answer>", 0), ("<reasoning>9+9", 0.25),
    ("</answer>18<answer>", 0.5), ("<reasoning>9+9</reasoning> 18</answer>", 0.75), (completion("18"), 1),
    ("so " + completion("18") + " it is", 1), (completion("18") + "<answer>", 0), (completion("18") * 2, 0),
    ("<reasoning><reasoning>", 0), (completion("<answer>18"), 0),
])
def test_tags_earn_a_quarter_each_and_nothing_where_one_is_repeated(text, tags):
    parts = rewards.score("gsm8k", text, ROWS["gsm8k"], weights={"tags": 2})
    assert parts["tags"] == tags and parts["reward"] == 2 * tags
    mirrored = text.replace("think>", "x>").replace("reasoning>", "think>")
    assert rewards.score("gsm8k", mirrored, ROWS["gsm8k"], "think")["tags"] == tags


def test_every_part_has_its_weight_and_the_default_lets_correct_decide():
    assert [*rewards.score("arc", "B", ROWS["arc"])] == [*rewards.WEIGHTS, "reward"]
    assert rewards.WEIGHTS["correct"] >= sum(rewards.WEIGHTS.values()) - rewards.WEIGHTS["correct"]


def test_weights_are_read_from_the_command_line():
    read = rewards.parse_weights(["correct=1", "format=.2", "length=1e-2"])
    assert read == {"correct": 1, "format": 0.2, "length": 0.01, "process": 0, "efficiency": 0, "tags": 0}


@pytest.mark.parametrize("text", ["correct", "correct=", "=1", "style=1", "format=-1", "format=nan",
                                  "format=inf", "format=1=2", "format= 1", "", "reward=1", "format=0x1"])
def test_wrong_weights_get_one_line(text):
    with pytest.raises(rewards.DataError, match="PART=NUMBER") as error:
        rewards.parse_weights(["correct=1", text])
    assert "\n" not in str(error.value)


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


def test_a_batch_takes_any_text():
    texts = ["", "\ud800", "\0", completion("\ud800"), completion("1\ud800", "\udfff=1"), completion("\0")]
    tasks = [task for task in ROWS for _ in texts]
    scored = rewards.score_batch(tasks, texts * len(ROWS), [ROWS[task] for task in tasks])
    assert [parts["correct"] for parts in scored] == [0.0] * len(tasks)


# ------------------------------------------------------------------------------------ prompts, worked answers
@pytest.mark.parametrize("style", rewards.STYLES)
@pytest.mark.parametrize("task", ROWS)
def test_the_instructions_stand_in_the_system_turn_and_the_problem_in_the_users(task, style):
    system, user = rewards.messages(task, ROWS[task], style)
    assert (system["role"], user["role"]) == ("system", "user")
    assert all(tag in system["content"] for tag in (f"<{style}>", f"</{style}>", "<answer>", "</answer>"))
    assert "<" not in user["content"]
    assert RIGHT[task] not in user["content"].replace("B) ", "") or task == "math"


def test_countdown_prompt_is_numbers_and_target():
    row = {"nums": [3, 5, 8], "target": 24}
    assert rewards.messages("countdown", row)[1]["content"] == "Numbers: [3, 5, 8]\nTarget: 24"


@pytest.mark.parametrize("task, worked", [
    ("countdown", "<think>(2+3)*4=20</think>\n<answer>(2+3)*4</answer>"),
    ("gsm8k", "<think>There are 9+9=18 pens.</think>\n<answer>18</answer>"),
    ("math", "<think>It is $9+9=\\boxed{18}$.</think>\n<answer>18</answer>"),
    ("arc", "<think>carbon dioxide</think>\n<answer>B</answer>"),
    ("code", "<think>The tests say what is asked for.</think>\n"
             "<answer>```python\ndef f(x):\n    return 2 * x\n```</answer>"),
])
def test_a_worked_answer_is_a_right_completion(task, worked):
    assert rewards.worked_completion(task, ROWS[task], "think") == worked
    parts = rewards.score(task, worked, ROWS[task], "think")
    assert parts["correct"] == 1 and parts["format"] == 1


@pytest.mark.parametrize("style", rewards.STYLES)
def test_a_tag_that_the_prompt_opens_belongs_to_the_completion(style):
    tag = f"<{style}>"
    for end in (tag, f"{tag}\n", f"{tag} \n\n"):
        assert rewards.opening(f"user: {tag} is a tag\nassistant: {end}", style) == tag
    for prompt in ("", f"{tag}</{style}>\n\n", f"write {tag} first", f"</{style}>", "<x>", f"{style}>"):
        assert rewards.opening(prompt, style) == ""
    rest = completion("18", "9+9=18", style).removeprefix(tag)
    parts = [rewards.score("gsm8k", begin + rest, ROWS["gsm8k"], style) for begin in ("", tag)]
    assert [(part["format"], part["tags"], part["correct"]) for part in parts] == [(0, 0.75, 1), (1, 1, 1)]
    assert rewards.correct("gsm8k", tag + "9+9 <answer>18</answer>", ROWS["gsm8k"], style) == 0  # cut off


def test_a_trace_comes_before_the_solution():
    row = {**ROWS["countdown"], "trace": "2+3=5 5+4=9 no", "trace_answer": "2+3+4"}
    assert rewards.worked_completion("countdown", row) == completion("2+3+4", "2+3=5 5+4=9 no")


@pytest.mark.parametrize("task, row", [
    ("countdown", {"nums": [1, 2], "target": 3}),
    ("gsm8k", {"question": "How many?", "answer": "#### 3"}),
    ("math", {"problem": "What?", "answer": "3"}),
    ("math", {"problem": "What?", "answer": "3", "solution": "It </reasoning> is 3."}),
    ("code", {"text": "Double.", "test_list": ["assert f(2) == 4"], "test_setup_code": ""}),
])
def test_a_row_without_a_worked_answer_gets_one_line(task, row):
    with pytest.raises(rewards.DataError, match=f"{task}: a row without a worked answer") as error:
        rewards.worked_completion(task, row)
    assert "\n" not in str(error.value)


def test_a_task_of_ones_own_is_one_row(monkeypatch, tmp_path):
    def palindrome(said, row):
        return len(said) == row["length"] and said == said[::-1]

    monkeypatch.setitem(rewards.TASKS, "palindrome", {
        "columns": {"length": int}, "data": "data/palindrome", "grade": palindrome,
        "gold": lambda row: row["length"] or None, "needs": "'length' must be at least 1",
        "ask": lambda row: f"Write a palindrome of {row['length']} letters.",
        "instruction": "You write palindromes. The answer is the palindrome alone.",
        "worked": lambda row: ("The same letter again and again.", "a" * row["length"]),
    })
    (row,) = rewards.load_rows(f"palindrome={write(tmp_path / 'train.jsonl', [{'length': 5}])}", "train")
    assert rewards.messages("palindrome", row)[1]["content"] == "Write a palindrome of 5 letters."
    texts = [completion(said) for said in ("level", "lever", "noon", "")]
    texts.append(rewards.worked_completion("palindrome", row))
    scored = rewards.score_batch(["palindrome"] * 5, texts, [row] * 5)
    assert [parts["correct"] for parts in scored] == [1, 0, 0, 0, 1]
    with pytest.raises(rewards.DataError, match="line 1: 'length' must be at least 1"):
        rewards.load_rows(f"palindrome={write(tmp_path / 'train.jsonl', [{'length': 0}])}", "train")


# ------------------------------------------------------------------------------------ rows
def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_come_with_their_task_and_all_their_columns(tmp_path):
    for task, row in ROWS.items():
        file = write(tmp_path / f"{task}.jsonl", [{**row, "extra": 1}] * 3)
        assert rewards.load_rows(f"{task}={file}", "test") == [{**row, "extra": 1, "task": task}] * 3
        assert len(rewards.load_rows(f"{task}={file}:2", "train")) == 2
        assert len(rewards.load_rows(f"{task}={file}:9", "train")) == 3


def test_folders_give_the_split_that_is_asked_for(tmp_path):
    for split, n in (("train", 3), ("test", 2), ("validation", 1)):
        write(tmp_path / f"{split}.jsonl", [ROWS["gsm8k"]] * n)
    for split, n in (("train", 3), ("test", 2), ("val", 1), ("validation", 1)):
        assert len(rewards.load_rows(f"gsm8k={tmp_path}", split)) == n


def test_parquet_reads_like_jsonl(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for task, row in ROWS.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 2), tmp_path / "train.parquet")
        assert rewards.load_rows(f"{task}={tmp_path}", "train") == [{**row, "task": task}] * 2
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(rewards.DataError, match="train.parquet"):
        rewards.load_rows(f"gsm8k={tmp_path}", "train")


def numbered(*answers):
    return [{"question": f"{n}?", "answer": f"#### {n}"} for n in answers]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_the_shards_of_a_split_are_read_in_their_order(kind, tmp_path):
    def save(name, rows):
        if kind == "parquet":
            pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        elif kind == "jsonl":
            write(tmp_path / name, rows)
        else:
            (tmp_path / name).write_text(json.dumps(rows, indent=1))

    pyarrow = pytest.importorskip("pyarrow")
    for split, shards in (("train", ([3, 1], [2], [5, 4])), ("test", ([9],)), ("validation", ([7], [6]))):
        for i, shard in reversed(list(enumerate(shards))):
            save(f"{split}-0000{i}-of-0000{len(shards)}.{kind}", numbered(*shard))
    for split, order in (("train", [3, 1, 2, 5, 4]), ("test", [9]), ("val", [7, 6])):
        rows = rewards.load_rows(f"gsm8k={tmp_path}", split)
        assert [row["question"] for row in rows] == [f"{n}?" for n in order]
    assert len(rewards.load_rows(f"gsm8k={tmp_path}:4", "train")) == 4
    assert len(rewards.load_rows(f"gsm8k={tmp_path}/train-00001-of-00003.{kind}", "test")) == 1
    (tmp_path / f"train-00001-of-00003.{kind}").unlink()
    with pytest.raises(rewards.DataError, match=f"or all shards.*train-00000-of-00003.{kind}"):
        rewards.load_rows(f"gsm8k={tmp_path}", "train")
    save(f"train.{kind}", numbered(8))
    assert [row["question"] for row in rewards.load_rows(f"gsm8k={tmp_path}", "train")] == ["8?"]


@pytest.mark.parametrize("content, says", [
    ('[{"question": "a"}]', "row 1: column 'answer'"), ("5", "int"), ('{"a": 1}', "row 1: a row must be an object"),
    ("[1]", "row 1"), ("[]", "no rows"), ('[\n{"question": "a",,\n', "line 2 column"), ("", "cannot be read"),
    ("[" * 100_000, "recursion"), ('[{"question": "a\\ud800", "answer": "#### 1"}]', "surrogates"), ("\xff", "cannot")])
def test_a_bad_json_file_gets_one_line_that_names_it(content, says, tmp_path):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(rewards.DataError, match=says) as error:
        rewards.load_rows(f"gsm8k={tmp_path}/train.json", "train")
    assert "train.json" in str(error.value) and "\n" not in str(error.value)


GOOD = json.dumps(ROWS["gsm8k"])


def arc_row(labels, key, texts=("a", "b")):
    choices = {"text": list(texts), "label": labels}
    return json.dumps({"question": "a", "choices": choices, "answerKey": key}) + "\n"


def code_row(*tests, setup=""):
    return json.dumps({"text": "a", "test_list": tests, "test_setup_code": setup}) + "\n"


@pytest.mark.parametrize("task, content, says", [
    ("gsm8k", GOOD + "\n" + GOOD[:-3] + "\n", "line 2, column"),
    ("gsm8k", "", "no rows"),
    ("gsm8k", "\n \n", "no rows"),
    ("gsm8k", "[1]\n", "line 1"),
    ("gsm8k", "{}\n", "'question'"),
    ("gsm8k", '{"question": "a"}\n', "'answer'"),
    ("gsm8k", '{"question": "a", "answer": 5}\n', "'answer'"),
    ("gsm8k", '{"question": "a", "answer": "none"}\n', "'answer'"),
    ("gsm8k", '{"question": "a", "answer": "#### 1/2"}\n', "'answer'"),
    ("gsm8k", '{"question": "a\\ud800", "answer": "#### 1"}\n', "line 1"),
    ("gsm8k", '{"question": "a", "answer": "#### 1", "note": {"\\udfff": 1}}\n', "line 1"),
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
    ("countdown", json.dumps({"nums": [1] * 101, "target": 101}) + "\n", "200 characters"),
    ("math", '{"problem": "a"}\n', "'answer'"),
    ("math", '{"problem": "a", "solution": 5}\n', "boxed"),
    ("math", '{"problem": "a", "solution": ["\\\\boxed{1}"]}\n', "boxed"),
    ("math", '{"answer": "a"}\n', "'problem'"),
    ("math", '{"problem": "a", "answer": ""}\n', "'answer'"),
    ("math", '{"problem": "a", "answer": "  "}\n', "'answer'"),
    ("math", '{"problem": "a", "answer": ["18"]}\n', "'answer'"),
    ("math", '{"problem": "a", "answer": true}\n', "'answer'"),
    ("math", '{"problem": "a", "answer": NaN}\n', "'answer'"),
    *[("math", json.dumps({"problem": "a", "answer": answer, "solution": "So."}) + "\n", "'answer'")
      for answer in ("$$", r"\quad", ".", r"\boxed{}", r"$\text{ }$", r"\[\]", " , ", "{}", r"\(\; \!\).")],
    ("arc", arc_row(["A", "B"], "C"), "'answerKey'"),
    ("arc", arc_row(["A", "A"], "A"), "each label"),
    ("arc", arc_row(["A", "$1"], "$1"), "'answerKey'"),
    ("arc", arc_row(["A", ""], ""), "'answerKey'"),
    ("arc", arc_row(["A"], "A"), "'choices'"),
    ("arc", '{"question": "a", "choices": {"text": ["a"]}, "answerKey": "A"}\n', "'choices'"),
    ("code", code_row(), "'test_list'"),
    ("code", code_row(""), "'test_list'"),
    ("code", code_row("# nothing", " "), "'test_list'"),
    ("code", code_row("assert f(2) =="), "'test_list'"),
    ("code", code_row("assert f(2) == 4", setup="import"), "'test_setup_code'"),
    ("code", '{"text": "a", "test_list": "x", "test_setup_code": ""}\n', "'test_list'"),
])
def test_bad_data_gets_one_line_that_names_file_and_place(task, content, says, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_bytes(content.encode("utf-8"))
    with pytest.raises(rewards.DataError) as error:
        rewards.load_rows(f"{task}={tmp_path}", "train")
    line = str(error.value)
    assert says in line and ("train.jsonl" in line or says == "no rows") and "\n" not in line
    line.encode()


@pytest.mark.parametrize("source, says", [
    ("nothing", "no task"), ("", "no task"), ("GSM8K", "no task"), ("gsm8k:", "TASK[=PATH][:N]"),
    ("gsm8k:0", "1 or more"), ("gsm8k:-1", "1 or more"), ("gsm8k:x", "N the number"),
    ("gsm8k:1e3", "N the number"), ("gsm8k=", "TASK[=PATH][:N]"), ("gsm8k=:3", "TASK[=PATH][:N]"),
    ("gsm8k=/no/such/file.jsonl", "No such file"),
    ("gsm8k=no-such-folder", "no such file"), ("gsm8k=data/no-such-folder", "no such file"),
    ("gsm8k=./a/b", "no such file"), ("gsm8k=~nouser/x.jsonl", "No such file"),
    ("gsm8k=~nouser", "no such file"),
    ("gsm8k=\0.jsonl", "null byte"),
])
def test_bad_sources_get_one_line(source, says):
    with pytest.raises(rewards.DataError) as error:
        rewards.load_rows(source, "train")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_the_split_says_what_it_holds(tmp_path):
    write(tmp_path / "test.jsonl", [ROWS["gsm8k"]])
    with pytest.raises(rewards.DataError, match=r"no train.jsonl or train.parquet \(or all shards\), but test.jsonl"):
        rewards.load_rows(f"gsm8k={tmp_path}", "train")
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(rewards.DataError, match="must end in"):
        rewards.load_rows(f"gsm8k={tmp_path / 'x.csv'}", "train")


def test_a_set_that_the_hub_does_not_give_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("cannot reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(rewards.DataError, match="nothing: not here, nor on the hub: cannot reach the hub"):
        rewards.load_rows("gsm8k=nobody/nothing", "train")


def test_alone_beside_folders_of_its_own_name_it_loads_and_names_what_math_and_code_need(tmp_path):
    shutil.copy(rewards.__file__, tmp_path)
    for name in ("rewards", "extras", "grpo", "countdown", "data", "openai", "math_verify"):
        (tmp_path / name).mkdir()
    write(tmp_path / "train.jsonl", [ROWS["gsm8k"]])
    script = """
        import rewards
        print(len(rewards.load_rows("gsm8k=train.jsonl", "train")))
        for task in ("math", "code"):
            try:
                rewards.load_rows(f"{task}=no-such-file.jsonl", "train")
            except rewards.DataError as error:
                print(error)
        """
    rows, *lines = printed_by(script, tmp_path).splitlines()
    assert rows == "1" and len(lines) == 2
    assert "extras/mathematics.py beside rewards.py" in lines[0] and "extras/sandbox.py" in lines[1]


def test_without_math_verify_math_is_one_line_before_its_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(rewards.DataError, match="pip install math-verify"):
        rewards.load_rows("math=no-such-file.jsonl", "train")


# ------------------------------------------------------------------------------------ code
DOUBLES, CONSTANT = "def f(x):\n    return 2 * x", "def f(x):\n    return 4"
BLOCK, BAD_BLOCK = f"```python\n{DOUBLES}\n```", f"```\n{CONSTANT}\n```"
DOUBLE = {"text": "Double it.", "test_list": ["assert f(2) == 4", "assert f(5) == 10"], "test_setup_code": ""}


@pytest.mark.parametrize("text, want", [
    (f"<reasoning>a</reasoning><answer>{DOUBLES}</answer>", 1),
    (f"<reasoning>a</reasoning><answer>\n{BLOCK}\n</answer>", 1),
    (f"<reasoning>a</reasoning><answer>Here:\n{BAD_BLOCK}\nbetter:\n{BLOCK}\nDone.</answer>", 1),
    (f"<reasoning>a</reasoning><answer>{BLOCK}\nno:\n{BAD_BLOCK}</answer>", 0),
    (f"<reasoning>a</reasoning>\n{BLOCK}", 1),
    (f"<reasoning>\n{BLOCK}\n</reasoning>", 0),
    (f"<reasoning>\n{BLOCK}\n", 0),
    (f"<reasoning>a</reasoning>{DOUBLES}", 0),
    (f"<reasoning>a</reasoning><answer></answer>\n{BLOCK}", 0),
    (f"<reasoning>a</reasoning><answer>{BAD_BLOCK}</answer>\n{BLOCK}", 0),
    ("<reasoning>a</reasoning><answer>I would double x.</answer>", 0),
    (f"<reasoning>a</reasoning><answer>```python\n{DOUBLES}\n</answer>", 1),
    (f"<reasoning>a</reasoning><answer>Here:\n```python\n{DOUBLES}\n</answer>", 1),
    (f"<reasoning>a</reasoning><answer>{BAD_BLOCK}\n```python\n{DOUBLES}\n</answer>", 1),
    (f"<reasoning>a</reasoning><answer>{BLOCK}\n```python\n{CONSTANT}\n</answer>", 0),
    (f"<reasoning>a</reasoning><answer>```python\n{CONSTANT}\n\nNo:\n```python\n{DOUBLES}\n```</answer>", 1),
    (f"<reasoning>a</reasoning><answer>```python\n{DOUBLES}\n\nNo:\n```python\n{CONSTANT}\n```</answer>", 0),
    (f"<reasoning>a</reasoning><answer>```python\n{DOUBLES}```\nDone.</answer>", 1),
    (f"<reasoning>a</reasoning><answer>Code: ```python\r\n{DOUBLES}\r\n```\r\nIn ```O(1)```.</answer>", 1),
    ("<reasoning>a</reasoning><answer>1. So:\n   ```python\n   def f(x):\n     return 2 * x\n   ```</answer>", 1),
    ("<reasoning>a</reasoning><answer>\t```\n\tdef f(x):\n\t\treturn 2 * x</answer>", 1),
    (f"<reasoning>a</reasoning><answer>{DOUBLES}  # a ```fence``` in it\n```</answer>", 1),
    (f"<reasoning>a</reasoning><answer>```python\n{DOUBLES}\n```\n```python\n```</answer>", 0),
    ("<reasoning>a</reasoning><answer>```python\nreturn 2 * x\n```</answer>", 0),
    (f"<reasoning>a</reasoning>\n```python\n{DOUBLES}\n", 0)])  # without tags, it may be cut off
def test_the_last_fenced_program_of_the_answer_counts(text, want):
    assert rewards.correct("code", text, DOUBLE) == want


@pytest.mark.parametrize("unit", [
    "```", "``` ", "```\n", "```a\n", "\n```", "\n ```", " ```", "\n", "\n ", " ", "```" + " " * 999 + "x", "`", "\t", "a",
    "```a", ":```a ", "```\r", "a```\n", "\n    ```a b\n"])
def test_fences_are_found_quickly_in_any_text(unit):
    assert seconds(lambda: rewards.FENCED.findall(unit * (200_000 // len(unit)))) < 0.2
    assert seconds(lambda: rewards.FENCED.findall("```\n" + unit * (200_000 // len(unit)) + "x")) < 0.2


def test_a_batch_of_programs_keeps_its_order():
    programs = DOUBLES, CONSTANT, DOUBLES, CONSTANT, CONSTANT, DOUBLES
    texts = [f"<reasoning>a</reasoning><answer>{program}</answer>" for program in programs]
    scored = rewards.score_batch(["code"] * 6, texts, [DOUBLE] * 6)
    assert [parts["correct"] for parts in scored] == [1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("rank", ["0", "1", None])
def test_rows_without_an_answer_are_left_out_of_mathematics_and_counted(rank, tmp_path, capsys, monkeypatch):
    rows = [{"problem": "Prove it.", "solution": "Clear."}, {"problem": "1+1?", "solution": r"\boxed{2}"},
            {"problem": "Prove that.", "answer": "proof", "solution": r"So \boxed{3}"},
            {"problem": "2+2?", "answer": " ", "solution": r"\boxed{4}"}, {"problem": "?", "answer": "notfound"},
            {"problem": "Why?", "answer": "", "solution": "Clear."}, {"problem": "0?", "answer": 0, "solution": "a"}]
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    file = write(tmp_path / "m.jsonl", rows)
    kept = rewards.load_rows(f"math={file}", "train")
    assert [row["problem"] for row in kept] == ["1+1?", "2+2?", "0?"]
    assert [rewards.correct("math", completion(n), row) for n, row in zip("240", kept)] == [1, 1, 1]
    assert capsys.readouterr().err == (f"{file}: rows left out, as they have no answer: 4\n" if rank != "1" else "")
    assert len(rewards.load_rows(f"math={file}:2", "train")) == 2
    assert len(rewards.load_rows(f"math={write(tmp_path / 'all.jsonl', rows[1:2])}", "train")) == 1
    assert "all.jsonl" not in capsys.readouterr().err
    with pytest.raises(rewards.DataError, match="no rows that can be scored"):
        rewards.load_rows(f"math={write(tmp_path / 'p.jsonl', rows[:1])}", "train")


def test_several_boxes_are_the_gold_together_unless_either_is_accepted():
    row = {"problem": "?", "solution": "So $\\boxed{-2}$ and $\\boxed{\\frac{1}{2}}$, or $\\boxed{-2}$."}
    assert [rewards.math_(said, row) for said in ("1/2, -2", "-2", "1/2")] == [True, False, False]
    row = {"problem": "?", "solution": "It is $\\boxed{-3}$. Note: $\\boxed{3}$ is also accepted."}
    assert [rewards.math_(said, row) for said in ("-3", "3", "4")] == [True, True, False]
