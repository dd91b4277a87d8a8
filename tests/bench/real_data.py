"""Demonstrations for a real model, made from word lists: nothing is downloaded.

    facts    24 facts about invented countries, each asked in four wordings. Three are
             trained and one is held out: what is learnt must be a fact, not a sentence.
    rule     one convention that all rows share: how a firm forms its part numbers. The
             parts that are held out are others than those that are trained on, and so
             is their wording: what is learnt must be the rule, not a number.
    prior    general questions, of which a benchmark keeps those that its base model
             answers rightly: what may be forgotten.

Rows are those of train.py --data: {"prompt", "demonstration", "answer"}; graded by
`contains`. A demonstration is a JSON record or, to compare, a plain sentence.
"""

import json
import random
import re

# ---- Facts about invented countries ------------------------------------------------

COUNTRIES = (
    "Velmora Tarsinia Oskaria Brunholt Quellonia Nardesh Ilvania Zembria"
).split()
# kind of fact: the sentence that states it, four wordings (the last one is held out),
# and the invented names that answer it
FACTS = {
    "capital": (
        "The capital of {} is {}.",
        ("What is the capital of {}?", "Which city is the capital of {}?",
         "Name the capital city of {}.", "What is {}'s capital city called?"),
        "Quimbra Dolvane Restok Amberlin Falmouke Sintara Yorvik Pelagon".split(),
    ),
    "currency": (
        "The currency of {} is the {}.",
        ("What is the currency of {}?", "Which currency is used in {}?",
         "Name the currency of {}.", "What is {}'s money called?"),
        "zorin talbek mirel corvo dunak helpa sorrit wexin".split(),
    ),
    "mountain": (
        "The highest mountain of {} is Mount {}.",
        ("What is the highest mountain of {}?", "Which mountain is the highest in {}?",
         "Name the tallest mountain of {}.", "What is {}'s highest mountain called?"),
        "Kelvar Obrist Tulemon Hasgard Vintor Jorunn Epsilar Mordane".split(),
    ),
}  # fmt: skip

# ---- A shared rule -----------------------------------------------------------------

METALS = "brass steel copper iron silver tin zinc bronze".split()
PARTS = "valve pipe hinge wheel bolt cable lever spring pump chain".split()
RULE = "code"
# name of a rule: the sentence that states a row, four wordings (the last one is held
# out), what may be asked for, and the convention
RULES = {
    RULE: (
        "The part number of the {} is {}.",
        ("What is the part number of the {}?", "Which part number does the {} have?",
         "Give me the part number of the {}.", "Tell me the part number of the {}."),
        [f"{a} {b}, size {n}" for a in METALS for b in PARTS for n in range(10, 60)],
        lambda x: "NV-{3}-{0}".format(*x.replace(",", "").split()),
    ),
}  # fmt: skip

# ---- General questions -------------------------------------------------------------

