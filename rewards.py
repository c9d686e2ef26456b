"""What a task asks and how an answer is scored. Imports neither torch nor transformers.

A completion (`text`, special tokens stripped) has one of two styles, named after the tag of its reasoning:
    reasoning: <reasoning>...</reasoning><answer>...</answer>      think: <think>...</think><answer>...</answer>

Which answer counts
1. The reasoning ends at the last closing reasoning tag; what follows is the tail. Without reasoning tags all is tail.
2. A reasoning block that is opened and never closed offers no answer.
3. The answer is the last closed <answer>...</answer> of the tail. Tags are literal: `<Answer>`, `<answer id=1>` are text.
4. An empty last block is an empty answer, and wrong.
5. strict=False falls back, in the same tail, to the last \\boxed{}, then the last `#### x`, then "answer is x", then the
   last number (arc: the last label). Training is strict; evaluation reports both.

Parts of a score, before their weights
    correct      0 or 1    the rules of each task stand at its function below
    format       0 or 1    one non-empty reasoning block, one non-empty answer block, white space; no tag repeated or nested
    length      -1 to 0    0 up to 500 tokens, falling linearly to -1 at 800; 0 where n_tokens is not given
    process      0 to 1    share of the distinct equations in the reasoning that hold; 0 where there is none
    efficiency   0 to 1    countdown, when correct: length of the shortest way to write that expression / length as written
    reward                 their weighted sum. Where correct weighs at least as much as all others together, no wrong answer
                           scores above a right one.

Nothing that a model can write raises, hangs, executes or grows memory; what cannot be scored is 0.
A new task is one function, `grade(said, row) -> bool`, and one row of TASKS.
"""
import math
import os
import re
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice

import arithmetic
import mathematics
import sandbox
from mathematics import last_box
from rows import DataError, check, read as read_rows

STYLES = ("reasoning", "think")
WEIGHTS = {"correct": 1.0, "format": 0.5, "length": 0.1, "process": 0.0, "efficiency": 0.0}
TAGS = {style: re.compile(rf"(</?(?:{style}|answer)>)") for style in STYLES}
LENGTH = (500, 800)  # tokens that cost nothing, tokens at which the length part has fallen to -1


# ---------------------------------------------------------------------------------------------- which answer
def tail(text, style):
    """The part of a completion that may hold its answer; None where the reasoning was never closed."""
    after = text.rpartition(f"</{style}>")[2]
    return None if f"<{style}>" in after else after


def answer_block(text):
    """The last closed <answer> block: its opening tag is the last one that has a closing tag behind it."""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    return None if start < 0 else text[start + 8:text.find("</answer>", start)].strip()


# 1,234.5 in true groups of three, 1234.5, .5
NUMERAL = r"[1-9][0-9]{0,2}(?:(,|\{,\}| )[0-9]{3}(?:\1[0-9]{3})*)(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
# with its sign and currency, and not a part of a word (v2) or of a difference (10-5)
LAST_NUMBER = rf"(?:(?<![\w.)])[-+\u2212])?(?:\\?\$)?(?<![\w.])(?:{NUMERAL})"


def answer(text, style="reasoning", strict=True, labels=None):
    """What a completion offers as its answer, or None. `labels`: those of a multiple-choice row, for strict=False."""
    text = tail(text, style)
    said = None if text is None else answer_block(text)
    if strict or text is None or said is not None:
        return said
    text = re.sub("</?answer>", "\n", text)[-10_000:]  # stray tags; no answer stands further from the end
    if (box := last_box(text)) is not None:
        return box.strip()
    # to the end of the line; to the end of the sentence, for which a full stop has white space behind it
    for pattern in (r"####[ \t]*(.*)", r"(?i:answer is)(?:\s*:)?\s*(?=\S)((?:[^.\n]|\.(?=\S))+)"):
        if found := re.findall(pattern, text):
            return found[-1].strip()
    last = LAST_NUMBER if labels is None else rf"(?<!\w)(?:{'|'.join(map(re.escape, labels))})(?!\w)"
    found = [match[0] for match in re.finditer(last, text)]
    return found[-1] if found else None


