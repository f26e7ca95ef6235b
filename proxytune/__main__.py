"""`python -m proxytune`."""

from proxytune.cli import app

if __name__ == "__main__":
    app(prog_name="proxytune")
