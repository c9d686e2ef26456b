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
import contextlib
import math
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import rewards
from models import (Optimizer, base_lm, completion_logps, fitting, learning_rate, load_lm, load_policy, load_tokenizer,
                    peak_memory_gb, prepare, prompt_ids, refresh)
from runs import (BAD_STEPS, RANK, WORLD, Flags, Stop, add_training_flags, append, check_flags, check_training_flags, fail,
                  gather, go_on_from, largest, leave, logger, move_in, note, one_line, open_folder, passes,
                  read_state, save_checkpoint, start_processes)
from sampler import Sampler, generate, uniforms

FREE = {"resume", "overwrite", "output_dir", "save_every", "keep", "sample_every", "log_to", "micro_batch_size", "sample_batch_size",
        "fsdp", "activation_checkpointing", "merge", "offload_reference", "sampler"}    # what a resumed run may change: not what it learns


# ------------------------------------------------------------------------------------------- options
def parse_args(argv=None):
    p = Flags("grpo.py", __doc__)
    add = p.group("task")
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--data", nargs="+", default=["countdown"], metavar="SOURCE", help="prompts, as TASK[=PATH][:N]; several are mixed")
    add("--pass_rate", nargs=2, type=float, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
        help="keep rows whose pass_rate lies within; eval.py --samples 8 writes files with that column")
    add("--style", choices=rewards.STYLES, default="reasoning", help="name of the reasoning tag")
    add("--weights", nargs="+", default=["correct=1", "format=0.3", "process=0.1", "efficiency=0.1"], metavar="PART=WEIGHT",
        help=f"of the reward's parts ({', '.join(rewards.WEIGHTS)}); those not named weigh 0")
    add("--length_penalty", nargs=2, type=int, default=[500, 800], metavar=("START", "END"),
        help="tokens over which the length part falls from 0 to -1")
    add("--eval_data", nargs="+", default=[], metavar="SOURCE", help="held-out rows, answered greedily")
    add("--eval_split", default="test", help="of --eval_data")
    add("--eval_every", type=int, default=50, help="steps between evaluations")
    add("--sample_every", type=int, default=10, help="steps between whole completions in samples.jsonl")
    add = p.group("sampling")
    add("--prompts_per_step", type=int, default=32, help="groups a step, over all processes")
    add("--group_size", type=int, default=8, help="completions a prompt")
    add("--max_new_tokens", type=int, default=1024, help="tokens of a completion at most")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the log-probabilities that are trained")
    add("--temperature_end", type=float, help="go there linearly by the last step; none: stay")
    add("--max_resample", type=int, default=2, help="rounds of fresh prompts a step for dead groups; 0: off")
    add("--curriculum_floor", type=float, default=0.1, help="how often a prompt that is always or never solved comes, against "
        "one that is solved half the time; 1: all alike")
    add("--sample_batch_size", type=int, default=512, help="completions sampled at once: memory only")
    add("--sampler", choices=["auto", "plain"], default="auto", help="auto: fast, on a GPU by CUDA graphs; plain: a simple loop")
    add = p.group("loss")
    add("--loss", choices=["grpo", "dr_grpo", "dapo", "cispo", "gspo"], default="dapo", help="see policy_loss")
    add("--scale", choices=["group", "batch", "none"], default="group", help="the std that divides an advantage")
    add("--clip_low", type=float, default=0.2, help="the ratio is clipped below 1 - this")
    add("--clip_high", type=float, default=0.2, help="the ratio is clipped above 1 + this (0.28: clip-higher)")
    add("--beta", type=float, default=0.001, help="weight of the KL to the model at the start; 0: no reference in memory either")
    add("--offload_reference", action="store_true", help="keep the reference in CPU memory but for its one pass a step")
    add("--mask_truncated", action="store_true", help="do not train on completions cut off at --max_new_tokens")
    add("--steps", type=int, default=500, help="of sampling and update")
    add("--inner_epochs", type=int, default=1, help="updates a step, over the same rollouts")
    add_training_flags(p, lr=1e-6, warmup=10, lr_schedule="constant", muon_lr=1e-3, save_every=50)
    a = p.parse_args(argv)
    check_training_flags(a)
    check_flags(a, dict(prompts_per_step=1, max_new_tokens=1, temperature=1e-3, temperature_end=1e-3, max_resample=0, clip_low=0,
                        clip_high=0, sample_batch_size=1, beta=0, steps=1, inner_epochs=1, eval_every=1, sample_every=1), (
        (a.group_size < 2, f"--group_size {a.group_size}: a group needs at least 2 completions"),
        (not 0 < a.curriculum_floor <= 1, f"--curriculum_floor {a.curriculum_floor}: must be above 0 and at most 1"),
        (not 0 <= a.length_penalty[0] < a.length_penalty[1], "--length_penalty: START must be below END, and at least 0"),
        (not 0 <= a.pass_rate[0] <= a.pass_rate[1] <= 1, "--pass_rate: LOW and HIGH must be between 0 and 1, in this order"),
        (a.offload_reference and (a.lora_rank or not a.beta), "--offload_reference: only --beta with a whole model loads a reference")))
    try:
        given = {part: float(value) for part, _, value in (text.partition("=") for text in a.weights)}
    except ValueError:
        fail(f"--weights {' '.join(a.weights)}: PART=NUMBER each")
    if set(given) - set(rewards.WEIGHTS) or not all(0 <= value < math.inf for value in given.values()):
        fail(f"--weights {' '.join(a.weights)}: parts are {', '.join(rewards.WEIGHTS)}, weights at least 0")
    a.weights, a.temperature_end = dict.fromkeys(rewards.WEIGHTS, 0.0) | given, a.temperature_end or a.temperature
    return a


