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
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

STYLES = ("reasoning", "think")
WEIGHTS = {"correct": 1.0, "format": 0.3, "length": 0.0, "process": 0.1, "efficiency": 0.1, "tags": 0.0}
LENGTH = (500, 800)  # tokens that cost nothing, tokens at which the length part has fallen to -1
BLOCK = r"\s*+<{0}>(?!\s*+</{0}>).*</{0}>\s*+"  # not an empty one
FORMS = {style: re.compile(BLOCK.format(style) + BLOCK.format("answer"), re.S) for style in STYLES}

class DataError(Exception):
    """Data or weights that cannot be used, in one line that says where and why."""

# ------------------------------------------------------------------------------------ which answer
NUMERAL = (r"([1-9][0-9]{0,2}(?P<comma>,|\{,\}| )[0-9]{3}(?:(?P=comma)[0-9]{3})*(?![0-9])(?:\.[0-9]+)?"
           r"|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")  # 1,234.5 in true groups of three, 1234.5, .5
LAST_NUMBER = rf"((?:(?<![\w.)])[-+\u2212])?(?:\\?\$)?(?<![\w.]){NUMERAL})"  # not the 2 of v2

def rule(needed, by, pattern=None):
    """To replace a pattern, or the needed text itself, in texts that hold what is needed; most do not."""
    return needed, re.compile(pattern or re.escape(needed)).sub, by

def rewrite(text, rules):
    for needed, replace, by in rules:
        if needed in text:
            text = replace(by, text)
    return text

def tail(text, style):
    after = text.rpartition(f"</{style}>")[2]
    return "" if f"<{style}>" in after else after

def last_box(text):
    """What the \\boxed{...} that closes last holds, braces balanced; None where there is none."""
    opened, found = [], None
    for match in re.finditer(r"(\\boxed\s{0,9})?(\{)|(\})|\\.", text):
        if match[2]:
            opened.append((match[1], match.end()))
        elif match[3] and opened:
            box, start = opened.pop()
            found = text[start:match.start()] if box else found
    return found

def answer(text, style="reasoning", strict=True, labels=None):
    """What a completion offers as its answer, or None. `labels`: a multiple choice's, if not strict."""
    text = tail(text, style)
    start = text.rfind("<answer>", 0, text.rfind("</answer>") + 1)  # the last that is closed
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
SIGNS = list(map(rule, ("×", "·", "\\times", "\\cdot", "÷", "\\div", "\u2212"), "****//-"))
DIGITS = re.compile("[0-9.]+")
TOKEN = re.compile("(?!0[0-9])[0-9.]+|[^ ]")  # a number without leading zeros; a sign
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}

@lru_cache(4096)
def evaluate(text, limit=200):
    """Numbers, + - * /, unary minus, parentheses -> (exact value, length of its shortest form); else None."""
    tokens = [" ", *reversed(TOKEN.findall(text if len(text) <= limit and text.isascii() else ""))]
    try:
        number, length, _ = value(tokens)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    return (number, length - text.count("--")) if tokens == [" "] else None  # 2--3 is a padded 2+3

def value(tokens, signs="+-*/"):
    """The end of `tokens` -> (exact value, length without needless parentheses, how tightly it binds)."""
    token = tokens.pop()
    if token == "(":
        found = value(tokens)
        ")".index(tokens.pop())  # else a ValueError
    elif token == "-":
        a, length, rank = value(tokens, "")
        found = -a, length + (3 if rank == 1 else 1), 2 if rank == 2 else 3
    else:
        found = Fraction(repr(float(token))) if "." in token else int(token), len(token), 4
    while tokens[-1] in signs:
        sign = tokens.pop()
        binds = 2 if sign in "*/" else 1
        (a, left, left_rank), (b, right, right_rank) = found, value(tokens, "" if binds == 2 else "*/")
        bracketed = (left_rank < binds) + (right_rank < binds + (sign in "-/"))  # a-(b-c) is not a-b-c
        found = OPERATORS[sign](a, b), left + 1 + right + 2 * bracketed, binds
    return found

