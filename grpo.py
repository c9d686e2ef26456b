"""GRPO: teach a language model to reason with verifiable rewards and group sampling.

One step of the loop in train(), with the numbers that the code repeats:

 1. Draw prompts, in shuffled epochs.
 2. Sample a group of G completions for each. Token ids are never re-tokenised; end tokens are trained.
 3. Score every completion (rewards.py). A dead group, whose rewards are all equal, carries no gradient: fresh
    prompts replace it, up to --max_resample times (DAPO, arXiv 2503.14476, section 3.2).
 4. Advantage: (reward - mean of its group) / std of its group (GRPO, arXiv 2402.03300, section 4.1.2).
 5. Log-probabilities of the sampled ids under the reference and the policy, at the sampling temperature, in
    chunks: no [batch, time, vocabulary] tensor ever exists.
 6. Clipped policy loss, plus --beta times the k3 estimate of the KL to the frozen reference, normalised by a
    count over the whole step: neither micro-batches nor processes change the update.
 7. Clip the gradient, update the fp32 masters, round the weights from them.
 8. Log metrics and samples, evaluate on held-out rows, save a checkpoint.

One set of weights, in the dtype of compute, is sampled from, trained and saved, its adapter switched on.
Unlike in the paper, the loss is a mean over tokens (see --loss), beta is small, dead groups are replaced, and
the old log-probabilities are the policy's own, as decoding rounds differently.

    python grpo.py --model Qwen/Qwen2.5-3B-Instruct                 # Countdown on one GPU with the defaults
    python grpo.py @recipes/tiny/grpo.txt                           # minutes on two CPU cores
    torchrun --nproc_per_node 8 grpo.py --model ... --data gsm8k    # eight GPUs
"""
import argparse
import fcntl
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
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import rewards


# ------------------------------------------------- flags; down to FLOAT sft.py has the same text
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
    add = parser.add_argument_group("task").add_argument
    add("--model", required=True, help="checkpoint folder (also a LoRA adapter's) or hub id")
    add("--data", nargs="+", default=["countdown"], metavar="SOURCE", help="prompts: TASK[=PATH][:N]")
    add("--pass_rate", nargs=2, type=FLOAT, metavar=("LOW", "HIGH"), help="keep rows with a pass_rate within")
    add("--style", choices=rewards.STYLES, default="reasoning", help="name of the reasoning tag")
    add("--weights", nargs="+", default=[f"{part}={w}" for part, w in rewards.WEIGHTS.items()],
        metavar="PART=WEIGHT", help="of the parts of the reward; parts that are not named weigh 0")
    add("--length_penalty", nargs=2, type=NATURAL, default=list(rewards.LENGTH), help="its tokens, START END")
    add("--eval_data", nargs="+", default=[], metavar="SOURCE", help="held-out rows, answered greedily")
    add("--eval_every", type=POSITIVE, default=50, help="steps between evaluations")
    add = parser.add_argument_group("sampling").add_argument
    add("--prompts_per_step", type=POSITIVE, default=32, help="groups per step, over all processes")
    add("--group_size", type=at_least(2), default=8, help="completions per prompt")
    add("--max_new_tokens", type=POSITIVE, default=1024, help="length limit of a completion, in tokens")
    add("--temperature", type=at_least(1e-3, float), default=1.0, help="of sampling and of what is trained")
    add("--temperature_end", type=at_least(1e-3, float), help="anneal linearly to this")
    add("--max_resample", type=NATURAL, default=2, help="rounds of fresh prompts a step for dead groups")
    add("--sample_batch_size", type=POSITIVE, default=256, help="completions sampled at once: memory only")
    add("--cuda_graphs", action="store_true", help="sample with extras/sampler.py: faster steps on a GPU")
    add = parser.add_argument_group("loss").add_argument
    add("--steps", type=POSITIVE, default=500, help="number of training steps")
    add("--loss", choices=["grpo", "dr_grpo", "dapo", "cispo", "gspo"], default="dapo", help="policy_loss")
    add("--scale", choices=["group", "batch", "none"], default="group", help="std that normalises advantages")
    add("--clip_low", type=FLOAT, default=0.2, help="the ratio is clipped below 1 - this")
    add("--clip_high", type=FLOAT, default=0.2, help="the ratio is clipped above 1 + this")
    add("--beta", type=FLOAT, default=0.001, help="weight of the KL to the initial model; 0: off")
    add("--inner_epochs", type=POSITIVE, default=1, help="updates per step on the same rollouts")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=FLOAT, default=1e-6, help="peak learning rate; LoRA takes ten times as much")
    add("--warmup", type=NATURAL, default=10, help="steps of linear warm-up")
    add("--lr_schedule", choices=["constant", "linear", "cosine"], default="constant", help="after warm-up")
    add("--max_grad_norm", type=FLOAT, default=1.0, help="clip the gradient to this norm; 0: never")
    add("--optim", choices=["adamw", "adamw8bit", "paged_adamw8bit"],
        help="8bit: 2 bytes of moments a parameter, not 8; paged: on the CPU if need be; None: 8bit on a GPU")
    add("--micro_batch_size", type=POSITIVE, default=8, help="rows per forward pass: speed and memory only")
    add = parser.add_argument_group("model and memory").add_argument
    add("--lora_rank", type=NATURAL, default=0, help="LoRA on all linear layers but the head; 0: whole model")
    add("--lora_alpha", type=FLOAT, default=32, help="the adapter is scaled by alpha / rank")
    add("--load_in_4bit", action="store_true", help="QLoRA: keep the frozen base in nf4")
    add("--merge", action="store_true", help="LoRA: also write merged/, the base with the adapter merged in")
    add("--activation_checkpointing", action=argparse.BooleanOptionalAction,
        help="less memory, about a third slower; None: on a GPU")
    add("--dtype", choices=["float32", "bfloat16"], help="of compute; None: bfloat16 on a GPU, else float32")
    add("--fsdp", action="store_true", help="shard a whole model over torchrun's processes (FSDP2)")
    add = parser.add_argument_group("files and logs").add_argument
    add("--output_dir", default="runs/grpo", help="final model, checkpoints, logs")
    add("--save_every", type=NATURAL, default=50, help="steps between checkpoints; 0: only when stopped")
    add("--log_to", choices=["tensorboard", "wandb"], help="besides metrics.jsonl")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir, if any")
    add("--seed", type=NATURAL, default=0, help="of the data order, the sampling and new adapters")
    with expect("flags"):                                       # a flag file: an open quote, no UTF-8
        return parser.parse_args(argv)

