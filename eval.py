"""Held-out accuracy of one or more checkpoints, side by side: a table, JSON, every sample.

1. Read the problems and build the prompts as in training: rewards.messages and the chat template. --shots
   puts solved rows before each problem of their task, as chat turns. Errors show here, before weights load.
2. Sample K completions per prompt, greedily by default, with grpo.py's sampler.
3. Score with rewards.py, strictly (the answer in the requested form) and flexibly (the last thing that looks
   like one). A model trained on another form looks worse to the strict reader: read the samples.
4. Summarise: a row per model and task with its 95 % interval, and accuracy by kind of problem.
5. Write FILE (JSON, an object per row), beside it .samples.jsonl (every completion and its parts; until all
   are there .so_far.jsonl) and for K > 1 .pass_rates.jsonl: rows with a `pass_rate`, for grpo.py --pass_rate.

    python eval.py --model runs/sft runs/grpo --data countdown
    python eval.py --model Qwen/Qwen2.5-3B-Instruct runs/grpo --data gsm8k --shots gsm8k:4
    python eval.py --model runs/sft --data gsm8k --split train --samples 8 --temperature 1    # pass rates
"""
import argparse
import json
import math
import os
import re
import shlex
import signal
import sys
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from statistics import fmean, multimode

import rewards

def fail(message):
    """Print one line on stderr and exit with code 2: what a wrong flag, file or model gets."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)

@contextmanager
def expect(what):
    """Whatever error a library raises inside becomes one line that begins with `what`."""
    try:
        yield
    except Exception as err:  # of a dozen types: not there, damaged, unknown, a missing package, no memory
        fail(f"{what}: {str(err)[:300] or type(err).__name__}")

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

ARGS = parse_args() if __name__ == "__main__" else None         # --help does not wait for these imports
import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

UNFIT = {"cpmant", "llama4", "llama4_text", "modernbert-decoder", "moshi", "phimoe", "trocr"}  # tried: wrong


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

def prompts_of(tokenizer, chats):
    """render(); where the template changes worked examples (many cut the thought out of earlier turns), they
    stand in one user turn with the problem."""
    prompts = render(tokenizer, chats)
    told = [turn["content"] in prompt for chat, prompt in zip(chats, prompts) for turn in chat[2:-1:2]]
    if all(told):
        return prompts
    joined = ["\n\n".join(turn["content"] for turn in chat[1:]) for chat in chats]
    return render(tokenizer, [[chat[0], {"role": "user", "content": x}] for chat, x in zip(chats, joined)])


# ---------------------------------------------------------------------------------------- 2. sampling
def forbid(lm, tokens):
    """--forbid_after A B ...: from now on the model gives no id B right after an id A."""
    def hook(_, args, inputs, output):
        after = (inputs["input_ids"][:, -1] == tokens[0]).nonzero()
        output.logits[after, -1, tokens[1:]] = -math.inf
    if tokens:
        lm.register_forward_hook(hook, with_kwargs=True)

def evaluate_model(name, lm, checkpoint, rows, args, file):
    """Sample and score all rows -> a record per completion, written to `file` as soon as it is scored."""
    tokenizer, prompts, ids, forbidden = checkpoint
    ends = end_ids(tokenizer, lm.generation_config)
    forbid(lm, forbidden)
    order = sorted(range(len(rows)), key=lambda i: -len(ids[i]))          # the first needs most memory
    size, records, noise = max(1, args.batch_size // args.samples), [], None
    seconds = 0.1 if sys.stderr.isatty() else 60                # in a log, a line a minute
    for batch in tqdm([order[at:at + size] for at in range(0, len(order), size)], name, unit=" batches"):
        places = [(i, k) for i in batch for k in range(args.samples)]
        if args.temperature:                                    # noise that does not depend on the batch
            noise = uniforms([[args.seed, i, k] for i, k in places], args.max_new_tokens)
        completions, _ = generate(
            lm, [ids[i] for i in batch], noise, args.samples, args.max_new_tokens, args.temperature or 1.0,
            ends, lambda n: tqdm(range(n), "sampling", leave=False, delay=2, mininterval=seconds))
        texts = decode(tokenizer, completions, [prompts[i] for i, _ in places], ends, args.style)
        tasks, lengths = [rows[i]["task"] for i, _ in places], [len(x) for x in completions]
        some = [rows[i] for i, _ in places]
        scores = rewards.score_batch(tasks, texts, some, args.style, args.weights, lengths)              # 3
        for (i, k), task, text, parts, x in zip(places, tasks, texts, scores, completions):
            flexible = parts["correct"] or rewards.correct(task, text, rows[i], args.style, strict=False)
            record = {"model": name, "task": task, "row": i, "sample": k, "prompt": prompts[i],
                      "completion": text, "answer": rewards.answer(text, args.style), **parts,
                      "correct_flexible": flexible, "n_tokens": len(x), "truncated": x[-1] not in ends}
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

def summarise(records, rows, K):
    """Records of a model on a task -> row of the table, {row: pass rate}."""
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
    columns = [[name, *(line.get(name, "") for line in lines)] for name in max(lines, key=len)]
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    columns[0] = [cell.strip().ljust(len(cell)) for cell in columns[0]]
    print("", *("  ".join(cells).rstrip() for cells in zip(*columns)), sep="\n")

def run(args, kept):
    """`kept`: the file that takes the completions as they come."""
    args.weights = rewards.parse_weights(args.weights)
    rows, chats = read_problems(args)                                                                      # 1
    checkpoints, results, rates, stem = {}, [], {}, args.output.removesuffix(".json")
    for name in args.model:
        with expect(f"--model {name}"):
            tokenizer = load_tokenizer(name, args.style)
            prompts = prompts_of(tokenizer, chats)
            ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
            check_model(name, ids, args.max_new_tokens)
        forbidden = [tokenizer.encode(text, add_special_tokens=False) for text in args.forbid_after]
        if any(len(x) != 1 for x in forbidden):
            fail(f"--forbid_after: {[len(x) for x in forbidden]} tokens for {name}; each must be one")
        checkpoints[name] = tokenizer, prompts, ids, [x[0] for x in forbidden]
        ran = [Path(folder, "args.json") for folder in (name, Path(name).parent)]       # or its checkpoint's
        if base_of(name) != name and any('"load_in_4bit": true' in x.read_text() for x in ran if x.exists()):
            print(f"{name}: trained on a 4-bit base, measured on the 16-bit one; its merged/ (--merge) is "
                  "what was trained", file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept, "w", buffering=1, encoding="utf-8") as file:
        for name, checkpoint in checkpoints.items():
            with expect(f"--model {name}"):
                lm = load_lm(name, device, torch.bfloat16 if bf16 else torch.float32)
            records = evaluate_model(name, lm, checkpoint, rows, args, file)
            for task in dict.fromkeys(row["task"] for row in rows):                                        # 4
                of_task = [record for record in records if record["task"] == task]
                found, rates[name, task] = summarise(of_task, rows, args.samples)
                results.append(found)
    files = {args.output: json.dumps(results, indent=1, ensure_ascii=False)}                               # 5
    for (_, task), rate in rates.items():
        if args.samples > 1 and len(checkpoints) == 1:
            path = f"{stem}.{task}.pass_rates.jsonl" if len(rates) > 1 else f"{stem}.pass_rates.jsonl"
            lines = [json.dumps({**rows[i], "pass_rate": rate[i]}, ensure_ascii=False, default=str) + "\n"
                     for i in sorted(rate)]
            files[path] = "".join(lines)
    for path, text in files.items():
        Path(f"{path}.tmp").write_text(text, encoding="utf-8")
        Path(f"{path}.tmp").replace(path)
    kept.replace(f"{stem}.samples.jsonl")
    for table in tables(results):
        print_table(table)
    for row in results:
        if not row["format"]:
            print(f"\n{row['model']}: no completion has the form that was asked for: read the samples; a "
                  "cold start with sft.py teaches it")
    names = ", ".join([*files, f"{stem}.samples.jsonl"])
    print(f"\nwrote {names}: next, read the samples", flush=True)       # into a closed pipe: main() knows

def main(argv=None):
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # what a cluster sends
    args = ARGS or parse_args(argv)
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
    except BrokenPipeError:                                     # `| head`: all is written, only not printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as err:                                      # a full disk, most of all
        fail(f"--output {args.output}: cannot be written ({err})")


# --------------------------------------------- what grpo.py and sft.py have too: the same text stands there
def uniforms(keys, n):
    """[len(keys), n] numbers in [0, 1): the noise of a row is a function of its key, a list of integers."""
    streams = [np.random.default_rng(key) for key in keys]
    return torch.tensor(np.array([stream.random(n, np.float32) for stream in streams])).view(-1, n)

def pick(logits, temperature, u):
    """logits [n, V], u [n] uniform or None (greedy) -> ids [n], their log-probabilities [n] at `temperature`.

    Inverse CDF: the first id whose cumulated probability exceeds u. u is kept below their sum, so that an id
    without probability is never picked, whatever rounding does."""
    p = (logits.float() / temperature).softmax(-1)
    if u is None:
        ids = logits.argmax(-1, keepdim=True)
    else:
        sums = p.cumsum(1)
        below = sums[:, -1:].nextafter(u.new_zeros(()))
        ids = torch.searchsorted(sums, torch.minimum(u[:, None], below), right=True)
    return ids.squeeze(1), p.gather(1, ids).log().squeeze(1)

@torch.inference_mode()
def generate(lm, prompts, noise, group_size, max_new_tokens, temperature, ends, steps=range):
    """P prompts, lists of ids -> P * G completions (with their end token, if any), the log-probabilities of
    their ids. noise [P * G, max_new_tokens]; None: greedy. steps(n) counts to n, or ends early.

    A prompt is prefilled once for its group; finished rows leave the batch every few tokens."""
    device, width = lm.device, 1 + max(map(len, prompts))   # sdpa is faster with a mask than without
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)                 # [P, W]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)     # [P, W]
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = lm(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    cache.batch_repeat_interleave(group_size)
    state = out.logits[:, -1], mask, position[:, -1:]
    logits, mask, position = (x.repeat_interleave(group_size, 0) for x in state)    # [n, V], [n, W], [n, 1]
    rows = torch.arange(len(mask), device=device)                                   # those still in the batch
    ends, noise = torch.tensor(sorted(ends), device=device), noise if noise is None else noise.to(device)
    tokens = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)
    logps, lengths, done = torch.zeros_like(tokens, dtype=torch.float32), 0 * rows, rows < 0
    for t in steps(max_new_tokens):
        if t % 4 == 0 and done.any():                       # to see which rows ended waits for the GPU
            left = (~done).nonzero().squeeze(1)
            if len(left) == 0:
                break
            cache.batch_select_indices(left)
            rows, mask, position, token, done = (x[left] for x in (rows, mask, position, token, done))
        if t:
            mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
            logits = lm(input_ids=token[:, None], attention_mask=mask, position_ids=position,
                        past_key_values=cache, use_cache=True).logits[:, -1]
        token, logp = pick(logits, temperature, None if noise is None else noise[rows, t])
        tokens[rows, t], logps[rows, t] = token, logp
        lengths[rows] += ~done
        done |= (token[:, None] == ends).any(1)
    tokens, logps, lengths = tokens.tolist(), logps.cpu(), lengths.tolist()
    return [x[:k] for x, k in zip(tokens, lengths)], [x[:k].clone() for x, k in zip(logps, lengths)]

def decode(tokenizer, completions, prompts, ends, style):
    """Completions -> the texts to score: without their end token, cut by its id, as tags may be special too;
    with the reasoning's opening tag in front where the prompt ends in it."""
    texts = tokenizer.batch_decode([ids[:-1] if ids and ids[-1] in ends else ids for ids in completions])
    return [rewards.opening(prompt, style) + text for prompt, text in zip(prompts, texts)]

