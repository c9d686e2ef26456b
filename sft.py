"""Supervised fine-tuning: the cold start that teaches a language model the form of an answer, before GRPO.

 1. A row becomes a chat prompt, by the model's chat template, and its worked completion (rewards.py) with the
    token that ends a turn. They are tokenised apart: a sampler starts from the ids of the prompt alone.
 2. Draw the next rows, in shuffled epochs, and split them into micro-batches of similar length.
 3. Cross-entropy of the completions' tokens, end token included, over one token count for the whole batch:
    neither micro-batches nor processes change the gradient.
 4. Clip the gradient and update the fp32 weights. A gradient that is not finite is skipped.
 5. Log metrics, evaluate on held-out rows, save a checkpoint.

    python sft.py --data countdown=data/countdown/sft.jsonl --lr 3e-3    # a new model of 0.5 M parameters
    python sft.py --model Qwen/Qwen2.5-3B-Instruct --data gsm8k --lora_rank 32 --merge
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen2.5-7B-Instruct --data gsm8k --fsdp
"""
import argparse
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import rewards

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
STOP = []                       # the signals that asked this process to stop
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
LOGS = ("metrics.jsonl",)
MAY_CHANGE = {"resume", "output_dir", "save_every", "micro_batch_size", "merge", "fsdp",
              "activation_checkpointing", "eval_data", "eval_every"}  # at --resume: they change no update
transformers.utils.logging.disable_progress_bar()


# ----------------------------------------------------------------------------------------- flags
def fail(message):
    """Print one line on stderr and exit with code 2: what a wrong flag, file or model gets."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)

def note(message):
    """Print a line on stderr, on rank 0, that does not break a progress bar."""
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)

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
    add("--model", default="tiny", help="checkpoint folder or hub id; tiny: a new model of 0.5 M parameters")
    add("--data", nargs="+", default=["countdown"], metavar="SOURCE", help="worked rows: TASK[=PATH][:N]")
    add("--style", choices=rewards.STYLES, default="reasoning", help="name of the reasoning tag")
    add("--max_length", type=at_least(2), default=1024, help="tokens of a row; longer rows are left out")
    add("--steps", type=POSITIVE, help="number of training steps; without it --epochs counts")
    add("--epochs", type=at_least(1e-3, float), default=1.0, help="passes over the data")
    add("--batch_size", type=POSITIVE, default=32, help="rows per step, over all processes")
    add("--eval_data", nargs="+", default=[], metavar="SOURCE", help="held-out rows, for loss and accuracy")
    add("--eval_every", type=NATURAL, default=0, help="steps between evaluations; 0: after the last one")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=FLOAT, default=1e-5, help="peak learning rate; LoRA takes 2e-4, tiny 3e-3")
    add("--warmup", type=NATURAL, default=0, help="steps of linear warm-up, before a cosine to 0")
    add("--max_grad_norm", type=FLOAT, default=1.0, help="clip the gradient to this norm; 0: never")
    add("--optim", choices=["adamw", "adamw8bit", "paged_adamw8bit", "muon"], default="adamw",
        help="8bit: moments of 2 bytes a parameter, not 8; paged: on the CPU if need be; muon: for matrices")
    add("--muon_lr", type=FLOAT, default=1e-2, help="peak learning rate of the layers' matrices under muon")
    add("--micro_batch_size", type=POSITIVE, default=8, help="rows per forward pass: speed and memory only")
    add = parser.add_argument_group("model and memory").add_argument
    add("--lora_rank", type=NATURAL, default=0, help="LoRA on all linear layers but the head; 0: whole model")
    add("--lora_alpha", type=FLOAT, default=32, help="the adapter is scaled by alpha / rank")
    add("--load_in_4bit", action="store_true", help="QLoRA: keep the frozen base in nf4")
    add("--merge", action="store_true", help="LoRA: also write merged/, the base with the adapter merged in")
    add("--activation_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--dtype", choices=["float32", "bfloat16"], help="of compute; None: bfloat16 on a GPU, else float32")
    add("--fsdp", action="store_true", help="shard a whole model over torchrun's processes (FSDP2)")
    add = parser.add_argument_group("files and logs").add_argument
    add("--output_dir", default="runs/sft", help="final model, checkpoints, logs")
    add("--save_every", type=NATURAL, default=500, help="steps between checkpoints; 0: only when stopped")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir, if any")
    add("--seed", type=NATURAL, default=0, help="of the data order and new weights")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------- rows
def end_token(tokenizer):
    """The id that ends an assistant's turn: the first special token after its text, be it eos or not."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the text ends here"}]
    tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(chat[1]["content"])[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in tokenizer.all_special_ids), tokenizer.eos_token_id)

