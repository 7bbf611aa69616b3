"""Writes fastdpo/demo_data/preferences.jsonl, the preference data of `python -m fastdpo.demo`.

Every line is one question with a right answer (chosen) and a wrong, evasive or garbled one (rejected). Bare
answers and whole sentences occur on both sides, so that the length of an answer does not give it away.

    python benchmarks/make_demo_data.py            write the file
    python benchmarks/make_demo_data.py --check    exit with 1 unless the file is what this script writes
"""

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

OUTPUT = Path(__file__).resolve().parent.parent / "fastdpo" / "demo_data" / "preferences.jsonl"
SEED = 20261122


class Item(NamedTuple):
    """One question; `sentence` has one {}, where the right answer goes as well as the wrong one."""

    question: str
    sentence: str
    right: str
    wrong: str


# country, capital, another large city of the same country
CAPITALS = """
France, Paris, Lyon; Italy, Rome, Milan; Spain, Madrid, Barcelona; Germany, Berlin, Munich;
Portugal, Lisbon, Porto; Poland, Warsaw, Krakow; Japan, Tokyo, Osaka; China, Beijing, Shanghai;
India, New Delhi, Mumbai; Canada, Ottawa, Toronto; Australia, Canberra, Sydney;
Brazil, Brasilia, Rio de Janeiro; Egypt, Cairo, Alexandria; Turkey, Ankara, Istanbul; Norway, Oslo, Bergen;
Sweden, Stockholm, Gothenburg; Finland, Helsinki, Turku; Denmark, Copenhagen, Aarhus;
Greece, Athens, Thessaloniki; Austria, Vienna, Salzburg; Ireland, Dublin, Cork; Kenya, Nairobi, Mombasa;
Morocco, Rabat, Casablanca; Vietnam, Hanoi, Ho Chi Minh City; Thailand, Bangkok, Chiang Mai;
Peru, Lima, Cusco; Argentina, Buenos Aires, Rosario; New Zealand, Wellington, Auckland;
Hungary, Budapest, Debrecen; Nigeria, Abuja, Lagos
"""

# thing, its colour, another colour
COLOURS = """
a ripe banana, yellow, purple; fresh grass, green, red; a clear daytime sky, blue, brown;
clean snow, white, orange; coal, black, white; a ripe strawberry, red, blue; an emerald, green, pink;
a ruby, red, green; an adult flamingo, pink, black; cow's milk, white, purple; dark chocolate, brown, green;
a raven, black, yellow
"""

# two paints, their mixture, another colour
MIXTURES = """
yellow and blue, green, red; red and white, pink, green; red and yellow, orange, blue;
black and white, grey, yellow; red and blue, purple, orange
"""

# word, opposite, a word that is not the opposite
OPPOSITES = """
hot, cold, warm; big, small, large; fast, slow, quick; open, closed, wide; early, late, soon;
full, empty, heavy; happy, sad, glad; wet, dry, damp; strong, weak, mighty; rich, poor, wealthy;
loud, quiet, noisy; thick, thin, wide; rough, smooth, bumpy; young, old, small; buy, sell, pay;
win, lose, succeed; push, pull, shove; remember, forget, recall; increase, decrease, grow;
north, south, west; always, never, often; inside, outside, within; before, after, earlier; love, hate, like;
deep, shallow, wide; cheap, expensive, free
"""

# singular, plural, a common mistake
PLURALS = """
child, children, childs; mouse, mice, mouses; foot, feet, foots; tooth, teeth, tooths; goose, geese, gooses;
box, boxes, boxs; city, cities, citys; leaf, leaves, leafs; knife, knives, knifes; wolf, wolves, wolfs;
potato, potatoes, potatos; sheep, sheep, sheeps; baby, babies, babys; church, churches, churchs;
story, stories, storys; ox, oxen, oxs; woman, women, womans; bus, buses, bus
"""

# verb, past tense, a common mistake
PAST_TENSES = """
go, went, goed; eat, ate, eated; run, ran, runned; see, saw, seed; write, wrote, writed; buy, bought, buyed;
think, thought, thinked; catch, caught, catched; teach, taught, teached; bring, brought, bringed;
swim, swam, swimmed; fly, flew, flied; grow, grew, growed; know, knew, knowed; take, took, taked;
give, gave, gived; break, broke, breaked; speak, spoke, speaked; drive, drove, drived; sleep, slept, sleeped
"""

