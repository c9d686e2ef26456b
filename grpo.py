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
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import rewards

transformers.utils.logging.disable_progress_bar()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ------------------------------------------------------------------------------------------- options
class Flags(argparse.ArgumentParser):
    """`@file` holds flags: any number on a line, quoted as in a shell, with # comments. A wrong flag gets one line."""

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def error(self, message):
        fail(message)


def fail(message):
    """One line on stderr and exit code 2: what a wrong flag, file or model gets."""
    print(f"grpo.py: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def note(message, prefix="grpo.py: "):
    if RANK == 0:
        tqdm.write(prefix + message, file=sys.stderr)


def number(kind, low, high=math.inf, why=""):
    """An argparse type: a finite `kind` between low and high."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high and kind(text) < math.inf:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: a {kind.__name__} from {low:g} to {high:g}{why}")
    return convert


def weight(text):
    part, _, value = text.partition("=")
    if part not in rewards.WEIGHTS:
        raise argparse.ArgumentTypeError(f"{text}: PART=WEIGHT, with PART one of {', '.join(rewards.WEIGHTS)}")
    return part, number(float, 0)(value)


def parse_args(argv=None):
    p = Flags(prog="grpo.py", fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    whole, share = number(int, 1), number(float, 0)

    def flag(*names, help, **kw):
        default = f" (default: {kw['default']})" if kw.get("default") is not None else ""
        group.add_argument(*names, help=(help + default).replace("%", "%%"), **kw)

    group = p.add_argument_group("task")
    flag("--model", required=True, help="checkpoint folder or hub id")
    flag("--data", nargs="+", default=["countdown"], metavar="TASK[=PATH][:N]", help="prompts; several sources are mixed")
    flag("--pass_rate", nargs=2, type=number(float, 0, 1), metavar=("LOW", "HIGH"),
         help="keep rows whose pass_rate lies within (eval.py --samples 8 writes that column)")
    flag("--style", choices=["reasoning", "think"], default="reasoning", help="tags around the reasoning")
    flag("--weights", nargs="+", type=weight, default=[("correct", 1), ("format", 0.3), ("process", 0.1), ("efficiency", 0.1)],
         metavar="PART=WEIGHT", help="reward parts that count; those not named weigh 0")
    flag("--length_penalty", nargs=2, type=number(int, 0), default=[500, 800], metavar=("START", "END"),
         help="tokens over which the length part falls from 0 to -1")
    group = p.add_argument_group("sampling")
    flag("--prompts_per_step", type=whole, default=32, help="groups in a step, over all processes")
    flag("--group_size", type=number(int, 2, why=": a group needs at least 2 completions"), default=8, help="completions a prompt")
    flag("--max_new_tokens", type=whole, default=1024, help="tokens of a completion at most")
    flag("--temperature", type=number(float, 1e-3), default=1.0, help="of sampling, and of the log-probabilities that are trained")
    flag("--temperature_end", type=number(float, 1e-3), help="move there linearly by the last step")
    flag("--max_resample", type=number(int, 0), default=2, help="rounds of fresh prompts for dead groups, a step; 0: off")
    flag("--curriculum_floor", type=number(float, 1e-3, 1), default=0.1,
         help="how often a prompt that is always or never solved comes, against one solved half the time; 1: all alike")
    flag("--sample_batch_size", type=whole, default=512, help="completions sampled at once: memory only")
    group = p.add_argument_group("loss")
    flag("--loss", choices=["grpo", "dr_grpo", "dapo", "cispo", "gspo"], default="dapo", help="see policy_loss")
    flag("--scale", choices=["group", "batch", "none"], default="group", help="the std that divides an advantage")
    flag("--clip_low", type=number(float, 0, 1), default=0.2, help="the ratio is clipped below 1 - this")
    flag("--clip_high", type=share, default=0.2, help="the ratio is clipped above 1 + this (DAPO: 0.28)")
    flag("--beta", type=share, default=0.001, help="weight of the KL to the model at the start; 0: none, and no reference in memory")
    flag("--mask_truncated", action="store_true", help="do not train on completions cut off at --max_new_tokens")
    group = p.add_argument_group("optimisation")
    flag("--steps", type=whole, default=500, help="of sampling and update")
    flag("--inner_epochs", type=whole, default=1, help="updates a step, over the same rollouts")
    flag("--micro_batch_size", type=whole, default=8, help="completions a forward pass: memory only, the update is the same")
    flag("--lr", type=number(float, 0, 1), default=1e-6, help="peak learning rate")
    flag("--warmup", type=number(int, 0), default=10, help="steps of linear warm-up")
    flag("--lr_schedule", choices=["constant", "linear", "cosine"], default="constant", help="after the warm-up")
    flag("--max_grad_norm", type=share, default=1.0, help="the gradient's norm is clipped to this; 0: off")
    flag("--optim", choices=["adamw", "adamw8bit"], default="adamw", help="8-bit states take 2 bytes a parameter, not 8")
    group = p.add_argument_group("model and memory")
    flag("--lora_rank", type=number(int, 0), default=0, help="of an adapter on every linear layer; 0: train all parameters")
    flag("--lora_alpha", type=share, default=32, help="the adapter's scale is alpha / rank")
    flag("--load_in_4bit", action="store_true", help="frozen base in nf4 (QLoRA), with --lora_rank")
    flag("--activation_checkpointing", action="store_true", help="keep one activation a layer and compute the rest twice")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of compute; auto: bfloat16 on a GPU, else float32")
    flag("--chat_template", metavar="FILE", help="Jinja, for a tokenizer that has none")
    flag("--trust_remote_code", action="store_true", help="run code that comes with the model")
    group = p.add_argument_group("evaluation, files and logs")
    flag("--eval_data", nargs="+", default=[], metavar="TASK[=PATH][:N]", help="held-out rows, answered greedily")
    flag("--eval_split", default="test", help="the split of --eval_data")
    flag("--eval_every", type=whole, default=50, help="steps between evaluations")
    flag("--output_dir", default="runs/grpo", help="final model, checkpoints, metrics.jsonl, samples.jsonl, args.json")
    flag("--save_every", type=whole, default=50, help="steps between checkpoints")
    flag("--keep", type=whole, default=2, help="newest checkpoints that stay")
    flag("--merge", action="store_true", help="with --lora_rank: also write the merged model, to OUTPUT_DIR/merged")
    flag("--sample_every", type=whole, default=10, help="steps between whole completions in samples.jsonl")
    flag("--log_to", choices=["tensorboard", "wandb"], help="besides metrics.jsonl")
    flag("--resume", action="store_true", help="go on from the newest whole checkpoint in OUTPUT_DIR")
    flag("--overwrite", action="store_true", help="drop the run that is in OUTPUT_DIR")
    flag("--seed", type=number(int, 0), default=0, help="of data order and sampling")
    args = p.parse_args(argv)
    for wrong, message in [
            (args.load_in_4bit and not args.lora_rank, "--load_in_4bit: 4-bit weights cannot be trained, add --lora_rank 16"),
            (args.merge and not args.lora_rank, "--merge: there is an adapter to merge only with --lora_rank"),
            (args.length_penalty[0] >= args.length_penalty[1], "--length_penalty: START must be below END"),
            (args.resume and args.overwrite, "--resume and --overwrite: choose one")]:
        fail(message) if wrong else None
    args.weights = dict.fromkeys(rewards.WEIGHTS, 0.0) | dict(args.weights)
    args.temperature_end = args.temperature_end or args.temperature
    return args


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


def completion_logps(lm, ids, prompt_lengths, mask, temperature, chunk=2 ** 26):
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
    text: str = ""
    parts: dict = field(default_factory=dict)
    advantage: float = 0.0


def gather(x):
    """[x of process 0, x of process 1, ...], the same list in all of them."""
    shares = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(shares, x)
    return shares


def rollout(run, data, indices, step, temperature, first_row=0):
    """Scored completions, a group for each index into data; temperature 0: greedy, one for each. Processes share the work and
    all return all of it, so that from here on every one of them computes the same."""
    args, size = run.args, run.args.group_size if temperature else 1
    mine, per_call, out = range(RANK, len(indices), WORLD), max(1, run.args.sample_batch_size // size), []
    for part in (mine[at:at + per_call] for at in range(0, len(mine), per_call)):
        rows = [data[indices[slot]] for slot in part]
        places = [first_row + slot * size + g for slot in part for g in range(size)]
        noise = uniforms(args.seed, step, places, args.max_new_tokens) if temperature else None
        ids, logps = generate(run.sampler, [row["prompt_ids"] for row in rows], noise, group_size=size, check=run.check,
                              max_new_tokens=args.max_new_tokens, temperature=temperature or 1.0, eos_ids=run.eos_ids,
                              pad_id=run.tokenizer.pad_token_id or 0)                                                      # 2
        rows = [row for row in rows for _ in range(size)]
        texts = run.tokenizer.batch_decode(ids, skip_special_tokens=True)
        parts = rewards.score_batch([row["task"] for row in rows], texts, rows, style=args.style, weights=args.weights,
                                    n_tokens=[len(x) for x in ids], length=args.length_penalty)                            # 3
        out += [[Rollout(indices[slot], data[indices[slot]]["prompt_ids"], ids[k], logps[k], ids[k][-1] in run.eos_ids,
                         texts[k], parts[k]) for k in range(j * size, (j + 1) * size)] for j, slot in enumerate(part)]
    shares = gather(out)
    return [r for slot in range(len(indices)) for r in shares[slot % WORLD][slot // WORLD]]


def collect(run, step, temperature):
    """One step's rollouts: -> (those to train on, the first draw, all drawn). Dead groups are not trained on, unless there
    is nothing else; metrics describe the first draw, which nothing has selected."""
    args, G = run.args, run.args.group_size
    trained, first, drawn = [], [], []
    for _ in range(1 + args.max_resample):
        indices = run.curriculum.draw(args.prompts_per_step - len(trained) // G, {r.index for r in drawn})                 # 1
        new = rollout(run, run.data, indices, step, temperature, first_row=len(drawn))
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
    ones gathered, B A scaling of an adapter added in fp32 to its base, which stays pristine. A full-parameter policy samples
    for itself."""
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
        target[name.replace(".base_layer.", ".")].copy_(w.full_tensor() if hasattr(w, "full_tensor") else w)


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

    @torch.no_grad()
    def write_back(self):
        for p, master in self.short.items():
            p.copy_(master)


# ------------------------------------------------------------------------------------------- 5-7. update
def micro_batches(rollouts, size, device, mask_truncated=False):
    """Right-padded tensors for `size` rollouts at a time, longest first: little is padding, and too little memory shows at once."""
    order, out = sorted(rollouts, key=lambda r: -len(r.prompt) - len(r.completion)), []
    for part in (order[at:at + size] for at in range(0, len(order), size)):
        pad = lambda rows, dtype=None: torch.nn.utils.rnn.pad_sequence(                                     # noqa: E731
            [torch.as_tensor(row, dtype=dtype) for row in rows], batch_first=True).to(device)
        out.append({"ids": pad([r.prompt + r.completion for r in part]), "sampled": pad([r.logps for r in part]),
                    "mask": pad([[float(r.ended or not mask_truncated)] * len(r.completion) for r in part]),
                    "prompt_lengths": torch.tensor([len(r.prompt) for r in part], device=device),
                    "adv": torch.tensor([r.advantage for r in part], device=device)})
    return out


def backward(run, batches, temperature, num_tokens, num_seqs, check):
    """Adds up the gradient of a whole step, batch by batch. -> the loss's parts. The first pass leaves the policy's own
    log-probabilities in each batch: they are the old ones of the later passes."""
    args, lm, sums = run.args, base_lm(run.model), {}
    for b in batches:
        check()
        where = b["ids"], b["prompt_lengths"], b["mask"], temperature
        logp, entropy = completion_logps(lm, *where)                                                                       # 5
        if "old" not in b:
            b["old"], b["ref"] = logp.detach(), b["mask"]
            if args.beta:
                with torch.no_grad(), contextlib.nullcontext() if run.reference else run.model.disable_adapter():
                    b["ref"] = completion_logps(run.reference or lm, *where)[0]
        loss, parts = policy_loss(logp, b["old"], b["ref"], b["adv"], b["mask"], loss=args.loss, clip_low=args.clip_low,
                                  clip_high=args.clip_high, beta=args.beta, num_tokens=num_tokens, num_seqs=num_seqs,
                                  max_new_tokens=args.max_new_tokens)                                                      # 6
        loss.backward()
        parts |= {"entropy": (entropy * b["mask"]).sum() / num_tokens,
                  "logp_gap": ((b["old"] - b["sampled"]).abs() * b["mask"]).sum() / num_tokens}
        sums = {name: sums.get(name, 0) + value for name, value in parts.items()}
    return {name: float(value) for name, value in sums.items()}


def update(run, trained, temperature, lr):
    """Steps 5 to 7 on the rollouts of one step: --inner_epochs updates. -> metrics, means over them."""
    args, metrics = run.args, {}
    batches = micro_batches(trained, args.micro_batch_size, run.device, args.mask_truncated)
    num_tokens = sum(float(b["mask"].sum()) for b in batches)
    batches = batches[RANK::WORLD]
    run.model.train()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    for epoch in range(args.inner_epochs if num_tokens else 0):
        while True:
            run.optimizer.zero_grad()
            try:
                sums = backward(run, batches, temperature, num_tokens, len(trained), (lambda: None) if epoch else run.check)
                break
            except torch.OutOfMemoryError:
                if max(len(b["ids"]) for b in batches) == 1:
                    fail("out of GPU memory at one completion: --activation_checkpointing, --lora_rank or a smaller --max_new_tokens")
            batches = [dict(zip(b, half)) for b in batches for half in zip(*(x.tensor_split(2) for x in b.values())) if len(half[0])]
            args.micro_batch_size = -(-args.micro_batch_size // 2)
            note(f"out of GPU memory: --micro_batch_size {args.micro_batch_size} from here on; the update is the same")
        for p in run.masters.parameters if WORLD > 1 else []:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        norm = float(torch.nn.utils.clip_grad_norm_(run.masters.parameters, args.max_grad_norm or math.inf))               # 7
        if math.isfinite(norm):
            run.optimizer.step()
            run.masters.write_back()
        shares = gather(sums | {"grad_norm": norm / WORLD})
        metrics = {name: metrics.get(name, 0) + sum(share.get(name, 0) for share in shares) / args.inner_epochs
                   for name in dict.fromkeys(name for share in shares for name in share)}
    run.optimizer.zero_grad()
    run.model.eval()
    refresh(run.sampler, run.model)
    return metrics


# ------------------------------------------------------------------------------------------- a run and its files
class Stopped(Exception):
    """A signal asked the run to end."""


def load_tokenizer(args):
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError) as err:
        fail(f"--model {args.model}: no such folder, and no such model on the hub or no network ({str(err).splitlines()[0]})")
    if (Path(args.model) / "adapter_config.json").exists():
        fail(f"--model {args.model} is an adapter: train its merged model instead (sft.py --merge writes it)")
    tokenizer.chat_template = Path(args.chat_template).read_text() if args.chat_template else tokenizer.chat_template
    if not tokenizer.chat_template:
        fail(f"--model {args.model}: its tokenizer has no chat template, pass one with --chat_template FILE (Jinja)")
    return tokenizer


def read_rows(args, tokenizer, sources, split):
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
    for row in rows:
        row["prompt_ids"] = tokenizer.apply_chat_template(rewards.messages(row["task"], row, args.style), tokenize=True,
                                                          add_generation_prompt=True, return_dict=False)
    return rows


def load_lm(name, args, device, load_in_4bit=False):
    dtype = {"cuda": torch.bfloat16}.get(device.type, torch.float32) if args.dtype == "auto" else getattr(torch, args.dtype)
    kwargs = {"dtype": dtype, "trust_remote_code": args.trust_remote_code}
    if load_in_4bit:
        kwargs |= {"device_map": {"": device}, "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)}
    try:
        lm = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as err:
        fail(f"--model {name}: {str(err).splitlines()[0]}")
    for module in lm.modules():                                 # on CPU a forward would repack 4-bit weights, and break them
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return lm.to(device).eval()


def build(args, tokenizer, data, eval_data, folder):
    """All that a run is made of, from --model, or as it was when the checkpoint in `folder` was written.

    model: the policy, a transformers model or a peft model around one; sampler: the same as a plain model; reference: where
    the policy started, frozen, or None where that is the policy with its adapter off; data: rows with "prompt_ids"."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    reference = None
    if args.lora_rank:
        import peft
        torch.manual_seed(args.seed)
        base, sampler = load_lm(args.model, args, device, args.load_in_4bit), load_lm(args.model, args, device)
        config = peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True) if folder else peft.get_peft_model(base, config)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data = p.data.float()
    else:
        model = sampler = load_lm(folder or args.model, args, device)
        reference = load_lm(args.model, args, device).requires_grad_(False) if args.beta else None
    lm = base_lm(model)
    if args.activation_checkpointing:                           # the second name: transformers before 5.2x
        (getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable)({"use_reentrant": False})
    masters = Masters([p for p in model.parameters() if p.requires_grad])
    if args.optim == "adamw8bit":
        import bitsandbytes
        optimizer = bitsandbytes.optim.AdamW8bit(masters.parameters, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(masters.parameters, weight_decay=0.0, fused=True)
    ends = lm.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if not eos_ids:
        fail(f"--model {args.model}: neither its tokenizer nor its generation config names an end token")
    curriculum = Curriculum(len(data), args.group_size, args.seed, args.curriculum_floor)
    if folder:
        state = torch.load(folder / "trainer.pt", weights_only=True, map_location=device)
        optimizer.load_state_dict(state["optimizer"])
        vars(curriculum).update(state["curriculum"])
        for master, saved in zip(masters.short.values(), state["masters"]):
            master.data.copy_(saved)
    model.eval()
    refresh(sampler, model)
    return SimpleNamespace(args=args, tokenizer=tokenizer, eos_ids=eos_ids, data=data, eval_data=eval_data, device=device,
                           curriculum=curriculum, model=model, reference=reference, sampler=sampler, masters=masters,
                           optimizer=optimizer, check=lambda: None)


def save_model(run, folder):
    """The policy as transformers and peft load it."""
    run.model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def manifest(folder):
    """Size and SHA-256 of every file in a checkpoint."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"}
    return {name: [p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()] for name, p in files.items()}


def save_checkpoint(run, step):
    """OUTPUT_DIR/checkpoint-<step>: a model folder and what else a run is. Written under another name, flushed, then renamed:
    whole or not there. Only then do older ones go."""
    folder = Path(run.args.output_dir) / f"checkpoint-{step}"
    tmp = folder.with_name("tmp-" + folder.name)
    if RANK or folder.exists():
        return
    shutil.rmtree(tmp, ignore_errors=True)                      # of a run that was killed while it saved
    save_model(run, tmp)
    torch.save({"optimizer": run.optimizer.state_dict(), "curriculum": vars(run.curriculum),
                "masters": [master.detach() for master in run.masters.short.values()]}, tmp / "trainer.pt")
    (tmp / "manifest.json").write_text(json.dumps(manifest(tmp)))
    for path in [*tmp.rglob("*"), tmp]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    tmp.rename(folder)
    for old in checkpoints(folder.parent)[:-run.args.keep]:
        shutil.rmtree(old)


def checkpoints(output_dir):
    """Oldest first."""
    return sorted((p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdecimal()), key=lambda p: int(p.name[11:]))


def open_output(args):
    """-> the checkpoint to go on from: the newest that is as it was written; or None. Another run's folder is never written to
    by mistake, nor is this run's with other flags."""
    out = Path(args.output_dir)
    free = ("resume", "overwrite", "output_dir", "save_every", "keep", "sample_every", "log_to", "micro_batch_size", "sample_batch_size")
    flags = {name: value for name, value in vars(args).items() if name not in free}
    if not args.resume:
        if (out / "args.json").exists() and not args.overwrite:
            fail(f"--output_dir {out} holds a run: --resume goes on with it, --overwrite drops it")
        if RANK == 0:
            for old in [*checkpoints(out), out / "metrics.jsonl", out / "samples.jsonl"]:
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            out.mkdir(parents=True, exist_ok=True)
            (out / "args.json").write_text(json.dumps(flags, indent=1))
        return None
    for folder in reversed(checkpoints(out)):
        with contextlib.suppress(OSError, ValueError):
            if json.loads((folder / "manifest.json").read_text()) == manifest(folder):
                break
        note(f"{folder} is damaged (a file is missing, cut off or changed): trying the one before it")
    else:
        fail(f"--resume: there is no whole checkpoint in {out}")
    then = json.loads((out / "args.json").read_text())
    changed = [f"--{name} {then.get(name)} -> {value}" for name, value in flags.items() if then.get(name) != value]
    if changed:
        fail(f"--resume: not the flags that the run in {out} had: {', '.join(changed)}")
    for path in (p for p in (out / "metrics.jsonl", out / "samples.jsonl") if p.exists() and RANK == 0):
        lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("}\n")]     # what came after it comes again
        path.write_text("".join(x for x in lines if json.loads(x)["step"] <= int(folder.name[11:])))
    return folder


