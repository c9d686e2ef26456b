"""Supervised fine-tuning: the cold start that teaches a language model the form of an answer, before GRPO.

The steps, with the numbers that the code repeats:

 1. A row becomes a chat prompt, by the model's chat template, and its worked completion (rewards.py) with the
    token that ends a turn. They are tokenised apart: a sampler starts from the ids of the prompt alone.
 2. Draw the next rows, in shuffled epochs, and split them into micro-batches of similar length.
 3. Log-probabilities of the completions' tokens, end token included, a chunk of them at a time.
 4. Loss: their cross-entropy, over one token count for the whole batch: neither micro-batches nor processes
    change the gradient.
 5. Clip the gradient and update the fp32 weights. A gradient that is not finite is skipped.
 6. Log metrics, evaluate on held-out rows, save a checkpoint.

    python sft.py --data countdown=data/countdown/sft.jsonl --steps 1000    # a new model of 0.5 M parameters
    python sft.py --model Qwen/Qwen2.5-3B-Instruct --data gsm8k --lora_rank 32 --merge
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen2.5-7B-Instruct --data gsm8k --fsdp
"""
import argparse
import fcntl
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import rewards

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
STOP = []                       # the signals that asked this process to stop
LOGS = ("metrics.jsonl",)
HEAD_LOGITS = 2 ** 26           # logits that exist at a time: 256 MB in fp32
MAY_CHANGE = {"resume", "output_dir", "save_every", "log_to", "micro_batch_size", "merge", "fsdp",
              "activation_checkpointing", "eval_data", "eval_split", "eval_every"}  # at --resume
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


def add_training_flags(parser, **defaults):
    """The flags that sft.py and grpo.py have in common, but for some defaults."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=FLOAT, help="peak learning rate; LoRA takes ten times that of a whole model")
    add("--warmup", type=NATURAL, help="steps of linear warm-up")
    add("--lr_schedule", choices=["constant", "linear", "cosine"], help="after the warm-up; two end at 0")
    add("--max_grad_norm", type=FLOAT, default=1.0, help="clip the gradient to this norm; 0: never")
    add("--optim", choices=["adamw", "adamw8bit", "paged_adamw8bit", "muon"], default="adamw",
        help="8bit: moments of 2 bytes a parameter, not 8; paged: on the CPU if need be; muon: for matrices")
    add("--muon_lr", type=FLOAT, help="peak learning rate of the layers' matrices under --optim muon")
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
    add("--output_dir", default=f"runs/{Path(__file__).stem}", help="final model, checkpoints, logs")
    add("--save_every", type=NATURAL, help="steps between checkpoints; 0: only when stopped")
    add("--log_to", choices=["tensorboard", "wandb"], help="besides metrics.jsonl")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir, if any")
    add("--seed", type=NATURAL, default=0, help="of the data order, the sampling and new weights")
    parser.set_defaults(**defaults)


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
    add("--eval_split", default="val", help="of --eval_data: train, val or test")
    add("--eval_every", type=NATURAL, default=0, help="steps between evaluations; 0: after the last one")
    add_training_flags(parser, warmup=0, lr_schedule="cosine", muon_lr=1e-2, save_every=500)
    args = parser.parse_args(argv)
    if args.model == "tiny" and args.lora_rank:
        fail("--lora_rank adapts a trained model, which --model tiny is not")
    if args.lr is None:
        args.lr = 3e-3 if args.model == "tiny" else 2e-4 if args.lora_rank else 1e-5
    return args


# ----------------------------------------------------------------------------------------- rows
def end_token(tokenizer):
    """The id that ends an assistant's turn: the first special token after its text, be it eos or not."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the text ends here"}]
    tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(chat[1]["content"])[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in tokenizer.all_special_ids), tokenizer.eos_token_id)


