"""What a run is to the machine: its flags, its processes, its folder on disk, and the ways in which it can be cut short.

sft.py, grpo.py and eval.py share this file, so that a flag, a checkpoint or a signal means the same in each.

A checkpoint is a folder that is written under a temporary name, sealed (sizes and hashes in manifest.json, everything on the
disk) and only then renamed; older ones go after that. So a run that is killed at any moment finds a whole one, and --resume
notices any that is not. The files of a run, in --output_dir: the final model itself, checkpoint-<step>/, merged/ with --merge,
args.json, metrics.jsonl (an object a step; evaluations have keys that begin with eval_).
"""
import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

import rewards

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))              # torchrun's
BAD_STEPS = 5                                                   # updates in a row that are not finite, then a run stops
LAUNCHER = f"{socket.gethostname()} {os.getppid()}"             # the torchrun that may start this process again, and below
with contextlib.suppress(OSError):                              # when that began: process ids come again
    LAUNCHER += " " + Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
script = "runs.py"                                              # the one that runs: Flags says it


# ------------------------------------------------------------------------------------------- messages
def fail(message):
    """One line on stderr and exit code 2: what a wrong flag, file or model gets."""
    print(f"{script}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def note(message):
    if RANK == 0:
        tqdm.write(message, file=sys.stderr)


# ------------------------------------------------------------------------------------------- flags
class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):                         # without "(default: None)"
        return action.help if action.default in (None, [], "") or action.nargs == 0 else super()._get_help_string(action)


class Flags(argparse.ArgumentParser):
    """A parser that also reads @files: flags as in a shell, with # comments. `group` gives a function that adds flags to one."""

    def __init__(self, name, doc):
        global script
        script = name
        what, *_, examples = doc.split("\n\n")
        super().__init__(name, description=what, epilog=f"@FILE reads flags from a file. For example:\n\n{examples}",
                         fromfile_prefix_chars="@", formatter_class=Help)

    def convert_arg_line_to_args(self, line):
        try:
            return shlex.split(line, comments=True)
        except ValueError as err:
            fail(f"{line}: {err}")

    def error(self, message):
        fail(message)

    def group(self, title):
        return self.add_argument_group(title).add_argument


def add_training_flags(p, **defaults):
    """Those that sft.py and grpo.py have alike, but for some defaults."""
    add = p.group("optimisation")
    add("--lr", type=float, help="peak learning rate; grpo.py: 1e-6 suits whole models, ten times that LoRA; sft.py takes 1e-5, "
        "for LoRA 2e-4, for `tiny` 3e-3")
    add("--warmup", type=int, help="steps of linear warm-up")
    add("--lr_schedule", choices=["constant", "linear", "cosine"], help="after the warm-up; linear and cosine end at 0")
    add("--max_grad_norm", type=float, default=1.0, help="clips the gradient to this norm; 0: never")
    add("--optim", choices=["adamw", "adamw8bit", "muon"], default="adamw",
        help="8-bit states take 2 bytes a parameter, not 8; muon: for the layers' matrices, the rest by adamw")
    add("--muon_lr", type=float, help="peak learning rate of Muon's matrices")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="of AdamW")
    add("--weight_decay", type=float, default=0.0, help="a step, times the learning rate")
    add("--micro_batch_size", type=int, default=8, help="rows a pass: speed and memory only")
    add = p.group("model and memory")
    add("--lora_rank", type=int, default=0, help="LoRA on all linear layers but the head; 0: train the whole model")
    add("--lora_alpha", type=float, default=32, help="the adapter is scaled by alpha / rank")
    add("--load_in_4bit", action="store_true", help="QLoRA: the frozen base in nf4")
    add("--merge", action="store_true", help="with --lora_rank: also write merged/, the base with the adapter in it")
    add("--activation_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of compute; auto: bfloat16 on a GPU, else float32")
    add("--fsdp", action="store_true", help="shard the training of a whole model over torchrun's processes")
    add("--chat_template", metavar="FILE", help="Jinja, for a tokenizer that has none")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add = p.group("files and logs")
    add("--output_dir", default=f"runs/{Path(script).stem}", help="final model, checkpoint-<step>/, metrics.jsonl, args.json")
    add("--save_every", type=int, help="steps between checkpoints; 0: only when stopped")
    add("--keep", type=int, default=2, help="checkpoints that stay")
    add("--log_to", choices=["tensorboard", "wandb"], help="besides metrics.jsonl")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint in --output_dir")
    add("--overwrite", action="store_true", help="drop the run that is in --output_dir")
    add("--seed", type=int, default=0, help="of the data order, of what is drawn and of new weights")
    p.set_defaults(**defaults)