def expression(said, row):
    """(value, efficiency) of a countdown answer that keeps to the rules, whatever its value; else None."""
    if len(said) > 2000:  # before the signs are replaced; what counts is the length after
        return None
    said = rewrite(said, SIGNS)
    said = (said if said.isprintable() else re.sub(r"\s", " ", said)).strip()
    body, equals, result = said.partition("=")
    if not 0 < len(said) <= 200 or equals and result.strip() != str(row["target"]):
        return None
    found = evaluate(body) if sorted(DIGITS.findall(body)) == sorted(map(str, row["nums"])) else None
    return found and (found[0], min(1.0, found[1] / len(said)))

def countdown(said, row):
    """One expression that uses each given number exactly once and equals the target.

    - non-negative ASCII integers without leading zeros, + - * /, unary minus, parentheses; 200 characters; no
      unary plus, powers, `//`, decimals, exponents, `_`, names, calls, comments, `\\boxed`, `\\frac`
    - `×`, `·`, `\\times`, `\\cdot` are `*`, `÷`, `\\div` are `/`, U+2212 is `-`, any Unicode space is a space
    - it may end in `= t`, t being the true target; its value, an exact rational, equals the target
    """
    return (expression(said, row) or (None,))[0] == row["target"]

# ------------------------------------------------------------------------------------ gsm8k
PLAIN = re.compile(r"\s*\$?([-+]?(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+|(?=\.))(\.[0-9]+)?)\s*")  # $1,234.50
WORDS = re.compile("[-A-Za-z0-9 ,.:=/'+]*")
DECORATION = (  # of which these hold nothing; \0 is a mark: it glues nothing
    rule("", " ", r"\s"), rule("", r"\1", r"([0-9][^0-9^=]{0,40}[a-zA-Z]\}?)(?:\^\{?[23]\}?(?![0-9])|[²³])"),
    rule("{,}", ",", r"(?<=[0-9])\{,\}(?=[0-9])"), rule("\\,", " ", r"(?<=[0-9])\\,(?=[0-9])"), rule(
        "", "\0", r"\*+|__|`|(?<=[0-9}])~|\\?[$%]|[€£¥₹₩₽¢{}()]|\\[()\[\],;:! ]|\\(?:displaystyle|boxed|text"
        r"(?:bf|rm)?|math(?:bf|rm)|boldsymbol)(?![a-z])"))
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
    return UNIT.fullmatch(words) and not CHANGES_VALUE.search(words) and not NO_UNIT.search(words)

def sign_between(before, after):
    """The sign of a number that stands between these words, or None where they change its value."""
    sign = BEFORE.fullmatch(before)
    changed = CHANGES_VALUE.search(before) or NO_SENTENCE.match(before) or not keeps_value(after)
    return sign[1] if sign and not changed else None

@lru_cache(4096)
def number(text):
    """The exact value of a text that holds exactly one number, or None."""
    if len(text) > 200:
        return None
    if plain := PLAIN.fullmatch(text):
        return (Fraction if plain[2] else int)(plain[1].replace(",", ""))
    if not WORDS.fullmatch(text):
        text = rewrite(text.replace("\u2212", "-").replace("\\!", ""), DECORATION)
    parts = re.split(NUMERAL, text)  # before, number, its comma, after
    if len(parts) != 4 or any(map(str.isnumeric, re.sub(r"[\0-\x7f]+", "", text))):
        return None
    before, after = (" ".join(part.replace("\0", " ").split()) for part in (parts[0] + "0", parts[3]))
    sign = sign_between(before, "" if f"{parts[1]} {after}" in SPELLED else after)
    return None if sign is None else number(sign + re.sub("[, ]", "", parts[1]))

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
TERM = r"-?(?:\(+-?)?[0-9]{1,12}(?:\.[0-9]{1,9})?\)*"
SIDE = rf"{TERM}(?: ?[-+*/] ?{TERM})*"
EQUATIONS = re.compile(  # a+b=c, as most are, or any other
    r"[^-+*/^=.()\w\\](?=[-(0-9])(?<![-+*/^=(] )(?:(?!0[0-9])([0-9]{1,12}) ?([-+*/]) ?(?!0)([0-9]{1,12}) ?= ?"
    rf"(?!0[0-9])([0-9]{{1,12}})(?![)=]| =)|({SIDE}(?: ?= ?{SIDE})+))(?![\w(^\\]| ?[-+*/^]|\.[0-9])")
