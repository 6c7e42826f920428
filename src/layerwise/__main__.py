"""``python -m layerwise``: the command line, for where no script is installed."""

from layerwise.cli.main import main

if __name__ == "__main__":
    main()
