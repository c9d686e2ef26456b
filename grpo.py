"""GRPO: teach a language model to reason with verifiable rewards, group sampling and a clipped policy gradient.

One step of the loop below, with the numbers that the code repeats:

1. Draw prompts. A curriculum brings a prompt back the sooner the likelier its group is to disagree with itself.
2. Sample a group of G completions for each. Token ids are kept end to end, never re-tokenised; the end token is part of
   the completion and is trained.
3. Score every completion with rewards.py. A group whose rewards are all equal carries no gradient: fresh prompts are
   drawn in place of such groups, up to --max_resample times (DAPO, arXiv 2503.14476, section 3.2).
4. Advantage of a completion: (reward - mean of its group) / std of its group (GRPO, arXiv 2402.03300, section 4.1.2).
5. Log-probabilities of the sampled ids under the policy, at the sampling temperature, a chunk of positions at a time:
   no [batch, time, vocabulary] tensor ever exists.
6. Clipped policy loss, plus --beta times the k3 estimate of the KL divergence to the frozen reference. Every loss is
   normalised by a count over the whole step, so that neither micro-batches nor processes change the update.
7. Clip the gradient, AdamW on fp32 master weights, and on the next step the sampler sees the new weights.

Where it departs from the paper: the loss is averaged over tokens by default (--loss dapo; --loss grpo is the paper's), beta
is small or 0, the old log-probabilities are the policy's own from the first pass over the rollouts (not the sampler's,
whose kernels differ), and dead groups are replaced.

    python grpo.py --model Qwen/Qwen2.5-3B-Instruct                 # Countdown, one GPU, the defaults below
    python grpo.py @recipes/tiny/grpo.txt                           # minutes on two CPU cores
    torchrun --nproc_per_node 8 grpo.py --model ... --data gsm8k    # eight GPUs
"""
import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import huggingface_hub
import jinja2
import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import rewards

HEAD_LOGITS = 2 ** 26                                           # that exist at a time: 256 MB in fp32
BAD_STEPS = 5                                                   # gradients in a row that are not finite, then the run stops
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))              # torchrun's
transformers.utils.logging.disable_progress_bar()


def fail(message):
    """One line on stderr and exit code 2: what a wrong flag, file or model gets."""
    print(f"grpo.py: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def note(message):
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)


# ------------------------------------------------------------------------------------------- options
class Flags(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, line):                   # of an @file: flags as in a shell, # comments
        try:
            return shlex.split(line, comments=True)
        except ValueError as err:
            fail(f"{line}: {err}")

    def error(self, message):
        fail(message)


