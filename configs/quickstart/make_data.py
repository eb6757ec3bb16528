"""The quickstart's rows, tokenizer and shape: python configs/quickstart/make_data.py

What the base model learns are bare lines such as `reverse: stone -> enots`. What the quickstart teaches it is to do the
same when asked in words: `Spell this word backwards.` A program can check every answer. Same bytes each time.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SCRATCH = Path("runs/quickstart-data")  # not in the repository: 4 MB that come out the same again
PRETRAIN_ROWS, TRAIN_ROWS, EVAL_ROWS = 120_000, 8_000, 240
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = """
apple arm baby bag ball band bank bath beach bean bear bed bee bell bench bird boat body bone book boot bottle bowl
box boy brain branch bread brick bridge brush bucket bus bush butter cake camp candle car card carpet cart cat
chain chair chalk cheese cherry chest child circle city clock cloth cloud coat coin cook corn cow crown cup curtain
day desk dish doctor dog doll door dream dress drum duck dust eagle ear earth egg engine eye face farm feather
field finger fire fish flag floor flower fly foot forest fork fox frog fruit game garden gate ghost gift girl glass
glove goat grain grass hair hammer hand hat heart hen hill honey hook horse house island jar jewel juice key king
kite knee knife lake lamp leaf leg lemon letter light lion lip lock map market meal milk mirror moon mouse mouth
music nail name neck needle nest night nose nurse ocean onion orange oven owl page paint paper park pear pen pencil
piano pig pin pipe plane plant plate pocket pond potato prince queen rabbit rain ring river road rock roof room
root rope rose salt sand school sea seed sheep shelf ship shirt shoe shop silver sister skin sky smile snail snake
snow soap sock song soup spoon spring star station stone storm story street sugar summer sun table tail tea tent
tiger toe tooth tower town toy train tree truck turtle uncle van village voice wall watch water wave wheel wind
window wing winter wolf woman wood wool world yard year zebra
""".split()
OPPOSITES = """hot cold|big small|up down|left right|day night|open closed|fast slow|hard soft|high low|long short
young old|rich poor|full empty|wet dry|light dark|happy sad|early late|near far|strong weak|clean dirty|good bad
win lose|buy sell|push pull|give take|first last|true false|inside outside|above below|before after|always never
love hate|start stop|cheap expensive|thick thin|wide narrow|loud quiet|brave afraid|sweet sour|sharp blunt
safe dangerous|begin end|arrive leave|laugh cry|sink float|lend borrow|easy difficult|smooth rough|deep shallow
wild tame|awake asleep|raise lower|remember forget|build destroy|friend enemy|front back|north south|east west
summer winter|man woman|king queen|boy girl|question answer|more less|many few|same different|here there|yes no"""
COLOURS = """grass green|snow white|coal black|blood red|sky blue|banana yellow|carrot orange|chocolate brown|milk white
leaf green|fire red|sea blue|lemon yellow|sun yellow|night black|rose red|tomato red|cloud white|frog green|lime green
swan white|crow black|pumpkin orange|strawberry red|butter yellow|mud brown|ink blue|salt white|tar black|pea green
cherry red|corn yellow|bear brown|elephant grey|mouse grey|ash grey|stone grey|flour white|plum purple|grape purple
violet purple|pig pink|flamingo pink|emerald green|ruby red|sapphire blue|cucumber green|spinach green|paper white
wood brown|coffee brown|honey yellow|fox red|raven black|lavender purple|lobster red|tea brown|rice white|peach pink"""


def pairs(text):
    return [tuple(pair.split()) for line in text.splitlines() for pair in line.split("|")]


def plural(word):
    odd = {"man": "men", "woman": "women", "child": "children", "foot": "feet", "tooth": "teeth", "mouse": "mice"}
    odd |= {"sheep": "sheep", "fish": "fish", "leaf": "leaves", "knife": "knives", "wolf": "wolves", "shelf": "shelves"}
    if word in odd:
        return odd[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh", "potato")) else "s")


def word(draw):
    return draw.choice(WORDS) if draw.random() < 0.4 else "".join(draw.choices(LETTERS, k=draw.randint(3, 6)))


def noun(draw):
    return draw.choice([w for w in WORDS if len(w) <= 6])


def of_word(answer):
    return lambda draw, get: (lambda w: (w, answer(w)))(get(draw))


def of_pairs(table, both=False):
    table = table + [(b, a) for a, b in table] if both else table
    return lambda draw, get: draw.choice(table)


def addition(draw, get):
    a, b = draw.randint(0, 20), draw.randint(0, 20)
    return f"{a} + {b}", str(a + b)


def larger(draw, get):
    a, b = draw.sample(range(100), 2)
    return f"{a} {b}", str(max(a, b))


def following(draw, get):
    n = draw.randint(0, 198)
    return str(n), str(n + 1)


# name of the bare line: (what makes an input and its answer, how it is asked for; {} is an input inside the question)
TASKS = {
    "reverse": (
        of_word(lambda w: w[::-1]),
        ["Spell this word backwards.", "Reverse the letters.", "Write it from end to start."],
    ),
    "upper": (of_word(str.upper), ["Write this in capital letters.", "Make it upper case.", "Shout this word."]),
    "first": (of_word(lambda w: w[0]), ["What is the first letter?", "Give the letter that it begins with."]),
    "last": (of_word(lambda w: w[-1]), ["What is the last letter?", "Give the letter that it ends with."]),
    "length": (
        of_word(lambda w: str(len(w))),
        ["How many letters has it?", "Count the letters.", "How long is the word {}?"],
    ),
    "double": (of_word(lambda w: f"{w} {w}"), ["Say this twice.", "Repeat the word.", "Write {} two times."]),
    "plural": (
        of_word(plural),
        ["Give the plural.", "What are several of these called?", "What is the plural of {}?"],
    ),
    "opposite": (
        of_pairs(pairs(OPPOSITES), both=True),
        ["Give the opposite.", "What is the opposite of {}?", "Name the contrary."],
    ),
    "colour": (of_pairs(pairs(COLOURS)), ["What colour is it?", "Name its colour.", "Which colour has {}?"]),
    "sum": (addition, ["Add the numbers.", "What is {}?", "Work out the sum."]),
    "larger": (larger, ["Which number is larger?", "Pick the greater one.", "Give the maximum."]),
    "next": (following, ["Which number comes next?", "Count one further.", "What comes after {}?"]),
}


# Opposites and colours are not asked for: so small a model knows them by heart in the bare form, and does not carry
# what was held out over to another wording (0 of 21 and 5 of 21 right, where the rest came to 0.8).
ASKED = [name for name in TASKS if name not in ("opposite", "colour")]


def bare(draw):
    name = draw.choice(list(TASKS))
    given, answer = TASKS[name][0](draw, noun if name == "plural" else word)
    return {"text": f"{name}: {given} -> {answer}"}


def asked(draw):
    name = draw.choice(ASKED)
    make, wordings = TASKS[name]
    given, answer = make(draw, noun)
    wording = draw.choice(wordings)
    inline = "{}" in wording
    row = {"instruction": wording.replace("{}", given), "input": "" if inline else given, "output": answer}
    return (name, given), row


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows():
    """Return training and held-out rows: no question of one is in the other, however it is worded."""
    draw, train, held_out = random.Random(1), [], {}
    while len(held_out) < EVAL_ROWS:
        question, row = asked(draw)
        held_out.setdefault(question, row)
    while len(train) < TRAIN_ROWS:
        question, row = asked(draw)
        if question not in held_out:
            train.append(row)
    return train, list(held_out.values())


def tokenizer():
    """Return a tokenizer of bytes: any text in any language, and every letter a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = {letter: i for i, letter in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


if __name__ == "__main__":
    draw = random.Random(0)
    train, held_out = rows()
    write(SCRATCH / "pretrain.jsonl", [bare(draw) for _ in range(PRETRAIN_ROWS)])
    write(HERE / "train.jsonl", train)
    write(HERE / "eval.jsonl", held_out)
    tokenizer().save_pretrained(HERE / "shape")
    (HERE / "shape" / "config.json").write_text(json.dumps(SHAPE, indent=2) + "\n", encoding="utf-8")