# ---------------------------------------------------------------------------------------------- countdown
UNUSUAL_SPACE, DIGITS = re.compile(r"[^\S ]"), re.compile("[0-9]+")


def expression(said, row):
    """(value, shortest text, text) of a countdown answer that keeps to the rules, whatever its value; else None."""
    if len(said) > 2000:  # before the signs are replaced; what counts is the length after
        return None
    said = UNUSUAL_SPACE.sub(" ", arithmetic.plain_signs(said)).strip()
    body, equals, result = said.partition("=")
    if not 0 < len(said) <= 200 or "." in body or equals and result.strip() != str(row["target"]):
        return None
    if sorted(map(int, DIGITS.findall(body))) != sorted(row["nums"]):
        return None
    found = arithmetic.evaluate(body)
    return found and (*found, said)


def countdown(said, row):
    """One expression that uses each given number exactly once and equals the target.

    - over non-negative ASCII integers without leading zeros, + - * /, unary minus and parentheses; at most 200 characters
    - nothing else: no unary plus, powers, `//`, decimals, exponents, hex, `_`, names, calls, comments, `\\boxed`, `\\frac`, `$`
    - signs first: `×`, `·`, `\\times`, `\\cdot` are `*`; `÷`, `\\div` are `/`; U+2212 is `-`; any Unicode space is a space
    - it may end in `= t`, t being the true target
    - its value, an exact rational, equals the target
    """
    found = expression(said, row)
    return found is not None and found[0] == row["target"]


# ---------------------------------------------------------------------------------------------- gsm8k
DECORATION = re.compile(r"\*+|__|`|\\(?:boxed|text(?:bf|rm)?|math(?:bf|rm)|boldsymbol)(?![a-z])"
                        r"|\\?[$%]|[€£¥₹₩₽¢{}()]|\\[()\[\],;:! ]")
NO_UNIT = frozenset("""or and not no isn is to than plus minus times over point squared cubed factorial negative wrong
    half dozen dozens hundred hundreds thousand thousands lakh lakhs million millions crore crores billion billions trillion
    k K M bn mn e i n x y z pi π st nd rd th""".split())  # after a number these change its value, or unsay it
WORD = r"[^\W\d_]{1,20}"
BEFORE = re.compile(rf"(?:{WORD}(?: {WORD}){{0,5}} ?(?:=|:| is))? ?(?:USD?)? ?([-+]?)")  # `x =`, `The cost is -`
UNIT = re.compile(rf"°?(?:[°'/-]? ?{WORD}\.?){{0,6}} ?\.?")  # ` apples per day.`


@lru_cache(4096)
def one_number(text):
    """number(), which bounds what this cache may hold."""
    if re.fullmatch("-?[0-9]+", text):
        return int(text)
    if not text.isascii() and any(c.isnumeric() and not c.isascii() for c in text):
        return None
    text = re.sub(r"\s", " ", text.strip().replace("\u2212", "-").replace("\\!", ""))
    text = re.sub(r"(?<=[0-9])(?:(\{,\})|\\,)(?=[0-9])", lambda match: "," if match[1] else " ", text)
    text = DECORATION.sub("\0", text)  # a mark, so that what stood on its two sides is not glued together
    found = list(re.finditer(NUMERAL, text))
    if len(found) != 1:
        return None
    before, after = (part.replace("\0", " ").strip() for part in (text[:found[0].start()], text[found[0].end():]))
    sign, unit = BEFORE.fullmatch(before), UNIT.fullmatch(after)
    hedged = re.search(r"\b(?:not|no|or|and|than)\b", before) or not NO_UNIT.isdisjoint(re.findall(r"\w+", after))
    if not sign or not unit or hedged:
        return None
    return Fraction(sign[1] + re.sub("[, ]", "", found[0][0]))


def number(text):
    """The exact value of a text that holds exactly one number, or None."""
    return one_number(text) if len(text) <= 200 else None


def gsm8k_gold(row):
    return number(row["answer"].rpartition("####")[2].strip())