def read_rows(sources, split, args, tokenizer):
    """Rows of all sources as (ids [T] of prompt, completion and end token; how many are the prompt's).

    Rows of more than --max_length ids are left out."""
    rows = [row for source in sources for row in rewards.load_rows(source, split)]
    texts = [rewards.worked_completion(row["task"], row, args.style) for row in rows]
    prompts = prompt_ids(tokenizer, [rewards.messages(row["task"], row, args.style) for row in rows])
    completions, end = tokenizer(texts, add_special_tokens=False)["input_ids"], end_token(tokenizer)
    encoded = [(torch.tensor(p + c + [end]), len(p)) for p, c in zip(prompts, completions)]
    kept = [row for row in encoded if len(row[0]) <= args.max_length]
    if len(kept) < len(rows):
        note(f"--max_length {args.max_length}: {len(rows) - len(kept)} of {len(rows)} rows are left out")
    if not kept:
        fail(f"--max_length {args.max_length}: every row is longer")
    return kept


def draw_order(n, seed, start, count):
    """Indices start, start + 1, ... of an endless order in which each of n rows comes once per epoch."""
    epochs = range(start // n, (start + count - 1) // n + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs])
    return order[start % n:][:count].tolist()


def make_batches(rows, size):
    """This process's share of the rows, `size` at a time: ids [n, L], prompt_lengths [n], mask [n, T].

    Sorted by length, so that little is padding, the longest first, so that too little memory shows at once.
    Masks go by lengths, as pad may be the end token. Spare rows with no completion make all shares equal."""
    ids = rows[0][0]
    rows = sorted(rows + [(ids, len(ids))] * (-len(rows) % WORLD), key=lambda row: -len(row[0]))[RANK::WORLD]
    for at in range(0, len(rows), size):
        part = rows[at:at + size]
        masks = pad_sequence([torch.ones(len(ids) - start) for ids, start in part], batch_first=True)
        ids = pad_sequence([ids for ids, _ in part], batch_first=True)
        yield ids, torch.tensor([start for _, start in part]), masks


# ----------------------------------------------------------------------------------------- a new model
def tiny_tokenizer():
    """A token for each number up to 99, each tag and word of Countdown; bytes for any other text."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    words = ["Numbers: [", ", ", "]\nTarget: ", " ok", " no"]
    words += [f"<{slash}{tag}>" for tag in (*rewards.STYLES, "answer") for slash in ("", "/")]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = [as_bytes.pre_tokenize_str(word)[0][0] for word in words] + [str(n) for n in range(10, 100)]
    vocab = {token: i for i, token in enumerate(special + sorted(as_bytes.alphabet()) + whole)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))      # a known piece is one token
    pieces = Regex("|".join(map(re.escape, words)) + "|[0-9]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), as_bytes])
    bpe.decoder = decoders.ByteLevel()
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
def load_tokenizer(name):
    """-> tokenizer, the model's context in tokens."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        config = transformers.AutoConfig.from_pretrained(name).get_text_config()
    except Exception as err:  # of a dozen types, for what is one thing to the user
        fail(f"--model {name}: not a model's folder, nor a hub id that can be reached ({str(err)[:200]})")
    if not tokenizer.chat_template:
        fail(f"--model {name}: its tokenizer has no chat template; add chat_template.jinja to its folder")
    return tokenizer, getattr(config, "max_position_embeddings", math.inf)


def prompt_ids(tokenizer, chats):
    """The ids of each chat, a list of turns, up to where the assistant's next turn begins."""
    try:
        render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        texts = [render(chat) for chat in chats]
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
    try:
        lm, found = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as err:  # a damaged file, a missing package, an unknown model, no memory
        fail(f"--model {name}: cannot be loaded ({str(err)[:200]})")
    if found["missing_keys"]:  # transformers puts random numbers in their place
        fail(f"--model {name}: its files lack weights ({str(found['missing_keys'])[:200]})")
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # it repacks 4-bit weights: no training
            module.support_avx512bf16_for_cpu = False
    sampling = lm.generation_config  # transformers refuses to save one with settings that it would not use
    sampling.do_sample = bool(sampling.do_sample or sampling.temperature or sampling.top_p)
    return lm.to(device).eval()


def load_policy(args, device, dtype):
    """The model to train, whole in fp32 (an update of 5e-7 vanishes in bf16) or an fp32 adapter on a frozen
    base -> the model, the transformers model in it, completion_logps of it at the right precision."""
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
        model = lm = load_lm(args.model, "cpu" if args.fsdp else device, torch.float32)
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(lm.config.get_text_config(), name, None) not in (None, 1):
            fail(f"--model {args.model}: it changes its logits ({name}), which a head in chunks leaves out")
    if args.activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    lm.logps = partial(completion_logps, lm)
    if args.fsdp:  # fp32 shards; a layer is gathered in `dtype` to run
        for module in (*lm.base_model.layers, lm):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
        register_fsdp_forward_method(lm, "logps")
    # autocast's cache would hold a second copy of all weights
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    return model, lm, autocast(lm.logps)


def completion_logps(lm, ids, prompt_lengths, mask, temperature=1.0, chunk=HEAD_LOGITS):
    """Log-probabilities of the completions' ids at `temperature`; without gradient, entropies, and 1 where an
    id is the likeliest: [n, T] each, 0 where the mask is.

    ids [n, L]: prompt, completion, padding (needs no mask, as attention is causal);
    prompt_lengths [n]; mask [n, T]. At most `chunk` logits exist at once, of completions alone; the
    backward pass computes them again."""
    def head(h, targets):
        logps = (lm.get_output_embeddings()(h).float() / temperature).log_softmax(-1)   # [m, V]; bf16: noise
        frozen = logps.detach()                 # entropies of `logps` itself would keep their gradient
        return (logps.gather(1, targets[:, None]).squeeze(1), -(frozen.exp() * frozen).sum(-1),
                (frozen.argmax(-1) == targets).float())

    states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state    # [n, L, H]
    row, t = mask.nonzero(as_tuple=True)                                        # [tokens] each
    place = prompt_lengths[row] + t
    hidden, targets = states[row, place - 1], ids[row, place]                   # [tokens, H], [tokens]
    size = max(1, chunk // lm.config.get_text_config().vocab_size)
    if len(targets) > size and torch.is_grad_enabled():
        head = partial(torch.utils.checkpoint.checkpoint, head, use_reentrant=False)
    pieces = [head(h, t) for h, t in zip(hidden.split(size), targets.split(size))]
    blank = torch.zeros_like(mask, dtype=torch.float32)
    return tuple(blank.index_put((row, t), torch.cat(part)) for part in zip(*pieces))


@torch.no_grad()
def refresh(plain, lm):
    """Copy what the policy `lm` amounts to into `plain` (which it may be): 4-bit weights dequantised, shards
    gathered (collective), an adapter's delta added in fp32 to its base, which stays as it is."""
    target = dict(plain.named_parameters())
    for name, weight in lm.named_parameters():
        if ".lora_" in name:
            continue
        if getattr(weight, "quant_state", None) is not None:
            import bitsandbytes
            weight = bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
        layer, adapted, leaf = name.partition(".base_layer.")
        if adapted and leaf == "weight":
            weight = weight.float() + lm.get_submodule(layer).get_delta_weight("default")
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        target[name.replace(".base_layer.", ".")].copy_(weight)


def learning_rate(step, steps, warmup, schedule):
    """The factor on the peak learning rate at step 1, 2, ...; a falling one is 0 after the last step."""
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    falls = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return step / warmup if step <= warmup else falls[schedule]


def make_optimizers(model, args):
    """The optimisers of all trained parameters, at peak learning rates."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if args.optim == "muon" and p.ndim == 2 and ".layers." in name and p.requires_grad:
            matrices.append(p)
        elif p.requires_grad:
            rest.append(p)
    if "8bit" in args.optim:
        import bitsandbytes
        kind = "PagedAdamW8bit" if "paged" in args.optim else "AdamW8bit"
        return [getattr(bitsandbytes.optim, kind)(rest, lr=args.lr, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(rest, lr=args.lr, weight_decay=0.0, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.0))
    return optimizers


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


# ----------------------------------------------------------------------------------------- processes, signals
def start_processes(dtype):
    """Join torchrun's other processes, if there are any -> this one's device, the compute dtype."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if WORLD > 1:  # ranks may wait for hours while one samples or saves
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(hours=12)))
        # after a restart torchrun's store still holds the addresses of the start before
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=store.timeout)
    return device, getattr(torch, dtype or ("bfloat16" if cuda else "float32"))


