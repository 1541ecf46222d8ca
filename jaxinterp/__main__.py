"""`python -m jaxinterp`: the command line."""

from jaxinterp.commands.main import main

if __name__ == "__main__":
    main()
