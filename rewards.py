"""What a task asks and how an answer is scored. Imports neither torch nor transformers.

A completion (`text`, special tokens stripped) has one of two styles, named after the tag of its reasoning:
`<reasoning>...</reasoning><answer>...</answer>` or `<think>...</think><answer>...</answer>`.

Which answer counts
1. The tail: what follows the last closing reasoning tag; all without such tags; nothing if one stays open.
2. The answer is the last closed <answer>...</answer> of the tail; an empty one is wrong. Tags are literal.
3. strict=False falls back, in the same tail, to the last \\boxed{}, the last `#### x`, "answer is x", the
   last number (arc: label), in this order. Training is strict; evaluation reports both.

Parts of a score; its "reward" is their sum, weighted by WEIGHTS
    correct      0 or 1   the rules of each task stand at its function below
    format       0 or 1   one non-empty reasoning block, one non-empty answer block, and white space
    length      -1 to 0   0 up to 500 tokens, falling linearly to -1 at 800; 0 where n_tokens is not given
    process      0 to 1   share of the distinct equations in the reasoning that are true; 0 without any
    efficiency   0 to 1   countdown, when correct: length of the shortest way to write it / length as written
    tags         0 to 1   a quarter for each of the four tags, each standing once; 0 where one is repeated
Where correct weighs at least as much as all others together, no wrong answer scores above a right one.
Nothing that a model can write raises, hangs, executes or grows memory; what cannot be scored is 0.
"""
import ast
import json
import math
import operator
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache, reduce
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

STYLES = ("reasoning", "think")
WEIGHTS = {"correct": 1.0, "format": 0.3, "length": 0.0, "process": 0.1, "efficiency": 0.1, "tags": 0.0}
LENGTH = (500, 800)  # tokens that cost nothing, tokens at which the length part has fallen to -1
TAGS = {style: re.compile(rf"(</?(?:{style}|answer)>)") for style in STYLES}

class DataError(Exception):
    """Data or weights that cannot be used, in one line that says where and why."""


# ------------------------------------------------------------------------------------ which answer
NUMERAL = (r"([1-9][0-9]{0,2}(?P<comma>,|\{,\}| )[0-9]{3}(?:(?P=comma)[0-9]{3})*(?![0-9])(?:\.[0-9]+)?"
           r"|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")  # 1,234.5 in true groups of three, 1234.5, .5
LAST_NUMBER = rf"((?:(?<![\w.)])[-+\u2212])?(?:\\?\$)?(?<![\w.]){NUMERAL})"  # not the 2 of v2

def rewriter(*rules):
    """A function that applies each (pattern, replacement) to a text in turn."""
    rules = [(re.compile(pattern).sub, by) for pattern, by in rules]
    return lambda text: reduce(lambda done, rule: rule[0](rule[1], done), rules, text)

def tail(text, style):
    after = text.rpartition(f"</{style}>")[2]
    return None if f"<{style}>" in after else after

def last_box(text):
    """What the \\boxed{...} that closes last holds, braces balanced; None where there is none."""
    opened, found = [], None
    for match in re.finditer(r"(\\boxed\s{0,9})?\{|\}|\\.", text):
        if match[0][-1] == "{" and match[0] != "\\{":
            opened.append((match[1], match.end()))
        elif match[0] == "}" and opened:
            box, start = opened.pop()
            found = text[start:match.start()] if box else found
    return found

def answer(text, style="reasoning", strict=True, labels=None):
    """What a completion offers as its answer, or None. `labels`: a multiple choice's, if not strict."""
    text = tail(text, style)
    if text is None:
        return None
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))  # the last that is closed
    if start >= 0:
        return text[start + 8:text.find("</answer>", start)].strip()
    if strict:
        return None
    text = re.sub("</?answer>", "\n", text)[-10_000:]  # stray tags; no answer stands further from the end
    if (box := last_box(text)) is not None:
        return box.strip()
    last = LAST_NUMBER if labels is None else rf"(?<!\w)({'|'.join(map(re.escape, labels))})(?!\w)"
    # to the end of the line; to the end of the sentence, for which a full stop has white space behind it
    for pattern in (r"####[ \t]*(.*)", r"(?i:answer is)(?:\s*:)?\s*(?=\S)((?:[^.\n]|\.(?=\S))+)", last):
        if found := [match[1] for match in re.finditer(pattern, text)]:
            return found[-1].strip()
    return None


