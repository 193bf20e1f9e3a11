"""Kinds of question about words and the world, answered from tables."""

from __future__ import annotations

from tests.data.quickstart_set.items import Kind, choices, counts, numbers, table, wrongly

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
        table("""
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
        table("""
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
        table("""
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
        table("""
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
        table("""
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
        table("""
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
        wrongly("""
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
        wrongly("""
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
        table("""
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
        table("""
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
        table("""
            tiger = animal; horse = animal; shark = animal; rabbit = animal; parrot = animal; spider = animal;
            tulip = plant; rose = plant; cactus = plant; fern = plant; daisy = plant; palm tree = plant; hammer = tool;
            saw = tool; drill = tool; wrench = tool; spade = tool; screwdriver = tool
        """),
    ),
    Kind(
        "unit",
        ("How many {x}?", "Tell me how many {x}.", "Do you know how many {x}?", "Quick question: how many {x}?"),
        "The number is {a}.",
        numbers(
            counts("""
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
        table("""
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
        numbers(
            counts("""
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
        choices("""
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
        choices("""
            cat: hat dog; sun: run sea; tree: bee leaf; ball: tall kick; night: light dark; cake: lake pie;
            moon: spoon star; rain: train snow; king: ring queen; boat: goat ship; mouse: house rat; star: car sky;
            book: cook page; fish: dish swim; nose: rose face; bed: red sleep
        """),
    ),
)
