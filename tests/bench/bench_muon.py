"""Milliseconds of a step of Muon on the matrices of a model: the scripts' own, in fp32, and PyTorch's, in bf16,
which make their steps in turn.

    python tests/bench/bench_muon.py
"""
import argparse
import statistics

import shapes
import torch

import sft

p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--shape", default="tiny", help="of the model; see shapes.py")
p.add_argument("--threads", type=int, default=2, help="on a CPU")
p.add_argument("--steps", type=int, default=11, help="of each; their median counts")
a = p.parse_args()

device, _ = shapes.use(a.threads)
model = shapes.make(a.shape, device, torch.float32)
matrices = [x for name, x in model.named_parameters() if x.ndim == 2 and ".layers." in name]
for matrix in matrices:
    matrix.grad = torch.randn_like(matrix)
optimizers = {"sft.py's, fp32": sft.Muon(matrices, {"lr": 1e-2}),
              "PyTorch's, bf16": torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0)}
seconds = {name: [] for name in optimizers}
for optimizer in optimizers.values():
    optimizer.step()                                            # the first makes the moments
for _ in range(a.steps):
    for name, optimizer in optimizers.items():
        seconds[name].append(shapes.once(optimizer.step))
for name, found in seconds.items():
    print(f"{name}: {statistics.median(found) * 1e3:.1f} ms, median of {a.steps}")
