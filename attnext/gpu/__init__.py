"""``attnext gpu-check``: everything that a GPU's first day is to show, in one command and one folder.

Each stage of ``stages.py`` is a process of its own, as an error on a GPU can end the process that made it.
"""
