"""What is there inside a sandbox besides the interpreter: this folder alone, so its files import nothing of
proxytune but each other. Standard library only, Python 3.7 or newer (DS-1000 pins 3.7)."""
