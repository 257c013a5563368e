"""Training text for the teacher of tests/bench/softlabels.py: sentences of a grammar with known probabilities, and
documentation of crates. Both are written as conversations. Also makes the tokenizers."""

import glob
import json
import math
import os
import random
import re

TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
CONTROL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


class Grammar:
    """Sentences of subject, verb and object, each drawn from the words that the topic or an earlier word allows. Each
    text has a single derivation, so its probability is the product of the probabilities of its choices."""

    TOPICS = ["garden", "harbour", "kitchen", "library", "market", "mountain", "office", "station", "theatre", "workshop"]
    SYLLABLES = ["ba", "do", "fen", "gri", "hal", "ku", "lo", "mir", "no", "pel", "ra", "sti", "tor", "ul", "ves", "wen"]

    def __init__(self, seed):
        self.random = random.Random(seed)
        names = ["".join(self.random.sample(self.SYLLABLES, self.random.choice((2, 2, 3)))) for _ in range(600)]
        self.names = list(dict.fromkeys(names))
        self.verbs = [name + "s" for name in self.take(24)]
        self.places = self.take(30)
        self.manners = [name + "ly" for name in self.take(16)]
        self.of_topic = {topic: self.zipf(self.take(25)) for topic in self.TOPICS}
        self.of_subject = {}

    def take(self, count):
        taken, self.names = self.names[:count], self.names[count:]
        return taken

    def zipf(self, words):
        """Shuffles the words; returns them with probabilities proportional to 1 / (rank + 1.5)."""
        words = self.random.sample(words, len(words))
        weights = [1 / (rank + 1.5) for rank in range(len(words))]
        return words, [weight / sum(weights) for weight in weights]

    def draw(self, source, choices):
        words, weights = choices
        at = source.choices(range(len(words)), weights)[0]
        self.log += math.log(weights[at])
        return words[at]

    def after(self, kind, word, words):
        key = (kind, word)
        if key not in self.of_subject:
            self.of_subject[key] = self.zipf(words)
        return self.of_subject[key]

    def text(self, topic, source):
        """Generates sentences about a topic; returns them with their log-probability."""
        self.log = 0.0
        sentences = []
        for _ in range(self.draw(source, ([1, 2, 3], [0.3, 0.4, 0.3]))):
            subject = self.draw(source, self.of_topic[topic])
            verb = self.draw(source, self.after("verb", subject, self.verbs))
            words = ["the", subject, verb, "the", self.draw(source, self.of_topic[topic])]
            if self.draw(source, ([True, False], [0.4, 0.6])):
                words += ["near", self.draw(source, self.after("place", verb, self.places))]
            if self.draw(source, ([True, False], [0.3, 0.7])):
                words.append(self.draw(source, self.after("manner", verb, self.manners)))
            sentences.append(" ".join(words) + ".")
        return " ".join(sentences), self.log


def paragraphs(seed, limit):
    """Returns paragraphs from documentation comments and READMEs of the crates in cargo's registry folder: at least
    `limit`, or all if there are fewer."""
    home = os.environ.get("CARGO_HOME", os.path.expanduser("~/.cargo"))
    comment = re.compile(r"^\s*//[/!] ?(.*)$")
    found = set()
    files = sorted(glob.glob(f"{home}/registry/src/*/*/README.md") + glob.glob(f"{home}/registry/src/*/*/src/**/*.rs",
                                                                              recursive=True))
    random.Random(seed).shuffle(files)
    for path in files:
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(200_000)
        except (OSError, UnicodeDecodeError):
            continue
        lines = text.splitlines()
        if path.endswith(".rs"):
            lines = [match.group(1) if (match := comment.match(line)) else "" for line in lines]
        fenced = False
        block = []
        for line in lines + [""]:
            line = line.strip()
            if line.startswith("```"):
                fenced = not fenced
                line = ""
            if line and not fenced and line[0].isalpha():
                block.append(line)
                continue
            whole = " ".join(block)
            block = []
            if 60 <= len(whole) <= 400 and whole.isascii() and whole[0].isupper():
                found.add(whole)
        if len(found) >= limit:
            break
    return sorted(found)


