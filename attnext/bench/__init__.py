"""``attnext bench``: the kernels beside their peers, in time and memory.

Cases and peers stand in one place each, ``cases.py`` and ``peers.py``, also for ``benchmarks/test_suite.py``.
What this needs beyond torch (``pip install 'attnext[bench]'``) is imported where it is used.
"""
