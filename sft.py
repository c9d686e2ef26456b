"""Supervised fine-tuning: the cold start that teaches a model the form of an answer, before GRPO improves the answers.

1. Rows become a chat prompt, by the model's chat template, and a completion, `<reasoning>...</reasoning><answer>...</answer>`
   and the token that ends a turn, encoded apart: a sampler that starts from the prompt's ids meets what was trained.
2. The model is any causal LM of transformers, or `--model tiny`, a Llama of 0.5 M parameters made here. All of it is trained,
   or LoRA (--lora_rank), or LoRA on a 4-bit base (--load_in_4bit); in fp32, while a pass may run in bf16.
3. A step takes the next --batch_size rows of an order given by --seed alone, sorted by length, in micro-batches.
4. The loss is the cross-entropy of the completion tokens, end token included, over one token count for the whole batch:
   micro-batches and processes never change the gradient. The head runs in chunks: [B, T, V] logits never exist.
5. The gradient is clipped, then AdamW (8-bit AdamW, Muon) with linear warm-up and a cosine to 0. What is not finite is skipped.
6. metrics.jsonl gets a line, held-out rows a loss, checkpoint-<step>/ all that the run is: killed at any moment, the same
   command with --resume ends with the same weights, on a CPU to the bit. The final model stands in --output_dir itself.

python sft.py --model tiny --data countdown=data/countdown/sft.jsonl --lr 3e-3 --steps 1000
python sft.py --model Qwen/Qwen2.5-3B-Instruct --data gsm8k --lora_rank 32 --lr 2e-4 --merge
torchrun --nproc_per_node=8 sft.py --model Qwen/Qwen2.5-7B-Instruct --data gsm8k --fsdp
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import huggingface_hub
import jinja2
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint import state_dict as full_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rewards

HEAD_LOGITS = 2**26  # that exist at a time: 256 MB in fp32, 441 positions of a vocabulary of 152 k
BAD_STEPS = 5  # updates in a row that are not finite, after which the run stops
FREE = {"resume", "overwrite", "output_dir", "save_every", "keep", "merge", "eval_data", "eval_split", "eval_every",
        "micro_batch_size", "activation_checkpointing", "fsdp"}  # what a resumed run may change: not what it learns
FULL = full_state.StateDictOptions(full_state_dict=True, cpu_offload=True)  # so that it loads on any number of processes
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
transformers.utils.logging.disable_progress_bar()


def fail(message):
    print(f"sft.py: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def note(message):
    if RANK == 0:
        tqdm.write(f"sft.py: {message}", file=sys.stderr)


# ---------------------------------------------------------------- options
class FlagParser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, line):  # of an @file: flags as in a shell, # comments
        try:
            return shlex.split(line, comments=True)
        except ValueError as err:
            fail(f"{line}: {err}")

    def error(self, message):
        fail(message)


def parse_args(argv):
    p = FlagParser("sft.py", description=__doc__.split("\n\n")[0], fromfile_prefix_chars="@",
                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument_group("model").add_argument
    add("--model", default="tiny", help="`tiny`, a folder or a hub id")
    add("--chat_template", metavar="FILE", help="Jinja chat template, for a tokenizer that has none")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("--lora_rank", type=int, default=0, help="LoRA on all linear layers; 0: train the whole model")
    add("--lora_alpha", type=float, default=32, help="the adapter is scaled by alpha / rank")
    add("--load_in_4bit", action="store_true", help="QLoRA: the frozen base in nf4")
    add("--merge", action="store_true", help="also write merged/: the base with the adapter in it")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of a pass; auto: bfloat16 on a GPU")
    add("--activation_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--fsdp", action="store_true", help="shard the training of a whole model over torchrun's processes")
    add = p.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["countdown"], metavar="SOURCE", help="TASK[=PATH][:N], mixed")
    add("--style", choices=rewards.STYLES, default="reasoning", help="name of the reasoning tag")
    add("--max_length", type=int, default=1024, help="tokens of prompt and completion; longer rows are left out")
    add("--eval_data", nargs="+", default=[], metavar="SOURCE", help="held-out rows, for loss and token accuracy")
    add("--eval_split", choices=["val", "test", "train"], default="val", help="of --eval_data")
    add("--eval_every", type=int, default=0, help="steps; 0: at the end only")
    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=int, help="updates; without it --epochs counts")
    add("--epochs", type=float, default=1.0, help="passes over the data")
    add("--batch_size", type=int, default=32, help="rows an update, over all processes")
    add("--micro_batch_size", type=int, default=8, help="rows a pass; matters for speed and memory only")
    add("--lr", type=float, default=1e-5, help="peak learning rate; 1e-5 suits whole models, 2e-4 LoRA")
    add("--warmup", type=int, default=0, help="steps of linear warm-up")
    add("--optim", choices=["adamw", "adamw8bit", "muon"], default="adamw", help="muon: for the layers' matrices")
    add("--muon_lr", type=float, default=1e-2, help="peak learning rate of Muon's matrices")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="of AdamW")
    add("--weight_decay", type=float, default=0.0, help="a step, times the learning rate")
    add("--max_grad_norm", type=float, default=1.0, help="clips the gradient to this norm; 0: never")
    add = p.add_argument_group("run").add_argument
    add("--output_dir", default="runs/sft", help="the final model, checkpoint-<step>/, metrics.jsonl, args.json")
    add("--save_every", type=int, default=500, help="steps between checkpoints; 0: at the end only")
    add("--keep", type=int, default=2, help="checkpoints that stay")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint in --output_dir")
    add("--overwrite", action="store_true", help="delete the run that is in --output_dir")
    add("--seed", type=int, default=0, help="of the data order and of new weights")
    a = p.parse_args(argv)
    least = dict(lora_rank=0, max_length=2, eval_every=0, steps=1, batch_size=1, micro_batch_size=1, warmup=0,
                 weight_decay=0, max_grad_norm=0, save_every=0, keep=1, seed=0)
    wrong = {f"--{k} {getattr(a, k)}: must be at least {low}": not low <= getattr(a, k) < math.inf
             for k, low in least.items() if getattr(a, k) is not None}
    wrong |= {f"--{k} {getattr(a, k)}: must be above 0": not 0 < getattr(a, k) < math.inf
              for k in ("lr", "muon_lr", "epochs", "lora_alpha")}
    model, out = Path(a.model).resolve(), Path(a.output_dir).resolve()
    wrong |= {f"--betas {a.betas}: must be at least 0 and below 1": not all(0 <= b < 1 for b in a.betas),
              f"--warmup {a.warmup}: must be below --steps, {a.steps}": a.steps and a.warmup >= a.steps,
              f"--batch_size {a.batch_size}: must be a multiple of the {WORLD} processes": a.batch_size % WORLD,
              f"--chat_template {a.chat_template}: no such file": a.chat_template and not Path(a.chat_template).is_file(),
              "--load_in_4bit: 4-bit weights do not train; add --lora_rank 32": a.load_in_4bit and not a.lora_rank,
              "--merge: there is an adapter to merge only with --lora_rank": a.merge and not a.lora_rank,
              "--lora_rank: a new `--model tiny` has no base to adapt; leave it out": a.lora_rank and a.model == "tiny",
              "--optim muon: trains whole models; with --lora_rank take adamw": a.lora_rank and a.optim == "muon",
              "--fsdp: start with torchrun --nproc_per_node=N sft.py ...": a.fsdp and "RANK" not in os.environ,
              "--fsdp: shards whole models; LoRA runs without it under torchrun": a.fsdp and a.lora_rank,
              f"--fsdp: goes with --optim adamw, not {a.optim}": a.fsdp and a.optim != "adamw",
              f"--output_dir {a.output_dir}: --model lies in it; take another folder": out in (model, *model.parents),
              "--resume goes on with a run, --overwrite deletes it: take one": a.resume and a.overwrite}
    for message in [message for message, is_wrong in wrong.items() if is_wrong][:1]:
        fail(message)
    return a


# ---------------------------------------------------------------- 1. rows
def completion(task, row, style):
    """The text that a model is to write for this row."""
    reasoning = answer = None
    if task == "countdown" and "trace" in row:
        reasoning, answer = row["trace"], row.get("trace_answer")
    elif task == "countdown" and "solution" in row:
        reasoning, answer = f"{row['solution']}={row['target']}", row["solution"]
    elif task == "gsm8k":
        worked, _, answer = row["answer"].rpartition("####")
        reasoning = re.sub("<<.*?>>", "", worked)
    elif task == "math" and "solution" in row:
        reasoning, answer = row["solution"], rewards.TASKS[task]["gold"](row)
    if not isinstance(reasoning, str) or not isinstance(answer, str):
        raise rewards.DataError(f"{task}: a row without a worked answer: countdown needs `trace` and `trace_answer`, or `solution` "
                                "(countdown.py writes them), math a `solution` with a box; arc and code have none")
    return f"<{style}>{reasoning.strip()}</{style}>\n<answer>{answer.strip()}</answer>"


def end_token(tok):
    """The id that ends an assistant turn: the first special token after its text, which need not be the eos."""
    mark = "the text ends here"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    tail = tok.apply_chat_template(chat, tokenize=False).rpartition(mark)[2]
    special = [i for i in tok(tail, add_special_tokens=False)["input_ids"] if i in tok.all_special_ids]
    end = special[0] if special else tok.eos_token_id
    return end if end is not None else fail("neither the chat template nor the tokenizer has a token that ends a turn")


def encode(tok, rows, style, max_length, end):
    """rows -> [{"ids": [T], "prompt": how many of them are the prompt's}], without those of more than max_length ids."""
    texts = [completion(row["task"], row, style) for row in rows]
    prompts = [tok.apply_chat_template(rewards.messages(row["task"], row, style), tokenize=False,
                                       add_generation_prompt=True) for row in tqdm(rows, "prompts", disable=None)]
    prompts, texts = (tok(t, add_special_tokens=False)["input_ids"] for t in (prompts, texts))
    encoded = [{"ids": torch.tensor(p + t + [end]), "prompt": len(p)} for p, t in zip(prompts, texts)]
    kept = [row for row in encoded if len(row["ids"]) <= max_length]
    if len(kept) < len(rows):
        note(f"{len(rows) - len(kept)} of {len(rows)} rows are longer than --max_length {max_length}: left out")
    return kept or fail(f"--max_length {max_length}: every row is longer")


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def collate(rows):
    """-> ids [B, T] and trained [B, T-1]: where the next token is one of the completion. By lengths, as pad and end may be
    the same token. Padding stands on the right, where causal attention needs no mask."""
    ids = pad_sequence([row["ids"] for row in rows], batch_first=True)
    first = torch.tensor([row["prompt"] - 1 for row in rows])[:, None]
    last = torch.tensor([len(row["ids"]) - 1 for row in rows])[:, None]
    at = torch.arange(ids.shape[1] - 1)
    return ids, (first <= at) & (at < last)


# ---------------------------------------------------------------- 2. the model
def tiny_tokenizer():
    """A token for each number up to 99, each tag and word of Countdown; bytes for other text, which comes back exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    special, words = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"], ["Numbers: [", ", ", "]\nTarget: ", " ok", " no"]
    words += [f"<{slash}{tag}>" for tag in (*rewards.STYLES, "answer") for slash in ("", "/")]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = [as_bytes.pre_tokenize_str(w)[0][0] for w in words] + [str(n) for n in range(10, 100)]
    vocab = {t: i for i, t in enumerate(special + sorted(as_bytes.alphabet()) + whole)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))  # a piece in the vocabulary is one token
    pieces = Regex("|".join(map(re.escape, words)) + "|[0-9]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), as_bytes])
    bpe.decoder = decoders.ByteLevel()
    template = ("{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")  # instructions are for models that can read
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=special[0], eos_token=special[1], extra_special_tokens=special[2:],
        clean_up_tokenization_spaces=False, chat_template=template)


def tiny_model(tok, seed):
    """0.5 M random parameters, but for the embeddings of the numbers: sines and cosines of their value."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=2048, initializer_range=0.08, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))
    weight = model.get_input_embeddings().weight.data
    angle = torch.arange(100)[:, None] * math.pi / 64 ** torch.linspace(0, 1, 64)  # periods of 2 to 128
    weight[tok.convert_tokens_to_ids([str(n) for n in range(100)])] = 0.11 * torch.cat([angle.sin(), angle.cos()], 1)
    return model


def load_tokenizer(name, chat_template, max_length, trust=False):
    if not Path(name).is_dir():  # one look at the hub: without a network transformers would try again for a minute
        try:
            huggingface_hub.model_info(name, timeout=10)
        except Exception as err:
            huggingface_hub.constants.HF_HUB_OFFLINE = not isinstance(err, huggingface_hub.errors.HfHubHTTPError)
    if (Path(name) / "adapter_config.json").exists():
        fail(f"--model {name}: is an adapter; train on from its merged/, which --merge writes")
    try:
        tok = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust).get_text_config()
    except Exception as err:  # of many kinds, for what is one thing to the user
        fail(f"--model {name}: no folder of a model, and no hub id within reach ({str(err)[:200]})")
    tok.chat_template = Path(chat_template).read_text() if chat_template else tok.chat_template
    scaled = [k for k in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, k, None) not in (None, 1)]
    if not tok.chat_template:
        fail(f"--model {name}: its tokenizer has no chat template; pass one with --chat_template FILE")
    if scaled:
        fail(f"--model {name}: has {scaled[0]}, which the chunked head leaves out; take another model")
    if max_length > getattr(config, "max_position_embeddings", max_length):
        fail(f"--max_length {max_length}: the context of {name} is {config.max_position_embeddings} tokens")
    return tok