TIMES = "[xX](?:(?<=[0-9)].)|(?<=[0-9)] .)) ?(?=[0-9(])"  # 2 x 3
MARKUP = (  # but 2**3 is a power; bullets; 5.0 is 5
    rule("$", " "), rule("`", " "), rule("\t", " "), rule("**", " ", r"\*\*(?:(?![0-9(])|(?<![0-9)]\*\*))"),
    rule("\\", " ", r"\\[()\[\]]"), *SIGNS, rule("  ", " ", "  +"), rule("\n", "\n", "\n ?[-*\u2022] "),
    rule(".0", "", r"\.(?<=[0-9]\.)0+(?![0-9])"), rule(",", "", ",(?<=[0-9],)(?=[0-9]{3}(?![0-9]))"),
    rule("x", "* ", TIMES), rule("X", "* ", TIMES))
UNITS = re.compile(r"([0-9)])[/ ]?(?=[a-zA-Z]{2})(?!(?:dozen|hundred|thousand|million|half|squared|cubed|and"
                   r"|or|percent)\b)[a-zA-Z]{2,20}+(?:[ /][a-zA-Z]{2,20}+){0,2}(?= ?[-+*/=])")  # 3 pens/box *
MIXED = [rule("/", r"\1(\2+\3)", r"([-+*/(=] )([0-9]{1,9}) ([0-9]{1,9}/[0-9]{1,9})(?![0-9/])")]  # * 1 1/2

def form_parts(text, style):
    """The parts format and tags."""
    counts = [text.count(tag) for tag in (f"<{style}>", f"</{style}>", "<answer>", "</answer>")]
    once = max(counts) <= 1
    return float(once and bool(FORMS[style].fullmatch(text))), sum(counts) / 4 if once else 0.0

@lru_cache(1024)
def process_part(reasoning, nums=()):
    """Repeating an equation, in any order, earns nothing more, an idle one nothing. With `nums`, operands
    must be at hand: given numbers or results of true equations so far, each used up by the step with it. A
    step may start from any point reached before, as several tries do. 200 equations and 64 points count."""
    pools, known, verdicts = [sorted(nums)], set(), []
    for sides, value, other, tokens, steps in equations(reasoning):
        key = (value, other, *sorted(tokens))
        if not steps or key in known or len(known) >= 200:
            continue
        known.add(key)
        true = value == other is not None
        if true and nums:
            for step in steps:  # a difference may be written either way round, and leaves a positive number
                reached = played(step, abs(value), pools)
                true &= bool(reached)
            pools += reached[:64 - len(pools)] if true else []
        if not (true and (steps[1:] or float(abs(value)) in map(float, steps[0])) and idle(*sides)):
            verdicts.append(true)
    return sum(verdicts) / len(verdicts) if verdicts else 0.0

def equations(text):
    """Each equation's sides, their values, its numbers and signs, the operands of sides that are steps."""
    text = rewrite("".join(dict.fromkeys(["\n" + line for line in text.split("\n") if "=" in line])), MARKUP)
    if re.search("[-+*/=](?:(?<=[a-zA-Z]{2}.)|(?<=[a-zA-Z]{2} .))", text):
        text = UNITS.sub(r"\1", text)
    for a, sign, b, result, chain in EQUATIONS.findall(rewrite(text, MIXED)):
        if result:
            step = int(a), int(b)
            yield (a + sign + b, result), OPERATORS[sign](*step), int(result), (a, sign, b, result), [step]
            continue
        sides = []
        for side in chain.replace(" ", "").split("="):
            surplus = side.count("(") - side.count(")")  # of the text around its equation: (so 3+5=8)
            sides.append(side[surplus:] if surplus > 0 else side[:surplus or None])
        for pair in dict.fromkeys(zip(sides, sides[1:])):
            value, other = (found and found[0] for found in map(evaluate, pair))
            steps = [[*map(number, DIGITS.findall(side))] for side in pair if re.search("[0-9)][-+*/]", side)]
            yield pair, value, other, re.findall("[-+*/]|[0-9.]+", "=".join(pair)), steps

