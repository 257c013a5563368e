#!/usr/bin/env python3
"""Writes the reminders task: short messages to an assistant -> compact JSON.

    python3 make.py            writes teacher_train.jsonl.gz, prompts.jsonl and test.jsonl beside this file

Needs nothing but Python 3.8, and writes the same text each time. The task, the ambiguous phrasings and
their distribution are described in README.md; the numbers printed at the end are the ones quoted there.

How a row is made: an intent's pattern is expanded ("(a|b)" picks one, "[x]" keeps x with probability 0.4),
then its {slots} are filled. A slot yields a Phrase: the words, and their meaning as JSON fields. An ambiguous
phrase has several readings with probabilities. A row has at most one such phrase, and the true answer of the
row is drawn from its readings.
"""

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import phrasebook as book

SEED = 20240611
COUNTS = {"train": 300000, "prompt": 12000, "test": 600}
AMBIGUOUS_ROWS = 0.22  # share of rows that may hold an ambiguous phrase; about half of them find a slot for one
WORDS = range(6, 31)  # number of words in a message

KEYS = ("action", "ask", "list", "items", "title", "day", "part", "time", "minutes", "repeat", "before",
        "to_day", "to_time", "shift", "people", "place")

class Phrase:
    """Words and their meaning: readings is a list of (fields, probability)."""

    def __init__(self, text, fields=None, readings=None, ambiguity=None):
        self.text = text
        self.readings = readings or [(fields or {}, 1.0)]
        self.ambiguity = ambiguity


def two(name, text, probabilities, first, second):
    """An ambiguous phrase with two readings."""
    return Phrase(text, readings=[(first, probabilities[0]), (second, probabilities[1])], ambiguity=name)


class Rng:
    """Draws everything through random(), whose sequence Python promises to keep between versions."""

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def chance(self, p):
        return self.random() < p

    def pick(self, items):
        return items[int(self.random() * len(items))]

    def weighted(self, pairs):
        """pairs: (item, weight)."""
        point = self.random() * sum(weight for _, weight in pairs)
        for item, weight in pairs:
            point -= weight
            if point < 0:
                return item
        return pairs[-1][0]

    def sample(self, items, n):
        chosen = []
        while len(chosen) < n:
            item = self.pick(items)
            if item not in chosen:
                chosen.append(item)
        return chosen


class Row:
    """One message under construction."""

    def __init__(self, rng, kind):
        self.rng = rng
        self.may_be_ambiguous = rng.chance(AMBIGUOUS_ROWS)
        self.kind = kind       # how a bare hour is read: work, evening, morning or open
        self.title = None      # the event's title, once it is known

    def ambiguous(self, p=0.5):
        """Decides whether the next phrase is ambiguous; true at most once per row."""
        if self.may_be_ambiguous and self.rng.chance(p):
            self.may_be_ambiguous = False
            return True
        return False


# --- slots ---------------------------------------------------------------------------------------------------

def event(row, article=None):
    rng = row.rng
    row.kind = rng.weighted([("work", 5), ("evening", 4), ("morning", 2), ("day", 4), ("open", 4)])
    if row.kind == "work":
        title = rng.pick(book.WORK) if rng.chance(0.2) else rng.pick(book.WORK_TOPICS) + " " + rng.pick(book.WORK_BASES)
    elif row.kind == "evening" and rng.chance(0.25):
        name = rng.pick([n for n in book.NAMES if n not in book.FAMILY])
        title = name + "'s " + rng.pick(["birthday party", "leaving do", "housewarming"])
    else:
        title = rng.pick({"evening": book.EVENING, "morning": book.MORNING, "day": book.DAYTIME,
                          "open": book.OPEN}[row.kind])
    if row.kind == "day":
        row.kind = "work"
    row.title = title
    bare = title in book.NO_ARTICLE or "'s " in title and title[0].isupper()
    if article == "a" and not bare:
        return Phrase(("an " if title[0] in "aeo" else "a ") + title, {"title": title})
    if article == "my" and not (title[0].isupper() and "'s " in title):
        return Phrase(rng.pick(["my ", "the "]) + title, {"title": title})
    return Phrase(title, {"title": title})


