"""`python -m packtrain.experiments.rainbow`."""

from packtrain.experiments.rainbow.trained import main

main()