ARGS = parse_args() if __name__ == "__main__" else None         # --help does not wait for these imports
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
STOP = []                       # the signals that asked this process to stop
LOGS = ("metrics.jsonl", "samples.jsonl")
HEAD_LOGITS = 2 ** 26           # logits that exist at a time: 256 MB in fp32
PARTS = ("loss", "kl", "clip_low", "clip_high", "entropy", "logp_gap", "seen")
MAY_CHANGE = {"resume", "output_dir", "save_every", "log_to", "micro_batch_size", "sample_batch_size", "fsdp",
              "merge", "activation_checkpointing", "cuda_graphs"}  # at --resume: they change no update
UNFIT = {"cpmant", "llama4", "llama4_text", "modernbert-decoder", "moshi", "phimoe", "trocr"}  # tried: wrong
transformers.utils.logging.disable_progress_bar()


# ----------------------------------------------------------------------------------------- the algorithm
def advantages(rewards, group_size, scale="group"):
    """[N] rewards, a group's completions side by side -> [N] advantages: r - mean(group), over a std.

    scale: `group` (arXiv 2402.03300, section 4.1.2), `batch` (one std, 2508.08221), `none` (2503.20783).
    A group of equal rewards gets exactly 0, whatever rounding makes of its mean."""
    r = rewards.float().view(-1, group_size)                            # [N / G, G]
    centred = r - r.mean(1, keepdim=True)
    if scale != "none":
        std = r.std(1, keepdim=True) if scale == "group" else r.std()
        centred = centred / (std + 1e-4)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)          # [N / G, 1]
    return centred.masked_fill(equal, 0.0).view(-1)

