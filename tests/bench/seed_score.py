#!/usr/bin/env python3
"""Scores answers to questions in SQuAD's form: exact match, F1 and ROUGE-L, with 95 % bootstrap intervals.

    seed_score.py TEST.jsonl ANSWERS.jsonl

TEST has the rows of seed_data.py, ANSWERS has {"id": ..., "text": ...} per row. A missing answer counts as empty. Prints
one JSON object; all scores are between 0 and 1.
"""

import argparse
import collections
import json
import random
import re
import statistics
import string

RESAMPLES = 1000


def normalize(text):
    """SQuAD's normalisation: lower case, without punctuation, articles and repeated spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f_measure(common, answer, truth):
    """Returns the harmonic mean of precision and recall of `common` tokens."""
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(truth)
    return 2 * precision * recall / (precision + recall)


def exact_match(answer, truth):
    """Returns 1 if both texts are the same after normalisation, else 0."""
    return float(normalize(answer) == normalize(truth))


def f1(answer, truth):
    """Returns the F1 of the bags of tokens, as in SQuAD's evaluation script, version 1.1."""
    answer, truth = normalize(answer).split(), normalize(truth).split()
    common = sum((collections.Counter(answer) & collections.Counter(truth)).values())
    return f_measure(common, answer, truth)


def rouge_tokens(text):
    """The tokens of the package rouge-score without a stemmer: lower-case letters a to z and digits."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def longest_common_subsequence(left, right):
    """Returns the length of the longest common subsequence of two lists."""
    previous = [0] * (len(right) + 1)
    for token in left:
        current = [0]
        for column, other in enumerate(right):
            current.append(previous[column] + 1 if token == other else max(previous[column + 1], current[column]))
        previous = current
    return previous[-1]


def rouge_l(answer, truth):
    """Returns the F-measure of ROUGE-L (Lin 2004)."""
    answer, truth = rouge_tokens(answer), rouge_tokens(truth)
    return f_measure(longest_common_subsequence(answer, truth), answer, truth)


METRICS = {"exact": exact_match, "f1": f1, "rouge_l": rouge_l}


def score(rows, answers):
    """Returns for each metric the score of each row: the best over the row's true answers. `answers` maps ids to texts."""
    return {name: [max(metric(answers.get(row["id"], ""), truth) for truth in row["answers"]["text"]) for row in rows]
            for name, metric in METRICS.items()}


def intervals(scores, resamples=RESAMPLES, seed=0):
    """Returns the 95 % percentile bootstrap interval of each metric's mean. All metrics share the resampled rows."""
    source = random.Random(seed)
    count = len(next(iter(scores.values())))
    means = {name: [] for name in scores}
    for _ in range(resamples):
        chosen = source.choices(range(count), k=count)
        for name, values in scores.items():
            means[name].append(sum(values[row] for row in chosen) / count)
    result = {}
    for name, values in means.items():
        cuts = statistics.quantiles(values, n=40, method="inclusive")
        result[name] = [cuts[0], cuts[-1]]
    return result


def summary(rows, answers):
    """Returns the mean scores with their intervals, and the number of rows without an answer."""
    scores = score(rows, answers)
    bounds = intervals(scores)
    result = {"rows": len(rows)}
    for name, values in scores.items():
        result[name] = round(statistics.mean(values), 4)
        result[f"{name}_interval"] = [round(bound, 4) for bound in bounds[name]]
    result["missing"] = sum(row["id"] not in answers for row in rows)
    return result


def read_lines(path):
    """Reads a file of JSON lines."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test")
    parser.add_argument("answers")
    args = parser.parse_args()
    rows = read_lines(args.test)
    answers = {answer["id"]: answer["text"] for answer in read_lines(args.answers)}
    unknown = answers.keys() - {row["id"] for row in rows}
    if unknown:
        parser.error(f"{args.answers} has {len(unknown)} ids that are not in {args.test}, such as {min(unknown)!r}")
    print(json.dumps(summary(rows, answers)))


if __name__ == "__main__":
    main()
