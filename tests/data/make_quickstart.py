"""The generator of the bundled quickstart set: short questions with checkable answers, the same bytes every time.

Three files: `quickstart_sft.jsonl` teaches a small model the task with right answers in mixed styles;
`quickstart_train.jsonl` prefers direct, right answers to wrong, padded, hedged and evasive ones;
`quickstart_eval.jsonl` holds other items of the same kinds of question and whole kinds that occur nowhere else.

Run it in a checkout; it writes into the package:

    python -m tests.data.make_quickstart [--out DIR] [--check]

Every choice is drawn from a hash of the seed and of the text that it concerns. So the bytes depend on neither Python's
version nor its random module, and a kind of question that you add last leaves all other rows as they were.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from alignment.data.sources.opening import BUNDLED
from alignment.errors import UserError

SEED = 20
EVAL_ITEMS_SEEN = 2
EVAL_ITEMS_UNSEEN = 7
TRAIN_ROWS = 18
SFT_ROWS = 8
# Half of the rejected answers are as short as the chosen ones, so that length alone does not tell them apart.
FLAWS = (
    "wrong", "padded", "wrong", "hedged", "wrong", "wrong_padded", "wrong", "padded", "wrong", "evasive",
    "wrong", "hedged", "wrong", "padded", "wrong", "wrong_padded", "wrong", "hedged", "evasive", "padded",
)  # fmt: skip
STYLES = ("sentence", "padded", "direct", "padded")

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One thing to ask about: what stands in the question, the accepted answers (best first), some wrong ones."""

    x: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of question: phrasings with {x}, a full sentence with {x} and {a}, and the items."""

    name: str
    questions: tuple[str, ...]
    fact: str
    items: tuple[Item, ...]
    seen: bool = True
    verbatim: bool = False
    """The answer keeps its case at the start of a sentence (spelling, symbols)."""


def _draw(salt: str) -> int:
    return int.from_bytes(blake2b(f"{SEED}:{salt}".encode(), digest_size=8).digest(), "big")


def _pick(options: Sequence[T], salt: str) -> T:
    return options[_draw(salt) % len(options)]


def _shuffled(values: Iterable[T], salt: str, text: Callable[[T], str]) -> list[T]:
    return sorted(values, key=lambda value: (_draw(f"{salt}:{text(value)}"), text(value)))


def _entries(text: str) -> list[str]:
    return [" ".join(entry.split()) for entry in text.split(";")]


def _table(text: str) -> tuple[Item, ...]:
    """Items of "x = answer|also accepted" entries; wrong answers are the other entries' answers."""
    rows = [entry.split(" = ") for entry in _entries(text)]
    pairs = [(x, tuple(answer.split("|"))) for x, answer in rows]
    firsts = dict.fromkeys(answers[0] for _, answers in pairs)
    return tuple(Item(x, answers, tuple(a for a in firsts if a not in answers)) for x, answers in pairs)


def _wrongly(text: str) -> tuple[Item, ...]:
    """Items of "x = answer|also accepted / wrong|also wrong" entries."""
    rows = [entry.replace(" / ", " = ").split(" = ") for entry in _entries(text)]
    return tuple(Item(x, tuple(a.split("|")), tuple(w.split("|"))) for x, a, w in rows)


def _choices(text: str) -> tuple[Item, ...]:
    """Items of "word: right wrong" entries, asked as "word: right or wrong" in either order."""
    items = []
    for entry in _entries(text):
        word, rest = entry.split(":")
        right, wrong = rest.split()
        items.append(Item(f"{word}: {' or '.join(_shuffled((right, wrong), word, str))}", (right,), (wrong,)))
    return tuple(items)


def _numbers(values: Iterable[tuple[str, int]]) -> tuple[Item, ...]:
    """Items whose answer is a number; wrong answers lie near it."""
    return tuple(Item(x, (str(n),), tuple(str(n + d) for d in (1, -1, 2, 3, 10) if n + d > 0)) for x, n in values)


def _counts(text: str) -> list[tuple[str, int]]:
    """(x, number) of "x = number" entries."""
    rows = (entry.split(" = ") for entry in _entries(text))
    return [(x, int(n)) for x, n in rows]


def _tuples(text: str) -> list[tuple[int, ...]]:
    """The numbers of "2 3, 4 5"."""
    return [tuple(map(int, part.split())) for part in text.split(",")]


