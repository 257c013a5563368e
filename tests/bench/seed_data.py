#!/usr/bin/env python3
"""Generates the question answering data of seed.sh in SQuAD's form, and its tokenizer.

    seed_data.py OUT_DIR [--seed 1] [--train 30000] [--validation 300] [--test 600] [--pieces 4096] [--check]

The answer to a question is a span of its passage. The passage contains at least one other span of the answer's type, so
the question must be read. No passage is in two splits. The same arguments write the same bytes; --check compares
existing files with them. Prints a report as JSON.
"""

import argparse
import collections
import json
import math
import random
import re
import statistics
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import seed_text as text

SPLITS = ["train", "validation", "test"]
EXTRA_IDS = 10
# Length of a piece of the tokenizer in characters.
MAX_PIECE = 16
# Length of a passage in words.
MIN_WORDS, MAX_WORDS = 14, 40
# Slot types whose values ascend with the number of the slot: {year1} is before {year2}.
ASCENDING = ["date", "distance", "minutes", "money", "number", "price", "weight", "year"]
# Question types, and the slot types that can be their answers.
QUESTION_TYPES = {
    "who": ["person"], "when": ["date", "day", "year"], "where": ["place"], "how-many": ["few", "number", "small"],
    "how-much": ["money", "price"], "how-long": ["duration", "minutes"], "how-far": ["distance", "length"],
    "how-heavy": ["weight"], "which-company": ["firm"], "which-name": ["festival", "peak", "ship", "species", "team", "title"],
    "what-profession": ["profession"], "what-material": ["material", "stuff"], "what-colour": ["colour"],
    "what-activity": ["instrument", "sport"], "what-thing": ["cargo", "food", "goods", "object", "prey", "tree"],
}
TYPE_OF_SLOT = {slot: name for name, slots in QUESTION_TYPES.items() for slot in slots}

Sentence = collections.namedtuple("Sentence", "position wordings questions")
Row = collections.namedtuple("Row", "id context question answer start type first_of_type")


def invent(endings, count):
    """Invents different names with the given endings, the same ones in every run."""
    source, names = random.Random(",".join(endings)), set()
    while len(names) < count:
        names.add(("".join(source.choices(text.SYLLABLES, k=2)) + source.choice(endings)).capitalize())
    return sorted(names)


SURNAMES, TOWNS, PEAKS = invent(text.SURNAMES, 300), invent(text.TOWNS, 240), invent(text.PEAKS, 40)


def slot_type(slot):
    """Returns the type of a slot: `person` of `person1`."""
    return slot.rstrip("0123456789")


def question_type(slot):
    """Returns the type of the questions that the slot's value answers."""
    return TYPE_OF_SLOT.get(slot_type(slot))


def parse(source):
    """Parses seed_text.SCENES into one list of sentences per scene."""
    scenes = []
    for line in filter(None, source.splitlines()):
        mark, rest = line[0], line[2:]
        if mark == "=":
            scenes.append([])
        elif mark == "/":
            scenes[-1][-1].wordings.append(rest)
        elif mark == "?":
            scenes[-1][-1].questions.append(rest.split(": ", 1))
        else:
            scenes[-1].append(Sentence(mark, [rest], []))
    return scenes


def wordings(pattern):
    """Returns all texts that the choices of a pattern allow."""
    choice = re.search(r"\(([^()]*)\)", pattern)
    if not choice:
        return {pattern}
    before, after = pattern[:choice.start()], pattern[choice.end():]
    return set().union(*(wordings(before + option + after) for option in choice.group(1).split("|")))


def expand(pattern, source):
    """Replaces each choice of a pattern by one of its options."""
    while "(" in pattern:
        pattern = re.sub(r"\(([^()]*)\)", lambda choice: source.choice(choice.group(1).split("|")), pattern)
    return " ".join(pattern.split())


def slots(pattern):
    """Returns the slots of a pattern in their order; {last1} stands for {person1}."""
    return [slot.replace("last", "person") for slot in re.findall(r"\{(\w+)\}", pattern)]


def check_scenes(scenes):
    """Asserts that each question has four wordings or more, and mentions only what is in its sentence or the first one."""
    for scene in scenes:
        assert [sentence.position for sentence in scene][0] == "!"
        for sentence in scene:
            known = [set(slots(wording)) | set(slots(scene[0].wordings[0])) for wording in sentence.wordings]
            for slot, question in sentence.questions:
                assert len(wordings(question)) >= 4, question
                assert slot not in slots(question), question
                assert all({slot, *slots(question)} <= names for names in known), question
                assert question_type(slot), slot


