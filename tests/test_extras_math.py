"""extras/mathematics.py: whether two answers in LaTeX are equal."""
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from extras import mathematics

HERE = Path(__file__).parent
CASES = [json.loads(line) for line in (HERE / "math_cases.jsonl").read_text().splitlines()]


def test_pairs_of_answers_get_the_verdict_they_must():
    wrong = [case for case in CASES if mathematics.equal(case["gold"], case["said"]) != case["want"]]
    assert wrong == []


@pytest.mark.parametrize("gold", [
    "\\frac{1}{2}", "x^2+1", "(3,4]", "1,-2", "\\text{east}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "x=5",
    "\\{1\\pm\\sqrt{5},-2\\}", "(0,9) \\cup (9,36)", "y = 2x + 3", "864 \\mbox{ inches}^2", "\\$32,\\!348", "2516_8",
    "90^\\circ", "\\text{(C)}", "11,\\! 111,\\! 111,\\! 100", "5x - 7y + 11z + 4 = 0", "\\cot x", "6 - 5i", ".0000672"])
def test_golds_accept_themselves_in_every_wrapping_and_reject_the_others(gold):
    for said in (gold, f"${gold}$", f"\\boxed{{{gold}}}", f"$\\boxed{{{gold}}}$.", f"\\[{gold}\\]", f" {gold}. ", f"**{gold}**"):
        assert mathematics.equal(gold, said), said
    others = ["\\frac{1}{3}", "x^2-1", "(3,4)", "[3,4]", "1,2", "\\text{west}", "7", "\\text{(D)}", "",
              "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}", f"{gold}, 77", f"77 or {gold}"]
    assert not [other for other in others if mathematics.equal(gold, other)]


def test_math_works_from_any_thread():
    with ThreadPoolExecutor(4) as threads:
        verdicts = threads.map(lambda k: mathematics.equal(f"{k}\\sqrt{{3}}", f"\\sqrt{{{3 * k * k}}}"), range(2, 14))
        assert list(verdicts) == [True] * 12


def test_math_works_in_a_forked_process_and_beside_it():
    assert mathematics.equal("2\\sqrt{5}", "\\sqrt{20}")
    if (pid := os.fork()) == 0:
        right = mathematics.equal("3\\sqrt{5}", "\\sqrt{45}") and not mathematics.equal("3\\sqrt{5}", "\\sqrt{46}")
        os._exit(0 if right else 1)
    assert mathematics.equal("4\\sqrt{5}", "\\sqrt{80}")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_comparison_that_hangs_is_ended_and_the_next_one_works(monkeypatch):
    monkeypatch.setattr(mathematics, "UNCLEAR", re.compile("never"))
    started = time.time()
    assert not mathematics.equal("18", "(((9^{99999})^{99999})^{99999})!")
    assert not mathematics.equal("18", "(10^{8})!")
    assert time.time() - started < 30
    assert mathematics.equal("5\\sqrt{5}", "\\sqrt{125}")


def test_a_worker_that_was_killed_is_replaced():
    assert mathematics.equal("5\\sqrt{7}", "\\sqrt{175}")
    for worker in mathematics.IDLE:
        worker.kill()
        worker.wait()
    while mathematics.IDLE:  # a comparison lost to a dead worker is refused, not wrong
        assert not mathematics.equal("18", f"\\sqrt{{{len(mathematics.IDLE)}}}")
    assert mathematics.equal("6\\sqrt{7}", "\\sqrt{252}")


def test_workers_end_with_their_process():
    script = ("from extras import mathematics\nassert mathematics.equal('2\\\\sqrt{3}', '\\\\sqrt{12}')\n"
              "print(mathematics.IDLE[0].pid)")
    run = subprocess.run([sys.executable, "-c", script], cwd=HERE.parent, capture_output=True, text=True, check=True)
    for _ in range(100):
        if not os.path.exists(f"/proc/{run.stdout.strip()}"):
            return
        time.sleep(0.1)
    raise AssertionError("the worker still runs")


@pytest.mark.parametrize("said", [
    *["(" * k + "18" + ")" * k for k in (30, 5000)], "(" * 9000 + "18", *["9^{" * k + "9" + "}" * k for k in (2, 3, 80)],
    "9^{9^9}", "10^{10^{10}}", "((9^{99})^{99})^{99}", "(10^8)!", "99999!", "((3!)!)!", "\\binom{100000000}{50000000}",
    *[unit * 200_000 for unit in ("{", "\\frac", "1,", "$", "\\boxed{1}", "a", "\\text{", "\\pm", "^", "or ", " ", "\n", ".")],
    *[unit * 150 for unit in ("\\frac{", "\\text{", "1,", "[(", "\\pm ", "or ", "\\sqrt", "x^", "|", "\\boxed{", "\\\\")]])
def test_hostile_mathematics_is_refused_fast(said):
    mathematics.equal("3\\sqrt{2}", "\\sqrt{18}")  # a worker is there
    started = time.time()
    assert not mathematics.equal("17", said)
    assert time.time() - started < 8