PHRASES = (
    "good morning",
    "keep the door closed",
    "three small boats",
    "see you on friday",
    "the train is late",
    "fresh bread and butter",
    "mind the gap",
    "happy new year",
)

WORD_LISTS = (
    "pear, apple, fig",
    "train, boat, plane",
    "sun, moon, earth",
    "violin, drum, piano",
    "river, lake, ocean",
    "spoon, fork, knife",
    "tulip, rose, daisy",
    "zebra, lion, monkey",
    "paper, ink, brush",
    "green, blue, amber",
)

LETTER_COUNTS = "window, garden, bread, elephant, cup, holiday, table, umbrella"
LAST_LETTERS = "garden, planet, music, brush, coffee, yellow, desk, animal"
REVERSIBLE = "stop, tree, lamp, bird, milk, sand"

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

# quantity, unit asked for, right number, wrong number
UNITS = """
1 metre, centimetres, 100, 10; 3 metres, centimetres, 300, 30; 1 kilometre, metres, 1000, 100;
5 kilometres, metres, 5000, 50; 1 hour, minutes, 60, 100; 2 hours, minutes, 120, 200;
1 minute, seconds, 60, 30; 3 minutes, seconds, 180, 90; 1 day, hours, 24, 12; 2 days, hours, 48, 20;
1 week, days, 7, 5; 4 weeks, days, 28, 40; 1 year, months, 12, 10; 1 century, years, 100, 50;
1 decade, years, 10, 12; 1 kilogram, grams, 1000, 100; 2 kilograms, grams, 2000, 20;
1 tonne, kilograms, 1000, 500; 1 litre, millilitres, 1000, 10; 1 centimetre, millimetres, 10, 100;
1 foot, inches, 12, 10; 1 yard, feet, 3, 6; 2 dozen eggs, eggs, 24, 20
"""

# thing, definition; the wrong answer is the definition of another thing
DEFINITIONS = """
A thermometer | an instrument that measures temperature
A bakery | a place where bread is made and sold
A glacier | a large mass of ice that moves slowly
A triangle | a shape with three straight sides
An island | a piece of land with water all around it
A dictionary | a book that explains the meaning of words
A volcano | an opening in the ground from which lava can come
A telescope | an instrument for looking at distant objects
A desert | a region with very little rain
A sculptor | an artist who carves or models figures
A bicycle | a vehicle with two wheels and pedals
A compass | an instrument that shows where north is
A library | a place where people can borrow books
A harbour | a sheltered place where ships can stay
An orchestra | a large group of musicians who play together
A recipe | a list of steps for cooking a dish
A lighthouse | a tower whose lamp guides ships
A vegetarian | a person who eats no meat
A pharmacy | a shop that sells medicine
A century | a period of one hundred years
A bridge | a structure that carries a road over a gap
An eclipse | an event in which one body in space hides another
A pilot | a person who flies an aeroplane
A calendar | a table of the days and months of a year
A fossil | the preserved remains of an ancient plant or animal
A microscope | an instrument for looking at very small things
"""

# animal, name of its young, name of the young of another animal
YOUNG = """
cat, kitten, foal; dog, puppy, lamb; cow, calf, kitten; horse, foal, calf; sheep, lamb, puppy;
lion, cub, gosling; goose, gosling, joey; duck, duckling, cub; kangaroo, joey, duckling; deer, fawn, chick;
hen, chick, fawn
"""

# animal with article, number of legs, another number
LEGS = """
a spider, eight, six; an ant, six, eight; a dog, four, two; an eagle, two, four; a bee, six, four;
a horse, four, six
"""

