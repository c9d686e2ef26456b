"""Seconds of a whole GRPO step, grpo.py against TRL's GRPOTrainer: sampling, scoring, log-probabilities, gradient, update.

Both start from one checkpoint, with the same prompts, groups, rewards, micro-batches, learning rate and length limit, in fp32 on a
CPU and in bf16 on a GPU; TRL's settings are those that do what grpo.py does here (loss dapo, no KL, temperature 1 without top-k, one
update a step, no activation checkpointing, nothing saved). Steps alternate one by one, in one process; the first two of each
are left out. A made model gets its rewards by a coin that is a function of the text, so that no group is dead (grpo.py makes no
backward pass for those); it never ends a completion, or does so at random (--mean_length). A trained --model earns what it earns.

The limit is that of decoding (see shapes.limit) and 6 FLOPs a parameter and token of prompts and completions, at the copy bandwidth and
the matrix rate measured here; grpo.py's completions are counted for both.

    python tests/bench/bench_step.py                         # the tiny model of sft.py, random weights
    python tests/bench/bench_step.py --mean_length 30
    python tests/bench/bench_step.py --model runs/tiny-sft --prompts 16 --group_size 16 --max_new_tokens 80
    python tests/bench/bench_step.py --shape qwen2.5-3b --prompts 32 --prompt_length 150 --max_new_tokens 512 --micro_batch_size 8 --steps 4
    python tests/bench/bench_step.py --shape qwen2.5-3b ... --continuous_batching                   # TRL's other in-process backend
"""
import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import shapes
import torch

import countdown
import grpo
import rewards
import sft

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--model", help="checkpoint folder; without it one is made")
p.add_argument("--shape", default="tiny", help="of the made model; see shapes.py")
p.add_argument("--prompt_length", type=int, help="tokens of made-up prompts; without it, Countdown problems")
p.add_argument("--continuous_batching", action="store_true", help="TRL generates by transformers' engine for it")
p.add_argument("--steps", type=int, default=8, help="of each, after two that are not counted")
p.add_argument("--prompts", type=int, default=8, help="a step")
p.add_argument("--group_size", type=int, default=8, help="completions a prompt")
p.add_argument("--max_new_tokens", type=int, default=64, help="tokens of a completion at most")
p.add_argument("--mean_length", type=float, default=0, help="of the made model's completions, were there no limit; 0: none ends")
p.add_argument("--micro_batch_size", type=int, default=32, help="completions a pass")
p.add_argument("--threads", type=int, default=2, help="of the CPU")
a = p.parse_args()


device, dtype = shapes.use(a.threads)
warnings.filterwarnings("ignore")
try:
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, TrainerCallback
except ImportError:
    sys.exit("bench_step.py: TRL is not installed; pip install trl==1.16.0")
folder, made = Path(tempfile.mkdtemp()), not a.model
if made:
    a.model, tokenizer = str(folder / "model"), sft.tiny_tokenizer()
    shapes.save(a.shape, a.model, device, dtype)
with contextlib.redirect_stdout(io.StringIO()):
    countdown.main(["--out", str(folder), "--train", "500", "--test", "1", "--traces", "0",
                    "--numbers", "3", "--max_number", "12", "--max_target", "40"])

weights = ["correct=1", "format=0.1"]
args = grpo.parse_args([str(x) for x in (
    "--model", a.model, "--data", f"countdown={folder}", "--weights", *weights, "--prompts_per_step", a.prompts,
    "--group_size", a.group_size, "--max_new_tokens", a.max_new_tokens, "--micro_batch_size", a.micro_batch_size, "--max_resample", 0,
    "--curriculum_floor", 1, "--beta", 0, "--loss", "dapo", "--warmup", 0, "--lr", 1e-6, "--steps", a.steps + 2)])
tokenizer, eos_ids, context = grpo.load_tokenizer(args.model, train=True)
data = grpo.read_rows(args, tokenizer, context, args.data, "train")
if a.prompt_length:                                              # a byte is a token of the tiny tokenizer
    text = lambda i: f"{i} ".ljust(a.prompt_length - 3, "x")     # noqa: E731
    turns = [{"prompt": [{"role": "user", "content": text(i)}], "index": i} for i in range(len(data))]
    for row, turn in zip(data, turns):
        row["prompt_ids"] = tokenizer.apply_chat_template(turn["prompt"], add_generation_prompt=True, return_dict=False)
else:
    turns = [{"prompt": rewards.messages("countdown", row), "index": i} for i, row in enumerate(data)]
real = rewards.score_batch


def coin(tasks, texts, rows, *more, **others):
    """The task's own scoring, and in its place a coin."""
    return [part | {"reward": float(zlib.crc32(text.encode()) % 2)} for part, text in zip(real(tasks, texts, rows, *more, **others), texts)]