def gsm8k(said, row):
    """Exactly one number, equal to the gold as an exact decimal: 18 = 18.00 = +18, not -18.

    - not part of the number: currency signs (`-$18` too), `%`, their escaped forms, bold, `\\boxed`, `\\text{}`, a unit,
      `x =`, a final full stop, thousands separators in true groups of three (`1,000`, `1{,}000`, `1 000`)
    - wrong: `1,0,0,0`, `18 (2 steps)`, `17, 18, 19`, `9+9`, `36/2`, `1.8e1`, words (`eighteen`, `18 thousand`, `18 or more`),
      non-ASCII digits, more than 200 characters
    - U+2212 is a minus
    """
    value = number(said)
    return value is not None and value == gsm8k_gold(row)


# ---------------------------------------------------------------------------------------------- math, arc, code
def math_gold(row):
    return str(row["answer"]) if row.get("answer") is not None else last_box(str(row.get("solution")))


def math_(said, row):
    """Equal to the gold as mathematics.

    - normalised LaTeX first, then math-verify in a worker process that is killed after 2 s: see mathematics.py
    - where the gold is one value, a list or set of guesses, `18 or 20`, two boxes, or a false equation is wrong; `x=5` is 5
    - a numeric answer must be exact, not rounded; it may be written in all the ways of gsm8k's
    """
    gold = math_gold(row)
    product = re.search(r"[0-9)}]\s*[a-zA-Z]{1,2}(?![a-zA-Z])|[0-9][a-zA-Z]", said[:200])
    value = None if product or "=" in gold else number(said)  # `5r`, `2 ab` are no numbers with units; y=5 is not x=5
    return value is not None and value == number(mathematics.tidy(gold)) or mathematics.equal(gold, said)


MARKS = re.compile(r"\\(?:boxed|text(?:bf|rm)?|math(?:bf|rm))\{|\\[()\[\]]|[*${}`]")


def bare(text):
    """A choice's text without bold, box, backticks, case, final full stop and extra white space."""
    return " ".join(MARKS.sub("", text).casefold().split()).rstrip(". ")


def arc(said, row):
    """Exactly one of the row's labels (`B`, `(B)`, `B.`, `B) its text`, `B - its text`), or exactly one choice's text."""
    if len(said) > 2000:
        return False
    choices = dict(zip(row["choices"]["label"], row["choices"]["text"]))
    labels = "|".join(map(re.escape, choices))
    label = re.fullmatch(rf"\(?({labels})\)?(?:(?:[.:),]\s*|\s+-?\s*)(.*))?", MARKS.sub("", said), re.S)
    if label and (not label[2] or bare(label[2]) == bare(choices[label[1]])):
        return label[1] == row["answerKey"]
    return [name for name, text in choices.items() if bare(text) == bare(said)] == [row["answerKey"]]


FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", re.S | re.M)


def code(said, row):
    """The last fenced block of the answer (of the tail, if there is no answer tag), or the bare answer, passes every test.

    How it is run, and what that does not protect from: see sandbox.py.
    """
    blocks = FENCED.findall(said[-200_000:]) or [re.sub(r"\A\s*```.*", "", said)]
    return sandbox.passes(blocks[-1], row["test_list"], row.get("test_setup_code") or "")


# ---------------------------------------------------------------------------------------------- the other parts
def format_part(text, style):
    """1.0: one non-empty reasoning block, then one non-empty answer block, and white space; no tag repeated or nested."""
    pieces = TAGS[style].split(text)
    blank = [not piece or piece.isspace() for piece in pieces[::2]]
    in_order = pieces[1::2] == [f"<{style}>", f"</{style}>", "<answer>", "</answer>"]
    return float(in_order and blank == [True, False, True, False, True])


def length_part(n_tokens, length=LENGTH):
    """0 up to length[0] tokens, falling linearly to -1 at length[1]; 0 where n_tokens is None."""
    over = 0 if n_tokens is None else n_tokens - length[0]
    return -min(1.0, over / max(length[1] - length[0], 1e-9)) if over > 0 else 0.0


