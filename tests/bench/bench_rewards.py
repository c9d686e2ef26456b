"""Scores a second: countdown and gsm8k in one process, math and code over all cores.

    python tests/bench/bench_rewards.py
    python tests/bench/bench_rewards.py GSM8K/test.jsonl    # whole worked solutions, under 22 forms of answer
"""
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import rewards  # noqa: E402


def countdown_items(n, seed=0):
    """Completions as a model writes them: a few tries, and an answer that is right about half the time."""
    noise = random.Random(seed)
    items = []
    for _ in range(n):
        a, b, c = (noise.randint(1, 99) for _ in range(3))
        lines = [f"{a}+{b}={a + b} {a + b}*{c}={(a + b) * c} no" for _ in range(noise.randint(0, 2))]
        lines.append(f"{a}*{b}={a * b} {a * b}+{c}={a * b + c} ok")
        answer = f"{a}*{b}+{c}" if noise.random() < 0.5 else f"({a}+{b})*{c}"
        text = "<reasoning>" + "\n".join(lines) + f"</reasoning>\n<answer>{answer}</answer>"
        items.append(("countdown", text, {"nums": [a, b, c], "target": a * b + c}))
    return items


def gsm8k_items(n, seed=0):
    noise = random.Random(seed)
    items = []
    for _ in range(n):
        a, b = noise.randint(2, 999), noise.randint(2, 99)
        text = (f"Each of the {b} boxes holds {a} pens. So there are {a} * {b} = {a * b} pens in all. "
                f"Two of them break, which leaves {a * b} - 2 = {a * b - 2}.")
        answer = noise.choice([f"{a * b - 2}", f"${a * b - 2}", f"{a * b - 2:,} pens", f"{a * b}"])
        items.append(("gsm8k", f"<reasoning>{text}</reasoning>\n<answer>{answer}</answer>",
                      {"question": "How many?", "answer": f"#### {a * b - 2}"}))
    return items


FORMS = [  # of an answer, 17 right ones first
    "{0}", "${0}", "\\${0}", "{0}.", "{0} dollars", "{0:,}", "{0:,}.00", "x = {0}", "The answer is {0}.", "{0}%",
    "**{0}**", "\\boxed{{{0}}}", "$\\boxed{{{0}}}$", "\\text{{{0}}}", "{0} apples", "{0}.0", "{0} miles per hour",
    "1{0}", "-{0}", "{0} (2 steps)", "{0}, 7", "about {0}"]


def worked_items(file, alone=True):
    """A row's worked solution under each form of answer. alone: no reasoning stands twice, as in training a
    real model; else each stands under all forms, as where completions repeat."""
    items = []
    for i, line in enumerate(open(file, encoding="utf-8")):
        row = json.loads(line)
        reasoning, gold = rewards.TASKS["gsm8k"]["worked"](row)
        for j, form in enumerate(FORMS):
            case = f"Case {i}, {j}. " * alone
            answer = form.format(rewards.number(gold))
            text = f"<reasoning>{case}{reasoning}</reasoning>\n<answer>{answer}</answer>"
            items.append(("gsm8k", text, row))
    return items


def math_items(n, seed=0):
    noise = random.Random(seed)
    pairs = [
        ("{a}\\sqrt{{{b}}}", "\\sqrt{{{c}}}"),
        ("x^2+{a}x", "x(x+{a})"),
        ("\\frac{{{a}}}{{{b}}}", "{a}/{b}"),
        ("({a},{b}]", "({a},{b}]"),
        ("{a}\\pi", "\\pi\\cdot {b}"),
    ]
    items = []
    for _ in range(n):
        a, b = noise.randint(2, 99), noise.choice([2, 3, 5, 7])
        gold, said = (text.format(a=a, b=b, c=a * a * b) for text in noise.choice(pairs))
        items.append(("math", f"<reasoning>So.</reasoning>\n<answer>{said}</answer>",
                      {"problem": "Find it.", "answer": gold}))
    return items


def code_items(n):
    row = {"text": "Double it.", "test_setup_code": "",
           "test_list": ["assert f(2) == 4", "assert f('a') == 'aa'", "assert f([]) == []"]}
    programs = [f"```python\ndef f(x):\n    return {2 + i % 2} * x  # {i}\n```" for i in range(n)]
    return [("code", f"<reasoning>So.</reasoning>\n<answer>{program}</answer>", row) for program in programs]


def rate(items):
    """-> scores a second by the clock, scores a second of this process's CPU time, share that is right."""
    clock, processor = time.perf_counter(), time.process_time()
    parts = rewards.score_batch(*zip(*items))
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    return len(items) / clock, len(items) / processor, sum(part["correct"] for part in parts) / len(parts)


if __name__ == "__main__":
    tasks = [("countdown", countdown_items(20_000)), ("gsm8k", gsm8k_items(20_000))]
    for file in sys.argv[1:]:
        tasks += [("worked", worked_items(file)), ("repeated", worked_items(file, alone=False))]
    for name, items in tasks:
        runs = [rate(items) for _ in range(3)]
        by_clock, by_processor, right = (sorted(column)[1] for column in zip(*runs))
        print(f"{name:10} {by_clock:9,.0f} scores a second by the clock, {by_processor:9,.0f} a second of "
              f"processor time, {right:.2f} right")
    rate(math_items(8, seed=9))  # starts the workers
    for name, items in (("math", math_items(400)), ("code", code_items(100))):
        by_clock, _, right = rate(items)
        print(f"{name:10} {by_clock:9,.0f} scores a second by the clock, over all cores, {right:.2f} right")
