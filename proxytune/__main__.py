"""`python -m proxytune`."""

from proxytune.cli import main

if __name__ == "__main__":
    main()
