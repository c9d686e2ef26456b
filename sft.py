"""Supervised fine-tuning: the cold start that teaches a language model the form of an answer, before GRPO.

 1. A row becomes a chat prompt, by the model's chat template, and its worked completion (rewards.py) with the
    token that ends a turn. They are tokenised apart: a sampler starts from the ids of the prompt alone.
 2. Draw the next rows, in shuffled epochs, and split them into micro-batches of similar length.
 3. Cross-entropy of the completions' tokens, end token included, over one token count for the whole batch:
    neither micro-batches nor processes change the gradient.
 4. Clip the gradient, update the fp32 masters, round the weights from them. What is not finite is skipped.
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
import resource
import shlex
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from inspect import signature
from pathlib import Path

import rewards


# ------------------------------------------------ flags; down to FLOAT grpo.py has the same text
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
    add("--optim", choices=["adamw", "adamw8bit", "paged_adamw8bit", "muon"],
        help="8bit: 2 bytes of moments a parameter, not 8; paged: on the CPU if need be; muon: orthogonal "
             "steps of the layers' matrices; None: 8bit on a GPU")
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
    add("--output_dir", default="runs/sft", help="final model, checkpoints, logs")
    add("--save_every", type=NATURAL, default=500, help="steps between checkpoints; 0: only when stopped")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir, if any")
    add("--seed", type=NATURAL, default=0, help="of the data order and new weights")
    with expect("flags"):                                       # a flag file: an open quote, no UTF-8
        return parser.parse_args(argv)

ARGS = parse_args() if __name__ == "__main__" else None         # --help does not wait for these imports
import numpy as np
import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from tqdm import tqdm
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
STOP = []                       # the signals that asked this process to stop
LOGS = ("metrics.jsonl",)
MAY_CHANGE = {"resume", "output_dir", "save_every", "micro_batch_size", "merge", "fsdp",
              "activation_checkpointing", "eval_data", "eval_every"}  # at --resume: they change no update
UNFIT = {"cpmant", "llama4", "llama4_text", "modernbert-decoder", "moshi", "phimoe", "trocr"}  # tried: wrong
transformers.utils.logging.disable_progress_bar()


# ----------------------------------------------------------------------------------------- rows
def encode(rows, tokenizer, args):
    """Rows -> (inputs [T], targets [T]) of each: ids of prompt and completion, and after each the next one,
    the end token at last; -100, which no loss counts, in the prompt. Longer rows are left out."""
    prompts = render(tokenizer, [rewards.messages(row["task"], row, args.style) for row in rows])
    texts = [rewards.worked_completion(row["task"], row, args.style).removeprefix(
        rewards.opening(prompt, args.style)) for row, prompt in zip(rows, prompts)]
    prompts, completions = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (prompts, texts))
    end = end_ids(tokenizer, transformers.GenerationConfig())[:1]
    if not end:
        raise ValueError("no end token: neither its chat template nor its tokenizer has one")
    encoded = [(torch.tensor(p + c), torch.tensor([-100] * (len(p) - 1) + c + end))
               for p, c in zip(prompts, completions) if len(p + c) < args.max_length]
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
                "<|{{ m.role }}|>{{ m.content.split('\n\n')[-1] if m.role == 'user' else m.content }}<|end|>"
                "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
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

class Muon(torch.optim.AdamW):
    """AdamW; all matrices but embeddings and head, each expert's too, take orthogonal steps at 10 / 3 of its
    rate (Muon, kellerjordan.github.io/posts/muon). In fp32: PyTorch's own, in bf16, is slow on CPUs."""
    def __init__(self, model, trained, lr):
        tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        tables = {id(module.weight) for module in (*tables, model.get_output_embeddings()) if module}
        self.matrices = [m for p, m in trained.values() if m.ndim > 1 and id(p) not in tables]
        others = [m for p, m in trained.values() if m.ndim < 2 or id(p) in tables]
        super().__init__([{"params": others}, {"params": self.matrices}], lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def step(self):
        for p in self.matrices:
            state = self.state[p] or {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            self.state[p] = state                               # AdamW looks for "step" when it is loaded
            momentum = state["momentum"].lerp_(p.grad, 0.05)
            x, ratio = p.grad.lerp(momentum, 0.95), p.size(-2) / p.size(-1)
            x = x.mT if ratio > 1 else x
            x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
            for _ in range(5):                                  # Newton-Schulz: singular values to about 1
                gram = x @ x.mT
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
            rate = self.param_groups[0]["lr"] * 10 / 3 * max(1, ratio) ** 0.5
            p.sub_(x.mT if ratio > 1 else x, alpha=rate)
            p.grad = None                                       # AdamW leaves it as it is
        super().step()


# ----------------------------------------------------------------------------------------- the loop
def train(args):
    device, dtype = start_processes(args)
    # 1. Rows of ids.
    rows, held_out = ([row for source in sources for row in rewards.load_rows(source, split)]
                      for sources, split in ((args.data, "train"), (args.eval_data, "val")))
    with expect(f"--model {args.model}"):
        tiny = args.model == "tiny"
        if tiny and args.lora_rank:
            fail("--lora_rank: an adapter of --model tiny would have no base to load")
        tokenizer = tiny_tokenizer() if tiny else load_tokenizer(args.model, args.style)
        data, held_out = (encode(x, tokenizer, args) if x else [] for x in (rows, held_out))
        if not data:
            fail(f"--max_length {args.max_length}: every row is longer")
        if not tiny:
            ids = [x.tolist() for row in data + held_out for x in row]          # the end token is a target
            check_model(args.model, ids, 0, not args.lora_rank)
    steps = args.steps or math.ceil(args.epochs * len(data) / args.batch_size)
    epochs = range(math.ceil(steps * args.batch_size / len(data)))
    order = np.concatenate([np.random.default_rng([args.seed, i]).permutation(len(data)) for i in epochs])
    args.data_crc = zlib.crc32(repr(rows).encode())             # --resume is to find the same rows
    state = open_run(args, parse_args([]))
    with expect(f"--model {args.model}"):
        name = args.model
        if base_of(name) != name:                               # an adapter: the next one stands on this
            name = write_merged(name, f"{args.output_dir}/base", args, tokenizer, keep=bool(state))
        lm = tiny_model(tokenizer, args.seed).to(device, dtype) if tiny else None
        policy, lm = load_policy(name, args, device, dtype, lm)
        trained = fp32_masters(policy)
        optimizer = Muon(lm, trained, args.lr) if args.optim == "muon" else make_optimizer(trained, args)
    lm.generation_config.eos_token_id = end_ids(tokenizer, lm.generation_config)    # it stops at a turn's end
    done = {"step": 0}
    if state:
        restore(trained, optimizer, state)
        done = state["done"]
    n, of = (sum(p.numel() for p in x) / 1e6 for x in ((p for p, _ in trained.values()), lm.parameters()))
    note(f"{args.model}: {n:,.1f} of {of:,.1f} M parameters trained; {len(data):,} rows, {args.batch_size} a "
         f"step; {device}, {args.dtype}")

    def save_model(folder, weights):
        """A whole model in the dtype of compute, or an adapter. Under FSDP `weights` were gathered."""
        if args.fsdp:
            lm.save_pretrained(folder, state_dict={key: x.to(dtype) for key, x in weights.items()})
            lm.config.dtype = dtype
            lm.config.save_pretrained(folder)
        else:
            policy.save_pretrained(folder)
        lm.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def forward(inputs, targets):
        """-> [3] sums over the completions' tokens: cross-entropy, 1 where a token is the likeliest, 1."""
        inputs, targets = inputs.to(device), targets.to(device).flatten()
        logits = policy(input_ids=inputs, use_cache=False).logits.flatten(0, 1)     # [n * T, V]
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return torch.stack([loss, (logits.argmax(-1) == targets).sum(), (targets >= 0).sum()])

    def evaluate(step):
        policy.eval()
        with torch.no_grad():
            batches = progress(list(make_batches(held_out, args.micro_batch_size)), "evaluation", args.fsdp)
            sums = sum(forward(*batch).double() for batch in batches)
        loss, right, n = sum(gather(sums.cpu())).tolist()
        policy.train()
        found = {"step": step, "eval_loss": loss / n, "eval_token_accuracy": right / n, "eval_tokens": int(n)}
        append(Path(args.output_dir) / "metrics.jsonl", [found])
        note(f"step {step}/{steps}  held-out: loss {loss / n:.4f}  accuracy {right / n:.3f}")

    policy.train()
    bar = tqdm(range(done["step"] + 1, steps + 1), "step", initial=done["step"], total=steps,
               disable=RANK > 0 or not sys.stderr.isatty())
    try:
        for step in bar:
            started = time.perf_counter()
            past = (step - 1 - args.warmup) / max(1, steps - args.warmup)
            factor = step / args.warmup if past < 0 else (1 + math.cos(math.pi * past)) / 2
            torch.manual_seed(args.seed * 1_000_003 + step)     # for models with dropout
            # 2. Draw rows.
            rows = [data[i] for i in order[(step - 1) * args.batch_size:step * args.batch_size]]
            num_tokens = sum(int((targets >= 0).sum()) for _, targets in rows)
            sums = torch.zeros(3, dtype=torch.float64)
            for batch in progress(list(make_batches(rows, args.micro_batch_size)), "update", args.fsdp):
                # 3. Loss and its gradient. FSDP takes the mean over the processes.
                part = forward(*batch)
                (part[0] * (WORLD if args.fsdp else 1) / num_tokens).backward()
                sums += part.detach().double().cpu()
            shares, signals = zip(*gather((sums, STOP)))
            if any(signals):                                    # this step is left undone, on all ranks
                raise KeyboardInterrupt(max(signals)[0])
            loss, right, _ = sum(shares).tolist()
            # 4. Clip the gradient and update the weights.
            norm = update(trained, optimizer, factor, args, usable=math.isfinite(loss))

            # 5. Log, evaluate, save.
            done, skipped = {"step": step}, not math.isfinite(loss + norm)
            seconds, tokens = time.perf_counter() - started, sum(len(inputs) + 1 for inputs, _ in rows)
            metrics = {"step": step, "loss": loss / num_tokens, "token_accuracy": right / num_tokens,
                       "lr": args.lr * factor, "grad_norm": norm, "skipped": int(skipped), "tokens": tokens,
                       "tokens_per_s": tokens / seconds, "step_seconds": seconds,
                       "peak_memory_gb": peak_memory()}
            append(Path(args.output_dir) / "metrics.jsonl", [metrics])
            line = "loss {loss:.4f}  accuracy {token_accuracy:.3f}  {tokens_per_s:.0f} tokens/s"
            report(bar, metrics, line)
            if skipped:
                note(f"warning: the gradient of step {step} is not finite and was not used; lower --lr")
            if held_out and (step == steps or args.eval_every and step % args.eval_every == 0):
                evaluate(step)
            if args.save_every and step % args.save_every == 0:
                save_checkpoint(args, done, trained, optimizer, save_model)
    except KeyboardInterrupt as stopped:
        if done["step"]:
            save_checkpoint(args, done, trained, optimizer, save_model)
        gather(0)                                               # torchrun ends all processes when one leaves
        note(f"stopped after step {done['step']} of {steps}: add --resume to the command to continue")
        raise SystemExit(128 + stopped.args[0]) from None
    weights = {key: whole(x) for key, (_, x) in trained.items()}        # collective
    if RANK == 0:
        save_model(args.output_dir, weights)
    if args.merge:
        write_merged(args.output_dir, f"{args.output_dir}/merged", args, tokenizer)
    note(f"wrote {args.output_dir}: next, python grpo.py --model {args.output_dir} --data ...")

def main(argv=None):
    args = ARGS or parse_args(argv)
    try:
        train(args)
        if WORLD > 1:
            dist.destroy_process_group()
    except torch.OutOfMemoryError:
        fail("out of GPU memory: a smaller --micro_batch_size, then --optim paged_adamw8bit, --lora_rank 32 "
             "or --load_in_4bit; add --resume")
    except (rewards.DataError, ImportError, OSError) as err:    # a full disk, most of all
        fail(err)


# ------------------------------------------------------- what grpo.py has too: the same text stands there
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

if __name__ == "__main__":
    main()
