"""Supervised fine-tuning: the cold start that teaches a model the form of an answer, before GRPO improves the answers.

1. Rows become a chat prompt, by the model's chat template, and a completion, `<reasoning>...</reasoning><answer>...</answer>`
   and the token that ends a turn, encoded apart: a sampler that starts from the prompt's ids meets what was trained.
2. The model is any causal LM of transformers, or `--model tiny`, a Llama of 0.5 M parameters made here. All of it is trained,
   or LoRA (--lora_rank), or LoRA on a 4-bit base (--load_in_4bit); the optimiser works on fp32 masters.
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
import math
import random
import re
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import rewards
from models import (Optimizer, base_lm, fitting, learning_rate, load_lm, load_policy, load_tokenizer, peak_memory_gb, prepare,
                    prompt_ids, refresh)
from runs import (BAD_STEPS, RANK, WORLD, Flags, Stop, add_training_flags, check_flags, check_training_flags, fail,
                  gather, go_on_from, leave, logger, move_in, note, one_line, open_folder, passes,
                  read_state, save_checkpoint, start_processes)

FREE = {"resume", "overwrite", "output_dir", "save_every", "keep", "merge", "eval_data", "eval_split", "eval_every",
        "micro_batch_size", "activation_checkpointing", "fsdp", "log_to"}     # what a resumed run may change: not what it learns


# ------------------------------------------------------------------------------------------- options
def parse_args(argv):
    p = Flags("sft.py", __doc__)
    add = p.group("task and data")
    add("--model", default="tiny", help="`tiny`, a folder or a hub id")
    add("--data", nargs="+", default=["countdown"], metavar="SOURCE",
        help="TASK[=PATH][:N], mixed: countdown, gsm8k=my/folder, math=AI-MO/NuminaMath-CoT:20000")
    add("--style", choices=rewards.STYLES, default="reasoning", help="name of the reasoning tag")
    add("--max_length", type=int, default=1024, help="tokens of prompt and completion; longer rows are left out")
    add("--steps", type=int, help="updates; without it --epochs counts")
    add("--epochs", type=float, default=1.0, help="passes over the data")
    add("--batch_size", type=int, default=32, help="rows an update, over all processes")
    add("--eval_data", nargs="+", default=[], metavar="SOURCE", help="held-out rows, for loss and token accuracy")
    add("--eval_split", choices=["val", "test", "train"], default="val", help="of --eval_data")
    add("--eval_every", type=int, default=0, help="steps; 0: at the end only")
    add_training_flags(p, lr=None, warmup=0, lr_schedule="cosine", muon_lr=1e-2, save_every=500)
    a = p.parse_args(argv)
    check_training_flags(a)
    check_flags(a, dict(max_length=2, eval_every=0, steps=1, epochs=0, batch_size=1), (
        *((getattr(a, name) == 0, f"--{name} 0: must be above 0") for name in ("lr", "muon_lr", "epochs")),
        (a.steps and a.warmup >= a.steps, f"--warmup {a.warmup}: must be below --steps, {a.steps}"),
        (a.batch_size % WORLD, f"--batch_size {a.batch_size}: must be a multiple of the {WORLD} processes"),
        (a.lora_rank and a.model == "tiny", "--lora_rank: a new `--model tiny` has no base to adapt; leave it out")))
    a.lr = a.lr or (3e-3 if a.model == "tiny" else 2e-4 if a.lora_rank else 1e-5)
    return a


# ------------------------------------------------------------------------------------------- 1. rows
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
    prompts = prompt_ids(tok, rows, style)
    texts = tok([completion(row["task"], row, style) for row in rows], add_special_tokens=False)["input_ids"]
    encoded = [{"ids": torch.tensor(p + t + [end]), "prompt": len(p)} for p, t in zip(prompts, texts)]
    kept = [row for row in encoded if len(row["ids"]) <= max_length]
    if len(kept) < len(rows):
        note(f"{len(rows) - len(kept)} of {len(rows)} rows are longer than --max_length {max_length}: left out")
    return kept or fail(f"--max_length {max_length}: every row is longer")


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def rows_of_step(rows, step, batch_size, seed):
    """The rows of update `step`, counted from 1: the next ones of an endless order in which every row comes once an epoch."""
    places = range((step - 1) * batch_size, step * batch_size)
    return [rows[permutation(len(rows), seed, i // len(rows))[i % len(rows)]] for i in places]


def micro_batches(rows, size):
    """-> (ids [n, L], prompt_lengths [n], mask [n, T], 1 on the completions' tokens) for `size` rows at a time. Masks go by lengths,
    as pad and end may be the same token. Longest first: memory runs out at once or never; then, rows that begin alike are neighbours."""
    rows = sorted(rows, key=lambda row: -len(row["ids"]))
    parts = [sorted(rows[at:at + size], key=lambda row: row["ids"].tolist()) for at in range(0, len(rows), size)]
    return [(pad_sequence([row["ids"] for row in part], batch_first=True), torch.tensor([row["prompt"] for row in part]),
             pad_sequence([torch.ones(len(row["ids"]) - row["prompt"]) for row in part], batch_first=True)) for part in parts]


# ------------------------------------------------------------------------------------------- 2. the model
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


def set_end(model, tok, end):
    """Generation stops at `end` too, and the generation config is one that transformers agrees to save."""
    g = model.generation_config
    ends = {end, *([g.eos_token_id] if isinstance(g.eos_token_id, int) else g.eos_token_id or [])}
    g.eos_token_id = sorted(ends) if len(ends) > 1 else end
    g.pad_token_id = next(i for i in (g.pad_token_id, tok.pad_token_id, end) if i is not None)
    g.do_sample = bool(g.do_sample or g.temperature or g.top_p or g.top_k)  # else settings of sampling are refused
    return model


# ------------------------------------------------------------------------------------------- 3., 4. loss
def sums(logps, optimizer, rows, device, args, scale=None, stop=None):
    """-> [3] over this process's share of the rows: cross-entropy of the completions, how many of their tokens are the likeliest,
    how many there are. With `scale`, the weights also get the gradient of scale * cross-entropy. Where the GPU's memory is too
    small, all of it is done again in smaller micro-batches."""
    spare = {**rows[0], "prompt": len(rows[0]["ids"])}          # has no completion: with it, all processes get as many rows
    mine = sorted(rows + [spare] * (-len(rows) % WORLD), key=lambda row: -len(row["ids"]))[RANK::WORLD]
    total = torch.zeros(3, dtype=torch.float64, device=device)

    def one(batch):
        ids, prompt_lengths, mask = (x.to(device) for x in batch)
        logp, hit = logps(ids, prompt_lengths, mask, extra="hit")                                  # [n, T]; 0 where mask is
        if scale is not None:
            (-logp.sum() * scale).backward()
        total.add_(torch.stack([-logp.detach().sum(), hit.sum(), mask.sum()]))

    def attempt(size):
        total.zero_()
        optimizer.zero_grad()
        passes(micro_batches(mine, size), one, stop, args.fsdp)

    size = args.micro_batch_size                                # under fsdp too little memory needs a new start: see one_line
    _, args.micro_batch_size = fitting(attempt, size, "--micro_batch_size {}".format, least=size if args.fsdp else 1)
    return total.cpu()


# ------------------------------------------------------------------------------------------- the run
LINE = "step {step}/{steps}  loss {loss:.4f}  accuracy {token_accuracy:.3f}  grad {grad_norm:.2f}  {tokens_per_s:.0f} tokens/s  {left} left"


def train(args, argv):
    device, dtype = start_processes(args.dtype)
    # 1. rows
    if "countdown" in args.data and not Path("data/countdown").exists():
        fail("--data countdown: there is no data/countdown yet; `python countdown.py --out data/countdown` makes it")
    rows = [row for source in args.data for row in rewards.load_rows(source, "train")]
    held_out = [row for source in args.eval_data for row in rewards.load_rows(source, args.eval_split)]
    if args.model == "tiny":
        tok, context = tiny_tokenizer(), 2048
    else:
        tok, _, context = load_tokenizer(args.model, args.chat_template, args.trust_remote_code, train=True)
    if args.max_length > context:
        fail(f"--max_length {args.max_length}: the context of {args.model} is {context} tokens")
    end = end_token(tok)
    rows, held_out = (of and encode(tok, of, args.style, args.max_length, end) for of in (rows, held_out))
    steps = args.steps or math.ceil(args.epochs * len(rows) / args.batch_size)
    folder = go_on_from(args, FREE)

    # 2. the model
    def load(device, dtype):
        lm = tiny_model(tok, args.seed).to(device, dtype) if args.model == "tiny" else \
            load_lm(args.model, device, dtype, trust_remote_code=args.trust_remote_code)
        return set_end(lm, tok, end)

    if args.model == "tiny":
        model = load(device, torch.float32 if args.fsdp else dtype)
    else:
        model = load_policy(args, device, dtype)
    set_end(base_lm(model), tok, end)
    plain = load(torch.device("cpu"), dtype) if args.fsdp and RANK == 0 else None if args.fsdp else model
    logps, optimizer = prepare(model, args, dtype), Optimizer(model, args)
    done, bad, saved, stop = 0, 0, -1, Stop()
    if folder:
        state = read_state(folder)
        done, bad, saved = state["step"], state["bad_steps"], state["step"]
        optimizer.load_state(state)
        del state
    if RANK == 0:
        open_folder(args, folder)                               # a model that does not load costs no run its folder
    log = logger(args)

    def save_model(to):
        plain.save_pretrained(to)
        tok.save_pretrained(to)
        base_lm(plain).generation_config.save_pretrained(to)

    def save():
        refresh(plain, model)
        state = optimizer.state() | {"step": done, "bad_steps": bad}
        if RANK == 0:
            save_checkpoint(args.output_dir, done, args.keep, lambda to: (save_model(to), torch.save(state, to / "trainer.pt")))
        gather(0)
        return done

    def evaluate():
        model.eval()
        with torch.no_grad():
            loss, right, n = sum(gather(sums(logps, optimizer, held_out, device, args, stop=stop))).tolist()
        model.train()
        log({"step": done, "eval_loss": loss / n, "eval_token_accuracy": right / n, "eval_tokens": int(n)})
        note(f"step {done}/{steps}  held-out: loss {loss / n:.4f}  accuracy {right / n:.3f}")

    model.train()
    begun, first, shown = time.perf_counter(), done, 0
    bar = tqdm(total=steps, initial=done, bar_format="{desc} {bar}", disable=RANK > 0 or not sys.stderr.isatty())
    with stop:
        try:
            while True:
                if held_out and done and (done == steps or args.eval_every and done % args.eval_every == 0):
                    evaluate()
                stop.check(everywhere=True)
                if done == steps:
                    break
                metrics = train_step(rows, logps, optimizer, device, args, done + 1, steps, stop)
                done, bad = done + 1, bad + 1 if metrics["skipped"] else 0
                log(metrics)
                now = time.perf_counter()
                left = tqdm.format_interval((now - begun) / (done - first) * (steps - done))
                line = LINE.format_map(metrics | {"steps": steps, "left": left})
                bar.set_description_str(line, refresh=False)
                bar.update()
                if bar.disable and (now - shown > 10 or done == steps):             # no terminal: a line each ten seconds
                    shown = now
                    note(line)
                if bad == BAD_STEPS:
                    file, batch = Path(args.output_dir) / "bad_rows.txt", rows_of_step(rows, done, args.batch_size, args.seed)
                    if RANK == 0:
                        file.write_text("\n\n".join(tok.decode(row["ids"]) for row in batch))
                    gather(0)
                    fail(f"{bad} updates in a row were not finite; the last one's rows are in {file}. --resume goes on before them; "
                         "where it happens again, start anew with a lower --lr or --dtype float32")
                if done == steps or args.save_every and done % args.save_every == 0:
                    saved = save()
        except KeyboardInterrupt as stopped:
            bar.close()
            if saved < done:
                save()
            leave(stopped, done, steps, argv)
        finally:
            bar.close()
    refresh(plain, model)
    if RANK == 0:
        tmp = Path(args.output_dir) / "tmp-final"
        save_model(tmp)
        if args.merge:
            merged = load(device, dtype)
            refresh(merged, model)
            merged.save_pretrained(tmp / "merged")
            tok.save_pretrained(tmp / "merged")
        move_in(tmp, args.output_dir)
        note(f"the model is in {args.output_dir}")


def train_step(rows, logps, optimizer, device, args, step, steps, stop):
    """One update -> its metrics. A stop before the update leaves the run as it was."""
    start, batch = time.perf_counter(), rows_of_step(rows, step, args.batch_size, args.seed)                                  # 3
    n_tokens = sum(len(row["ids"]) - row["prompt"] for row in batch)
    torch.manual_seed(args.seed * 1_000_003 + step)             # for a model with dropout
    scale = (WORLD if args.fsdp else 1) / n_tokens              # fsdp takes the mean over the processes
    share = sums(logps, optimizer, batch, device, args, scale, stop)                                                  # 4
    if not args.fsdp:
        optimizer.reduce()
    loss, right, _ = sum(gather(share)).tolist()
    factor = learning_rate(step, steps, args.warmup, args.lr_schedule)
    norm = optimizer.step(factor, skip=not math.isfinite(loss))                                                       # 5
    seconds, tokens = time.perf_counter() - start, sum(len(row["ids"]) for row in batch)
    return {"step": step, "loss": loss / n_tokens, "token_accuracy": right / n_tokens, "lr": args.lr * factor,        # 6
            "grad_norm": norm, "skipped": int(not math.isfinite(norm + loss)), "tokens": tokens, "tokens_per_s": tokens / seconds,
            "step_seconds": seconds, "peak_memory_gb": peak_memory_gb()}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with one_line(args):
        train(args, argv)


if __name__ == "__main__":
    main()