def logger(args):
    """-> log(metrics): a line in metrics.jsonl, and TensorBoard or W&B where asked for."""
    send = lambda metrics: None                                                                             # noqa: E731
    if args.log_to == "tensorboard" and not RANK:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(args.output_dir)
        send = lambda metrics: [board.add_scalar(*item, metrics["step"]) for item in metrics.items()]       # noqa: E731
    if args.log_to == "wandb" and not RANK:
        import wandb
        board = wandb.init(project="grpo", name=Path(args.output_dir).name, config=vars(args), dir=args.output_dir)
        send = lambda metrics: board.log(metrics, step=metrics["step"])                                     # noqa: E731

    def log(metrics):
        if not RANK:
            with open(Path(args.output_dir) / "metrics.jsonl", "a") as f:
                f.write(json.dumps(metrics) + "\n")
            send(metrics)
    return log


# ------------------------------------------------------------------------------------------- the loop
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
    metrics |= update(run, trained, temperature, lr)                                                                     # 5-7
    for at in range(0, len(drawn), G):
        run.curriculum.record(drawn[at].index, sum(r.parts["correct"] for r in drawn[at:at + G]))
    end = time.perf_counter()
    peak = torch.cuda.max_memory_allocated() / 1e9 if run.device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return metrics | {"lr": lr, "temperature": temperature, "sample_seconds": sampled - start, "update_seconds": end - sampled,
                      "sample_tokens_per_s": sum(len(r.completion) for r in drawn) / (sampled - start),
                      "update_tokens_per_s": sum(len(r.completion) for r in trained) * args.inner_epochs / (end - sampled),
                      "step_seconds": end - start, "peak_memory_gb": peak}, first