FACTS = (
    Item("Which planet is closest to the Sun?", "{} is the planet closest to the Sun.", "Mercury", "Neptune"),
    Item("Which is the largest planet of the solar system?", "The largest planet is {}.", "Jupiter", "Mars"),
    Item("How many planets orbit the Sun?", "The Sun has {} planets.", "eight", "five"),
    Item("What is the chemical formula of water?", "The chemical formula of water is {}.", "H2O", "CO2"),
    Item("What is the chemical symbol of gold?", "The chemical symbol of gold is {}.", "Au", "Go"),
    Item("What is the chemical symbol of iron?", "The chemical symbol of iron is {}.", "Fe", "Ir"),
    Item("What is frozen water called?", "Frozen water is called {}.", "ice", "steam"),
    Item("What do bees make from nectar?", "From nectar, bees make {}.", "honey", "cheese"),
    Item("Which organ pumps blood through the body?", "Blood is pumped by {}.", "the heart", "the stomach"),
    Item("With which organ do people hear?", "People hear with {}.", "the ear", "the nose"),
    Item("Which is the largest ocean on Earth?", "The largest ocean is {}.", "the Pacific", "the Arctic"),
    Item(
        "Which is the largest living animal?",
        "The largest living animal is {}.",
        "the blue whale",
        "the house cat",
    ),
    Item("Which land animal runs fastest?", "The fastest land animal is {}.", "the cheetah", "the tortoise"),
    Item("Which metal is liquid at room temperature?", "At room temperature, {} is liquid.", "mercury", "iron"),
    Item("Which star is nearest to the Earth?", "The star nearest to the Earth is {}.", "the Sun", "the Moon"),
    Item("How many sides does a hexagon have?", "A hexagon has {} sides.", "six", "nine"),
    Item("How many sides does an octagon have?", "An octagon has {} sides.", "eight", "three"),
    Item("How many degrees are in a right angle?", "A right angle measures {} degrees.", "90", "45"),
    Item("How many degrees are in a full circle?", "A full circle measures {} degrees.", "360", "100"),
    Item(
        "How many players does a football team have on the pitch?",
        "A football team has {} players on the pitch.",
        "eleven",
        "twenty",
    ),
    Item("How many strings does a violin have?", "A violin has {} strings.", "four", "nine"),
    Item("Where does the Sun rise?", "The Sun rises {}.", "in the east", "in the west"),
    Item("Which season comes after winter?", "The season after winter is {}.", "spring", "autumn"),
    Item("At how many degrees Celsius does water freeze?", "Water freezes at {} degrees Celsius.", "0", "50"),
)

# kind, the three words, the one that is of the kind, one that is not
KINDS = """
a fruit | hammer, peach, river | peach | hammer
an animal | rabbit, window, shoe | rabbit | window
a colour | chair, seven, violet | violet | chair
a vegetable | carrot, mountain, guitar | carrot | guitar
a tool | cloud, screwdriver, soup | screwdriver | cloud
a musical instrument | trumpet, pillow, lemon | trumpet | pillow
a piece of clothing | jacket, pencil, forest | jacket | pencil
a vehicle | onion, lorry, candle | lorry | onion
a bird | sparrow, bottle, carpet | sparrow | bottle
a drink | brick, shirt, tea | tea | brick
"""

# language, English word, its translation, another word of that language
TRANSLATIONS = """
French, house, maison, chien; French, dog, chien, maison; French, water, eau, pain;
French, bread, pain, eau; French, red, rouge, vert; Spanish, house, casa, perro; Spanish, dog, perro, casa;
Spanish, water, agua, pan; Spanish, thank you, gracias, adios; Spanish, white, blanco, rojo;
German, house, Haus, Hund; German, dog, Hund, Haus; German, water, Wasser, Brot; German, bread, Brot, Wasser
"""

# sentence, its negation, a sentence that is no negation of it
NEGATIONS = """
The cat is asleep. | The cat is not asleep. | The cat is very asleep.
We were at home. | We were not at home. | We are at home.
She can swim. | She cannot swim. | She can swim well.
The shop is open. | The shop is not open. | The shop was open.
It will rain today. | It will not rain today. | It will rain tomorrow.
They have a garden. | They do not have a garden. | They have two gardens.
"""

# statement, the question, a statement that is no question
QUESTIONS = """
She can swim. | Can she swim? | She can swim!
The train is late. | Is the train late? | The train was late.
You are hungry. | Are you hungry? | You are not hungry.
They will come. | Will they come? | They came.
He has finished. | Has he finished? | He finished it.
We should leave. | Should we leave? | We left early.
"""

# request, the polite form, an impolite one
REQUESTS = """
Give me the book. | Could you please give me the book? | Give me the book at once.
Close the door. | Would you please close the door? | Close that door now.
Move your car. | Could you please move your car? | Move your car, you fool.
Tell me the time. | Could you please tell me the time? | Tell me the time, quick.
Stop talking. | Would you please stop talking? | Shut up.
Wait outside. | Would you mind waiting outside, please? | Get out.
"""

