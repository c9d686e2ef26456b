"""Seconds of a whole GRPO step, grpo.py against TRL's GRPOTrainer: sampling, scoring, log-probabilities, gradient, update.

Both start from one checkpoint, in fp32, with the same Countdown prompts, groups, graders, micro-batches, learning rate and
length limit; TRL's settings are those that do what grpo.py does here (loss dapo, no KL, temperature 1 without top-k, one
update a step, no activation checkpointing, nothing saved). Steps alternate one by one, in one process; the first two of each
are left out. The made model never ends a completion, so that both sample exactly as many tokens; with --mean_length, or with a
trained --model, they are ragged.

    python tests/bench/bench_step.py                         # the tiny model of sft.py, random weights
    python tests/bench/bench_step.py --mean_length 30
    python tests/bench/bench_step.py --model runs/tiny-sft
"""
import argparse
import contextlib
import io
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--model", help="checkpoint folder; without it a tiny one is made")
p.add_argument("--steps", type=int, default=8, help="of each, after two that are not counted")
p.add_argument("--prompts", type=int, default=8, help="a step")
p.add_argument("--group_size", type=int, default=8, help="completions a prompt")
p.add_argument("--max_new_tokens", type=int, default=64, help="tokens of a completion at most")
p.add_argument("--mean_length", type=float, default=0, help="of the made model's completions, were there no limit; 0: none ends")
p.add_argument("--micro_batch_size", type=int, default=32, help="completions a pass")
p.add_argument("--threads", type=int, default=2, help="of the CPU")
a = p.parse_args()
os.environ |= {"OMP_NUM_THREADS": str(a.threads), "OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin stall a shared machine

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))
import countdown  # noqa: E402
import grpo  # noqa: E402
import rewards  # noqa: E402
import sft  # noqa: E402

torch.set_num_threads(a.threads)
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
    sft.tiny_model(tokenizer, 0).save_pretrained(a.model)
    tokenizer.save_pretrained(a.model)
with contextlib.redirect_stdout(io.StringIO()):
    countdown.main(["--out", str(folder), "--train", "500", "--test", "1", "--traces", "0",
                    "--numbers", "3", "--max_number", "12", "--max_target", "40"])

weights = ["correct=1", "format=0.1"]
args = grpo.parse_args([str(x) for x in (
    "--model", a.model, "--data", f"countdown={folder}", "--weights", *weights, "--prompts_per_step", a.prompts,
    "--group_size", a.group_size, "--max_new_tokens", a.max_new_tokens, "--micro_batch_size", a.micro_batch_size, "--max_resample", 0,
    "--curriculum_floor", 1, "--beta", 0, "--loss", "dapo", "--warmup", 0, "--lr", 1e-6, "--dtype", "float32", "--steps", a.steps + 2)])
device, dtype = grpo.start_processes(args.dtype)
tokenizer, eos_ids, context = grpo.load_tokenizer(args.model, train=True)
data = grpo.read_rows(args, tokenizer, context, args.data, "train")
run = grpo.build(args, tokenizer, eos_ids, data, [], device, dtype)


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
    mine, theirs, lengths, sampling, since = [], [], [], [], None

    def on_step_begin(self, *_, **__):
        self.since = self.since or time.perf_counter()

    def on_step_end(self, _, state, *__, **___):
        done = time.perf_counter()
        metrics, first = grpo.train_step(run, state.global_step)
        end = time.perf_counter()
        self.theirs.append(done - self.since)
        self.mine.append(end - done)
        self.lengths.append(metrics["completion_length"])
        self.sampling.append(metrics["sample_seconds"])
        self.since = time.perf_counter()


config = trl.GRPOConfig(
    output_dir=str(folder / "trl"), use_cpu=run.device.type == "cpu", bf16=False, gradient_checkpointing=False, report_to="none",
    save_strategy="no", eval_strategy="no", disable_tqdm=True, logging_steps=1, max_steps=a.steps + 2, seed=0,
    per_device_train_batch_size=a.micro_batch_size, gradient_accumulation_steps=a.prompts * a.group_size // a.micro_batch_size,
    num_generations=a.group_size, num_iterations=1, max_completion_length=a.max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
    beta=0.0, loss_type="dapo", scale_rewards="group", epsilon=0.2, learning_rate=1e-6, lr_scheduler_type="constant",
    warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused")
if a.prompts * a.group_size % a.micro_batch_size:
    sys.exit("bench_step.py: --prompts times --group_size must be a multiple of --micro_batch_size")
turns = [{"prompt": rewards.messages("countdown", row), "index": i} for i, row in enumerate(data)]
alternate = Alternate()
model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
for lm in (model, run.model) if made else ():
    lm.get_output_embeddings().register_forward_hook(ends_at_random)
trainer = trl.GRPOTrainer(model=model, processing_class=tokenizer, args=config,
                          reward_funcs=reward, train_dataset=datasets.Dataset.from_list(turns), callbacks=[alternate])
with contextlib.redirect_stdout(io.StringIO()):
    trainer.train()
lengths = alternate.lengths, [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
mine, theirs = alternate.mine[2:], alternate.theirs[2:]
size = sum(x.numel() for x in run.model.parameters()) / 1e6
print(f"{size:.1f} M parameters, fp32, {a.threads} threads; {a.prompts} prompts x {a.group_size}, "
      f"at most {a.max_new_tokens} tokens; {len(mine)} alternating steps")
for name, seconds, length in (("grpo.py", mine, lengths[0]), (f"TRL {trl.__version__}", theirs, lengths[1])):
    print(f"{name:10}  median {statistics.median(seconds):.3f} s a step  ({min(seconds):.3f} to {max(seconds):.3f}), "
          f"mean completion {statistics.mean(length[2:]):.1f} tokens")
print(f"grpo.py samples and scores for {statistics.median(alternate.sampling[2:]):.3f} s of it")
print(f"ratio       {statistics.median(theirs) / statistics.median(mine):.2f}  (step by step: "
      f"{statistics.median(t / m for t, m in zip(theirs, mine)):.2f})")