def peak_memory_gb():
    """Of the GPU, or else of this process."""
    return torch.cuda.max_memory_allocated() / 1e9 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank. Collective: call on every rank."""
    shares = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(shares, x)
    return shares


def catch_signals():
    """From now on the first SIGINT or SIGTERM is kept in STOP; a second SIGINT ends the process."""
    def keep(number, frame):
        STOP.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nstopping: saving a checkpoint first; Ctrl-C again leaves at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, keep)


# ----------------------------------------------------------------------------------------- files
def open_run(args, defaults):
    """Lock --output_dir -> the state of the newest checkpoint in it that loads, or None for a new run.

    Refuses a folder that another process holds, or that holds a run, unless --resume comes with that run's
    flags (a flag it did not know yet had its default). What was written after the checkpoint is removed."""
    out, state, unfinished = Path(args.output_dir), None, [Path(args.output_dir, "tmp-checkpoint")]
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        try:                                                    # this lock dies with its process
            fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--output_dir {out} is in use by another run: take another folder")
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    finished = not checkpoints and list(out.glob("*config.json"))
    if finished or checkpoints and not args.resume:
        fail(f"--output_dir {out} holds a run: remove it or, if there is a checkpoint, add --resume")
    while checkpoints and not state:
        folder = checkpoints.pop()
        try:
            state = dict(torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu", mmap=True))
        except Exception:  # of many types: cut off, missing, something else
            note(f"{folder} is damaged: trying the checkpoint before it")
            unfinished.append(folder)
            if not checkpoints:
                fail(f"--resume: no checkpoint in {out} loads; remove the folder to start again")
    if state:
        changed = [name for name, value in vars(args).items()
                   if name not in MAY_CHANGE and state["args"].get(name, getattr(defaults, name)) != value]
        if changed:
            fail(f"--resume: not the flags of the run in {out}: --{', --'.join(changed)}")

    gather(0)                                                   # every rank has looked
    if RANK == 0:
        for folder in unfinished:
            shutil.rmtree(folder, ignore_errors=True)
        for name in LOGS:
            with open(out / name, "ab+") as f:
                f.seek(0)
                kept = f.read(state[name] if state else 0)
                f.truncate(kept.rfind(b"\n") + 1)              # without a torn line
        (out / "args.json").write_text(json.dumps(vars(args), indent=1))
    return state


def save_checkpoint(out, state, save_model):
    """OUT/checkpoint-<step>: a model folder, and in trainer.pt all else that a run is. Renamed when complete,
    so that a kill at any moment leaves a whole one. The newest two stay. On rank 0."""
    out = Path(out)
    folder, tmp = out / f"checkpoint-{state['step']}", out / "tmp-checkpoint"
    try:
        save_model(tmp)
        torch.save(state | {name: (out / name).stat().st_size for name in LOGS}, tmp / "trainer.pt")
    except Exception as err:  # a full disk, in the words of each library
        shutil.rmtree(tmp, ignore_errors=True)
        fail(f"cannot write {folder} ({err}): make room, then --resume")
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    for old in sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[:-2]:
        shutil.rmtree(old)


def append(path, rows):
    """Append JSON lines; a number that is not finite becomes null, as JSON has no NaN."""
    with open(path, "a") as f:
        for row in rows:
            f.write(json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None)) + "\n")


def open_board(args):
    """The TensorBoard writer that --log_to asks for, or None; W&B copies what is written there."""
    if not args.log_to or RANK > 0:
        return None
    from torch.utils.tensorboard import SummaryWriter
    if args.log_to == "wandb":
        import wandb
        wandb.init(config=vars(args), sync_tensorboard=True)
    return SummaryWriter(args.output_dir)


def log(args, board, metrics):
    """Write a line of metrics.jsonl, and points on the board's curves. On rank 0."""
    if RANK == 0:
        append(Path(args.output_dir) / "metrics.jsonl", [metrics])
    if board:
        for name, value in metrics.items():
            board.add_scalar(name, value, metrics["step"])


