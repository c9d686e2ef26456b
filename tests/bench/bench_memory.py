"""Peak memory of the default command and of every stage of every recipe: computed, or measured on a GPU.

    python tests/bench/bench_memory.py --computed           # CPU, a minute: the sums, by part
    python tests/bench/bench_memory.py                      # GPU: tens of GB of disk for a while
    python tests/bench/bench_memory.py --only smollm2       # what has that in its name, also with --computed
    python tests/bench/bench_memory.py --shape tiny --more --max_new_tokens 32   # CPU: that everything runs

Computed: the scripts' own flags, the true shapes, the settings of a GPU. A step runs on fake tensors, which
have shapes but no numbers, at two depths; each further layer adds as much again. Hooks on saved tensors count
what the forward pass keeps (activations), a dispatch mode all tensors alive: `logits` is what the peak has on
top, also a layer computed again and gradients on their way. Not in the sum: what CUDA itself takes (half
a GB) and what its allocator cannot use; so a sum that fits stays below 90 % of the GPU.

Measured: each stage that trains runs for a few steps as a user would start it, in a child process, on a model
of the true shape with random weights and on made-up rows. No completion of such a model ends: lengths are the
limit, and memory the most."""
import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from functools import cache
from pathlib import Path
from unittest.mock import patch

import shapes
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

import eval as evaluation
import grpo
import sft

SCRIPTS = {"sft": sft, "grpo": grpo, "eval": evaluation}
DEFAULT = "grpo.py --model Qwen/Qwen2.5-3B-Instruct"
CARDS = {  # recipe: GB of the GPU that it is made for
    "smollm2-135m-gsm8k": 8, "qwen2.5-3b-countdown": 48, "qwen2.5-3b-qlora-gsm8k": 24, "qwen2.5-7b-r1": 94,
    "qwen2.5-14b-rlvr": 48, "tiny": 8}
FITS = [  # README's table: GB of a GPU, size of a Qwen2.5 and further flags of grpo.py that fit it
    (8, "0.5B", "--sample_batch_size 64 --micro_batch_size 2"),
    (8, "3B", "--load_in_4bit --lora_rank 32 --sample_batch_size 64 --micro_batch_size 4"),
    (16, "3B", "--lora_rank 32 --sample_batch_size 128"),
    (16, "3B", "--dtype float32 --load_in_4bit --lora_rank 32 --sample_batch_size 32"),
    (24, "1.5B", "--sample_batch_size 128 --micro_batch_size 4"),
    (24, "7B", "--lora_rank 32 --sample_batch_size 64 --micro_batch_size 4"),
    (48, "3B", ""),
    (48, "14B", "--lora_rank 32 --sample_batch_size 32 --micro_batch_size 4"),
    (80, "3B", "--micro_batch_size 4 --no-activation_checkpointing"),
    (80, "14B", "--lora_rank 32 --sample_batch_size 128")]
# tokens of a long prompt, with instructions and chat template, and of a long worked answer
LENGTHS = {"countdown": (150, 150), "gsm8k": (300, 400), "math": (400, 2000), "code": (300, 400)}
PARTS = ["weights", "masters", "gradients", "moments", "reference", "keys+values", "activations", "logits"]
NF4 = 0.5 + 1 / 64          # bytes a weight: 4 bits, and a scale of 8 bits for every 64 weights


def stages():
    """(name, script, flags, GB of the GPU that it is made for): the default command, the recipes' stages."""
    yield DEFAULT, "grpo", shlex.split(DEFAULT)[1:], 80
    for recipe, card in CARDS.items():
        for script in SCRIPTS:
            file = shapes.ROOT / "recipes" / recipe / f"{script}.txt"
            if file.exists():
                yield f"{recipe}/{script}.txt", script, [f"@{file}"], card


def shape_of(model):
    """The shape that a model or a run of this name has."""
    return next(shape for shape in shapes.SHAPES if shape in model.lower())


def tasks_of(args):
    """Names of the tasks in --data."""
    return [source.split("=")[0].split(":")[0] for source in args.data]