class Values(dict):
    """The values of a passage's slots, drawn when they are first used."""

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.currency = source.choice(["${}", "{} dollars", "{} pounds"])
        self.length = source.choice(["metres", "feet"])
        self.distance = source.choice(["miles", "kilometres"])
        self.duration = source.choice(["days", "weeks", "months"])

    def __missing__(self, slot):
        if slot.startswith("last"):
            return self[slot.replace("last", "person")].split()[-1]
        kind = slot_type(slot)
        if kind in ASCENDING:
            self.update(zip((f"{kind}{number}" for number in range(1, 5)), self.ascending(kind)))
        else:
            while (value := self.draw(kind)) in self.values():
                pass
            self[slot] = value
        return self[slot]

    def ascending(self, kind):
        """Draws four values in ascending order; years have the distance of events in a life."""
        if kind == "year":
            years = [self.source.randint(1780, 1910)]
            while len(years) < 4:
                years.append(years[-1] + self.source.randint(19, 34))
            return [str(year) for year in years]
        values = set()
        while len(values) < 4:
            values.add(self.draw(kind))
        if kind == "date":
            return sorted(values, key=lambda date: (text.MONTHS.index(date.split()[1]), int(date.split()[0])))
        return sorted(values, key=lambda value: int(re.sub(r"\D", "", value)))

    def draw(self, kind):
        """Draws a value of a slot type."""
        pick, below = self.source.choice, self.source.randint
        if kind in text.WORDS:
            return pick(text.WORDS[kind])
        match kind:
            case "person":
                return f"{pick(text.FIRST)} {pick(SURNAMES)}"
            case "place":
                return pick(TOWNS)
            case "firm":
                return f"{pick(SURNAMES)} {pick(text.FIRMS)}"
            case "team":
                return f"{pick(TOWNS)} {pick(text.TEAMS)}"
            case "peak":
                return f"Mount {pick(PEAKS)}"
            case "ship":
                return f"{pick(text.ADJECTIVES)} {pick(text.NOUNS)}"
            case "title":
                return f"The {pick(text.ADJECTIVES)} {pick(text.NOUNS)}"
            case "species":
                return f"{pick(text.HABITATS)} {pick(text.ANIMALS)}"
            case "day":
                return pick(text.DAYS)
            case "date":
                return f"{below(1, 28)} {pick(text.MONTHS)}"
            case "few":
                return pick(["two", "three", "four", "five", "six"])
            case "small":
                return pick(text.COUNTS)
            case "number":
                return f"{below(*pick([(40, 99), (100, 999), (1000, 9999)])):,}"
            case "money":
                return self.currency.format(f"{below(12, pick([99, 999])) * pick([10, 100]):,}")
            case "price":
                return self.currency.format(below(2, 30))
            case "length":
                return f"{below(12, 140)} {self.length}"
            case "distance":
                return f"{below(4, 190)} {self.distance}"
            case "weight":
                return f"{below(4, 60)} kilograms"
            case "minutes":
                return f"{below(4, 85)} minutes"
            case "duration":
                return f"{pick(text.COUNTS)} {self.duration}"
        raise ValueError(f"unknown slot type {kind}")


def fill(pattern, values):
    """Fills the slots of a pattern, chooses `a` or `an`, and begins with a capital letter."""
    filled = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", pattern.format_map(values))
    return filled[0].upper() + filled[1:]