def read_rows(sources, split, args, tokenizer):
    """Rows of all sources, each (inputs [T], targets [T]): ids of prompt and completion, and after each the
    next one, the end token at last; -100, which no loss counts, in the prompt. Longer rows are left out."""
    rows = [row for source in sources for row in rewards.load_rows(source, split)]
    texts = [rewards.worked_completion(row["task"], row, args.style) for row in rows]
    prompts = prompt_ids(tokenizer, [rewards.messages(row["task"], row, args.style) for row in rows])
    completions, end = tokenizer(texts, add_special_tokens=False)["input_ids"], end_token(tokenizer)
    encoded = [(torch.tensor(p + c), torch.tensor([-100] * (len(p) - 1) + c + [end]))
               for p, c in zip(prompts, completions) if len(p + c) < args.max_length]
    if not encoded:
        fail(f"--max_length {args.max_length}: every row is longer")
    if len(encoded) < len(rows):
        note(f"--max_length {args.max_length}: {len(rows) - len(encoded)} of {len(rows)} rows are left out")
    return encoded

def make_batches(rows, size):
    """This process's share of the rows, `size` at a time: inputs and targets, [n, T]. Sorted by length to
    save padding, the longest first, as too little memory then shows at once; spare rows make shares equal."""
    spare = rows[0][0], torch.full_like(rows[0][1], -100)
    rows = sorted(rows + [spare] * (-len(rows) % WORLD), key=lambda row: -len(row[0]))[RANK::WORLD]
    for at in range(0, len(rows), size):
        inputs, targets = zip(*rows[at:at + size])
        yield pad_sequence(inputs, batch_first=True), pad_sequence(targets, True, padding_value=-100)

def tiny_tokenizer():
    """A token for each number up to 99, each tag and word of Countdown; bytes for any other text."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    words = ["Numbers: [", ", ", "]\nTarget: ", " ok", " no"]
    words += [f"<{slash}{tag}>" for tag in (*rewards.STYLES, "answer") for slash in ("", "/")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens(words + [str(n) for n in range(10, 100)])
    template = ("{% for m in messages if m.role != 'system' %}"     # it cannot read instructions
                "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=special[0], eos_token=special[1], extra_special_tokens=special[2:],
        clean_up_tokenization_spaces=False, chat_template=template)

def tiny_model(tokenizer, seed):
    """0.5 M random parameters, but for the embeddings of the numbers: sines and cosines of their value."""
    torch.manual_seed(seed)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.08,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    angle = torch.arange(100)[:, None] * math.pi / 64 ** torch.linspace(0, 1, 64)   # periods of 2 to 128
    numbers = tokenizer.convert_tokens_to_ids([str(n) for n in range(100)])
    lm.get_input_embeddings().weight.data[numbers] = 0.11 * torch.cat([angle.sin(), angle.cos()], 1)
    return lm


# ----------------------------------------------------------------------------------------- models
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

def load_policy(args, device, dtype, lm=None):
    """The model to train (`lm` or --model), whole in fp32 (an update of 5e-7 vanishes in bf16) or an fp32
    adapter on a frozen base -> the model, the transformers model in it."""
    if args.load_in_4bit and not args.lora_rank:
        fail("--load_in_4bit needs --lora_rank: 4-bit weights do not train")
    if args.fsdp and (WORLD == 1 or args.lora_rank or args.optim != "adamw"):
        fail("--fsdp shards a whole model, with --optim adamw, over the processes of torchrun")
    if args.lora_rank:
        import peft
        lm = load_lm(args.model, device, dtype, args.load_in_4bit)
        torch.manual_seed(args.seed)
        model = peft.get_peft_model(lm, peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha,
                                                        task_type="CAUSAL_LM", target_modules="all-linear"))
    else:
        model = lm = lm or load_lm(args.model, "cpu" if args.fsdp else device, torch.float32)
    if args.activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if args.fsdp:  # fp32 shards; a layer is gathered in `dtype` to run
        for module in (*lm.base_model.layers, lm):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    return model, lm

class Muon(torch.optim.Optimizer):
    """Orthogonal steps (Jordan et al., 2024), in fp32: torch's bf16 is 10 times slower on CPUs without it."""
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                x, ratio = p.grad.lerp(momentum, 0.95), p.size(0) / p.size(1)
                x = x.T if ratio > 1 else x
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):                              # Newton-Schulz: singular values to about 1
                    gram = x @ x.T
                    x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
                p.add_(x.T if ratio > 1 else x, alpha=-group["lr"] * max(1, ratio) ** 0.5)

