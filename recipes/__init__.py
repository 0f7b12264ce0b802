"""What is no composition of flags. Each recipe is run as python -m recipes.NAME."""
from common import memory, waiting

waiting.gently()                                            # before torch is imported
memory.keep()