def cut(text, most):
    """Splits a text into its first five words and at most `most` characters of the rest."""
    words = text.split(" ")
    begin, rest = " ".join(words[:5]), " ".join(words[5:])
    return begin, rest if len(rest) <= most else rest[:most].rsplit(" ", 1)[0]


def make(folder, rows, seed):
    """Writes `teacher.jsonl`, `prompts.jsonl`, `heldout.jsonl` and `grammar.jsonl`; returns the negative log-probability
    and the size in bytes of the texts in `grammar.jsonl`."""
    grammar, source = Grammar(seed), random.Random(seed + 1)
    conversations, prompts = [], []
    prose = paragraphs(seed, 3 * rows["teacher"])
    random.Random(seed + 2).shuffle(prose)
    enough = rows["teacher"] // 2 + rows["prompts"] // 2 + rows["heldout"] // 2
    if len(prose) < enough:
        raise SystemExit(f"the crates' sources have only {len(prose)} paragraphs of {enough}: run `cargo fetch`")

    def conversation(question, answer):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    def question(number):
        topic = source.choice(Grammar.TOPICS)
        return topic, f"{topic} {number}"

    known = {"log": 0.0, "bytes": 0}
    truth = []
    for number in range(rows["teacher"] // 2):
        topic, asked = question(number)
        text, _ = grammar.text(topic, source)
        conversations.append(conversation(asked, text))
        conversations.append(conversation(*cut(prose.pop(), 120)))
    for number in range((rows["prompts"] + rows["heldout"]) // 2):
        _, asked = question(100_000 + number)
        prompts += [asked, cut(prose.pop(), 120)[0]]
    for number in range(400):
        topic, asked = question(200_000 + number)
        text, log = grammar.text(topic, source)
        known["log"] -= log
        known["bytes"] += len(text)
        truth.append(conversation(asked, text))
    source.shuffle(conversations)

    def write(name, values):
        with open(os.path.join(folder, name), "w") as file:
            file.writelines(json.dumps(value) + "\n" for value in values)

    write("teacher.jsonl", conversations)
    write("grammar.jsonl", truth)
    asked = [{"id": str(number), "text": text} for number, text in enumerate(prompts)]
    write("heldout.jsonl", asked[:rows["heldout"]])
    write("prompts.jsonl", asked[rows["heldout"]:])
    return known


def tokenizers(folder, sizes, seed):
    """Writes the model folders `bytelevel` and `large` (byte-level BPE of two sizes) and `pieces` (SentencePiece-style
    BPE with byte fallback). `bytelevel` is trained on all texts, the others on half of them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    with open(os.path.join(folder, "teacher.jsonl")) as file:
        texts = [message["content"] for line in file for message in json.loads(line)["messages"]]

    def write(name, text):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        with open(os.path.join(folder, name, "tokenizer.json"), "w") as file:
            file.write(text)
        with open(os.path.join(folder, name, "tokenizer_config.json"), "w") as file:
            json.dump({"eos_token": "<|end|>", "chat_template": TEMPLATE}, file)

    for name, part in (("bytelevel", texts), ("large", random.Random(seed).sample(texts, len(texts) // 2))):
        one = Tokenizer(models.BPE())
        one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        one.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=sizes[name], special_tokens=CONTROL, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        one.train_from_iterator(part, trainer)
        write(name, one.to_str())

    two = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    two.normalizer = normalizers.Replace(" ", "▁")
    two.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    two.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=sizes["pieces"], special_tokens=special, show_progress=False)
    part = random.Random(seed).sample(texts, len(texts) // 2)
    two.train_from_iterator(part, trainer)
    # The byte tokens belong to the vocabulary and are not control tokens.
    described = json.loads(two.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
    write("pieces", json.dumps(described))
