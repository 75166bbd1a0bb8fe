"""`python -m carry`: the command `carry`, where its script is not on the path."""

from carry.cli import main

if __name__ == "__main__":
    main()
