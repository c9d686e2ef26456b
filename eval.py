"""Held-out accuracy of one or more checkpoints, side by side: a table, JSON, every sample.

1. Read the problems and build the prompts as in training: rewards.messages and the chat template. --shots
   puts solved rows before each problem of their task, as chat turns. Errors show here, before weights load.
2. Sample K completions per prompt, greedily by default. The loop checks grpo.py's sampler: no code is shared.
3. Score with rewards.py, strictly (the answer in the requested form) and flexibly (the last thing that looks
   like one). A model trained on another form looks worse to the strict reader: read the samples.
4. Summarise: a row per model and task, accuracy by kind of problem, and a comparison with the first model:
   problems solved more often : less often, and p, how likely chance alone is to give so uneven a split.
5. Write FILE (JSON, an object per row), beside it .samples.jsonl (every completion and its parts; until all
   are there .so_far.jsonl) and for K > 1 .pass_rates.jsonl: rows with a `pass_rate`, for grpo.py --pass_rate.

    python eval.py --model runs/sft runs/grpo --data countdown
    python eval.py --model Qwen/Qwen2.5-3B-Instruct runs/grpo --data gsm8k --shots gsm8k:4
    python eval.py --model runs/sft --data gsm8k --split train --samples 8 --temperature 1    # pass rates
"""
import argparse
import json
import math
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from statistics import fmean, multimode

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import rewards

def fail(message):
    """Print one line on stderr and exit with code 2: what a wrong flag, file or model gets."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)

def flag_parser():
    """argparse that also reads @FILE, flags as in a shell with # comments, and whose errors are one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], fromfile_prefix_chars="@",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    parser.error = fail
    return parser

def at_least(least, kind=int):
    """An argparse type: a finite number that is not below `least`."""
    def number(text):
        if not least <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return kind(text)
    return number

NATURAL, POSITIVE, FLOAT = at_least(0), at_least(1), at_least(0, float)

def parse_args(argv=None):
    parser = flag_parser()
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--model", nargs="+", required=True, help="checkpoint folders (also LoRA adapters) or hub ids")
    add("--data", nargs="+", default=["countdown"], metavar="SOURCE", help="problems, each TASK[=PATH][:N]")
    add("--split", choices=["train", "val", "test"], default="test", help="which part of the data")
    add("--limit", type=NATURAL, default=0, help="use at most this many rows of each source; 0: all")
    add("--style", choices=rewards.STYLES, default="reasoning", help="name of the reasoning tag")
    add("--shots", nargs="+", default=[], metavar="SOURCE", help="train rows to show solved: TASK[=PATH]:N")
    add("--weights", nargs="+", default=[f"{part}={w}" for part, w in rewards.WEIGHTS.items()],
        metavar="PART=WEIGHT", help="of the parts of the reward; parts that are not named weigh 0")
    add("--output", default="results/eval.json", metavar="FILE", help="results as JSON; samples go beside it")
    add = parser.add_argument_group("sampling").add_argument
    add("--samples", type=POSITIVE, default=1, help="completions per problem (K)")
    add("--temperature", type=FLOAT, default=0.0, help="0: greedy decoding")
    add("--max_new_tokens", type=POSITIVE, default=1024, help="length limit of a completion, in tokens")
    add("--batch_size", type=POSITIVE, default=128, help="completions sampled at once; for speed and memory")
    add("--forbid_after", nargs="+", default=[], metavar="TOKEN",
        help="A B ...: no B right after an A; ' no' '</reasoning>' keeps a model from giving up after a miss")
    add("--seed", type=NATURAL, default=0, help="the noise depends on the seed, the row and the sample only")
    args = parser.parse_args(argv)
    if args.samples > 1 and args.temperature == 0:
        fail(f"--samples {args.samples}: greedy completions are all the same; pass --temperature 1")
    if not args.output.endswith(".json") or Path(args.output).is_dir():
        fail(f"--output {args.output}: must be a file that ends in .json")
    return args


# ---------------------------------------------------------------------------------------- 1. problems
def read_problems(args):
    """-> rows, and the chat of each: instructions, solved examples of its task, the problem"""
    rows = [row for source in args.data for row in rewards.load_rows(source, args.split)[:args.limit or None]]
    shots = {}                                                  # task -> turns
    for row in [row for source in args.shots for row in rewards.load_rows(source, "train")]:
        problem = rewards.messages(row["task"], row, args.style)[-1]
        solution = rewards.worked_completion(row["task"], row, args.style)
        shots.setdefault(row["task"], []).extend([problem, {"role": "assistant", "content": solution}])
    chats = [rewards.messages(row["task"], row, args.style) for row in rows]
    return rows, [[*chat[:-1], *shots.get(row["task"], []), chat[-1]] for row, chat in zip(rows, chats)]