def make_optimizers(model, args):
    """The optimisers of all trained parameters, at peak learning rates."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {n: p for n, p in trained.items() if args.optim == "muon" and p.ndim == 2 and ".layers." in n}
    rest = [p for name, p in trained.items() if name not in muon]
    adamw = partial(torch.optim.AdamW, fused=True)
    if "8bit" in args.optim:
        import bitsandbytes
        adamw = bitsandbytes.optim.PagedAdamW8bit if "paged" in args.optim else bitsandbytes.optim.AdamW8bit
    optimizers = [adamw(rest, lr=args.lr, weight_decay=0.0)]
    return optimizers + [Muon(muon.values(), {"lr": args.muon_lr})] if muon else optimizers

def update(optimizers, factor, args, usable):
    """Sum gradients over processes, clip, update at `factor` times the peak learning rates -> norm of the
    gradient before clipping. Where that is not finite, or not `usable`, no weight changes."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        if p.grad is None:                                      # another process may have one
            p.grad = torch.zeros_like(p)
        if WORLD > 1 and not args.fsdp:                         # FSDP has summed already
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
    norm = float(norm.full_tensor() if args.fsdp else norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor
        if usable and math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return norm

def start_processes(dtype):
    """Join torchrun's other processes, if any -> this one's device, the compute dtype. From now on the first
    SIGINT or SIGTERM is kept in STOP; a second SIGINT ends the process."""
    def keep(number, frame):
        STOP.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nstopping: saving a checkpoint first; Ctrl-C again leaves at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, keep)
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if WORLD > 1:  # ranks may wait for hours while one samples or saves
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(hours=12)))
        # after a restart torchrun's store still holds the addresses of the start before
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=RANK,
                                world_size=WORLD, timeout=store.timeout)
    return device, getattr(torch, dtype or ("bfloat16" if cuda else "float32"))

