"""`python -m fleetprune` is the command `fleetprune`."""

from fleetprune.cli import main

if __name__ == "__main__":
    main()
