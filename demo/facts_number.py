"""Sums with small numbers, and the calendar: rows made by rule instead of by table."""
# ruff: noqa: E501  (a fact and its phrasings read best as one row)

from __future__ import annotations

from demo.facts_world import table
from demo.grammar import Topic

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
SEASONS = ("spring", "summer", "autumn", "winter")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth",
    "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth",
)  # fmt: skip

Rows = tuple[tuple[str, ...], ...]
THINGS = "[apples|books|coins|eggs|pears|marbles|pens|sweets|cards|stamps|cakes|nuts|balls]"
WHO = "[Tom|Anna|Ben|Mia|Paul|Rosa|Sam|Ida|My friend|A boy|A girl|The baker|She|He]"


def _rows(pairs: list[tuple[int, int, int]]) -> Rows:
    """Each sum in digits and, where both numbers are small, in words: (a, b, digits of a, of b, result)."""
    rows = []
    for a, b, result in pairs:
        rows += [(str(a), str(b), str(a), str(b), str(result))] * 2
        if max(a, b) <= 10:
            rows.append((NUMBER_WORDS[a], NUMBER_WORDS[b], str(a), str(b), str(result)))
    return tuple(rows)


SUMS = _rows(
    [(a, b, a + b) for a in range(21) for b in range(21) if a + b <= 30]
    + [(a, b, a + b) for a in range(11) for b in range(11)] * 2
)
DIFFERENCES = _rows(
    [(a, b, a - b) for a in range(21) for b in range(a + 1)]
    + [(a, b, a - b) for a in range(11) for b in range(a + 1)]
)
PRODUCTS = _rows([(a, b, a * b) for a in range(11) for b in range(11)])
QUOTIENTS = _rows([(a * b, b, a) for a in range(1, 11) for b in range(1, 11) if a * b <= 50])
HALVES = tuple((str(2 * a), str(a)) for a in range(1, 11))


def _neighbours(names: tuple[str, ...]) -> Rows:
    return tuple((name, names[(i + 1) % len(names)]) for i, name in enumerate(names))


ARITHMETIC = (
    Topic(
        weight=9, rows=SUMS, answer="{2} plus {3} is {4}.",
        questions=(
            "What is {0} [plus|+|and] {1}?", "[What's|what is|How much is|how much is] {0} [plus|+|and] {1}?", "{0}[ + |+| plus ]{1}", "{0} + {1} =[| ?]", "{0} plus {1}?", "[Calculate|Compute|Work out|Tell me|Solve] {0} [plus|+|and] {1}.",
            "[Add|Please add|Sum] {0} [and|to] {1}.", "What is the sum of {0} and {1}?", "What do {0} and {1} [make|give][| together]?", "[Can you|Could you|Please] add {0} [and|to] {1}[?|]", "{0} plus {1} [makes what|is how much|equals|is]?",
            WHO + " has {0} " + THINGS + " and [gets|finds|buys] {1} more. How many [are there now|is that|does that make|in all]?", "I have {0} " + THINGS + " and [get|find|buy] {1} more. How many do I have[| now]?",
            "There are {0} [birds|boys|cows|cars|dogs] and {1} more come. How many are [there|there now]?", "[If I have|Take|I take] {0} and add {1}, what [do I get|is it|comes out]?", "{0} [cats|dogs|balls] and {1} [cats|dogs|balls], how many [are that|in all|together]?",
        ),
        follow_ups=("And {0} plus {1}?", "{0} + {1}?", "And {0} and {1}?"),
    ),
    Topic(
        weight=8, rows=DIFFERENCES, answer="{2} minus {3} is {4}.",
        questions=(
            "What is {0} [minus|-|less] {1}?", "[What's|what is|How much is|how much is] {0} [minus|-|less] {1}?", "{0}[ - |-| minus ]{1}", "{0} - {1} =[| ?]", "{0} minus {1}?", "[Calculate|Compute|Work out|Tell me|Solve] {0} [minus|-] {1}.",
            "[Subtract|Take|Please take|Take away|Please subtract] {1} from {0}.", "What is {1} less than {0}?", "{0} take away {1}?", "[Can you|Please] [subtract|take] {1} from {0}[?|]", "What is the difference between {0} and {1}?", "{0} minus {1} [makes what|is how much|equals|is]?",
            WHO + " has {0} " + THINGS + " and [gives away|loses|sells|eats|drops] {1}. How many are [left|left over|still there]?", "I have {0} " + THINGS + " and [eat|lose|sell|give you] {1}. How many [do I have|do I have left|are left]?",
            "There [are|were] {0} [birds|boys|cows|cars|dogs|people] and {1} [leave|go away|left]. How many [stay|are left|are there now]?", "You [had|have] {0} " + THINGS + ", then you [lose|use|sell] {1}. [How many are left?|What is left?]", "From {0} I take {1}. What is left?",
        ),
        follow_ups=("And {0} minus {1}?", "{0} - {1}?"),
    ),
    Topic(
        weight=6, rows=PRODUCTS, answer="{2} times {3} is {4}.",
        questions=(
            "What is {0} [times|x|*] {1}?", "[What's|what is|How much is|how much is] {0} [times|x|*] {1}?", "{0}[ x | * |*|x| times ]{1}", "{0} x {1} =[| ?]", "{0} times {1}?", "[Calculate|Compute|Work out|Tell me|Solve] {0} [times|x|*] {1}.",
            "[Multiply|Please multiply] {0} [by|with|and] {1}.", "What is the product of {0} and {1}?", "[Can you|Could you|Please] multiply {0} [by|with] {1}[?|]", "[What|How much] is {0} multiplied [with|by] {1}?",
            "There are {0} [boxes|bags|rows] with {1} " + THINGS + " each. How many is that?", "{0} times {1} [makes what|is how much|equals|is]?",
        ),
        follow_ups=("And {0} times {1}?", "{0} x {1}?"),
    ),
    Topic(
        weight=2, rows=QUOTIENTS, answer="{2} divided by {3} is {4}.",
        questions=(
            "What is {0} [divided by|/|:] {1}?", "[What's|How much is] {0} [divided by|/] {1}?", "{0} / {1}", "[Divide|Please divide] {0} by {1}.", "{0} divided by {1}?", "How many times does {1} go into {0}?",
            "{1} [children|friends] share {0} " + THINGS + ". How many does each get?",
        ),
    ),
    Topic(weight=.7, rows=HALVES, answer="Half of {0} is {1}.", questions=("What is half of {0}?", "[Tell me|What's] the half of {0}.", "half of {0}", "How much is half of {0}?")),
    Topic(weight=.7, rows=tuple((b, a) for a, b in HALVES), answer="Twice {0} is {1}.", questions=("What is twice {0}?", "[What's|Tell me] [the double of {0}|twice {0}].", "How much is two times {0}?", "Double {0}.")),
)  # fmt: skip

