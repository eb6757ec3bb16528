"""Scores of written text against what was expected: exact match, and BLEU and ROUGE by kept libraries."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from .errors import RunError

CHINESE = range(0x4E00, 0xA000)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of texts that are exactly what was expected, white space at both ends aside.

    >>> exact_match(["yes ", "No"], ["yes", "no"])
    0.5
    """
    _check(predictions, references)
    return sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)) / len(references)


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return corpus BLEU, 0 to 100, as sacrebleu computes it; Chinese is cut into characters."""
    _check(predictions, references)
    import sacrebleu

    tokenize = "zh" if _chinese(references) else "13a"
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)], tokenize=tokenize).score)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F-measure of ROUGE-L, 0 to 1; Chinese is cut into characters, which the default would drop."""
    _check(predictions, references)
    from rouge_score.rouge_scorer import RougeScorer

    class Characters:
        def tokenize(self, text: str) -> list[str]:
            return [letter for letter in text if not letter.isspace()]

    scorer = RougeScorer(["rougeL"], tokenizer=Characters() if _chinese(references) else None)
    each = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
    return float(sum(each) / len(each))


SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"bleu": bleu, "rouge": rouge}


def check_scores(names: Sequence[str]) -> None:
    """Refuse scores whose package is not installed, before a run and not after it.

    Raises:
        RunError: A package is missing.
    """
    for name, package in (("bleu", "sacrebleu"), ("rouge", "rouge_score")):
        if name in names and find_spec(package) is None:
            raise RunError(f"evaluation.scores: {name} needs a package: pip install 'jaxft[scores]'")


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not references:
        raise RunError(f"{len(predictions)} texts against {len(references)} expected ones: give one for each")


def _chinese(texts: Sequence[str]) -> bool:
    """Tell whether most letters are Chinese characters."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum(ord(letter) in CHINESE for letter in letters) * 2 > len(letters)