# ----------------------------------------------------------------------------------------- the loop
def train(args):
    device, dtype = start_processes(args.dtype)
    # 1. Rows of ids.
    tokenizer, context = (tiny_tokenizer(), 2048) if args.model == "tiny" else load_tokenizer(args.model)
    if args.max_length > context:
        fail(f"--max_length {args.max_length}: the context of {args.model} is {context} tokens")
    data = read_rows(args.data, "train", args, tokenizer)
    held_out = read_rows(args.eval_data, args.eval_split, args, tokenizer) if args.eval_data else []
    steps = args.steps or math.ceil(args.epochs * len(data) / args.batch_size)
    state, board = open_run(args, parse_args([])), open_board(args)

    with tempfile.TemporaryDirectory() as folder:
        source = argparse.Namespace(**vars(args))
        if args.model == "tiny":                                # a checkpoint like any other
            source.model = folder
            tiny_model(tokenizer, args.seed).save_pretrained(folder)
        policy, lm, policy_logps = load_policy(source, device, dtype)
        plain = lm  # what is saved: the policy, or a copy in `dtype`
        if args.fsdp or args.merge or dtype != torch.float32 and not args.lora_rank:
            plain = load_lm(source.model, "meta" if RANK else "cpu", dtype)
    for config in (lm.generation_config, plain.generation_config):      # it stops at the end of a turn
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        config.eos_token_id = sorted({*ends, end_token(tokenizer)} - {None})
    optimizers = make_optimizers(policy, args)
    done = {"step": 0, "evaluated": 0, "saved": 0}              # the last step; the last steps that ...
    if state:
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_state_dict(policy, optimizers, model_state_dict=state["weights"],
                       optim_state_dict=state["optimizers"], options=options)
        done = {name: state[name] for name in done}
    state = None                                                # frees it

    def save_model(folder, model=policy if args.lora_rank else plain):
        model.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)         # of an adapter peft saves none
        tokenizer.save_pretrained(folder)

    def save():
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        trained, moments = get_state_dict(policy, optimizers, options=whole)            # collective
        if not args.lora_rank:
            refresh(plain, lm)                                                          # collective
        done["saved"] = done["step"]
        if RANK == 0:
            state = done | {"args": vars(args), "weights": trained, "optimizers": moments}
            save_checkpoint(args.output_dir, state, save_model)

    def forward(batch):
        """-> [3] sums over the completions' tokens: cross-entropy, 1 where a token is the likeliest, 1."""
        ids, prompt_lengths, mask = (x.to(device) for x in batch)
        logp, _, hit = policy_logps(ids, prompt_lengths, mask)
        return torch.stack([-logp.sum(), hit.sum(), mask.sum()]).double()

    def evaluate():
        due = done["step"] == steps or args.eval_every and done["step"] % args.eval_every == 0
        if held_out and due and done["evaluated"] < done["step"]:
            policy.eval()
            with torch.no_grad():
                sums = sum(forward(batch) for batch in make_batches(held_out, args.micro_batch_size))
            loss, right, n = sum(gather(sums.cpu())).tolist()
            log(args, board, {"step": done["step"], "eval_loss": loss / n, "eval_token_accuracy": right / n,
                              "eval_tokens": int(n)})
            note(f"step {done['step']}/{steps}  held-out: loss {loss / n:.4f}  accuracy {right / n:.3f}")
            done["evaluated"] = done["step"]

    catch_signals()
    began, first_step = time.perf_counter(), done["step"] + 1
    try:
        evaluate()
        for step in range(first_step, steps + 1):
            started = time.perf_counter()
            factor = learning_rate(step, steps, args.warmup, args.lr_schedule)
            torch.manual_seed(args.seed * 1_000_003 + step)     # for models with dropout
            policy.train()
            # 2. Draw rows.
            indices = draw_order(len(data), args.seed, (step - 1) * args.batch_size, args.batch_size)
            rows = [data[i] for i in indices]
            num_tokens = sum(len(ids) - start for ids, start in rows)
            sums = 0
            for batch in make_batches(rows, args.micro_batch_size):
                # 3. Log-probabilities.
                part = forward(batch)
                # 4. Loss and its gradient. FSDP takes the mean over the processes.
                (part[0] * (WORLD if args.fsdp else 1) / num_tokens).backward()
                sums += part.detach()
            shares, signals = zip(*gather((sums.cpu(), STOP)))
            if any(signals):                                    # this step is left undone, on all ranks
                raise KeyboardInterrupt(max(signals)[0])
            loss, right, _ = sum(shares).tolist()
            # 5. Clip the gradient and update the weights.
            norm = update(optimizers, factor, args, usable=math.isfinite(loss))

            # 6. Log, evaluate, save.
            skipped = not math.isfinite(loss + norm)
            done["step"] = step
            now, tokens = time.perf_counter(), sum(len(ids) for ids, _ in rows)
            metrics = {"step": step, "loss": loss / num_tokens, "token_accuracy": right / num_tokens,
                       "lr": args.lr * factor, "grad_norm": norm, "skipped": int(skipped), "tokens": tokens,
                       "tokens_per_s": tokens / (now - started), "step_seconds": now - started,
                       "peak_memory_gb": peak_memory_gb()}
            log(args, board, metrics)
            left = tqdm.format_interval((now - began) / (step - first_step + 1) * (steps - step))
            note("step {step}/{}  loss {loss:.4f}  accuracy {token_accuracy:.3f}  grad {grad_norm:.2f}  "
                 "{tokens_per_s:.0f} tokens/s  {} left".format(steps, left, **metrics))
            if skipped:
                note(f"warning: the gradient of step {step} was not finite and not used: lower --lr")
            evaluate()
            if args.save_every and step % args.save_every == 0:
                save()
    except KeyboardInterrupt as stopped:
        if done["saved"] < done["step"]:
            save()
        gather(0)                                               # torchrun ends all processes when one leaves
        note(f"stopped after step {done['step']} of {steps}: repeat the command with --resume to continue")
        raise SystemExit(128 + stopped.args[0]) from None
    if plain is not lm:
        refresh(plain, lm)
    if RANK == 0:
        save_model(args.output_dir)
        if args.merge:
            save_model(Path(args.output_dir) / "merged", plain)


def main(argv=None):
    args = parse_args(argv)
    try:
        train(args)
        if WORLD > 1:
            dist.destroy_process_group()
    except rewards.DataError as err:
        fail(err)
    except ImportError as err:
        fail(f"these flags need a package that is not installed: pip install {err.name}")
    except torch.OutOfMemoryError:
        fail("out of GPU memory: lower --micro_batch_size, or take --activation_checkpointing, "
             "--lora_rank 32, --optim paged_adamw8bit or --load_in_4bit; then --resume")
    except (OSError, SafetensorError) as err:                   # a full disk, most of all
        fail(f"--output_dir {args.output_dir}: {err}")
    except KeyboardInterrupt:
        note("stopped before the first step")
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main()
