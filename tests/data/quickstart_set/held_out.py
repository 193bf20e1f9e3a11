"""Kinds of question that no training file holds."""

from __future__ import annotations

from tests.data.quickstart_set.items import Item, Kind, counts, cycle, numbers, table, wrongly

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"

KINDS: tuple[Kind, ...] = (
    Kind(
        "legs",
        (
            "How many legs does a {x} have?",
            "A {x} has how many legs?",
            "Count the legs of a {x}.",
            "What number of legs does a {x} have?",
        ),
        "A {x} has {a} legs.",
        numbers(
            counts("""
            dog = 4; spider = 8; chicken = 2; cow = 4; horse = 4; bee = 6; duck = 2; butterfly = 6; beetle = 6;
            scorpion = 8; cat = 4; penguin = 2; mouse = 4; fly = 6; goose = 2; sheep = 4
        """)
        ),
    ),
    Kind(
        "job",
        ("Who {x}?", "What do you call a person who {x}?", "Name the job of someone who {x}.", "Which worker {x}?"),
        "That person is a {a}.",
        table("""
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
        wrongly("""
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
        table("""
            dog = puppy|pup; cat = kitten; cow = calf; horse = foal|colt|filly; sheep = lamb; duck = duckling;
            kangaroo = joey; frog = tadpole|froglet|polliwog
        """),
        seen=False,
    ),
    Kind(
        "language",
        ("Which language do most people in {x} speak?", "What is the main language of {x}?"),
        "The main language of {x} is {a}.",
        table("""
            Japan = Japanese; Brazil = Portuguese; Mexico = Spanish; Italy = Italian; Russia = Russian;
            Germany = German; Greece = Greek; Poland = Polish
        """),
        seen=False,
    ),
    Kind(
        "roman",
        ("Which number is the Roman numeral {x}?", "Write the Roman numeral {x} in ordinary digits."),
        "The number is {a}.",
        numbers(
            counts("""
            III = 3; IV = 4; V = 5; VI = 6; VIII = 8; IX = 9; X = 10; XII = 12; XX = 20
        """)
        ),
        seen=False,
    ),
    Kind(
        "day_before",
        ("Which day comes just before {x}?", "If today is {x}, what was yesterday?"),
        "The day before was {a}.",
        cycle(DAYS, -1),
        seen=False,
    ),
    Kind(
        "feminine",
        ("What is the female form of {x}?", "Boy is to girl as {x} is to ...?"),
        "The female form of {x} is {a}.",
        table("""
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
        table("""
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
        table("""
            see = eyes|eye; hear = ears|ear; smell = nose; taste = tongue|taste buds|mouth; chew = teeth|tooth|mouth;
            kick a ball = foot|feet|leg|legs; clap = hands|hand|palms; walk = legs|leg|feet|foot
        """),
        seen=False,
    ),
)