def dump_samples(run, step, rollouts):
    """The first two groups of a step, whole, for people to read: reward hacking shows there first."""
    with open(Path(run.args.output_dir) / "samples.jsonl", "a") as f:
        for r in rollouts[:2 * run.args.group_size]:
            row = run.data[r.index]
            prompt = rewards.messages(row["task"], row, run.args.style)[-1]["content"]
            f.write(json.dumps({"step": step, "task": row["task"], "prompt": prompt, "completion": r.text, "ended": r.ended,
                                "advantage": r.advantage, **r.parts}) + "\n")


LINE = ("reward {reward:.3f}  correct {correct:.3f}  format {format:.3f}  dead {frac_reward_zero_std:.2f}  length "
        "{completion_length:.0f}  cut {truncated:.2f}  entropy {entropy:.3f}  kl {kl:.4f}  grad {grad_norm:.2f}  {step_seconds:.1f} s")


def main(argv=None):
    args = parse_args(argv)
    tokenizer = load_tokenizer(args)
    data, eval_data = read_rows(args, tokenizer, args.data, "train"), read_rows(args, tokenizer, args.eval_data, args.eval_split)
    if args.pass_rate:
        if any("pass_rate" not in row for row in data):
            fail("--pass_rate: a row of --data has no pass_rate column; eval.py --samples 8 writes files that have")
        data = [row for row in data if args.pass_rate[0] <= row["pass_rate"] <= args.pass_rate[1]]
    if len(data) < args.prompts_per_step:
        fail(f"--data has {len(data)} prompts, fewer than --prompts_per_step {args.prompts_per_step}")
    folder = open_output(args)
    run, log, done, stop = build(args, tokenizer, data, eval_data, folder), logger(args), int(folder.name[11:]) if folder else 0, []

    def check():
        if stop and WORLD == 1:                                 # several processes stop together, between steps
            raise Stopped
    run.check = check

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
        note("stopping: saving a checkpoint first; once more leaves at once")

    def evaluate(step):
        if eval_data and (step % args.eval_every == 0 or step == args.steps):
            found = means(rollout(run, eval_data, range(len(eval_data)), 0, 0), eval_data)
            log({"step": step, **{"eval_" + name: value for name, value in found.items()}})
            note("held-out: " + "  ".join(f"{name} {found[name]:.3f}" for name in ("reward", "correct", "format")), "")

    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.steps, initial=done, unit="step", disable=RANK > 0 or not sys.stderr.isatty())
    try:
        if not done:
            evaluate(0)
        while done < args.steps:
            metrics, first = train_step(run, done + 1)
            done += 1
            log(metrics)
            bar.update()
            note(LINE.format_map({"entropy": math.nan, "kl": 0, "grad_norm": 0} | metrics), f"step {done}/{args.steps}  ")
            if RANK == 0 and (done % args.sample_every == 0 or done == 1):
                dump_samples(run, done, first)
            evaluate(done)
            if done % args.save_every == 0:
                save_checkpoint(run, done)
            if any(gather(bool(stop))):
                raise Stopped
    except Stopped:
        save_checkpoint(run, done)
        note(f"stopped after step {done} of {args.steps}; go on with: python grpo.py {shlex.join(argv or sys.argv[1:])} --resume")
        raise SystemExit(128 + stop[0] if stop else 1)
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if RANK == 0:
        save_model(run, Path(args.output_dir))
        if args.merge:
            run.sampler.save_pretrained(Path(args.output_dir) / "merged")
            tokenizer.save_pretrained(Path(args.output_dir) / "merged")


if __name__ == "__main__":
    main()
