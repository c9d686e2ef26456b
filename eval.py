"""Held-out accuracy of one or more checkpoints, side by side: a table, JSON, every sample.

1. Read the rows and build the prompts as in training (rewards.messages, the model's chat template; --shots: solved rows come
   before the problem as chat turns in the asked-for style). Wrong flags, data and tokenizers are found here, before weights load.
2. Sample K completions of each prompt, greedily by default. Each prompt is prefilled once; finished rows leave the batch.
3. Score with rewards.py, strictly (the answer in the asked-for form) and flexibly (the last thing that looks like one). A model
   trained on one form looks worse to a reader of another: where the two figures part, read the samples.
4. Sum up each model and task in one table row, and by kind of problem.
5. Write FILE (JSON, an object for each table row), FILE's stem + .samples.jsonl (every completion with its parts) and, for
   K > 1, .pass_rates.jsonl (the rows with a `pass_rate`, by which grpo.py --pass_rate selects).

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
import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path
from statistics import fmean as mean

import jinja2
import huggingface_hub
import numpy as np
import torch
import transformers
from tqdm import tqdm

import rewards

transformers.utils.logging.disable_progress_bar()

REPORT = [sys.executable, str(Path(__file__).with_name("report.py"))]        # tables, pictures, pages: none needs a model

def fail(message):
    print(f"eval.py: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], fromfile_prefix_chars="@",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    flag = p.add_argument_group("what is evaluated").add_argument
    flag("--model", nargs="+", default=[], help="checkpoints: folders (full, or LoRA adapter) or hub ids")
    flag("--data", nargs="+", default=["countdown"], metavar="SOURCE", help="TASK[=PATH][:N]")
    flag("--split", choices=["train", "val", "test"], default="test", help="which part of the data")
    flag("--limit", type=int, default=0, help="rows of each source at most; 0: all")
    flag("--style", choices=rewards.STYLES, default="reasoning", help="name of the reasoning tag")
    flag("--shots", nargs="+", default=[], metavar="SOURCE", help="solved rows before each problem of their task: TASK[=PATH]:N, "
         "the first N of a train split")
    flag("--chat_template", metavar="FILE", help="Jinja, for a tokenizer that has none")
    flag("--trust_remote_code", action="store_true", help="run code that comes with a model")
    flag = p.add_argument_group("sampling").add_argument
    flag("--samples", type=int, default=1, help="completions for each problem (K)")
    flag("--temperature", type=float, default=0.0, help="0: greedy")
    flag("--max_new_tokens", type=int, default=1024, help="tokens of a completion at most")
    flag("--batch_size", type=int, default=128, help="completions at a time; halved when GPU memory runs out")
    flag("--forbid_after", nargs="+", default=[], metavar="TOKEN", help="A B ...: no token B right after a token A; "
         "' no' '</reasoning>' is the control that may not give up after a miss")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    flag("--seed", type=int, default=0, help="noise is a function of seed, row and sample alone")
    flag = p.add_argument_group("output").add_argument
    flag("--output", default="runs/eval.json", metavar="FILE", help="the table as JSON; completions go beside it "
         "(with --curves and --report: the picture, the page)")
    flag("--harness", nargs="+", default=[], metavar="TASK[=FOLDER]:SHOTS", help="run lm-evaluation-harness on the models too; "
         "FOLDER has {split}.jsonl in place of the task's hub data")
    flag("--curves", nargs="+", metavar="RUN", help="evaluate nothing, draw the training curves of these runs")
    flag("--report", nargs="+", metavar="RUN", help="evaluate nothing, write one HTML page on these runs")
    flag("--results", metavar="FILE", help="with --report: the evaluation that it shows; default runs/eval.json")
    args = p.parse_args(argv)
    for bad, message in [
        *((getattr(args, name) < least, f"--{name} {getattr(args, name)}: must be at least {least}")
          for name, least in dict(samples=1, max_new_tokens=1, batch_size=1, limit=0, seed=0).items()),
        (not args.model, "--model: name at least one checkpoint"),
        (len(set(args.model)) < len(args.model), "--model: the same checkpoint is named twice"),
        (not 0 <= args.temperature < math.inf, f"--temperature {args.temperature}: must be 0 (greedy) or more"),
        (args.samples > 1 and args.temperature == 0,
         f"--samples {args.samples}: greedy completions are all the same; pass --temperature 1"),
        (len(args.forbid_after) == 1, "--forbid_after: needs a token, and those that may not follow it"),
        (args.chat_template and not os.path.isfile(args.chat_template), f"--chat_template {args.chat_template}: no such file"),
        (not args.output.endswith(".json"), f"--output {args.output}: must end in .json"),
    ]:
        if bad:
            fail(message)
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
        work, said = row["solution"], row.get("answer") or rewards.last_box(row["solution"])
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
    except rewards.DataError as e:
        fail(e)
    except KeyError as e:
        fail(f"--shots {' '.join(args.shots)}: a row has no {e} to show as its solution")
    return rows, turns


def open_checkpoint(name, args, rows=(), shots={}):
    """All of a checkpoint but its weights: where they are, tokenizer, end tokens, the prompts' ids. Refuses what cannot work."""
    weights, code = name, {"trust_remote_code": args.trust_remote_code}
    if adapter := os.path.exists(f"{name}/adapter_config.json"):
        weights = json.loads(Path(name, "adapter_config.json").read_text())["base_model_name_or_path"]
    elif os.path.isdir(name) and not os.path.exists(f"{name}/config.json"):
        inner = ", ".join(sorted(path.parent.name for path in Path(name).glob("*/*config.json"))) or "nothing"
        fail(f"--model {name}: holds no config.json or adapter_config.json; of the folders in it {inner} does")
    if not os.path.isdir(weights):  # without a network look in the cache, and do not try again for a minute
        try:
            huggingface_hub.model_info(weights, timeout=10)
        except Exception as e:
            huggingface_hub.constants.HF_HUB_OFFLINE = not isinstance(e, huggingface_hub.errors.HfHubHTTPError)
    try:
        config = transformers.AutoConfig.from_pretrained(weights, **code)
        own = os.path.exists(f"{name}/tokenizer_config.json")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name if own else weights, **code)
    except (OSError, ValueError, KeyError) as e:
        fail(f"--model {name}: no such folder, and no such model on the hub or no network ({str(e).strip().splitlines()[0]})")
    if args.chat_template:
        tokenizer.chat_template = Path(args.chat_template).read_text()
    tokenizer.chat_template or fail(f"--model {name}: its tokenizer has no chat template; pass one with --chat_template FILE (Jinja)")
    try:
        ends = transformers.GenerationConfig.from_pretrained(weights).eos_token_id            # a list for Qwen2.5-Instruct
    except OSError:
        ends = None
    eos_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    eos_ids or fail(f"--model {name}: neither its tokenizer nor its generation config names an end token")
    prompts, context = [], getattr(config.get_text_config(), "max_position_embeddings", math.inf)
    try:
        for row in rows:
            system, problem = rewards.messages(row["task"], row, args.style)
            prompts.append(tokenizer.apply_chat_template([system, *shots.get(row["task"], []), problem], tokenize=True,
                                                         add_generation_prompt=True, return_dict=False))
    except jinja2.TemplateError as e:
        fail(f"--model {name}: its chat template refuses the prompt ({e}); pass another with --chat_template FILE (Jinja)")
    most = max(map(len, prompts), default=0)
    if most + args.max_new_tokens > context:
        fail(f"--max_new_tokens {args.max_new_tokens}: the longest prompt has {most} tokens, and {name} reads {context} in all")
    forbid = [tokenizer.encode(text, add_special_tokens=False) for text in args.forbid_after]
    if any(len(ids) != 1 for ids in forbid):
        fail(f"--forbid_after: {list(map(len, forbid))} tokens for {name}; each must be one")
    return dict(name=name, weights=weights, adapter=adapter, tokenizer=tokenizer, eos_ids=sorted(eos_ids), prompts=prompts,
                forbid=[ids[0] for ids in forbid])