def base_of(name):
    """The model that the adapter in folder `name` adapts; for any other model `name` itself."""
    file = Path(name, "adapter_config.json")
    with expect(f"--model {name}: its adapter_config.json names no base model"):
        return json.loads(file.read_text())["base_model_name_or_path"] if file.exists() else name

def load_tokenizer(name, style):
    """The tokenizer of a model or an adapter. ValueError without a chat template, or if it loses the tags."""
    own = Path(name, "tokenizer_config.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name if own else base_of(name))
    tags = f"<{style}></{style}><answer></answer>"
    kept = tokenizer.decode(tokenizer(tags, add_special_tokens=False)["input_ids"])
    if "".join(kept.split()) != tags:
        raise ValueError(f"its tokenizer makes {kept} of the tags {tags}")
    if not tokenizer.chat_template:
        raise ValueError("it has no chat template: put one into its folder, as chat_template.jinja")
    return tokenizer

def render(tokenizer, chats):
    """Chats, lists of turns, the system turn first -> prompts, to where the assistant's turn begins. Where
    the chat template drops or refuses the system turn, its text goes before the user's."""
    def text(chat):
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    try:
        if all(chat[0]["content"] in text(chat) for chat in chats[:1]):
            return list(map(text, chats))
    except Exception:  # whatever a template raises
        pass
    with expect(f"--model {tokenizer.name_or_path}: its chat template"):
        return [text([{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest])
                for system, user, *rest in chats]

def end_ids(tokenizer, config):
    """Ids that end a completion: the first special or added token that the chat template writes after an
    assistant's text; eos; those of the generation config."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the text ends here"}]
    tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(chat[1]["content"])[2]
    known, eos = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}, config.eos_token_id
    ends = [i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in known][:1]
    ends += [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    return [i for i in dict.fromkeys(ends) if i is not None]

def check_model(name, rows, room, whole=False):
    """ValueError, before weights load, for a model that cannot do this. rows: lists of ids, after each of
    which `room` more follow; whole: are all its weights to be trained?"""
    config = transformers.AutoConfig.from_pretrained(base_of(name))
    text, top, longest = config.get_text_config(), max(map(max, rows)), max(map(len, rows)) + room
    layers = set(map(type, transformers.DynamicCache(config=text).layers))
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    encoder = config.is_encoder_decoder or type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if (encoder or config.model_type in UNFIT or not kind
            or layers - {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
            or "past_key_values" not in signature(kind.forward).parameters):
        raise ValueError(f"{config.model_type} is no decoder with keys and values alone (linear attention?)")
    if whole and getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantised and do not train: add --lora_rank")
    if top >= text.vocab_size:
        raise ValueError(f"its tokenizer has the id {top}, its embeddings end at {text.vocab_size - 1}")
    if longest > (getattr(text, "max_position_embeddings", None) or math.inf):
        raise ValueError(f"{longest} tokens do not fit its context of {text.max_position_embeddings}")

def load_lm(name, device, dtype, load_in_4bit=False):
    """The causal language model `name` in eval mode, in `dtype` or nf4; an adapter merged into its base."""
    base, options = base_of(name), {"dtype": dtype, "output_loading_info": True}
    if load_in_4bit:
        options |= {"device_map": {"": device}, "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)}
    lm, found = transformers.AutoModelForCausalLM.from_pretrained(base, **options)
    if found["missing_keys"]:  # transformers puts random numbers in their place
        raise ValueError(f"its files lack weights ({str(found['missing_keys'])[:200]})")
    if base != name:
        import peft
        if getattr(lm, "is_quantized", False):
            lm = lm.dequantize()                                # as it was trained on
            lm._weight_conversions = None                       # a 4-bit checkpoint's cannot be reverted
        lm = peft.PeftModel.from_pretrained(lm, name).merge_and_unload()
        if Path(name, "generation_config.json").exists():
            lm.generation_config = transformers.GenerationConfig.from_pretrained(name)
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # it repacks 4-bit weights: no training
            module.support_avx512bf16_for_cpu = False
    try:
        lm.generation_config.validate(strict=True)
    except ValueError:  # transformers would refuse to save it: only its ids stay
        ids = {k: x for k, x in vars(lm.generation_config).items() if k.endswith("token_id") and x != -1}
        lm.generation_config = transformers.GenerationConfig(**ids)
    return lm.to(device).eval()

if __name__ == "__main__":
    main()
