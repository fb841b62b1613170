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


def truthfulqa_rows() -> list[dict[str, Any]]:
    return [
        {
            "question": question,
            "mc1_targets": {"choices": choices, "labels": [int(i == gold) for i in range(4)]},
            "mc2_targets": {"choices": choices, "labels": [int(i in (gold, (gold + 1) % 4)) for i in range(4)]},
        }
        for question, choices, gold in FACTS
    ]


def truthfulqa_generation_rows() -> list[dict[str, Any]]:
    return [
        {
            "type": "Adversarial",
            "category": "Daily life",
            "question": question,
            "best_answer": choices[gold],
            "correct_answers": [choices[gold], f"It is {choices[gold]}."],
            "incorrect_answers": [choice for i, choice in enumerate(choices) if i != gold],
            "source": "",
        }
        for question, choices, gold in FACTS
    ]


def piqa_rows() -> list[dict[str, Any]]:
    return [{"goal": q, "sol1": choices[0], "sol2": choices[1], "label": gold % 2} for q, choices, gold in FACTS]


def winogrande_rows() -> list[dict[str, Any]]:
    return [
        {
            "sentence": f"{question} The teacher said that _ is right, for she had read it in an old book.",
            "option1": choices[0],
            "option2": choices[3],
            "answer": str(gold % 2 + 1),
        }
        for question, choices, gold in FACTS
    ]


def lambada_rows() -> list[dict[str, Any]]:
    return [{"text": f"{question} We asked the old teacher, and she said: {c[gold]}"} for question, c, gold in FACTS]


def boolq_rows() -> list[dict[str, Any]]:
    return [
        {
            "passage": f"Some say {choices[0]}, others {choices[2]}.",
            "question": question[:-1].lower(),
            "label": gold % 2,
        }
        for question, choices, gold in FACTS
    ]


def openbookqa_rows() -> list[dict[str, Any]]:
    return [
        {
            "question_stem": question,
            "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[gold],
        }
        for question, choices, gold in FACTS
    ]


def write_all(out: Path) -> dict[str, Path]:
    """Write every data set; task -> folder."""
    both = ("train", "validation")
    datasets = {
        "allenai/ai2_arc": {
            config: {split: arc_rows(split) for split in ("train", "test")} for config in ("ARC-Easy", "ARC-Challenge")
        },
        "Rowan/hellaswag": {"default": {"validation": hellaswag_rows()}},
        "cais/mmlu": {"anatomy": {"dev": mmlu_rows()[:5], "test": mmlu_rows()}},
        "openai/gsm8k": {"main": {split: gsm8k_rows() for split in ("train", "test")}},
        "truthfulqa/truthful_qa": {
            "multiple_choice": {"validation": truthfulqa_rows()},
            "generation": {"validation": truthfulqa_generation_rows()},
        },
        "baber/piqa": {"default": {split: piqa_rows() for split in both}},
        "allenai/winogrande": {"winogrande_xl": {split: winogrande_rows() for split in both}},
        "EleutherAI/lambada_openai": {"default": {"test": lambada_rows()}},
        "aps/super_glue": {"boolq": {split: boolq_rows() for split in both}},
        "allenai/openbookqa": {"main": {split: openbookqa_rows() for split in (*both, "test")}},
    }
    for hub_id, configs in datasets.items():
        write_dataset(out, hub_id, configs)
    return {task: out / hub_id for task, hub_id in HUB_IDS.items()}


HUB_IDS = {
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "hellaswag": "Rowan/hellaswag",
    "mmlu_anatomy": "cais/mmlu",
    "gsm8k": "openai/gsm8k",
    "truthfulqa_mc1": "truthfulqa/truthful_qa",
    "truthfulqa_mc2": "truthfulqa/truthful_qa",
    "truthfulqa_gen": "truthfulqa/truthful_qa",
    "piqa": "baber/piqa",
    "winogrande": "allenai/winogrande",
    "lambada_openai": "EleutherAI/lambada_openai",
    "boolq": "aps/super_glue",
    "openbookqa": "allenai/openbookqa",
}
