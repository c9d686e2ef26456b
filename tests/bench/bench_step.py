"""Seconds of a whole GRPO step, grpo.py against TRL's GRPOTrainer and, with --against, an older checkout's
grpo.py: sampling, scoring, log-probabilities, gradient, update.

All start from one checkpoint, with the same prompts, groups, rewards, micro-batches, learning rate and
length limit, in fp32 on a CPU and in bf16 autocast or bf16 on a GPU; TRL's settings are those that do what
grpo.py does here (loss dapo, no KL, temperature 1 without top-k, one update per step, nothing saved). Each
runs in a process of its own, and they make their steps in turn; the first two of each do not count. A made
model gets its rewards by a coin that is a function of the text, so that no group is dead (grpo.py makes no
backward pass for those); it never ends a completion, or does so at random (--mean_length). A trained
--model earns what it earns.

    python tests/bench/bench_step.py                         # the tiny model of sft.py, random weights
    python tests/bench/bench_step.py --prompts 16 --group_size 16 --max_new_tokens 80 --mean_length 30
    python tests/bench/bench_step.py --model runs/tiny-sft --prompts 16 --group_size 16 --max_new_tokens 80
    python tests/bench/bench_step.py --against ../older-checkout --no_trl
    python tests/bench/bench_step.py --shape qwen2.5-3b --prompts 32 --prompt_length 150 \\
        --max_new_tokens 512 --micro_batch_size 8 --steps 4
"""
import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import shapes
import torch
import transformers

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--model", help="checkpoint folder; without it one is made")
p.add_argument("--shape", default="tiny", help="of the made model; see shapes.py")
p.add_argument("--against", metavar="DIR", help="also measure the grpo.py of this older checkout")
p.add_argument("--no_trl", action="store_true", help="leave TRL out")
p.add_argument("--prompt_length", type=int, help="tokens of made-up prompts; without it, Countdown problems")
p.add_argument("--continuous_batching", action="store_true", help="TRL generates by transformers' engine")
p.add_argument("--steps", type=int, default=8, help="of each, after two that are not counted")
p.add_argument("--prompts", type=int, default=8, help="per step")
p.add_argument("--group_size", type=int, default=8, help="completions per prompt")
p.add_argument("--max_new_tokens", type=int, default=64, help="tokens of a completion at most")
p.add_argument("--mean_length", type=float, default=0, help="of a made model's completions; 0: none ends")
p.add_argument("--micro_batch_size", type=int, default=32, help="completions per pass")
p.add_argument("--threads", type=int, default=2, help="of the CPU")
p.add_argument("--work", nargs=2, help=argparse.SUPPRESS)       # of a child: folder, checkout or `trl`
a = p.parse_args()
if a.prompts * a.group_size % a.micro_batch_size:
    sys.exit("bench_step.py: --prompts times --group_size must be a multiple of --micro_batch_size")
WEIGHTS = ["correct=1", "format=0.1"]


# ----------------------------------------------------------------------------------------- a child
def turn(length, dead, sampling=0.0):
    """After each step: say that it is done, and wait to be told to make the next."""
    shapes.sync()
    print(json.dumps([length, dead, sampling]), file=REPLIES, flush=True)
    if not sys.stdin.readline():
        os._exit(0)


def same_for_all(model):
    """Replace what all children must share: how completions end, what they earn, what prompts say."""
    import rewards
    end_id, real_score = transformers.AutoTokenizer.from_pretrained(model).eos_token_id, rewards.score_batch

    def ends_at_random(module, inputs, logits):
        """The end token gets probability 1 / --mean_length, or none, whatever the other logits are."""
        end = torch.arange(logits.shape[-1], device=logits.device) == end_id
        with torch.no_grad():
            rest = logits.masked_fill(end, -math.inf).logsumexp(-1, keepdim=True)
        return torch.where(end, rest - (math.log(a.mean_length - 1) if a.mean_length else 30), logits)

    def from_pretrained(*args, load=transformers.AutoModelForCausalLM.from_pretrained, **kwargs):
        found = load(*args, **kwargs)
        lm = found[0] if isinstance(found, tuple) else found
        lm.get_output_embeddings().register_forward_hook(ends_at_random)
        return found

    def coin(tasks, texts, *args, **kwargs):
        """The task's own scoring, for its time, and in its place a coin."""
        scored = real_score(tasks, texts, *args, **kwargs)
        coins = [float(zlib.crc32(text.encode()) % 2) for text in texts]
        return [parts | {"reward": reward} for parts, reward in zip(scored, coins)]

    def messages(task, row, style="reasoning"):
        digits = re.findall("[0-9]", f"{row['nums']} {row['target']}")
        letters = "".join(chr(97 + int(digit)) for digit in digits)    # of which each is a token
        return [{"role": "user", "content": letters.ljust(a.prompt_length - 3, "x")}]

    if not a.model:
        transformers.AutoModelForCausalLM.from_pretrained, rewards.score_batch = from_pretrained, coin
    if a.prompt_length:
        rewards.messages = messages


