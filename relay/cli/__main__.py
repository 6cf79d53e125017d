"""`python -m relay.cli`."""

from relay.cli.main import main

if __name__ == "__main__":
    main()