# ------------------------------------------------------------------------------------ countdown
SIGNS = ("[×·]", "*"), (r"\\times|\\cdot", "*"), ("÷", "/"), (r"\\div", "/"), ("\u2212", "-")
plain_signs = rewriter(*SIGNS)
ARITHMETIC = re.compile(r"(?!.*(?<![0-9.])0[0-9])[-+*/(). 0-9]+")  # no leading zeros
OPERAND = re.compile("[0-9.]+")
OPERATORS = {ast.Add: (operator.add, 1, True), ast.Sub: (operator.sub, 1, False),  # rank, is a?(b?c) a?b?c
             ast.Mult: (operator.mul, 2, True), ast.Div: (lambda a, b: Fraction(a) / b, 2, False)}

@lru_cache(4096)
def evaluate(text, limit=200):
    """Numbers, + - * /, unary minus, parentheses -> (exact value, length of its shortest form); else None."""
    if len(text) > limit or not ARITHMETIC.fullmatch(text):
        return None
    if text.isdigit():
        return int(text), len(text)
    try:
        number, length, _ = value(ast.parse(text.strip(), mode="eval").body)  # read, not executed
        return number, length - text.count("--")  # 2--3 is a padded 2+3
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None

def value(node):
    """A parsed expression -> (exact value, length without needless parentheses, how tightly it binds)."""
    if type(node) is ast.Constant:
        return node.value if type(node.value) is int else Fraction(repr(node.value)), len(str(node.value)), 4
    if type(node) is ast.UnaryOp and type(node.op) is ast.USub:
        a, length, rank = value(node.operand)
        return -a, length + (3 if rank == 1 else 1), 2 if rank == 2 else 3
    if type(node) is not ast.BinOp or type(node.op) not in OPERATORS:
        raise ValueError("not arithmetic")
    apply, rank, regroups = OPERATORS[type(node.op)]
    (a, left, left_rank), (b, right, right_rank) = value(node.left), value(node.right)
    bracketed = (left_rank < rank) + (right_rank < rank or right_rank == rank and not regroups)
    return apply(a, b), left + 1 + right + 2 * bracketed, rank

def expression(said, row):
    """(value, efficiency) of a countdown answer that keeps to the rules, whatever its value; else None."""
    if len(said) > 2000:  # before the signs are replaced; what counts is the length after
        return None
    said = re.sub(r"[^\S ]", " ", plain_signs(said)).strip()
    body, equals, result = said.partition("=")
    if not 0 < len(said) <= 200 or "." in body or equals and result.strip() != str(row["target"]):
        return None
    found = evaluate(body) if sorted(map(int, OPERAND.findall(body))) == sorted(row["nums"]) else None
    return found and (found[0], min(1.0, found[1] / len(said)))

def countdown(said, row):
    """One expression that uses each given number exactly once and equals the target.

    - non-negative ASCII integers without leading zeros, + - * /, unary minus, parentheses; 200 characters; no
      unary plus, powers, `//`, decimals, exponents, `_`, names, calls, comments, `\\boxed`, `\\frac`
    - `×`, `·`, `\\times`, `\\cdot` are `*`, `÷`, `\\div` are `/`, U+2212 is `-`, any Unicode space is a space
    - it may end in `= t`, t being the true target; its value, an exact rational, equals the target
    """
    found = expression(said, row)
    return found is not None and found[0] == row["target"]


# ------------------------------------------------------------------------------------ gsm8k
PLAIN = re.compile(r"\s*\$?([-+]?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)\s*")  # $1,234.50
undecorated = rewriter(
    (r"\s", " "), (r"([0-9][^0-9^=]{0,40}[a-zA-Z]\}?)(?:\^\{?[23]\}?(?![0-9])|[²³])", r"\1"),  # 18 m^2
    (r"(?<=[0-9])\{,\}(?=[0-9])", ","), (r"(?<=[0-9])\\,(?=[0-9])", " "),  # then a mark: it glues nothing
    (r"\*+|__|`|(?<=[0-9}])~|\\?[$%]|[€£¥₹₩₽¢{}()]|\\[()\[\],;:! ]|\\(?:displaystyle|boxed|text(?:bf|rm)?"
     r"|math(?:bf|rm)|boldsymbol)(?![a-z])", "\0"))
BEFORE = re.compile(r"(?:[^\W\d_]{1,20}(?:'s)?,?(?: [^\W\d_]{1,20}(?:'s)?,?){0,8}(?: ?[:=] ?| )|= ?)?"
                    r"(?:(?:USD?|Rs\.?) ?)?([-+]?) ?0")  # 0 for the number