def policy_loss(logp, old_logp, ref_logp, adv, mask, *, loss="dapo", clip_low=0.2, clip_high=0.2, beta=0.0,
                num_tokens, num_seqs, max_new_tokens):
    """One micro-batch's share of the step's loss, to be minimised: the shares add up to the loss of the step.

    logp, old_logp, ref_logp: [n, T] log-probabilities of the sampled ids (ref_logp: None when beta is 0);
    adv: [n]; mask: [n, T], 1 on trained tokens; num_tokens, num_seqs: of the whole step, over all processes.
      grpo     mean over a sequence's tokens, then over sequences     arXiv 2402.03300, eq. 3
      dr_grpo  sum over tokens / (sequences * max_new_tokens)         arXiv 2503.20783, section 3.2
      dapo     mean over all tokens of the step                       arXiv 2503.14476, eq. 8
      cispo    REINFORCE weighted by the capped, detached ratio       arXiv 2506.13585, eq. 4
      gspo     one ratio per sequence, its tokens' geometric mean     arXiv 2507.18071, eqs. 5-7
    Returns the loss and its parts, which add up too."""
    log_ratio = logp - old_logp                                         # [n, T]
    lengths = mask.sum(1, keepdim=True).clamp(min=1)                    # [n, 1]
    if loss == "gspo":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / lengths   # [n, 1]
    ratio, adv = log_ratio.exp(), adv[:, None]                          # [n, T] or [n, 1], [n, 1]
    if loss == "cispo":
        per_token = -ratio.clamp(max=1 + clip_high).detach() * adv * logp
    else:                                                               # PPO, arXiv 1707.06347, eq. 7
        per_token = -torch.min(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    kl = torch.zeros_like(logp)                                         # [n, T]
    if beta:                                                            # k3, arXiv 2402.03300, eq. 4
        kl = (ref_logp - logp).exp() - (ref_logp - logp) - 1
        per_token = per_token + beta * kl
    norm = {"grpo": lengths * num_seqs, "gspo": lengths * num_seqs, "dapo": num_tokens, "cispo": num_tokens,
            "dr_grpo": num_seqs * max_new_tokens}[loss]
    total = (per_token * mask / norm).sum()
    parts = {"kl": kl, "clip_low": (ratio < 1 - clip_low) * (adv < 0),
             "clip_high": (ratio > 1 + clip_high) * (adv > 0)}
    parts = {name: (x * mask).sum().detach() / num_tokens for name, x in parts.items()}
    return total, parts | {"loss": total.detach()}

def head(lm, states):
    """[m, H] last hidden states -> [m, V] fp32 logits, scaled and capped as in the model's own forward."""
    config = lm.config.get_text_config()
    logits = lm.get_output_embeddings()(states).float()
    scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    logits = logits if scale == 1 else logits * scale
    return cap * (logits / cap).tanh() if cap else logits

def check_head(lm):
    """ValueError for a model whose logits are something else than head() makes of its last hidden states."""
    ids = torch.ones(1, 1, dtype=torch.long, device=lm.device)
    with torch.no_grad():
        own, ours = lm(input_ids=ids).logits[0], head(lm, lm.base_model(input_ids=ids).last_hidden_state[0])
    if own.shape != ours.shape or not torch.allclose(own.float(), ours, rtol=0.05, atol=0.05):
        raise ValueError(f"{lm.config.model_type} changes its logits in a way that head() does not know")

def completion_logps(lm, ids, prompt_lengths, mask, temperature=1.0, chunk=HEAD_LOGITS):
    """Log-probabilities of the completions' ids at `temperature` and, without gradient, entropies, [n, T],
    0 where the mask is. ids [n, L]: prompt, completion, padding (needs no mask, as attention is causal);
    prompt_lengths [n]; mask [n, T]. At most `chunk` logits exist at once, of completions alone; the backward
    pass computes them again."""
    def score(h, targets):
        logps = (head(lm, h) / temperature).log_softmax(-1)             # [m, V]
        frozen = logps.detach()                 # entropies of `logps` itself would keep their gradient
        return logps.gather(1, targets[:, None]).squeeze(1), -(frozen.exp() * frozen).sum(-1)

    states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state    # [n, L, H]
    row, t = mask.nonzero(as_tuple=True)                                        # [tokens] each
    place = prompt_lengths[row] + t
    hidden, targets = states[row, place - 1], ids[row, place]                   # [tokens, H], [tokens]
    size = max(1, chunk // lm.config.get_text_config().vocab_size)
    if len(targets) > size and torch.is_grad_enabled():
        score = partial(checkpoint, score, use_reentrant=False)
    pieces = [score(h, t) for h, t in zip(hidden.split(size), targets.split(size))]
    blank = torch.zeros_like(mask, dtype=torch.float32)
    return tuple(blank.index_put((row, t), torch.cat(part)) for part in zip(*pieces))


# ----------------------------------------------------------------------------------------- the sampler
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


# ----------------------------------------------------------------------------------------- the loop
def train(args):
    device, dtype = start_processes(args)
    weights = rewards.parse_weights(args.weights)
    data, eval_data = read_rows(args.data, "train"), read_rows(args.eval_data, "test")
    if args.pass_rate:
        data = [row for row in data if args.pass_rate[0] <= row.get("pass_rate", -1) <= args.pass_rate[1]]
        if not data:
            fail("--pass_rate: no row of --data has one in this range; eval.py --samples 8 writes it")
    args.data_crc = zlib.crc32(repr(data).encode())             # --resume is to find the same rows
    with expect(f"--model {args.model}"):
        tokenizer, rows = load_tokenizer(args.model, args.style), data + eval_data
        prompts = render(tokenizer, [rewards.messages(row["task"], row, args.style) for row in rows])
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        check_model(args.model, ids, args.max_new_tokens, whole=not args.lora_rank)
        for row, prompt, x in zip(rows, prompts, ids):
            row |= {"prompt": prompt, "prompt_ids": x}
    sampler = generate
    if args.cuda_graphs:
        from extras.sampler import Sampler
        sampler = Sampler(pick)
    state, board = open_run(args, parse_args(["--model", ""])), open_board(args)
    with expect(f"--model {args.model}"):
        name = args.model
        if base_of(name) != name:                               # an adapter: the next one stands on this
            name = write_merged(name, f"{args.output_dir}/base", args, tokenizer, keep=bool(state))
        policy, lm = load_policy(name, args, device, dtype)
        sampled = load_lm(name, device, dtype) if args.fsdp else lm     # what is sampled from and saved
        reference, adapter_off = lm, getattr(policy, "disable_adapter", torch.no_grad)
        if args.beta and not args.lora_rank:                    # on the CPU except during its forward pass
            reference = load_lm(name, "cpu", dtype)
        check_head(sampled)
        trained = fp32_masters(policy)
        optimizer = make_optimizer(trained, args)
    for module in policy.modules():                             # dropout would train another policy
        vars(module).update({key: 0.0 for key, x in vars(module).items()
                             if type(x) is float and (key == "p" or "drop" in key or "jitter" in key)})
    lm.logps = partial(completion_logps, lm)
    register_fsdp_forward_method(lm, "logps")                   # without --fsdp this does nothing
    ends = end_ids(tokenizer, lm.generation_config)
    sampler = partial(sampler, sampled, ends=ends, steps=lambda n: progress(range(n), "sampling"))
    draws = args.steps * args.prompts_per_step * (1 + args.max_resample)        # at most
    epochs = range(math.ceil(draws / len(data)))
    order = np.concatenate([np.random.default_rng([args.seed, i]).permutation(len(data)) for i in epochs])
    done = {"step": 0, "drawn": 0, "evaluated": -1}             # steps, prompts, the last step evaluated
    if state:
        restore(trained, optimizer, state)
        done = state["done"]
    dead_steps = 0                                              # the last ones, in which every group was dead
    describe(args, lm, trained, data, device, ends)

    def save_model(folder, _=None):
        (policy if args.lora_rank else sampled).save_pretrained(folder)
        lm.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def refresh():
        if args.fsdp:
            copy_weights((target, whole(p)) for target, p in zip(sampled.parameters(), lm.parameters()))

    def evaluate():
        if eval_data and done["evaluated"] < done["step"]:
            found = means(roll_out(sampler, tokenizer, eval_data, args, weights, ends))
            log(args, board, {"step": done["step"], **{f"eval_{key}": x for key, x in found.items()}})
            note("step {}  held-out reward {reward:.3f}  correct {correct:.3f}".format(done["step"], **found))
            done["evaluated"] = done["step"]

    refresh()
    bar = tqdm(range(done["step"] + 1, args.steps + 1), "step", initial=done["step"], total=args.steps,
               disable=RANK > 0 or not sys.stderr.isatty())
    try:
        for step in bar:
            if done["step"] % args.eval_every == 0:             # 8, of the step before
                evaluate()
            started = time.perf_counter()
            past = max(0, step - 1 - args.warmup) / max(1, args.steps - args.warmup)
            factor = {"constant": 1.0, "linear": 1 - past, "cosine": (1 + math.cos(math.pi * past)) / 2}
            factor = min(1.0, step / max(1, args.warmup)) * factor[args.lr_schedule]
            first_and_last = [args.temperature, args.temperature_end or args.temperature]
            temperature = float(np.interp(step, [1, max(2, args.steps)], first_and_last))

            drawn, missing = [], args.prompts_per_step          # groups; how many live ones are missing
            for _ in range(1 + args.max_resample):
                # 1. Draw prompts. 2. Sample a group for each. 3. Score; the next round replaces dead groups.
                rows = [data[i] for i in order[done["drawn"] + len(drawn):][:missing]]
                key = [args.seed, step, len(drawn)]
                drawn += roll_out(sampler, tokenizer, rows, args, weights, ends, temperature, key)
                missing = args.prompts_per_step - sum(not is_dead(group) for group in drawn)
                if not missing:
                    break
            groups = sorted(drawn, key=is_dead)[:args.prompts_per_step]     # dead ones only fill up
            rollouts = sum(groups, [])

            # 4. Advantages.
            adv = advantages(torch.tensor([r.parts["reward"] for r in rollouts]), args.group_size, args.scale)
            for r, a in zip(rollouts, adv.tolist()):
                r.advantage = a
            live = [r for r in rollouts if r.advantage or args.beta]        # the others have no gradient
            batches = micro_batches(live, args, device)
            totals = {"num_tokens": sum(len(r.completion) for r in rollouts), "num_seqs": len(rollouts),
                      "max_new_tokens": args.max_new_tokens}
            updating = time.perf_counter()

            # 5. Log-probabilities under the reference.
            if args.beta:
                reference.to(device)
                with adapter_off(), torch.no_grad():
                    for b in progress(batches, "reference", args.fsdp):
                        b["ref"] = completion_logps(
                            reference, b["ids"], b["prompt_lengths"], b["mask"], temperature)[0]
                reference.to("cpu" if reference is not lm else device)
            policy.train(args.activation_checkpointing)         # which needs training mode
            for epoch in range(args.inner_epochs):
                sums = dict.fromkeys(PARTS, 0.0)                # over micro-batches and processes
                for b in batches if epoch else progress(batches, "update", args.fsdp):
                    # 5. Log-probabilities under the policy; those of the first pass are the old ones.
                    logp, entropy = lm.logps(b["ids"], b["prompt_lengths"], b["mask"], temperature)
                    old = b.setdefault("old", logp.detach())
                    # 6. Loss and its gradient. FSDP takes the mean over the processes.
                    loss, parts = policy_loss(
                        logp, old, b.get("ref"), b["adv"], b["mask"], loss=args.loss, clip_low=args.clip_low,
                        clip_high=args.clip_high, beta=args.beta, **totals)
                    (loss * (WORLD if args.fsdp else 1)).backward()
                    gap = ((old - b["sampled_logp"]) * b["mask"]).abs()
                    parts |= {"entropy": entropy.sum(), "logp_gap": gap.sum(), "seen": b["mask"].sum()}
                    for key, value in parts.items():
                        sums[key] += value.detach()
                shares, signals = zip(*gather(([float(value) for value in sums.values()], STOP)))
                if any(signals) and epoch == 0:                 # this step is left undone, on all ranks
                    raise KeyboardInterrupt(max(signals)[0])
                sums = dict(zip(PARTS, np.sum(shares, axis=0).tolist()))
                seen = sums.pop("seen") or math.nan             # where no row is live
                sums |= {"entropy": sums["entropy"] / seen, "logp_gap": sums["logp_gap"] / seen}
                # 7. Clip the gradient and update the weights.
                usable = live and math.isfinite(sums["loss"])
                sums["grad_norm"] = update(trained, optimizer, factor, args, usable)
            policy.eval()
            refresh()

            # 8. Log, evaluate, save.
            ended = time.perf_counter()
            done |= {"step": step, "drawn": done["drawn"] + len(drawn)}
            metrics = {
                "step": step, **means(drawn), **sums, "groups_drawn": len(drawn), "temperature": temperature,
                "frac_reward_zero_std": fmean(map(is_dead, drawn)), "lr": args.lr * factor,
                "frac_reward_zero_std_after": fmean(map(is_dead, groups)), "peak_memory_gb": peak_memory(),
                "sample_seconds": updating - started, "update_seconds": ended - updating,
                "step_seconds": ended - started}
            log(args, board, metrics)
            report(bar, metrics, "reward {reward:.3f}  correct {correct:.3f}  length "
                   "{completion_length:.0f}  entropy {entropy:.3f}")
            skipped = not math.isfinite(sums["loss"] + sums["grad_norm"])
            if skipped:
                note(f"warning: the gradient of step {step} is not finite and was not used; lower --lr")
            dead_steps = dead_steps + 1 if all(map(is_dead, drawn)) else 0
            if dead_steps == 1 == step or dead_steps == 3 < step:
                zero = [part for part, w in weights.items() if w and not any(r.parts[part] for r in rollouts)]
                note(f"warning: every group is dead: nothing is learned. At 0 for every completion: "
                     f"{', '.join(zero) or 'no part'}. What helps: a cold start with sft.py, --weights ... "
                     "tags=0.5, rows that are neither too hard nor too easy (--pass_rate)")
            if step == 1 or step % 10 == 0 or skipped:
                append(Path(args.output_dir) / "samples.jsonl", [
                    {"step": step, "task": r.row["task"], "prompt": r.row["prompt"], "completion": r.text,
                     "ended": r.ended, "advantage": r.advantage, **r.parts} for r in sum(drawn[:2], [])])
            if args.save_every and step % args.save_every == 0:
                save_checkpoint(args, done, trained, optimizer, save_model)
        evaluate()
    except KeyboardInterrupt as stopped:
        if done["step"]:
            save_checkpoint(args, done, trained, optimizer, save_model)
        gather(0)                                               # torchrun ends all processes when one leaves
        note(f"stopped after step {done['step']} of {args.steps}: add --resume to the command to continue")
        raise SystemExit(128 + stopped.args[0]) from None
    if RANK == 0:
        save_model(args.output_dir)
    if args.merge:
        write_merged(args.output_dir, f"{args.output_dir}/merged", args, tokenizer)
    note(f"wrote {args.output_dir}: next, python eval.py --model {args.model} {args.output_dir} --data ...")

@dataclass
class Rollout:
    """One completion: what was asked, what the model wrote, what it earned."""
    row: dict                   # of the data, with its "prompt" and "prompt_ids"
    completion: list            # ids, with the end token
    logps: torch.Tensor         # [len(completion)], as the sampler saw them
    ended: bool                 # False: cut off at max_new_tokens
    text: str                   # without the end token; with the opening tag, if the prompt ends in it
    parts: dict = None          # of its reward
    advantage: float = 0.0

def read_rows(sources, split):
    """Rows of all sources. Default Countdown data that are not there yet are made."""
    countdown = "countdown" in [source.split(":")[0] for source in sources]
    if countdown and not Path("data/countdown").exists() and RANK == 0:
        subprocess.call([sys.executable, Path(__file__).with_name("countdown.py")])
    gather(0)                                                   # the other ranks wait for it
    return [row for source in sources for row in rewards.load_rows(source, split)]

def roll_out(sampler, tokenizer, rows, args, weights, ends, temperature=None, key=()):
    """Sample a group for each row (without a temperature: one greedy completion) and score it -> the groups
    of all processes, in the order of the rows. Collective; KeyboardInterrupt on all if one is told to stop.

    key: seed, step, groups drawn before in this step. The noise of a row depends on these and its place."""
    size, rollouts, mine = args.group_size if temperature else 1, [], range(len(rows))[RANK::WORLD]
    at_once = max(1, args.sample_batch_size // size)
    for places in [mine[at:at + at_once] for at in range(0, len(mine), at_once)]:
        some, noise = [rows[i] for i in places for _ in range(size)], None
        if temperature:
            keys = [[*key[:-1], (key[-1] + i) * size + g] for i in places for g in range(size)]
            noise = uniforms(keys, args.max_new_tokens)
        prompts = [row["prompt_ids"] for row in some[::size]]
        completions, logps = sampler(prompts, noise, size, args.max_new_tokens, temperature or 1.0)
        texts = decode(tokenizer, completions, [row["prompt"] for row in some], ends, args.style)
        for row, ids, logp, text in zip(some, completions, logps, texts):
            rollouts.append(Rollout(row, ids, logp, ids[-1:] != [] and ids[-1] in ends, text))
    tasks, lengths = [r.row["task"] for r in rollouts], [len(r.completion) for r in rollouts]
    scored = rewards.score_batch(tasks, [r.text for r in rollouts], [r.row for r in rollouts], args.style,
                                 weights, lengths, length=args.length_penalty)
    for r, parts in zip(rollouts, scored):
        r.parts = parts
    groups = [rollouts[at:at + size] for at in range(0, len(rollouts), size)]
    shares, signals = zip(*gather((groups, STOP)))
    if any(signals):
        raise KeyboardInterrupt(max(signals)[0])
    return [group for turn in zip_longest(*shares) for group in turn if group]

def is_dead(group):
    """Whether a group's rewards are all equal, so that its advantages are 0."""
    return len({r.parts["reward"] for r in group}) == 1

def means(groups):
    """Means over rollouts: every reward part (also by task, if there are several), length, share cut off."""
    rollouts = sum(groups, [])
    tasks, shares = sorted({r.row["task"] for r in rollouts}), {"": rollouts}
    if len(tasks) > 1:
        shares |= {f"/{task}": [r for r in rollouts if r.row["task"] == task] for task in tasks}
    found = {name + of: fmean(r.parts[name] for r in share)
             for of, share in shares.items() for name in rollouts[0].parts}
    found["completion_length"] = fmean(len(r.completion) for r in rollouts)
    found["truncated"] = fmean(not r.ended for r in rollouts)
    return found

def micro_batches(rollouts, args, device):
    """This process's micro-batches, padded: ids [n, L]; prompt_lengths, adv [n]; mask, sampled_logp [n, T].

    Sorted by length, which saves padding, the longest first, as too little memory then shows at once. Under
    FSDP every rank makes as many passes."""
    def pad(rows):
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.as_tensor, rows)), batch_first=True).to(device)

    size, batches = args.micro_batch_size, []
    rows = sorted(rollouts, key=lambda r: -len(r.row["prompt_ids"]) - len(r.completion))
    if args.fsdp and rows:
        rows += [replace(rows[-1], completion=[], logps=torch.zeros(0))] * (-len(rows) % (size * WORLD))
    for part in [rows[at:at + size] for at in range(RANK * size, len(rows), WORLD * size)]:
        lengths, adv = zip(*((len(r.row["prompt_ids"]), r.advantage) for r in part))
        batches.append({"ids": pad([r.row["prompt_ids"] + r.completion for r in part]),
                        "prompt_lengths": torch.tensor(lengths, device=device),
                        "adv": torch.tensor(adv, device=device),
                        "mask": pad([torch.ones(len(r.completion)) for r in part]),
                        "sampled_logp": pad([r.logps for r in part])})
    return batches

