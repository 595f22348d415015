"""Measurements of backyfs against the floors of its machine and against other programs.

`python -m bench` measures, `python -m bench.mkimage` makes the disk images measured on.
README.md says how to read the result. The bench drives programs through their command lines only
and imports nothing of backyfs, so it measures what an operator would wait for.
"""