UNIT = re.compile(r"°?(?:(?:\A|(?<=[.°])|[°'/ -]|[/'] )[^\W\d_]{1,20}\.?){0,6} ?\.?")  # ` apples per day.`
CHANGES_VALUE = re.compile(  # words that change a number's value, or unsay it, on either side of it
    r"(?i)\b(?:or|and|no[nrt]?|none|never|n?either|but|cannot|isn|nicht|kein|than|plus|minus|negative|over"
    r"|under|above|below|point|least|most|almost|nearly|about|around|roughly|except|without|wrongs?|false"
    r"|untrue|incorrect|if|unless|maybe|instead|twice|thrice|\w*fold|squared|cubed|power|root|factorial|half"
    r"|(?:halv|doubl|tripl|divid|multipl|subtract)\w*|three quarters|quarter(?:s of)?|(?:third|(?:four|fif"
    r"|six|seven|eigh|nin|ten|eleven|twelf|\w*(?:teen|tie|dred|sand|llion))th)(?:s|(?! (?!of|is)[a-z]|-g))"
    r"|times(?! (?:an?|as|per|each|every)\b|\W*$)|(?<!per )(?:dozen|\w*(?:hundred|thousand|illion))s?)\b")
FACTOR = (r"(?:tens?|scores?|grand|myriads?|la(?:kh|c)s?|cr(?:ores?)?|tn|\w*illi[aoe]\w*|ribu|juta|tsd"
          r"|mil(?!es?\b|k|it|li[mlg]|eage)\w*|m(?:i[oa]|l?rd|l[dn]|n)s?|b(?:n|il(?:[hij]\w*)?)|(?:gross|thou"
          r"|hazaa?r|tril|h[uo]nd|cien[^c]|taus|tus[ei]n|tys|duizen|cent[ae]n|centain|di?zain|de[cz]en|zehn"
          r"|docen|dou?z|dutzend|duzi|dussin|tuzin)\w*|(?:zero|one|two|three|four|five|six|seven|eight|nine"
          r"|eleven|twelve|\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|zwei)(?!-[a-z]))")
NO_UNIT = re.compile(  # nor other letters than ours; a single one is a unit in `18 g`, but not in `18 x`
    rf"(?i:\b(?:{FACTOR}|is|to|st|nd|rd|th|pi|am|pm|ad|bc|bce|north|south|east|west)\b)|[^\W\x00-\x7f]"
    r"|\b(?![ghlLmsCF]\b|a [^\W\d_]{2})[^\W\d_]\b")
NO_SENTENCE = re.compile(  # around a number, unless it ends as a name of it: `Her score is`
    r"(?i)(?!.*(?:[:=]|\bis) ?(?:USD?|Rs\.?)? ?[-+]? ?0).*(?:\w [-+]|\b(?:sqrt|square|cube|log|mod|less"
    rf"|within|{FACTOR}|(?:add|take)(?:s|ed|ing)?|(?![ai]\b)[a-z]|(?:from|up to|step|page|question|problem"
    r"|(?<!total )of) 0)\b)")
SPELLED = "0 zero 1 one 2 two 3 three 4 four 5 five 6 six 7 seven 8 eight 9 nine 10 ten"  # `5 (five)`

def keeps_value(words):
    """Do the words behind a number leave its value as it is? ` apples` does, ` dozen`, ` squared` do not."""
    return bool(UNIT.fullmatch(words)) and not CHANGES_VALUE.search(words) and not NO_UNIT.search(words)

def number(text):
    """The exact value of a text that holds exactly one number, or None."""
    if len(text) > 200:
        return None
    if plain := PLAIN.fullmatch(text):
        return Fraction(plain[1].replace(",", ""))
    text = undecorated(text.strip().replace("\u2212", "-").replace("\\!", ""))
    parts = re.split(NUMERAL, text)  # before, number, its comma, after
    if len(parts) != 4 or any(map(str.isnumeric, re.sub(r"[\0-\x7f]+", "", text))):
        return None
    before, after = (" ".join(part.replace("\0", " ").split()) for part in (parts[0] + "0", parts[3]))
    sign = BEFORE.fullmatch(before)
    if not sign or CHANGES_VALUE.search(before) or NO_SENTENCE.match(before) or (
            after and f"{parts[1]} {after}" not in SPELLED and not keeps_value(after)):
        return None
    return Fraction(sign[1] + re.sub("[, ]", "", parts[1]))

def gsm8k(said, row):
    """Exactly one number, equal to the gold as an exact decimal: 18 = 18.00 = +18, not -18.

    - not part of it: currency, `%`, bold, `\\boxed`, `\\text{}`, a unit, `x =`, a short sentence around it,
      separators in true groups of three (`1,000`, `1{,}000`, `1 000`); U+2212 is a minus
    - wrong: `1,0,0,0`, `18 (2 steps)`, `17, 18`, `36/2`, `1.8e1`, words that change it (`18 thirds`,
      `5 lacs`, `18 or more`, `negative: 18`), non-ASCII digits, more than 200 characters
    """
    value = number(said)
    return value is not None and value == TASKS["gsm8k"]["gold"](row)