def check_flags(a, least, wrong=()):
    """Ends with one line at the first flag that is below its least value or not finite, else at the first (is wrong, message)."""
    for name, low in least.items():
        if getattr(a, name) is not None and not low <= getattr(a, name) < math.inf:
            fail(f"--{name} {getattr(a, name)}: must be at least {low}")
    for is_wrong, message in wrong:
        if is_wrong:
            fail(message)


def check_training_flags(a):
    model, out = Path(a.model).resolve(), Path(a.output_dir).resolve()
    check_flags(a, dict(lora_rank=0, lora_alpha=1e-3, save_every=0, keep=1, seed=0, lr=0, muon_lr=0, warmup=0, max_grad_norm=0,
                        weight_decay=0, micro_batch_size=1), (
        (not all(0 <= b < 1 for b in a.betas), f"--betas {a.betas}: must be at least 0 and below 1"),
        (a.seed >= 2 ** 32, f"--seed {a.seed}: must be below 2 ** 32"),
        (a.chat_template and not Path(a.chat_template).is_file(), f"--chat_template {a.chat_template}: no such file"),
        (a.load_in_4bit and not a.lora_rank, "--load_in_4bit: 4-bit weights do not train; add --lora_rank 32"),
        (a.merge and not a.lora_rank, "--merge: there is an adapter to merge only with --lora_rank"),
        (a.lora_rank and a.optim == "muon", "--optim muon: trains whole models; with --lora_rank take adamw"),
        (a.fsdp and WORLD == 1, f"--fsdp: start with torchrun --nproc_per_node=N {script} ..."),
        (a.fsdp and a.lora_rank, "--fsdp: shards whole models; LoRA runs without it under torchrun"),
        (a.fsdp and a.optim != "adamw", f"--fsdp: goes with --optim adamw, not {a.optim}"),
        (out in (model, *model.parents), f"--output_dir {a.output_dir}: --model is or lies in it; take another folder"),
        (a.resume and a.overwrite, "--resume goes on with a run and --overwrite drops it: take one")))
    for name, flag in (("peft", a.lora_rank and "--lora_rank"), ("bitsandbytes", a.load_in_4bit and "--load_in_4bit"),
                       ("bitsandbytes", a.optim == "adamw8bit" and "--optim adamw8bit"),
                       ("wandb", a.log_to == "wandb" and "--log_to wandb"),
                       ("tensorboard", a.log_to == "tensorboard" and "--log_to tensorboard")):
        try:
            flag and importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
        except ImportError:
            fail(f"{flag} needs a package that is not there: pip install {name}")


# ------------------------------------------------------------------------------------------- processes
def start_processes(dtype="float32"):
    """Joins torchrun's other processes, if there are any -> this one's device, and the dtype that `auto` means there."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        if local >= torch.cuda.device_count():
            fail(f"torchrun started more processes than there are GPUs: --nproc_per_node {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    if WORLD > 1:                                               # hours, as all may wait for one that samples, saves or scores
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(hours=12)))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)      # torchrun keeps one for all starts
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=store.timeout)
    dtype = {"auto": "bfloat16" if cuda else "float32"}.get(dtype, dtype)
    return torch.device("cuda", local) if cuda else torch.device("cpu"), getattr(torch, dtype)


def gather(x):
    """[x of process 0, x of process 1, ...], the same list in all of them."""
    shares = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(shares, x)
    return shares


def largest(x):
    """The largest of an int over all processes. On the CPU: nothing waits for a GPU."""
    if WORLD == 1:
        return x
    box = torch.tensor(x)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


# ------------------------------------------------------------------------------------------- stopping
class Stop:
    """`with Stop() as stop`: the first SIGINT or SIGTERM is kept in stop.signal, the next SIGINT ends the process at once."""
    signal = 0

    def __enter__(self):
        self.signal, self.handlers = 0, {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def on_signal(self, number, frame):
        self.signal = self.signal or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)            # SIGTERM may come twice, from a cluster and from torchrun
        RANK or os.write(2, b"\nstopping: saving a checkpoint first; Ctrl-C leaves at once\n")     # not print: it may be at work

    def check(self, everywhere=False):
        """Raises KeyboardInterrupt(number) if a signal came to this process, or to any (all must ask)."""
        if number := largest(self.signal) if everywhere else self.signal:
            raise KeyboardInterrupt(number)

    def __exit__(self, *_):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)


def passes(batches, run_pass, stop=None, fsdp=False):
    """run_pass(batch) for each batch. The processes agree after every pass, so that all of them leave together: with
    KeyboardInterrupt where one is to stop, with OutOfMemoryError where one has run out of GPU memory (under fsdp the others are
    by then waiting for it inside of the pass: see one_line)."""
    for batch in batches:
        full = False
        try:
            run_pass(batch)
        except torch.OutOfMemoryError:
            if fsdp:
                raise
            full = True                                         # and out of the except, which holds on to the memory
        verdict = largest(stop.signal + 1 if stop and stop.signal else int(full))
        if verdict > 1:
            raise KeyboardInterrupt(verdict - 1)
        if verdict:
            raise torch.OutOfMemoryError("out of GPU memory in a pass")


def leave(stopped, step, steps, argv):
    """The end of a run that a signal stopped and that has been saved."""
    gather(0)                                                   # torchrun ends all of them when one leaves
    again = shlex.join([script, *(x for x in argv if x not in ("--resume", "--overwrite")), "--resume"])
    launch = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', WORLD)}" if WORLD > 1 else "python"
    where = " (on every machine, with its --nnodes and --rdzv flags)" if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1 else ""
    note(f"stopped after step {step} of {steps}; go on{where} with: {launch} {again}")
    raise SystemExit(128 + stopped.args[0])


# ------------------------------------------------------------------------------------------- checkpoints
def seal(path):
    """Size and SHA-256 of a file, which is on the disk when this returns."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        return [os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()]