def find(value, context):
    """Returns the places of a value in a passage, as whole words."""
    return [match.start() for match in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", context)]


def passage(scene, source):
    """Generates a passage; returns its text and its questions as rows without an id, or None if its length is out of
    bounds."""
    chosen = source.sample(scene[1:], source.choice([0, 1, 1, 2]))
    ordered = [scene[0]] + sorted(chosen, key=lambda sentence: sentence.position == "$")
    patterns = [expand(source.choice(sentence.wordings), source) for sentence in ordered]
    values = Values(source)
    sentences = [fill(pattern, values) for pattern in patterns]
    context = " ".join(sentences)
    if not MIN_WORDS <= len(context.split()) <= MAX_WORDS:
        return None
    mentioned = [slot for pattern in patterns for slot in slots(pattern)]
    rows = []
    for sentence in ordered:
        for slot, question in sentence.questions:
            kind, answer = question_type(slot), values[slot]
            of_type = {other for other in mentioned if question_type(other) == kind}
            starts = find(answer, context)
            if len(of_type) < 2 or len(starts) != 1:
                continue
            first = min(of_type, key=lambda other: find(values[other], context))
            asked = fill(expand(question, source), values)
            rows.append(Row(None, context, asked, answer, starts[0], kind, first == slot))
    return rows


def make_rows(scenes, seed, split, count):
    """Generates the rows of a split: one to three questions about each passage, and all scenes equally often."""
    source = random.Random(f"{seed}-{split}")
    contexts, rows = set(), []
    while len(rows) < count:
        for scene in source.sample(scenes, len(scenes)):
            asked = None
            while not asked or asked[0].context in contexts:
                asked = passage(scene, source)
            contexts.add(asked[0].context)
            rows += source.sample(asked, min(len(asked), source.randint(1, 3)))
    return [row._replace(id=f"{split}-{number:05}-{row.type}") for number, row in enumerate(rows[:count], 1)]


def prompt(row):
    """Returns the user message of a row."""
    return text.PROMPT.format(context=row.context, question=row.question)


def lines(objects):
    """Returns the objects as JSON lines."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects)


def question_files(rows):
    """Returns the contents of the JSONL files by their names; `rows` maps a split to its rows."""
    files = {}
    for split in SPLITS:
        squad, prompts, truth = [], [], []
        for row in rows[split]:
            user = {"role": "user", "content": prompt(row)}
            squad.append({"id": row.id, "context": row.context, "question": row.question,
                          "answers": {"text": [row.answer], "answer_start": [row.start]}})
            prompts.append({"id": row.id, "messages": [user], "answer": row.answer})
            truth.append({"id": row.id, "messages": [user, {"role": "assistant", "content": row.answer}]})
        files[f"{split}.jsonl"] = lines(squad)
        if split != "validation":
            files[f"{split}-prompts.jsonl"] = lines(prompts)
        if split != "test":
            files[f"{split}-truth.jsonl"] = lines(truth)
    return files


def matches(segment, probabilities):
    """Returns the pieces in a segment as (start, end, piece)."""
    ends = range(1, len(segment) + 1)
    return [(start, end, segment[start:end]) for end in ends for start in range(max(0, end - MAX_PIECE), end)
            if segment[start:end] in probabilities]


def likelihood(length, found, probabilities):
    """Returns the probabilities of all beginnings of a segment, each summed over its segmentations."""
    forward = [1.0] + [0.0] * length
    for start, end, piece in found:
        forward[end] += forward[start] * probabilities[piece]
    return forward


def expected_counts(segments, probabilities):
    """The E step: returns how often each piece is expected in the segments."""
    counts = collections.Counter()
    for segment, frequency in segments:
        found = matches(segment, probabilities)
        forward = likelihood(len(segment), found, probabilities)
        backward = [0.0] * len(segment) + [frequency / forward[-1]]
        for start, end, piece in reversed(found):
            share = probabilities[piece] * backward[end]
            backward[start] += share
            counts[piece] += forward[start] * share
    return counts


def train_unigram(segments, size):
    """Returns `size` pieces with their log-probabilities (Kudo 2018, arXiv 1804.10959, section 3.2): EM on frequent
    substrings, of which those that lower the likelihood least are dropped, a third at a time."""
    frequencies = collections.Counter()
    for segment, frequency in segments:
        for start in range(len(segment)):
            for end in range(start + 1, min(len(segment), start + MAX_PIECE) + 1):
                frequencies[segment[start:end]] += frequency
    characters = sorted(set(map(chr, range(33, 127))) | {"\u2581"})
    longer = [piece for piece in frequencies if len(piece) > 1]
    longer.sort(key=lambda piece: (-frequencies[piece] * len(piece), piece))
    counts = {piece: frequencies[piece] for piece in longer[:4 * size] + characters}
    while True:
        for _ in range(2):
            total = sum(counts.values()) + len(characters)
            probabilities = {piece: max(count, 1e-3) / total for piece, count in counts.items()}
            expected = expected_counts(segments, probabilities)
            counts = {piece: expected[piece] for piece in counts}
        if len(counts) <= size:
            break
        losses = {}
        for piece in counts:
            if len(piece) > 1:
                parts = [part for part in matches(piece, probabilities) if part[2] != piece]
                alternative = likelihood(len(piece), parts, probabilities)[-1]
                losses[piece] = counts[piece] * math.log(probabilities[piece] / alternative)
        kept = max(size - len(characters), len(losses) * 2 // 3)
        best = sorted(losses, key=lambda piece: (-losses[piece], piece))[:kept]
        counts = {piece: counts[piece] for piece in best + characters}
    total = sum(counts.values())
    scores = [(piece, round(math.log(max(count, 1e-3) / total), 6)) for piece, count in counts.items()]
    return sorted(scores, key=lambda entry: (-entry[1], entry[0]))


def train_tokenizer(rows, size):
    """Trains a Unigram tokenizer with the layout of T5's: <pad>, </s>, <unk>, the pieces, and the sentinels at the end,
    the last one first. As in SentencePiece, a piece has letters, digits or one other character, but no mixture. The
    normalizer is NFKC instead of SentencePiece's table, which differs in a few characters only. `tokenizers` has a
    trainer, but its result varies between runs, and it splits frequent words."""
    texts = {row.context for row in rows}
    segments = collections.Counter()
    for line in [*texts, *(text.PROMPT.format(context="", question=row.question) for row in rows), *(row.answer for row in rows)]:
        for word in line.split():
            segments.update(re.findall(r"\u2581?(?:[A-Za-z]+|[0-9]+|[^A-Za-z0-9\u2581]|$)", "\u2581" + word))
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocabulary += train_unigram(sorted(segments.items()), size - EXTRA_IDS - len(vocabulary))
    vocabulary += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(EXTRA_IDS))]
    assert len(vocabulary) == size, f"the text has only {len(vocabulary)} pieces: set --pieces to a lower number"

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([token for token, _ in vocabulary[:3] + vocabulary[-EXTRA_IDS:]])
    return tokenizer


def tokenizer_files(tokenizer):
    """Returns the contents of the tokenizer's files by their names."""
    config = {
        "tokenizer_class": "T5TokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "extra_ids": EXTRA_IDS, "additional_special_tokens": [f"<extra_id_{number}>" for number in range(EXTRA_IDS)],
        "model_max_length": 512, "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer/tokenizer.json": tokenizer.to_str(pretty=True),
            "tokenizer/tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def report(rows, tokenizer):
    """Returns counts and means by split, and checks that the text can be written without <unk>."""
    numbers = {}
    for split in SPLITS:
        sources = [encoding.ids for encoding in tokenizer.encode_batch([prompt(row) for row in rows[split]])]
        answers = [encoding.ids for encoding in tokenizer.encode_batch([row.answer for row in rows[split]])]
        tokens = [token for ids in sources + answers for token in ids]
        unknown = tokens.count(2) / len(tokens)
        assert unknown <= (0 if split == "train" else 0.001), f"{split} has {unknown:.3%} <unk>"
        numbers[split] = {
            "rows": len(rows[split]),
            "passages": len({row.context for row in rows[split]}),
            "passage_words": round(statistics.mean(len(row.context.split()) for row in rows[split]), 1),
            "source_tokens": round(statistics.mean(map(len, sources)), 1),
            "max_source_tokens": max(map(len, sources)),
            "answer_tokens": round(statistics.mean(map(len, answers)), 2),
            "max_answer_tokens": max(map(len, answers)),
            "unknown_tokens": unknown,
            "first_of_type": round(statistics.mean(row.first_of_type for row in rows[split]), 3),
            "questions": dict(collections.Counter(row.type for row in rows[split]).most_common()),
        }
    return numbers


def check_rows(rows):
    """Asserts that answers are spans of one to four words that occur once, that a question has one answer, and that no
    passage is in two splits."""
    answers = {}
    for row in (row for split in SPLITS for row in rows[split]):
        assert row.context[row.start:row.start + len(row.answer)] == row.answer, row
        assert find(row.answer, row.context) == [row.start] and 1 <= len(row.answer.split()) <= 4, row
        assert answers.setdefault((row.context, row.question), row.answer) == row.answer, row
    contexts = [context for split in SPLITS for context in {row.context for row in rows[split]}]
    assert len(contexts) == len(set(contexts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    for split, count in zip(SPLITS, [30000, 300, 600]):
        parser.add_argument(f"--{split}", type=int, default=count, help="number of rows")
    parser.add_argument("--pieces", type=int, default=4096, help="size of the vocabulary, special tokens included")
    parser.add_argument("--check", action="store_true", help="compare the files in OUT_DIR instead of writing them")
    args = parser.parse_args()

    scenes = parse(text.SCENES)
    check_scenes(scenes)
    rows = {split: make_rows(scenes, args.seed, split, getattr(args, split)) for split in SPLITS}
    check_rows(rows)
    tokenizer = train_tokenizer(rows["train"], args.pieces)
    files = question_files(rows) | tokenizer_files(tokenizer)
    for name, content in files.items():
        path = args.out_dir / name
        if args.check:
            assert path.read_text() == content, f"{path} differs"
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    print(json.dumps(report(rows, tokenizer), indent=2))


if __name__ == "__main__":
    main()
