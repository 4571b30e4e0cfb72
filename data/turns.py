"""User turns to distil a chat model from: of the PyPI package chatterbot-corpus, and written here by a grammar, in seven tasks.

    pip install -r data/requirements.txt
    python -m data.turns --out out/turns.jsonl
    python train.py --mode distill --chat --text out/turns.jsonl --base out/smollm2 --out out/rows

A file of turns has one JSON string a line, in a random order. A turn is held out by a hash of its words alone.
"""

import json
import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data.command import OneLineParser, add_options, option, run
from data.machine import check_out
from data.packages import optional, wheel
from model import check_sizes, write_atomically

PACKAGE = "chatterbot-corpus==1.3.3"
TASKS = {  # alternatives, "|" between them; {name} stands for one of GRAMMAR's
    "explain": """Explain {topic} to {reader}. | What is {topic}? Answer {how}. | What makes {topic} important for {reader}? | Give me {few} facts about {topic}. |
        What do people often get wrong about {topic}? | Compare {topic} and {topic}. | How can {topic} change {topic}? | What should {reader} know about {topic}?""",
    "list": """List {few} {things}. | What are some {things} for {reader}? | Give me {few} {things}, {how}. | I need {things}. Can you suggest {few}? |
        List {few} {things} for {reader}, {how}. | {person} asks for {things}. Suggest {few}, {how}.""",
    "write": """Write a short poem about {topic} for {reader}. | Write an email to {reader} about {topic}. | Tell me a story about {person} and {topic} in {few} sentences. |
        Write a paragraph about {topic} for {reader}. | Write a letter from {person} to {person} about {matter}. | Write a slogan for a new {product}. |
        Describe {place} in {few} sentences. | Write a dialogue between {person} and {person} about {matter}.""",
    "rewrite": """Rewrite this {style}: {sentence} | Can you say this {style}? "{sentence}" | Make this sound better: {sentence} {sentence} |
        Correct the mistakes: {broken} | Translate into {tongue}: {sentence} | Turn this into a question: {sentence}""",
    "code": """Write a {code} function that {does}. | How do I write {code} code that {does}? Explain it {how}. | Show me an example in {code}: something that {does}. |
        Write a test for a {code} function that {does}. | What is a fast way in {code} to write something that {does}? |
        Write a {code} program that {does} and then {does}. | Explain to {reader} a {code} function that {does}.""",
    "arithmetic": """What is {number} + {number}? | What is {number} times {few}? Show your work. | If I have {number} euros and spend {small}, how much is left? |
        {person} reads {small} pages a day. How many days does a book of {number} pages take? | A {product} costs {number} euros and gets {few} euros cheaper. What is the new price? |
        {person} has {small} {fruit} and gives {few} of them to {person}. How many are left? | What is {number} minus {small}? Explain each step.""",
    "passage": """{passage}\n\n{question} | Read this and answer. {question}\n\n{passage} | {passage} {passage}\n\n{question}""",
}  # fmt: skip
GRAMMAR = {
    "topic": """gravity | photosynthesis | the water cycle | inflation | a hash table | recursion | the French Revolution | vaccines | black holes | tides |
        compound interest | the immune system | democracy | plate tectonics | electricity | the internet | climate change | supply and demand | machine learning |
        evolution | friction | volcanoes | the Roman Empire | jazz | Shakespeare | the human heart | sleep | nuclear energy | earthquakes | rainbows | batteries |
        bees | the stock market | blockchain | the moon | antibiotics | glaciers | the printing press | impressionism | the scientific method | osmosis |
        Newton's laws | the solar system | protein | rust | soil | lightning | magnets | the Silk Road | the Industrial Revolution | the pyramids | chess |
        the Olympic Games | yoga | meditation | coffee | chocolate | bread | the Great Wall of China | dinosaurs | penguins | whales | elephants | spiders | trees |
        deserts | rain forests | coral reefs | the ocean | clouds | wind power | solar panels | electric cars | trains | airplanes | bicycles | satellites |
        telescopes | DNA | viruses | bacteria | blood pressure | exercise | vitamins | allergies | stress | memory | dreams | habits | friendship | honesty |
        money | taxes | budgets | insurance | advertising | teamwork | leadership | time management | public speaking | photography | music | painting |
        poetry | novels | film | theatre | cooking | gardening | hiking | football | swimming | the alphabet | grammar | maps | calendars | clocks | zero |
        fractions | probability | statistics | geometry | prime numbers | encryption | databases | open source software | robots | computer games | passwords""",
    "reader": """a child | a student | a beginner | an expert | a friend | someone in a hurry | my grandmother | a new colleague | a tourist | a teacher | a farmer |
        a nurse | my neighbour | a small company | a class of ten-year-olds""",
    "how": "in one sentence | in two sentences | in simple words | with an example | in a few words | step by step | as a short paragraph | with a comparison",
    "few": "two | three | four | five | six | seven | ten",
    "things": """ways to save water | healthy breakfasts | tips for a job interview | gifts for a friend | books for a long journey | ways to learn a language faster |
        things to pack for camping | exercises without equipment | ways to lower an electricity bill | ideas for a birthday party | questions to ask a doctor |
        habits of good students | mistakes that new programmers make | vegetables that grow in shade | games for a rainy day | ways to calm down | hobbies for winter |
        reasons to ride a bicycle | cities worth a visit in Europe | uses of vinegar at home | tips for public speaking | ways to make new friends | names for a cat |
        cheap dinners | snacks without sugar | science experiments | songs to sing together | ways to save money | ideas for a school project | rules for a library |
        topics for an essay | animals that sleep in winter | inventions that changed the world | jobs that need maths | things to do on a Sunday | ways to thank a teacher |
        words that describe the sea | tools for a small garden | safety rules for a kitchen | signs of a good friend | first steps in chess | ways to reuse old clothes""",
    "style": """in a formal tone | in a friendly tone | in simpler words | in the past tense | in fewer words | as a headline | without mistakes | as a polite request |
        more clearly | for a child | with more detail | in the future tense""",
    "sentence": """{person} {did} {what} {when}. | The meeting about {matter} is moved to {day} because {person} is ill. | I think we should maybe try to talk about {matter} {when}. |
        Due to the fact that it rained, {person} was not able to go to {place}. | Please send me the report about {matter} before {day}. | We regret to inform you that {place} is closed on {day}. |
        Our new {product} is better, faster and cheaper than the old one. | {person} told {person} that {place} would open on {day}.""",
    "broken": """{person} dont know nothing about {matter}. | Me and {person} was at {place} {when}. | {person} have went to {place} on {day} and buyed a {product}. |
        Their is to many people in {place}, {person} said. | The {product} what I buyed on {day} are broke.""",
    "person": "Anna | Tom | Maria | Ben | Lucy | Omar | Mr. Smith | Mrs. Green | Dr. Lee | Sofia | David | Emma | Paul | Nina | the teacher | my brother | the mayor | our boss",
    "did": "lost | found | bought | sold | repaired | forgot | painted | described | hid | borrowed",
    "what": "an old map | a red bicycle | the keys | three books | a letter from her grandmother | the wrong ticket | a broken clock | two concert tickets | a small dog | the blue coat",
    "when": "yesterday | last summer | in the morning | after lunch | on Monday | two weeks ago | before the storm | at night",
    "matter": "the budget | the summer trip | the broken window | the new schedule | a lost parcel | the birthday party | the garden | the exam | the late train | a job offer",
    "day": "Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | Sunday",
    "place": "the library | the beach | the museum | the station | the old market | a small village | the swimming pool | the city park | the airport | the school | a quiet forest",
    "product": "laptop | backpack | coffee machine | bicycle | lamp | umbrella | watch | tent | notebook | camera | pair of shoes | desk",
    "fruit": "apples | pears | oranges | plums | lemons | cherries",
    "tongue": "French | Spanish | German | Italian",
    "code": "Python | JavaScript | C | SQL | Bash | Java | Go | Rust",
    "does": """reverses a list | counts the words in a text | checks whether a number is prime | finds the largest of three numbers | sorts names by length |
        removes duplicates from a list | computes a factorial | converts Celsius to Fahrenheit | checks whether a word is a palindrome | merges two dictionaries |
        reads a file and prints its lines | finds the common items of two lists | computes an average | draws a triangle of stars | generates Fibonacci numbers |
        counts the vowels in a word | finds the shortest word | adds up the digits of a number | splits a text into sentences | rounds prices to two digits |
        swaps two variables | checks a password | finds files by their ending | waits for five seconds | prints today's date | draws a random number |
        turns a list into a table | finds the second largest number | removes spaces at both ends | checks whether a year is a leap year | downloads a page |
        counts from ten to one | plays a guessing game | stores a phone number | shuffles a list | checks whether two words are anagrams |
        finds the longest line of a file | finds a name in a list | groups people by age | converts a number to binary | computes the area of a circle""",
    "small": "|".join(map(str, range(8, 41))),
    "number": "|".join(map(str, range(41, 400))),
    "year": "|".join(map(str, range(1850, 2021))),
    "passage": """{person} was born in {year} near {place}. In {year} {person} wrote a book about {topic}, which was read all over the country. |
        {person} has a shop near {place}. It opens at eight in the morning and closes at six, but on {day} it stays closed. |
        {place} was built in {year}. It cost {number} million euros, and about {number} people visit it every day. |
        {place} will be closed from {day} to {day} for repairs. Books and tickets may be returned within {small} days. |
        {person} bought {small} {fruit} and {few} {fruit}. {person} gave half of them to {person} and ate one on the way home. |
        On {day} {person} went to {place} to talk about {matter}. {person} came {small} minutes late, because the {product} was lost. |
        A club of {small} people meets on {day} in {place}. Last time they spoke about {topic}, next time it will be {topic}. |
        The {product} was invented around {year}. At first only {few} of them were made in a year, later {number} in a day. |
        Octopuses have three hearts and blue blood. {person} saw {few} of them {when} and wrote a report of {small} pages about them. |
        Coffee was first grown in Ethiopia. Traders brought it to Yemen, and from there it spread to Turkey. In {year}, {person} opened a coffee house near {place}.""",
    "question": """What is this text about? | Summarize the text in one sentence. | Write a title for the text. | Which numbers are named in the text? |
        Who or what is the text about? | Turn the text into {few} bullet points. | Write a question that the text answers. | Translate the first sentence into {tongue}. |
        Rewrite the text {style}. | What may happen next? | When does this take place?""",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    out: str = option("out/turns.jsonl", "file to write")
    written: int = option(3000, "turns written by the grammar")
    seed: int = option(0, "seed of the grammar and of the order")

    def __post_init__(self):
        check_sizes(self, ["written"])


def alternatives(rule: str) -> list[str]:
    return [re.sub(r" *\n +", " ", item.strip(" \n")) for item in rule.split("|")]


def written_turns(n: int, seed: int) -> list[str]:
    """n different turns, of all tasks equally many, give or take one. Raises ValueError if a task has not so many."""
    tasks, grammar = (
        {name: alternatives(rule) for name, rule in rules.items()} for rules in (TASKS, GRAMMAR)
    )
    chance, turns, tried = random.Random(seed), {}, 0

    def expanded(text: str) -> str:
        """Each {name} replaced by one of its alternatives, and what these name in turn."""
        return re.sub(r"\{(\w+)\}", lambda found: expanded(chance.choice(grammar[found[1]])), text)

    while len(turns) < n:
        text = expanded(chance.choice([*tasks.values()][len(turns) % len(tasks)]))
        turns[re.sub(r"(^|[.?:]\s+|[\"\n])[a-z]", lambda found: found[0].upper(), text)] = (
            None  # sentences begin with a capital
        )
        if (tried := tried + 1) > 20 * n:
            raise ValueError(f"--written {n}: the grammar has too few different turns")
    return list(turns)


def corpus_turns() -> list[str]:
    """What opens the English conversations of chatterbot-corpus."""
    yaml = optional("yaml", PACKAGE)
    turns = {}
    with tempfile.TemporaryDirectory() as folder, wheel(PACKAGE, folder) as files:
        for name in sorted(files.namelist()):
            if "/english/" in name and name.endswith(".yml"):
                for conversation in yaml.safe_load(files.read(name))["conversations"]:
                    turns[str(conversation[0]).strip()] = None
    return [turn for turn in turns if turn]


def main() -> None:
    parser = OneLineParser(prog="data.turns", description=__doc__)
    add_options(parser, Config)
    config = Config(**vars(parser.parse_args()))
    out = Path(config.out)
    check_out(str(out.parent))
    turns = list(dict.fromkeys(corpus_turns() + written_turns(config.written, config.seed)))
    random.Random(config.seed).shuffle(turns)
    write_atomically(
        out,
        lambda temporary: temporary.write_text(
            "".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8"
        ),
    )
    print(f"{out}: {len(turns)} turns")


if __name__ == "__main__":
    run(main)