def checkpoints(out):
    """{step: folder}, oldest first, damaged ones too."""
    found = {int(p.name[11:]): p for p in Path(out).glob("checkpoint-*") if p.name[11:].isdecimal()}
    return dict(sorted(found.items()))


def is_whole(folder):
    """Is every file of a checkpoint as it was written?"""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all(seal(folder / name) == sealed for name, sealed in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def save_checkpoint(out, step, keep, fill):
    """OUT/checkpoint-<step>, as fill(folder) writes it. Nothing is lost if this is killed, or the disk full, at any moment."""
    folder = Path(out) / f"checkpoint-{step}"
    tmp = folder.with_name(f"tmp-{folder.name}")
    shutil.rmtree(tmp, ignore_errors=True)                      # of a run that was killed while it saved
    try:
        tmp.mkdir(parents=True)
        fill(tmp)
        (tmp / "manifest.json").write_text(json.dumps({p.name: seal(p) for p in sorted(tmp.iterdir())}, indent=1))
        seal(tmp / "manifest.json")
    except Exception as err:                                    # a full disk, in the words of each library
        shutil.rmtree(tmp, ignore_errors=True)
        fail(f"cannot write {folder} ({err}): make room, then --resume; older checkpoints are whole")
    shutil.rmtree(folder, ignore_errors=True)                   # a damaged one
    tmp.rename(folder)
    for old in [path for at, path in checkpoints(out).items() if at <= step][:-keep]:
        shutil.rmtree(old)


def find_checkpoint(args, free):
    """Before a model loads: the newest whole checkpoint that --resume goes on from, or None for a new run. Another run's folder
    is never written to by mistake, nor is this one's with other flags; `free` names those that may change, as they do not
    change what is learned."""
    out, again = Path(args.output_dir), False
    with contextlib.suppress(OSError, ValueError):              # torchrun --max-restarts begins anew with the same flags
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            again = json.loads((out / "args.json").read_text()).get("launcher") == LAUNCHER
    if again:
        args.resume = bool(checkpoints(out))
        args.overwrite = not args.resume
    with contextlib.suppress(OSError, ValueError):              # see one_line
        if (again or args.resume) and (size := int((out / "micro_batch_size").read_text())) < args.micro_batch_size:
            args.micro_batch_size = size
            note(f"--micro_batch_size {size}: the memory was too small for more")
    if not args.resume:
        if not args.overwrite and (checkpoints(out) or any((out / name).exists() for name in ("args.json", "config.json"))):
            fail(f"--output_dir {out} holds a run: --resume goes on with it, --overwrite drops it")
        out.mkdir(parents=True, exist_ok=True)
        return None
    for folder in reversed(checkpoints(out).values()):
        if is_whole(folder):
            break
        note(f"{folder} is damaged (a file is missing, cut off or changed): trying the one before it")
    else:
        fail(f"--resume: there is no whole checkpoint in {out}")
    try:
        then = json.loads((out / "args.json").read_text())
    except (OSError, ValueError) as err:
        fail(f"--resume: cannot read the flags of the run in {out} ({err})")
    changed = [f"--{name} {then.get(name)} -> {value}" for name, value in vars(args).items()
               if name not in free and then.get(name) != value]
    if changed:
        fail(f"--resume: not the flags that the run in {out} had: {', '.join(changed)}")
    return folder


def go_on_from(args, free):
    """find_checkpoint, which process 0 does for all."""
    folder = gather(find_checkpoint(args, free) if RANK == 0 else None)[0]
    args.micro_batch_size = min(gather(args.micro_batch_size))  # it may have found a smaller one
    return folder


def open_folder(args, folder):
    """When the model is there: clears what is left of an old run or of a kill, and begins the files of this one."""
    out, done = Path(args.output_dir), int(folder.name[11:]) if folder else -1
    old = [path for step, path in checkpoints(out).items() if step > done] + list(out.glob("tmp-*"))
    if not folder:                                              # a stale adapter would load with a new model
        old += [*out.glob("adapter_*"), *out.glob("model*.safetensors*")]
        old += [out / name for name in ("metrics.jsonl", "samples.jsonl", "merged", "micro_batch_size")]
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (out / "tmp-args.json").write_text(json.dumps(vars(args) | {"launcher": LAUNCHER}, indent=1))
    (out / "tmp-args.json").replace(out / "args.json")
    for path in (p for p in (out / "metrics.jsonl", out / "samples.jsonl") if p.exists()):       # what came later comes again,
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]         # and so does the
        kept = [line for line, row in zip(lines, map(json.loads, lines))                                     # evaluation of the
                if row["step"] <= done - any(key.startswith("eval_") for key in row)]                        # step to go on from
        (out / "tmp-lines").write_text("".join(kept))
        (out / "tmp-lines").replace(path)