def played(taken, result, pools):
    """The numbers at hand after a step, for each of `pools` (lists of numbers) that holds its operands."""
    reached = []
    for pool in pools:
        rest = pool.copy()
        for number in taken:
            if number not in rest:
                break
            rest.remove(number)
        else:
            reached.append([*rest, result])
    return reached

def idle(one, other):
    """Does a true equation hold whatever its numbers are, 0 and 1 aside? Then it works nothing out: `3+5=5+3`
    and, with an operand as result, `0+3=3`, `1*1=1`, `8+2-2=8`. But `5-5=0` does."""
    def stand_in(match):  # another number for each, the same for the same
        number = Fraction(match[0])
        return match[0] if number in (0, 1) else str(pow(int(number * 10**9), 5, 999_983) + 2)
    left, right = (evaluate(DIGITS.sub(stand_in, side), 2000) for side in (one, other))
    return left and right and left[0] == right[0]

def grade(task, text, row, style, strict):
    """(1.0 if the answer is right, else 0.0; the answer). A program may stand in the tail without tags."""
    said = answer(text, style, strict or task == "code", row["choices"]["label"] if task == "arc" else None)
    if task == "code" and said is None:
        rest = tail(text, style)
        said = rest if rest.count("```") > 1 and FENCED.search(rest) else None  # a closed block
    return float(bool(said and TASKS[task]["grade"](said, row))), said

def correct(task, text, row, style="reasoning", strict=True):
    """1.0 where the answer is right, else 0.0."""
    return grade(task, text, row, style, strict)[0]

def score(task, text, row, style="reasoning", weights=None, n_tokens=None, length=LENGTH, strict=True):
    """Every part by name, and their weighted sum "reward"; what `weights` does not name weighs nothing."""
    right, said = grade(task, text, row, style, strict)
    of, (whole, tags) = TASKS[task], form_parts(text, style)
    reasoning = text.rpartition(f"</{style}>")[0][:20_000].rpartition(f"<{style}>")[2]
    parts = {
        "correct": right, "format": whole,
        "length": 0 - min(1.0, max(0, (n_tokens or 0) - length[0]) / max(length[1] - length[0], 1e-9)),
        "process": process_part(reasoning, tuple(row.get(of.get("at_hand"), ()))),
        "efficiency": of["efficiency"](said, row) if right and "efficiency" in of else 0.0, "tags": tags,
    }
    weights = WEIGHTS if weights is None else weights
    # summed exactly and rounded, so that rounding cannot put a wrong answer above a right one
    parts["reward"] = round(math.fsum([weight * parts[part] for part, weight in weights.items()]), 9)
    return parts

def score_batch(tasks, texts, rows, style="reasoning", weights=None, n_tokens=None, **options):
    """score() for many, in their order; code and math, which wait for other processes, on all cores."""
    items = list(zip(tasks, texts, rows, [None] * len(texts) if n_tokens is None else n_tokens, strict=True))
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
        if form_parts(text, style)[0]:  # neither is empty, and neither holds a tag
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
                try:
                    from datasets import load_dataset
                    part = {"val": "validation"}.get(split, split)
                    rows = load_dataset(path, config or None, split=part)
                except Exception as err:  # no network, no such set or split, no such library: many types
                    why = " ".join(str(err).split())[:200]
                    raise DataError(f"{path}: not here, nor on the hub: {why}") from None
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
