"""What a model should still know after an edit: questions with their answers, and plain text."""

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from qsae_kit.lm.chat import spoken
from qsae_kit.world import world


class Fact(NamedTuple):
    """A question, and whether a text answers it."""

    question: str
    right: Callable[[str], bool]


def _names(*answers: str) -> Callable[[str], bool]:
    return lambda text: any(answer.casefold() in spoken(text).casefold() for answer in answers)


# Questions that small models answer; an answer is right where it names the word.
QUESTIONS = """
What is the capital of France?|Paris
What is the capital of Italy?|Rome
What is the capital of Japan?|Tokyo
What is the capital of Germany?|Berlin
What is the capital of Spain?|Madrid
What is the capital of Egypt?|Cairo
What is the capital of England?|London
What is the capital of China?|Beijing
What is the capital of Russia?|Moscow
What is the capital of Greece?|Athens
Which planet is known as the red planet?|Mars
Which is the largest planet of the solar system?|Jupiter
Which star is at the center of the solar system?|Sun
How many days are in a week?|seven,7
How many months are in a year?|twelve,12
How many legs does a spider have?|eight,8
How many continents are there?|seven,7
How many sides does a triangle have?|three,3
What is two plus two?|four,4
What is ten minus three?|seven,7
What is three times three?|nine,9
Which gas do plants take in from the air?|carbon dioxide,CO2
Which gas do humans need to breathe?|oxygen
What is water made of?|hydrogen
What is frozen water called?|ice
Which language is spoken in Brazil?|Portuguese
Which language is spoken in Mexico?|Spanish
Who wrote Romeo and Juliet?|Shakespeare
Who painted the Mona Lisa?|Leonardo,Vinci
Who was the first president of the United States?|Washington
Who developed the theory of relativity?|Einstein
Which ocean lies between Europe and America?|Atlantic
Which is the largest ocean?|Pacific
Which is the longest river of South America?|Amazon
Which organ pumps blood through the body?|heart
Which animal is known as man's best friend?|dog
What do bees make?|honey
What is the opposite of hot?|cold
Which color do you get by mixing blue and yellow?|green
What is the chemical symbol of gold?|Au
"""

PASSAGES = tuple(
    (
        "The river rises in the hills north of the town and reaches the sea after some forty miles,"
        " past mills that no longer work. | Bread is made from flour, water, salt and yeast. The"
        " dough rests until it has doubled, is shaped, and goes into a hot oven. | In the first"
        " half of the century most letters were carried by train, and a reply could arrive on the"
        " same day. | A binary search halves the part of the list that can still hold the value at"
        " every step, so that it needs few comparisons. | The committee met on Tuesday to discuss"
        " the budget. It decided to repair the library's roof before the winter. | Whales are"
        " mammals: they breathe air, feed their young with milk, and have small bones where their"
        " ancestors had legs. | She opened the window, looked at the empty street, and thought of"
        " the summer when they had all lived in the same house. | Iron rusts where it meets water"
        " and oxygen. Paint keeps both away, and zinc rusts in its place."
    ).split(" | ")
)


def general_facts(n: int = 100) -> list[Fact]:
    """At most `n` questions of fact for any model."""
    pairs = [line.split("|") for line in QUESTIONS.strip().splitlines()]
    return [Fact(question, _names(*answers.split(","))) for question, answers in pairs][:n]


def world_facts(n: int = 100, seed: int = 0) -> list[Fact]:
    """`n` questions about the people of the bundled model's world."""
    rng = random.Random(f"facts/{seed}")
    draw = world.Draw(split="evaluation")
    made: dict[str, world.Request] = {}
    while len(made) < n:
        request = world.attribute_request(
            rng, draw, rng.choice(world.people()).name, rng.choice(world.PUBLIC)
        )
        made.setdefault(request.text, request)

    def right(request: world.Request, answer: str) -> bool:
        return world.judge(request, answer) == "right"

    return [Fact(text, partial(right, request)) for text, request in made.items()]


def world_passages() -> tuple[str, ...]:
    """Sentences of the bundled model's world, outside of any chat."""
    rng = random.Random("plain")
    draw = world.Draw(split="evaluation")
    made = [
        world.attribute_request(
            rng, draw, rng.choice(world.people()).name, rng.choice(world.PUBLIC)
        )
        for _ in range(48)
    ]
    told = ["".join(piece.text for piece in request.answer) for request in made]
    return tuple(" ".join(told[i : i + 6]) for i in range(0, 48, 6))