# ------------------------------------------------------------------------------------------- 4., 6. pure functions
def advantages(rewards, group_size, scale="group"):
    """[N] rewards, the G of a group side by side -> [N] advantages: r - mean(group), over a standard deviation (GRPO,
    arXiv 2402.03300, section 4.1.2). scale: `group` (the paper), `batch` (one std for all, arXiv 2508.08221), `none`
    (Dr. GRPO, arXiv 2503.20783). A group of equal rewards gets exactly 0, whatever rounding made of its mean."""
    r = rewards.float().view(-1, group_size)                                         # [N / G, G]
    centred = r - r.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (r.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (r.std() + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale {scale!r}: one of group, batch, none")
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)                       # [N / G, 1]
    return centred.masked_fill(equal, 0.0).view(-1)


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


def chunks(rollouts, size):
    """Lists of `size` neighbours; with the group size: the completions of each prompt."""
    return [rollouts[at:at + size] for at in range(0, len(rollouts), size)]


def dead(group):
    """Are a group's rewards all equal? Then its advantages are 0."""
    return len({r.parts["reward"] for r in group}) == 1


def rollout(run, data, indices, step, temperature, first_row=0):
    """Scored completions, a group for each index into data; temperature 0: greedy, one for each. first_row: completions drawn
    in this step before, which have used that many rows of noise. Processes share the work and all return all of it, so that
    from here on every one of them computes the same. If one is to stop, all do."""
    try:
        share = rollout_share(run, data, indices, step, temperature, first_row)
    except KeyboardInterrupt:
        share = None
    shares = gather(share)
    run.stop.check(everywhere=True)
    return [r for place in range(len(indices)) for r in shares[place % WORLD][place // WORLD]]


def rollout_share(run, data, indices, step, temperature, first_row):
    """This process's groups of a rollout, every WORLD-th. Noise goes by a completion's place in the step, whoever samples it."""
    args, G = run.args, run.args.group_size if temperature else 1
    places, out = range(RANK, len(indices), WORLD), []

    def attempt(groups):
        part = places[:groups]
        noise = uniforms(args.seed, step, [first_row + place * G + g for place in part for g in range(G)],
                         args.max_new_tokens) if temperature else None
        return part, run.generate([data[indices[place]]["prompt_ids"] for place in part], noise, group_size=G, check=run.stop.check,
                                  max_new_tokens=args.max_new_tokens, temperature=temperature or 1.0, eos_ids=run.eos_ids,
                                  pad_id=run.tokenizer.pad_token_id or 0)

    while places:
        most = min(max(1, args.sample_batch_size // G), len(places))
        (part, (ids, logps)), fit = fitting(attempt, most, lambda groups: f"--sample_batch_size {groups * G}")             # 2
        args.sample_batch_size = fit * G if fit < most else args.sample_batch_size
        rows = [data[indices[place]] for place in part]
        rows = [row for row in rows for _ in range(G)]
        texts = run.tokenizer.batch_decode(ids, skip_special_tokens=True)
        scored = rewards.score_batch([row["task"] for row in rows], texts, rows, style=args.style, weights=args.weights,
                                     n_tokens=[len(x) for x in ids], length=args.length_penalty)                           # 3
        new = [Rollout(indices[part[k // G]], rows[k]["prompt_ids"], ids[k], logps[k].clone(), ids[k][-1] in run.eos_ids, texts[k],
                       scored[k]) for k in range(len(ids))]     # clone: a view would travel with its whole batch
        places, out = places[len(part):], out + chunks(new, G)
    return out


def collect(run, step, temperature):
    """One step's rollouts -> those to train on, the first draw, all drawn. Dead groups are not trained on, unless there is
    nothing else; metrics describe the first draw, which nothing has selected."""
    args, G = run.args, run.args.group_size
    trained, first, drawn = [], [], []
    for _ in range(1 + args.max_resample):
        indices = run.curriculum.draw(args.prompts_per_step - len(trained) // G, exclude={r.index for r in drawn})         # 1
        new = rollout(run, run.data, indices, step, temperature, first_row=len(drawn))
        first, drawn = first or new, drawn + new
        trained += [r for group in chunks(new, G) if not dead(group) for r in group]
        if len(trained) == args.prompts_per_step * G:
            break
    trained = trained if trained and args.max_resample else first
    adv = advantages(torch.tensor([r.parts["reward"] for r in trained]), G, args.scale)                                    # 4
    for r, a in zip(trained, adv.tolist()):
        r.advantage = a
    return trained, first, drawn


# ------------------------------------------------------------------------------------------- the policy
def build(args, tokenizer, eos_ids, data, eval_data, device, dtype):
    """All that a run is made of. model: the policy, a transformers or a peft model; logps: completion_logps of it; sampler: the
    same as one whole plain model; reference: where the policy started, frozen, or None where that is the policy with its adapter
    off; data: rows with "prompt_ids"; bad: steps in a row with a gradient that is not finite; recent: metrics of the last 20."""
    load = partial(load_lm, args.model, device, dtype, trust_remote_code=args.trust_remote_code)
    model = load_policy(args, device, dtype)
    sampler = load() if args.lora_rank or args.fsdp else model
    reference = load().requires_grad_(False) if args.beta and not args.lora_rank else None
    for p in reference.parameters() if args.offload_reference else ():
        p.data = p.data.cpu().pin_memory() if device.type == "cuda" else p.data
    logps, optimizer = prepare(model, args, dtype), Optimizer(model, args)
    model.eval()
    refresh(sampler, model)
    return types.SimpleNamespace(
        args=args, tokenizer=tokenizer, eos_ids=eos_ids, data=data, eval_data=eval_data, device=device,
        model=model, logps=logps, optimizer=optimizer, reference=reference, sampler=sampler,
        generate=Sampler(sampler) if args.sampler == "auto" else partial(generate, sampler),
        curriculum=Curriculum(len(data), args.group_size, args.seed, args.curriculum_floor), stop=Stop(), bad=0, recent=[])


@contextlib.contextmanager
def reference_lm(run):
    """The model that the policy was at the start, on the device while the context lasts."""
    if run.reference is None:
        with run.model.disable_adapter():
            yield base_lm(run.model)
        return
    at_home = {p: p.data for p in run.reference.parameters()}
    try:
        for p, data in at_home.items():
            p.data = data.to(run.device, non_blocking=True)
        yield run.reference
    finally:
        for p, data in at_home.items():
            p.data = data


# ------------------------------------------------------------------------------------------- 5-7. update
def micro_batches(rollouts, size, device, mask_truncated=False):
    """Right-padded tensors for `size` rollouts at a time. Those that begin alike are neighbours (see attention.pack); groups with the
    longest completions come first, so that too little memory shows at once; dead groups last, which then need no backward pass."""
    def pad(rows):
        return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True).to(device)

    longest = {}
    for r in rollouts:
        longest[r.index] = max(longest.get(r.index, 0), len(r.prompt) + len(r.completion))
    order = sorted(rollouts, key=lambda r: (r.advantage == 0, -longest[r.index], r.prompt, r.completion))
    return [{"ids": pad([r.prompt + r.completion for r in part]), "sampled": pad([r.logps for r in part]),
             "mask": pad([[float(r.ended or not mask_truncated)] * len(r.completion) for r in part]),
             "prompt_lengths": torch.tensor([len(r.prompt) for r in part], device=device),
             "adv": torch.tensor([r.advantage for r in part], device=device)}
            for part in chunks(order, size)]


def evened(batches, spare):
    """As many batches in every process, which makes as many passes: what is missing is `spare`, without a token to train on."""
    missing = largest(len(batches)) - len(batches)
    return batches + [spare | {"mask": torch.zeros_like(spare["mask"])} for _ in range(missing)]


def halved(run, batches, spare):
    """The same rows in micro-batches of half the size, with what passes have left in them, as memory was too little."""
    if run.args.sampler == "auto":
        run.generate.release()
    torch.cuda.empty_cache()
    run.args.micro_batch_size = -(-run.args.micro_batch_size // 2)
    note(f"out of GPU memory: --micro_batch_size {run.args.micro_batch_size} from here on; the update is the same")
    halves = [dict(zip(b, half)) for b in batches for half in zip(*(x.tensor_split(2) for x in b.values()))]
    return evened([half for half in halves if len(half["ids"])], spare)


def add_reference(run, batches, temperature, stop):
    """Leaves the reference's log-probabilities in each batch as "ref"; they stay for the step."""
    def one(b):
        if "ref" not in b:
            b["ref"] = completion_logps(lm, b["ids"], b["prompt_lengths"], b["mask"], temperature)[0]

    if largest(int(any("ref" not in b for b in batches))):      # in all processes or in none, as passes do together
        run.model.eval()                                        # an adapter's base: no dropout
        with torch.no_grad(), reference_lm(run) as lm:
            passes(batches, one, stop)


def backward(run, batches, temperature, num_tokens, num_seqs, stop=None):
    """Adds up the gradient of this process's batches -> their share of the loss and of its parts. The first pass leaves the
    policy's own log-probabilities in each batch as "old"; they stay for the step."""
    args, sums = run.args, {}

    def one(b):
        learns = args.fsdp or args.beta > 0 or bool(b["adv"].any())                     # else there is no gradient: metrics only
        with torch.set_grad_enabled(learns):
            logp, entropy = run.logps(b["ids"], b["prompt_lengths"], b["mask"], temperature)                               # 5
        b.setdefault("old", logp.detach())
        loss, parts = policy_loss(logp, b["old"], b.get("ref"), b["adv"], b["mask"], loss=args.loss, clip_low=args.clip_low,
                                  clip_high=args.clip_high, beta=args.beta, num_tokens=num_tokens, num_seqs=num_seqs,
                                  max_new_tokens=args.max_new_tokens)                                                      # 6
        if learns:
            (loss * WORLD if args.fsdp else loss).backward()                            # FSDP averages over processes
        parts |= {"entropy": (entropy * b["mask"]).sum() / num_tokens,
                  "logp_gap": ((b["old"] - b["sampled"]).abs() * b["mask"]).sum() / num_tokens}
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value

    if args.beta:
        add_reference(run, batches, temperature, stop)
    run.model.train()
    passes(batches, one, stop, args.fsdp)
    return {name: float(value) for name, value in sums.items()}


def update(run, trained, temperature, factor):
    """Steps 5 to 7 on the rollouts of one step: --inner_epochs updates at `factor` times the peak learning rate. -> metrics, means
    over them. Only a stop that comes before the first update leaves."""
    args = run.args
    metrics = dict.fromkeys(("loss", "kl", "clip_low", "clip_high", "entropy", "logp_gap", "grad_norm", "skipped"), 0.0)
    batches = micro_batches(trained, args.micro_batch_size, run.device, args.mask_truncated)
    num_tokens = sum(float(b["mask"].sum()) for b in batches)
    spare = {name: x[:1] for name, x in batches[-1].items()}    # of the shortest
    batches = evened(batches[RANK::WORLD], spare)
    for epoch in range(args.inner_epochs if num_tokens else 0):
        share = None
        while share is None:
            run.optimizer.zero_grad()
            try:
                share = backward(run, batches, temperature, num_tokens, len(trained), None if epoch else run.stop)
            except torch.OutOfMemoryError:                      # in all processes: see passes
                if args.fsdp or largest(max(len(b["ids"]) for b in batches)) == 1:
                    raise
            if share is None:                                   # outside of the except, which holds on to the memory
                batches = halved(run, batches, spare)
        shares = gather(share)
        totals = {name: sum(share[name] for share in shares) for name in share}
        if not args.fsdp:
            run.optimizer.reduce()
        norm = run.optimizer.step(factor, skip=not math.isfinite(totals["loss"]))                                          # 7
        totals |= {"grad_norm": norm, "skipped": float(not math.isfinite(norm + totals["loss"]))}
        metrics = {name: value + totals[name] / args.inner_epochs for name, value in metrics.items()}
    run.model.eval()
    refresh(run.sampler, run.model)
    return metrics


# ------------------------------------------------------------------------------------------- files
def save_model(run, folder):
    """The policy as transformers and peft load it: the adapter, or all of it."""
    (run.model if run.args.lora_rank else run.sampler).save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def save(run, step):
    """OUTPUT_DIR/checkpoint-<step>: a model folder, and all else that a run is. -> step"""
    state = run.optimizer.state() | {"curriculum": vars(run.curriculum), "bad": run.bad, "recent": run.recent}
    if RANK == 0:
        save_checkpoint(run.args.output_dir, step, run.args.keep, lambda to: (save_model(run, to), torch.save(state, to / "trainer.pt")))
    return step


def load(run, folder):                                          # -> its step
    state = read_state(folder, "curriculum", "bad", "recent")
    if len(state["curriculum"]["due"]) != len(run.data):
        fail(f"--resume: --data has {len(run.data)} prompts now, and had {len(state['curriculum']['due'])} in the run")
    run.optimizer.load_state(state)
    refresh(run.sampler, run.model)
    vars(run.curriculum).update(state["curriculum"])
    run.bad, run.recent = state["bad"], state["recent"]
    return int(folder.name.removeprefix("checkpoint-"))


# ------------------------------------------------------------------------------------------- the loop
def read_rows(args, tokenizer, context, sources, split):
    """Rows of all sources with their prompts' ids. Countdown data that is not there yet is made."""
    rows = []
    for source in sources:
        if source.split(":")[0] == "countdown" and not Path("data/countdown").exists() and RANK == 0:
            note("data/countdown is not there yet: making it with countdown.py")
            if subprocess.call([sys.executable, Path(__file__).with_name("countdown.py"), "--out", "data/countdown"]):
                fail("countdown.py could not make data/countdown")
        gather(0)                                               # the others wait for it
        rows += rewards.load_rows(source, split)
    for n, (row, ids) in enumerate(zip(rows, prompt_ids(tokenizer, rows, args.style)), 1):
        row["prompt_ids"] = ids
        if len(ids) + args.max_new_tokens > context:
            fail(f"row {n} of {' '.join(sources)}: its prompt of {len(ids)} tokens and --max_new_tokens {args.max_new_tokens} are "
                 f"more than the model's context of {context}")
    return rows


def means(rollouts, data):
    """Means over rollouts: every reward part, those of each task where there are several, lengths."""
    out = {name: fmean(r.parts[name] for r in rollouts) for name in rollouts[0].parts}
    tasks = sorted({data[r.index]["task"] for r in rollouts})
    for task in tasks if len(tasks) > 1 else []:
        of_task = [r for r in rollouts if data[r.index]["task"] == task]
        out |= {f"{name}/{task}": fmean(r.parts[name] for r in of_task) for name in ("reward", "correct", "format")}
    return out | {"completion_length": fmean(len(r.completion) for r in rollouts), "truncated": fmean(not r.ended for r in rollouts)}


def train_step(run, step):
    """One step, numbered as at the top -> its metrics, the rollouts drawn first. A stop before the update changes nothing."""
    args, G, start = run.args, run.args.group_size, time.perf_counter()
    temperature = args.temperature + (args.temperature_end - args.temperature) * (step - 1) / max(1, args.steps - 1)
    factor = learning_rate(step, args.steps, args.warmup, args.lr_schedule)
    trained, first, drawn = collect(run, step, temperature)                                                              # 1-4
    sampled = time.perf_counter()
    metrics = {"step": step, **means(first, run.data), "groups_drawn": len(drawn) // G}
    metrics["frac_reward_zero_std"], metrics["frac_reward_zero_std_after"] = (fmean(map(dead, chunks(x, G))) for x in (first, trained))
    torch.manual_seed(args.seed * 1_000_003 + step)             # for a model with dropout
    metrics |= update(run, trained, temperature, factor)                                                                 # 5-7
    for group in chunks(drawn, G):
        run.curriculum.record(group[0].index, sum(r.parts["correct"] for r in group))
    end = time.perf_counter()
    tokens_drawn, tokens_trained = (sum(len(r.completion) for r in rollouts) for rollouts in (drawn, trained))
    metrics |= {"lr": args.lr * factor, "temperature": temperature, "step_seconds": end - start,
                "sample_seconds": sampled - start, "sample_tokens_per_s": tokens_drawn / (sampled - start),
                "update_seconds": end - sampled, "update_tokens_per_s": tokens_trained * args.inner_epochs / (end - sampled),
                "peak_memory_gb": peak_memory_gb()}
    return metrics, first


def evaluate(run, step, log):
    """Greedy answers to the held-out rows, where they are due."""
    if run.eval_data and (step % run.args.eval_every == 0 or step == run.args.steps):
        found = means(rollout(run, run.eval_data, range(len(run.eval_data)), 0, 0), run.eval_data)
        log({"step": step, **{"eval_" + name: value for name, value in found.items()}})
        note(f"step {step}  held-out: reward {found['reward']:.3f}  correct {found['correct']:.3f}  format {found['format']:.3f}")


LINE = ("step {step}  reward {reward:.3f}  correct {correct:.3f}  format {format:.3f}  dead {frac_reward_zero_std:.2f}  "
        "length {completion_length:.0f}  cut {truncated:.2f}  entropy {entropy:.3f}  kl {kl:.4f}  grad {grad_norm:.2f}  "
        "{sample_tokens_per_s:.0f} + {update_tokens_per_s:.0f} tokens/s  {step_seconds:.1f} s, {left} left")

WARNINGS = [                                                    # (what the last 20 steps show, what usually helps), said once
    (lambda m: m["reward"] <= 0, "no reward at all: read samples.jsonl; a cold start with sft.py, easier prompts or weight on format help"),
    (lambda m: m["correct"] > 0.98, "nearly everything is right: harder prompts (--pass_rate) leave more to learn"),
    (lambda m: m["frac_reward_zero_std"] > 0.9, "over 90 % of groups are dead: --pass_rate 0.1 0.9 or a larger --group_size help"),
    (lambda m: m["truncated"] > 0.5, "over half of the completions are cut off: raise --max_new_tokens"),
    (lambda m: m["kl"] > 1, "the policy is far from its start (KL above 1): lower --lr or raise --beta"),
    (lambda m: m["logp_gap"] > 0.1, "sampler and trainer disagree (logp_gap above 0.1): try --dtype float32")]


def report(run, metrics, first, said):
    """The step's line, its samples where they are due, and warnings, each of them once."""
    args, step, data = run.args, metrics["step"], run.data
    run.recent, run.bad = [*run.recent[-19:], metrics], run.bad + 1 if metrics["skipped"] else 0
    left = (args.steps - step) * fmean(m["step_seconds"] for m in run.recent)
    note(LINE.format_map(metrics | {"left": tqdm.format_interval(left)}))
    if RANK == 0 and (step % args.sample_every == 0 or step == 1 or run.bad):
        append(Path(args.output_dir) / "samples.jsonl", [
            {"step": step, "task": data[r.index]["task"], "prompt": run.tokenizer.decode(r.prompt), "completion": r.text,
             "ended": r.ended, "advantage": r.advantage, **r.parts} for r in first[:2 * args.group_size]])
    for shows, advice in WARNINGS:
        if len(run.recent) == 20 and advice not in said and all(map(shows, run.recent)):
            said.add(advice)
            note(f"warning: {advice}")
    if run.bad:
        note(f"warning: the gradient of step {step} is not finite and was not used ({run.bad} in a row; see samples.jsonl)")
    if run.bad == BAD_STEPS:
        fail(f"{run.bad} gradients in a row are not finite: see step {step} in {args.output_dir}/samples.jsonl; in a new run lower --lr")


def train(args, argv):
    device, dtype = start_processes(args.dtype)
    tokenizer, eos_ids, context = load_tokenizer(args.model, args.chat_template, args.trust_remote_code, train=True)
    data = read_rows(args, tokenizer, context, args.data, "train")
    eval_data = read_rows(args, tokenizer, context, args.eval_data, args.eval_split)
    if args.pass_rate != [0, 1]:
        if not all(isinstance(row.get("pass_rate"), (int, float)) for row in data):
            fail("--pass_rate: a row of --data has no such number; eval.py --samples 8 writes files that have")
        data = [row for row in data if args.pass_rate[0] <= row["pass_rate"] <= args.pass_rate[1]]
    if len(data) < args.prompts_per_step:
        fail(f"--data has {len(data)} prompts, fewer than --prompts_per_step {args.prompts_per_step}")
    folder = go_on_from(args, FREE)
    run, said, done, saved = build(args, tokenizer, eos_ids, data, eval_data, device, dtype), set(), 0, -1
    if folder:
        done = saved = load(run, folder)
    if RANK == 0:
        open_folder(args, folder)                               # a model that does not load costs no run its folder
    log, quiet = logger(args), RANK > 0 or not sys.stderr.isatty()
    with run.stop, tqdm(total=args.steps, initial=done, unit="step", disable=quiet) as bar:
        try:
            evaluate(run, done, log)
            while done < args.steps:
                metrics, first = train_step(run, done + 1)
                done += 1
                log(metrics)
                bar.update()
                report(run, metrics, first, said)
                if args.save_every and done % args.save_every == 0:
                    saved = save(run, done)
                run.stop.check(everywhere=True)
                evaluate(run, done, log)
        except KeyboardInterrupt as stopped:
            if saved < done:
                save(run, done)
            leave(stopped, done, args.steps, argv)
    if RANK == 0:
        tmp = Path(args.output_dir) / "tmp-final"
        save_model(run, tmp)
        if args.merge:
            run.sampler.save_pretrained(tmp / "merged")
            tokenizer.save_pretrained(tmp / "merged")
        move_in(tmp, args.output_dir)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with one_line(args):
        train(args, argv)


if __name__ == "__main__":
    main()