def process_part(text, style, nums=None):
    """Share of the distinct equations of the reasoning that are true, `3+5=8`; countdown: and whose operands are at hand."""
    reasoning = text.rpartition(f"</{style}>")[0]
    return arithmetic.share_true(reasoning[:20_000].rpartition(f"<{style}>")[2], nums) if "=" in reasoning else 0.0


def efficiency_part(said, row):
    """Countdown, for a right answer: length of the shortest way to write it / its length: needless parentheses cost."""
    _, shortest, written = expression(said, row)
    return min(1.0, len(shortest) / len(written))


# ---------------------------------------------------------------------------------------------- scores
def grade(task, text, row, style, strict):
    """(1.0 where the answer is right, else 0.0; the answer). Programs may also stand in the tail, without an answer tag."""
    said = answer(text, style, strict or task == "code", row["choices"]["label"] if task == "arc" else None)
    if task == "code" and said is None and FENCED.search(rest := tail(text, style) or ""):
        said = rest
    return float(bool(said) and TASKS[task]["grade"](said, row)), said


def correct(task, text, row, style="reasoning", strict=True):
    """1.0 where the answer is right, else 0.0."""
    return grade(task, text, row, style, strict)[0]


def score(task, text, row, style="reasoning", weights=None, n_tokens=None, length=LENGTH, strict=True):
    """Every part by name, and their weighted sum "reward". Parts that `weights` does not name weigh nothing."""
    right, said = grade(task, text, row, style, strict)
    parts = {
        "correct": right,
        "format": format_part(text, style),
        "length": length_part(n_tokens, length),
        "process": process_part(text, style, row["nums"] if task == "countdown" else None),
        "efficiency": efficiency_part(said, row) if right and task == "countdown" else 0.0,
    }
    weights = WEIGHTS if weights is None else weights
    # summed exactly and rounded, so that rounding cannot put a wrong answer above a right one
    parts["reward"] = round(math.fsum(weight * parts[part] for part, weight in weights.items()), 9)
    return parts