def task(row):
    """A task to be reminded of. Bare hours are read as for an appointment of the kind "open"."""
    rng = row.rng
    row.kind = "open"
    name = person_name(rng)
    text = rng.weighted([
        (rng.pick(book.CHORES), 8),
        (rng.pick(["call ", "text ", "ring ", "message "]) + name, 3),
        (rng.pick(["email ", "ask ", "talk to ", "chase "]) + name + " about " + rng.pick(book.TOPICS), 4),
        (rng.pick(["buy ", "pick up ", "order ", "get "]) + rng.pick(book.THINGS), 4),
        (rng.pick(["send ", "give ", "show "]) + name + " " + rng.pick(book.TOPICS), 2),
        ("pick up " + name + " from " + rng.pick(["the airport", "the station", "school", "work", "the clinic"]), 2),
        (rng.pick(["thank ", "pay "]) + name + " for " + rng.pick(["the tickets", "dinner", "the ride"]), 2)])
    return Phrase(text, {"title": text})


def event_task(rng):
    return "%s %s about the %s %s" % (rng.pick(["email", "ask", "message", "talk to"]), person_name(rng),
                                      rng.pick(book.WORK_TOPICS), rng.pick(book.WORK_BASES))


def attached_task(row):
    """A task about an event. A day at the end is ambiguous: the day of the reminder, or of the event."""
    row.kind = "open"
    title = event_task(row.rng)
    if not row.ambiguous(0.9):
        return Phrase(title, {"title": title})
    day = row.rng.pick(book.DAYS[:5])
    text = title + " on " + book.DAY_NAMES[day]
    return two("attachment", text, book.ATTACHMENT, {"title": title, "day": day}, {"title": text})


def dated_task(row):
    """A task about an event on a day, for sentences that also give the day of the reminder."""
    row.kind = "open"
    title = event_task(row.rng) + " on " + book.DAY_NAMES[row.rng.pick(book.DAYS[:5])]
    return Phrase(title, {"title": title})


def person_name(rng):
    name = rng.pick(book.NAMES)
    return book.FAMILY.get(name, name)


def person(row):
    name = person_name(row.rng)
    return Phrase(name, {"people": [name]})


def place(row):
    if row.rng.chance(0.12):
        number = 1 + int(row.rng.random() * 20)
        return Phrase("in room %d" % number, {"place": "room %d" % number})
    text = row.rng.pick(book.PLACES)
    name = text.split(" ", 1)[1]
    return Phrase(text, {"place": name[4:] if name.startswith("the ") else name})


