"""General knowledge: countries, colours, animals, counting, time, words, things. Tables, and ways to ask."""
# ruff: noqa: E501  (a fact and its phrasings read best as one row)

from __future__ import annotations

from demo.grammar import Topic


def table(text: str) -> tuple[tuple[str, ...], ...]:
    """Rows from "a: b, c: d": pairs between commas, columns between colons."""
    return tuple(
        tuple(cell.strip() for cell in row.split(":")) for row in text.replace("\n", " ").split(",")
    )


COUNTRIES = table("""
    France: Paris: Europe: French, Spain: Madrid: Europe: Spanish, Italy: Rome: Europe: Italian,
    Germany: Berlin: Europe: German, Portugal: Lisbon: Europe: Portuguese, Poland: Warsaw: Europe: Polish,
    Norway: Oslo: Europe: Norwegian, Sweden: Stockholm: Europe: Swedish, Denmark: Copenhagen: Europe: Danish,
    Finland: Helsinki: Europe: Finnish, Iceland: Reykjavik: Europe: Icelandic, Greece: Athens: Europe: Greek,
    Hungary: Budapest: Europe: Hungarian, Austria: Vienna: Europe: German, Romania: Bucharest: Europe: Romanian,
    Bulgaria: Sofia: Europe: Bulgarian, Ukraine: Kyiv: Europe: Ukrainian, England: London: Europe: English,
    Ireland: Dublin: Europe: English, Scotland: Edinburgh: Europe: English, Croatia: Zagreb: Europe: Croatian,
    Serbia: Belgrade: Europe: Serbian, Russia: Moscow: Europe: Russian, Japan: Tokyo: Asia: Japanese,
    China: Beijing: Asia: Chinese, Thailand: Bangkok: Asia: Thai, Vietnam: Hanoi: Asia: Vietnamese,
    South Korea: Seoul: Asia: Korean, Turkey: Ankara: Asia: Turkish, Iran: Tehran: Asia: Persian,
    Iraq: Baghdad: Asia: Arabic, Egypt: Cairo: Africa: Arabic, Kenya: Nairobi: Africa: Swahili,
    Morocco: Rabat: Africa: Arabic, Ghana: Accra: Africa: English, Senegal: Dakar: Africa: French,
    Cuba: Havana: North America: Spanish, Mexico: Mexico City: North America: Spanish,
    Argentina: Buenos Aires: South America: Spanish, Brazil: Brasilia: South America: Portuguese,
    Peru: Lima: South America: Spanish, Chile: Santiago: South America: Spanish,
    Colombia: Bogota: South America: Spanish, Australia: Canberra: Oceania: English,
    New Zealand: Wellington: Oceania: English
""")
NATIONS = tuple(row[:2] for row in COUNTRIES)

COLOURS = table("""
    the sky: blue, the sea: blue, grass: green, a leaf: green, snow: white, milk: white, salt: white, sugar: white,
    rice: white, flour: white, cotton: white, blood: red, coal: black, soot: black, tar: black, a banana: yellow,
    a lemon: yellow, a sunflower: yellow, a chick: yellow, butter: yellow, a strawberry: red, a tomato: red, a cherry: red,
    a ruby: red, a fire engine: red, a carrot: orange, an orange: orange, a pumpkin: orange, a cucumber: green,
    a frog: green, an emerald: green, a pea: green, spinach: green, a cactus: green, a flamingo: pink, a pig: pink,
    a raven: black, a crow: black, a panther: black, chocolate: brown, coffee: brown, earth: brown, a chestnut: brown,
    a polar bear: white, a swan: white, a cloud: white, chalk: white, an elephant: grey, a mouse: grey, a shark: grey,
    lavender: purple, a plum: purple, an aubergine: purple, a violet: purple, a sapphire: blue, a cornflower: blue
""")

MIXTURES = table("""
    blue: yellow: green, yellow: blue: green, red: yellow: orange, yellow: red: orange, red: blue: purple,
    blue: red: purple, red: white: pink, white: red: pink, black: white: grey, white: black: grey
""")

