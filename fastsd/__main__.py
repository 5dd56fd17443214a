"""`python -m fastsd` is `fastsd`."""

from fastsd.cli import main

if __name__ == "__main__":
    main()