def describe(args, lm, trained, data, device, ends):
    """One line on what runs and, roughly, the GB of tests/bench/bench_memory.py --computed: weights, masters,
    moments, and the larger of sampling (keys and values) and update (gradients, activations, logits)."""
    config, n = lm.config.get_text_config(), sum(p.numel() for p, _ in trained.values())
    weights, size = sum(p.numel() * p.element_size() for p in lm.parameters()), lm.dtype.itemsize
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    cached = (2 * layers + 1) * (getattr(config, "num_key_value_heads", None) or heads)     # + 1: it grows
    cached *= size * (getattr(config, "head_dim", None) or width // heads)
    kept = width * layers + 28 * width * (1 if args.activation_checkpointing else layers)
    rows = min(args.sample_batch_size, args.prompts_per_step * args.group_size)
    length = max(len(row["prompt_ids"]) for row in data) + args.max_new_tokens
    tokens, moments = args.micro_batch_size * length, {"adamw8bit": 2, "paged_adamw8bit": 0}
    update = 4 * n + tokens * kept * size + 16 * min(HEAD_LOGITS, tokens * config.vocab_size)
    total = weights + n * (8 - 2 * size + moments.get(args.optim, 8)) + max(rows * length * cached, update)
    has = f" of {torch.cuda.mem_get_info()[1] / 1e9:.0f}" if device.type == "cuda" else ""
    note(f"{args.model}: {n / 1e6:,.1f} M parameters trained; {len(data):,} rows; {args.prompts_per_step} x "
         f"{args.group_size} completions a step; {device}, {args.dtype}; {total / 1e9:.1f}{has} GB, computed")
    if not ends:
        note("warning: the model has no end token: every completion runs to --max_new_tokens")

def open_board(args):
    """The TensorBoard writer that --log_to asks for, if any, on rank 0; W&B copies what is written there."""
    if args.log_to and RANK == 0:
        from torch.utils.tensorboard import SummaryWriter
        if args.log_to == "wandb":
            import wandb
            wandb.init(config=vars(args), sync_tensorboard=True)
        return SummaryWriter(args.output_dir)

def log(args, board, metrics):
    """Write a line of metrics.jsonl, and points on the board's curves. On rank 0."""
    append(Path(args.output_dir) / "metrics.jsonl", [metrics])
    if board:
        for name, value in metrics.items():
            board.add_scalar(name, value, metrics["step"])

def decode(tokenizer, completions, prompts, ends, style):
    """Completions -> the texts to score: without their end token, cut by its id, as tags may be special too;
    with the reasoning's opening tag in front where the prompt ends in it."""
    texts = tokenizer.batch_decode([ids[:-1] if ids and ids[-1] in ends else ids for ids in completions])
    return [rewards.opening(prompt, style) + text for prompt, text in zip(prompts, texts)]


# ------------------------------------------------------- what sft.py has too: the same text stands there
def note(message):
    """Print a line on stderr, on rank 0, that does not break a progress bar."""
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)

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