def work_grpo(folder, model):
    import grpo
    flags = ["--model", model, "--data", f"countdown={folder}", "--weights", *WEIGHTS, "--loss", "dapo",
             "--beta", 0, "--prompts_per_step", a.prompts, "--group_size", a.group_size, "--max_resample", 0,
             "--max_new_tokens", a.max_new_tokens, "--micro_batch_size", a.micro_batch_size, "--lr", 1e-6,
             "--warmup", 0, "--steps", a.steps + 9, "--save_every", 10 ** 6,
             "--output_dir", f"{folder}/{os.getpid()}"]

    def log(args, board, metrics):
        turn(metrics["completion_length"], metrics["frac_reward_zero_std"], metrics["sample_seconds"])

    if hasattr(grpo, "train_step"):                             # a checkout from before grpo.py stood alone
        def train_step(run, step, real=grpo.train_step):
            metrics, first = real(run, step)
            log(None, None, metrics)
            return metrics, first

        grpo.train_step, flags = train_step, [*flags, "--curriculum_floor", 1]
    else:
        grpo.log = log
    grpo.main([str(flag) for flag in flags])


def work_trl(folder, model):
    import datasets
    import trl

    import rewards
    rows, weights = rewards.load_rows(f"countdown={folder}", "train"), rewards.parse_weights(WEIGHTS)
    turns = [{"prompt": rewards.messages("countdown", row), "index": i} for i, row in enumerate(rows)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def reward(prompts, completion_ids, index, **_):
        """The scoring of grpo.py, on the same ids."""
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        tasks, n_tokens = ["countdown"] * len(texts), list(map(len, completion_ids))
        asked = [rows[i] for i in index]
        scored = rewards.score_batch(tasks, texts, asked, weights=weights, n_tokens=n_tokens)
        return [parts["reward"] for parts in scored]

    class Turns(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **_):      # after each step, as logging_steps is 1
            if "completions/mean_length" in logs:
                turn(logs["completions/mean_length"], logs["frac_reward_zero_std"])

    config = trl.GRPOConfig(
        output_dir=f"{folder}/trl", max_steps=a.steps + 9, seed=0,
        use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, gradient_checkpointing=False,
        report_to="none", save_strategy="no", eval_strategy="no", disable_tqdm=True, logging_steps=1,
        per_device_train_batch_size=a.micro_batch_size,
        gradient_accumulation_steps=a.prompts * a.group_size // a.micro_batch_size,
        num_generations=a.group_size, num_iterations=1, max_completion_length=a.max_new_tokens,
        temperature=1.0, top_k=0, top_p=1.0, use_transformers_continuous_batching=a.continuous_batching,
        loss_type="dapo", scale_rewards="group", epsilon=0.2, beta=0.0, max_grad_norm=1.0,
        learning_rate=1e-6, lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch_fused",
        weight_decay=0.0)
    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    trl.GRPOTrainer(model=lm, processing_class=tokenizer, args=config, reward_funcs=reward,
                    train_dataset=datasets.Dataset.from_list(turns), callbacks=[Turns()]).train()


device, dtype = shapes.use(a.threads)
if a.work:
    warnings.filterwarnings("ignore")
    REPLIES = os.fdopen(os.dup(1), "w")                         # what else is printed goes to stderr
    os.dup2(2, 1)
    folder, checkout = a.work
    if checkout != "trl":
        sys.path.insert(0, checkout)
    model = a.model or f"{folder}/model"
    same_for_all(model)
    (work_trl if checkout == "trl" else work_grpo)(folder, model)


# ----------------------------------------------------------------------------------------- the parent
def reply(name):
    """Wait for the end of this child's step -> mean length, share of dead groups, seconds of sampling."""
    line = children[name].stdout.readline()
    if not line:
        sys.exit(f"bench_step.py: {name} ended:\n{Path(folder, name).read_text()[-2000:]}")
    return json.loads(line)


def make_step(name):
    """-> seconds of this child's next step, and its reply."""
    started = time.perf_counter()
    print(file=children[name].stdin, flush=True)
    found = reply(name)
    return time.perf_counter() - started, *found


checkouts, children = {"grpo.py": str(shapes.ROOT)}, {}
if a.against:
    checkouts["older"] = a.against
if not a.no_trl:
    checkouts["TRL"] = "trl"
with tempfile.TemporaryDirectory() as folder:
    if not a.model:
        shapes.save(a.shape, f"{folder}/model", device, dtype)
    flags = "--train 500 --test 1 --traces 0 --numbers 3 --max_number 12 --max_target 40".split()
    subprocess.run([sys.executable, shapes.ROOT / "countdown.py", "--out", folder, *flags], check=True,
                   capture_output=True)
    for name, checkout in checkouts.items():                    # the first step, which loads and compiles
        children[name] = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--work", folder, checkout], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(Path(folder, name), "w"))
        reply(name)
    steps = [{name: make_step(name) for name in checkouts} for _ in range(1 + a.steps)][1:]
    for child in children.values():
        child.kill()
        child.wait()
print(shapes.machine(device, *shapes.peaks(device, dtype)))
print(f"{a.model or a.shape}: {a.prompts} prompts x {a.group_size}, at most {a.max_new_tokens} tokens;",
      f"{a.steps} steps of each, in turn")
medians = {}
for name in checkouts:
    seconds, lengths, dead, sampling = zip(*(step[name] for step in steps))
    medians[name], sampled = statistics.median(seconds), statistics.median(sampling)
    samples = f", sampling {sampled:.3f} s of it" if sampled else ""    # TRL does not tell
    print(f"{name:8} median {medians[name]:.3f} s ({min(seconds):.3f} to {max(seconds):.3f}){samples},",
          f"mean length {statistics.mean(lengths):.1f}, {statistics.mean(dead):.0%} of groups dead")
for name in list(checkouts)[1:]:
    by_step = statistics.median(step[name][0] / step["grpo.py"][0] for step in steps)
    print(f"{name} against grpo.py: {medians[name] / medians['grpo.py']:.2f}  (step by step: {by_step:.2f})")
