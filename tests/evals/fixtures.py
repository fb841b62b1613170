"""Hand-written rows in the shape of the hub's data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals.data import write_dataset

FACTS = [
    ("How many legs has a dog?", ["four", "nine", "none", "a hundred and six"], 0),
    ("Where does the sun rise?", ["in the pond", "in the east", "on Tuesday", "in a drawer"], 1),
    ("What do cows drink?", ["ink", "sand", "water", "melted wax"], 2),
    ("Which of these is a colour?", ["seven", "to run", "loud", "green"], 3),
    ("What is frozen water?", ["ice", "fire", "bread", "wool from old sheep"], 0),
    ("What do we read?", ["spoons", "books", "stairs", "rain and snow"], 1),
    ("When is it dark?", ["at noon", "in paint", "at night", "under a roof of glass"], 2),
    ("What has pages?", ["a dog", "a river", "a cloud", "a book"], 3),
]


def arc_rows(split: str) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{split}-{i}",
            "question": f"{question} ({split})",
            "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[gold],
        }
        for i, (question, choices, gold) in enumerate(FACTS)
    ]


def hellaswag_rows() -> list[dict[str, Any]]:
    return [
        {
            "ind": i,
            "activity_label": "Daily life",
            "ctx_a": f"Someone asks: {question}",
            "ctx_b": "the answer is",
            "ctx": "",
            "endings": choices,
            "label": str(gold),
        }
        for i, (question, choices, gold) in enumerate(FACTS)
    ]


def mmlu_rows() -> list[dict[str, Any]]:
    return [{"question": q, "subject": "anatomy", "choices": choices, "answer": gold} for q, choices, gold in FACTS]


def gsm8k_rows() -> list[dict[str, Any]]:
    return [
        {
            "question": f"Tom has {i} apples and buys {i + 2} more. How many has he?",
            "answer": f"{i} + {i + 2} = {2 * i + 2}\n#### {2 * i + 2}",
        }
        for i in range(8)
    ]


def write_all(out: Path) -> dict[str, Path]:
    """Write every data set; task -> folder."""
    datasets = {
        "arc_easy": ("allenai/ai2_arc", {"ARC-Easy": {split: arc_rows(split) for split in ("train", "test")}}),
        "hellaswag": ("Rowan/hellaswag", {"default": {"validation": hellaswag_rows()}}),
        "mmlu_anatomy": ("cais/mmlu", {"anatomy": {"dev": mmlu_rows()[:5], "test": mmlu_rows()}}),
        "gsm8k": ("openai/gsm8k", {"main": {split: gsm8k_rows() for split in ("train", "test")}}),
    }
    for hub_id, configs in datasets.values():
        write_dataset(out, hub_id, configs)
    return {task: out / hub_id for task, (hub_id, _) in datasets.items()}
