"""Writes this experiment's task files.

python -m experiments.evaluation.make_tasks
"""

import json
import random
from pathlib import Path

from lm.command import write_atomically

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest",
    "Greece": "Athens", "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Nigeria": "Abuja", "Ghana": "Accra", "Morocco": "Rabat", "Japan": "Tokyo",
    "China": "Beijing", "South Korea": "Seoul", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Indonesia": "Jakarta", "India": "New Delhi", "Pakistan": "Islamabad", "Iran": "Tehran",
    "Iraq": "Baghdad", "Russia": "Moscow", "Ukraine": "Kyiv", "Romania": "Bucharest",
    "Bulgaria": "Sofia", "Serbia": "Belgrade", "Croatia": "Zagreb", "Finland": "Helsinki",
    "Sweden": "Stockholm", "Norway": "Oslo", "Denmark": "Copenhagen", "Ireland": "Dublin",
    "Belgium": "Brussels", "the Netherlands": "Amsterdam", "Canada": "Ottawa",
    "Mexico": "Mexico City", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago",
    "Argentina": "Buenos Aires", "Brazil": "Brasilia", "Colombia": "Bogota",
    "Australia": "Canberra", "New Zealand": "Wellington",
}  # fmt: skip
NAMES = "Tom Anna Ben Clara David Emma Frank Grace Henry Iris".split()
THINGS = "apples books coins pencils stamps marbles eggs cards shells buttons".split()
FOLDER = Path(__file__).parent / "tasks"


def capitals() -> list[dict]:
    """Each with the capitals of the three countries that follow it in the list, in any order."""
    draw, names = random.Random(0), list(CAPITALS.values())
    result = []
    for i, (country, capital) in enumerate(CAPITALS.items()):
        choices = [names[(i + k) % len(names)] for k in range(4)]
        draw.shuffle(choices)
        prompt = f"The capital of {country} is"
        result.append({"prompt": prompt, "choices": choices, "answer": choices.index(capital)})
    return result


def problems() -> list[dict]:
    """Sums and differences of one-digit numbers, in words."""
    draw, result = random.Random(0), []
    for i in range(30):
        name, things = NAMES[i % 10], THINGS[(i * 7 + i // 10) % 10]
        a, b = draw.randint(3, 9), draw.randint(2, 9)
        if i % 2 and a > b:
            story, sign, target = f"gives {b} of them away", "-", a - b
        else:
            story, sign, target = f"gets {b} more", "+", a + b
        result.append({
            "prompt": f"Question: {name} has {a} {things} and {story}."
            f" How many {things} does {name} have now?\nAnswer:",
            "target": str(target),
            "reasoning": f"{name} had {a} {things} and {story}. {a} {sign} {b} = {target}."
            f" The answer is {target}.",
        })  # fmt: skip
    return result


if __name__ == "__main__":
    for name, examples in {"capitals": capitals(), "problems": problems()}.items():
        lines = "".join(json.dumps(example) + "\n" for example in examples)
        write_atomically(FOLDER / f"{name}.jsonl", lines)