CALENDAR = (
    Topic(
        weight=2.5, rows=_neighbours(DAYS), answer="The day after {0} is {1}.",
        questions=(
            "[What|Which] day [comes|is] after {0}?", "[What|Which] day [follows|is next after] {0}?", "What is the day after {0}?", "Today is {0}. [What|Which day] is tomorrow?", "{0} is today. [What|Which day] [is|comes] tomorrow?", "[After|Right after] {0} [comes|is] [what|which day]?",
            "[What|Which] day is it [one day after|on the day after] {0}?", "[When|If] today is {0}, [which day is|what day is|what is] tomorrow?", "What [comes|is] next, after {0}?", "{0} is over. [Which|What] day [is next|comes now]?", "Tell me the day after {0}.", "Tomorrow, if it is {0} [today|now]?",
            "It is {0}[| today]. [What|Which] day [is|will be] tomorrow?", "Yesterday was {0}. [What|Which day] is today?",
        ),
        follow_ups=("And after {0}?",),
    ),
    Topic(
        weight=2.5, rows=tuple((b, a) for a, b in _neighbours(DAYS)), answer="The day before {0} is {1}.",
        questions=(
            "[What|Which] day [comes|is] before {0}?", "What is the day before {0}?", "Today is {0}. [What|Which day] was yesterday?", "{0} is today. [What|Which day] was yesterday?", "[Before|Right before] {0} [comes|is] [what|which day]?", "[What|Which] day was it [one day before|on the day before] {0}?",
            "[When|If] today is {0}, [which day was|what day was|what was] yesterday?", "Tell me the day before {0}.", "Yesterday, if it is {0} [today|now]?", "It is {0}[| today]. [What|Which] day was yesterday?", "Tomorrow is {0}. [What|Which day] is today?",
        ),
        follow_ups=("And before {0}?",),
    ),
    Topic(
        weight=2, rows=_neighbours(MONTHS), answer="The month after {0} is {1}.",
        questions=(
            "[What|Which] month [comes|is] after {0}?", "[What|Which] month follows {0}?", "What is the [month after|next month after] {0}?", "[After|Right after] {0} [comes|is] [what|which month]?", "It is {0}. [Which|What] month is next?", "{0} [ends|is ending|is done]. [What|Which month] comes [now|next]?",
            "Tell me the month after {0}.", "Next month, if it is {0} now?", "[When|If] it is {0}, what is next month?", "[The|Which] month that follows {0}?",
        ),
        follow_ups=("And after {0}?",),
    ),
    Topic(
        weight=1.2, rows=tuple((b, a) for a, b in _neighbours(MONTHS)), answer="The month before {0} is {1}.",
        questions=("[What|Which] month [comes|is] before {0}?", "What is the month before {0}?", "[Before|Right before] {0} [comes|is] [what|which month]?", "It is {0}. [Which|What] month was last?", "Tell me the month before {0}."),
        follow_ups=("And before {0}?",),
    ),
    Topic(
        weight=1.2, rows=_neighbours(SEASONS), answer="The season after {0} is {1}.",
        questions=("[What|Which] season [comes|is] after {0}?", "[What|Which] season follows {0}?", "What is the season after {0}?", "[After|Right after] {0} [comes|is] [what|which season]?", "It is {0}. [Which|What] season is next?", "{A0} [is over|ends|is done]. [What|Which season] comes [now|next]?", "Tell me the season after {0}.", "When {0} is [over|gone], [which season|what] begins?"),
        follow_ups=("And after {0}?",),
    ),
    Topic(
        weight=1, rows=_neighbours(LETTERS)[:-1], answer="The letter after {0} is {1}.",
        questions=("[What|Which] letter [comes|is] after {0}?", "[What|Which] letter follows {0}?", "What is the letter after {0}?", "[After|Right after] {0} [comes|is] [what|which letter]?", "[What|Which] letter is next in the alphabet after {0}?"),
        follow_ups=("And after {0}?",),
    ),
    Topic(
        weight=1, rows=tuple((MONTHS[i], ORDINALS[i]) for i in range(12)), answer="The {1} month of the year is {0}.",
        questions=("[What|Which] is the {1} month[| of the year]?", "[What|Which] month is the {1}[| of the year| one]?", "[Name|Tell me] the {1} month[| of the year].", "the {1} month is [which|called]?"),
    ),
    Topic(
        weight=1, rows=table("first month of the year: January, last month of the year: December, first day of the week: Monday, last day of the week: Sunday, first letter of the alphabet: A, last letter of the alphabet: Z"), answer="The {0} is {1}.",
        questions=("[What|Which] is the {0}?", "[What's|Name|Tell me|Say] the {0}.", "Do you know the {0}?", "[How|What] is the {0} called?", "[What|Which] one is the {0}?", "the {0}"),
    ),
    Topic(
        weight=1, rows=(("month", "year", "December"),), answer="The last month of the year is December.",
        questions=("[Which|What] month [ends|closes|finishes] the year?", "[In|During] which month does the year [stop|finish|run out]?", "[What|Which] month is the last[| of the year]?", "What is the final month of the year?", "[Which|What] month comes at the end of the year?", "The year [is over|ends] after which month?"),
    ),
    Topic(
        weight=1, rows=(("month", "year", "January"),), answer="The first month of the year is January.",
        questions=("[Which|What] month [begins|opens|starts] the year?", "[In|With] which month does the year [start|begin]?", "[What|Which] month is the first[| of the year]?", "[Which|What] month comes at the start of the year?"),
    ),
    Topic(
        weight=1.2, rows=((),), answer="Water freezes at 0 degrees Celsius.",
        questions=("[At what|At which] temperature does water [freeze|become ice|get solid]?", "When does water [freeze|become ice|get solid]?", "How cold [is ice|is freezing water|is it when water freezes]?", "What is the freezing point of water?", "[Freezing|The freezing] point of water?", "At how many degrees does water freeze?", "How many degrees [has|does] freezing water[| have]?", "How cold does it have to be for [ice|water to freeze]?", "At what temperature do [lakes|puddles] freeze?", "When do we get ice?"),
    ),
    Topic(
        weight=1.2, rows=((),), answer="Water boils at 100 degrees Celsius.",
        questions=("[At what|At which] temperature does water [boil|become steam]?", "When does water [boil|become steam]?", "How hot is boiling water?", "What is the boiling point of water?", "[Boiling|The boiling] point of water?", "At how many degrees does water boil?", "How hot must water be to boil?"),
    ),
)  # fmt: skip

TOPICS = ARITHMETIC + CALENDAR