def day(row, field="day", on=False):
    """A day; with on=True it can follow a verb ("on Friday"), else a preposition ("to Friday")."""
    rng = row.rng
    pre = "on " if on else ""
    weekday = rng.pick(book.DAYS)
    name = book.DAY_NAMES[weekday]
    month, number = int(rng.random() * 12), 1 + int(rng.random() * 28)
    if row.ambiguous(0.3):
        form = rng.weighted([("next", 6), ("weekend", 3), ("few", 3 if on else 0), ("numeric", 3)])
        if form == "next":
            return two("next_weekday", "next " + name, book.NEXT_WEEKDAY, {field: weekday + "+1"}, {field: weekday})
        if form == "weekend":
            return two("weekend", rng.pick(["this weekend", "at the weekend"]) if on else "the weekend", book.WEEKEND,
                       {field: "sat"}, {field: "sun"})
        if form == "few":
            words = rng.pick(sorted(book.FEW_DAYS))
            return Phrase("in " + words, readings=[({field: "+%d" % n}, p) for n, p in book.FEW_DAYS[words]],
                          ambiguity="few_days")
        first, second = rng.sample(range(1, 13), 2)
        return two("numeric_date", pre + "%d/%d" % (first, second), book.NUMERIC_DATE,
                   {field: "%02d-%02d" % (second, first)}, {field: "%02d-%02d" % (first, second)})
    form = rng.weighted([("name", 9), ("short", 4), ("today", 1.5), ("tomorrow", 5), ("date", 3), ("numeric", 0.8),
                         ("nth", 1.5), ("after", 1), ("in", 1 if on else 0), ("week", 1), ("this", 1), ("typo", 0.7)])
    if form == "name":
        return Phrase((pre if rng.chance(0.8) else "") + name, {field: weekday})
    if form == "short":
        return Phrase((pre if rng.chance(0.4) else "") + rng.pick(book.DAY_SHORT[weekday]), {field: weekday})
    if form == "typo":
        return Phrase(pre + book.DAY_TYPOS[weekday], {field: weekday})
    if form == "this":
        return Phrase("this " + name, {field: weekday})
    if form == "today":
        return Phrase("today", {field: "today"})
    if form == "tomorrow":
        return Phrase(rng.weighted([("tomorrow", 6), ("tmrw", 1), ("tomorow", 0.6), ("2moro", 0.4)]),
                      {field: "tomorrow"})
    if form == "date":
        text = rng.pick(["%(n)d %(m)s", "%(m)s %(n)d", "%(m)s %(th)s", "the %(th)s of %(m)s", "%(n)d %(s)s"])
        name = book.MONTHS[month]
        return Phrase(pre + text % {"n": number, "m": name, "s": name[:3], "th": ordinal(number)},
                      {field: "%02d-%02d" % (month + 1, number)})
    if form == "numeric":
        number = 13 + int(rng.random() * 16)
        text = rng.weighted([("%d/%d" % (number, month + 1), 2), ("%d/%d" % (month + 1, number), 1)])
        return Phrase(pre + text, {field: "%02d-%02d" % (month + 1, number)})
    if form == "nth":
        return Phrase(pre + "the " + ordinal(number), {field: "%02d" % number})
    if form == "after":
        return Phrase("the day after tomorrow", {field: "+2"})
    if form == "in":
        n = rng.pick([2, 3, 4, 5, 6, 7, 10])
        words = {7: rng.pick(["a week", "7 days"]), 10: rng.pick(["ten days", "10 days"])}
        return Phrase("in " + words.get(n, "%s days" % number_word(rng, n)), {field: "+%d" % n})
    return Phrase(rng.pick(["a week " + (pre or "on ") + name, name + " week"]), {field: weekday + "+1"})


