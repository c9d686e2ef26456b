"""Held-out accuracy of one or more checkpoints, side by side: a table, JSON, every sample.

1. Read the rows and build the prompts as in training (rewards.messages, the model's chat template; --shots: solved rows come
   before the problem as chat turns in the asked-for style). Wrong flags, data and tokenizers are found here, before weights load.
2. Sample K completions of each prompt, greedily by default. Each prompt is prefilled once; finished rows leave the batch.
3. Score with rewards.py, strictly (the answer in the asked-for form) and flexibly (the last thing that looks like one). A model
   trained on one form looks worse to a reader of another: where the two figures part, read the samples.
4. Sum up each model and task in one table row, and by kind of problem.
5. Write FILE (JSON, an object for each table row), FILE's stem + .samples.jsonl (every completion with its parts) and, for
   K > 1, .pass_rates.jsonl (the rows with a `pass_rate`, by which grpo.py --pass_rate selects). Until then the completions are
   in .so_far.jsonl, which stays if the evaluation is cut short.

How a figure is made stands at its function in part 4: intervals (Wilson), pass@k (unbiased), maj@k (ties), p (McNemar, on the
problems that a model solves more or less often than the first model does; above 0.05 the difference may well be chance).
Behaviours go by the rules at `BEHAVIOURS` and `tries`: by the words, not by what they mean.

    python eval.py --model runs/sft runs/grpo --data countdown
    python eval.py --model Qwen/Qwen2.5-3B-Instruct runs/grpo --data gsm8k math --shots gsm8k:4 --harness gsm8k:8
    python eval.py --model runs/sft --data countdown --split train --samples 8 --temperature 1    # pass rates for grpo.py
    torchrun --nproc_per_node 8 eval.py --model runs/grpo --data gsm8k                            # the same figures, sooner
    python eval.py --curves runs/sft runs/grpo --output curves.png         # by report.py, as the next and all tables
    python eval.py --report runs/sft runs/grpo --output report.html        # a page on these runs and on --results
"""
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import types
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import fmean as mean

import torch
from tqdm import tqdm

import rewards
from models import fitting, load_lm, load_tokenizer, prompt_ids
from runs import RANK, WORLD, Flags, check_flags, fail, gather, start_processes
from sampler import Sampler, generate, uniforms

REPORT = [sys.executable, str(Path(__file__).with_name("report.py"))]        # tables, pictures, pages: none needs a model


# ---------------------------------------------------------------------------------------- options
def parse(argv=None):
    p = Flags("eval.py", __doc__)
    add = p.group("what is evaluated")
    add("--model", nargs="+", default=[], help="checkpoints: folders (whole models or LoRA adapters) or hub ids")
    add("--data", nargs="+", default=["countdown"], metavar="SOURCE", help="problems, as TASK[=PATH][:N]")
    add("--split", choices=["train", "val", "test"], default="test", help="which part of the data")
    add("--limit", type=int, default=0, help="rows of each source at most; 0: all")
    add("--style", choices=rewards.STYLES, default="reasoning", help="name of the reasoning tag")
    add("--shots", nargs="+", default=[], metavar="SOURCE", help="solved rows before each problem of their task: TASK[=PATH]:N, "
        "the first N of a train split")
    add("--chat_template", metavar="FILE", help="Jinja, for a tokenizer that has none")
    add("--trust_remote_code", action="store_true", help="run code that comes with a model")
    add = p.group("sampling")
    add("--samples", type=int, default=1, help="completions for each problem (K)")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--max_new_tokens", type=int, default=1024, help="tokens of a completion at most")
    add("--batch_size", type=int, default=128, help="completions at a time; halved when GPU memory runs out")
    add("--sampler", choices=["auto", "plain"], default="auto",
        help="auto: steps of fixed shape, on a GPU in captured graphs; plain: the simple loop")
    add("--forbid_after", nargs="+", default=[], metavar="TOKEN", help="A B ...: no token B right after a token A; "
        "' no' '</reasoning>' is the control that may not give up after a miss")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--seed", type=int, default=0, help="noise is a function of seed, row and sample alone")
    add = p.group("output")
    add("--output", default="runs/eval.json", metavar="FILE", help="the table as JSON; completions go beside it "
        "(with --curves and --report: the picture, the page)")
    add("--harness", nargs="+", default=[], metavar="TASK[=FOLDER]:SHOTS", help="run lm-evaluation-harness on the models too; "
        "FOLDER has {split}.jsonl in place of the task's hub data")
    add("--curves", nargs="+", metavar="RUN", help="evaluate nothing, draw the training curves of these runs")
    add("--report", nargs="+", metavar="RUN", help="evaluate nothing, write one HTML page on these runs")
    add("--results", metavar="FILE", help="with --report: the evaluation that it shows; default runs/eval.json")
    args = p.parse_args(argv)
    if args.curves or args.report:
        check_flags(args, {}, [(args.model, "--model: --curves and --report evaluate nothing")])
        args.output = args.output if args.output != p.get_default("output") else None
        return args
    check_flags(args, dict(samples=1, max_new_tokens=1, batch_size=1, limit=0, seed=0, temperature=0), (
        (not args.model, "--model: name at least one checkpoint"),
        (len(set(args.model)) < len(args.model), "--model: the same checkpoint is named twice"),
        (args.seed >= 2 ** 64, f"--seed {args.seed}: must be below 2 ** 64"),
        (args.samples > 1 and args.temperature == 0,
         f"--samples {args.samples}: greedy completions are all the same; pass --temperature 1"),
        (len(args.forbid_after) == 1, "--forbid_after: needs a token, and those that may not follow it"),
        (args.chat_template and not os.path.isfile(args.chat_template), f"--chat_template {args.chat_template}: no such file"),
        (args.results, "--results: goes with --report"),
        (not all(re.search(r":\d+$", source) for source in args.shots), f"--shots {' '.join(args.shots)}: must be TASK[=PATH]:N each"),
        (not args.output.endswith(".json") or os.path.isdir(args.output), f"--output {args.output}: must be a file that ends in .json")))
    return args


