"""Made-up tasks of lm-evaluation-harness over local JSON lines, one of each kind of request."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

CHOICE, SAY, READ = "made_choice", "made_say", "made_read"
"""Multiple choice with drawn examples before the question, generation, and rolling."""

_LONG = "A text that is longer than the model can read loses its beginning. " * 3
_ROWS = {
    CHOICE: [
        {
            "question": f"{before}What is {n} and {n}?",
            "choices": [str(n), f"{2 * n} in all"],
            "at": 1,
        }
        for n, before in enumerate(["", "", "Once. ", "Twice: ", "", _LONG], start=2)
    ]
    # read together, for these differ in their last token alone
    + [{"question": "Which letter?", "choices": ["x", "y", "z"], "at": 1}],
    SAY: [
        {"question": question, "answer": "the"}
        for question in ("Return the", "One of", "A file is", _LONG)
    ],
    READ: [{"text": text} for text in ("Return a copy.", _LONG, "x")],
}
_CONFIGS = {
    CHOICE: {
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "num_fewshot": 1,
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "at",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    SAY: {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    READ: {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def write(folder: Path) -> Path:
    """Write all tasks into ``folder``, which --include-path then names."""
    folder.mkdir()
    for name, rows in _ROWS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        described = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            **_CONFIGS[name],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(described))
    return folder