def load_model(checkpoint, args, device):
    """A full checkpoint, or base and adapter merged in memory."""
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else torch.float32 if device == "cpu" else torch.bfloat16
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint["weights"], dtype=dtype,
                                                                  trust_remote_code=args.trust_remote_code)
        if checkpoint["adapter"]:
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, checkpoint["name"]).merge_and_unload()
    except (OSError, ValueError, KeyError) as e:
        fail(f"--model {checkpoint['name']}: {str(e).strip().splitlines()[0]}")
    return model.to(device).eval()


# ---------------------------------------------------------------------------------------- 2. sampling
def uniforms(seed, row, n, length):
    """[n, length] numbers in [0, 1) for the n completions of a row: they depend on (seed, row, completion) alone."""
    streams = (np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, sample, row])) for sample in range(n))
    return torch.from_numpy(np.stack([stream.random(length, dtype=np.float32) for stream in streams]))


def pick(logits, temperature, u):
    """logits [n, V], u [n] uniform or None (greedy) -> ids [n]"""
    if u is None:
        return logits.argmax(-1)
    mass = (logits.float() / temperature).softmax(-1).cumsum(-1)   # inverse CDF: the first id whose cumulated mass exceeds u
    return torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


@torch.inference_mode()
def generate(model, prompts, noise, *, max_new_tokens, temperature, eos_ids, group_size=1, forbid=()):
    """P prompts (lists of ids), each prefilled once and forked -> P * group_size completions (lists of ids that end with
    an end token, unless cut off). noise: [P * group_size, max_new_tokens] from `uniforms`, or None for greedy.
    Finished rows leave the batch. forbid: (a, b, ...): no token b right after a token a."""
    assert not model.training, "sampling in training mode with activation checkpointing drops the cache without a word"
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)               # left-padded [P, W]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)   # by length, not by id
    padded = bool((mask == 0).any())
    out = model(input_ids=ids, attention_mask=mask if padded else None, use_cache=True, logits_to_keep=1,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(group_size, 0)        # [n, V]
    cache.batch_repeat_interleave(group_size)
    mask = mask.repeat_interleave(group_size, 0)
    position = mask.sum(1)                                                                         # [n] of the next token
    rows, done = torch.arange(len(mask), device=device), torch.zeros(len(mask), dtype=torch.bool, device=device)
    tokens = torch.full((len(mask), max_new_tokens), -1, device=device)                            # -1: after the end
    stop, forbid = torch.tensor(eos_ids, device=device), torch.tensor(forbid, dtype=torch.long, device=device)
    noise = None if noise is None else noise.to(device)
    for t in range(max_new_tokens):
        if len(forbid) and t:
            after = (token == forbid[0]).nonzero()                                                 # [m, 1]
            logits = logits.index_put((after, forbid[1:]), logits.new_tensor(-math.inf))
        token = pick(logits, temperature, None if noise is None else noise[rows, t])
        tokens[rows, t] = token.masked_fill(done, -1)
        done = done | torch.isin(token, stop)
        alive = len(done) - int(done.sum())
        if not alive or t + 1 == max_new_tokens:
            break
        if alive <= 0.9 * len(done):                   # a drop copies the cache: not one for every row that ends
            keep = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, done, token, mask, position = rows[keep], done[keep], token[keep], mask[keep], position[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(input_ids=token[:, None], attention_mask=mask if padded else None, position_ids=position[:, None],
                    past_key_values=cache, use_cache=True)
        logits, position = out.logits[:, -1], position + 1
    return [[i for i in row if i >= 0] for row in tokens.tolist()]


def evaluate(model, checkpoint, rows, args, file, rank=0, world=1):
    """Samples and scores this process's share of the rows; completions go to `file` as soon as they are scored."""
    prompts, K, records, size = checkpoint["prompts"], args.samples, [], max(1, args.batch_size // args.samples)
    # Longest first: what does not fit in memory shows at once, and the time left is never more than it says.
    todo = sorted(range(len(rows)), key=lambda i: (-len(prompts[i]), i))[rank::world]
    bar = tqdm(total=len(todo) * K, desc=checkpoint["name"], unit=" completions", disable=rank > 0,
               mininterval=0.5 if sys.stderr.isatty() else 30)
    while todo:
        batch = todo[:size]
        noise = torch.cat([uniforms(args.seed, i, K, args.max_new_tokens) for i in batch]) if args.temperature else None
        try:
            ids = generate(model, [prompts[i] for i in batch], noise, group_size=K, max_new_tokens=args.max_new_tokens,
                           temperature=args.temperature, eos_ids=checkpoint["eos_ids"], forbid=checkpoint["forbid"])
        except torch.OutOfMemoryError:
            if size == 1:
                fail(f"out of GPU memory with one prompt at a time: lower --samples {K} or --max_new_tokens")
            size //= 2
            tqdm.write(f"eval.py: out of GPU memory; going on with {size * K} completions at a time", file=sys.stderr)
            torch.cuda.empty_cache()
            continue
        todo = todo[size:]
        texts = checkpoint["tokenizer"].batch_decode(ids, skip_special_tokens=True)
        scored = score([rows[i] for i in batch for _ in range(K)], texts, list(map(len, ids)), args.style)            # 3
        records += [{"model": checkpoint["name"], "row": batch[j // K], "sample": j % K, **record,
                     "truncated": ids[j][-1] not in checkpoint["eos_ids"]} for j, record in enumerate(scored)]
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records[-len(ids):])
        file.flush()
        bar.update(len(ids))
        tokens = sum(r["n_tokens"] for r in records)
        bar.set_postfix_str(f"{tokens / max(1e-9, bar.format_dict['elapsed']):,.0f} tokens/s", refresh=False)
    bar.close()
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
    lm = HFLM(pretrained=model, tokenizer=checkpoint["tokenizer"], batch_size=min(16, args.batch_size))
    out = lm_eval.simple_evaluate(lm, tasks=sorted(map(str, Path(folder).iterdir())), limit=args.limit or None, bootstrap_iters=0,
                                  apply_chat_template=True, gen_kwargs={"max_gen_toks": args.max_new_tokens})
    results = {task: {name: value for name, value in found.items() if "," in name and "_stderr" not in name}
               for task, found in out["results"].items()}
    return [table_row(checkpoint["name"], f"lm-eval {task}:{out['n-shot'][task]}", out["n-samples"][task]["effective"],
                      [*figures.values()][0], accuracy_flexible=[*figures.values(), None][1], figures=figures)
            for task, figures in results.items()]


def write_files(args, rows, records, summary, rates):
    stem, files = args.output.removesuffix(".json"), {}
    for (model, task), rate in rates.items() if args.samples > 1 else ():
        name = [re.sub(r"\W+", "-", model).strip("-")] * (len(args.model) > 1) + [task] * (len(rates) > len(args.model))
        files[".".join([stem, *name, "pass_rates.jsonl"])] = [{**rows[i], "pass_rate": rate[i]} for i in rate]
    for path, lines in {f"{stem}.samples.jsonl": records, **files}.items():
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    Path(args.output).write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    return [args.output, f"{stem}.samples.jsonl", *files]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"--curves", "--report"} & set(argv):
        raise SystemExit(subprocess.call([*REPORT, *argv]))
    args = parse(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    rows, shots = read_data(args)                                                                                  # 1
    checkpoints = [open_checkpoint(name, args, rows, shots) for name in args.model]
    so_far = args.output.removesuffix(".json") + (f".samples.{rank}.jsonl" if rank else ".samples.jsonl")
    try:
        os.makedirs(os.path.dirname(so_far) or ".", exist_ok=True)
        file = open(so_far, "w", encoding="utf-8")
    except OSError as e:
        fail(f"--output {args.output}: cannot be written ({e.strerror})")
    records, others = [], []
    with file, tempfile.TemporaryDirectory() as folder:
        args.harness and harness_tasks(args.harness, folder)
        if world > 1:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))     # one may have far more to do
        try:
            for checkpoint in checkpoints:
                model = load_model(checkpoint, args, device)
                records += evaluate(model, checkpoint, rows, args, file, rank, world)                              # 2, 3
                others += run_harness(model, checkpoint, folder, args) if args.harness and not rank else []
                del model
        except KeyboardInterrupt:
            print(f"\neval.py: interrupted; the completions so far are in {so_far}", file=sys.stderr)
            raise SystemExit(130)
    if world > 1:
        shares = [None] * world
        torch.distributed.all_gather_object(shares, records)
        torch.distributed.destroy_process_group()
        records = [r for share in shares for r in share]
        if rank:
            return os.remove(so_far)
    # in the order of models and rows: the same bytes for any batch size and number of processes
    records.sort(key=lambda r: (args.model.index(r["model"]), r["row"], r["sample"]))
    summary, rates = [], {}
    for model in args.model:                                                                                       # 4
        for task in dict.fromkeys(row["task"] for row in rows):
            row, rates[model, task] = summarise([r for r in records if (r["model"], r["task"]) == (model, task)],
                                                rates.get((args.model[0], task)))
            summary.append(row)
    files = write_files(args, rows, records, summary + others, rates)                                              # 5
    subprocess.call([*REPORT, "--table", args.output])
    print("\nwritten:", *files)


if __name__ == "__main__":
    main()