def base_of(name):
    """The model that the adapter in folder `name` adapts; for any other model `name` itself."""
    try:
        return json.loads(Path(name, "adapter_config.json").read_text())["base_model_name_or_path"]
    except OSError:                                             # there is no such file
        return name
    except (ValueError, KeyError):
        return fail(f"--model {name}: its adapter_config.json names no base model")

def load(kind, name, **options):
    try:
        return kind.from_pretrained(name, **options)
    except Exception as err:  # of a dozen types: not there, damaged, unknown, a missing package, no memory
        fail(f"--model {name}: no model's folder, nor a hub id, that can be loaded ({str(err)[:200]})")

def prompt_ids(tokenizer, chats):
    """The ids of each chat, a list of turns, up to where the assistant's next turn begins."""
    try:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                 for chat in chats]
    except Exception as err:  # whatever a template raises, or does not compile
        fail(f"--model {tokenizer.name_or_path}: its chat template does not take the prompt ({err})")
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

def load_lm(name, device, dtype, load_in_4bit=False):
    """The causal language model `name` in eval mode, in `dtype` or in nf4."""
    options = {"dtype": dtype, "output_loading_info": True}
    if load_in_4bit:
        options |= {"device_map": {"": device}, "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)}
    lm, found = load(transformers.AutoModelForCausalLM, name, **options)
    if found["missing_keys"]:  # transformers puts random numbers in their place
        fail(f"--model {name}: its files lack weights ({str(found['missing_keys'])[:200]})")
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # it repacks 4-bit weights: no training
            module.support_avx512bf16_for_cpu = False
    sampling = lm.generation_config  # transformers refuses to save one with settings that it would not use
    sampling.do_sample = bool(sampling.do_sample or sampling.temperature or sampling.top_p)
    return lm.to(device).eval()


# ---------------------------------------------------------------------------------------- 2. sampling
@torch.inference_mode()
def complete(lm, prompts, ends, args, noise=None, forbidden=()):
    """P prompts (lists of ids) -> P * K completions, lists of ids that end with one of `ends` unless cut off.
    noise: array [P * K, max_new_tokens] in [0, 1), or None for greedy decoding.
    forbidden: (a, b, ...), no id b right after an id a."""
    tensors = [torch.tensor(prompt, device=lm.device) for prompt in prompts]
    ids = pad_sequence(tensors, batch_first=True, padding_value=-1, padding_side="left")         # [P, W]
    mask = (ids >= 0).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = lm(ids.clamp(min=0), attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
    cache, state = out.past_key_values, (out.logits, mask, position[:, -1:])
    cache.batch_repeat_interleave(args.samples)                 # a prompt is prefilled once
    logits, mask, position = (x.repeat_interleave(args.samples, 0) for x in state)
    completions = [[] for _ in mask]
    stop = torch.tensor(list(ends), device=lm.device)
    rows = torch.arange(len(mask))                              # those that have not ended
    for t in range(args.max_new_tokens):
        if noise is None:
            token = logits[:, -1].argmax(-1)                    # [n]
        else:                                                   # the first one whose cumulated mass exceeds u
            cumulated = (logits[:, -1].float() / args.temperature).softmax(-1).cumsum(-1)
            u = torch.tensor(noise[rows, t, None]).to(lm.device) * cumulated[:, -1:]
            token = torch.searchsorted(cumulated, u, right=True).squeeze(1)
        for row, token_id in zip(rows.tolist(), token.tolist()):
            completions[row].append(token_id)
        going = (~torch.isin(token, stop)).nonzero().squeeze(1)
        if t + 1 == args.max_new_tokens or len(going) == 0:
            break
        if len(going) < len(rows):                              # finished rows leave the batch
            cache.batch_select_indices(going)
            rows, token, mask, position = rows[going.cpu()], token[going], mask[going], position[going]
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
        logits = lm(token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache,
                    use_cache=True).logits                      # [n, 1, V]
        if forbidden:
            logits[(token == forbidden[0]).nonzero(), 0, forbidden[1:]] = -math.inf
    return completions

def evaluate_model(name, lm, checkpoint, rows, args, file):
    """Sample and score all rows -> a record per completion, written to `file` as soon as it is scored."""
    tokenizer, prompts, forbidden = checkpoint
    ends = lm.generation_config.eos_token_id                    # one id, a list of several, or None
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    for module in lm.modules():
        if hasattr(module, "lora_A"):                           # of an adapter
            module.merge()
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))      # the first needs most memory
    size, records, noise = max(1, args.batch_size // args.samples), [], None
    for batch in tqdm([order[at:at + size] for at in range(0, len(order), size)], name, unit=" batches"):
        places = [(i, k) for i in batch for k in range(args.samples)]
        if args.temperature:                                    # noise that does not depend on the batch
            streams = [np.random.default_rng([args.seed, i, k]) for i, k in places]
            noise = np.stack([stream.random(args.max_new_tokens, np.float32) for stream in streams])
        ids = complete(lm, [prompts[i] for i in batch], ends, args, noise, forbidden)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        tasks, lengths = [rows[i]["task"] for i, _ in places], [len(completion) for completion in ids]
        some = [rows[i] for i, _ in places]
        scores = rewards.score_batch(tasks, texts, some, args.style, args.weights, lengths)              # 3
        for (i, k), task, text, parts, completion in zip(places, tasks, texts, scores, ids):
            flexible = parts["correct"] or rewards.correct(task, text, rows[i], args.style, strict=False)
            record = {"model": name, "task": task, "row": i, "sample": k, "completion": text,
                      "prompt": rewards.messages(task, rows[i], args.style)[-1]["content"],
                      "answer": rewards.answer(text, args.style), **parts, "correct_flexible": flexible,
                      "n_tokens": len(completion), "truncated": completion[-1] not in ends}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            records.append(record)
    return records


# ---------------------------------------------------------------------------------------- 4. statistics
def wilson(p, n, z=1.959964):
    """95 % interval of a share p of n problems (Wilson 1927), right near 0 and 1 too. The K completions of a
    problem count as one, as they are not independent: the interval is too wide rather than too narrow."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

def pass_at_k(n, c, k):
    """Probability that k of n completions, c of them right, include a right one (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def maj_at_k(votes):
    """votes: (strict answer or None, is it right) -> is the most frequent answer right? Spaces are dropped,
    None does not vote, and of tied answers the share that is right counts, as if one was drawn at random."""
    votes = [("".join(said.split()), right) for said, right in votes if said is not None]
    return fmean(dict(votes)[said] for said in multimode(said for said, _ in votes)) if votes else 0.0

def mcnemar(better, worse):
    """Exact two-sided binomial p of so uneven a split of the problems on which two models differ."""
    tail = sum(math.comb(better + worse, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2 ** (better + worse))


GEOMETRY = re.compile(r"\b(area|perimeter|circumference|radius|diameter|volume|cubic|angles?|(triang|rectang|"
                      r"circle|circular|diagonal|polygon|square (feet|foot|inch|met|yard|mile))\w*)\b")

def kinds(row):
    """What the breakdown groups a problem by. gsm8k: steps are the answer's <<calculations>> or lines."""
    found = {name: str(row[name]) for name in ("difficulty", "subject", "level") if row.get(name)}
    if row["task"] == "countdown":
        found["numbers"] = str(len(row["nums"]))
    if row["task"] == "gsm8k":
        work = row["answer"].rpartition("####")[0]
        steps = work.count("<<") or len(work.strip().splitlines())
        found["steps"] = str(steps) if steps < 8 else "8+"
        found["geometry"] = "yes" if GEOMETRY.search(row["question"].lower()) else "no"
    return found

def summarise(records, rows, K, first):
    """Records of a model on a task -> row of the table, {row: pass rate}. first: the first model's rates."""
    problems = {records[j]["row"]: records[j:j + K] for j in range(0, len(records), K)}
    rates = {i: fmean(record["correct"] for record in group) for i, group in problems.items()}
    found = {"model": records[0]["model"], "task": records[0]["task"], "n": len(rates), "samples": K}
    found["accuracy"] = fmean(rates.values())
    found["accuracy_low"], found["accuracy_high"] = wilson(found["accuracy"], len(rates))
    found["pass_at_k"] = fmean(pass_at_k(K, round(rate * K), K) for rate in rates.values())
    votes = [[(record["answer"], record["correct"]) for record in group] for group in problems.values()]
    found["maj_at_k"] = fmean(map(maj_at_k, votes))
    means = {"accuracy_flexible": "correct_flexible", "reward": "reward", "format": "format",
             "completion_length": "n_tokens", "truncated": "truncated"}
    found |= {name: fmean(record[key] for record in records) for name, key in means.items()}
    if first:
        found["better"] = sum(rates[i] > first[i] for i in rates)
        found["worse"] = sum(rates[i] < first[i] for i in rates)
        found["p"] = mcnemar(found["better"], found["worse"])
    cells, found["by"] = {}, {}
    for i, rate in rates.items():
        for cell in kinds(rows[i]).items():
            cells.setdefault(cell, []).append(rate)
    for kind, value in sorted(cells, key=lambda cell: (cell[0], "easy medium hard".find(cell[1]), cell[1])):
        cell = {"n": len(cells[kind, value]), "accuracy": fmean(cells[kind, value])}
        found["by"].setdefault(kind, {})[value] = cell
    return found, rates


# ---------------------------------------------------------------------------------------- 5. output
def tables(results):
    """What FILE holds -> tables, lists of lines {column: text}: one of all models, then one per task."""
    lines = []
    for row in results:
        share = {name: f"{value:.1%}" for name, value in row.items() if isinstance(value, float)}
        line = {"model": row["model"], "task": row["task"], "n": str(row["n"]), "strict": share["accuracy"],
                "95 % interval": f"{share['accuracy_low']} - {share['accuracy_high']}",
                "flexible": share["accuracy_flexible"], "format": share["format"]}
        if row["samples"] > 1:
            line |= {f"pass@{row['samples']}": share["pass_at_k"], f"maj@{row['samples']}": share["maj_at_k"]}
        line |= {"tokens": f"{row['completion_length']:.0f}", "cut off": share["truncated"]}
        if "p" in row:
            line |= {"better : worse": f"{row['better']} : {row['worse']}", "p": f"{row['p']:.2g}"}
        lines.append(line)
    yield lines
    for task in dict.fromkeys(row["task"] for row in results):
        rows, lines = [row for row in results if row["task"] == task], []
        for kind, cells in rows[0]["by"].items():
            for value, cell in cells.items():
                accuracy = {row["model"]: f"{row['by'][kind][value]['accuracy']:.1%}" for row in rows}
                lines.append({task: f"{kind} {value}", "n": str(cell["n"]), **accuracy})
        if lines:
            yield lines

def print_table(lines):
    """Print a table; one that is wider than the terminal in parts, each with the first column."""
    columns = [[name, *(line.get(name, "") for line in lines)] for name in max(lines, key=len)]
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    names, room = columns.pop(0), shutil.get_terminal_size((1000, 24)).columns
    names = [name.strip().ljust(len(name)) for name in names]
    while columns:
        part = [names]
        while columns and (len(part) == 1 or sum(len(x[0]) + 2 for x in part) + len(columns[0][0]) <= room):
            part.append(columns.pop(0))
        print("", *("  ".join(cells).rstrip() for cells in zip(*part)), sep="\n")

def run(args, kept):
    """`kept`: the file that takes the completions as they come."""
    args.weights = rewards.parse_weights(args.weights)
    rows, chats = read_problems(args)                                                                      # 1
    checkpoints, results, rates, stem = {}, [], {}, args.output.removesuffix(".json")
    for name in args.model:
        tokenizer = load(transformers.AutoTokenizer, base_of(name))
        prompts = prompt_ids(tokenizer, chats)
        forbidden = [tokenizer.encode(text, add_special_tokens=False) for text in args.forbid_after]
        if any(len(ids) != 1 for ids in forbidden):
            fail(f"--forbid_after: {[len(ids) for ids in forbidden]} tokens for {name}; each must be one")
        checkpoints[name] = tokenizer, prompts, [ids[0] for ids in forbidden]
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept, "w", buffering=1, encoding="utf-8") as file:
        for name, checkpoint in checkpoints.items():
            records = evaluate_model(name, load_lm(name, device, dtype), checkpoint, rows, args, file)
            for task in dict.fromkeys(row["task"] for row in rows):                                        # 4
                of_task = [record for record in records if record["task"] == task]
                first = rates.get((args.model[0], task))
                found, rates[name, task] = summarise(of_task, rows, args.samples, first)
                results.append(found)
    for table in tables(results):                                                                          # 5
        print_table(table)
    files = {args.output: json.dumps(results, indent=1, ensure_ascii=False)}
    for (_, task), rate in rates.items():
        if args.samples > 1 and len(checkpoints) == 1:
            path = f"{stem}.{task}.pass_rates.jsonl" if len(rates) > 1 else f"{stem}.pass_rates.jsonl"
            lines = [json.dumps({**rows[i], "pass_rate": rate[i]}, ensure_ascii=False) for i in sorted(rate)]
            files[path] = "\n".join(lines) + "\n"
    for path, text in files.items():
        Path(f"{path}.tmp").write_text(text, encoding="utf-8")
        Path(f"{path}.tmp").replace(path)
    kept.replace(f"{stem}.samples.jsonl")
    print("\nwritten:", *files, f"{stem}.samples.jsonl")

def main(argv=None):
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # what a cluster sends
    args = parse_args(argv)
    kept = Path(args.output.removesuffix(".json") + ".so_far.jsonl")
    try:
        run(args, kept)
    except KeyboardInterrupt:
        print(f"\neval.py: interrupted; the completions so far are in {kept}", file=sys.stderr)
        raise SystemExit(130) from None
    except rewards.DataError as err:
        fail(err)
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory: lower --batch_size or --max_new_tokens; completions so far are in {kept}")
    except OSError as err:                                      # a full disk, most of all
        fail(f"--output {args.output}: cannot be written ({err})")

if __name__ == "__main__":
    main()