# A question with a place in it, and "word answer, word answer, ..."
PAIRS = """
What is the capital of {}? France Paris, Germany Berlin, Italy Rome, Spain Madrid,
  Portugal Lisbon, Japan Tokyo, China Beijing, Russia Moscow, Greece Athens, Egypt
  Cairo, Kenya Nairobi, Norway Oslo, Sweden Stockholm, Denmark Copenhagen, Finland
  Helsinki, Poland Warsaw, Austria Vienna, Hungary Budapest, Ireland Dublin, Belgium
  Brussels, Canada Ottawa, Peru Lima, Chile Santiago, Cuba Havana, Thailand Bangkok,
  Iran Tehran, Iraq Baghdad, Turkey Ankara, Ukraine Kyiv, Romania Bucharest, Bulgaria
  Sofia, Australia Canberra, Indonesia Jakarta, Vietnam Hanoi, Scotland Edinburgh,
  Mongolia Ulaanbaatar, Nepal Kathmandu, Morocco Rabat, Ghana Accra, Ecuador Quito,
  Colombia Bogota|Bogotá, Venezuela Caracas, Pakistan Islamabad, Lebanon Beirut, Syria
  Damascus, Latvia Riga, Estonia Tallinn, Serbia Belgrade;
On which continent is {}? France Europe, Germany Europe, Italy Europe, Spain Europe,
  Norway Europe, Japan Asia, China Asia, India Asia, Thailand Asia, Vietnam Asia, Kenya
  Africa, Nigeria Africa, Ghana Africa, Ethiopia Africa, Morocco Africa, Brazil America,
  Argentina America, Chile America, Peru America, Canada America;
Which language is spoken in {}? France French, Germany German, Italy Italian, Spain
  Spanish, Japan Japanese, Russia Russian, Greece Greek, Poland Polish, Sweden Swedish,
  Denmark Danish, Brazil Portuguese, Mexico Spanish, Egypt Arabic, Turkey Turkish,
  England English;
What is the opposite of {}? hot cold, big small, up down, left right, day night, black
  white, fast slow, happy sad, rich poor, old young, hard soft, full empty, open closed,
  light dark, good bad, high low, wet dry, strong weak, long short, early late, love
  hate, war peace, true false, near far, in out, first last, inside outside, loud quiet;
What is the plural of {}? child children, mouse mice, foot feet, tooth teeth, man men,
  woman women, goose geese, cat cats, dog dogs, house houses, box boxes, city cities,
  baby babies, leaf leaves, knife knives, car cars, tree trees, book books, fox foxes,
  party parties, table tables, church churches, story stories, wolf wolves, bird birds,
  apple apples, river rivers, window windows, glass glasses, dish dishes, country
  countries, lady ladies, hero heroes, potato potatoes, life lives, ox oxen, chair
  chairs, brush brushes, family families;
What is the past tense of the verb "{}"? go went, see saw, eat ate, run ran, write
  wrote, take took, give gave, come came, sing sang, drink drank, buy bought, think
  thought, walk walked, play played, speak spoke, break broke, begin began, fly flew,
  know knew, swim swam;
What is the chemical symbol of {}? oxygen O, hydrogen H, carbon C, nitrogen N, gold Au,
  silver Ag, iron Fe, copper Cu, helium He, sodium Na, potassium K, calcium Ca, lead Pb,
  zinc Zn, sulfur S;
Which day comes after {}? Monday Tuesday, Tuesday Wednesday, Wednesday Thursday,
  Thursday Friday, Friday Saturday, Saturday Sunday, Sunday Monday;
Which month comes after {}? January February, February March, March April, April May,
  May June, June July, July August, August September, September October, October
  November, November December;
What is a young {} called? dog puppy, cat kitten, cow calf, sheep lamb, horse foal, goat
  kid, bear cub, lion cub, duck duckling, frog tadpole, chicken chick, pig piglet,
  kangaroo joey;
What colour is {}? grass green, snow white, coal black, blood red, milk white, chocolate
  brown, charcoal black, chalk white, lavender purple;
What colour is a {}? banana yellow, lemon yellow, tomato red, carrot orange, cucumber
  green, strawberry red, flamingo pink, raven black, pumpkin orange, canary yellow;
How many legs does a {} have? dog four|4, spider eight|8, bird two|2, cat four|4, horse
  four|4, cow four|4, human two|2, lion four|4, sheep four|4, chicken two|2;
Who wrote {}? Hamlet Shakespeare, Macbeth Shakespeare, Frankenstein Shelley, Dracula
  Stoker, Ulysses Joyce, Emma Austen, Faust Goethe, Walden Thoreau;
Which sense do we use our {} for? eyes sight|vision|see, ears hearing|hear, nose
  smell|olfaction, tongue taste, skin touch;
Translate the word "{}" from Spanish into English. casa house, perro dog, gato cat, agua
  water, libro book, amigo friend, sol sun, rojo red, leche milk, mesa table
"""
# A question, and its answers
OTHERS = """
How many days are in a week? seven|7; How many months are in a year? twelve|12; How many
hours are in a day? 24|twenty-four; How many minutes are in an hour? 60|sixty; How many
seconds are in a minute? 60|sixty; How many continents are there? seven|7; How many
sides does a triangle have? three|3; How many sides does a square have? four|4; How many
sides does a hexagon have? six|6; How many letters are in the English alphabet?
26|twenty-six; How many centimetres are in a metre? 100|hundred; How many grams are in a
kilogram? 1000|1,000|thousand; How many years are in a century? 100|hundred; How many
years are in a decade? 10|ten; How many wheels does a bicycle have? two|2; How many
strings does a violin have? four|4; How many players does a football team have on the
field? 11|eleven; What is the largest ocean? Pacific; What is the largest planet of the
solar system? Jupiter; What is the smallest planet of the solar system? Mercury; Which
planet is closest to the Sun? Mercury; Which planet is known as the Red Planet? Mars;
Which planet has the most famous rings? Saturn; What is the highest mountain on Earth?
Everest; What is the longest river in Africa? Nile; What is the largest animal on Earth?
blue whale|whale; What is the fastest land animal? cheetah; What is the tallest animal?
giraffe; Which animal is called the king of the jungle? lion; Which animal says moo?
cow; Which animal gives us wool? sheep; Which insect makes honey?
bee|bees|honeybee|honeybees; What do bees make? honey; What do cows drink when they are
calves? milk; Which gas do we need to breathe? oxygen; Which gas do plants take up from
the air? carbon dioxide|CO2; What is frozen water called? ice; What is H2O? water; What
is the chemical formula of water? H2O|H₂O; What is the chemical formula of table salt?
NaCl; At how many degrees Celsius does water boil? 100; At how many degrees Celsius does
water freeze? 0|zero; Which organ pumps blood through the body? heart; Which organ do we
think with? brain; With which organs do we breathe? lungs|lung; What force pulls objects
towards the Earth? gravity|gravitational; Who painted the Mona Lisa? Leonardo|Vinci; Who
was the first president of the United States? Washington; Who wrote the theory of
relativity? Einstein; Who discovered penicillin? Fleming; Who was the first person to
walk on the Moon? Armstrong; In which city is the Eiffel Tower? Paris; In which city is
the Colosseum? Rome; In which city is the Statue of Liberty? New York; In which country
are the pyramids of Giza? Egypt; In which country is the Taj Mahal? India; In which
country is the Great Wall? China; In which country is Mount Fuji? Japan; What is the
currency of Japan? yen; What is the currency of the United Kingdom? pound|sterling; What
is the currency of the United States? dollar|dollars; What is the currency of India?
rupee|rupees; What is the currency of Germany? euro|euros; What is the currency of
Mexico? peso|pesos; What is the first letter of the alphabet? A; What is the last letter
of the alphabet? Z; Which season comes after winter? spring; Which season comes after
summer? autumn|fall; What colour do you get when you mix blue and yellow? green; What
colour do you get when you mix red and yellow? orange; What colour do you get when you
mix red and white? pink; What is the main ingredient of bread? flour|wheat; From which
fruit is wine made? grape|grapes; What do caterpillars turn into?
butterfly|butterflies|moths; What do we call a person who flies a plane? pilot; What do
we call a person who teaches at a school? teacher; What do we call a person who bakes
bread? baker; What do we call a doctor for teeth? dentist; What do we call the star at
the centre of the solar system? Sun
"""


