"""The commands by name, with what each does.

The module of the same name has the command itself. Nothing is imported here, so that help is quick.
"""

HELP = {
    "init": "Write a file to fill in: a training of your own, for train, compare and simplify.",
    "advise": "Measure in a minute whether meprop helps a training, by how much, and which line of code to try.",
    "train": "Train once, dense or sparse, with checkpoints.",
    "compare": "Train dense and sparse side by side, with the same seeds and budget, and say whether sparse is worth "
    "it.",
    "tune": """Find the rule and the settings that pay, by successive halving, and confirm them with other seeds.

    Half of the budget is for rounds, in which dense and all candidates that are left train for the same seconds. A
    third of them goes on. The other half is for the best one beside dense.
    """,
    "committee": "Let runs of train answer together: the error of each on the test images, and of all by their mean.",
    "simplify": "Train dense, sparse (meProp), and sparse and simplified (meSimp), side by side; and time the models "
    "then.",
    "reproduce": "Repeat experiments of the paper, and set the results beside its own. Finished runs are not repeated.",
    "report": "Write a page about results: verdicts, curves, the parts of a step, layers, and the commands to repeat "
    "them.",
    "data": "Find or download the data of a task, and say what is there.",
    "bench": "Measure speed.",
    "chip": "Train in fixed point on one physical layer that serves for all: models, and a core.",
    "doctor": "Show what this installation can use: backends, extras, versions, machine and data.",
}
"""The first line is shown in the help of all commands."""

WITHOUT_TORCH = frozenset({"report"})
"""The commands that are done before torch is imported."""
