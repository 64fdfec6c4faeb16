"""`python -m qatrun`, and `torchrun ... -m qatrun`."""

from qatrun.cli import main

if __name__ == "__main__":
    main()
