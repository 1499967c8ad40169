"""Task files for lm_eval, whose questions lie beside them."""

import json
from pathlib import Path

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: brier_score}}]
"""


def write_choice(folder: Path, name: str, documents: list[dict]) -> None:
    """A task of that name. documents: {context, choices, answer: number of the right one}."""
    questions = folder / f"{name}.jsonl"
    questions.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, questions=questions))