def load_base(name, dtype, device, load_in_4bit=False, trust=False):
    """The causal language model `name` in `dtype`, or in nf4 with double quantisation."""
    kwargs = dict(device_map={"": device}, quantization_config=transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype)) if load_in_4bit else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust, **kwargs)
    except Exception as err:
        fail(f"--model {name}: cannot be loaded ({str(err).splitlines()[0]})")
    for module in model.modules():  # on a CPU a pass would repack 4-bit weights, after which training and merging break
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.to(device)


def add_adapter(model, rank, alpha, saved=None):
    """LoRA in fp32 on all linear layers but the head of a model that is frozen; a new one, or the one `saved` in a folder."""
    import peft
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.PeftModel.from_pretrained(model, saved, is_trainable=True) if saved else peft.get_peft_model(model, config)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    return model


def set_end(model, tok, end):
    """Generation stops at `end` too, and the generation config is one that transformers agrees to save."""
    g = model.generation_config
    ends = {end, *([g.eos_token_id] if isinstance(g.eos_token_id, int) else g.eos_token_id or [])}
    g.eos_token_id = sorted(ends) if len(ends) > 1 else end
    g.pad_token_id = next(i for i in (g.pad_token_id, tok.pad_token_id, end) if i is not None)
    g.do_sample = bool(g.do_sample or g.temperature or g.top_p or g.top_k)  # else settings of sampling are refused
    return model


