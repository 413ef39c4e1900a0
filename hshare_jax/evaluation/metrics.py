"""Metrics: scores in [0, 1] of a predicted text against a reference, by their published definitions.

LongBench's are those of its metrics.py (arXiv 2308.14508, table 1 says which task has which).
"""

import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rapidfuzz import fuzz
from rouge import Rouge

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def best(metric: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """Returns the score against the reference that fits best."""
    return max(metric(prediction, reference) for reference in references)


def leave_one_out(metric: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """Returns the mean, over the references, of the best score against all others; one alone is not left out.

    So that a model is measured like a person, whose own answer is one of the references (CoQA, arXiv 1808.07042,
    section 6.1).
    """
    scores = [metric(prediction, reference) for reference in references]
    if len(scores) == 1:
        return scores[0]
    return sum(max(scores[:i] + scores[i + 1 :]) for i in range(len(scores))) / len(scores)


def normalise(answer: str) -> str:
    """Returns an answer in lower case, without punctuation, articles or spare spaces (SQuAD, CoQA and LongBench).

    Only ASCII punctuation goes: "The  U.S.'s" -> "uss".
    """
    answer = re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION))
    return " ".join(answer.split())


def exact_match(prediction: str, reference: str) -> float:
    """Returns 1 where both answers are equal once normalised (SQuAD, arXiv 1606.05250, section 6.1)."""
    return float(normalise(prediction) == normalise(reference))


def exact_number(prediction: str, reference: str) -> float:
    """Returns 1 where both numbers are spelt alike but for commas, dollar signs and one last dot.

    As lm-evaluation-harness's gsm8k does: $1,000. is 1000, but 18.00 is not 18.
    """
    return float(_bare(prediction) == _bare(reference))


def _bare(number: str) -> str:
    return number.replace(",", "").replace("$", "").removesuffix(".")


def token_f1(prediction: str, reference: str) -> float:
    """Returns the harmonic mean of precision and recall of the normalised words (LongBench's qa_f1_score).

    0 where either holds none.
    """
    predicted, wanted = normalise(prediction).split(), normalise(reference).split()
    num_same = (Counter(predicted) & Counter(wanted)).total()
    return 2 * num_same / (len(predicted) + len(wanted)) if num_same else 0.0


def rouge_l(prediction: str, reference: str) -> float:
    """Returns ROUGE-L's F measure by the library that LongBench calls, rouge (rouge_score); 0 for an empty text.

    It matches distinct words, sentence by sentence, case and all: other libraries give other numbers, on long summaries
    far lower ones.
    """
    if not all(text.replace(".", " ").strip() for text in (prediction, reference)):
        return 0.0
    limit = sys.getrecursionlimit()
    # The library recurses once a word of a sentence, and generated text may never come to a full stop.
    sys.setrecursionlimit(limit + 2 * (len(prediction.split()) + len(reference.split())))
    try:
        scores: Any = Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)
        return float(scores[0]["rouge-l"]["f"])
    finally:
        sys.setrecursionlimit(limit)


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """Returns 1 / the number of class names in the prediction if the right one is there (classification_score).

    A name that is a part of the right one is not counted.
    """
    named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str) -> float:
    """Returns the share of the prediction's numbers that are the reference (count_score)."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """Returns the share of the prediction's numbers that are N, from a reference "Paragraph N" (retrieval_score)."""
    return count(prediction, reference.removeprefix("Paragraph "))


def code_similarity(prediction: str, reference: str) -> float:
    """Returns the edit similarity of the first line of code, in whole per cent as fuzzywuzzy's ratio (code_sim_score).

    Any line with a backtick, # or // in it is taken for a comment.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not re.search("`|#|//", line)), "")
    return round(fuzz.ratio(line, reference)) / 100