def write_merged(name, folder, args, tokenizer, keep=False):
    """Write adapter `name`, merged into its base, as an ordinary model (or keep what is there) -> folder."""
    if RANK == 0 and not keep:
        load_lm(name, "cpu", getattr(torch, args.dtype), args.load_in_4bit).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    gather(0)                                                   # the other ranks wait for it
    return folder

def load_policy(name, args, device, dtype, lm=None):
    """The model to train (`lm` or the one of this name) in `dtype`, whole or an adapter on a frozen base
    -> the model, the transformers model in it."""
    if args.load_in_4bit and not args.lora_rank:
        fail("--load_in_4bit needs --lora_rank: 4-bit weights do not train")
    if args.fsdp and (WORLD == 1 or args.lora_rank or args.optim != "adamw"):
        fail("--fsdp shards a whole model, with --optim adamw, over the processes of torchrun")
    where = ("cpu", torch.float32) if args.fsdp else (device, dtype)
    model = lm = lm or load_lm(name, *where, args.load_in_4bit)
    if args.lora_rank:
        import peft
        torch.manual_seed(args.seed)
        model = peft.get_peft_model(lm, peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha,
                                                        task_type="CAUSAL_LM", target_modules="all-linear"))
        for p in model.parameters():
            p.data = p.to(dtype) if p.requires_grad else p.data
    if args.activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if args.fsdp:  # fp32 shards; a layer is gathered in `dtype` to run
        for module in (*lm.base_model.layers, lm):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    return model.eval(), lm

