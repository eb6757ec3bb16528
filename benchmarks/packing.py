"""How much of a batch is rows and not padding, packed and not, on lognormal lengths: packing.py [ROWS]"""

import sys
import time

import numpy as np

from jaxft.data import Dataset, PackedBatches, TrainBatches, pack
from jaxft.data.tokens import example

ROWS = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
print("| lengths | mean | pack | padded by rows of like length | packed in windows | all rows at once | s of that |")
print("|---|---|---|---|---|---|---|")
for mean, spread, limit in ((4.5, 0.6, 1024), (5.5, 0.8, 2048), (6.0, 1.0, 4096)):
    lengths = np.random.default_rng(0).lognormal(mean, spread, ROWS).astype(int).clip(2, limit).tolist()
    data = [Dataset([example([1] * n, [True] * n) for n in lengths])]
    padded = TrainBatches(data, batch_size=8, steps=100)
    batches = [padded[n]["attention_mask"] for n in range(100)]
    bare = sum(int(mask.sum()) for mask in batches) / sum(mask.size for mask in batches)
    began = time.perf_counter()
    whole = sum(lengths) / (len(pack(lengths, limit)) * limit)
    seconds = time.perf_counter() - began
    packed = PackedBatches(data, batch_size=8, length=limit).filled
    law = f"lognormal({mean}, {spread})"
    print(f"| {law} | {np.mean(lengths):.0f} | {limit} | {bare:.3f} | {packed:.4f} | {whole:.4f} | {seconds:.2f} |")