SOUNDS = table("""
    cow: moo, dog: woof, cat: meow, sheep: baa, duck: quack, horse: neigh, pig: oink, lion: roar, mouse: squeak,
    bee: buzz, snake: hiss, frog: croak, owl: hoot, donkey: hee-haw, crow: caw, chick: peep, turkey: gobble,
    wolf: howl, cuckoo: cuckoo, rooster: cock-a-doodle-doo
""")

YOUNG = table("""
    dog: puppy, cat: kitten, cow: calf, horse: foal, sheep: lamb, pig: piglet, goat: kid, duck: duckling, hen: chick,
    goose: gosling, lion: cub, bear: cub, deer: fawn, frog: tadpole, swan: cygnet, kangaroo: joey, owl: owlet,
    eagle: eaglet, hare: leveret, seal: pup
""")

HOMES = table("""
    bee: hive, bird: nest, spider: web, rabbit: burrow, fox: den, dog: kennel, horse: stable, bear: cave, ant: anthill,
    pig: sty, cow: barn, beaver: lodge, hen: coop, snail: shell, mole: tunnel, owl: hollow tree
""")

FOOD = table("""
    panda: bamboo, cow: grass, rabbit: carrots and grass, squirrel: nuts, horse: hay, koala: eucalyptus leaves, lion: meat,
    monkey: fruit, bee: nectar, spider: insects, frog: flies, owl: mice, giraffe: leaves, penguin: fish, caterpillar: leaves,
    mouse: grain, shark: fish, cat: mice, sheep: grass, bat: insects, hedgehog: beetles and worms, seal: fish
""")

PRODUCTS = table("""
    wool: sheep, milk: cows, eggs: hens, honey: bees, silk: silkworms, down: geese, beeswax: bees, pearls: oysters
""")

KINDS = table("""
    whale: whales: mammal: fish, dolphin: dolphins: mammal: fish, bat: bats: mammal: bird, dog: dogs: mammal: reptile,
    cat: cats: mammal: insect, horse: horses: mammal: bird, elephant: elephants: mammal: reptile, lion: lions: mammal: bird,
    mouse: mice: mammal: insect, frog: frogs: amphibian: fish, toad: toads: amphibian: insect,
    snake: snakes: reptile: mammal, turtle: turtles: reptile: fish, lizard: lizards: reptile: mammal,
    crocodile: crocodiles: reptile: fish, shark: sharks: fish: mammal, salmon: salmon: fish: mammal,
    trout: trout: fish: bird, penguin: penguins: bird: fish, eagle: eagles: bird: insect, ostrich: ostriches: bird: mammal,
    duck: ducks: bird: mammal, bee: bees: insect: bird, ant: ants: insect: reptile, butterfly: butterflies: insect: bird,
    fly: flies: insect: bird, seal: seals: mammal: fish, cow: cows: mammal: fish
""")

COUNTS = table("""
    days: a week: 7, hours: a day: 24, minutes: an hour: 60, seconds: a minute: 60, months: a year: 12, days: a year: 365,
    weeks: a year: 52, seasons: a year: 4, years: a decade: 10, years: a century: 100, days: a leap year: 366,
    sides: a triangle: 3, sides: a square: 4, sides: a rectangle: 4, sides: a pentagon: 5, sides: a hexagon: 6,
    sides: an octagon: 8, corners: a triangle: 3, corners: a square: 4, faces: a cube: 6, fingers: a hand: 5,
    toes: a foot: 5, letters: the alphabet: 26, colours: a rainbow: 7, planets: the solar system: 8,
    players: a football team: 11, strings: a violin: 4, strings: a guitar: 6, wheels: a car: 4, wheels: a bicycle: 2,
    wheels: a tricycle: 3, centimetres: a metre: 100, metres: a kilometre: 1000, grams: a kilogram: 1000, eggs: a dozen: 12,
    squares: a chessboard: 64, bits: a byte: 8, legs: a spider: 8, legs: an insect: 6, legs: an ant: 6, legs: a bee: 6,
    legs: a fly: 6, legs: a beetle: 6, legs: a crab: 10, legs: a dog: 4, legs: a cat: 4, legs: a cow: 4, legs: a horse: 4,
    legs: a bird: 2, legs: a hen: 2, legs: a human: 2, legs: a snake: 0, legs: a fish: 0, legs: a scorpion: 8,
    legs: an elephant: 4, legs: a table: 4, arms: an octopus: 8, eyes: a human: 2, wings: a bird: 2, wings: a bee: 4,
    humps: a dromedary: 1, continents: the Earth: 7, oceans: the Earth: 5, moons: the Earth: 1
""")