if made:
    rewards.score_batch = coin
run = grpo.build(args, tokenizer, eos_ids, data, [], device, dtype)
size, (bandwidth, rate) = sum(x.numel() for x in run.model.parameters()), shapes.peaks(device, dtype)


def ends_at_random(module, inputs, logits):
    """The end token comes with probability 1 / --mean_length, or never, whatever the others' logits."""
    end = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    end[tokenizer.eos_token_id] = True
    with torch.no_grad():
        rest = logits.masked_fill(end, -math.inf).logsumexp(-1, keepdim=True)
    return torch.where(end, rest - (math.log(a.mean_length - 1) if a.mean_length else 30), logits)


def reward(prompts, completion_ids, index, **others):
    """grpo.py's own scoring, on the same ids."""
    rows = [data[i] for i in index]
    parts = rewards.score_batch(["countdown"] * len(rows), tokenizer.batch_decode(completion_ids, skip_special_tokens=True), rows,
                                weights=args.weights, n_tokens=list(map(len, completion_ids)))
    return [part["reward"] for part in parts]


class Alternate(TrainerCallback):
    """After each step of TRL's one of ours. A step of TRL's begins where ours ended, so that its data loading counts too."""
    mine, theirs, lengths, sampling, dead, least, since = [], [], [], [], [], [], None

    def on_step_begin(self, *_, **__):
        self.since = self.since or time.perf_counter()

    def on_step_end(self, _, state, *__, **___):
        shapes.sync()
        done = time.perf_counter()
        metrics, first = grpo.train_step(run, state.global_step)
        shapes.sync()
        end = time.perf_counter()
        self.theirs.append(done - self.since)
        self.mine.append(end - done)
        self.lengths.append(metrics["completion_length"])
        self.dead.append(metrics["frac_reward_zero_std"])
        self.sampling.append(metrics["sample_seconds"])
        starts, new = [len(r.prompt) for r in first], [len(r.completion) for r in first]
        self.least.append(shapes.limit(run.model, starts, new, max(new), bandwidth, rate) + 6 * size * (sum(starts) + sum(new)) / rate)
        self.since = time.perf_counter()


config = trl.GRPOConfig(
    output_dir=str(folder / "trl"), use_cpu=run.device.type == "cpu", bf16=dtype == torch.bfloat16, gradient_checkpointing=False,
    report_to="none", save_strategy="no", eval_strategy="no", disable_tqdm=True, logging_steps=1, max_steps=a.steps + 2, seed=0,
    per_device_train_batch_size=a.micro_batch_size, gradient_accumulation_steps=a.prompts * a.group_size // a.micro_batch_size,
    num_generations=a.group_size, num_iterations=1, max_completion_length=a.max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
    beta=0.0, loss_type="dapo", scale_rewards="group", epsilon=0.2, learning_rate=1e-6, lr_scheduler_type="constant",
    warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused",
    use_transformers_continuous_batching=a.continuous_batching)
if a.prompts * a.group_size % a.micro_batch_size:
    sys.exit("bench_step.py: --prompts times --group_size must be a multiple of --micro_batch_size")
alternate = Alternate()
model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype)
for lm in (model, run.model) if made else ():
    lm.get_output_embeddings().register_forward_hook(ends_at_random)
trainer = trl.GRPOTrainer(model=model, processing_class=tokenizer, args=config,
                          reward_funcs=reward, train_dataset=datasets.Dataset.from_list(turns), callbacks=[alternate])
with contextlib.redirect_stdout(io.StringIO()):
    trainer.train()
lengths = alternate.lengths, [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
mine, theirs = alternate.mine[2:], alternate.theirs[2:]
least = statistics.median(alternate.least[2:])
print(shapes.machine(device, bandwidth, rate))
print(f"{size / 1e6:.1f} M parameters, {str(dtype)[6:]}; {a.prompts} prompts x {a.group_size}, at most {a.max_new_tokens} tokens; "
      f"{len(mine)} alternating steps")
for name, seconds, length in (("grpo.py", mine, lengths[0]), (f"TRL {trl.__version__}", theirs, lengths[1])):
    print(f"{name:10}  median {statistics.median(seconds):.3f} s a step  ({min(seconds):.3f} to {max(seconds):.3f}), "
          f"{least / statistics.median(seconds):.1%} of the limit, mean completion {statistics.mean(length[2:]):.1f} tokens")
print(f"grpo.py samples and scores for {statistics.median(alternate.sampling[2:]):.3f} s of it; {statistics.mean(alternate.dead[2:]):.0%} "
      "of its groups were dead")
print(f"ratio       {statistics.median(theirs) / statistics.median(mine):.2f}  (step by step: "
      f"{statistics.median(t / m for t, m in zip(theirs, mine)):.2f})")
