"""Pictures of one run (run.py), of several runs (compare.py), and of README (pictures.py)."""