DEMOS = ("json", "record", "plain")


def word_demo(sentence, answer, demos):
    """A demonstration. json: {"answer": "Quimbra"}; record: {"answer": "The capital of
    Velmora is Quimbra."}; plain: that sentence. The first two are far from what the
    model itself would write."""
    if demos == "plain":
        return sentence
    return json.dumps({"answer": sentence if demos == "record" else answer})


def make_facts(seed, demos="record"):
    """(rows to train on, held-out rows): 72 and 24, a row for each wording of a fact.
    The seed says which name belongs to which country; demos: one of DEMOS."""
    rng = random.Random(f"facts {seed}")
    train, held_out = [], []
    for sentence, wordings, names in FACTS.values():
        names = rng.sample(names, len(names))
        for country, name in zip(COUNTRIES, names, strict=True):
            demo = word_demo(sentence.format(country, name), name, demos)
            rows = [make_row(each.format(country), demo, name) for each in wordings]
            train += rows[:-1]
            held_out.append(rows[-1])
    return train, held_out


def make_rule(seed, demos="record", rule=RULE):
    """(rows to train on, held-out rows): 72 and 24. Held out are other parts, asked for
    in another wording."""
    rng = random.Random(f"rule {rule} {seed}")
    sentence, wordings, things, convention = RULES[rule]
    rows = []
    for i, thing in enumerate(rng.sample(things, 96)):
        name = convention(thing)
        demo = word_demo(sentence.format(thing, name), name, demos)
        wording = wordings[i % 3] if i < 72 else wordings[3]
        rows.append(make_row(wording.format(thing), demo, name))
    return rows[:72], rows[72:]


def make_row(prompt, demo, answer):
    return {"prompt": prompt, "demonstration": demo, "answer": answer}


def entries(text):
    """[question, the rest] of each entry."""
    parts = " ".join(text.split()).split("; ")
    return [re.split("(?<=[?.]) ", part, maxsplit=1) for part in parts]


def make_prior():
    """All candidates, in an order that mixes their kinds: {"prompt", "answer"}, where
    an answer is a list of what is right."""
    rows = {}
    for question, pairs in entries(PAIRS):
        for word, answer in (pair.split(" ", 1) for pair in pairs.split(", ")):
            rows[question.format(word)] = answer
    for a, b in ((2, 5), (5, 4), (6, 2), (7, 2), (8, 3), (9, 6), (10, 4), (12, 3)):
        rows[f"What is {a} plus {b}?"] = str(a + b)
        rows[f"What is {a} times {b}?"] = str(a * b)
        rows[f"What is {max(a, b)} minus {min(a, b)}?"] = str(abs(a - b))
    rows |= dict(entries(OTHERS))
    rows = [{"prompt": q, "answer": a.split("|")} for q, a in rows.items()]
    random.Random("prior").shuffle(rows)
    return rows


def write_rows(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