# ------------------------------------------------------------------------------------ math, arc, code
MARKS = re.compile(r"\\(?:boxed|text(?:bf|rm)?|math(?:bf|rm))\{|\\[()\[\]]|[*${}`]")
LEAD = re.compile(r"(?i)\A(?:(?:the )?(?:correct |final )?(?:answer|option|choice)(?: is)?(?::\s*|\s+)){1,2}")
FENCED = re.compile(  # a fence stands where a line begins or ends; a block without its second goes to the end
    r"(?:^[ \t]*```+[^\n`]*|(?<=[\s:])```[\w+#.-]*[ \t]*\r?)\n(.*?)"
    r"(?:(?=^[ \t]*```+[\w+#.-]+[ \t]*\r?\n)|^[ \t]*```|```[ \t]*\r?$|\Z)", re.S | re.M)

def math_golds(row):
    """The answer, no list; else the solution's boxes together, or each alone if one is `also accepted`."""
    gold, rest, boxes = row.get("answer"), row.get("solution"), []
    if type(rest) is str and (gold is None or not str(gold).strip()):
        while (box := last_box(rest)) is not None:
            boxes, rest = [box, *boxes], rest[:rest.rindex("\\boxed")]
        gold = ", ".join(dict.fromkeys(boxes)) or "proof"
    gold = str(gold) if type(gold) in (str, int) or type(gold) is float and math.isfinite(gold) else ""
    golds = [x.strip() for x in (boxes if boxes and "also accept" in row["solution"] else [gold])]
    blank, missing = r"(?:\\q?quad|\\[,;:! ]|[\s.,;:])*", ("proof", "notfound")  # as NuminaMath-1.5 has them
    return ["" if x in missing else None if re.fullmatch(blank, MARKS.sub("", x)) else x for x in golds]

def math_(said, row):
    """Equal to the gold as mathematics: see extras/mathematics.py."""
    from extras import mathematics
    return any(mathematics.equal(gold, said, row["problem"]) for gold in math_golds(row) if gold)

def bare(text):
    """A choice's text without bold, box, backticks, final full stop, extra white space; dashes are `-`."""
    return " ".join(MARKS.sub("", text).translate({0x2212: "-", 0x2013: "-"}).split()).rstrip(". ")

def named(text, choices):
    """Labels of the choices with just this bare text, or else of the only one that has it in another case."""
    found = [label for label, of in choices.items() if of.casefold() == text.casefold()]
    return [label for label in found if choices[label] == text] or found * (len(found) == 1)

def arc(said, row):
    """Exactly one label (`B`, `(B)`, `B.`, `B) text`, `B - text`, `Answer: B`), or one choice's text."""
    choices, key = dict(zip(row["choices"]["label"], map(bare, row["choices"]["text"]))), row["answerKey"]
    labels, said = "|".join(map(re.escape, choices)), MARKS.sub("", said).strip() if len(said) <= 2000 else ""
    for text in (said, LEAD.sub("", said)):
        label = re.fullmatch(rf"\(?({labels})\)?(?:(?:[.:),]|\s+[-–](?=\s)|\s*—|\s)(.*))?", text, re.S)
        found = named(bare(text), choices)
        if label and (not label[2] or not found and label[1] in named(bare(label[2]), choices)):
            return label[1] == key
        if found:
            return found == [key]
    return False

def arc_gold(row):
    labels, key = row["choices"]["label"], row["answerKey"]
    return len(set(labels)) == len(labels) == len(row["choices"]["text"]) and arc(key, row) and key or None

def code(said, row):
    """The last fenced block of the answer (or of a tail without one), or the bare answer, passes the tests;
    extras/sandbox.py says how it is run, and what that does not protect from."""
    from extras import sandbox
    program = dedent((FENCED.findall(said[-200_000:]) or [said.strip("`\n ")])[-1])
    return sandbox.passes(program, row["test_list"], row.get("test_setup_code") or "")

def code_gold(row):
    """The tests, unless they are no Python or say nothing: no program can pass those."""
    try:
        ast.parse(row["test_setup_code"])
        return row["test_list"] if ast.parse("\n".join(row["test_list"])).body else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


# ------------------------------------------------------------------------------------ parts and scores
TERM = r"(?:-?\(+)?-?[0-9]{1,12}(?:\.[0-9]{1,9})?\)*"
SIDE = rf"{TERM}(?: ?[-+*/] ?{TERM})*"
EQUATIONS = re.compile(rf"(?=[-(0-9])(?<![-+*/^=.()\w\\])(?<![-+*/^=(] ){SIDE}(?: ?= ?{SIDE})+"
                       r"(?![\w(^\\]| ?[-+*/^]|\.[0-9])")