def fp32_masters(model):
    """{name: (parameter, master)} of all that is trained. An update of 5e-7 would vanish in bf16: it is made
    on the fp32 master, which gradients are handed to as they arrive. fp32 parameters share its memory."""
    def hand_over(master, p):
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    trained = {name: (p, p.detach().float()) for name, p in model.named_parameters() if p.requires_grad}
    for p, master in trained.values():
        p.register_post_accumulate_grad_hook(partial(hand_over, master))
    return trained

def make_optimizer(trained, args):
    """The optimiser of all masters, at the peak learning rate."""
    kind = partial(torch.optim.AdamW, fused=True)
    if "8bit" in args.optim:
        import bitsandbytes
        kind = bitsandbytes.optim.PagedAdamW8bit if "paged" in args.optim else bitsandbytes.optim.AdamW8bit
    return kind([master for _, master in trained.values()], lr=args.lr, weight_decay=0.0)

def update(trained, optimizer, factor, args, usable):
    """Sum gradients over processes, clip, update at `factor` times the peak learning rate -> norm of the
    gradient before clipping. Where that is not finite, or not `usable`, no weight changes."""
    masters = [master for _, master in trained.values()]
    for master in masters:
        if master.grad is None:                                 # another process may have one
            master.grad = torch.zeros_like(master)
        if WORLD > 1 and not args.fsdp:                         # FSDP has summed already
            dist.all_reduce(master.grad)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(masters, args.max_grad_norm or math.inf)))
    optimizer.param_groups[0]["lr"] = args.lr * factor
    if usable and math.isfinite(norm):
        optimizer.step()
        copy_weights(trained.values())
    optimizer.zero_grad()
    return norm

