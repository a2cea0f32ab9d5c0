"""train.py with more tasks, bases and allocators, run from the repository root:

python -m extras --base gpt2 --data glue:CoLA --allocator worth
"""

import train
from extras import allocators, gpt2, tasks  # noqa: F401, they fill the registries
from extras.experiments import bases  # noqa: F401

if __name__ == "__main__":
    train.main(prog="python -m extras")
