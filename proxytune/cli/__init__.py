"""The command line: it parses, prints and asks. What a command does, Python can do as well."""