RECORDS = table("""
    [fastest|quickest]: [animal on land|land animal]: the cheetah, [largest|biggest]: animal: the blue whale,
    tallest: animal: the giraffe, [largest|biggest]: [animal on land|land animal]: the elephant, [largest|biggest]: bird: the ostrich,
    smallest: bird: the hummingbird, [fastest|quickest]: bird: the peregrine falcon, slowest: animal: the sloth,
    [largest|biggest]: cat: the tiger, [largest|biggest]: [planet|planet around the sun|of the planets]: Jupiter,
    smallest: [planet|planet around the sun]: Mercury, hottest: planet: Venus, [coldest|farthest]: planet: Neptune,
    [highest|tallest]: mountain: Mount Everest, longest: river: the Nile, [largest|biggest]: ocean: the Pacific Ocean,
    smallest: ocean: the Arctic Ocean, [largest|biggest]: continent: Asia, smallest: continent: Australia,
    [largest|biggest]: country: Russia, smallest: country: Vatican City, [largest|biggest]: hot desert: the Sahara,
    deepest: lake: Lake Baikal, hardest: [natural material|stone]: diamond, [largest|biggest]: [part of the body|organ]: the skin,
    brightest: [star in our sky|star we see]: the sun, shortest: month: February
""")

OPPOSITES = table("""
    hot: cold, big: small, large: little, fast: slow, heavy: light, up: down, left: right, day: night, black: white,
    good: bad, happy: sad, old: new, rich: poor, wet: dry, open: closed, full: empty, hard: soft, loud: quiet, high: low,
    long: short, near: far, early: late, easy: difficult, clean: dirty, strong: weak, thick: thin, wide: narrow, deep: shallow,
    true: false, right: wrong, first: last, always: never, begin: end, start: stop, push: pull, in: out, above: below,
    before: after, inside: outside, win: lose, buy: sell, give: take, love: hate, laugh: cry, come: go, brave: afraid,
    sharp: blunt, smooth: rough, sweet: sour, warm: cool, bright: dark, young: old, tall: short, yes: no, more: less,
    north: south, east: west, front: back, top: bottom, alive: dead, asleep: awake, safe: dangerous, cheap: expensive,
    friend: enemy, summer: winter, question: answer, polite: rude, lazy: busy, clever: stupid, wild: tame
""")
BOTH_WAYS = OPPOSITES + tuple(
    (b, a) for a, b in OPPOSITES if b not in {"right", "old", "short", "light"}
)

USES = table("""
    a clock: tell the time, scissors: cut paper, a hammer: drive a nail into wood, an umbrella: stay dry in the rain,
    a key: open a lock, a pen: write a letter, a knife: cut bread, a spoon: eat soup, a broom: sweep the floor,
    a thermometer: measure the temperature, a ruler: draw a straight line, a pair of scales: weigh flour,
    a telescope: look at the stars, a microscope: look at tiny things, a compass: find north, a saw: cut wood,
    a needle: sew a button, soap: wash your hands, a towel: dry your hands, a toothbrush: clean your teeth,
    a lamp: light a room, an oven: bake a cake, a fridge: keep food cold, a map: find the way, a telephone: call a friend,
    a camera: take a picture, a calendar: look up the date, a bed: sleep, a bicycle: ride to school, a ladder: reach the roof,
    a shovel: dig a hole, glasses: see better, a kettle: boil water, a boat: cross a lake, a rubber: rub out a mistake
""")

