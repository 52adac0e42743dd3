"""Floor 4: score a live model with lm-eval's own tasks, filters and metrics, prepared once.

The way of a number: `tasks.py` loads (`catalog.py`) and checks (`settings.py`) a suite without a
model; `roles.py` and `items.py` give each role its items; `harness.py` builds prompts
(`prompts.py`), tokenises them once (`prepared_lm.py`) and scores chunk by chunk, answering with
results per item (`evaluator.py`); `TaskSuite.aggregate` makes task metrics of them, `scores.py` one
objective. `evaluator.py`, `items.py`, `plain.py` and `scores.py` import no lm-eval; nothing patches
it.

To add an evaluator, subclass `AbstractEvaluator` in a file of its own, answering with the same
metric keys, and let the worker make it. To add an objective, add its name to `ObjectiveConfig` and
its formula to `Objective` in `scores.py`, with its standard error where that has a closed form.

Tested against stock `simple_evaluate` on the same weights, metric by metric and prompt by prompt;
against itself (chunks add up, same weights give the same bits, new weights leave nothing stale);
and with broken weights. `tests/tiny.py` has the model, tokenizer and tasks.
"""
