"""Rows for the recipe of RLHF, out of a text of short stories: one paragraph a line.

    python configs/rlhf/make_data.py stories.txt                         # rows for supervised tuning, and prompts
    python configs/rlhf/make_data.py stories.txt --run runs/rlhf/sft     # then pairs of that run's own answers

A prompt is the first sentence of a paragraph, the answer the next two. No person has compared answers here: a program
stands in, which likes cheerful words and dislikes gloomy ones. So what the recipe should do can be counted. Same rows
each time, from the same text and run. Everything lies in runs/rlhf-data afterwards.
"""

import argparse
import json
import random
import re
from pathlib import Path

OUT = Path("runs/rlhf-data")
TRAIN, EVAL, PAIRS = 4000, 256, 3000
CHEERFUL = set("happy smile smiled laugh laughed love loved fun play played friend friends hug hugged thank".split())
GLOOMY = set("sad cry cried crying scared afraid angry mad hurt lost alone bad mean sorry".split())


def cheer(text):
    """Return cheerful words less gloomy ones."""
    words = re.findall(r"[a-z]+", text.lower())
    return sum(w in CHEERFUL for w in words) - sum(w in GLOOMY for w in words)


def rows(text):
    """Yield a prompt and its completion for each paragraph that is long enough."""
    for paragraph in text.splitlines():
        sentences = re.findall(r"[^.!?]+[.!?]+\"?", paragraph)
        if len(sentences) < 3 or len(sentences[0].split()) > 16 or len("".join(sentences[1:3]).split()) > 30:
            continue
        yield {"prompt": sentences[0].strip(), "completion": "".join(sentences[1:3]).strip()}


def write(name, made):
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / name).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    print(f"{OUT / name}: {len(made):,} rows")


def compared(run, prompts, seed):
    """Draw two answers to each prompt, and put the more cheerful one first; leave out what is as cheerful."""
    import jaxft

    model, tokenizer = jaxft.load(run)
    answers = []
    for i in range(0, len(prompts), 100):
        for n in (0, 1):
            given = prompts[i : i + 100]
            drawn = jaxft.generate(model, tokenizer, given, max_new_tokens=64, temperature=1.0, seed=seed + 2 * i + n)
            answers.append(drawn)
    one, two = ([a for part in answers[n::2] for a in part] for n in (0, 1))
    for prompt, pair in zip(prompts, zip(one, two, strict=True), strict=True):
        worse, better = sorted((answer.strip() for answer in pair), key=cheer)
        if cheer(better) > cheer(worse) and worse:
            yield {"prompt": prompt, "chosen": better, "rejected": worse}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("stories", type=Path)
    parser.add_argument("--run", help="a finished run of supervised tuning: make pairs of its answers")
    args = parser.parse_args()
    made = list({row["prompt"]: row for row in rows(args.stories.read_text(encoding="utf-8"))}.values())
    random.Random(0).shuffle(made)
    held, train = made[:EVAL], made[EVAL : EVAL + TRAIN]
    if args.run is None:
        write("sft.jsonl", train)
        write("sft-eval.jsonl", held)
        write("prompts.jsonl", [{"prompt": row["prompt"]} for row in train])
        write("prompts-eval.jsonl", [{"prompt": row["prompt"]} for row in held])
        return
    write("pairs.jsonl", list(compared(args.run, [row["prompt"] for row in train[:PAIRS]], 1)))
    write("pairs-eval.jsonl", list(compared(args.run, [row["prompt"] for row in held], 0)))


if __name__ == "__main__":
    main()