def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank. Collective: call on every rank."""
    shares = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(shares, x)
    return shares

def open_run(args, defaults):
    """Lock --output_dir -> the state of its newest checkpoint that loads, or None for a new run.

    Refuses a folder that another process holds, or that holds a run, unless --resume comes with that run's
    flags (a flag it did not know yet had its default). The logs are set back to those of the checkpoint."""
    out, state = Path(args.output_dir), None
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        try:                                                    # this lock dies with its process
            fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--output_dir {out} is in use by another run: take another folder")
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda folder: -int(folder.name[11:]))
    finished = not checkpoints and list(out.glob("*config.json"))
    if finished or checkpoints and not args.resume:
        fail(f"--output_dir {out} holds a run: remove it or, if there is a checkpoint, add --resume")
    for folder in checkpoints:
        try:
            state = dict(torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu", mmap=True))
            break
        except Exception:  # of many types: cut off, missing, something else
            note(f"{folder} is damaged: trying the checkpoint before it")
    if checkpoints and not state:
        fail(f"--resume: no checkpoint in {out} loads; remove the folder to start again")
    changed = [name for name, value in vars(args).items() if state and name not in MAY_CHANGE
               and state["args"].get(name, getattr(defaults, name)) != value]
    if changed:
        fail(f"--resume: not the flags of the run in {out}: --{', --'.join(changed)}")
    if RANK == 0:
        for name in LOGS:                                       # as they were at the checkpoint
            (out / name).write_bytes((folder / name).read_bytes() if state else b"")
        (out / "args.json").write_text(json.dumps(vars(args), indent=1))
    return state

def save_checkpoint(out, state, save_model):
    """OUT/checkpoint-<step>: a model folder, the logs, and in trainer.pt all else that a run is. Renamed when
    complete, so that a kill at any moment leaves a whole one. The newest two stay. On rank 0."""
    folder, tmp = out / f"checkpoint-{state['step']}", out / "tmp-checkpoint"
    shutil.rmtree(tmp, ignore_errors=True)                      # of a process that was killed
    try:
        save_model(tmp)
        torch.save(state, tmp / "trainer.pt")
        for name in LOGS:
            shutil.copy(out / name, tmp)
    except Exception as err:  # a full disk, in the words of each library
        shutil.rmtree(tmp, ignore_errors=True)
        fail(f"cannot write {folder} ({err}): make room, then --resume")
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    for old in sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[:-2]:
        shutil.rmtree(old)

def append(path, rows):
    """Append JSON lines, on rank 0; a number that is not finite becomes null, as JSON has no NaN."""
    with open(path if RANK == 0 else os.devnull, "a") as f:
        for row in rows:
            f.write(json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None)) + "\n")


# ----------------------------------------------------------------------------------------- the loop
def train(args):
    device, dtype = start_processes(args.dtype)
    # 1. Rows of ids.
    tokenizer = tiny_tokenizer() if args.model == "tiny" else load(transformers.AutoTokenizer, args.model)
    data = read_rows(args.data, "train", args, tokenizer)
    held_out = read_rows(args.eval_data, "val", args, tokenizer) if args.eval_data else []
    steps = args.steps or math.ceil(args.epochs * len(data) / args.batch_size)
    epochs = range(math.ceil(steps * args.batch_size / len(data)))
    order = np.concatenate([np.random.default_rng([args.seed, i]).permutation(len(data)) for i in epochs])
    state = open_run(args, parse_args([]))
    lm = tiny_model(tokenizer, args.seed).to(device) if args.model == "tiny" else None
    policy, lm = load_policy(args, device, dtype, lm)
    # autocast's cache would hold a second copy of all weights
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    ends = lm.generation_config.eos_token_id                    # it stops at the end of a turn, too
    ends = {end_token(tokenizer), *(ends if isinstance(ends, list) else [ends])} - {None}
    lm.generation_config.eos_token_id = sorted(ends)
    optimizers = make_optimizers(policy, args)
    done = state["step"] if state else 0
    if state:
        set_state_dict(policy, optimizers, model_state_dict=state["weights"],
                       optim_state_dict=state["optimizers"], options=WHOLE)
    policy.train()

    def save_model(folder, weights):
        """A whole model in the dtype of compute, or an adapter."""
        if args.lora_rank:
            policy.save_pretrained(folder)
            lm.generation_config.save_pretrained(folder)
        else:
            kept = {name: weights[name].to(dtype) for name, _ in lm.named_parameters()}     # tied ones once
            lm.save_pretrained(folder, state_dict=kept)
            lm.config.dtype = dtype
            lm.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def save(done, final=False):
        """Write a checkpoint, or the final model. Collective."""
        weights, moments = get_state_dict(policy, optimizers, options=WHOLE)
        if RANK == 0 and final:
            save_model(args.output_dir, weights)
        elif RANK == 0:
            state = {"step": done, "args": vars(args), "weights": weights, "optimizers": moments}
            save_checkpoint(Path(args.output_dir), state, partial(save_model, weights=weights))

    def forward(inputs, targets):
        """-> [3] sums over the completions' tokens: cross-entropy, 1 where a token is the likeliest, 1."""
        inputs, targets = inputs.to(device), targets.to(device).flatten()
        with autocast:
            logits = policy(input_ids=inputs, use_cache=False).logits.flatten(0, 1)     # [n * T, V]
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return torch.stack([loss, (logits.argmax(-1) == targets).sum(), (targets >= 0).sum()])

    def evaluate(step):
        policy.eval()
        with torch.no_grad():
            sums = sum(forward(*batch).double() for batch in make_batches(held_out, args.micro_batch_size))
        loss, right, n = sum(gather(sums.cpu())).tolist()
        policy.train()
        found = {"step": step, "eval_loss": loss / n, "eval_token_accuracy": right / n, "eval_tokens": int(n)}
        append(Path(args.output_dir) / "metrics.jsonl", [found])
        note(f"step {step}/{steps}  held-out: loss {loss / n:.4f}  accuracy {right / n:.3f}")

    try:
        for step in range(done + 1, steps + 1):
            started = time.perf_counter()
            progress = (step - 1 - args.warmup) / max(1, steps - args.warmup)
            factor = step / args.warmup if progress < 0 else (1 + math.cos(math.pi * progress)) / 2
            torch.manual_seed(args.seed * 1_000_003 + step)     # for models with dropout
            # 2. Draw rows.
            rows = [data[i] for i in order[(step - 1) * args.batch_size:step * args.batch_size]]
            num_tokens = sum(int((targets >= 0).sum()) for _, targets in rows)
            sums = 0
            for batch in make_batches(rows, args.micro_batch_size):
                # 3. Loss and its gradient. FSDP takes the mean over the processes.
                part = forward(*batch)
                (part[0] * (WORLD if args.fsdp else 1) / num_tokens).backward()
                sums += part.detach().double()
            shares, signals = zip(*gather((sums.cpu(), STOP)))
            if any(signals):                                    # this step is left undone, on all ranks
                raise KeyboardInterrupt(max(signals)[0])
            loss, right, _ = sum(shares).tolist()
            # 4. Clip the gradient and update the weights.
            norm = update(optimizers, factor, args, usable=math.isfinite(loss))

            # 5. Log, evaluate, save.
            done, skipped = step, not math.isfinite(loss + norm)
            seconds, tokens = time.perf_counter() - started, sum(len(inputs) + 1 for inputs, _ in rows)
            metrics = {"step": step, "loss": loss / num_tokens, "token_accuracy": right / num_tokens,
                       "lr": args.lr * factor, "grad_norm": norm, "skipped": int(skipped), "tokens": tokens,
                       "tokens_per_s": tokens / seconds, "step_seconds": seconds,
                       "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
            append(Path(args.output_dir) / "metrics.jsonl", [metrics])
            left = tqdm.format_interval(seconds * (steps - step))
            note("step {step}/{}  loss {loss:.4f}  accuracy {token_accuracy:.3f}  grad {grad_norm:.2f}  "
                 "{tokens_per_s:.0f} tokens/s  {} left".format(steps, left, **metrics))
            if skipped:
                note(f"warning: the gradient of step {step} is not finite and was not used; lower --lr")
            if held_out and (step == steps or args.eval_every and step % args.eval_every == 0):
                evaluate(step)
            if args.save_every and step % args.save_every == 0:
                save(done)
    except KeyboardInterrupt as stopped:
        if done:
            save(done)
        gather(0)                                               # torchrun ends all processes when one leaves
        note(f"stopped after step {done} of {steps}: add --resume to the command to continue")
        raise SystemExit(128 + stopped.args[0]) from None
    save(done, final=True)
    if RANK == 0 and args.merge:                                # into what the adapter was trained on
        import peft
        base = load_lm(args.model, device, dtype, args.load_in_4bit)
        base = base.dequantize() if args.load_in_4bit else base
        merged = peft.PeftModel.from_pretrained(base, args.output_dir).merge_and_unload()
        merged.generation_config = lm.generation_config
        merged.save_pretrained(Path(args.output_dir) / "merged")
        tokenizer.save_pretrained(Path(args.output_dir) / "merged")

def main(argv=None):
    args = parse_args(argv)
    try:
        train(args)
        if WORLD > 1:
            dist.destroy_process_group()
    except torch.OutOfMemoryError:
        fail("out of GPU memory: lower --micro_batch_size, or add --activation_checkpointing, "
             "--optim paged_adamw8bit, --lora_rank 32 or --load_in_4bit, and --resume")
    except (rewards.DataError, ImportError, OSError, SafetensorError) as err:   # a full disk, most of all
        fail(err)

if __name__ == "__main__":
    main()
