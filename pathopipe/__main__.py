"""Lets ``python -m pathopipe`` do what ``pathopipe`` does."""

from pathopipe.cli.app import main

if __name__ == "__main__":
    main()
