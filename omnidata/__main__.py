"""``python -m omnidata``: the commands, from a checkout that is not installed."""

from omnidata.cli import main

if __name__ == "__main__":
    main()