# ---------------------------------------------------------------------------------------- 1. prompts and checkpoints
def solved(row, style):
    """A row's problem and its solution in the asked-for form, as chat turns."""
    task = row["task"]
    if task == "countdown":
        work, said = f"{row['solution']} = {row['target']}", row["solution"]
    elif task == "gsm8k":
        work, _, said = re.sub(r"<<.*?>>", "", row["answer"]).rpartition("####")
    elif task == "math":
        work, said = row["solution"], rewards.TASKS[task]["gold"](row)
    elif task == "arc":
        work, said = dict(zip(row["choices"]["label"], row["choices"]["text"]))[row["answerKey"]], row["answerKey"]
    else:
        work, said = "The tests say what is asked for.", f"```python\n{row['code'].strip()}\n```"
    text = f"<{style}>{work.strip()}</{style}>\n<answer>{str(said).strip()}</answer>"
    return [rewards.messages(task, row, style)[-1], {"role": "assistant", "content": text}]


def read_data(args):
    """-> rows, and {task: the chat turns that come before its problems}"""
    turns = {}
    try:
        rows = [row for source in args.data for row in rewards.load_rows(source, args.split)[:args.limit or None]]
        for row in (row for source in args.shots for row in rewards.load_rows(source, "train")):
            turns.setdefault(row["task"], []).extend(solved(row, args.style))
    except rewards.DataError as err:
        fail(err)
    except KeyError as err:
        fail(f"--shots {' '.join(args.shots)}: a row has no {err} to show as its solution")
    if idle := turns.keys() - {row["task"] for row in rows}:
        fail(f"--shots {' '.join(args.shots)}: --data has no problems of the task {', '.join(sorted(idle))}")
    return rows, turns


def open_checkpoint(name, args, rows=(), turns={}):
    """All of a checkpoint but its weights: tokenizer, end tokens, the prompts' ids. Refuses what cannot work."""
    tokenizer, eos_ids, context = load_tokenizer(name, args.chat_template, args.trust_remote_code)
    prompts = prompt_ids(tokenizer, rows, args.style, before=lambda row: turns.get(row["task"], ()))
    longest = max(map(len, prompts), default=0)
    if longest + args.max_new_tokens > context:
        fail(f"--max_new_tokens {args.max_new_tokens}: the longest prompt has {longest} tokens, and {name} reads {context} in all")
    forbid = [tokenizer.encode(text, add_special_tokens=False) for text in args.forbid_after]
    if any(len(ids) != 1 for ids in forbid):
        fail(f"--forbid_after: {list(map(len, forbid))} tokens for {name}; each must be one")
    return types.SimpleNamespace(name=name, tokenizer=tokenizer, eos_ids=eos_ids, prompts=prompts, forbid=[ids[0] for ids in forbid])