def ordinal(n):
    return "%d%s" % (n, "th" if 10 < n < 14 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th"))


def number_word(rng, n):
    return book.SMALL[n] if n <= 12 and rng.chance(0.5) else str(n)


def clock(hour, minute=0):
    return "%02d:%02d" % (hour % 24, minute)


def bare_hours(kind):
    """The unambiguous hours on the 12-hour clock, with their 24-hour meaning, for a kind of appointment."""
    if kind == "evening":
        return {h: h + 12 for h in (5, 6, 7, 8, 9, 10)}
    if kind == "morning":
        return {h: h for h in (5, 6, 7, 8, 9, 10)}
    if kind == "work":
        return {12: 12, 1: 13, 2: 14, 3: 15, 4: 16, 5: 17, 8: 8, 9: 9, 10: 10, 11: 11}
    return {12: 12, 1: 13, 2: 14, 3: 15, 4: 16, 5: 17, 10: 10, 11: 11}


def time_words(rng, hour, minute):
    """A time on the 12-hour clock without am or pm: "3", "three", "3:20", "twenty past 3", "quarter to four"."""
    if minute == 0:
        return number_word(rng, hour)
    digits = "%d%s%02d" % (hour, rng.pick([":", ":", "."]), minute)
    if rng.chance(0.5):
        return digits
    following = number_word(rng, hour % 12 + 1)
    this = number_word(rng, hour)
    return {15: "quarter past " + this, 45: "quarter to " + following, 10: "ten past " + this,
            20: "20 past " + this, 50: "ten to " + following, 40: "twenty to " + following,
            30: "half past " + this}.get(minute, digits)


def time(row, field="time", at=False):
    rng = row.rng
    pre = rng.weighted([("at ", 9), ("@ ", 0.6), ("around ", 0.6)]) if at else ""
    if row.ambiguous(0.6):
        form = rng.weighted([("hour", 12 if row.kind == "open" else 0), ("half", 4), ("vague", 6 if at else 0)])
        if form == "vague":
            words = rng.pick(sorted(book.VAGUE_TIME))
            return Phrase(words, readings=[({field: value}, p) for value, p in book.VAGUE_TIME[words]],
                          ambiguity="vague_time")
        if form == "hour":
            hour = rng.pick(sorted(book.BARE_HOUR))
            minute = rng.pick([0, 0, 0, 15, 30])
            pm = book.BARE_HOUR[hour]
            return two("bare_hour", pre + time_words(rng, hour, minute), (pm, 1 - pm),
                       {field: clock(hour + 12, minute)}, {field: clock(hour, minute)})
        hour, meant = rng.pick(sorted(h for h in bare_hours(row.kind).items() if h[0] not in (8, 12, 1)))
        return two("half_hour", pre + "half " + number_word(rng, hour), book.HALF_HOUR,
                   {field: clock(meant, 30)}, {field: clock(meant - 1, 30)})
    minute = rng.weighted([(0, 10), (30, 5), (15, 2), (45, 2), (10, 0.7), (20, 0.7), (40, 0.7), (50, 0.7), (5, 0.5)])
    form = rng.weighted([("ampm", 8), ("24", 3), ("bare", 6), ("part", 2), ("noon", 0.6)])
    hours = bare_hours(row.kind)
    if form == "noon":
        return Phrase(pre + rng.pick(["noon", "midday"]), {field: "12:00"})
    if form == "bare":
        hour, meant = rng.pick(sorted(hours.items()))
        return Phrase(pre + time_words(rng, hour, minute), {field: clock(meant, minute)})
    wide = {"evening": range(17, 23), "morning": range(5, 11), "work": range(8, 19)}.get(row.kind, range(6, 22))
    hour = rng.pick(list(wide))
    if form == "24":
        return Phrase(pre + "%d:%02d" % (hour, minute) if hour >= 13 else pre + clock(hour, minute),
                      {field: clock(hour, minute)})
    twelve = (hour - 1) % 12 + 1
    if form == "part":
        part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
        return Phrase(pre + time_words(rng, twelve, minute) + " " + part, {field: clock(hour, minute)})
    suffix = rng.pick(["am", "am", " am", "AM"]) if hour < 12 else rng.pick(["pm", "pm", " pm", "PM"])
    digits = str(twelve) if minute == 0 else "%d%s%02d" % (twelve, rng.pick([":", ":", "."]), minute)
    return Phrase(pre + digits + suffix, {field: clock(hour, minute)})


def day_and_time(row):
    """Phrasings that join a day and a time: "Friday evening at 7", or the ambiguous "Friday at midnight"."""
    rng = row.rng
    weekday = rng.pick(book.DAYS)
    name = book.DAY_NAMES[weekday]
    if row.ambiguous(0.3):
        following = book.DAYS[(book.DAYS.index(weekday) + 1) % 7]
        return two("midnight", rng.pick(["%s midnight", "%s at midnight", "at midnight on %s"]) % name, book.MIDNIGHT,
                   {"day": following, "time": "00:00"}, {"day": weekday, "time": "00:00"})
    part = rng.pick(["morning", "evening", "night"])
    hour = rng.pick([7, 8, 9, 10, 11] if part == "morning" else [6, 7, 8, 9] if part == "evening" else [8, 9, 10, 11])
    if row.kind == "evening" and part == "morning" or row.kind == "morning" and part != "morning":
        part, hour = ("evening", 7) if row.kind == "evening" else ("morning", 8)
    minute = rng.pick([0, 0, 0, 15, 30, 45])
    words = "at " + time_words(rng, hour, minute)
    meant = hour if part == "morning" else hour + 12
    which = rng.weighted([("tomorrow", 3), ("day", 4), ("tonight", 0 if part == "morning" else 3)])
    text, value = {"tomorrow": ("tomorrow " + part, "tomorrow"), "day": (name + " " + part, weekday),
                   "tonight": ("tonight", "today")}[which]
    text = rng.pick([text + " " + words, words + " " + text])
    return Phrase(text, {"day": value, "time": clock(meant, minute)})


def duration(row, minutes=None):
    rng = row.rng
    n = minutes or rng.pick([10, 15, 20, 30, 30, 45, 45, 60, 60, 90, 90, 120, 180, 240, 25, 40])
    words = ["%d minutes" % n, "%d min" % n, "%d mins" % n] + book.DURATIONS.get(n, [])
    if n >= 120:
        words = words[3:]
    return Phrase(rng.pick(words), {"minutes": n})


def span(row):
    """From one time to another: the answer has the start and the minutes between them."""
    rng = row.rng
    hour, meant = rng.pick(sorted(h for h in bare_hours(row.kind).items() if h[0] not in (11, 12)))
    start = rng.pick([0, 0, 30])
    minutes = rng.pick([30, 60, 60, 90, 120])
    end = hour * 60 + start + minutes
    end_words = time_words(rng, (end // 60 - 1) % 12 + 1, end % 60)
    text = rng.pick(["from %s to %s", "from %s until %s", "%s to %s", "between %s and %s"])
    return Phrase(text % (time_words(rng, hour, start), end_words), {"time": clock(meant, start), "minutes": minutes})


def repeat(row):
    rng = row.rng
    if row.ambiguous(0.5):
        return two("biweekly", rng.pick(["biweekly", "bi-weekly", "on a biweekly basis"]), book.BIWEEKLY,
                   {"repeat": "2 weeks"}, {"repeat": "twice a week"})
    weekday = rng.pick(book.DAYS)
    name = book.DAY_NAMES[weekday]
    return Phrase(*rng.weighted([
        (("every " + name, {"day": weekday, "repeat": "week"}), 4),
        (("every day", {"repeat": "day"}), 2), (("daily", {"repeat": "day"}), 1), (("weekly", {"repeat": "week"}), 1),
        (("every weekday", {"repeat": "weekday"}), 2), (("monthly", {"repeat": "month"}), 1),
        (("every other " + name, {"day": weekday, "repeat": "2 weeks"}), 2), (("every month", {"repeat": "month"}), 1),
        (("twice a week", {"repeat": "twice a week"}), 1), (("once a week", {"repeat": "week"}), 1),
        (("every two weeks", {"repeat": "2 weeks"}), 1), (("every year", {"repeat": "year"}), 1)]))


def shift(row):
    """A move by an amount of time, instead of to a time."""
    rng = row.rng
    amount = duration(row, rng.pick([15, 30, 30, 45, 60, 60, 90, 120]))
    n = amount.readings[0][0]["minutes"]
    by = rng.pick(["by ", ""])
    if row.ambiguous(0.8):
        if rng.chance(0.6):
            return two("forward", "forward " + by + amount.text, book.FORWARD, {"shift": n}, {"shift": -n})
        return two("back", "back " + by + amount.text, book.BACK, {"shift": n}, {"shift": -n})
    if rng.chance(0.5):
        return Phrase(amount.text + " " + rng.pick(["later", "later", "further out"]), {"shift": n})
    return Phrase(amount.text + " " + rng.pick(["earlier", "earlier", "sooner"]), {"shift": -n})


def part_of_day(row):
    part = row.rng.pick(["morning", "afternoon", "evening"])
    return Phrase(part, {"part": part})


def before(row):
    amount = duration(row, row.rng.pick([10, 15, 20, 30, 45, 60, 60, 90, 120]))
    return Phrase(amount.text, {"before": amount.readings[0][0]["minutes"]})


def item(row):
    chosen = row.rng.pick(book.GROCERIES)
    return Phrase(chosen, {"items": [chosen]})


def pick_of(field, values):
    def slot(row):
        value = row.rng.pick(values)
        return Phrase(value, {field: value})
    return slot


SLOTS = {
    "event": event, "a_event": lambda r: event(r, "a"), "my_event": lambda r: event(r, "my"), "task": task,
    "attached": attached_task, "people": person, "task_on": dated_task, "place": place,
    "on": lambda r: day(r, on=True), "day": day, "to_day": lambda r: day(r, "to_day"),
    "to_on": lambda r: day(r, "to_day", on=True), "dt": day_and_time,
    "at": lambda r: time(r, at=True), "time": time, "to_time": lambda r: time(r, "to_time"),
    "dur": duration, "span": span, "rep": repeat, "shift": shift, "part": part_of_day, "before": before,
    "items": item, "list": pick_of("list", book.LISTS), "timer": pick_of("title", book.TIMERS),
}
FIRST = ("event", "a_event", "my_event", "task", "attached", "task_on")  # these decide how a bare hour is read

FIXABLE = {"on": day, "day": day, "at": time, "time": time, "people": person,
           "to_day": lambda r: day(r, "to_day"), "to_on": lambda r: day(r, "to_day"),
           "to_time": lambda r: time(r, "to_time")}


def expand(rng, pattern):
    """Picks one of each "(a|b)" and keeps each "[x]" with probability 0.4, innermost first."""
    while True:
        found = re.search(r"\(([^()\[\]]*)\)|\[([^()\[\]]*)\]", pattern)
        if not found:
            return pattern
        chosen = rng.pick(found[1].split("|")) if found[1] is not None else found[2] if rng.chance(0.4) else ""
        pattern = pattern[:found.start()] + chosen + pattern[found.end():]


def fix(row, phrases):
    """A correction of one slot, whose last value counts; empty if none fits. A move corrects the new day or time."""
    moved = any(name.startswith("to_") for name in phrases)
    fixable = [name for name in phrases if name in FIXABLE and not phrases[name].ambiguity
               and not (moved and name in ("on", "day", "at", "time"))]
    if not fixable or "task_on" in phrases:
        return ""
    name = row.rng.pick(sorted(fixable))
    old = phrases[name]
    row.may_be_ambiguous = False
    new = FIXABLE[name](row)
    if new.readings == old.readings:
        return ""
    old.readings = new.readings
    return row.rng.pick([", ", " - ", "... "]) + expand(row.rng, row.rng.pick(book.FIXES)).replace("{new}", new.text)


def message(rng):
    """Draws one (text, readings, ambiguity); None if the draw is not usable."""
    action, _, kind, fixed, patterns = rng.weighted([(intent, intent[1]) for intent in book.INTENTS])
    row = Row(rng, kind or "work")
    if action == "none":
        patterns, row.may_be_ambiguous = book.SMALL_TALK, False
    pattern = expand(rng, rng.pick(patterns).replace("WHEN", book.WHEN))
    names = re.findall(r"\{(\w+)\}", pattern)
    if len(set(names)) < len(names):
        return None
    phrases = {}
    for name in sorted(names, key=lambda name: name not in FIRST):
        phrases[name] = SLOTS[name](row)
    opener, closer = rng.chance(0.25), rng.chance(0.2)
    lower, typo = rng.chance(0.2), rng.chance(0.08)
    if typo:
        pattern = " ".join(book.TYPOS.get(word, word) if rng.chance(0.5) else word for word in pattern.split(" "))
    correction = fix(row, phrases) if action not in ("none", "list") and rng.chance(0.06) else ""
    text = re.sub(r"\{(\w+)\}", lambda m: phrases[m[1]].text, pattern)
    question = re.match(r"(what|when|where|who|how|am I|do I|have I|is |can |could |anything|do you)", pattern)
    text += correction
    if closer:
        text += rng.pick(book.CLOSERS)
    if opener:
        text = rng.pick(book.OPENERS) + text
    elif rng.chance(0.1):
        text = rng.pick(book.ASIDES).replace("{x}", rng.pick(book.NAMES[:-3])) + text
    text = re.sub(r" ,", ",", re.sub(r" +", " ", text)).strip()
    if lower:
        text = text.lower()
        if rng.chance(0.4):
            text = text.replace("'", "")
    else:
        text = text[0].upper() + text[1:]
    ends = ["?", "?", ""] if question else [".", "", "", ""] if lower else [".", ".", "!", "", "", "", ""]
    text += rng.pick(ends)
    if len(text.split()) not in WORDS or text.endswith(("🙏.", "👍.")):
        return None
    return (text,) + readings_of(action, fixed, phrases)


def readings_of(action, fixed, phrases):
    """All meanings of the row as [(answer, probability)], and the name of its ambiguity."""
    if action == "none":
        return [('{"action":"none"}', 1.0)], None
    meanings, ambiguity = [({"action": action, **fixed}, 1.0)], None
    for phrase in phrases.values():
        meanings = [({**fields, **more}, p * q) for fields, p in meanings for more, q in phrase.readings]
        ambiguity = ambiguity or phrase.ambiguity
    return [(json.dumps({key: fields[key] for key in KEYS if key in fields}, ensure_ascii=False,
                        separators=(",", ":")), p) for fields, p in meanings], ambiguity


def dump(name, rows):
    path = Path(__file__).parent / name
    lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows).encode()
    # Without a file name and a timestamp in the header, the same lines give the same file.
    path.write_bytes(gzip.compress(lines, 9, mtime=0) if name.endswith(".gz") else lines)


def main():
    rng = Rng(SEED)
    seen, made = set(), []
    while len(made) < sum(COUNTS.values()):
        row = message(rng)
        if row is None:
            continue
        same = re.sub(r"[^\w:/]+", " ", row[0].lower()).strip()  # equal if only case or punctuation differs
        if same not in seen:
            seen.add(same)
            made.append(row + (rng.weighted(row[1]),))
    files = {}
    for split, count in COUNTS.items():
        files[split], made = made[:count], made[count:]
    dump("teacher_train.jsonl.gz", [
        {"id": "train-%05d" % n, "messages": [{"role": "user", "content": text},
                                              {"role": "assistant", "content": answer}]}
        for n, (text, _, _, answer) in enumerate(files["train"], 1)])
    dump("prompts.jsonl", [{"id": "prompt-%05d" % n, "text": row[0]} for n, row in enumerate(files["prompt"], 1)])
    dump("test.jsonl", [
        dict({"id": "test-%03d" % n, "text": text, "answer": answer, "ambiguity": ambiguity},
             **({"readings": [[a, round(p, 4)] for a, p in readings]} if ambiguity else {}))
        for n, (text, readings, ambiguity, answer) in enumerate(files["test"], 1)])
    report(files)


def report(files):
    """Prints the numbers in README.md: the rows with each ambiguity, and the accuracy of the best possible model."""
    every = [row for rows in files.values() for row in rows]
    print("ambiguity       rows    best accuracy on them")
    kinds = Counter(row[2] for row in every)
    for kind, count in sorted(kinds.items(), key=lambda item: -item[1]):
        print("%-14s %5d    %.3f" % (kind or "(none)", count, best(row for row in every if row[2] == kind)))
    for split, rows in files.items():
        share = sum(row[2] is not None for row in rows) / len(rows)
        drawn = sum(row[3] == max(row[1], key=lambda r: r[1])[0] for row in rows) / len(rows)
        print("%-6s %5d rows, %.1f %% ambiguous, ceiling: expected %.4f, with the truth as drawn %.4f"
              % (split, len(rows), 100 * share, best(rows), drawn))
    print("actions:", dict(Counter(json.loads(row[3])["action"] for row in every).most_common()))


def best(rows):
    """Expected accuracy of a model that always gives the likeliest reading."""
    tops = [max(p for _, p in row[1]) for row in rows]
    return sum(tops) / len(tops)


if __name__ == "__main__":
    main()