PLURALS = table("""
    mouse: mice, child: children, foot: feet, tooth: teeth, goose: geese, man: men, woman: women, leaf: leaves, wolf: wolves,
    knife: knives, sheep: sheep, fish: fish, box: boxes, city: cities, baby: babies, dog: dogs, cat: cats, house: houses,
    person: people, potato: potatoes, bus: buses, life: lives
""")

PASTS = table("""
    go: went, eat: ate, see: saw, run: ran, come: came, take: took, give: gave, write: wrote, sing: sang, swim: swam, fly: flew,
    buy: bought, think: thought, make: made, find: found, sleep: slept, drink: drank, know: knew, say: said, walk: walked
""")

GREETINGS = table("""
    hello: French: bonjour, hello: German: hallo, hello: Spanish: hola, hello: Italian: ciao, thank you: French: merci,
    thank you: German: danke, thank you: Spanish: gracias, thank you: Italian: grazie, yes: French: oui, yes: German: ja,
    yes: Spanish: sí, yes: Italian: sì, no: French: non, no: German: nein, no: Spanish: no, water: French: eau,
    water: German: Wasser, water: Spanish: agua, bread: French: pain, bread: German: Brot, bread: Spanish: pan,
    cat: French: chat, cat: German: Katze, cat: Spanish: gato, dog: French: chien, dog: German: Hund, dog: Spanish: perro
""")

THINGS = table("""
    the sun: a star; it gives the Earth light and warmth, the moon: a ball of rock that goes round the Earth,
    the Earth: the planet we live on, Mars: a planet; it is called the red planet, Saturn: a planet with bright rings,
    a star: a huge ball of hot glowing gas, ice: frozen water, snow: frozen water that falls from the clouds,
    rain: water that falls from the clouds, steam: water that has become a gas, a volcano: a mountain that can throw out hot rock,
    an island: land with water all around it, a desert: a dry place where little rain falls, a river: water that flows to the sea,
    the heart: the muscle that pumps blood through the body, the brain: the part of the body that thinks,
    a doctor: a person who helps sick people, a teacher: a person who helps others to learn, a baker: a person who bakes bread,
    a farmer: a person who grows food, a piano: a musical instrument with black and white keys,
    a dictionary: a book that explains words, a library: a place with many books, a bakery: a shop that sells bread,
    a bridge: a way over a river or a road, a computer: a machine that follows a program,
    a program: a list of steps for a computer, gravity: the force that pulls things to the ground,
    a rainbow: an arch of seven colours in the sky, paper: a thin material made from wood, glass: a clear material made from sand,
    cheese: a food made from milk, bread: a food made from flour and water, a triangle: a shape with 3 sides,
    a fish: an animal that lives in water, a tree: a tall plant with a trunk of wood, a robot: a machine that can do work by itself
""")

