"""`python -m pipeline`, for launchers such as `torchrun -m pipeline train`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