def shard(model, dtype):
    """FSDP2: each process holds its part of the fp32 weights; a layer is gathered in `dtype` while it runs."""
    for module in (*model.base_model.layers, model):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    model.token_sums = partial(token_sums, model)
    register_fsdp_forward_method(model, "token_sums")
    return model.token_sums


# ---------------------------------------------------------------- 4., 5. loss and update
def token_sums(model, ids, trained):
    """ids [B, T], trained [B, T-1] -> [3], over the trained tokens: cross-entropy, how many are the argmax, how many."""
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = lm.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[trained]  # [N, D]
    targets, head = ids[:, 1:][trained], lm.get_output_embeddings()  # [N]

    def piece(h, t):
        logits = head(h).float()  # [n, V]
        right = (logits.detach().argmax(-1) == t).sum()
        return torch.stack([F.cross_entropy(logits, t, reduction="sum"), right, right.new_tensor(len(t))])
    n = max(1, HEAD_LOGITS // head.out_features)
    if len(targets) <= n:
        return piece(hidden, targets)
    return sum(checkpoint(piece, h, t, use_reentrant=False) for h, t in zip(hidden.split(n), targets.split(n)))


def total_sums(model, sums_of, rows, size, scale=None, stop=()):
    """-> sums [3] of the rows, in micro-batches, and the size of these that fits into memory; (None, size) when stopped. With
    `scale`, the weights also get the gradient of scale * cross-entropy."""
    rows = sorted(rows, key=lambda row: -len(row["ids"]))  # little padding, and memory runs out at once or never
    while True:
        try:
            total = 0
            for i in range(0, len(rows), size):
                sums = sums_of(rows[i:i + size])
                if scale is not None:
                    (sums[0] * scale).backward()
                total = total + sums.detach()
                if stop:
                    return None, size
            return total, size
        except torch.OutOfMemoryError:
            if size == 1 or hasattr(model, "unshard"):  # under FSDP the processes go in step
                raise
        model.zero_grad()  # out here, as the exception holds on to memory
        torch.cuda.empty_cache()
        size //= 2
        note(f"out of memory: once more with --micro_batch_size {size}")


def make_optimizers(model, args):
    """-> [(optimizer, its peak learning rate)]"""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_muon = [name for name, p in weights.items() if args.optim == "muon" and p.ndim == 2 and ".layers." in name]
    matrices, adam = [weights.pop(name) for name in of_muon], dict(betas=tuple(args.betas), weight_decay=args.weight_decay)
    if args.optim == "adamw8bit":
        import bitsandbytes
        return [(bitsandbytes.optim.AdamW8bit(weights.values(), args.lr, **adam), args.lr)]
    muon = [(torch.optim.Muon(matrices, args.muon_lr, args.weight_decay), args.muon_lr)] if matrices else []
    return [(torch.optim.AdamW(weights.values(), args.lr, fused=True, **adam), args.lr), *muon]


def lr_factor(step, steps, warmup):
    """(step + 1) / (warmup + 1) while that is below 1, then half a cosine from 1 to 0, reached after the last step."""
    done = (step - warmup) / (steps - warmup)
    return (step + 1) / (warmup + 1) if done < 0 else 0.5 * (1 + math.cos(math.pi * done))


# ---------------------------------------------------------------- 6. files
def seal(path):
    """Size and SHA-256 of a file, which is on the disk when this returns."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        return [os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()]


@contextmanager
def new_checkpoint(folder):
    """Gives a temporary folder to fill, which takes the name `folder` when it is whole and on the disk."""
    tmp = folder.with_name(f"tmp-{folder.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        yield tmp
        (tmp / "manifest.json").write_text(json.dumps({p.name: seal(p) for p in tmp.iterdir()}, indent=1))
        seal(tmp / "manifest.json")
    except Exception as err:  # a full disk, in the words of each library
        shutil.rmtree(tmp, ignore_errors=True)
        fail(f"cannot write {folder} ({err}): make room, then --resume; the checkpoints before it are whole")
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    tmp.rename(folder)


def is_whole(folder):
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all(seal(folder / name) == sealed for name, sealed in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def checkpoints(out):
    """[(step, folder)], oldest first, damaged ones too."""
    return sorted((int(p.name[11:]), p) for p in out.glob("checkpoint-*") if p.name[11:].isdecimal())


def find_checkpoint(args, out):
    """The checkpoint to go on from; None for a new run, which needs a folder without one. Flags must be as they were."""
    if not args.resume:
        if not args.overwrite and (checkpoints(out) or any((out / f"{f}.json").exists() for f in ("args", "config"))):
            fail(f"--output_dir {out}: holds a run; --resume goes on with it, --overwrite deletes it")
        return None
    for step, folder in reversed(checkpoints(out)):
        if is_whole(folder):
            break
        note(f"{folder} is damaged (a file is missing or not as it was written): using the one before it")
    else:
        fail(f"--resume: no whole checkpoint in {out}; start the run without --resume")
    then = json.loads((out / "args.json").read_text())
    changed = [f"--{k} was {then[k]} and is {v}" for k, v in vars(args).items() if k not in FREE and then.get(k, v) != v]
    if changed:
        fail(f"--resume: {', '.join(changed)}: give the flags of the run, or start another one with --model {folder}")
    return folder


def open_log(out, args, step):
    """Writes args.json and opens metrics.jsonl, less what a killed run logged after `step`. --overwrite clears the folder."""
    for pattern in ("checkpoint-*", "tmp-*", "merged", "*model*.safetensors*", "adapter_config.json") if args.overwrite else ():
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() and step else []
    kept = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    for path, text in (log, "".join(kept)), (out / "args.json", json.dumps(vars(args), indent=1)):
        path.with_name(f"tmp-{path.name}").write_text(text)
        path.with_name(f"tmp-{path.name}").replace(path)
    return open(log, "a", buffering=1)


def export(folder, args, out, dtype, tok, end):
    """The final model from the last checkpoint: a whole model in `dtype`, or the adapter and, with --merge, merged/."""
    tmp = out / "tmp-final"
    shutil.rmtree(tmp, ignore_errors=True)
    shutil.copytree(folder, tmp, ignore=shutil.ignore_patterns("trainer.pt", "manifest.json", "model*.safetensors*"))
    if not args.lora_rank:
        load_base(folder, dtype, torch.device("cpu"), trust=args.trust_remote_code).save_pretrained(tmp)
    if args.merge:  # into a base loaded afresh; 4 bits are dequantised, as merging into them costs 3 times the error
        import peft
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base = load_base(args.model, dtype, device, args.load_in_4bit, args.trust_remote_code)
        base = base.dequantize() if args.load_in_4bit else base
        merged = set_end(peft.PeftModel.from_pretrained(base, folder).merge_and_unload(), tok, end)
        merged.save_pretrained(tmp / "merged")
        tok.save_pretrained(tmp / "merged")
    shutil.copytree(tmp, out, dirs_exist_ok=True, copy_function=os.replace)
    shutil.rmtree(tmp)


# ---------------------------------------------------------------- the run
def train(args, argv):
    cuda, out = torch.cuda.is_available(), Path(args.output_dir)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if args.dtype == "bfloat16" or args.dtype == "auto" and cuda else torch.float32
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # the limit is for a save, when all wait for one; torchrun ends the others of a dead process
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    saved = [find_checkpoint(args, out) if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(saved)
    saved = saved[0]

    # 1. rows
    try:
        rows = [row for source in args.data for row in rewards.load_rows(source, "train")]
        held_out = [row for source in args.eval_data for row in rewards.load_rows(source, args.eval_split)]
        tok = tiny_tokenizer() if args.model == "tiny" else load_tokenizer(
            args.model, args.chat_template, args.max_length, args.trust_remote_code)
        end = end_token(tok)
        rows, held_out = (r and encode(tok, r, args.style, args.max_length, end) for r in (rows, held_out))
    except (rewards.DataError, jinja2.TemplateError) as err:
        fail(err)
    steps = args.steps or math.ceil(args.epochs * len(rows) / args.batch_size)

    # 2. the model
    torch.manual_seed(args.seed)
    at = torch.device("cpu") if args.fsdp else device
    if args.lora_rank:
        base = load_base(args.model, dtype, at, args.load_in_4bit, args.trust_remote_code)
        model = add_adapter(base, args.lora_rank, args.lora_alpha, saved)
    elif args.model == "tiny" and not saved:
        model = tiny_model(tok, args.seed).to(at)
    else:
        model = load_base(saved or args.model, torch.float32, at, trust=args.trust_remote_code)
    set_end(model, tok, end).train()
    if args.activation_checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)({"use_reentrant": False})
    forward = shard(model, dtype) if args.fsdp else partial(token_sums, model)
    optimizers, trained = make_optimizers(model, args), [p for p in model.parameters() if p.requires_grad]
    state = {"step": 0, "bad_steps": 0}
    if saved:
        state = torch.load(saved / "trainer.pt", weights_only=True, map_location="cpu")
        full_state.set_optimizer_state_dict(model, [o for o, _ in optimizers], state["optimizers"], options=FULL)
    first = step = last_saved = state["step"]
    bad_steps, size = state["bad_steps"], args.micro_batch_size

    def sums_of(batch):
        ids, mask = collate(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return forward(ids.to(device), mask.to(device))

    def save():
        weights = {"state_dict": full_state.get_model_state_dict(model, options=FULL)} if args.fsdp else {}
        optim = full_state.get_optimizer_state_dict(model, [o for o, _ in optimizers], options=FULL)
        if RANK == 0:
            with new_checkpoint(out / f"checkpoint-{step}") as folder:
                model.save_pretrained(folder, **weights)
                model.generation_config.save_pretrained(folder)
                tok.save_pretrained(folder)
                torch.save({"step": step, "bad_steps": bad_steps, "optimizers": optim}, folder / "trainer.pt")
            for _, old in [c for c in checkpoints(out) if c[0] <= step][:-args.keep]:
                shutil.rmtree(old)
        if WORLD > 1:
            dist.barrier()
        return step

    stop, begun, shown = [], time.perf_counter(), 0
    for s in (signal.SIGINT, signal.SIGTERM):  # the first is seen to after a micro-batch, the second ends the process at once
        signal.signal(s, lambda number, _: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    log = open_log(out, args, step) if RANK == 0 else open(os.devnull, "w")
    bar = tqdm(total=steps, initial=step, disable=None if RANK == 0 else True)  # None: no bar where there is no terminal
    while step < steps:
        # 3. the rows of this step, so that each process gets as many tokens
        started, places = time.perf_counter(), range(step * args.batch_size, (step + 1) * args.batch_size)
        batch = [rows[permutation(len(rows), args.seed, i // len(rows))[i % len(rows)]] for i in places]
        mine = sorted(batch, key=lambda row: -len(row["ids"]))[RANK::WORLD]
        n_tokens = sum(len(row["ids"]) - row["prompt"] for row in batch)
        torch.manual_seed(args.seed * 1_000_003 + step)  # for a model with dropout
        # 4. their gradient; FSDP takes the mean over the processes
        sums, size = total_sums(model, sums_of, mine, size, (WORLD if args.fsdp else 1) / n_tokens, stop if WORLD == 1 else ())
        if sums is None:
            break
        if WORLD > 1:
            for p in trained if not args.fsdp else ():
                dist.all_reduce(p.grad)
            dist.all_reduce(sums := torch.cat([sums, sums.new_tensor([len(stop)])]))
        loss, right, _, *stopped = sums.tolist()
        # 5. the update
        norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm or math.inf)
        norm = float(norm.full_tensor() if args.fsdp else norm)
        is_finite, factor = math.isfinite(loss) and math.isfinite(norm), lr_factor(step, steps, args.warmup)
        for optimizer, peak in optimizers if is_finite else ():
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        model.zero_grad()
        step, bad_steps = step + 1, 0 if is_finite else bad_steps + 1
        # 6. what is kept of it
        now, tokens = time.perf_counter(), sum(len(row["ids"]) for row in batch)
        entry = {"step": step, "loss": loss / n_tokens, "token_accuracy": right / n_tokens, "lr": args.lr * factor, "grad_norm": norm,
                 "skipped": int(not is_finite), "tokens": tokens, "tokens_per_s": tokens / (now - started),
                 "step_seconds": now - started, "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None}
        log.write(json.dumps({k: v if v is None or math.isfinite(v) else None for k, v in entry.items()}) + "\n")
        line = "loss {loss:.4f}  token accuracy {token_accuracy:.3f}  grad norm {grad_norm:.2f}  {tokens_per_s:.0f} tokens/s".format(**entry)
        bar.update()
        bar.set_postfix_str(line)
        if bar.disable and (now - shown > 10 or step == steps):
            shown = now
            note(f"step {step}/{steps}  {line}  {(now - begun) / (step - first) * (steps - step) / 60:.1f} min left")
        if bad_steps == BAD_STEPS:
            (out / "bad_rows.txt").write_text("\n\n".join(tok.decode(row["ids"]) for row in batch))
            fail(f"{bad_steps} updates in a row were not finite; the last one's rows are in {out / 'bad_rows.txt'}. --resume goes on "
                 "before them; where it happens again, start anew with a lower --lr or --dtype float32")
        if held_out and (step == steps or args.eval_every and step % args.eval_every == 0):
            model.eval()
            with torch.no_grad():
                (loss, right, n), size = total_sums(model, sums_of, held_out, size)
            model.train()
            scores = {"eval_loss": float(loss / n), "eval_token_accuracy": float(right / n), "eval_tokens": int(n)}
            log.write(json.dumps({"step": step, **scores}) + "\n")
            note(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        if step == steps or args.save_every and step % args.save_every == 0:
            last_saved = save()
        if any(stopped):
            break
    bar.close()
    if step < steps:
        if last_saved < step:
            save()
        launch = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}" if "RANK" in os.environ else "python"
        again = [a for a in argv if a not in ("--resume", "--overwrite")]
        note(f"stopped after step {step}; to go on: {launch} {shlex.join(['sft.py', *again, '--resume'])}")
        raise SystemExit(128 + (stop or [signal.SIGTERM])[0])
    if RANK == 0:
        export(out / f"checkpoint-{steps}", args, out, dtype, tok, end)
        note(f"the model is in {out}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        train(args, argv)
    except torch.OutOfMemoryError:
        fail("out of memory: add --activation_checkpointing, --lora_rank 32 or --load_in_4bit, or lower --max_length")
    except OSError as err:
        fail(f"{err}: checkpoints in {args.output_dir} are whole, and --resume goes on from the newest")


if __name__ == "__main__":
    main()