STEP = re.compile("[0-9)][-+*/]")  # of a side that is more than a number
bare_steps = rewriter(
    (r"\$|`|\\[()\[\]]|\*\*(?:(?![0-9(])|(?<![0-9)]\*\*))", " "),  # markup; but 2**3 is a power
    *SIGNS, ("\t", " "), ("  +", " "), ("\n ?[-*\u2022] ", "\n"),  # bullets
    (r"\.(?<=[0-9]\.)0+(?![0-9])", ""), (",(?<=[0-9],)(?=[0-9]{3}(?![0-9]))", ""),  # 5.0 is 5
    (r"([0-9)])[/ ]?(?=[a-zA-Z]{2})(?!(?:dozen|hundred|thousand|million|half|squared|cubed|and|or|percent)\b)"
     r"[a-zA-Z]{2,20}+(?:[ /][a-zA-Z]{2,20}+){0,2}(?= ?[-+*/=])", r"\1"),  # 3 pens/box *
    ("[xX](?:(?<=[0-9)].)|(?<=[0-9)] .)) ?(?=[0-9(])", "* "),
    (r"([-+*/(=] )([0-9]{1,9}) ([0-9]{1,9}/[0-9]{1,9})(?![0-9/])", r"\1(\2+\3)"))  # * 1 1/2

def format_part(text, style):
    pieces = TAGS[style].split(text, 5)
    blank = [not piece or piece.isspace() for piece in pieces[::2]]
    in_order = pieces[1::2] == [f"<{style}>", f"</{style}>", "<answer>", "</answer>"]
    return float(in_order and blank == [True, False, True, False, True])

def process_part(text, style, nums=None):
    """Repeating an equation, in any order, earns nothing more, an idle one nothing. With `nums`, operands
    must be at hand: given numbers or results of true equations so far, each used up by the step with it. A
    step may start from any point reached before, as several tries do. 200 equations and 64 points count."""
    reasoning = text.rpartition(f"</{style}>")[0][:20_000].rpartition(f"<{style}>")[2]
    pools, verdicts = [sorted(nums or ())], {}  # verdicts: None for an equation that is true and idle
    for one, other in equations(reasoning):
        steps = [side for side in (one, other) if STEP.search(side)]
        if not steps or len(verdicts) >= 200:
            continue
        left, right = ((evaluate(side) or (None,))[0] for side in (one, other))
        key = (left, right, *sorted(re.findall("[-+*/]|[0-9.]+", f"{one}={other}")))
        if key in verdicts:
            continue
        true = left is not None and left == right
        if true and nums is not None:
            # a difference may be written either way round, and continues as a positive number
            moves = [played(side, abs(left), pools) for side in steps]
            true = all(moves)
            pools += moves[-1][:64 - len(pools)] if true else []
        verdicts[key] = None if true and idle(one, other) else true
    counted = [verdict for verdict in verdicts.values() if verdict is not None]
    return sum(counted) / len(counted) if counted else 0.0

def equations(text):
    """The neighbouring sides, without spaces, of all equations of a text; `a=b=c` gives two pairs."""
    text = "".join(["\n" + line for line in text.split("\n") if "=" in line])
    for chain in EQUATIONS.findall(bare_steps(text)):
        sides = []
        for side in chain.replace(" ", "").split("="):
            surplus = side.count("(") - side.count(")")  # of the text around its equation: (so 3+5=8)
            sides.append(side[surplus:] if surplus > 0 else side[:len(side) + surplus])
        yield from zip(sides, sides[1:])

@lru_cache(4096)
def operands(side):
    return tuple([int(number) if number.isdigit() else Fraction(number) for number in OPERAND.findall(side)])

def played(side, result, pools):
    """The numbers at hand after a step, for each of `pools` (lists of numbers) that holds its operands."""
    taken, reached = operands(side), []
    for pool in pools:
        with suppress(ValueError):  # where one is not at hand
            rest = pool.copy()
            for number in taken:
                rest.remove(number)
            reached.append([*rest, result])
    return reached

@lru_cache(4096)
def idle(one, other):
    """Does a true equation hold whatever its numbers are, 0 and 1 aside? Then it works nothing out: `3+5=5+3`
    and, with an operand as result, `0+3=3`, `1*1=1`, `8+2-2=8`. But `5-5=0` does."""
    result, steps = sorted((one, other), key=lambda side: bool(STEP.search(side)))
    if not STEP.search(result) and operands(result)[0] not in operands(steps):
        return False
    def stand_in(match):  # another number for each, the same for the same
        number = Fraction(match[0])
        return match[0] if number in (0, 1) else str(pow(int(number * 10**9), 5, 999_983) + 2)
    left, right = (evaluate(OPERAND.sub(stand_in, side), 2000) for side in (one, other))
    return left and right and left[0] == right[0]

