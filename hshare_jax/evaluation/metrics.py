"""Metrics: a predicted text is scored against a reference, from 0 to 1, by the published definitions.

LongBench's metrics are the functions of its metrics.py, which are named in brackets. Table 1 of arXiv 2308.14508 says
which task has which metric.
"""

import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

# rouge and rapidfuzz come with the extra `eval`. They are imported where they are called, because only LongBench does.

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def check_libraries() -> None:
    """Raises ModuleNotFoundError unless the libraries that `rouge_l` and `code_similarity` call are installed."""
    import rapidfuzz
    import rouge

    del rapidfuzz, rouge


def best(metric: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """The score against the reference that fits best."""
    return max(metric(prediction, reference) for reference in references)


def leave_one_out(metric: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """The best score against all references but one, as a mean over the reference left out; a single one stays.

    This measures a model as a person is measured, whose own answer is one of the references (CoQA, arXiv 1808.07042,
    section 6.1).
    """
    scores = [metric(prediction, reference) for reference in references]
    if len(scores) == 1:
        return scores[0]
    return sum(max(scores[:i] + scores[i + 1 :]) for i in range(len(scores))) / len(scores)


def normalise(answer: str) -> str:
    """An answer in lower case, without punctuation, articles and spare spaces (SQuAD, CoQA and LongBench).

    Only ASCII punctuation is removed: "The  U.S.'s" -> "uss".
    """
    answer = re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION))
    return " ".join(answer.split())


def exact_match(prediction: str, reference: str) -> float:
    """1 if both answers are equal once normalised, else 0 (SQuAD, arXiv 1606.05250, section 6.1)."""
    return float(normalise(prediction) == normalise(reference))


def exact_number(prediction: str, reference: str) -> float:
    """1 if both numbers are written alike, else 0; commas, dollar signs and one last dot do not count.

    This is the rule of lm-evaluation-harness's gsm8k: $1,000. is 1000, but 18.00 is not 18.
    """
    return float(_bare(prediction) == _bare(reference))


def _bare(number: str) -> str:
    return number.replace(",", "").replace("$", "").removesuffix(".")


def token_f1(prediction: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the normalised words; 0 without words (qa_f1_score)."""
    predicted, wanted = normalise(prediction).split(), normalise(reference).split()
    num_same = (Counter(predicted) & Counter(wanted)).total()
    return 2 * num_same / (len(predicted) + len(wanted)) if num_same else 0.0


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L's F measure, from the library that LongBench calls; 0 for an empty text (rouge_score).

    The library compares distinct words, case included, sentence by sentence. Other libraries give other numbers, far
    lower ones on long summaries.
    """
    from rouge import Rouge

    if not all(text.replace(".", " ").strip() for text in (prediction, reference)):
        return 0.0
    limit = sys.getrecursionlimit()
    # The library recurses once for each word of a sentence, and a generated text may hold no full stop.
    sys.setrecursionlimit(limit + 2 * (len(prediction.split()) + len(reference.split())))
    try:
        scores: Any = Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)
        return float(scores[0]["rouge-l"]["f"])
    finally:
        sys.setrecursionlimit(limit)


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / the number of class names in the prediction if the right name is one, else 0 (classification_score).

    A name that is a part of the right name is not counted.
    """
    named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str) -> float:
    """The share of the prediction's numbers that equal the reference (count_score)."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """The share of the prediction's numbers that equal N, for a reference "Paragraph N" (retrieval_score)."""
    return count(prediction, reference.removeprefix("Paragraph "))


def code_similarity(prediction: str, reference: str) -> float:
    """The edit similarity of the first line of code, in whole per cent like fuzzywuzzy's ratio (code_sim_score).

    A line that holds a backtick, # or // anywhere is taken for a comment.
    """
    from rapidfuzz import fuzz

    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not re.search("`|#|//", line)), "")
    return round(fuzz.ratio(line, reference)) / 100
