"""Evaluates a checkpoint: on a split of its run's data, or at tasks on a file of questions.

`python eval.py --checkpoint=WORKDIR --split=test` generates an answer to every question of a split
and writes samples.jsonl, metrics.json and sheet.png. Any field of the run's data config can be
given as a flag, such as --config.data.test_json=FILE.

`python eval.py --checkpoint=FOLDER --tasks=vqav2,anls --data=FILE.jsonl` asks a file's questions
and writes samples_TASK.jsonl, metrics.json and report.html; FOLDER may be a Hugging Face one. With
--score_only the file holds answers too, and no model is loaded. See docs/evaluation.md.
"""

from fuyu_jax import errors
from fuyu_jax.evals import command

if __name__ == "__main__":
    errors.run_main(lambda: (command.run(__doc__), None)[1])