def grade(task, text, row, style, strict):
    """(1.0 if the answer is right, else 0.0; the answer). A program may stand in the tail without tags."""
    said = answer(text, style, strict or task == "code", row["choices"]["label"] if task == "arc" else None)
    if task == "code" and said is None:
        rest = tail(text, style) or ""
        said = rest if rest.count("```") > 1 and FENCED.search(rest) else None  # a closed block
    return float(bool(said) and bool(TASKS[task]["grade"](said, row))), said

def correct(task, text, row, style="reasoning", strict=True):
    """1.0 where the answer is right, else 0.0."""
    return grade(task, text, row, style, strict)[0]

def score(task, text, row, style="reasoning", weights=None, n_tokens=None, length=LENGTH, strict=True):
    """Every part by name, and their weighted sum "reward"; what `weights` does not name weighs nothing."""
    right, said = grade(task, text, row, style, strict)
    of, tags = TASKS[task], TAGS[style].split(text, 5)[1::2]  # of more than four, one is repeated
    parts = {
        "correct": right,
        "format": format_part(text, style),
        "length": 0 - min(1.0, max(0, (n_tokens or 0) - length[0]) / max(length[1] - length[0], 1e-9)),
        "process": process_part(text, style, row.get(of.get("at_hand"))),
        "efficiency": of["efficiency"](said, row) if right and "efficiency" in of else 0.0,
        "tags": len(tags) / 4 if len(tags) == len(set(tags)) else 0.0,
    }
    weights = WEIGHTS if weights is None else weights
    # summed exactly and rounded, so that rounding cannot put a wrong answer above a right one
    parts["reward"] = round(math.fsum(weight * parts[part] for part, weight in weights.items()), 9)
    return parts

def score_batch(tasks, texts, rows, style="reasoning", weights=None, n_tokens=None, **options):
    """score() for many, in their order; code and math, which wait for other processes, on all cores."""
    n_tokens = [None] * len(texts) if n_tokens is None else n_tokens
    items = list(zip(tasks, texts, rows, n_tokens, strict=True))
    def one(item):
        return score(*item[:3], style, weights, item[3], **options)
    slow = sum("extra" in TASKS[task] for task in tasks)
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes
    with ThreadPoolExecutor(max(1, min(cores, slow))) as threads:
        return list((threads.map if slow > 1 else map)(one, items))

def parse_weights(texts):
    """["correct=1", "format=0.2"] -> {part: weight} of all parts, those not named at 0; else DataError."""
    weights = dict.fromkeys(WEIGHTS, 0.0)
    for text in texts:
        match = re.fullmatch(r"(\w+)=((?:[0-9]{1,20}\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2})?)", text)
        if not match or match[1] not in weights:
            raise DataError(f"--weights {text}: must be PART=NUMBER, >= 0, PART one of {', '.join(WEIGHTS)}")
        weights[match[1]] = float(match[2])
    return weights


# ------------------------------------------------------------------------------------ what a task asks
FORM = """{0}

First reason step by step between <{1}> and </{1}>. Then give the answer alone between <answer> and </answer>:
<{1}>\nyour reasoning\n</{1}>\n<answer>\nyour answer\n</answer>"""