def read_state(folder, *others):
    """Tensors and plain values that a checkpoint holds, with no code: `others` and what models.Optimizer.state gives."""
    try:
        state = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
        return state if {"weights", "moments", *others} <= state.keys() else fail(f"{folder}/trainer.pt does not hold the state of a run")
    except Exception as err:                                    # of many kinds
        fail(f"{folder}/trainer.pt does not hold the state of a run ({str(err)[:200]})")


def move_in(tmp, out):
    """The files of a finished model, from a temporary folder to the run's own."""
    shutil.copytree(tmp, out, dirs_exist_ok=True, copy_function=os.replace)
    shutil.rmtree(tmp)


@contextlib.contextmanager
def one_line(args):
    """What can still happen to a run, each in one line."""
    try:
        yield
        if WORLD > 1:
            dist.destroy_process_group()
    except rewards.DataError as err:
        fail(err)
    except torch.OutOfMemoryError:
        if args.fsdp and args.micro_batch_size > 1:             # the others wait for a part of this pass that will not come
            (Path(args.output_dir) / "micro_batch_size").write_text(str(args.micro_batch_size // 2))
            fail(f"out of GPU memory: start again with --micro_batch_size {args.micro_batch_size // 2}, with --resume if there is a "
                 "checkpoint; torchrun --max-restarts 9 does so by itself")
        fail("out of GPU memory: take a smaller --micro_batch_size, --activation_checkpointing, --lora_rank 32 or --load_in_4bit; "
             "then --resume")
    except (OSError, SafetensorError) as err:                   # a full disk, most of all
        kept = "; its checkpoints are whole: make room, then --resume" if checkpoints(args.output_dir) else ""
        fail(f"--output_dir {args.output_dir}: {err}{kept}")
    except KeyboardInterrupt:                                   # while the model loads or the final one is written
        note("stopped" + ("; --resume goes on" if checkpoints(args.output_dir) else " before the first step"))
        raise SystemExit(128 + signal.SIGINT) from None


# ------------------------------------------------------------------------------------------- logs
def append(path, rows):
    with open(path, "a") as f:
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
        board = wandb.init(project=Path(script).stem, name=Path(args.output_dir).name, config=vars(args), dir=args.output_dir)
        send = lambda metrics: board.log(metrics, step=metrics["step"])                                     # noqa: E731
    return lambda metrics: None if RANK else (append(Path(args.output_dir) / "metrics.jsonl", [metrics]), send(metrics))
