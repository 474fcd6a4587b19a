"""``python -m tenzoo``."""

from tenzoo.cli import run

if __name__ == "__main__":
    run()