def parse_args(argv=None):
    p = Flags("grpo.py", description=__doc__.split("\n\n")[0], fromfile_prefix_chars="@",
              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument_group("task").add_argument
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--data", nargs="+", default=["countdown"], metavar="SOURCE", help="prompts, as TASK[=PATH][:N]; several are mixed")
    add("--pass_rate", nargs=2, type=float, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
        help="keep rows whose pass_rate lies within; eval.py --samples 8 writes files with that column")
    add("--style", choices=rewards.STYLES, default="reasoning", help="name of the reasoning tag")
    add("--weights", nargs="+", default=["correct=1", "format=0.3", "process=0.1", "efficiency=0.1"], metavar="PART=WEIGHT",
        help=f"of the reward's parts ({', '.join(rewards.WEIGHTS)}); those not named weigh 0")
    add("--length_penalty", nargs=2, type=int, default=[500, 800], metavar=("START", "END"),
        help="tokens over which the length part falls from 0 to -1")
    add = p.add_argument_group("sampling").add_argument
    add("--prompts_per_step", type=int, default=32, help="groups a step, over all processes")
    add("--group_size", type=int, default=8, help="completions a prompt")
    add("--max_new_tokens", type=int, default=1024, help="tokens of a completion at most")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the log-probabilities that are trained")
    add("--temperature_end", type=float, help="go there linearly by the last step; none: stay")
    add("--max_resample", type=int, default=2, help="rounds of fresh prompts a step for dead groups; 0: off")
    add("--curriculum_floor", type=float, default=0.1, help="how often a prompt that is always or never solved comes, against "
        "one that is solved half the time; 1: all alike")
    add("--sample_batch_size", type=int, default=512, help="completions sampled at once: memory only")
    add = p.add_argument_group("loss").add_argument
    add("--loss", choices=["grpo", "dr_grpo", "dapo", "cispo", "gspo"], default="dapo", help="see policy_loss")
    add("--scale", choices=["group", "batch", "none"], default="group", help="the std that divides an advantage")
    add("--clip_low", type=float, default=0.2, help="the ratio is clipped below 1 - this")
    add("--clip_high", type=float, default=0.2, help="the ratio is clipped above 1 + this (0.28: clip-higher)")
    add("--beta", type=float, default=0.001, help="weight of the KL to the model at the start; 0: no reference in memory either")
    add("--mask_truncated", action="store_true", help="do not train on completions cut off at --max_new_tokens")
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=500, help="of sampling and update")
    add("--inner_epochs", type=int, default=1, help="updates a step, over the same rollouts")
    add("--micro_batch_size", type=int, default=8, help="completions a pass: speed and memory only")
    add("--lr", type=float, default=1e-6, help="peak learning rate; 1e-6 suits whole models, 1e-5 LoRA")
    add("--warmup", type=int, default=10, help="steps of linear warm-up")
    add("--lr_schedule", choices=["constant", "linear", "cosine"], default="constant", help="after the warm-up")
    add("--max_grad_norm", type=float, default=1.0, help="clips the gradient to this norm; 0: never")
    add("--optim", choices=["adamw", "adamw8bit", "muon"], default="adamw",
        help="8-bit states take 2 bytes a parameter, not 8; muon: for the layers' matrices, the rest by adamw")
    add("--muon_lr", type=float, default=1e-3, help="peak learning rate of Muon's matrices")
    add = p.add_argument_group("model and memory").add_argument
    add("--lora_rank", type=int, default=0, help="LoRA on all linear layers; 0: train the whole model")
    add("--lora_alpha", type=float, default=32, help="the adapter is scaled by alpha / rank")
    add("--load_in_4bit", action="store_true", help="QLoRA: the frozen base in nf4")
    add("--activation_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of compute; auto: bfloat16 on a GPU, else float32")
    add("--fsdp", action="store_true", help="shard the whole model's training over torchrun's processes")
    add("--chat_template", metavar="FILE", help="Jinja, for a tokenizer that has none")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add = p.add_argument_group("evaluation, files and logs").add_argument
    add("--eval_data", nargs="+", default=[], metavar="SOURCE", help="held-out rows, answered greedily")
    add("--eval_split", default="test", help="of --eval_data")
    add("--eval_every", type=int, default=50, help="steps between evaluations")
    add("--output_dir", default="runs/grpo", help="final model, checkpoint-<step>/, metrics.jsonl, samples.jsonl, args.json")
    add("--save_every", type=int, default=50, help="steps between checkpoints; 0: only when stopped")
    add("--keep", type=int, default=2, help="checkpoints that stay")
    add("--merge", action="store_true", help="with --lora_rank: also write merged/, the base with the adapter in it")
    add("--sample_every", type=int, default=10, help="steps between whole completions in samples.jsonl")
    add("--log_to", choices=["tensorboard", "wandb"], help="besides metrics.jsonl")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint in --output_dir")
    add("--overwrite", action="store_true", help="drop the run that is in --output_dir")
    add("--seed", type=int, default=0, help="of data order and sampling")
    a = p.parse_args(argv)
    for name, low in dict(prompts_per_step=1, max_new_tokens=1, temperature=1e-3, temperature_end=1e-3, max_resample=0, clip_low=0,
                          sample_batch_size=1, clip_high=0, beta=0, steps=1, inner_epochs=1, micro_batch_size=1, lr=0, muon_lr=0, warmup=0,
                          max_grad_norm=0, lora_rank=0, lora_alpha=1e-3, eval_every=1, save_every=0, keep=1, sample_every=1,
                          seed=0).items():
        if getattr(a, name) is not None and not low <= getattr(a, name) < math.inf:
            fail(f"--{name} {getattr(a, name)}: must be at least {low}")
    for wrong, message in (
            (a.group_size < 2, f"--group_size {a.group_size}: a group needs at least 2 completions"),
            (not 0 < a.curriculum_floor <= 1, f"--curriculum_floor {a.curriculum_floor}: must be above 0 and at most 1"),
            (not 0 <= a.length_penalty[0] < a.length_penalty[1], "--length_penalty: START must be below END, and at least 0"),
            (not 0 <= a.pass_rate[0] <= a.pass_rate[1] <= 1, "--pass_rate: LOW and HIGH must be between 0 and 1, in this order"),
            (a.chat_template and not Path(a.chat_template).is_file(), f"--chat_template {a.chat_template}: no such file"),
            (a.load_in_4bit and not a.lora_rank, "--load_in_4bit: 4-bit weights do not train; add --lora_rank 32"),
            (a.seed >= 2 ** 32, f"--seed {a.seed}: must be below 2 ** 32"),
            (Path(a.model).resolve() == Path(a.output_dir).resolve(), f"--output_dir {a.output_dir}: is --model itself; take another"),
            (a.merge and not a.lora_rank, "--merge: there is an adapter to merge only with --lora_rank"),
            (a.fsdp and WORLD == 1, "--fsdp: start with torchrun --nproc_per_node=N grpo.py ..."),
            (a.fsdp and (a.lora_rank or a.optim != "adamw"), "--fsdp: goes with whole models and --optim adamw"),
            (a.resume and a.overwrite, "--resume goes on with a run and --overwrite drops it: take one")):
        if wrong:
            fail(message)
    for name, flag in (("peft", a.lora_rank and "--lora_rank"), ("bitsandbytes", a.load_in_4bit and "--load_in_4bit"),
                       ("bitsandbytes", a.optim == "adamw8bit" and "--optim adamw8bit"),
                       ("wandb", a.log_to == "wandb" and "--log_to wandb"),
                       ("tensorboard", a.log_to == "tensorboard" and "--log_to tensorboard")):
        try:
            flag and importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
        except ImportError:
            fail(f"{flag} needs a package that is not there: pip install {name}")
    try:
        given = {part: float(value) for part, _, value in (text.partition("=") for text in a.weights)}
    except ValueError:
        fail(f"--weights {' '.join(a.weights)}: PART=NUMBER each")
    if set(given) - set(rewards.WEIGHTS) or not all(0 <= value < math.inf for value in given.values()):
        fail(f"--weights {' '.join(a.weights)}: parts are {', '.join(rewards.WEIGHTS)}, weights at least 0")
    a.weights, a.temperature_end = dict.fromkeys(rewards.WEIGHTS, 0.0) | given, a.temperature_end or a.temperature
    return a