# columns: name -> type, a list of one type, or a dict of columns; data: a source's default PATH, and after a
# blank its configuration on the hub; instruction: the system turn before the form; ask: row -> the user turn;
# grade: (said, row) -> is it right; gold: row -> the right answer, "" to leave the row out, None if none can
# be right; needs: what load_rows() says then. And where a task has it, worked: row -> (reasoning, answer), to
# train on and show; extra: the file in extras/ that grades it; at_hand: process's column; efficiency.
TASKS = {
    "countdown": {
        "columns": {"nums": [int], "target": int}, "data": "data/countdown", "grade": countdown,
        "instruction": "You solve Countdown number problems. Combine the given numbers with +, -, *, / and "
                       "parentheses into one expression that equals the target. Use each number exactly "
                       "once. The answer is the expression alone.",
        "ask": lambda row: f"Numbers: {row['nums']}\nTarget: {row['target']}",
        "gold": lambda row: row["target"] if expression("+".join(map(str, row["nums"])), row) else None,
        "needs": "'nums' must hold numbers of 0 or more that fit an expression of 200 characters",
        "worked": lambda row: (row.get("trace") or f"{row.get('solution')}={row['target']}",
                               row.get("trace_answer") or row.get("solution")),
        "at_hand": "nums", "efficiency": lambda said, row: expression(said, row)[1],
    },
    "gsm8k": {
        "columns": {"question": str, "answer": str}, "data": "openai/gsm8k main", "grade": gsm8k,
        "instruction": "You solve grade-school math word problems. The answer is one number alone, without "
                       "unit or explanation.",
        "ask": lambda row: row["question"], "gold": lambda row: number(row["answer"].rpartition("####")[2]),
        "needs": "'answer' must end in one number, as in '#### 72'",
        "worked": lambda row: re.sub("<<.*?>>", "", row["answer"]).rpartition("####")[::2],
    },
    "math": {
        "columns": {"problem": str}, "data": "HuggingFaceH4/MATH-500", "grade": math_, "extra": "mathematics",
        "instruction": "You solve mathematics problems. The answer is the final result alone, in LaTeX, "
                       "simplified and exact.",
        "ask": lambda row: row["problem"], "gold": lambda row: math_golds(row)[0],
        "needs": "needs a text or number as 'answer', or a 'solution' with a \\boxed{}",
        "worked": lambda row: (row.get("solution"), math_golds(row)[0]),
    },
    "arc": {
        "columns": {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str},
        "data": "allenai/ai2_arc ARC-Challenge", "grade": arc, "gold": arc_gold,
        "instruction": "You answer multiple-choice science questions. The answer is the label of the right "
                       "choice alone.",
        "ask": lambda row: "\n".join([row["question"], *map(
            "{}) {}".format, row["choices"]["label"], row["choices"]["text"])]),
        "needs": "'answerKey' must be one of the labels, 'choices' must hold one text for each label",
        # the right choice's text stands for the reasoning that ARC does not have
        "worked": lambda row: (row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])],
                               row["answerKey"]),
    },
    "code": {
        "columns": {"text": str, "test_list": [str], "test_setup_code": str}, "grade": code,
        "data": "google-research-datasets/mbpp", "extra": "sandbox", "gold": code_gold,
        "instruction": "You write Python programs. The answer is the whole program in one fenced block "
                       "(```python), with its imports, without tests or examples of use.",
        # MBPP's own prompt: without the tests the function's name would be a guess
        "ask": lambda row: "\n".join(
            [row["text"], "Your code should pass these tests:\n", *row["test_list"]]),
        "needs": "'test_list' and 'test_setup_code' must be Python, and 'test_list' not empty",
        "worked": lambda row: ("The tests say what is asked for.", row.get("code") and f"```python\n"
                               f"{row['code'].strip()}\n```".replace("\r\n", "\n")),
    },
}

def messages(task, row, style="reasoning"):
    """The chat prompt: all instructions in the system turn, the problem alone in the user turn."""
    return [{"role": "system", "content": FORM.format(TASKS[task]["instruction"], style)},
            {"role": "user", "content": TASKS[task]["ask"](row)}]

def opening(prompt, style="reasoning"):
    """The tag that opens the reasoning if a prompt ends in it: it belongs to the completion. Else ""."""
    return f"<{style}>" if prompt.rstrip().endswith(f"<{style}>") else ""

def worked_completion(task, row, style="reasoning"):
    """A row's worked answer as the completion that a model is to write; DataError where it has none."""
    worked = TASKS[task]["worked"](row) if "worked" in TASKS[task] else None
    if worked and all(isinstance(part, str) for part in worked):
        text = "<{0}>{1}</{0}>\n<answer>{2}</answer>".format(style, *map(str.strip, worked))
        if format_part(text, style):  # neither is empty, and neither holds a tag
            return text
    raise DataError(f"{task}: a row without a worked answer: countdown needs `trace` and `trace_answer`, or "
                    "`solution`; gsm8k steps before its ####; math a `solution`; code a column `code`")