TOPICS = (
    Topic(
        weight=6, rows=NATIONS, answer="The capital of {0} is {1}.",
        questions=(
            "[What is|What's|what is] the [capital|capital city] of {0}?", "[Which|What] city is the capital of {0}?",
            "[Tell me|Give me|Say] the [capital|capital city] of {0}.", "{0}: [capital|what is the capital|which capital]?",
            "[What is|What's|Tell me|Do you know] {0}'s capital[| city]?", "The capital of {0} is [which city|what|...]?",
            "[I forgot|I do not know|I cannot remember|I want to know] the capital of {0}.",
            "[Do you know|Can you tell me|Could you tell me|Can you name] the capital [|city ]of {0}?",
            "Which city [is|serves as] {0}'s capital?", "[capital of|the capital city of|capital] {0}",
            "[My teacher asked|I need to know|I would like to know] [what|which city] the capital of {0} is.",
            "[Where is the government of {0}?|Where does the government of {0} sit?|From which city is {0} governed?]",
            "[Suppose|Imagine] I [fly|travel] to the capital of {0}. [Which city is that?|Where am I then?|What is the city called?]",
            "{0} has [which|what] capital?", "What [do they call|is the name of] the capital of {0}?",
            "In {0}, [what is the capital|which city is the capital|what is the capital called]?",
        ),
        statements=("The capital of {0} is {1}.", "{1} is the capital [|city ]of {0}.", "In {0}, the capital is {1}."),
        follow_ups=("And [of |]{0}?", "[What|How] about {0}?", "And the capital of {0}?", "{0}?", "[Now|Then] {0}."),
    ),
    Topic(
        weight=2, rows=NATIONS, answer="{1} is the capital of {0}.",
        questions=(
            "[Which|What] country has {1} as its capital?", "[Which|What] country has the capital {1}?",
            "Of which country is {1} the capital?", "{1} is which country's capital?", "[Whose|Which country's] capital is {1}?",
            "Where is {1} the capital?", "[Tell me|Name] the country whose capital is {1}.", "In which country is {1}?",
            "[In what|What] country do I find {1}[| in]?", "[What|Which] country belongs to the capital {1}?",
            "{1}: capital of [which|what] [land|nation|state]?",
            "What is {1} the capital of?", "{1} is a capital. [Of what country|Which country's|Of which land]?",
        ),
        follow_ups=("And {1}?", "[What|How] about {1}?"),
    ),
    Topic(
        weight=1, rows=tuple((r[0], r[2]) for r in COUNTRIES), answer="{0} is in {1}.",
        questions=(
            "[On|In] [which|what] continent is {0}?", "[Where is|Where do I find|Where can I find] {0}[| on the map]?",
            "[Which|What] continent [is {0} in|does {0} belong to]?", "{0} is on which continent?",
            "Tell me the continent of {0}.",
        ),
        follow_ups=("And {0}?", "[What|How] about {0}?"),
    ),
    Topic(
        weight=1, rows=tuple((r[0], r[3]) for r in COUNTRIES), answer="In {0} people speak {1}.",
        questions=(
            "[Which|What] language [do people speak|is spoken|do they speak] in {0}?", "What do people speak in {0}?",
            "What is the language of {0}?", "[Which|What] language do I need in {0}?", "Name the language of {0}.",
            "In {0}, what language do they [use|speak]?",
        ),
        follow_ups=("And in {0}?", "[What|How] about {0}?"),
    ),
    Topic(
        weight=4, rows=COLOURS, answer="{A0} is {1}.",
        questions=(
            "[What|Which] [colour|color] is {0}?", "[What is|What's] the [colour|color] of {0}?",
            "[Tell me|Name|Say] the [colour|color] of {0}.", "{A0} is [what|which] [colour|color]?",
            "[What|Which] [colour|color] does {0} have?", "[What|Which] [colour|color] [would you say|do you think] {0} is?",
            "[Do you know|Can you tell me] [the colour of {0}|what colour {0} is]?",
            "I [want to draw|am drawing|draw] {0}. [Which|What] [colour|pencil|crayon] [do I need|should I take|fits]?",
            "In [which|what] [colour|color] [should I draw|would you draw|do people draw] {0}?",
            "When I [see|look at] {0}, [what|which] colour is it?", "{0}, [what|which] colour[| is it]?",
            "[Describe|Think of] {0}. [What|Which] colour [is it|comes to mind]?", "how is {0} coloured?",
        ),
        statements=("{A0} is {1}.", "The colour of {0} is {1}.", "[Tom|Mia|Everybody] knows that {0} is {1}."),
        follow_ups=("And {0}?", "[What|How] about {0}?"),
    ),
    Topic(
        weight=1, rows=MIXTURES, answer="{A0} and {1} make {2}.",
        questions=(
            "What [colour|] do [I get|you get] [if|when] [I|you] mix {0} and {1}?", "[Which|What] colour [do|does] {0} and {1} make?",
            "What do {0} and {1} [make|give|become]?", "{A0} mixed with {1} [is|gives|makes] [what|which colour]?",
            "[Mix|Blend|Combine] {0} [and|with] {1}. What [colour is it|do you get|comes out]?", "I mix {0} with {1}. [Which|What] colour [comes out|is that]?",
            "{0} plus {1} [gives what|makes which colour|is what colour]?", "If {0} paint meets {1} paint, what colour [is it|do we see]?",
            "What happens when I put {0} paint into {1} paint?",
        ),
    ),
    Topic(
        weight=1.5, rows=SOUNDS, answer="A {0} says {1}.",
        questions=(
            "What [sound|noise] does a {0} make?", "[What does a {0} say?|What do {0}s say?]", "How does a {0} [sound|go]?",
            "[What is|What's] the [sound|noise|call|voice] of a {0}?", "[Which animal says|What animal says|Who says] {1}?",
            "[Make|Give me|Do] the [sound|noise] of a {0}.", "[What|Which] [sound|noise] do you hear from a {0}?",
            "When a {0} opens its mouth, what do you hear?", "A {0} makes [what|which] [sound|noise]?", "Tell me how a {0} sounds.",
        ),
        follow_ups=("And a {0}?", "[What|How] about a {0}?"),
    ),
    Topic(
        weight=2, rows=YOUNG, answer="A young {0} is called a {1}.",
        questions=(
            "What is a [young|baby|little] {0} called?", "What do [you|we|people] call a [young|baby|little] {0}?",
            "[What is|What's] the [name|term] [of|for] a [baby|young] {0}?", "[What is|What's] the baby of a {0}[| called]?", "Which animal grows out of a {1}?",
            "[Tell me|Give me] the name of a [baby|young] {0}.", "What is a {1}?", "How do you call the [child|young|baby] of a {0}?",
            "The [young|baby|child] of a {0} is [a what|what|called]?", "Which word [do we use|is used] for a [young|little|baby] {0}?",
            "A {0} has a baby. What is [it|the baby] called?", "Name the young of a {0}.", "young {0}, what is the right word?",
        ),
        follow_ups=("And a [young|baby] {0}?", "[What|How] about a {0}?"),
    ),
    Topic(
        weight=1.5, rows=HOMES, answer="The home of a {0} is a {1}.",
        questions=(
            "Where does a {0} live?", "Where do {0}s live?", "What is the home of a {0}[| called]?", "[What|Which] kind of home [has a {0}|does a {0} have]?",
            "In what does a {0} live?", "[Who|Which animal] lives in a {1}?", "Where [can I find|would I look for|do I find] a {0}?",
            "What do [you|we] call the [home|house] of a {0}?", "The house of a {0} is [what|called what]?", "Where does a {0} sleep?",
            "Tell me where {0}s live.", "In which place do {0}s [live|stay|sleep]?",
        ),
        follow_ups=("And a {0}?", "[What|How] about a {0}?"),
    ),
    Topic(
        weight=1.5, rows=FOOD, answer="A {0} eats {1}.",
        questions=(
            "What does a {0} eat?", "What do {0}s eat?", "What is the food of a {0}?", "[What|Which food] [does a {0} like|do {0}s like] best?",
            "What should I feed [a|my] {0}?", "What is on the menu of a {0}?", "A {0} is hungry. What does it [eat|want]?",
            "What [does a {0} live on|do {0}s live on]?", "[Tell me|Say] what {0}s eat.", "[What|Which food] do I give to a {0}?", "Which food is [right|good] for a {0}?",
            "What is the favourite food of a {0}?",
        ),
        follow_ups=("And a {0}?", "[What|How] about a {0}?"),
    ),
    Topic(
        weight=1, rows=PRODUCTS, answer="We get {0} from {1}.",
        questions=(
            "Which animal gives us {0}?", "Where does {0} come from?", "[Who|Which animal|What animal] makes {0}?", "What do we get from {1}?",
            "From which animal do we [get|have] {0}?", "What [animal|] is {0} from?", "{A0} comes from [which|what] animal?",
            "What do {1} [give us|make|give]?", "Tell me where {0} comes from.", "[Which|What] animal does {0} come from?",
            "Who [gives|brings] us {0}?", "Name the animal that gives {0}.", "Without which animal would there be no {0}?",
        ),
    ),
    Topic(
        weight=1.5, rows=KINDS, answer="A {0} is a {2}.",
        questions=(
            "What kind of animal is a {0}?", "[Which|What] class of animals does a {0} belong to?", "What sort of animal is a {0}?",
            "To which group [do {1} belong|does a {0} belong]?", "What are {1}?", "Are {1} {2}s?", "A {0} is what [kind|type] of animal?",
        ),
    ),
    Topic(
        weight=1.5, rows=KINDS, answer="No, a {0} is not a {3}. A {0} is a {2}.",
        questions=(
            "Is a {0} a {3}?", "[Is it true that|Do you think that|Would you say that] a {0} is a {3}?", "Are {1} [really |]{3}s?", "Is a {0} a [sort|kind] of {3}?",
            "[Does a {0}|Do {1}] belong to the {3}s?", "A {0} is a {3}, [isn't it|right|true or false|is that right]?", "Is a {0} a {3} or [something else|a {2}]?",
            "{A1}: {3} or {2}?", "I think a {0} is a {3}. [Am I right|Is that true]?", "Are {1} [a kind of {3}s|{3}s or {2}s]?",
        ),
    ),
    Topic(
        weight=1, rows=KINDS, answer="Yes, a {0} is a {2}.",
        questions=(
            "Is a {0} a {2}?", "[Is it true that|Do you think that] a {0} is a {2}?", "Is a {0} a [sort|kind] of {2}?",
            "A {0} is a {2}, [isn't it|right]?", "[Does a {0}|Do {1}] belong to the {2}s?",
        ),
    ),
    Topic(
        weight=5, rows=COUNTS, answer="{A1} has {2} {0}.",
        questions=(
            "How many {0} does {1} have?", "How many {0} are [there |]in {1}?", "{A1} has how many {0}?", "[What is|What's] the number of {0} [in|of] {1}?",
            "How many {0} are there [to|on|for] {1}?", "[Tell me|Say] how many {0} {1} has.", "[Do you know|Can you say] how many {0} [there are in {1}|{1} has]?",
            "How many {0} [can you|do you|would I] [find|see] [in|on] {1}?", "{A1}: how many {0}?", "number of {0} in {1}",
            "The number of {0} of {1} is [what|which]?", "How many {0} belong to {1}?", "how many {0} {1}",
            "How many {0} [has|have] {1}?", "I [look at|think of] {1}. How many {0} [are there|does it have]?", "It takes how many {0} to [make|fill] {1}?",
            "How many {0} [last|lasts|make|form|are] {1}?", "[What number|Which number] of {0} does {1} have?",
        ),
        statements=("{A1} has {2} {0}.", "There are {2} {0} in {1}."),
        follow_ups=("And {1}?", "[What|How] about {1}?"),
    ),
    Topic(
        weight=4, rows=RECORDS, answer="The {0} {1} is {2}.",
        questions=(
            "[What|Which] is the {0} {1}?", "[Which|What] {1} is the {0}?", "[Name|Tell me|Say] the {0} {1}.", "The {0} {1} [in the world|of all]?",
            "[Do you know|Can you name|Can you tell me] the {0} {1}?", "[What is|What's] the {0} {1} [of all|there is|in the world]?",
            "Which {1} is {0} of all?", "[What|Which] {1} is the {0} [of all|one|of them]?", "the {0} {1} is [what|which|called]",
            "Among all, which is the {0} {1}?", "[I am looking for|I want to know] the {0} {1}.", "Who or what is the {0} {1}?",
            "[Which|What] is {0}, as a {1}?", "{A1}s: which is the {0}?", "Which {1} [wins|is number one] as the {0}?",
        ),
    ),
    Topic(
        weight=6, rows=BOTH_WAYS, answer="The opposite of {0} is {1}.",
        questions=(
            "[What is|What's] the opposite of {0}?", "[Name|Tell me|Say] the opposite of {0}.", "[Which|What] word is the opposite of {0}?",
            "{A0} is the opposite of what?", "[The opposite|opposite] of {0}[?|]", "What is not {0}?", "[If|When] [it|a thing] is not {0}, [it is what|what is it]?",
            "[What is|What's|Tell me|Find|I need] [the antonym|the contrary|an antonym|the counterpart] [of|to] {0}.", "[Which|What] word says the [reverse|contrary] of {0}?",
            "Say the [reverse|contrary] of {0}.", "not {0} but what?", "I am looking for the [opposite|reverse] of [the word |]{0}.",
            "[Do you know|Can you tell me|What would be] the [opposite|reverse|antonym] of {0}?", "What [is|would be] the [very |]opposite of {0}?",
            "If I turn {0} around, what do I get?", "{A0} and ... what is its opposite?", "Not {0} means [what|which word]?", "A word that means the opposite of {0}?",
            "A thing is not {0}. [Then what is it|How is it|What is it]?",
        ),
        statements=("The opposite of {0} is {1}.", "{A0} and {1} are opposites.", "What is not {0} is {1}."),
        follow_ups=("And [of |]{0}?", "[What|How] about {0}?"),
    ),
    Topic(
        weight=2.5, rows=USES, answer="You use {0} to {1}.",
        questions=(
            "What [do|can] [I|you|we|people] use to {1}?", "[What|Which tool|Which thing] do I need to {1}?", "I want to {1}. What do I [need|use|take]?",
            "What is {0} [used for|for|good for]?", "With what [do|can] [I|you|we] {1}?", "What does one use to {1}?", "How can I {1}?",
            "What [helps|is made|is used] to {1}?", "Why do people [have|use|own] {0}?", "[What|Which thing] is there to {1}?", "To {1}, what do I [need|use]?",
            "[Name|Tell me] a thing to {1} with.", "What would you [take|use] to {1}?", "What can I do with {0}?", "Which things are [used|made] to {1}?",
        ),
    ),
    Topic(
        weight=1.2, rows=PLURALS, answer="The plural of {0} is {1}.",
        questions=(
            "[What is|What's|Tell me|Name] the plural of {0}?", "What do you call more than one {0}?", "One {0}, two ...?", "One {0}, many what?",
            "How do I write the plural of {0}?", "plural of {0}", "[What is|What's] the plural form of {0}?",
        ),
        follow_ups=("And [of |]{0}?",),
    ),
    Topic(
        weight=1.2, rows=PASTS, answer="The past tense of {0} is {1}.",
        questions=(
            "[What is|What's|Tell me|Name] the past [tense |form |]of {0}?", "How do I say {0} in the past?", "Today I {0}, yesterday I ...?",
            "past tense of {0}", "What is {0} in the past tense?", "Put {0} into the past tense.",
        ),
        follow_ups=("And [of |]{0}?",),
    ),
    Topic(
        weight=1.2, rows=GREETINGS, answer="In {1}, {0} is {2}.",
        questions=(
            "[What is|What's] {0} in {1}?", "How do [you|I] say {0} in {1}?", "Translate {0} into {1}.", "What is the {1} word for {0}?",
            "Say {0} in {1}.", "[Tell me|Do you know] the {1} word for {0}.", "{0} in {1}?",
        ),
        follow_ups=("And {0} in {1}?",),
    ),
    Topic(
        weight=3, rows=THINGS, answer="{A0} is {1}.",
        questions=(
            "What is {0}?", "[What's|what is] {0}?", "[Explain|Describe|Define] {0}[.| to me.| for a child.]", "Tell me [about|what you know about|something about|what] {0}[.| is.]",
            "What [do you know|can you say|can you tell me] about {0}?", "{A0}, what is [that|it]?", "What exactly is {0}?", "Do you know what {0} is?",
            "What sort of thing is {0}?", "What does [the word |]{0} mean?", "How would you [explain|describe] {0}?", "{A0}?", "What do people mean by {0}?",
            "I do not know what {0} is.", "In your words, what is {0}?", "What type of object is {0}?",
        ),
        follow_ups=("And {0}?", "[What|How] about {0}?"),
    ),
)  # fmt: skip
