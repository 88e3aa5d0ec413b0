"""`python -m packtrain`, for launchers that start a module (torchrun, accelerate)."""

from packtrain.cli import main

if __name__ == "__main__":
    main()
