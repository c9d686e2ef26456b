import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import rewards

# ---------------------------------------------------------------------------------------- small helpers


def fail(message):
    """One line on stderr and exit code 2: what a wrong flag, file or model gets."""
    print(f"sft.py: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def note(message):
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"sft.py: {message}", file=sys.stderr)


class FlagFileParser(argparse.ArgumentParser):
    """`@file` holds flags: any number on a line, quoted as in a shell, with # comments."""

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)


@contextlib.contextmanager
def stop_signals():
    """-> a list that gets the number of the first SIGINT or SIGTERM. A second one ends the process at once."""
    got, old = [], {}

    def first(number, frame):
        got.append(number)
        for s in old:
            signal.signal(s, signal.SIG_DFL)
        note("stopping: saving a checkpoint first; once more leaves at once")

    for s in (signal.SIGINT, signal.SIGTERM):
        old[s] = signal.signal(s, first)
    try:
        yield got
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------------------------------- checkpoints
# checkpoint-<step>/ is a normal HF checkpoint (or adapter), plus trainer.pt, plus manifest.json with the size and SHA-256 of
# every file. It is written under another name and renamed when it is whole and on the disk.


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def to_disk(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save_checkpoint(folder, write):
    """`write(tmp)` fills a temporary folder, which then becomes `folder` in one rename: whole or not there."""
    tmp = folder.with_name(f"tmp-{folder.name}")
    shutil.rmtree(tmp, ignore_errors=True)  # of a run that was killed while it saved
    tmp.mkdir(parents=True)
    write(tmp)
    files = sorted(p for p in tmp.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(tmp)): [p.stat().st_size, digest(p)] for p in files}
    (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in [*files, tmp / "manifest.json", tmp]:
        to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one, or it would have been resumed
    tmp.rename(folder)
    to_disk(folder.parent)


def is_whole(folder):
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all((folder / name).stat().st_size == size and digest(folder / name) == sha
                   for name, (size, sha) in manifest.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def step_of(folder):
    return int(folder.name.rpartition("-")[2])


def checkpoints(output_dir):
    """Folders of checkpoints, oldest first, damaged ones included."""
    return sorted((p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdecimal()), key=step_of)


def newest_checkpoint(output_dir):
    for folder in reversed(checkpoints(output_dir)):
        if is_whole(folder):
            return folder
        note(f"{folder} is damaged (a file is missing, cut off or changed): using the one before it")
    return None


def keep_metrics(path, step):
    """Drops what a killed run logged after its last checkpoint, and a half-written last line: every step stands once."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text("".join(kept))
    tmp.replace(path)


# ---------------------------------------------------------------------------------------- the model


def load_tokenizer(name, chat_template=None, trust_remote_code=False):
    try:
        tok = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as err:
        fail(f"--model {name}: no such folder, and no such model on the hub or no network ({str(err).splitlines()[0]})")
    if chat_template:
        tok.chat_template = Path(chat_template).read_text()
    if not tok.chat_template:
        fail(f"--model {name}: its tokenizer has no chat template; pass one with --chat_template FILE (Jinja)")
    return tok


def end_token(tok):
    """The id that ends an assistant turn: the first special token after its content; the eos where there is none."""
    mark = "the content ends here"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    tail = tok.apply_chat_template(chat, tokenize=False).rpartition(mark)[2]
    special = [i for i in tok(tail, add_special_tokens=False)["input_ids"] if i in tok.all_special_ids]
    return special[0] if special else tok.eos_token_id


def load_base(name, dtype, device, load_in_4bit=False, trust_remote_code=False):
    """The causal language model `name` on `device`, in `dtype` or in nf4 with double quantisation."""
    kwargs = {}
    if load_in_4bit:
        kwargs["device_map"] = {"": device}
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError, KeyError) as err:
        fail(f"--model {name}: {str(err).splitlines()[0]}")
    for module in model.modules():  # on CPU a forward would repack the 4-bit weights, and training and merging break
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.to(device)


def add_adapter(model, rank, alpha, saved=None):
    """Freezes the model and puts LoRA on all its linear layers but the head; `saved`: the folder of an adapter to go on with."""
    import peft
    if saved:
        model = peft.PeftModel.from_pretrained(model, saved, is_trainable=True)
    else:
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


def save_merged(base, adapter, out):
    """base + adapter as one plain model in `out`. A 4-bit base is dequantised first: merging into 4 bits costs 3 times the error."""
    import peft
    if getattr(base, "is_quantized", False):
        base = base.dequantize()
    peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)


def checkpoint_activations(model):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # transformers < 5.2x
    enable({"use_reentrant": False})


def train_dtype(name, device):
    """What the forward pass computes in; the trained weights are fp32 either way."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