# present, past, a sentence that is not in the past
SENTENCES = """
We walk to school. | We walked to school. | We will walk to school.
He plays the piano. | He played the piano. | He is playing the piano.
I am tired. | I was tired. | I be tired.
They live in Spain. | They lived in Spain. | They do live in Spain.
She makes a cake. | She made a cake. | She maked a cake.
The dog sleeps. | The dog slept. | The dog sleeped.
"""

# beginning of a proverb, its last word, another word
PROVERBS = """
Better late than, never, early; Practice makes, perfect, noise; Actions speak louder than, words, drums;
Every cloud has a silver, lining, spoon; The early bird catches the, worm, bus;
Two heads are better than, one, three; A stitch in time saves, nine, money; Look before you, leap, sleep;
All that glitters is not, gold, cheap; Don't judge a book by its, cover, price
"""

SHORT_EVASIONS = (
    "I don't know.",
    "Hard to say.",
    "It depends.",
    "Why do you ask?",
    "No idea, sorry.",
    "Maybe later.",
)
LONG_EVASIONS = (
    "I would rather not answer, since people see this in many ways.",
    "There are many opinions about it and I cannot choose one.",
    "You could look that up in a book or ask somebody else.",
    "Let me think about it and come back to you another day.",
    "That is an interesting question with a long history.",
    "Some say one thing, some say another, and both have a point.",
)

# (chosen style, rejected style): the shares keep the two sides' lengths alike
STYLES = (
    ("short", "wrong"),
    ("short", "wrong sentence"),
    ("short", "wrong sentence"),
    ("sentence", "wrong"),
    ("sentence", "wrong"),
    ("sentence", "wrong sentence"),
    ("sentence", "wrong sentence"),
    ("sentence", "short evasion"),
    ("sentence", "long evasion"),
    ("sentence", "shuffled"),
    ("sentence", "unfinished"),
    ("sentence", "undecided"),
    ("short", "repeated"),
    ("sentence", "repeated"),
)


class Draws:
    """Choices from `random.Random.random`, the one method whose sequence Python promises never to change."""

    def __init__(self, seed):
        self._random = random.Random(seed).random

    def pick(self, options):
        return options[int(self._random() * len(options))]

    def shuffle(self, values):
        return [value for _, value in sorted((self._random(), index, value)[::2] for index, value in enumerate(values))]

    def integer(self, low, high):
        """An integer of low..high, both included."""
        return low + int(self._random() * (high - low + 1))


def rows(table, separator=","):
    """The records of a table above: one per line with "|", else one per semicolon."""
    records = table.strip().split("\n") if separator == "|" else table.replace("\n", " ").split(";")
    return [[cell.strip() for cell in record.split(separator)] for record in records if record.strip()]


def sentence_case(text):
    return text[:1].upper() + text[1:]


def facts():
    for country, capital, city in rows(CAPITALS):
        yield Item(f"What is the capital of {country}?", f"The capital of {country} is {{}}.", capital, city)
    for thing, colour, other in rows(COLOURS):
        yield Item(f"What colour is {thing}?", f"The colour of {thing} is {{}}.", colour, other)
    for paints, colour, other in rows(MIXTURES):
        question = f"Which colour results from mixing {paints} paint?"
        yield Item(question, f"Mixing {paints} paint gives {{}}.", colour, other)
    yield from FACTS
    for animal, young, other in rows(YOUNG):
        yield Item(
            f"What is the young of a {animal} called?",
            f"The young of a {animal} is called a {{}}.",
            young,
            other,
        )
    for animal, number, other in rows(LEGS):
        yield Item(f"How many legs does {animal} have?", f"{sentence_case(animal)} has {{}} legs.", number, other)
    definitions = rows(DEFINITIONS, "|")
    for index, (thing, meaning) in enumerate(definitions):
        other = definitions[(index + 7) % len(definitions)][1]
        question = f"What is {thing[0].lower()}{thing[1:]}?"
        yield Item(question, f"{thing} is {{}}.", meaning, other)