# ------------------------------------------------------------------------------------------- pure functions
def advantages(rewards, group_size, scale="group"):
    """[N] rewards, the G of a group side by side -> [N] advantages: r - mean(group), over a standard deviation (GRPO,
    arXiv 2402.03300, section 4.1.2). scale: `group` (the paper), `batch` (one std for all, arXiv 2508.08221), `none`
    (Dr. GRPO, arXiv 2503.20783). A group of equal rewards gets exactly 0, whatever rounding made of its mean."""
    groups = rewards.float().view(-1, group_size)                                    # [N / G, G]
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (groups.std() + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale {scale!r}: one of group, batch, none")
    dead = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return centred.masked_fill(dead, 0.0).view(-1)


def policy_loss(logp, old_logp, ref_logp, adv, mask, *, loss="dapo", clip_low=0.2, clip_high=0.2, beta=0.0,
                num_tokens, num_seqs, max_new_tokens):
    """One micro-batch's share of the step's loss, to be minimised: shares add up to the loss of the whole step.

    logp, old_logp, ref_logp: [n, T] log-probabilities of the sampled ids (ref_logp may be None when beta is 0);
    adv: [n]; mask: [n, T], 1 on trained tokens; num_tokens, num_seqs: of the whole step, over all processes.
      grpo     mean over a sequence's tokens, then over sequences     arXiv 2402.03300, eq. 3
      dr_grpo  sum over tokens / (sequences * max_new_tokens)         arXiv 2503.20783, section 3.2
      dapo     mean over all the step's tokens                        arXiv 2503.14476, eq. 8
      cispo    REINFORCE weighted by the capped, detached ratio       arXiv 2506.13585, eq. 4
      gspo     one ratio per sequence, its tokens' geometric mean     arXiv 2507.18071, eqs. 5-7
    Returns the loss and a dict of its parts, normalised so that they too add up over micro-batches."""
    log_ratio = logp - old_logp                                                      # [n, T]
    lengths = mask.sum(1, keepdim=True).clamp(min=1)                                 # [n, 1]
    if loss == "gspo":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / lengths                # [n, 1]
    ratio, adv = log_ratio.exp(), adv[:, None]
    if loss == "cispo":
        per_token = -ratio.clamp(max=1 + clip_high).detach() * adv * logp
    else:                                                                            # PPO, arXiv 1707.06347, eq. 7
        per_token = -torch.min(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    kl = torch.zeros_like(logp)
    if beta:                                                                         # k3, arXiv 2402.03300, eq. 4
        kl = (ref_logp - logp).exp() - (ref_logp - logp) - 1
        per_token = per_token + beta * kl
    weight = {"grpo": 1 / (lengths * num_seqs), "gspo": 1 / (lengths * num_seqs), "dapo": 1 / num_tokens,
              "cispo": 1 / num_tokens, "dr_grpo": 1 / (num_seqs * max_new_tokens)}[loss]
    total = (per_token * mask * weight).sum()
    with torch.no_grad():
        parts = {"loss": total, "kl": (kl * mask).sum() / num_tokens,
                 "clip_low": ((ratio < 1 - clip_low) * (adv < 0) * mask).sum() / num_tokens,
                 "clip_high": ((ratio > 1 + clip_high) * (adv > 0) * mask).sum() / num_tokens}
    return total, {name: value.detach() for name, value in parts.items()}


def completion_logps(lm, ids, prompt_lengths, mask, temperature, chunk=HEAD_LOGITS):
    """[n, T] log-probabilities of the completions in ids, at `temperature`, and [n, T] entropies (no gradient).

    ids [n, L]: prompt + completion, right-padded (causal attention then needs no mask); prompt_lengths [n]; mask [n, T].
    The head sees only completion positions, a few at a time, so that `chunk` logits exist at once; the backward pass
    computes them again."""
    def head(h, t):
        logps = (lm.get_output_embeddings()(h).float() / temperature).log_softmax(-1)              # fp32: bf16 ratios are noise
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(1, t[:, None]).squeeze(1), entropy

    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state                       # [n, L, H]
    place = (prompt_lengths[:, None] + torch.arange(mask.shape[1], device=ids.device)).clamp(max=ids.shape[1] - 1)    # [n, T]
    on, row = mask.bool(), torch.arange(len(ids), device=ids.device)[:, None]
    targets, hidden = ids[row, place][on], hidden[row, place - 1][on]                              # [M], [M, H]
    size = max(1, chunk // lm.config.vocab_size)
    whole = len(targets) <= size or not torch.is_grad_enabled()
    pieces = [head(h, t) if whole else checkpoint(head, h, t, use_reentrant=False)
              for h, t in zip(hidden.split(size), targets.split(size))]
    return tuple(torch.zeros_like(mask).masked_scatter(on, torch.cat(x)) for x in zip(*pieces))


def learning_rate(step, args):
    """Of step 1, 2, ...: linear warm-up over --warmup steps, then --lr_schedule, which would reach 0 one step after the last."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    progress = (step - 1 - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * {"constant": 1, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[args.lr_schedule]


# ------------------------------------------------------------------------------------------- 1. prompts
class Curriculum:
    """Which prompt comes next. Each has a due time, counted in groups drawn so far, and those due first are drawn.

    At the start each is due once, in random order. A prompt whose group was scored is due again after n / w more groups, n
    being the number of prompts and w = max(floor, 1 - p^G - (1 - p)^G) the chance that its next group is neither all right nor
    all wrong. p is its pass rate over past groups, each weighing half of the next one, and one more completion that is half
    right: one bad group does not rule a prompt out."""

    def __init__(self, n, group_size, seed, floor):
        self.group_size, self.seed, self.floor, self.drawn = group_size, seed, floor, 0
        self.due = torch.from_numpy(np.random.default_rng(seed).permutation(n).astype(float))
        self.passed, self.tried = torch.zeros(n), torch.zeros(n)

    def draw(self, k, exclude=()):
        """The k prompts that are due first, less those in exclude."""
        due = self.due.clone()
        due[list(exclude)] = math.inf
        first = due.argsort(stable=True)[:k]
        return first[due[first] < math.inf].tolist()

    def pass_rate(self, i):
        return float((self.passed[i] + 0.5) / (self.tried[i] + 1))

    def record(self, i, passed):
        """A group of prompt i had `passed` right completions."""
        self.passed[i] = self.passed[i] / 2 + passed
        self.tried[i] = self.tried[i] / 2 + self.group_size
        p = self.pass_rate(i)
        w = max(self.floor, 1 - p ** self.group_size - (1 - p) ** self.group_size)
        spread = np.random.default_rng([self.seed, self.drawn]).uniform(0.75, 1.25)     # else the same prompts always meet
        self.due[i] = self.drawn + spread * len(self.due) / w
        self.drawn += 1


# ------------------------------------------------------------------------------------------- 2. sampling
def uniforms(seed, step, rows, n):
    """[len(rows), n] numbers in [0, 1): the noise of a row depends on (seed, step, row) alone, not on its company."""
    streams = (np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, row])) for row in rows)
    return torch.from_numpy(np.stack([stream.random(n, dtype=np.float32) for stream in streams]))


def pick(logits, temperature, u):
    """logits [n, V], u [n] uniform or None (greedy) -> ids [n] and their log-probabilities [n] at `temperature`."""
    logps = (logits.float() / temperature).log_softmax(-1)
    if u is None:
        ids = logps.argmax(-1)
    else:                                                       # inverse CDF: the first id whose cumulated mass exceeds u
        mass = logps.exp().cumsum(-1)
        ids = torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return ids, logps.gather(1, ids[:, None]).squeeze(1)


@torch.inference_mode()
def generate(model, prompts, noise, *, max_new_tokens, temperature, eos_ids, pad_id, group_size=1, check=lambda: None):
    """P prompts (lists of ids), each prefilled once and forked for its group -> P * G completions (lists of ids that
    end with the end token, unless cut off at max_new_tokens) and the log-probability of each of their tokens.
    noise [P * G, max_new_tokens] from `uniforms`, or None for greedy. Finished rows leave the batch."""
    assert not model.training, "sampling in training mode with activation checkpointing drops the cache without a word"
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)             # left-padded [P, W]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    padded = bool((mask == 0).any())
    out = model(input_ids=ids, attention_mask=mask if padded else None, use_cache=True, logits_to_keep=1,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(group_size, 0)           # [n, V]
    cache.batch_repeat_interleave(group_size)
    mask = mask.repeat_interleave(group_size, 0)
    position = mask.sum(1)                                                                            # [n] of the next token
    n = len(mask)
    rows, done = torch.arange(n, device=device), torch.zeros(n, dtype=torch.bool, device=device)      # rows still in the batch
    tokens, length = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device), torch.full((n,), max_new_tokens, device=device)
    logps = torch.zeros(n, max_new_tokens, device=device)
    stop, noise = torch.tensor(sorted(eos_ids), device=device), None if noise is None else noise.to(device)
    for t in range(max_new_tokens):
        check()
        token, logp = pick(logits, temperature, None if noise is None else noise[rows, t])
        tokens[rows, t], logps[rows, t] = token, logp
        ended = torch.isin(token, stop) & ~done
        length[rows[ended]] = t + 1
        done = done | ended
        alive = len(done) - int(done.sum())
        if not alive or t + 1 == max_new_tokens:
            break
        if alive <= 0.9 * len(done):
            keep = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, done, token, mask, position = rows[keep], done[keep], token[keep], mask[keep], position[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(input_ids=token[:, None], attention_mask=mask if padded else None, position_ids=position[:, None],
                    past_key_values=cache, use_cache=True)
        logits, position = out.logits[:, -1], position + 1
    length = length.tolist()
    return [row[:k] for row, k in zip(tokens.tolist(), length)], [row[:k] for row, k in zip(logps.cpu(), length)]


# ------------------------------------------------------------------------------------------- 1-4. rollouts
@dataclass
class Rollout:
    """One completion: what was asked, what the model wrote, what it earned."""
    index: int                      # of its row in the data
    prompt: list                    # ids
    completion: list                # ids, with the end token
    logps: torch.Tensor             # [len(completion)], as the sampler saw them
    ended: bool                     # False: cut off at max_new_tokens
    text: str
    parts: dict                     # of its reward
    advantage: float = 0.0


def gather(x):
    """[x of process 0, x of process 1, ...], the same list in all of them."""
    shares = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(shares, x)
    return shares


def rollout(run, data, indices, step, temperature, first_row=0):
    """Scored completions, a group for each index into data; temperature 0: greedy, one for each. Processes share the work and
    all return all of it, so that from here on every one of them computes the same. If one is to stop, all do."""
    try:
        share = rollout_share(run, data, indices, step, temperature, first_row)
    except KeyboardInterrupt as stop:
        share = stop
    shares = gather(share)
    for share in shares:
        if isinstance(share, KeyboardInterrupt):
            raise share
    return [r for slot in range(len(indices)) for r in shares[slot % WORLD][slot // WORLD]]


def rollout_share(run, data, indices, step, temperature, first_row):
    """This process's groups of a rollout."""
    args, size = run.args, run.args.group_size if temperature else 1
    mine, out = range(RANK, len(indices), WORLD), []
    while mine:
        part = mine[:max(1, args.sample_batch_size // size)]
        rows = [data[indices[slot]] for slot in part]
        places = [first_row + slot * size + g for slot in part for g in range(size)]
        noise = uniforms(args.seed, step, places, args.max_new_tokens) if temperature else None
        try:
            ids, logps = generate(run.sampler, [row["prompt_ids"] for row in rows], noise, group_size=size, check=run.check,
                                  max_new_tokens=args.max_new_tokens, temperature=temperature or 1.0, eos_ids=run.eos_ids,
                                  pad_id=run.tokenizer.pad_token_id or 0)                                                  # 2
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            ids = None
        if ids is None:                                         # outside of the except, which holds on to the memory
            torch.cuda.empty_cache()
            args.sample_batch_size = len(part) // 2 * size
            note(f"out of GPU memory: --sample_batch_size {args.sample_batch_size} from here on; the samples are the same")
            continue
        mine = mine[len(part):]
        rows = [row for row in rows for _ in range(size)]
        texts = run.tokenizer.batch_decode(ids, skip_special_tokens=True)
        parts = rewards.score_batch([row["task"] for row in rows], texts, rows, style=args.style, weights=args.weights,
                                    n_tokens=[len(x) for x in ids], length=args.length_penalty)                            # 3
        out += [[Rollout(indices[slot], data[indices[slot]]["prompt_ids"], ids[k], logps[k], ids[k][-1] in run.eos_ids,
                         texts[k], parts[k]) for k in range(j * size, (j + 1) * size)] for j, slot in enumerate(part)]
    return out


def collect(run, step, temperature):
    """One step's rollouts: -> (those to train on, the first draw, all drawn). Dead groups are not trained on, unless there
    is nothing else; metrics describe the first draw, which nothing has selected."""
    args, G = run.args, run.args.group_size
    trained, first, drawn = [], [], []
    for _ in range(1 + args.max_resample):
        indices = run.curriculum.draw(args.prompts_per_step - len(trained) // G, {r.index for r in drawn})                 # 1
        new = rollout(run, run.data, indices, step, temperature, len(drawn))
        first, drawn = first or new, drawn + new
        trained += [r for at in range(0, len(new), G) if not dead(new[at:at + G]) for r in new[at:at + G]]
        if len(trained) == args.prompts_per_step * G:
            break
    trained = trained if trained and args.max_resample else first
    adv = advantages(torch.tensor([r.parts["reward"] for r in trained]), G, args.scale)                                    # 4
    for r, r.advantage in zip(trained, adv.tolist()):
        pass
    return trained, first, drawn


def dead(group):
    return len({r.parts["reward"] for r in group}) == 1


# ------------------------------------------------------------------------------------------- the policy
def base_lm(model):
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def refresh(sampler, model):
    """Copies the weights of the plain model that `model` amounts to into `sampler`, in place: 4-bit weights dequantised, sharded
    ones gathered, B A scaling of an adapter added in fp32 to its base, which stays pristine. A policy that is one whole plain
    model samples for itself."""
    if sampler is model:
        return
    lm, target = base_lm(model), dict(sampler.named_parameters())
    for name, w in lm.named_parameters():
        layer, adapted, leaf = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if getattr(w, "quant_state", None) is not None:
            import bitsandbytes
            w = bitsandbytes.functional.dequantize_4bit(w, w.quant_state)
        if adapted and leaf == "weight":
            lora = lm.get_submodule(layer)
            w = w.float() + lora.scaling["default"] * (lora.lora_B["default"].weight.float() @ lora.lora_A["default"].weight.float())
        target[name.replace(".base_layer.", ".")].copy_(full(w))


def full(x):
    """A sharded tensor gathered; all processes must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


class Masters:
    """fp32 copies of trained parameters in a shorter type, for the optimiser: an update of 5e-7 would round to nothing in bf16.
    Gradients are added up in fp32 as they arrive. A parameter in fp32 is its own master."""

    def __init__(self, parameters):
        self.short = {p: torch.nn.Parameter(p.detach().float()) for p in parameters if p.dtype != torch.float32}
        self.parameters = [self.short.get(p, p) for p in parameters]
        for p in self.short:
            p.register_post_accumulate_grad_hook(self.take)

    def take(self, p):
        master = self.short[p]
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    def zero_grad(self):
        for p in (*self.short, *self.parameters):
            p.grad = None

    @torch.no_grad()
    def write_back(self):
        for p, master in self.short.items():
            p.copy_(master)


def load_tokenizer(args):
    if not Path(args.model).is_dir():
        try:
            huggingface_hub.model_info(args.model, timeout=10)
        except huggingface_hub.errors.HfHubHTTPError:           # an answer, which from_pretrained will explain
            pass
        except Exception:                                       # no network: the cache, without a minute of trying again
            huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        tok = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except Exception as err:                                    # any of a dozen kinds, for what is one thing to the user
        if (Path(args.model) / "adapter_config.json").exists():
            fail(f"--model {args.model} is an adapter: train on from its merged model (sft.py --merge writes it)")
        if "trust_remote_code" in str(err):
            fail(f"--model {args.model} comes with code of its own: read it, then pass --trust_remote_code to run it")
        fail(f"--model {args.model}: neither a folder with a model nor a hub id that can be reached now "
             f"({' '.join(str(err).split())[:200]})")
    tok.chat_template = Path(args.chat_template).read_text() if args.chat_template else tok.chat_template
    if not tok.chat_template:
        fail(f"--model {args.model}: its tokenizer has no chat template; pass one with --chat_template FILE")
    end_ids(args, tok)
    scaled = [k for k in ("final_logit_softcapping", "logit_scale", "logits_scaling")
              if getattr(config.get_text_config(), k, None) not in (None, 1)]
    if scaled:                                                  # the chunked head would leave it out
        fail(f"--model {args.model}: it scales its logits ({scaled[0]}), which completion_logps does not")
    return tok, getattr(config.get_text_config(), "max_position_embeddings", math.inf)


def end_ids(args, tokenizer):
    """Every id that ends a completion: models have several."""
    try:
        ends = GenerationConfig.from_pretrained(args.model).eos_token_id
    except OSError:                                             # no such file: transformers would make it of the config
        ends = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code).get_text_config().eos_token_id
    ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return ids or fail(f"--model {args.model}: neither its tokenizer nor its generation config names an end token")


def load_lm(args, device, dtype, load_in_4bit=False):
    kwargs = dict(device_map={"": device}, quantization_config=transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype)) if load_in_4bit else {}
    try:
        lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, trust_remote_code=args.trust_remote_code, **kwargs)
    except Exception as err:
        fail(f"--model {args.model}: {' '.join(str(err).split())[:200]}")
    for module in lm.modules():                                 # on CPU a first pass would repack 4-bit weights, and break them
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return lm.to(device).eval()


def build(args, tokenizer, data, eval_data):
    """All that a run is made of. model: the policy, a transformers model or a peft model around one; logps: completion_logps
    of it; sampler: the same as one whole plain model; reference: where the policy started, frozen, or None where that is the
    policy with its adapter off; data: rows with "prompt_ids"."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    dtype = getattr(torch, {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(args.dtype, args.dtype))
    model = load_lm(args, device, torch.float32 if args.fsdp else dtype, args.load_in_4bit)
    sampler = load_lm(args, device, dtype) if args.lora_rank or args.fsdp else model
    reference = load_lm(args, device, dtype).requires_grad_(False) if args.beta and not args.lora_rank else None
    if args.lora_rank:
        import peft
        torch.manual_seed(args.seed)
        model = peft.get_peft_model(model, peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, task_type="CAUSAL_LM",
                                                           target_modules="all-linear"))
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
    lm = base_lm(model)
    if args.activation_checkpointing:                           # the second name: transformers before 5.2x
        (getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable)({"use_reentrant": False})
    lm.logps = types.MethodType(completion_logps, lm)
    if args.fsdp:                                               # FSDP2: each process holds its part of every weight, in fp32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for layer in lm.base_model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(lm, mp_policy=policy)
        register_fsdp_forward_method(lm, "logps")
    masters = Masters([p for p in model.parameters() if p.requires_grad])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    muon = {name for name in names if args.optim == "muon" and ".layers." in name and model.get_parameter(name).ndim == 2}
    matrices, rest = ([p for name, p in zip(names, masters.parameters) if (name in muon) is wanted] for wanted in (True, False))
    if args.optim == "adamw8bit":
        import bitsandbytes
        optimizers = [bitsandbytes.optim.AdamW8bit(rest, args.lr, weight_decay=0.0)]
    else:
        optimizers = [torch.optim.AdamW(rest, args.lr, weight_decay=0.0, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, args.muon_lr, weight_decay=0.0))
    model.eval()
    refresh(sampler, model)
    return types.SimpleNamespace(
        args=args, tokenizer=tokenizer, eos_ids=end_ids(args, tokenizer), data=data, eval_data=eval_data, device=device,
        model=model, logps=lm.logps,
        reference=reference, sampler=sampler, masters=masters, optimizers=optimizers, check=lambda: None,
        curriculum=Curriculum(len(data), args.group_size, args.seed, args.curriculum_floor))


# ------------------------------------------------------------------------------------------- 5-7. update
def micro_batches(rollouts, size, device, mask_truncated=False):
    """Right-padded tensors for `size` rollouts at a time, longest first: little is padding, and too little memory shows at once."""
    def pad(rows):
        return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True).to(device)

    order = sorted(rollouts, key=lambda r: -len(r.prompt) - len(r.completion))
    return [{"ids": pad([r.prompt + r.completion for r in part]), "sampled": pad([r.logps for r in part]),
             "mask": pad([[float(r.ended or not mask_truncated)] * len(r.completion) for r in part]),
             "prompt_lengths": torch.tensor([len(r.prompt) for r in part], device=device),
             "adv": torch.tensor([r.advantage for r in part], device=device)}
            for part in (order[at:at + size] for at in range(0, len(order), size))]


def backward(run, batches, temperature, num_tokens, num_seqs, check=lambda: None):
    """Adds up the gradient of a whole step, batch by batch. -> the loss's parts. The first pass leaves the policy's own
    log-probabilities in each batch: they are the old ones of the later passes."""
    args, sums = run.args, {}
    for b in batches:
        check()
        where = b["ids"], b["prompt_lengths"], b["mask"], temperature
        logp, entropy = run.logps(*where)                                                                                  # 5
        if "old" not in b:
            b["old"], b["ref"] = logp.detach(), b["mask"]
            if args.beta:
                with torch.no_grad(), contextlib.nullcontext() if run.reference else run.model.disable_adapter():
                    b["ref"] = completion_logps(run.reference or base_lm(run.model), *where)[0]
        loss, parts = policy_loss(logp, b["old"], b["ref"], b["adv"], b["mask"], loss=args.loss, clip_low=args.clip_low,
                                  clip_high=args.clip_high, beta=args.beta, num_tokens=num_tokens, num_seqs=num_seqs,
                                  max_new_tokens=args.max_new_tokens)                                                      # 6
        (loss * WORLD if args.fsdp else loss).backward()                                # FSDP averages over processes
        parts |= {"entropy": (entropy * b["mask"]).sum() / num_tokens,
                  "logp_gap": ((b["old"] - b["sampled"]).abs() * b["mask"]).sum() / num_tokens}
        sums = {name: sums.get(name, 0) + value for name, value in parts.items()}
    return {name: float(value) for name, value in sums.items()}


def update(run, trained, temperature, lr):
    """Steps 5 to 7 on the rollouts of one step: --inner_epochs updates. -> metrics, means over them."""
    args, masters = run.args, run.masters.parameters
    metrics = dict.fromkeys(("loss", "kl", "clip_low", "clip_high", "entropy", "logp_gap", "grad_norm"), 0.0)
    args.micro_batch_size = min(gather(args.micro_batch_size))  # one process may have halved it
    batches = micro_batches(trained, args.micro_batch_size, run.device, args.mask_truncated)
    num_tokens = sum(float(b["mask"].sum()) for b in batches)
    empty = {name: torch.zeros_like(x) if name == "mask" else x for name, x in batches[-1].items()}
    batches = (batches + [dict(empty) for _ in range(-len(batches) % WORLD)])[RANK::WORLD]      # as many passes in each process
    run.model.train()
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * lr / args.lr if args.lr else 0.0
    for epoch in range(args.inner_epochs if num_tokens else 0):
        while True:
            run.masters.zero_grad()
            run.model.zero_grad()                               # what an error left there
            try:
                sums = backward(run, batches, temperature, num_tokens, len(trained), (lambda: None) if epoch or WORLD > 1 else run.check)
                break
            except torch.OutOfMemoryError:
                if args.fsdp or max(len(b["ids"]) for b in batches) == 1:
                    raise
            torch.cuda.empty_cache()
            batches = [dict(zip(b, half)) for b in batches for half in zip(*(x.tensor_split(2) for x in b.values())) if len(half[0])]
            args.micro_batch_size = -(-args.micro_batch_size // 2)
            note(f"out of GPU memory: --micro_batch_size {args.micro_batch_size} from here on; the update is the same")
        waits = [dist.all_reduce(p.grad, async_op=True) for p in masters] if WORLD > 1 and not args.fsdp else []
        for wait in waits:
            wait.wait()
        norm = float(full(torch.nn.utils.clip_grad_norm_(masters, args.max_grad_norm or math.inf)))                        # 7
        if math.isfinite(norm):
            for optimizer in run.optimizers:
                optimizer.step()
            run.masters.write_back()
        shares = gather(sums | {"grad_norm": norm / WORLD, "skipped": (not math.isfinite(norm)) / WORLD})
        metrics = {name: metrics.get(name, 0) + sum(share[name] for share in shares) / args.inner_epochs for name in shares[0]}
    run.masters.zero_grad()
    run.model.eval()
    refresh(run.sampler, run.model)
    return metrics


# ------------------------------------------------------------------------------------------- files of a run
def seal(path):
    """Size and SHA-256 of a file, which is on the disk when this returns."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        return [os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()]


def save_model(run, folder):
    """The policy as transformers and peft load it: the adapter, or all of it."""
    (run.model if run.args.lora_rank else run.sampler).save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def save_checkpoint(run, step):
    """OUTPUT_DIR/checkpoint-<step>: a model folder, and all else that a run is. It takes this name when it is whole and on the
    disk; only then do older ones go."""
    folder = Path(run.args.output_dir) / f"checkpoint-{step}"
    tmp = folder.with_name(f"tmp-{folder.name}")
    state = tree_map(full, {"optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
                            "masters": [p.detach() for p in run.masters.parameters],
                            "curriculum": vars(run.curriculum)})
    if RANK or folder.exists():
        return
    shutil.rmtree(tmp, ignore_errors=True)                      # of a run that was killed while it saved
    try:
        save_model(run, tmp)
        torch.save(state, tmp / "trainer.pt")
        (tmp / "manifest.json").write_text(json.dumps({p.name: seal(p) for p in sorted(tmp.iterdir())}))
        seal(tmp / "manifest.json")
    except (OSError, RuntimeError, SafetensorError) as err:     # a full disk, in each library's own words
        shutil.rmtree(tmp, ignore_errors=True)
        fail(f"cannot write {folder} ({err}); make room, then --resume: older checkpoints are whole")
    tmp.rename(folder)
    for old in checkpoints(folder.parent)[:-run.args.keep]:
        shutil.rmtree(old)


@torch.no_grad()
def load_checkpoint(run, folder):
    state = torch.load(folder / "trainer.pt", weights_only=True, map_location=run.device)
    for p, saved in zip(run.masters.parameters, state["masters"]):
        p.copy_(distribute_tensor(saved, p.device_mesh, p.placements) if isinstance(p, DTensor) else saved)
    run.masters.write_back()
    refresh(run.sampler, run.model)
    if len(state["curriculum"]["due"]) != len(run.data):
        fail(f"--resume: --data has {len(run.data)} prompts now, and had {len(state['curriculum']['due'])} in the run")
    vars(run.curriculum).update(state["curriculum"])
    if run.args.fsdp:                                           # moments are sharded as their parameters are
        for i, moments in state["optimizers"][0]["state"].items():
            p = run.masters.parameters[i]
            state["optimizers"][0]["state"][i] = {name: distribute_tensor(x, p.device_mesh, p.placements) if x.ndim else x
                                                  for name, x in moments.items()}
    for optimizer, saved in zip(run.optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)


def checkpoints(output_dir):
    """Oldest first, damaged ones too."""
    return sorted((p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdecimal()), key=lambda p: int(p.name[11:]))


def open_output(args, ready):
    """-> the checkpoint to go on from, the newest that is as it was written, or None. Another run's folder is never written to
    by mistake, nor is this one's with other flags."""
    out = Path(args.output_dir)
    free = ("resume", "overwrite", "output_dir", "save_every", "keep", "sample_every", "log_to", "micro_batch_size", "sample_batch_size",
            "fsdp", "activation_checkpointing", "merge")
    flags = {name: value for name, value in vars(args).items() if name not in free}
    if not args.resume:
        old = [*checkpoints(out), *out.glob("tmp-*"), *out.glob("adapter_*"),     # a stale adapter would load with a new model
               *(out / name for name in ("args.json", "metrics.jsonl", "samples.jsonl", "merged"))]
        if any(path.exists() for path in old) and not args.overwrite:
            fail(f"--output_dir {out} holds a run: --resume goes on with it, --overwrite drops it")
        out.mkdir(parents=True, exist_ok=True)
        if not ready:
            return None
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (out / "args.json").write_text(json.dumps(flags, indent=1))
        return None
    damaged = []
    for folder in reversed(checkpoints(out)):
        with contextlib.suppress(OSError, ValueError):
            if all(seal(folder / name) == sealed for name, sealed in json.loads((folder / "manifest.json").read_text()).items()):
                break
        note(f"{folder} is damaged (a file is missing, cut off or changed): trying the one before it")
        damaged.append(folder)
    else:
        fail(f"--resume: there is no whole checkpoint in {out}")
    try:
        then = json.loads((out / "args.json").read_text())
    except (OSError, ValueError) as err:
        fail(f"--resume: cannot read the flags of the run in {out} ({err})")
    changed = [f"--{name} {then.get(name)} -> {value}" for name, value in flags.items() if then.get(name) != value]
    if changed:
        fail(f"--resume: not the flags that the run in {out} had: {', '.join(changed)}")
    for path in [*damaged, *out.glob("tmp-*")]:                 # a checkpoint of that name will be written again
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done, tmp = int(folder.name[11:]), out / "tmp-lines"
    for path in (p for p in (out / "metrics.jsonl", out / "samples.jsonl") if p.exists()):          # what came later comes again,
        lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("}\n")]        # the evaluation of this step too
        tmp.write_text("".join(x for x, row in zip(lines, map(json.loads, lines)) if row["step"] < done + ("reward" in row)))
        tmp.replace(path)
    return folder


def append(args, name, rows):
    with open(Path(args.output_dir) / name, "a") as f:
        for row in rows:                                        # what is not finite is null: JSON has no NaN
            f.write(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}) + "\n")


def logger(args):
    """-> log(metrics): a line in metrics.jsonl, and TensorBoard or W&B where asked for."""
    send = lambda metrics: None                                                                             # noqa: E731
    if args.log_to == "tensorboard" and RANK == 0:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(args.output_dir)
        send = lambda metrics: [board.add_scalar(*item, metrics["step"]) for item in metrics.items()]       # noqa: E731
    if args.log_to == "wandb" and RANK == 0:
        import wandb
        board = wandb.init(project="grpo", name=Path(args.output_dir).name, config=vars(args), dir=args.output_dir)
        send = lambda metrics: board.log(metrics, step=metrics["step"])                                     # noqa: E731
    return lambda metrics: None if RANK else (append(args, "metrics.jsonl", [metrics]), send(metrics))


# ------------------------------------------------------------------------------------------- the loop
def read_rows(args, tokenizer, context, sources, split):
    """Rows of all sources with their prompts' ids. Countdown data that is not there yet is made."""
    rows = []
    try:
        for source in sources:
            if source.split(":")[0] == "countdown" and not Path("data/countdown").exists():
                note("data/countdown is not there yet: making it with countdown.py")
                subprocess.run([sys.executable, Path(__file__).with_name("countdown.py"), "--out", "data/countdown"], check=True)
            rows += rewards.load_rows(source, split)
    except (rewards.DataError, subprocess.CalledProcessError) as err:
        fail(err)
    for n, row in enumerate(rows, 1):
        try:
            row["prompt_ids"] = tokenizer.apply_chat_template(rewards.messages(row["task"], row, args.style), tokenize=True,
                                                              add_generation_prompt=True, return_dict=False)
        except jinja2.TemplateError as err:
            fail(f"the chat template of {args.model} does not take the prompt ({err}); pass another with --chat_template FILE")
        if len(row["prompt_ids"]) + args.max_new_tokens > context:
            fail(f"row {n} of {' '.join(sources)}: its prompt of {len(row['prompt_ids'])} tokens and --max_new_tokens "
                 f"{args.max_new_tokens} are more than the model's context of {context}")
    return rows


def means(rollouts, data):
    """Means over rollouts: every reward part, those of each task where there are several, lengths."""
    out = {name: sum(r.parts[name] for r in rollouts) / len(rollouts) for name in rollouts[0].parts}
    tasks = sorted({data[r.index]["task"] for r in rollouts})
    for task in tasks if len(tasks) > 1 else []:
        of_task = [r for r in rollouts if data[r.index]["task"] == task]
        out |= {f"{name}/{task}": sum(r.parts[name] for r in of_task) / len(of_task) for name in ("reward", "correct", "format")}
    return out | {"completion_length": sum(len(r.completion) for r in rollouts) / len(rollouts),
                  "truncated": sum(not r.ended for r in rollouts) / len(rollouts)}


def train_step(run, step):
    """One step, numbered as at the top: -> its metrics, the rollouts drawn first. A stop before the update leaves the run as
    it was."""
    args, G, start = run.args, run.args.group_size, time.perf_counter()
    temperature = args.temperature + (args.temperature_end - args.temperature) * (step - 1) / max(1, args.steps - 1)
    lr = learning_rate(step, args)
    trained, first, drawn = collect(run, step, temperature)                                                              # 1-4
    sampled = time.perf_counter()
    metrics = {"step": step, **means(first, run.data), "groups_drawn": len(drawn) // G}
    for name, rollouts in (("frac_reward_zero_std", first), ("frac_reward_zero_std_after", trained)):
        metrics[name] = sum(dead(rollouts[at:at + G]) for at in range(0, len(rollouts), G)) * G / len(rollouts)
    torch.manual_seed(args.seed * 1_000_003 + step)             # for a model with dropout
    metrics |= update(run, trained, temperature, lr)                                                                     # 5-7
    for at in range(0, len(drawn), G):
        run.curriculum.record(drawn[at].index, sum(r.parts["correct"] for r in drawn[at:at + G]))
    end = time.perf_counter()
    gpu = run.device.type == "cuda"
    return metrics | {"lr": lr, "temperature": temperature, "sample_seconds": sampled - start, "update_seconds": end - sampled,
                      "sample_tokens_per_s": sum(len(r.completion) for r in drawn) / (sampled - start),
                      "update_tokens_per_s": sum(len(r.completion) for r in trained) * args.inner_epochs / (end - sampled),
                      "step_seconds": end - start, "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else
                      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}, first


LINE = ("step {step}  reward {reward:.3f}  correct {correct:.3f}  format {format:.3f}  dead {frac_reward_zero_std:.2f}  "
        "length {completion_length:.0f}  cut {truncated:.2f}  entropy {entropy:.3f}  kl {kl:.4f}  grad {grad_norm:.2f}  "
        "{step_seconds:.1f} s, {left} left")

WARNINGS = [                                                    # (what the last 20 steps show, what usually helps), said once
    (lambda m: m["reward"] <= 0, "no reward at all: look at samples.jsonl; a cold start with sft.py, easier prompts or more format "
                                 "weight give it something to learn from"),
    (lambda m: m["correct"] > 0.98, "nearly everything is right: harder prompts (--pass_rate) leave more to learn"),
    (lambda m: m["frac_reward_zero_std"] > 0.9, "over 90 % of groups are dead: a larger --group_size, prompts of medium difficulty "
                                                "(--pass_rate 0.1 0.9) or a higher --temperature help"),
    (lambda m: m["truncated"] > 0.5, "over half of the completions are cut off: raise --max_new_tokens"),
    (lambda m: m["kl"] > 1, "the policy is far from its start (KL above 1): lower --lr or raise --beta"),
    (lambda m: m["logp_gap"] > 0.1, "sampler and trainer disagree (logp_gap above 0.1): try --dtype float32")]


def train(args, argv):
    if WORLD > 1:
        if torch.cuda.is_available():
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                fail(f"torchrun started more processes than there are GPUs: --nproc_per_node {torch.cuda.device_count()}")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2))
    tokenizer, context = load_tokenizer(args)
    data = read_rows(args, tokenizer, context, args.data, "train")
    eval_data = read_rows(args, tokenizer, context, args.eval_data, args.eval_split)
    if args.pass_rate != [0, 1]:
        if not all(isinstance(row.get("pass_rate"), (int, float)) for row in data):
            fail("--pass_rate: a row of --data has no such number; eval.py --samples 8 writes files that have")
        data = [row for row in data if args.pass_rate[0] <= row["pass_rate"] <= args.pass_rate[1]]
    if len(data) < args.prompts_per_step:
        fail(f"--data has {len(data)} prompts, fewer than --prompts_per_step {args.prompts_per_step}")
    folder = gather(open_output(args, ready=False) if RANK == 0 else None)[0]
    run, log, done, stop, bad, recent, said = build(args, tokenizer, data, eval_data), logger(args), 0, [], 0, [], set()
    if RANK == 0 and not folder:
        open_output(args, ready=True)                           # a model that does not load costs no run its folder
    if folder:
        load_checkpoint(run, folder)
        done = int(folder.name[11:])

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)            # SIGTERM may come twice, from a cluster and from torchrun
        note("stopping: saving a checkpoint first; Ctrl-C leaves at once")

    def check():
        if stop:
            raise KeyboardInterrupt(stop[0])

    def evaluate(step):
        if eval_data and (step % args.eval_every == 0 or step == args.steps):
            found = means(rollout(run, eval_data, range(len(eval_data)), 0, 0), eval_data)
            log({"step": step, **{"eval_" + name: value for name, value in found.items()}})
            note(f"step {step}  held-out: reward {found['reward']:.3f}  correct {found['correct']:.3f}  format {found['format']:.3f}")

    run.check, handlers = check, {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.steps, initial=done, unit="step", disable=RANK > 0 or not sys.stderr.isatty())
    try:
        evaluate(done)
        while done < args.steps:
            metrics, first = train_step(run, done + 1)
            done += 1
            log(metrics)
            bar.update()
            recent = [*recent[-19:], metrics]
            left = (args.steps - done) * sum(m["step_seconds"] for m in recent) / len(recent)
            note(LINE.format_map(metrics | {"left": tqdm.format_interval(left)}))
            bad = bad + 1 if metrics.get("skipped") else 0
            if RANK == 0 and (done % args.sample_every == 0 or done == 1 or bad):
                append(args, "samples.jsonl", [
                    {"step": done, "task": data[r.index]["task"], "prompt": tokenizer.decode(r.prompt), "completion": r.text,
                     "ended": r.ended, "advantage": r.advantage, **r.parts} for r in first[:2 * args.group_size]])
            for shows, advice in WARNINGS:
                if len(recent) == 20 and advice not in said and all(map(shows, recent)):
                    said.add(advice)
                    note(f"warning: {advice}")
            if bad:
                note(f"warning: the gradient of step {done} is not finite and was not used ({bad} in a row; see samples.jsonl)")
            if bad == BAD_STEPS:
                fail(f"{bad} gradients in a row are not finite: lower --lr, and look at step {done} in {args.output_dir}/samples.jsonl")
            if args.save_every and done % args.save_every == 0:
                save_checkpoint(run, done)
            for number in sum(gather(list(stop)), []):
                raise KeyboardInterrupt(number)
            evaluate(done)
    except KeyboardInterrupt as err:
        save_checkpoint(run, done)
        gather(0)                                               # torchrun ends all of them when one leaves
        again = [x for x in argv if x not in ("--resume", "--overwrite")]
        launch = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', WORLD)}" if WORLD > 1 else "python"
        note(f"stopped after step {done} of {args.steps}; go on with: {launch} grpo.py {shlex.join(again)} --resume")
        raise SystemExit(128 + err.args[0])
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if RANK == 0:
        tmp = Path(args.output_dir) / "tmp-final"
        save_model(run, tmp)
        if args.merge:
            run.sampler.save_pretrained(tmp / "merged")
            tokenizer.save_pretrained(tmp / "merged")
        shutil.copytree(tmp, args.output_dir, dirs_exist_ok=True, copy_function=os.replace)
        shutil.rmtree(tmp)
    if WORLD > 1:
        dist.destroy_process_group()


def main(argv=None):
    args = parse_args(argv)
    try:
        train(args, argv or sys.argv[1:])
    except torch.OutOfMemoryError:
        fail("out of GPU memory: take a smaller --micro_batch_size, --group_size or --max_new_tokens, or --activation_checkpointing; "
             "then --resume")
    except (OSError, SafetensorError) as err:                   # a full disk, most of all
        fail(f"--output_dir {args.output_dir}: {err}; checkpoints in it are whole: make room, then --resume")


if __name__ == "__main__":
    main()