# ---------------------------------------------------------------------------------- computed
class Live(TorchDispatchMode):
    """Bytes of the tensors alive that were made in this context, and the most that there were at a time."""

    def __init__(self, lm):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {x.untyped_storage()._cdata: 0 for x in (*lm.parameters(), *lm.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)


def make(shape, depth, dtype, lora_rank):
    """A model of so many layers, with an adapter if it has a rank, without numbers: on the device `meta`."""
    hidden, mlp, _, *rest = shapes.SHAPES[shape]
    with patch.dict(shapes.SHAPES, {shape: (hidden, mlp, depth, *rest)}):
        lm = shapes.make(shape, "meta", dtype)
    if lora_rank:
        import peft
        config = peft.LoraConfig(r=lora_rank, task_type="CAUSAL_LM", target_modules="all-linear")
        peft.get_peft_model(lm, config, autocast_adapter_dtype=False)
    return lm


def loss_of(script, lm, rows, length, completion):
    """Loss of a micro-batch of rows x length tokens: grpo.py's own log-probabilities of the last `completion`
    tokens of each row; sft.py's cross-entropy over all logits."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    if script == "sft":                                         # as in its forward()
        logits = lm(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits.float(), ids.flatten(), reduction="sum")
    starts, mask = torch.full((rows,), length - completion), torch.ones(rows, completion)
    places = torch.zeros(2, rows * completion, dtype=torch.long).unbind()
    with patch.object(torch.Tensor, "nonzero", lambda x, as_tuple: places):     # its size depends on numbers
        return grpo.completion_logps(lm, ids, starts, mask)[0].sum()


def update_bytes(script, lm, micro_batch):
    """-> bytes that the forward pass keeps, but for logits; the most that exist in both passes."""
    live, kept = Live(lm), {}

    def keep(x):
        storage = x.untyped_storage()
        if live.sizes.get(storage._cdata) != 0 and x.shape[-1:] != (lm.config.vocab_size,):     # 0: a weight
            kept[storage._cdata] = storage
        return x

    for p in lm.parameters():
        if p.requires_grad:                                     # fp32_masters() takes each gradient away
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with live:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = loss_of(script, lm, *micro_batch)
        total = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        loss.backward()
    return total, live.peak


def sampling_bytes(lm, rows, length):
    """-> the most bytes that exist while the last token is sampled: keys and values, of one layer the keys
    twice, as the cache grows by concatenation, and the logits to pick it by."""
    config = lm.config
    size = rows, config.num_key_value_heads, length - 1, config.hidden_size // config.num_attention_heads
    with Live(lm) as live, torch.no_grad():
        past = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            past.update(torch.zeros(size, dtype=lm.dtype), torch.zeros(size, dtype=lm.dtype), layer)
        ids, mask = torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
        logits = torch.zeros(rows, config.vocab_size, dtype=lm.dtype)           # of the token before
        logits = lm(input_ids=ids, attention_mask=mask, position_ids=ids, past_key_values=past).logits[:, -1]
        grpo.pick(logits, 1.0, torch.zeros(rows))
    return live.peak


def at_depth(script, args, shape, depth, dtype):
    """-> {what: bytes} of a model of so many layers; `size`, `trained`, `packed` (in nf4) in parameters."""
    prompt, worked = map(max, zip(*(LENGTHS[task] for task in tasks_of(args))))
    lm = make(shape, depth, dtype, getattr(args, "lora_rank", 0))
    trained = [p.numel() for p in lm.parameters() if p.requires_grad]
    frozen = [p.numel() for name, p in lm.base_model.named_parameters() if "base_layer.weight" in name]
    found = {"size": sum(p.numel() for p in lm.parameters()), "trained": sum(trained), "packed": sum(frozen)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm.to_empty(device="cpu").eval().tie_weights()
        if script == "sft":
            length = min(args.max_length, prompt + worked)
            micro_batch = args.micro_batch_size, length, length
        else:
            length = prompt + args.max_new_tokens
            rows = args.batch_size if script == "eval" else args.sample_batch_size
            if script == "grpo" and not args.eval_data:
                rows = min(rows, args.prompts_per_step * args.group_size)
            found["sampling"] = sampling_bytes(lm, rows, length)
        if script == "grpo":
            micro_batch = args.micro_batch_size, length, args.max_new_tokens
        if script != "eval":
            lm.train()
            if args.activation_checkpointing is not False:
                lm.gradient_checkpointing_enable({"use_reentrant": False})
            found["kept"], found["peak"] = update_bytes(script, lm, micro_batch)
    return found


@cache
def compute(script, *flags):
    """{part: GB} that a script with these flags takes on one GPU, and the most at a time as `total`. Keys and
    values, the reference, and gradients with what follows them come one after the other; paged moments move
    to the CPU and do not count."""
    args = SCRIPTS[script].parse_args(flags)
    trains, lora, size = script != "eval", getattr(args, "lora_rank", 0), 2
    optim = trains and (args.optim or "adamw8bit")              # as start_processes() decides on a GPU
    if trains and args.dtype == "float32":
        size = 4
    shape = shape_of(args.model if trains else args.model[0])
    with warnings.catch_warnings(action="ignore"):
        one, two = (at_depth(script, args, shape, depth, torch.float32 if size == 4 else torch.bfloat16)
                    for depth in (1, 2))
    found = {key: one[key] + (shapes.SHAPES[shape][2] - 1) * (two[key] - one[key]) for key in one}
    gb = dict.fromkeys(PARTS, 0.0)
    gb["weights"] = size * found["size"]
    if getattr(args, "load_in_4bit", False):
        gb["weights"] -= (size - NF4) * found["packed"]
    gb["keys+values"] = found.get("sampling", 0)
    if trains:
        gb["masters"] = found["trained"] * (4 if size == 2 else 0)
        gb["gradients"] = found["trained"] * 4
        gb["moments"] = found["trained"] * (2 if "8bit" in optim else 8)
        gb["activations"], gb["logits"] = found["kept"], found["peak"] - found["kept"]
    if script == "grpo" and args.beta and not lora:
        gb["reference"] = gb["weights"]
    gb["total"] = gb["weights"] + gb["masters"] + max(
        gb["keys+values"], gb["reference"], gb["gradients"] + gb["activations"] + gb["logits"])
    if trains and "paged" not in optim:
        gb["total"] += gb["moments"]
    return {part: x / 1e9 for part, x in gb.items()} | {"paged": trains and "paged" in optim}


def computed(only):
    """Print GB by part of the stages, and of README's table, that have `only` in their names."""
    def show(name, gb, card):
        cells = {part: f"{gb[part]:.{1 if gb[part] >= 0.1 else 3}f}" if gb[part] else "" for part in PARTS}
        if gb["paged"]:
            cells["moments"] = f"({cells['moments']})"
        cells = [cell.rjust(len(part)) for part, cell in cells.items()]
        print(name.ljust(width), *cells, f"{gb['total']:5.1f}", f"{card:3}", sep="  ", flush=True)

    started, width = time.time(), 84
    print("GB, computed; in brackets: paged".ljust(width), *PARTS, "total", "for", sep="  ")
    for name, script, flags, card in stages():
        if only in name:
            show(name, compute(script, *flags), card)
    for card, model, more in FITS:
        flags = ["--model", f"Qwen/Qwen2.5-{model}-Instruct", *shlex.split(more)]
        if only in f"{model} {more}":
            show(f"{model} {more}", compute("grpo", *flags), card)
    print(f"{time.time() - started:.0f} s")


# ---------------------------------------------------------------------------------- measured
rng = random.Random(0)


def text(n):
    return " ".join(rng.choice(["some", "made", "up", "words"]) for _ in range(n // 5))


def rows_of(task):
    """300 rows of about the lengths of the real ones: a letter is a token here."""
    for _ in range(300):
        yield {"countdown": {"nums": [rng.randint(1, 99) for _ in range(4)], "target": rng.randint(10, 99)},
               "gsm8k": {"question": text(250), "answer": f"{text(90)}\n#### {rng.randint(1, 999)}"},
               "math": {"problem": text(250), "solution": text(1700) + r" \boxed{5}", "answer": "5"},
               "code": {"text": text(150), "test_list": ["assert f(1) == 1"], "test_setup_code": ""}}[task]


def run(name, script, flags, card, shape, folder, steps, more):
    """Run a stage for a few steps and print its peak."""
    args = SCRIPTS[script].parse_args(flags)
    command = [sys.executable, shapes.ROOT / f"{script}.py", *flags, "--model", folder / "model"]
    command += ["--data", *(f"{task}={folder}/{task}.jsonl" for task in tasks_of(args))]
    command += ["--steps", steps, "--warmup", 0, "--save_every", 0, "--output_dir", folder / "run"]
    if args.eval_data:
        command += ["--eval_data", f"gsm8k={folder}/gsm8k.jsonl:2"]
    command += more if script == "grpo" else []
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: failed\n{done.stderr[-2000:]}", flush=True)
    else:
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        seen = [line for line in lines if "step_seconds" in line]
        peak = max(step["peak_memory_gb"] for step in seen)
        print(f"{name}: {shape}, {len(seen)} steps, {seen[-1]['step_seconds']:.1f} s the last one, "
              f"{peak:.1f} GB at the peak; made for {card} GB", flush=True)
    shutil.rmtree(folder / "run", ignore_errors=True)


def measured(only, shape, steps, more):
    """Run all stages that train, but the tour's."""
    device, dtype = shapes.use(2)
    with tempfile.TemporaryDirectory() as folder:
        folder, of_shape = Path(folder), None
        for task in LENGTHS:
            (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(task)))
        for name, script, flags, card in stages():
            if only in name and script != "eval" and "tiny/" not in name:
                wanted = shape or shape_of(SCRIPTS[script].parse_args(flags).model)
                if wanted != of_shape:                          # one model at a time: they are large
                    shutil.rmtree(folder / "model", ignore_errors=True)
                    shapes.save(wanted, folder / "model", device, dtype)
                    torch.cuda.empty_cache()
                    of_shape = wanted
                run(name, script, flags, card, wanted, folder, steps, more)


if __name__ == "__main__":
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--computed", action="store_true", help="without a GPU: the sums")
    p.add_argument("--only", default="", help="part of a stage's name")
    p.add_argument("--shape", help="measured: of all models, instead of the true ones")
    p.add_argument("--steps", type=int, default=3, help="measured: of each stage")
    p.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="measured: further flags for grpo.py")
    a = p.parse_args()
    if a.computed:
        computed(a.only)
    else:
        measured(a.only, a.shape, a.steps, a.more)