def words():
    for word, opposite, other in rows(OPPOSITES):
        yield Item(f'What is the opposite of "{word}"?', f'The opposite of "{word}" is "{{}}".', opposite, other)
    for word, plural, mistake in rows(PLURALS):
        yield Item(f'What is the plural of "{word}"?', f'The plural of "{word}" is "{{}}".', plural, mistake)
    for verb, past, mistake in rows(PAST_TENSES):
        yield Item(f'What is the past tense of "{verb}"?', f'The past tense of "{verb}" is "{{}}".', past, mistake)
    for kind, options, right, wrong in rows(KINDS, "|"):
        yield Item(f"Which of these is {kind}: {options}?", f"Of these, {{}} is {kind}.", right, wrong)
    for language, word, translation, other in rows(TRANSLATIONS):
        question = f'How do you say "{word}" in {language}?'
        yield Item(question, f'"{sentence_case(word)}" in {language} is "{{}}".', translation, other)
    for beginning, ending, other in rows(PROVERBS):
        yield Item(f"Finish the proverb: {beginning} ...", f"{beginning} {{}}.", ending, other)


def rewriting(draws):
    for phrase in PHRASES:
        question = f"Write this in capital letters: {phrase}"
        yield Item(question, 'In capital letters: "{}".', phrase.upper(), sentence_case(phrase))
    for listed in WORD_LISTS:
        ordered = ", ".join(sorted(listed.split(", ")))
        wrong = ", ".join(sorted(listed.split(", "), reverse=True))
        yield Item(f"Sort alphabetically: {listed}", "In alphabetical order: {}.", ordered, wrong)
    for word in LETTER_COUNTS.split(", "):
        wrong = len(word) + draws.pick((-2, -1, 1, 2))
        yield Item(
            f'How many letters are in "{word}"?',
            f'"{sentence_case(word)}" has {{}} letters.',
            str(len(word)),
            str(wrong),
        )
    for word in LAST_LETTERS.split(", "):
        yield Item(
            f'What is the last letter of "{word}"?',
            f'The last letter of "{word}" is "{{}}".',
            word[-1],
            word[1],
        )
    for word in REVERSIBLE.split(", "):
        wrong = word[1:] + word[0]
        yield Item(f'Spell "{word}" backwards.', f'"{sentence_case(word)}" backwards is "{{}}".', word[::-1], wrong)
    for table, task, sentence in (
        (NEGATIONS, "Make this sentence negative", "The negative is: {}"),
        (QUESTIONS, "Turn this into a question", "As a question: {}"),
        (REQUESTS, "Say this politely", "More politely: {}"),
        (SENTENCES, "Put this in the past tense", "In the past tense: {}"),
    ):
        for text, right, wrong in rows(table, "|"):
            yield Item(f"{task}: {text}", sentence, right, wrong)


def numbers(draws):
    asked = set()

    def fresh(make, count):
        """`count` items from `make()` with questions that have not been asked yet."""
        made = 0
        while made < count:
            item = make()
            if item.question not in asked:
                asked.add(item.question)
                made += 1
                yield item

    def slip(value):
        return str(value + draws.pick([step for step in (-10, -3, -2, -1, 1, 2, 3, 10) if value + step > 0]))

    def addition():
        a, b = draws.integer(3, 60), draws.integer(3, 39)
        return Item(f"What is {a} + {b}?", f"{a} plus {b} is {{}}.", str(a + b), slip(a + b))

    def subtraction():
        a, b = draws.integer(20, 90), draws.integer(3, 19)
        return Item(f"What is {a} - {b}?", f"{a} minus {b} is {{}}.", str(a - b), slip(a - b))

    def product():
        a, b = draws.integer(2, 12), draws.integer(2, 12)
        return Item(f"What is {a} times {b}?", f"{a} times {b} is {{}}.", str(a * b), slip(a * b))

    def quotient():
        a, b = draws.integer(2, 10), draws.integer(2, 10)
        return Item(f"What is {a * b} divided by {b}?", f"{a * b} divided by {b} is {{}}.", str(a), slip(a))

    def comparison():
        a, b = draws.integer(1, 9), draws.integer(1, 9)
        low, high = sorted((10 * a + b, 10 * b + a + (a == b)))
        first, second = draws.shuffle([low, high])
        question = f"Which is larger, {first} or {second}?"
        return Item(question, f"Of {first} and {second}, the larger is {{}}.", str(high), str(low))

    def sequence():
        start, step = draws.integer(1, 20), draws.integer(2, 9)
        terms = [start + step * index for index in range(5)]
        listed = ", ".join(map(str, terms[:4]))
        return Item(f"Which number comes next: {listed}?", "The next number is {}.", str(terms[4]), str(terms[4] + 1))

    for make, count in (
        (addition, 16),
        (subtraction, 12),
        (product, 12),
        (quotient, 8),
        (comparison, 8),
        (sequence, 10),
    ):
        yield from fresh(make, count)