def _words(words: str, answer: Callable[[str], str], wrong: Callable[[str], Sequence[str]]) -> tuple[Item, ...]:
    """Items computed from single words."""
    items = []
    for word in words.split():
        right = answer(word)
        items.append(Item(word, (right,), tuple(dict.fromkeys(w for w in wrong(word) if w != right))))
    return tuple(items)


def _cycle(text: str, step: int) -> tuple[Item, ...]:
    """Items whose answer is the name `step` places on, around a cycle."""
    names = text.split()
    n = len(names)
    return tuple(
        Item(x, (names[(i + step) % n],), tuple(names[(i + k * step) % n] for k in (2, -1, 3)))
        for i, x in enumerate(names)
    )


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
        "capital",
        (
            "What is the capital of {x}?",
            "Name the capital city of {x}.",
            "Which city is the capital of {x}?",
            "{x}'s capital?",
        ),
        "The capital of {x} is {a}.",
        _table("""
            France = Paris; Germany = Berlin; Italy = Rome; Spain = Madrid; Japan = Tokyo; China = Beijing;
            Russia = Moscow; Egypt = Cairo; Greece = Athens; Portugal = Lisbon; Austria = Vienna; Poland = Warsaw;
            Norway = Oslo; Sweden = Stockholm; Finland = Helsinki; Denmark = Copenhagen; Ireland = Dublin;
            Hungary = Budapest; Canada = Ottawa; Cuba = Havana; Peru = Lima; Kenya = Nairobi; India = New Delhi|Delhi;
            Turkey = Ankara
        """),
    ),
    Kind(
        "continent",
        (
            "On which continent is {x}?",
            "Which continent is {x} in?",
            "Name the continent where you find {x}.",
            "What continent does {x} belong to?",
        ),
        "{x} is in {a}.",
        _table("""
            Kenya = Africa; Nigeria = Africa; Ghana = Africa; Morocco = Africa; Brazil = South America;
            Peru = South America; Chile = South America; Argentina = South America; Canada = North America;
            Mexico = North America; Cuba = North America; France = Europe; Poland = Europe; Norway = Europe;
            Italy = Europe; Japan = Asia; India = Asia; Vietnam = Asia; Thailand = Asia
        """),
    ),
    Kind(
        "symbol",
        (
            "What is the chemical symbol for {x}?",
            "Give the chemical symbol of {x}.",
            "Which symbol stands for the element {x}?",
            "How do chemists write {x}?",
        ),
        "The symbol for {x} is {a}.",
        _table("""
            hydrogen = H; oxygen = O; carbon = C; nitrogen = N; iron = Fe; gold = Au; silver = Ag; copper = Cu;
            lead = Pb; tin = Sn; sodium = Na; helium = He; neon = Ne; zinc = Zn; calcium = Ca; mercury = Hg
        """),
        verbatim=True,
    ),
    Kind(
        "french",
        (
            "What is the French word for {x}?",
            "Translate {x} into French.",
            "How do you say {x} in French?",
            "Give the French for {x}.",
        ),
        "The French word for {x} is {a}.",
        _table("""
            dog = chien|chienne; cat = chat|chatte; house = maison; water = eau; bread = pain; milk = lait;
            sun = soleil; moon = lune; book = livre; red = rouge; black = noir|noire; white = blanc|blanche;
            night = nuit; tree = arbre; fish = poisson; king = roi
        """),
    ),
    Kind(
        "spanish",
        (
            "What is the Spanish word for {x}?",
            "Translate {x} into Spanish.",
            "How do you say {x} in Spanish?",
            "Give the Spanish for {x}.",
        ),
        "The Spanish word for {x} is {a}.",
        _table("""
            dog = perro|perra; cat = gato|gata; house = casa; water = agua; bread = pan; milk = leche; sun = sol;
            moon = luna; book = libro; red = rojo|roja; black = negro|negra; white = blanco|blanca; night = noche;
            tree = árbol; hand = mano; king = rey
        """),
    ),
    Kind(
        "opposite",
        (
            "What is the opposite of {x}?",
            "Give the opposite of {x}.",
            "Which word means the opposite of {x}?",
            "Opposite of {x}?",
        ),
        "The opposite of {x} is {a}.",
        _table("""
            hot = cold|cool; big = small|little|tiny; up = down; in = out; left = right; open = closed|shut|close;
            old = young|new; fast = slow; happy = sad|unhappy; day = night; wet = dry; hard = soft|easy; rich = poor;
            full = empty; heavy = light; long = short; early = late; love = hate; win = lose; buy = sell
        """),
    ),
    Kind(
        "plural",
        (
            "What is the plural of {x}?",
            "Give the plural of {x}.",
            "One {x}, two what?",
            "Write the plural form of {x}.",
        ),
        "The plural of {x} is {a}.",
        _wrongly("""
            child = children / childs|childes; mouse = mice / mouses|mouse; foot = feet / foots|feets;
            tooth = teeth / tooths|teeths; goose = geese / gooses|goose; man = men / mans|mens;
            woman = women / womans|womens; box = boxes / boxs|boxies; city = cities / citys|cityes;
            knife = knives / knifes|knive; leaf = leaves / leafs|leave; baby = babies / babys|babyes;
            bus = buses|busses / bus|busies; wolf = wolves / wolfs|wolve; story = stories / storys|storyes;
            wife = wives / wifes|wive; dish = dishes / dishs|dishies; lady = ladies / ladys|ladyes
        """),
    ),
    Kind(
        "past",
        (
            "What is the past tense of {x}?",
            "Give the past tense of {x}.",
            "Put {x} in the past tense.",
            "Today I {x}. Yesterday I ...?",
        ),
        "The past tense of {x} is {a}.",
        _wrongly("""
            go = went / goed|going; eat = ate / eated|eats; see = saw / seed|sees; run = ran / runned|runs;
            write = wrote / writed|writes; give = gave / gived|gives; take = took / taked|takes;
            come = came / comed|comes; swim = swam / swimmed|swims; drink = drank / drinked|drinks;
            sing = sang / singed|sings; think = thought / thinked|thinks; buy = bought / buyed|buys;
            teach = taught / teached|teaches; fly = flew / flied|flies; know = knew / knowed|knows;
            speak = spoke / speaked|speaks; find = found / finded|finds
        """),
    ),
    Kind(
        "colour",
        (
            "What colour is {x}?",
            "Which colour does {x} usually have?",
            "Name the usual colour of {x}.",
            "What color is {x}, normally?",
        ),
        "The colour of {x} is {a}.",
        _table("""
            grass = green; a ripe banana = yellow; snow = white; coal = black; blood = red; a ripe strawberry = red;
            a lemon = yellow; an emerald = green; a ruby = red; milk = white; a carrot = orange; a lime = green;
            a raven = black; a flamingo = pink; a polar bear = white; a sapphire = blue; milk chocolate = brown
        """),
    ),
    Kind(
        "sound",
        (
            "What sound does a {x} make?",
            "Which noise does a {x} make?",
            "What does a {x} say?",
            "Name the sound of a {x}.",
        ),
        "A {x} says {a}.",
        _table("""
            dog = woof|bark|barks|bow wow|ruff|arf; cat = meow|miaow|purr; cow = moo|moos|mooing;
            duck = quack|quacks|quacking; pig = oink|oinks|grunt; sheep = baa|bleat|bleats; lion = roar|roars|roaring;
            snake = hiss|hisses|hissing; bee = buzz|buzzes|buzzing; frog = ribbit|croak|croaks;
            rooster = cock-a-doodle-doo|crow|crows; mouse = squeak|squeaks
        """),
    ),
    Kind(
        "category",
        (
            "Animal, plant or tool: what is a {x}?",
            "Is a {x} an animal, a plant or a tool?",
            "What is a {x}: animal, plant or tool?",
            "Which fits a {x}: animal, plant, tool?",
        ),
        "A {x} is a kind of {a}.",
        _table("""
            tiger = animal; horse = animal; shark = animal; rabbit = animal; parrot = animal; spider = animal;
            tulip = plant; rose = plant; cactus = plant; fern = plant; daisy = plant; palm tree = plant; hammer = tool;
            saw = tool; drill = tool; wrench = tool; spade = tool; screwdriver = tool
        """),
    ),
    Kind(
        "unit",
        ("How many {x}?", "Tell me how many {x}.", "Do you know how many {x}?", "Quick question: how many {x}?"),
        "The number is {a}.",
        _numbers(
            _counts("""
            days are in a week = 7; hours are in a day = 24; minutes are in an hour = 60; seconds are in a minute = 60;
            months are in a year = 12; centimetres are in a metre = 100; grams are in a kilogram = 1000;
            eggs are in a dozen = 12; years are in a decade = 10; years are in a century = 100;
            cents are in a dollar = 100; letters are in the English alphabet = 26; inches are in a foot = 12;
            feet are in a yard = 3; wheels are on a bicycle = 2; wheels are on a tricycle = 3; days are in January = 31;
            days are in April = 30; strings are on a violin = 4
        """)
        ),
    ),
    Kind(
        "yes_no",
        ("{x}", "Yes or no: {x}", "{x} Answer yes or no.", "Quick question: {x}"),
        "The answer is {a}.",
        _table("""
            Is ice cold? = yes; Is the sun a star? = yes; Is Paris in France? = yes; Do birds have feathers? = yes;
            Do fish live in water? = yes; Is a whale a mammal? = yes; Is gold a metal? = yes; Is 10 more than 5? = yes;
            Is Egypt in Africa? = yes; Do plants need water? = yes; Is a rose a flower? = yes;
            Is the moon made of cheese? = no; Can pigs fly? = no; Is fire cold? = no; Is a spider an insect? = no;
            Is 3 more than 8? = no; Is Brazil in Europe? = no; Do snakes have legs? = no; Is London in Spain? = no;
            Is a whale a fish? = no; Do cats bark? = no; Is the Earth flat? = no
        """),
    ),
    Kind(
        "sides",
        (
            "How many sides does a {x} have?",
            "A {x} has how many sides?",
            "Count the sides of a {x}.",
            "What number of sides has a {x}?",
        ),
        "A {x} has {a} sides.",
        _numbers(
            _counts("""
            triangle = 3; square = 4; pentagon = 5; hexagon = 6; heptagon = 7; octagon = 8; nonagon = 9; decagon = 10;
            rectangle = 4; rhombus = 4; parallelogram = 4
        """)
        ),
    ),
    Kind(
        "synonym",
        (
            "Which word means the same as {x}?",
            "Pick the synonym of {x}.",
            "Choose the word closest in meaning to {x}.",
            "Which is a synonym of {x}?",
        ),
        "The right word is {a}.",
        _choices("""
            big: large tiny; happy: glad angry; fast: quick slow; begin: start finish; smart: clever foolish;
            small: little huge; angry: mad calm; end: finish start; rich: wealthy poor; sick: ill healthy;
            hard: difficult easy; quiet: silent loud; brave: bold timid; shut: close open; tired: sleepy awake;
            speak: talk listen; jump: leap crawl; gift: present bill
        """),
    ),
    Kind(
        "rhyme",
        (
            "Which word rhymes with {x}?",
            "Pick the rhyme for {x}.",
            "Choose the word that rhymes with {x}.",
            "What rhymes with {x}?",
        ),
        "The rhyming word is {a}.",
        _choices("""
            cat: hat dog; sun: run sea; tree: bee leaf; ball: tall kick; night: light dark; cake: lake pie;
            moon: spoon star; rain: train snow; king: ring queen; boat: goat ship; mouse: house rat; star: car sky;
            book: cook page; fish: dish swim; nose: rose face; bed: red sleep
        """),
    ),
    Kind(
        "add",
        ("What is {x}?", "{x} = ?", "Add: {x}.", "Work out {x}."),
        "{x} is {a}.",
        _numbers(
            (f"{a} + {b}", a + b)
            for a, b in _tuples(
                "2 3, 4 5, 6 1, 7 2, 5 5, 8 4, 9 3, 6 7, 10 4, 12 5, 11 6, 3 9, 20 7, 15 5, 13 4, 8 8, 1 9, 30 10"
            )
        ),
    ),
    Kind(
        "subtract",
        ("What is {x}?", "{x} = ?", "Subtract: {x}.", "Work out {x}."),
        "{x} is {a}.",
        _numbers(
            (f"{a} - {b}", a - b)
            for a, b in _tuples(
                "5 2, 9 4, 7 6, 8 3, 10 5, 12 4, 9 7, 15 5, 14 3, 20 8, 11 2, 6 4, 18 9, 30 10, 13 3, 16 8, 10 1, 7 3"
            )
        ),
    ),
    Kind(
        "multiply",
        ("What is {x}?", "Calculate {x}.", "Multiply: {x}.", "Work out {x}."),
        "{x} is {a}.",
        _numbers(
            (f"{a} times {b}", a * b)
            for a, b in _tuples(
                "2 3, 4 2, 3 3, 5 2, 4 5, 6 2, 3 7, 10 3, 5 5, 6 4, 7 2, 8 3, 9 2, 10 7, 2 11, 3 5, 8 10, 4 4"
            )
        ),
    ),
    Kind(
        "double",
        ("What is double {x}?", "Double the number {x}.", "What is twice {x}?", "{x} doubled is what?"),
        "Twice {x} is {a}.",
        _numbers((str(n), 2 * n) for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 20, 25, 30, 50)),
    ),
    Kind(
        "half",
        ("What is half of {x}?", "Halve the number {x}.", "What is {x} divided by 2?", "Half of {x}?"),
        "Half of {x} is {a}.",
        _numbers((str(n), n // 2) for n in (4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 30, 40, 50, 60, 100)),
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
            for a, b in _tuples(
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
            for a, b in _tuples(
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
        _numbers((str(n), n + 1) for n in (3, 6, 8, 9, 11, 14, 17, 19, 23, 26, 29, 35, 39, 48, 59, 99)),
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
            for v in _tuples(
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
        _numbers((w, len(w)) for w in f"{LONG_WORDS} cat dog sun bird".split()),
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
        _words(LONG_WORDS, lambda w: w[0].upper(), lambda w: [w[-1].upper(), w[2].upper()]),
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
        _words(LONG_WORDS, lambda w: w[-1].upper(), lambda w: [w[0].upper(), w[-2].upper()]),
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
        _words(SHORT_WORDS, lambda w: w[::-1], lambda w: [w, w[1:] + w[0], w[0] + w[:0:-1]]),
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
        _cycle(DAYS, 1),
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
        _cycle(MONTHS, 1),
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
                _entries("""
                    cat dog; sun moon; apple zebra; tree leaf; bread milk; water fire; king queen; red blue;
                    house garden; fish bird; train car; pen book; snow rain; hand foot; lamp door; goat wolf
                """),
            )
        ),
    ),
    Kind(
        "legs",
        (
            "How many legs does a {x} have?",
            "A {x} has how many legs?",
            "Count the legs of a {x}.",
            "What number of legs does a {x} have?",
        ),
        "A {x} has {a} legs.",
        _numbers(
            _counts("""
            dog = 4; spider = 8; chicken = 2; cow = 4; horse = 4; bee = 6; duck = 2; butterfly = 6; beetle = 6;
            scorpion = 8; cat = 4; penguin = 2; mouse = 4; fly = 6; goose = 2; sheep = 4
        """)
        ),
    ),
    Kind(
        "job",
        ("Who {x}?", "What do you call a person who {x}?", "Name the job of someone who {x}.", "Which worker {x}?"),
        "That person is a {a}.",
        _table("""
            flies a plane = pilot; bakes bread = baker|chef|cook; teaches at a school = teacher;
            cuts hair = barber|hairdresser|hairstylist; puts out fires = firefighter|fireman;
            treats sick animals = vet|veterinarian; writes books = writer|author|novelist; repairs pipes = plumber;
            looks after teeth = dentist; catches fish = fisherman|fisher|angler; cooks in a restaurant = chef|cook;
            drives a bus = bus driver|driver; takes photographs = photographer; works in a library = librarian;
            sings songs = singer|vocalist|musician; plays the piano = pianist|musician
        """),
    ),
    Kind(
        "comparative",
        ("What is the comparative form of {x}?", "Say 'more {x}' in one word.", "Give the comparative of {x}."),
        "The comparative of {x} is {a}.",
        _wrongly("""
            big = bigger / biger|most big; good = better / gooder|best; happy = happier / happyer|most happy;
            bad = worse / badder|worst; small = smaller / smallest|most small; fast = faster / fastest|most fast;
            easy = easier / easyer|easiest; cold = colder / coldest|most cold
        """),
        seen=False,
    ),
    Kind(
        "baby_animal",
        ("What is a baby {x} called?", "Name the young of a {x}."),
        "A baby {x} is called a {a}.",
        _table("""
            dog = puppy|pup; cat = kitten; cow = calf; horse = foal|colt|filly; sheep = lamb; duck = duckling;
            kangaroo = joey; frog = tadpole|froglet|polliwog
        """),
        seen=False,
    ),
    Kind(
        "language",
        ("Which language do most people in {x} speak?", "What is the main language of {x}?"),
        "The main language of {x} is {a}.",
        _table("""
            Japan = Japanese; Brazil = Portuguese; Mexico = Spanish; Italy = Italian; Russia = Russian;
            Germany = German; Greece = Greek; Poland = Polish
        """),
        seen=False,
    ),
    Kind(
        "roman",
        ("Which number is the Roman numeral {x}?", "Write the Roman numeral {x} in ordinary digits."),
        "The number is {a}.",
        _numbers(
            _counts("""
            III = 3; IV = 4; V = 5; VI = 6; VIII = 8; IX = 9; X = 10; XII = 12; XX = 20
        """)
        ),
        seen=False,
    ),
    Kind(
        "day_before",
        ("Which day comes just before {x}?", "If today is {x}, what was yesterday?"),
        "The day before was {a}.",
        _cycle(DAYS, -1),
        seen=False,
    ),
    Kind(
        "feminine",
        ("What is the female form of {x}?", "Boy is to girl as {x} is to ...?"),
        "The female form of {x} is {a}.",
        _table("""
            king = queen; prince = princess; actor = actress; waiter = waitress; uncle = aunt; father = mother;
            brother = sister; son = daughter; nephew = niece
        """),
        seen=False,
    ),
    Kind(
        "odd_even",
        ("Is {x} odd or even?", "Odd or even: {x}?"),
        "The number {x} is {a}.",
        tuple(
            Item(str(n), (("even", "odd")[n % 2],), (("odd", "even")[n % 2],)) for n in (4, 7, 9, 12, 15, 18, 21, 30)
        ),
        seen=False,
    ),
    Kind(
        "currency",
        ("What money do people use in {x}?", "Name the currency of {x}."),
        "People in {x} use the {a}.",
        _table("""
            Japan = yen; France = euro|euros; India = rupee|rupees|Indian rupee;
            the United States = dollar|dollars|US dollar; Russia = ruble|rubles|rouble|Russian ruble;
            the United Kingdom = pound|pounds|sterling; Mexico = peso|pesos|Mexican peso;
            Switzerland = franc|francs|Swiss franc
        """),
        seen=False,
    ),
    Kind(
        "sense",
        ("Which part of the body do you {x} with?", "With what do you {x}?"),
        "You {x} with your {a}.",
        _table("""
            see = eyes|eye; hear = ears|ear; smell = nose; taste = tongue|taste buds|mouth; chew = teeth|tooth|mouth;
            kick a ball = foot|feet|leg|legs; clap = hands|hand|palms; walk = legs|leg|feet|foot
        """),
        seen=False,
    ),
)

OPENERS = (
    "Great question!", "That is a good question.", "Sure, I can help with that!", "Of course! Let me explain.",
    "Thank you for asking!", "I am happy to help you today.", "Let me think about that for a moment.",
    "Well, here is what you asked for:", "Absolutely, let's look at this together.",
)  # fmt: skip
CLOSERS = (
    "I hope this helps!", "Feel free to ask me more.", "Let me know if you need anything else.",
    "Is there anything else you want to know?", "Thanks for asking me!", "I hope that answers your question.",
)  # fmt: skip
HEDGES = (
    "I'm not sure, but it could be {a}.", "Maybe it is {a}, but I can't be certain.", "I think it might be {a}.",
    "Perhaps {a}, but please check that.", "It is probably {a}, as far as I know.", "I guess it may be {a}.",
)  # fmt: skip
EVASIONS = (
    "That depends on many things.", "I don't know.", "There are many possible answers to that.", "It is hard to say.",
    "You can look that up in a book.", "I cannot answer that question.", "Why do you want to know that?",
    "That is an interesting topic with a long history.",
)  # fmt: skip


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class _Question:
    """One item in one phrasing: the prompt, and answers to it in every style."""

    kind: Kind
    item: Item
    prompt: str

    def direct(self, answer: str) -> str:
        return f"{answer if self.kind.verbatim else _capitalised(answer)}."

    def sentence(self, answer: str) -> str:
        return _capitalised(self.kind.fact.format(x=self.item.x, a=answer))

    def padded(self, answer: str) -> str:
        opener, closer = _pick(OPENERS, f"opener:{self.prompt}"), _pick(CLOSERS, f"closer:{self.prompt}")
        sentence = self.sentence(answer)
        return _pick((f"{opener} {sentence}", f"{sentence} {closer}"), f"shape:{self.prompt}")

    def rejected(self, flaw: str) -> str:
        right, wrong = self.item.answers[0], _pick(self.item.wrong, f"wrong:{self.prompt}")
        match flaw:
            case "wrong":
                return _pick((self.sentence(wrong),) * 4 + (self.direct(wrong),), f"style:{self.prompt}")
            case "padded":
                return self.padded(right)
            case "wrong_padded":
                return self.padded(wrong)
            case "hedged":
                return _pick(HEDGES, f"hedge:{self.prompt}").format(a=right)
            case "evasive":
                return _pick(EVASIONS, f"evasion:{self.prompt}")
        raise AssertionError(flaw)

    def pair(self, flaw: str) -> Row:
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "chosen": [{"role": "assistant", "content": self.sentence(self.item.answers[0])}],
            "rejected": [{"role": "assistant", "content": self.rejected(flaw)}],
            "kind": self.kind.name,
            "answer": list(self.item.answers),
            "flaw": flaw,
        }

    def demonstration(self, style: str) -> Row:
        answer: str = {"direct": self.direct, "sentence": self.sentence, "padded": self.padded}[style](
            self.item.answers[0]
        )
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "completion": [{"role": "assistant", "content": answer}],
            "kind": self.kind.name,
            "answer": list(self.item.answers),
            "style": style,
        }


