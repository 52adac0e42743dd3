"""evomerge: search for the best merge of fine-tuned language models, and trust what the search found.

    import evomerge

    study = evomerge.search("configs/quickstart.yaml")
    study.trials                      # a pandas frame
    evomerge.merge("winner.yaml", "merged-model")

Nothing heavy is imported until one of these is called.
"""

__version__ = "0.1.0"