def whole(x):
    """A tensor, gathered from FSDP's shards if it has some. Collective."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x

@torch.no_grad()
def copy_weights(pairs):
    """Copy the second tensor of each pair into the first."""
    for target, x in pairs:
        target.copy_(x)

def start_processes(args):
    """Join torchrun's other processes, and settle what the device decides -> the device, the compute dtype.
    From now on the first SIGINT or SIGTERM is kept in STOP; a second SIGINT ends the process."""
    def keep(number, frame):
        STOP.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nstopping: saving a checkpoint first; Ctrl-C again leaves at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, keep)
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if cuda:
        torch.cuda.set_device(device)
    if WORLD > 1:  # ranks may wait for hours while one samples or saves
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(hours=12)))
        # after a restart torchrun's store still holds the addresses of the start before
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=RANK,
                                world_size=WORLD, timeout=store.timeout)
    args.dtype = args.dtype or ("bfloat16" if bf16 else "float32")
    args.optim = args.optim or ("adamw8bit" if cuda and not args.fsdp else "adamw")
    if args.activation_checkpointing is None:
        args.activation_checkpointing = cuda
    return device, getattr(torch, args.dtype)

def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank. Collective: call on every rank."""
    shares = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(shares, x)
    return shares

def progress(items, what, together=False):
    """The items, with a bar once they take two seconds (in a log, a line a minute), until this process is
    told to stop. together: all processes have as many items, and all end where one is told to."""
    seconds = 0.1 if sys.stderr.isatty() else 60
    for item in tqdm(items, what, leave=False, delay=max(2, seconds), mininterval=seconds, disable=RANK > 0):
        if any(gather(STOP)) if together else STOP:
            return
        yield item

