"""Kinds of question whose answers are computed: numbers, letters, calendars, order."""

from __future__ import annotations

from tests.data.quickstart_set.items import Item, Kind, cycle, entries, numbers, tuples, words

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
# The letters a and i are words too, and no answer of one letter may be mistaken for them.
LETTERS = "BCDEFGJKLMNOPQRSTUVWX"
SHORT_WORDS = "cat dog sun map pen bus cup fox jar key lip net owl pig rug top van web zip gum log bed hen rod"
LONG_WORDS = (
    "house table river bread light plant stone cloud train water garden winter pencil school bridge market yellow "
    "monkey kitchen rainbow picture chicken weather morning"
)

KINDS: tuple[Kind, ...] = (
    Kind(
        "add",
        ("What is {x}?", "{x} = ?", "Add: {x}.", "Work out {x}."),
        "{x} is {a}.",
        numbers(
            (f"{a} + {b}", a + b)
            for a, b in tuples(
                "2 3, 4 5, 6 1, 7 2, 5 5, 8 4, 9 3, 6 7, 10 4, 12 5, 11 6, 3 9, 20 7, 15 5, 13 4, 8 8, 1 9, 30 10"
            )
        ),
    ),
    Kind(
        "subtract",
        ("What is {x}?", "{x} = ?", "Subtract: {x}.", "Work out {x}."),
        "{x} is {a}.",
        numbers(
            (f"{a} - {b}", a - b)
            for a, b in tuples(
                "5 2, 9 4, 7 6, 8 3, 10 5, 12 4, 9 7, 15 5, 14 3, 20 8, 11 2, 6 4, 18 9, 30 10, 13 3, 16 8, 10 1, 7 3"
            )
        ),
    ),
    Kind(
        "multiply",
        ("What is {x}?", "Calculate {x}.", "Multiply: {x}.", "Work out {x}."),
        "{x} is {a}.",
        numbers(
            (f"{a} times {b}", a * b)
            for a, b in tuples(
                "2 3, 4 2, 3 3, 5 2, 4 5, 6 2, 3 7, 10 3, 5 5, 6 4, 7 2, 8 3, 9 2, 10 7, 2 11, 3 5, 8 10, 4 4"
            )
        ),
    ),
    Kind(
        "double",
        ("What is double {x}?", "Double the number {x}.", "What is twice {x}?", "{x} doubled is what?"),
        "Twice {x} is {a}.",
        numbers((str(n), 2 * n) for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 20, 25, 30, 50)),
    ),
    Kind(
        "half",
        ("What is half of {x}?", "Halve the number {x}.", "What is {x} divided by 2?", "Half of {x}?"),
        "Half of {x} is {a}.",
        numbers((str(n), n // 2) for n in (4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 30, 40, 50, 60, 100)),
    ),
    Kind(
        "larger",
        (
            "Which is larger, {x}?",
            "Which number is bigger: {x}?",
            "Pick the larger number: {x}.",
            "What is the greater number, {x}?",
        ),
        "The larger number is {a}.",
        tuple(
            Item(f"{a} or {b}", (str(max(a, b)),), (str(min(a, b)),))
            for a, b in tuples(
                "3 8, 9 4, 12 7, 5 6, 20 15, 31 13, 40 50, 2 11, 99 100, 17 71, 25 52, 60 6, 8 18, 45 54, 1 10, 33 30"
            )
        ),
    ),
    Kind(
        "smaller",
        (
            "Which is smaller, {x}?",
            "Which number is less: {x}?",
            "Pick the smaller number: {x}.",
            "What is the lower number, {x}?",
        ),
        "The smaller number is {a}.",
        tuple(
            Item(f"{a} or {b}", (str(min(a, b)),), (str(max(a, b)),))
            for a, b in tuples(
                "4 9, 7 3, 14 6, 8 5, 21 12, 13 30, 70 60, 1 12, 98 89, 16 61, 35 53, 90 9, 7 17, 46 64, 2 20, 44 40"
            )
        ),
    ),
    Kind(
        "next_number",
        (
            "What number comes after {x}?",
            "Count on by one from {x}.",
            "Which number follows {x}?",
            "What is the next whole number after {x}?",
        ),
        "The next number is {a}.",
        numbers((str(n), n + 1) for n in (3, 6, 8, 9, 11, 14, 17, 19, 23, 26, 29, 35, 39, 48, 59, 99)),
    ),
    Kind(
        "sort",
        (
            "Sort these numbers from small to large: {x}.",
            "Put {x} in rising order.",
            "Order {x}, smallest first.",
            "Arrange {x} from lowest to highest.",
        ),
        "The right order is {a}.",
        tuple(
            Item(
                ", ".join(map(str, v)),
                (", ".join(map(str, sorted(v))),),
                (", ".join(map(str, sorted(v)[::-1])), ", ".join(str(sorted(v)[i]) for i in (1, 0, 2))),
            )
            for v in tuples(
                """7 3 9, 5 1 4, 8 2 6, 9 5 7, 3 2 1, 6 9 4, 2 8 5, 4 7 1,
                10 3 6, 12 5 9, 1 9 8, 7 4 2, 15 11 13, 20 10 30, 6 3 5, 8 4 1"""
            )
        ),
    ),
    Kind(
        "count_letters",
        (
            "How many letters are in the word {x}?",
            "Count the letters in {x}.",
            "The word {x} has how many letters?",
            "What is the number of letters in {x}?",
        ),
        "The word {x} has {a} letters.",
        numbers((w, len(w)) for w in f"{LONG_WORDS} cat dog sun bird".split()),
    ),
    Kind(
        "first_letter",
        (
            "What is the first letter of {x}?",
            "Which letter does {x} start with?",
            "Give the first letter of the word {x}.",
            "{x} begins with which letter?",
        ),
        "The first letter is {a}.",
        words(LONG_WORDS, lambda w: w[0].upper(), lambda w: [w[-1].upper(), w[2].upper()]),
    ),
    Kind(
        "last_letter",
        (
            "What is the last letter of {x}?",
            "Which letter does {x} end with?",
            "Give the last letter of the word {x}.",
            "{x} ends in which letter?",
        ),
        "The last letter is {a}.",
        words(LONG_WORDS, lambda w: w[-1].upper(), lambda w: [w[0].upper(), w[-2].upper()]),
    ),
    Kind(
        "reverse",
        (
            "Spell {x} backwards.",
            "What is {x} spelled backwards?",
            "Write the word {x} in reverse.",
            "Reverse the letters of {x}.",
        ),
        "Backwards, the word is {a}.",
        words(SHORT_WORDS, lambda w: w[::-1], lambda w: [w, w[1:] + w[0], w[0] + w[:0:-1]]),
        verbatim=True,
    ),
    Kind(
        "next_letter",
        (
            "Which letter comes after {x}?",
            "What letter follows {x} in the alphabet?",
            "Name the letter after {x}.",
            "What is the next letter after {x}?",
        ),
        "The next letter is {a}.",
        tuple(Item(x, (chr(ord(x) + 1),), (chr(ord(x) + 2), chr(ord(x) - 1))) for x in LETTERS if x not in "CG"),
    ),
    Kind(
        "next_day",
        (
            "Which day comes after {x}?",
            "What day follows {x}?",
            "If today is {x}, what is tomorrow?",
            "Name the day after {x}.",
            "What is the next day after {x}?",
        ),
        "The next day is {a}.",
        cycle(DAYS, 1),
    ),
    Kind(
        "next_month",
        (
            "Which month comes after {x}?",
            "What month follows {x}?",
            "Name the month after {x}.",
            "If it is {x} now, what month is next?",
        ),
        "The next month is {a}.",
        cycle(MONTHS, 1),
    ),
    Kind(
        "alphabetical",
        (
            "Which word comes first in the dictionary, {x}?",
            "Alphabetically, which is first: {x}?",
            "Which word is earlier in the alphabet: {x}?",
            "Pick the alphabetically first word: {x}.",
        ),
        "The first word is {a}.",
        tuple(
            Item(f"{a} or {b}", (min(a, b),), (max(a, b),))
            for a, b in map(
                str.split,
                entries("""
                    cat dog; sun moon; apple zebra; tree leaf; bread milk; water fire; king queen; red blue;
                    house garden; fish bird; train car; pen book; snow rain; hand foot; lamp door; goat wolf
                """),
            )
        ),
    ),
)
