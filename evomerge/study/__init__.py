"""Floor 6: the search as a record. The Optuna study is the only durable truth.

`run.py` starts and resumes a search, `setup.py` resolves its config, `driver.py` is its one loop,
`schedule.py` hands out chunks, `results.py` makes a trial's result of what came back. `storage.py`
is the only file that knows Optuna, `items.py` keeps results per item beside it, `ledger.py` answers
questions about the trials, `view.py` reads a study, `export.py` writes what it found.

To add something that every trial remembers, give `TrialResult` a field with a default: old studies
stay readable. Tests inject faults through `Surroundings` and kill real processes.
"""