def score_batch(tasks, texts, rows, style="reasoning", weights=None, n_tokens=None, length=LENGTH, strict=True):
    """score() for many, in their order; code and math, which wait for other processes, on all cores."""
    n_tokens = [None] * len(texts) if n_tokens is None else n_tokens
    items = list(zip(tasks, texts, rows, n_tokens, strict=True))

    def one(item):
        return score(*item[:3], style, weights, item[3], length, strict)
    slow = [i for i, item in enumerate(items) if TASKS[item[0]].get("slow")]
    if len(slow) < 2:
        return [one(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, which share the cores
    cores = len(os.sched_getaffinity(0)) // processes
    with ThreadPoolExecutor(max(1, min(cores, len(slow)))) as threads:
        waiting = {i: threads.submit(one, items[i]) for i in slow}
        return [waiting[i].result() if i in waiting else one(item) for i, item in enumerate(items)]


# ---------------------------------------------------------------------------------------------- what a task asks
FORM = """{0}

First reason step by step between <{1}> and </{1}>. Then give the answer alone between <answer> and </answer>:
<{1}>\nyour reasoning\n</{1}>\n<answer>\nyour answer\n</answer>"""


def arc_question(row):
    choices = zip(row["choices"]["label"], row["choices"]["text"])
    return "\n".join([row["question"], *(f"{label}) {text}" for label, text in choices)])


def arc_gold(row):
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    return row["answerKey"] if row["answerKey"] in labels and len(labels) == len(texts) else None


def code_question(row):
    """MBPP's own prompt: the task, then the tests, without which the function's name would be a guess."""
    return f"{row['text']}\nYour code should pass these tests:\n\n" + "\n".join(row["test_list"])


# columns      name -> type, a list of one type, or a dict of columns
# data         the default PATH of a source, and after a blank the hub's configuration
# instruction  the system turn, to which messages() adds the form; ask: row -> the user turn, the problem alone
# grade        (said, row) -> right or not; slow: it waits for other processes, so that score_batch() runs several at once
# gold         row -> the right answer, None or "" where the row cannot be scored; needs: what load_rows() says then
TASKS = {
    "countdown": {
        "columns": {"nums": [int], "target": int}, "data": "data/countdown", "grade": countdown,
        "ask": lambda row: f"Numbers: {row['nums']}\nTarget: {row['target']}",
        "gold": lambda row: row["target"] if min(row["nums"], default=-1) >= 0 else None,
        "needs": "'nums' must hold numbers of 0 or more",
        "instruction": "You solve Countdown number problems. Combine the given numbers with +, -, *, / and parentheses into one "
                       "expression that equals the target. Use each number exactly once. The answer is the expression alone.",
    },
    "gsm8k": {
        "columns": {"question": str, "answer": str}, "data": "openai/gsm8k main", "grade": gsm8k,
        "gold": gsm8k_gold, "needs": "'answer' must end in one number, as in '#### 72'", "ask": lambda row: row["question"],
        "instruction": "You solve grade-school math word problems. The answer is one number alone, without unit or explanation.",
    },
    "math": {
        "columns": {"problem": str}, "data": "HuggingFaceH4/MATH-500", "grade": math_, "slow": True,
        "ask": lambda row: row["problem"],
        "gold": math_gold, "needs": "needs a column 'answer', or a 'solution' with a \\boxed{}",
        "instruction": "You solve mathematics problems. The answer is the final result alone, in LaTeX, simplified and exact.",
    },
    "arc": {
        "columns": {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}, "grade": arc,
        "data": "allenai/ai2_arc ARC-Challenge", "ask": arc_question,
        "gold": arc_gold, "needs": "'answerKey' must be one of the labels, and 'choices' must hold as many labels as texts",
        "instruction": "You answer multiple-choice science questions. The answer is the label of the right choice alone.",
    },
    "code": {
        "columns": {"text": str, "test_list": [str], "test_setup_code": str}, "data": "google-research-datasets/mbpp",
        "grade": code, "slow": True, "ask": code_question,
        "gold": lambda row: row["test_list"] or None, "needs": "'test_list' must not be empty",
        "instruction": "You write Python programs. The answer is the whole program in one fenced block (```python), with its imports, "
                       "without tests or examples of use.",
    },
}


def messages(task, row, style="reasoning"):
    """The chat prompt: all instructions in the system turn, the problem alone in the user turn."""
    return [{"role": "system", "content": FORM.format(TASKS[task]["instruction"], style)},
            {"role": "user", "content": TASKS[task]["ask"](row)}]


# ---------------------------------------------------------------------------------------------- rows
def ready(task):
    """What the task's grader still needs on this machine, or None."""
    if task == "math" and not find_spec("math_verify"):
        return "needs `pip install math-verify`"
    if task == "code" and not sandbox.passes("def f(): return 1", ["assert f() == 1"]):
        return "this machine does not let sandbox.py run programs (it is made for Linux)"
    return None


def load_rows(source, split):
    """Rows of a SOURCE, `TASK[=PATH][:N]`, each checked and with its "task" added; DataError says what is wrong with one.

    split: train, val or test. PATH is a .jsonl or .parquet file (whatever the split), a folder that holds {split}.jsonl or
    {split}.parquet, or else a hub id; without PATH the task's default. N takes the first N rows.
    """
    spec, colon, count = source.rpartition(":") if ":" in source else (source, "", "")
    task, equals, path = spec.partition("=")
    if task not in TASKS:
        raise DataError(f"{source}: no task '{task}'; a source is TASK[=PATH][:N], TASK one of {', '.join(TASKS)}")
    if colon and not re.fullmatch("0*[1-9][0-9]{0,11}", count) or equals and not path:
        raise DataError(f"{source}: a source is TASK[=PATH][:N], N the number of rows to take, 1 or more")
    default, _, config = TASKS[task]["data"].partition(" ")
    path = path or default
    found = read_rows(path, config or None if path == default else None, split)
    rows = []
    for place, row in islice(found, int(count) if colon else None):
        check(row, TASKS[task]["columns"], place)
        if TASKS[task]["gold"](row) in (None, ""):
            raise DataError(f"{place}: {TASKS[task]['needs']}")
        rows.append({**row, "task": task})
    if missing := ready(task):
        raise DataError(f"{source}: {missing}")
    return rows