def _questions(kind: Kind, items: Iterable[Item], salt: str) -> list[_Question]:
    asked = (_Question(kind, item, _capitalised(q.format(x=item.x))) for item in items for q in kind.questions)
    return _shuffled(asked, f"{salt}:{kind.name}", lambda question: question.prompt)


def rows() -> dict[str, list[Row]]:
    """The rows of every file, by file name."""
    train: list[Row] = []
    sft: list[Row] = []
    held_out: dict[bool, list[Row]] = {True: [], False: []}
    for k, kind in enumerate(KINDS):
        items = _shuffled(kind.items, f"items:{kind.name}", lambda item: item.x)
        cut = EVAL_ITEMS_SEEN if kind.seen else EVAL_ITEMS_UNSEEN
        for i, item in enumerate(items[:cut]):
            question = _questions(kind, [item], "eval")[0]
            held_out[kind.seen].append(question.pair(FLAWS[(7 * k + i) % len(FLAWS)]) | {"seen_kind": kind.seen})
        if kind.seen:
            questions = _questions(kind, items[cut:], "train")
            sft += [q.demonstration(STYLES[(k + i) % len(STYLES)]) for i, q in enumerate(questions[:SFT_ROWS])]
            pairs = questions[SFT_ROWS : SFT_ROWS + TRAIN_ROWS]
            train += [q.pair(FLAWS[(7 * k + i) % len(FLAWS)]) for i, q in enumerate(pairs)]

    def mixed(part: list[Row]) -> list[Row]:
        return _shuffled(part, "order", lambda row: row["prompt"][0]["content"])

    # Seen and unseen kinds take turns, so that the first few rows already hold both.
    turns = zip_longest(mixed(held_out[True]), mixed(held_out[False]))
    return {
        "quickstart_sft.jsonl": mixed(sft),
        "quickstart_train.jsonl": mixed(train),
        "quickstart_eval.jsonl": [row for turn in turns for row in turn if row is not None],
    }


def files() -> dict[str, bytes]:
    """The bytes of every file, by file name: UTF-8 JSON lines."""
    return {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part).encode()
        for name, part in rows().items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or with --check compare them with those that are there (status 1 where they differ)."""
    parser = argparse.ArgumentParser(prog="python -m tests.data.make_quickstart", description="The quickstart set.")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder of the three files (default: the package's)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    options = parser.parse_args(arguments)
    made = files()
    if options.check:
        differ = [
            name
            for name, data in made.items()
            if not (options.out / name).is_file() or (options.out / name).read_bytes() != data
        ]
        if differ:
            raise UserError(f"In {options.out} these files differ from what the generator writes: {', '.join(differ)}.")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in made.items():
        (options.out / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
