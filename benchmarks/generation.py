"""Tokens/s of greedy generation, jaxft beside `transformers.generate`, on a CPU; the tokens must be the same.

    JAX_PLATFORMS=cpu python benchmarks/generation.py MODEL PROMPTS.jsonl [--new 128] [--rounds 7]     (needs torch)

MODEL is the folder of a causal language model, PROMPTS.jsonl rows with a `prompt`. Both sides run in this process on
the same prompts of several lengths, one after the other in every round, float32, with their caches; no token stops a
row. Printed: the median of tokens/s of both, and the ratio (jaxft over the peer) with its range over the rounds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers

import jaxft


def timed(call):
    began = time.perf_counter()
    made = call()
    return time.perf_counter() - began, made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    ours, tokenizer = jaxft.load(args.model, dtype="float32")
    peer = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    peer.generation_config.eos_token_id = None
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    for rows in (16, 1):
        prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines[:rows]]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

        def theirs(ids=ids, mask=mask, width=width):
            with torch.no_grad():
                made = peer.generate(
                    ids, attention_mask=mask, max_new_tokens=args.new, do_sample=False, pad_token_id=0, use_cache=True
                )
            return made[:, width:].tolist()

        def mine(prompts=prompts):
            return jaxft.generate_ids(ours, prompts, max_new_tokens=args.new, stop_ids=())

        same = mine() == theirs()  # and both are warm
        seconds = [(timed(mine)[0], timed(theirs)[0]) for _ in range(args.rounds)]
        ratios = [b / a for a, b in seconds]
        speeds = [rows * args.new / statistics.median(side) for side in zip(*seconds, strict=True)]
        print(
            f"batch {rows}: jaxft {speeds[0]:,.0f} tokens/s, transformers {speeds[1]:,.0f}, ratio "
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}), tokens the same: {same}"
        )


if __name__ == "__main__":
    main()