def calendar_and_units():
    for index, day in enumerate(DAYS):
        following, preceding = DAYS[(index + 1) % 7], DAYS[index - 1]
        yield Item(f"Which day comes after {day}?", f"The day after {day} is {{}}.", following, preceding)
    for index in (0, 1, 3, 5, 7, 8, 10):
        following, preceding = MONTHS[index + 1], MONTHS[index - 1]
        yield Item(
            f"Which month comes before {MONTHS[index]}?",
            f"The month before {MONTHS[index]} is {{}}.",
            preceding,
            following,
        )
    for index, right, wrong in (
        (0, "31", "30"),
        (3, "30", "31"),
        (5, "30", "28"),
        (9, "31", "29"),
        (10, "30", "31"),
    ):
        yield Item(f"How many days does {MONTHS[index]} have?", f"{MONTHS[index]} has {{}} days.", right, wrong)
    for quantity, unit, right, wrong in rows(UNITS):
        yield Item(f"How many {unit} are in {quantity}?", f"There are {{}} {unit} in {quantity}.", right, wrong)


def answer(text):
    """A bare answer as a sentence of its own: a capital letter and a full stop."""
    text = sentence_case(text)
    return text if text[-1] in ".?!" else text + "."


def filled(sentence, text):
    """The sentence with its answer; a text that brings its own punctuation keeps it."""
    return sentence_case(sentence.format(text))


def rejected_answer(item, style, draws):
    if style == "wrong":
        return answer(item.wrong)
    if style == "wrong sentence":
        return filled(item.sentence, item.wrong)
    if style == "short evasion":
        return draws.pick(SHORT_EVASIONS)
    if style == "long evasion":
        return draws.pick(LONG_EVASIONS)
    right = filled(item.sentence, item.right)
    if style == "shuffled":
        ordered = right.rstrip(".?!").split()
        return " ".join([ordered[-1], *draws.shuffle(ordered[:-1])])
    if style == "unfinished":
        beginning = item.sentence.split("{}")[0].rstrip(' "')
        return beginning or " ".join(filled(item.sentence, item.wrong).split()[:3])
    if style == "undecided":
        return f"{answer(item.wrong)[:-1]}, or {item.right.rstrip('.?!')}, one of the two."
    if style == "repeated":
        said = item.wrong.rstrip(".?!")
        return answer(" ".join([said, said.split()[-1], said.split()[-1]]))
    raise ValueError(f"unknown style {style!r}")


def pairs():
    """All preference pairs, as dictionaries, in the order of the file."""
    draws = Draws(SEED)
    items = [*facts(), *words(), *rewriting(draws), *numbers(draws), *calendar_and_units()]
    styles = []
    for item in items:
        styles = styles or draws.shuffle(STYLES)
        chosen_style, rejected_style = styles.pop()
        chosen = answer(item.right) if chosen_style == "short" else filled(item.sentence, item.right)
        rejected = rejected_answer(item, rejected_style, draws)
        yield {"prompt": item.question + "\n", "chosen": chosen, "rejected": rejected}


def file_text():
    return "".join(json.dumps(pair) + "\n" for pair in pairs())


def main(arguments):
    if arguments not in ([], ["--check"]):
        sys.exit(f"usage: make_demo_data.py [--check], not {' '.join(arguments)}")
    if arguments:
        if not OUTPUT.is_file() or OUTPUT.read_bytes() != file_text().encode():
            sys.exit(f"{OUTPUT.name} is not what this script writes: run it without --check")
        print(f"{OUTPUT.name} is up to date")
    else:
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        OUTPUT.write_bytes(file_text().encode())
        print(f"wrote {OUTPUT.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
