"""Every case file next to this test: completions with the score they must get.

`want` holds what is asked for: a part's value (a pair is a range), `answer_strict`, `correct_flexible`. `expand` {"@@1": [unit, n]}
stands for the unit n times in place of `@@1`.
"""

import json
from pathlib import Path

import pytest

import rewards

CASES = [
    json.loads(line)
    for file in sorted(Path(__file__).parent.glob("reward_cases*.jsonl"))
    for line in file.read_text().splitlines()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case_gets_the_score_it_must(case):
    task, text, row, style, want = case["task"], case["text"], case["row"], case["style"], dict(case["want"])
    for mark, (unit, n) in case.get("expand", {}).items():
        text = text.replace(mark, unit * n)
    if "answer_strict" in want:
        said = rewards.answer(text, style)
        assert (said and said.strip()) == want.pop("answer_strict")
    if "correct_flexible" in want:
        assert rewards.correct(task, text, row, style, strict=False) == want.pop("correct_flexible")
    parts = rewards.score(task, text, row, style, n_tokens=case.get("n_tokens"))
    for part, value in want.items():
        low, high = value if isinstance(value, list) else (value, value)
        assert low <= parts[part] <= high, part