# ------------------------------------------------------------------------------------ rows
def load_rows(source, split):
    """Rows of a SOURCE, `TASK[=PATH][:N]`, each checked and with its "task" added; else DataError.

    split: train, val or test. PATH is a .jsonl, .json or .parquet file (whatever the split), a folder that
    holds the split's, whole or in shards, or a hub id; without PATH, the task's default. N takes the first N
    rows. A math row without an answer (a proof) is left out; a line on stderr says how many are."""
    match = re.fullmatch(r"([^=:]*)(?:=([^:]+|(?s:.+)(?=:)))?(?::0*([1-9][0-9]{0,11}))?", source)
    if not match or match[1] not in TASKS:
        raise DataError(f"{source}: a source is TASK[=PATH][:N], N the number of rows to take, 1 or more; "
                        f"there is no task but {', '.join(TASKS)}")
    task, path, count = match.groups()
    extra = TASKS[task].get("extra")
    if extra and not Path(__file__).with_name("extras").joinpath(f"{extra}.py").is_file():
        raise DataError(f"{source}: the task {task} needs extras/{extra}.py beside rewards.py")
    if task == "math" and not find_spec("math_verify"):
        raise DataError(f"{source}: the task math needs `pip install math-verify`")
    if task == "code" and not code("def f(): return 1", {"test_list": ["assert f() == 1"]}):
        raise DataError(f"{source}: this machine does not let extras/sandbox.py run programs")
    default, _, config = TASKS[task]["data"].partition(" ")
    rows, left_out = [], 0
    for place, row in read_rows(path or default, split, config if path in (None, default) else ""):
        check(row, TASKS[task]["columns"], place)
        gold = TASKS[task]["gold"](row)
        if gold is None:
            raise DataError(f"{place}: {TASKS[task]['needs']}")
        left_out += gold == ""
        rows += [{**row, "task": task}] * (gold != "")
        if count and len(rows) == int(count):
            break
    if not rows:
        raise DataError(f"{path or default}: holds no rows that can be scored")
    if left_out and os.environ.get("RANK", "0") == "0":
        print(f"{path or default}: rows left out, as they have no answer: {left_out}", file=sys.stderr)
    return rows

def check(row, columns, place):
    """DataError where a column is missing or of another kind."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be an object with the columns {', '.join(columns)}")
    for column, kind in columns.items():
        if column not in row or not fits(row[column], kind):
            wanted = json.dumps(kind, default=lambda kind: kind.__name__).replace('"', "")
            given = json.dumps(row[column], default=str)[:60] if column in row else "missing"
            raise DataError(f"{place}: column '{column}' must be {wanted}, not {given}")

def fits(value, kind):
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(name), of) for name, of in kind.items())
    return type(value) is kind

def read_rows(path, split, config):
    """Yields (place, row) for each row of a file, a folder or a hub id; place is its file and line."""
    here = Path(os.path.expanduser(path))  # which leaves ~nobody as it is
    try:
        files = [here]
        if here.is_dir():  # the whole file, or else all its shards, in order
            held = sorted(here.iterdir())
            name = rf"({'val|validation' if split == 'val' else split})(-\d+-of-.+)?\.(jsonl?|parquet)"
            found = [file for file in held if re.fullmatch(name, file.name)]
            files = [file for file in found if "-of-" not in file.name][:1] or [
                file for file in found if re.search(rf"-of-0*{len(found)}\b", file.name)]
            if not files:
                names = ", ".join(file.name for file in held[:8]) or "nothing"
                raise DataError(f"{here}: no {split}.jsonl or {split}.parquet (or all shards), but {names}")
        for here, rows in ((file, ()) for file in files):
            if here.suffix == ".jsonl":
                yield from jsonl_rows(here)
            elif here.suffix == ".json":
                rows = json.loads(here.read_bytes())
                json.dumps(rows, ensure_ascii=False).encode()  # as in jsonl_rows
            elif here.suffix == ".parquet":
                from pyarrow.parquet import read_table
                rows = read_table(here).to_pylist()
            elif not here.exists() and re.fullmatch(r"(?!data/)\w[\w.-]*/[\w.-]+", path):  # no data/NAME
                rows = hub_rows(path, split, config)
            else:
                raise DataError(f"{here}: no such file or folder; files must end in .jsonl, .json, .parquet")
            yield from ((f"{here}, row {i}", row) for i, row in enumerate(rows, 1))
    except (OSError, ValueError, ImportError, TypeError, RecursionError) as error:
        raise DataError(f"{here}: cannot be read ({getattr(error, 'strerror', None) or error})") from None

def jsonl_rows(file):
    with open(file, "rb") as lines:
        for i, line in ((i, line) for i, line in enumerate(lines, 1) if line.strip()):
            try:
                row = json.loads(line.decode("utf-8-sig"))
                json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate could not be written again
            except (ValueError, RecursionError) as error:
                column, why = getattr(error, "colno", 1), getattr(error, "msg", error)
                raise DataError(f"{file}, line {i}, column {column}: cannot be read ({why})") from None
            yield f"{file}, line {i}", row

def hub_rows(path, split, config):
    try:
        from datasets import load_dataset
        return load_dataset(path, config or None, split={"val": "validation"}.get(split, split))
    except Exception as error:  # no network, no such set, no such split, no such library: many types
        raise DataError(f"{path}: not here, nor on the hub: {' '.join(str(error).split())[:200]}") from None