def report(bar, metrics, line):
    """Say how a step went: beside the bar or, where it is off, in a line with the time that is left."""
    line, seconds = line.format(**metrics), metrics["step_seconds"]
    bar.set_postfix_str(line, refresh=False)
    if bar.disable:
        left = tqdm.format_interval(seconds * (bar.total - metrics["step"]))
        note(f"step {metrics['step']}/{bar.total}  {line}  {seconds:.1f} s  {left} left")

def open_run(args, defaults):
    """Lock --output_dir -> the state of its newest checkpoint that loads, or None for a new run.

    Refuses a folder that another process holds, or that holds a run, unless --resume comes with that run's
    flags (a flag it did not know yet had its default) and rows. The logs are set back to the checkpoint's."""
    out, state = Path(args.output_dir), None
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        try:                                                    # this lock dies with its process
            fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--output_dir {out} is in use by another run: take another folder")
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda folder: -int(folder.name[11:]))
    if list(out.glob("*config.json")) and not checkpoints or checkpoints and not args.resume:
        fail(f"--output_dir {out} holds a run: remove it or, if there is a checkpoint, add --resume")
    for folder in checkpoints:
        try:
            state = dict(torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu", mmap=True))
            break
        except Exception:  # of many types: cut off, missing, something else
            note(f"{folder} is damaged: trying the checkpoint before it")
    if checkpoints and not state:
        fail(f"--resume: no checkpoint in {out} loads; remove the folder to start again")
    even = getattr(args, "lr_schedule", None) == "constant" and not args.temperature_end
    free = MAY_CHANGE | ({"steps"} if even else set())          # where nothing depends on their number
    changed = [name for name, value in vars(args).items() if state and name not in free
               and state["args"].get(name, getattr(defaults, name, value)) != value]
    if changed:
        fail(f"--resume: not the flags and rows of the run in {out}: --{', --'.join(changed)}")
    if RANK == 0:
        for name in LOGS:                                       # as they were at the checkpoint
            (out / name).write_bytes((folder / name).read_bytes() if state else b"")
        (out / "args.json").write_text(json.dumps(vars(args), indent=1))
    return state

def save_checkpoint(args, done, trained, optimizer, save_model):
    """OUTPUT_DIR/checkpoint-<step>: a model folder, the logs, and in trainer.pt all else that a run is.
    Renamed when complete, so that a kill at any moment leaves a whole one. Two stay. Collective."""
    state = {"weights": {name: x for name, (_, x) in trained.items()}, "optimizer": optimizer.state_dict()}
    state = tree_map_only(torch.Tensor, lambda x: whole(x).detach().cpu(), state)
    out, folder = Path(args.output_dir), Path(args.output_dir, f"checkpoint-{done['step']}")
    tmp = out / "tmp-checkpoint"
    if RANK == 0:
        shutil.rmtree(tmp, ignore_errors=True)                  # of a process that was killed
        try:
            save_model(tmp, state["weights"])
            torch.save(state | {"done": done, "args": vars(args)}, tmp / "trainer.pt")
            for name in LOGS:
                shutil.copy(out / name, tmp)
        except Exception as err:  # a full disk, in the words of each library
            shutil.rmtree(tmp, ignore_errors=True)
            fail(f"cannot write {folder} ({err}): make room, then --resume")
        shutil.rmtree(folder, ignore_errors=True)
        tmp.rename(folder)
        for old in sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[:-2]:
            shutil.rmtree(old)

def restore(trained, optimizer, state):
    """Set what is trained and its moments to a checkpoint's; under FSDP each rank takes its shards."""
    for i, (name, (_, master)) in enumerate(trained.items()):
        moments = state["optimizer"]["state"].get(i, {})
        for saved, key in [(state["weights"], name), *((moments, key) for key in moments)]:
            if hasattr(master, "full_tensor") and saved[key].shape == master.shape:
                x = saved[key].to(master.device)
                saved[key] = distribute_tensor(x, master.device_mesh, master.placements)
        master.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    copy_weights(trained.values())

def peak_memory():
    """GB at most so far: of the GPU, else of this process."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (torch.cuda.max_memory_allocated() or kilobytes * 1024) / 1e9

def append(path, rows):
    """Append JSON lines, on rank 0; a number that is not finite becomes null, as JSON has no NaN."""
    with open(path if RANK == 0 else os.devnull, "a") as f:
        for row in rows:
            f.write(json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None)) + "\n")

def main(argv=None):
    args = ARGS or parse_args(argv)
    try:
        train(args)
        if WORLD > 1:
            dist.destroy_process_group()
    except torch.OutOfMemoryError:
        fail("out of GPU memory: a smaller --micro_batch_size (and --sample_batch_size), then --optim "
             "paged_adamw8bit, --lora_rank 32 or --load_in_4bit; add --resume")
    except (rewards.DataError, ImportError, OSError) as err:    # a full disk, most of all
        fail(err)

if __name__ == "__main__":
    main()
