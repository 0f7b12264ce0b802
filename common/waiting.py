"""
Threads that wait without burning the processor: gently() is called before torch is imported.

torch shares each operation out among threads. One that has finished its part spins until the others have,
for a few milliseconds, since going to sleep costs more than a short wait. Beside another program the part it
waits for may have lost its core, and all that spinning takes the core from whoever should finish: a training
step once took 26 times as long beside one loop of low priority (experiments/neighbours.py). To give up after
a thousand turns costs up to a seventh on a quiet machine, and no neighbour made a step three times as long.
Linux only: there torch has GNU's OpenMP. Whoever has set a variable of OpenMP keeps it.
"""
import os

OWN = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")        # a user's own choice


def gently():
    """Set GOMP_SPINCOUNT=1000 in this process, unless the user has set a variable of OpenMP."""
    if not any(name in os.environ for name in OWN):
        os.environ["GOMP_SPINCOUNT"] = "1000"
