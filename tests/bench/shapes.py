"""What the benchmarks share: models of the true shapes with random weights, and the machine's peak rates.
Import it before torch: it says how threads wait."""
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")             # threads that spin stall a shared machine
import torch  # noqa: E402
import transformers  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# hidden size, MLP size, layers, heads, key-value heads, vocabulary, tied embeddings
SHAPES = {"tiny": (128, 256, 3, 4, 4, 361, True), "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
          "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
          "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
          "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
          "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
          "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, False)}


def use(threads):
    """-> the device to measure on and its dtype; on a CPU with this many threads."""
    torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32


def make(shape, device, dtype):
    """A causal LM with random weights, in eval mode. It has no end token."""
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    kind = transformers.Qwen2Config if "qwen" in shape else transformers.LlamaConfig
    config = kind(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                  num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
                  tie_word_embeddings=tied, max_position_embeddings=32768,
                  initializer_range=0.08 if shape == "tiny" else 0.02,
                  bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save(shape, folder, device, dtype):
    """The same as a checkpoint, with the tokenizer of sft.py's tiny model, for which a letter is a token."""
    import sft
    make(shape, device, dtype).save_pretrained(folder)
    sft.tiny_tokenizer().save_pretrained(folder)


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def once(run):
    """Seconds that run() takes."""
    sync()
    start = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - start


def seconds(run):
    """Median of five, after one that does not count."""
    once(run)
    return statistics.median(once(run) for _ in range(5))


def peaks(device, dtype):
    """-> measured bytes/s of a copy (reads and writes), FLOP/s of a matrix product."""
    gpu = torch.device(device).type == "cuda"
    source = torch.zeros((2 ** 32 if gpu else 2 ** 28) // dtype.itemsize, dtype=dtype, device=device)
    target, n = torch.empty_like(source), 8192 if gpu else 1024
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    left, right = torch.randn(2, n, n, dtype=dtype, device=device)
    return bandwidth, 2 * n ** 3 / seconds(lambda: left @ right)


def machine(device, bandwidth, rate):
    """One line on the machine."""
    gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    return (f"{name}, torch {torch.__version__}, transformers {transformers.__version__}: "
            f"copies {bandwidth / 1e9:,.0f} GB/s, matrix products {rate / 1e12:,.2f} TFLOP/s")


def limit(model, starts, lengths, steps, bandwidth, rate):
    """The least seconds in which `steps` steps decode lengths[i] tokens after starts[i] tokens in row i. The
    larger of two times: each step reads the weights, and the keys and values of the rows alive, once; each
    token costs 2 FLOPs per parameter and those of its attention."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size, itemsize = sum(x.numel() for x in model.parameters()), model.dtype.itemsize
    if not config.tie_word_embeddings:
        size -= model.get_input_embeddings().weight.numel()     # of which a step reads a few rows
    layers = config.num_hidden_layers
    seen = sum(start * n + n * (n + 1) / 2 for start, n in zip(starts, lengths, strict=True))
    cached = seen * 2 * layers * config.num_key_value_heads * head
    flops = 2 * size * sum(lengths) + 4 * layers * config.num_attention_heads * head * seen
    return max((steps * size + cached) * itemsize / bandwidth, flops / rate)