# ---------------------------------------------------------------------------------------- 2. sampling
def sample(lm, checkpoint, todo, args):
    """Yields, batch by batch, some of the rows `todo` and the ids of their completions: K for each row, side by side."""
    K, size = args.samples, max(1, args.batch_size // args.samples)
    sampler = Sampler(lm) if args.sampler == "auto" else partial(generate, lm)

    def attempt(size):
        batch, noise = todo[:size], None
        if args.temperature:                               # a row's k-th completion has the same in any batch, for any K
            noise = torch.stack([uniforms(args.seed, k, batch, args.max_new_tokens) for k in range(K)], 1).flatten(0, 1)
        return batch, sampler([checkpoint.prompts[i] for i in batch], noise, group_size=K, max_new_tokens=args.max_new_tokens,
                              temperature=args.temperature, eos_ids=checkpoint.eos_ids, forbid=checkpoint.forbid,
                              pad_id=checkpoint.tokenizer.pad_token_id or 0)[0]

    while todo:
        try:
            found, size = fitting(attempt, min(size, len(todo)), lambda n: f"--batch_size {n * K}")
        except torch.OutOfMemoryError:
            fail(f"out of GPU memory with one prompt at a time: lower --samples {K} or --max_new_tokens")
        yield found
        todo = todo[size:]


def evaluate(lm, checkpoint, rows, args, file):
    """Samples and scores this process's share of the rows; completions go to `file` as soon as they are scored."""
    K, records = args.samples, []
    # Longest first: what does not fit in memory shows at once, and the time left is never more than it says.
    todo = sorted(range(len(rows)), key=lambda i: (-len(checkpoint.prompts[i]), i))[RANK::WORLD]
    with tqdm(total=len(todo) * K, desc=checkpoint.name, unit=" completions", disable=RANK > 0,
              mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        for batch, ids in sample(lm, checkpoint, todo, args):
            texts = checkpoint.tokenizer.batch_decode(ids, skip_special_tokens=True)
            scored = score([rows[i] for i in batch for _ in range(K)], texts, list(map(len, ids)), args.style)        # 3
            new = [{"model": checkpoint.name, "row": batch[j // K], "sample": j % K, **record,
                    "truncated": ids[j][-1] not in checkpoint.eos_ids} for j, record in enumerate(scored)]
            file.write(jsonl(new))
            file.flush()
            records += new
            bar.update(len(new))
            tokens = sum(record["n_tokens"] for record in records)
            bar.set_postfix_str(f"{tokens / max(1e-9, bar.format_dict['elapsed']):,.0f} tokens/s", refresh=False)
    return records


# ---------------------------------------------------------------------------------------- 3. scoring
def score(rows, texts, n_tokens, style):
    """What a record says of each completion. Flexible reads on only where there is no answer block, and code never needs one:
    nothing runs twice."""
    tasks, answers = [row["task"] for row in rows], [rewards.answer(text, style) for text in texts]
    parts = rewards.score_batch(tasks, texts, rows, style, n_tokens=n_tokens)
    unread = [i for i, answer in enumerate(answers) if answer is None and tasks[i] != "code"]
    again = rewards.score_batch(*([of[i] for i in unread] for of in (tasks, texts, rows)), style, strict=False)
    loose = {i: part["correct"] for i, part in zip(unread, again)}
    return [{"task": row["task"], "prompt": rewards.messages(row["task"], row, style)[-1]["content"], "completion": texts[i],
             "answer": answers[i], **parts[i], "correct_flexible": loose.get(i, parts[i]["correct"]), "n_tokens": n_tokens[i],
             "by": kinds(row), "behaviour": behaviour(texts[i], row, style)} for i, row in enumerate(rows)]


GEOMETRY = re.compile(r"\b(area|perimeter|circumference|radius|diameter|triang\w*|rectang\w*|circ(le|ular)\w*|cubic|volume|"
                      r"square (feet|foot|inch\w*|met\w*|yards?|miles?)|angles?|diagonal\w*|polygon\w*)\b", re.IGNORECASE)


def kinds(row):
    """What the breakdown groups a problem by. gsm8k: its steps are the answer's <<calculations>> (or lines, where it has none),
    and it is geometry if its question has a word of GEOMETRY."""
    if row["task"] == "gsm8k":
        work = row["answer"].rpartition("####")[0]
        steps = work.count("<<") or len(work.strip().splitlines())
        return {"steps": str(steps) if steps < 8 else "8+", "geometry": "yes" if GEOMETRY.search(row["question"]) else "no"}
    found = {"numbers": str(len(row["nums"]))} if row["task"] == "countdown" else {}
    return found | {k: str(row[k]) for k in ("difficulty", "subject", "level") if row.get(k) not in (None, "")}


BEHAVIOURS = {  # after Gandhi et al. (2025): a completion shows one if its reasoning has one of these phrases
    "checks": r"\b(verif(y|ies|ied|ying)|double.check\w*|let('s| me|s) check|to check|check(ing)?:|checks out)\b|\b(ok|no)$",
    "goes back": r"\b(wait|actually|hmm|no,|start(ing)? over|go(ing)? back|try (again|another|something else|a different)|"
                 r"(does|did)(n't| not) work|that('s| is) (wrong|incorrect|not)|instead)\b| no$",
    "sets sub-goals": r"\b(step [1-9]|first(ly)?,? |next, |finally, |we (first )?need to (find|get|make|know)|so that we can)",
}
OPERATORS = "-+*/×·÷−"
EQUATION = re.compile(rf"([\d(][\d (){OPERATORS}]{{2,80}})= *(\d+)".replace("-+", r"\-+"))


def behaviour(text, row, style):
    before, closed, after = text.rpartition(f"</{style}>")
    reasoning = before or after
    found = {name: bool(re.search(rule, reasoning, re.IGNORECASE | re.MULTILINE)) for name, rule in BEHAVIOURS.items()}
    return found | (tries(reasoning, row, closed) if row["task"] == "countdown" else {})


def tries(reasoning, row, closed=True):
    """Countdown: a try is a line whose equations have as many operators as it takes to use every number. A result that stands
    in a later equation of the line is the expression that made it, so that `5*2=10 10+3=13` is (5*2)+3; a try is a hit if
    this whole expression truly solves the problem. Repeated: the same line before, but for blanks and words."""
    seen, hits, hit = [], 0, True
    for line in reasoning.splitlines():
        made, expression, operators = {}, "", 0
        for left, result in EQUATION.findall(line):
            operators += sum(c in OPERATORS for c in left)
            expression = re.sub(r"\d+", lambda number: made.pop(number[0], number[0]), left)
            made[result] = f"({expression})"
        if operators == len(row["nums"]) - 1:
            hit = bool(rewards.correct("countdown", f"<answer>{expression}</answer>", row))
            seen, hits = seen + ["".join(c for c in line if c in OPERATORS + "0123456789()=")], hits + hit
    return {"tries": len(seen), "hits": hits, "repeated": len(seen) - len(set(seen)), "stops after a miss": bool(closed and not hit)}


# ---------------------------------------------------------------------------------------- 4. statistics
def wilson(p, n, z=1.959964):
    """95 % interval of a share p of n (Wilson 1927): right near 0 and 1 too, where p +- 2 s is not. n is the number of problems:
    for K > 1 too wide rather than too narrow, since the K completions of one problem are not independent."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def pass_at_k(n, c, k):
    """Chance that k of n completions, c of them right, hold a right one (Chen et al. 2021, equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers, correct):
    """Is the most frequent strict answer (white space removed) right? Completions without one do not vote; a tie counts as the
    share of the tied answers that are right, as if one of them was drawn by lot."""
    keys = [None if a is None else "".join(a.split()) for a in answers]
    votes = Counter(k for k in keys if k is not None)
    tied = [k for k, count in votes.items() if count == max(votes.values())]
    return sum(correct[keys.index(k)] for k in tied) / len(tied) if tied else 0.0


def mcnemar(better, worse):
    """Two-sided exact binomial p of a split so uneven among the problems on which two models differ."""
    n = better + worse
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2 ** n)


def table_row(model, task, n, accuracy, **more):
    low, high = wilson(accuracy, n)
    return dict(model=model, task=task, n=n, accuracy=accuracy, accuracy_low=low, accuracy_high=high, accuracy_flexible=None, format=None,
                pass_at_k=None, maj_at_k=None, completion_length=None, truncated=None, by={}, behaviour={}, samples=1) | more


def summarise(records, first):
    """The records of one model and task -> its table row, and {row: pass rate}. first: that of the first model, to compare with."""
    problems = {}
    for r in records:
        problems.setdefault(r["row"], []).append(r)
    K, rates = len(records) // len(problems), {i: mean(r["correct"] for r in of) for i, of in problems.items()}
    row = table_row(records[0]["model"], records[0]["task"], len(problems), mean(rates.values()), samples=K,
                    accuracy_flexible=mean(r["correct_flexible"] for r in records), reward=mean(r["reward"] for r in records),
                    format=mean(r["format"] for r in records), completion_length=mean(r["n_tokens"] for r in records),
                    truncated=mean(r["truncated"] for r in records))
    if K > 1:
        row["pass_at"] = {k: mean(pass_at_k(K, round(rate * K), k) for rate in rates.values())
                          for k in sorted({K, *(2 ** i for i in range(K.bit_length()))})}
        row["pass_at_k"] = row["pass_at"][K]
        row["maj_at_k"] = mean(maj_at_k([r["answer"] for r in of], [r["correct"] for r in of]) for of in problems.values())
    for kind, value in sorted({pair for r in records for pair in r["by"].items()},
                              key=lambda pair: (pair[0], {"easy": "1", "medium": "2", "hard": "3"}.get(pair[1], pair[1]))):
        of = [r for r in records if r["by"].get(kind) == value]
        row["by"].setdefault(kind, {})[value] = {"n": len(of) // K, "accuracy": mean(r["correct"] for r in of)}
    row["behaviour"] = shown = {name: mean(r["behaviour"][name] for r in records) for name in records[0]["behaviour"]}
    if shown.get("tries"):
        shown |= {name: shown[of] / shown["tries"] for name, of in (("hits per try", "hits"), ("repeated per try", "repeated"))}
    if first:
        better, worse = (sum(sign * (rates[i] - first[i]) > 0 for i in rates) for sign in (1, -1))
        row |= {"better": better, "worse": worse, "p": mcnemar(better, worse)}
    return row, rates


# ---------------------------------------------------------------------------------------- lm-evaluation-harness, and all of it
def harness_tasks(specs, folder):
    """["gsm8k=data/gsm8k:8"] -> files in `folder`: lm-eval's own task with so many shots and, where named, local rows."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        fail("--harness: lm-evaluation-harness is not installed; pip install lm-eval")
    known = TaskManager().task_index
    for i, spec in enumerate(specs):
        name, path, shots = re.fullmatch(r"([^=:]*)=?(.*?):?([0-9]*)", spec).groups()
        if not shots or not getattr(known.get(name), "yaml_path", None):
            fail(f"--harness {spec}: must be TASK[=FOLDER]:SHOTS, TASK one that `lm-eval ls tasks` lists")
        task = {"include": str(known[name].yaml_path), "task": name, "num_fewshot": int(shots)}
        if path:
            files = {file.stem: str(file.resolve()) for file in Path(path).glob("*.jsonl")}
            "test" in files or fail(f"--harness {spec}: there is no {path}/test.jsonl")
            task |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        Path(folder, f"{i}.yaml").write_text(json.dumps(task))                 # JSON is YAML


def run_harness(model, checkpoint, folder, args):
    """-> table rows with lm-eval's own figures: its prompts (as chat turns), its reading of the answers. Its first figure stands
    as strict, its second, if it has one, as flexible (gsm8k: flexible-extract; arc: acc_norm)."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=model, tokenizer=checkpoint.tokenizer, batch_size=min(16, args.batch_size))
    out = lm_eval.simple_evaluate(lm, tasks=sorted(map(str, Path(folder).iterdir())), limit=args.limit or None, bootstrap_iters=0,
                                  apply_chat_template=True, gen_kwargs={"max_gen_toks": args.max_new_tokens})
    results = {task: {name: value for name, value in found.items() if "," in name and "_stderr" not in name}
               for task, found in out["results"].items()}
    return [table_row(checkpoint.name, f"lm-eval {task}:{out['n-shot'][task]}", out["n-samples"][task]["effective"],
                      [*figures.values()][0], accuracy_flexible=[*figures.values(), None][1], figures=figures)
            for task, figures in results.items()]


# ---------------------------------------------------------------------------------------- 5. files
def so_far(args):
    """This process's completions while it works. What an earlier evaluation wrote stays until the new files are whole."""
    return args.output.removesuffix(".json") + f".so_far{RANK or ''}.jsonl"


def where(kept):
    """What the message that ends an evaluation early adds."""
    return f"; the completions so far are in {kept}" if os.path.exists(kept) and os.path.getsize(kept) else ""


def write_files(args, rows, records, summary, rates):
    stem = args.output.removesuffix(".json")
    files = {args.output: json.dumps(summary, indent=1, ensure_ascii=False), f"{stem}.samples.jsonl": jsonl(records)}
    for (model, task), rate in rates.items() if args.samples > 1 else ():
        name = [re.sub(r"\W+", "-", model).strip("-")] * (len(args.model) > 1) + [task] * (len(rates) > len(args.model))
        files[".".join([stem, *name, "pass_rates.jsonl"])] = jsonl({**rows[i], "pass_rate": rate[i]} for i in rate)
    for path, text in files.items():
        Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    for path in files:
        os.replace(f"{path}.tmp", path)
    print("\nwritten:", *files)


def jsonl(lines):
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


# ---------------------------------------------------------------------------------------- all of it
def run(args, file, harness):
    """`file` takes the completions so far; `harness` is an empty folder for its tasks. -> None, or what is missing in the end"""
    device, dtype = start_processes(args.dtype)
    rows, turns = read_data(args)                                                                                  # 1
    checkpoints = [open_checkpoint(name, args, rows, turns) for name in args.model]
    if args.harness:
        harness_tasks(args.harness, harness)
    records, others, failed = [], [], None
    for checkpoint in checkpoints:
        lm = load_lm(checkpoint.name, device, dtype, trust_remote_code=args.trust_remote_code)
        records += evaluate(lm, checkpoint, rows, args, file)                                                      # 2, 3
        try:
            others += run_harness(lm, checkpoint, harness, args) if args.harness and RANK == 0 else []
        except Exception as err:                                                  # of any kind: our own figures are not lost for it
            failed = failed or f"--harness: lm-evaluation-harness failed on {checkpoint.name}, its rows are missing ({err!r:.300})"
        del lm
    records = [record for share in gather(records) for record in share]
    if RANK == 0:
        # in the order of models and rows: the same bytes for any batch size and number of processes
        records.sort(key=lambda r: (args.model.index(r["model"]), r["row"], r["sample"]))
        summary, rates = [], {}
        for model in args.model:                                                                                   # 4
            for task in dict.fromkeys(row["task"] for row in rows):
                row, rates[model, task] = summarise([r for r in records if (r["model"], r["task"]) == (model, task)],
                                                    rates.get((args.model[0], task)))
                summary.append(row)
        write_files(args, rows, records, summary + others, rates)                                                  # 5
        subprocess.call([*REPORT, "--table", args.output])
    gather(0)                                                                     # before any process removes its so_far
    if WORLD > 1:
        torch.distributed.destroy_process_group()                                 # or one may abort when another has left
    return failed


def main(argv=None):
    args = parse(argv)
    if args.curves or args.report:
        flags = {"--curves": args.curves, "--report": args.report, "--results": args.results and [args.results],
                 "--output": args.output and [args.output]}
        raise SystemExit(subprocess.call([*REPORT, *(word for flag, words in flags.items() if words for word in (flag, *words))]))
    kept, before = so_far(args), signal.signal(signal.SIGTERM, signal.default_int_handler)     # a cluster's and torchrun's Ctrl-C
    try:
        os.makedirs(os.path.dirname(kept) or ".", exist_ok=True)
        with open(kept, "w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as harness:
            missing = run(args, file, harness)
        os.remove(kept)
        if missing:
            fail(missing)
    except KeyboardInterrupt:
        print(f"\neval.py: interrupted{where(kept)}", file=sys.stderr)
        raise SystemExit(130)
    except SystemExit:                                                            # a later model that does not load
        where(kept) and print(f"eval.py: stopped{where(kept)}", file=sys.stderr)
        raise
    except OSError as err:                                                        # a full disk, most of all
        fail(f"--output {args.output}: cannot be written ({err}){where(kept)}")
    finally:
        signal.signal(signal.SIGTERM, before)
        if not where(kept) and os.path.exists(kept):
            os.remove(kept)


if __name__ == "__main__":
    main()
